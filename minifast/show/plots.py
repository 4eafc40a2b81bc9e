"""Where plots are drawn. matplotlib is imported when the first plot is made."""
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

FILE_BACKENDS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}  # with all others pyplot shows figures
LABELS = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}
STEPS = "step (weight updates)"
MANY = 8  # layer groups: more of them share a range of colours instead of having names


def axes(ax: "Axes | None" = None, figsize: tuple[float, float] = (7.0, 4.2)) -> "Axes":
    """`ax` itself, or new axes to draw on.

    Where pyplot shows figures (a window, a notebook) the new axes belong to one of its own and appear there once.
    Elsewhere they belong to a bare figure, which is garbage when dropped: 100 plots leave nothing open.

    >>> axes().figure.savefig("/dev/null", format="png")
    """
    if ax is not None:
        if isinstance(ax, type) or not (hasattr(ax, "plot") and hasattr(ax, "set_xlabel")):
            raise TypeError(f"ax must be axes of matplotlib or None, got {quoted(ax)}.")
        return ax
    import matplotlib
    if matplotlib.get_backend().lower() not in FILE_BACKENDS:
        import matplotlib.pyplot as plt
        return plt.subplots(figsize=figsize, layout="constrained")[1]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def line(ax: "Axes", values: NDArray[np.float64], **style: Any) -> "Line2D":
    """Draw `values` against their number 0, 1, ...; a single one, which makes no line, as a dot."""
    drawn: Line2D = ax.plot(np.arange(len(values)), values, marker="o" if len(values) == 1 else None, **style)[0]
    return drawn


def count_on_x(ax: "Axes", label: str) -> None:
    """Label the x-axis, with ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    ax.set_xlabel(label)


def plot_hypers(columns: Mapping[str, NDArray[np.float64]], names: Sequence[str] = (), title: str = "",
                ax: "Axes | None" = None) -> "Axes":
    """Draw hyper-parameters against the step, each on a y-axis of its own.

    columns: hyper -> (steps,) or (steps, layer groups); the first is on the left axes, which are returned.
    names: of the layer groups.
    """
    left = axes(ax)
    handles: list[Any] = []
    for i, (hyper, column) in enumerate(columns.items()):
        panel = left if i == 0 else left.twinx()
        if i > 1:
            panel.spines["right"].set_position(("axes", 1 + 0.18 * (i - 1)))
        label, curves = LABELS.get(hyper, hyper), column.reshape(len(column), -1).T
        labels = [label] if len(curves) == 1 else [f"{label}, {name}" for name in names]
        handles += _draw(panel, np.arange(len(column)), curves, labels, len(handles), linestyle="--" if i else "-")
        panel.set_ylabel(label)
        peaks = curves.max(axis=1)
        if curves.min() > 0 and peaks.max() > 5 * peaks.min():  # on a linear axis the first layers would look frozen
            panel.set_yscale("log")
        elif i == 0:
            panel.set_ylim(bottom=min(0.0, curves.min()))  # so that a constant rate does not look like a step
    count_on_x(left, STEPS)
    rows = _legend(left, handles)
    left.set_title(textwrap.fill(title, 88), fontsize="small", pad=6 + 16 * rows)
    return left


def step_curves(steps: NDArray[np.int64], columns: NDArray[np.float64], names: Sequence[str], label: str,
                ax: "Axes | None" = None) -> "Axes":
    """Draw the columns of `columns`, (rows, names), against `steps`; one that is all nan is left out."""
    ax = axes(ax)
    known = [k for k, column in enumerate(columns.T) if np.isfinite(column).any()]
    _legend(ax, _draw(ax, steps, columns.T[known], [names[k] for k in known], linewidth=1))
    count_on_x(ax, STEPS)
    ax.set_ylabel(label)
    return ax


def _draw(ax: "Axes", steps: NDArray[np.int64], curves: NDArray[np.float64], labels: Sequence[str], first: int = 0,
          **style: Any) -> list["Line2D"]:
    """One curve per label, colours from number `first` on; gives those for a legend, of many the first and the last."""
    from matplotlib import colormaps
    n, marker = len(labels), "o" if len(steps) == 1 else None
    drawn = [ax.plot(steps, curve, label=label, marker=marker, **style,
                     color=f"C{first + k}" if n <= MANY else colormaps["viridis"](k / (n - 1)))[0]
             for k, (curve, label) in enumerate(zip(curves, labels, strict=True))]
    return drawn if n <= MANY else [drawn[0], drawn[-1]]


def _legend(ax: "Axes", handles: Sequence[Any]) -> int:
    """Name two or more curves above the axes: inside, that would hide one or another. Gives the number of rows."""
    if len(handles) < 2:
        return 0
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
    return -(-len(handles) // 3)
