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

FILE_BACKENDS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}
LABELS = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}
STEPS = "step (weight updates)"
MANY = 8  # layer groups: more of them share a range of colours instead of having names


def axes(ax: "Axes | None" = None, figsize: tuple[float, float] = (7.0, 4.2)) -> "Axes":
    """`ax` itself, or new axes to draw on.

    New axes belong to a pyplot figure where pyplot shows figures (a window, a notebook), so that they appear there
    once. Elsewhere they belong to a bare figure, which is garbage when dropped: 100 plots leave nothing open.

    >>> axes().figure.savefig("/dev/null", format="png")
    """
    if ax is not None:
        if isinstance(ax, type) or not (hasattr(ax, "plot") and hasattr(ax, "set_xlabel")):
            raise TypeError(f"ax must be axes of matplotlib or None, got {quoted(ax)}.")
        return ax
    if _pyplot_shows():
        import matplotlib.pyplot as plt
        return plt.subplots(figsize=figsize, layout="constrained")[1]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def _pyplot_shows() -> bool:
    import matplotlib
    return matplotlib.get_backend().lower() not in FILE_BACKENDS


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

    columns: hyper -> (steps,) or (steps, layer groups); names: of the layer groups. The first has the axis on the
    left, whose axes are returned.
    """
    left = axes(ax)
    handles: list[Any] = []
    for i, (hyper, column) in enumerate(columns.items()):
        panel = left if i == 0 else left.twinx()
        if i > 1:
            panel.spines["right"].set_position(("axes", 1 + 0.18 * (i - 1)))
        label, curves = LABELS.get(hyper, hyper), column.reshape(len(column), -1).T
        panel.set_ylabel(label)
        handles += _curves(panel, curves, label, names, first_color=len(handles), linestyle="-" if i == 0 else "--")
        peaks = curves.max(axis=1)
        if curves.min() > 0 and peaks.max() > 5 * peaks.min():  # on a linear axis the first layers would look frozen
            panel.set_yscale("log")
        elif i == 0:
            panel.set_ylim(bottom=min(0.0, curves.min()))  # so that a constant rate does not look like a step
    count_on_x(left, STEPS)
    rows = 0
    if len(handles) > 1:  # above the axes: inside, it would hide one curve or another
        left.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
        rows = -(-len(handles) // 3)
    left.set_title(textwrap.fill(title, 88), fontsize="small", pad=6 + 16 * rows)
    return left


def _curves(ax: "Axes", curves: NDArray[np.float64], label: str, names: Sequence[str], first_color: int,
            linestyle: str) -> list["Line2D"]:
    """One curve per layer group; gives those that belong in a legend: of many, the first and the last."""
    n = len(curves)
    if n == 1:
        return [line(ax, curves[0], label=label, color=f"C{first_color}", linestyle=linestyle)]
    from matplotlib import colormaps
    drawn = [line(ax, curve, label=f"{label}, {names[k]}", linestyle=linestyle,
                  color=f"C{first_color + k}" if n <= MANY else colormaps["viridis"](k / (n - 1)))
             for k, curve in enumerate(curves)]
    return drawn if n <= MANY else [drawn[0], drawn[-1]]


def step_curves(steps: NDArray[np.int64], columns: NDArray[np.float64], names: Sequence[str], label: str,
                ax: "Axes | None" = None) -> "Axes":
    """Draw the columns of `columns`, (rows, names), against `steps`; one that is all nan is left out.

    Up to 8 are named in a legend above the axes; more of them share a range of colours, and the first and the last
    are named.
    """
    from matplotlib import colormaps
    ax = axes(ax)
    shown = [(name, column) for name, column in zip(names, columns.T, strict=True) if np.isfinite(column).any()]
    for k, (name, column) in enumerate(shown):
        color = f"C{k}" if len(shown) <= MANY else colormaps["viridis"](k / (len(shown) - 1))
        ax.plot(steps, column, color=color, label=name, linewidth=1, marker="o" if len(steps) == 1 else None)
    handles = ax.get_lines() if len(shown) <= MANY else [ax.get_lines()[0], ax.get_lines()[-1]]
    if len(shown) > 1:  # above the axes: inside, it would hide one curve or another
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
    count_on_x(ax, STEPS)
    ax.set_ylabel(label)
    return ax
