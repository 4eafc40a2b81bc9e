"""Where plots are drawn. matplotlib is imported when the first plot is made."""
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_BACKENDS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}
LABELS = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}


def axes(ax: "Axes | None" = None, figsize: tuple[float, float] = (7.0, 4.2)) -> "Axes":
    """`ax` itself, or new axes to draw on.

    New axes belong to a pyplot figure where pyplot shows figures (a window, a notebook), so that they appear there
    once. Elsewhere they belong to a bare figure, which is garbage when dropped: 100 plots leave nothing open.

    >>> axes().figure.savefig("/dev/null", format="png")
    """
    if ax is not None:
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
        label = LABELS.get(hyper, hyper)
        panel.set_ylabel(label)
        curves = column.reshape(len(column), -1).T
        for k, curve in enumerate(curves):
            name = f"{label}, {names[k]}" if len(curves) > 1 else label
            handles += panel.plot(np.arange(len(curve)), curve, label=name, color=f"C{len(handles)}",
                                  linestyle="-" if i == 0 else "--")
        peaks = curves.max(axis=1)
        if curves.min() > 0 and peaks.max() > 5 * peaks.min():  # on a linear axis the first layers would look frozen
            panel.set_yscale("log")
    left.set_xlabel("step (weight updates)")
    left.set_title(title, fontsize="medium")
    if len(handles) > 1:
        left.legend(handles=handles, loc="best")
    return left
