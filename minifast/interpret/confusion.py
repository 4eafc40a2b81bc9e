"""What a table of actual against predicted classes says: its plot, the most confused classes, a report per class."""
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..show.plots import axes
from ..show.tables import Table, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Counts = NDArray[np.int64]
LETTERS = 28  # of a class's name beside a plot
FONT = (5.0, 10.0)  # points: smaller is not readable, larger is not needed
BROAD = 0.65  # width of a letter / size of its font
GOLDEN = 0.7  # share of a figure's side that is left for the matrix, about, when names and title have theirs


class Confused(NamedTuple):
    """How many samples of the class `actual` were taken for `predicted`."""

    actual: str
    predicted: str
    count: int  # type: ignore[assignment]  # hides the method of tuples


class MostConfused(list[Confused]):
    """A list of `Confused`, most frequent first, that prints as a table."""

    def __repr__(self) -> str:
        return table(Confused._fields, self) if self else "(none)"


def most_confused(counts: Counts, names: Sequence[str], min_val: int = 1) -> MostConfused:
    """`Interpretation.most_confused` of the table `counts`, rows actual, columns predicted; equal counts in order.

    >>> most_confused(np.array([[5, 1, 0], [3, 2, 0], [0, 0, 4]]), ["cat", "dog", "emu"])
    actual  predicted  count
    dog     cat            3
    cat     dog            1
    """
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong >= min_val)
    order = np.argsort(-wrong[rows, columns], kind="stable")
    return MostConfused(Confused(names[i], names[j], int(wrong[i, j])) for i, j in zip(rows[order], columns[order],
                                                                                       strict=True))


def report(counts: Counts, names: Sequence[str]) -> Table:
    """`Interpretation.report` of the table `counts`.

    >>> report(np.array([[3, 1], [0, 4]]), ["cat", "dog"])
    class      precision  recall      f1  support
    cat           1.0000  0.7500  0.8571        4
    dog           0.8000  1.0000  0.8889        4
    accuracy                      0.8750        8
    macro avg     0.9000  0.8750  0.8730        8
    """
    right, support, taken = np.diag(counts), counts.sum(1), counts.sum(0)
    precision = right / np.maximum(taken, 1)
    recall = right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(support + taken, 1)  # as 2 p r / (p + r), without 0 / 0
    known, n = support > 0, int(counts.sum())
    rows = [_row(name, p, r if s else None, f if s else None, s)
            for name, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)]
    rows.append(_row("accuracy", None, None, right.sum() / n, n))
    rows.append(_row("macro avg", precision[known].mean(), recall[known].mean(), f1[known].mean(), n))
    return Table(rows)


def _row(name: str, *shares_and_support: Any) -> dict[str, Any]:
    *shares, support = shares_and_support
    named = zip(("precision", "recall", "f1"), shares, strict=True)
    return {"class": name, **{key: None if share is None else float(share) for key, share in named},
            "support": int(support)}


def plot(counts: Counts, names: Sequence[str], normalize: bool = False, ax: "Axes | None" = None) -> "Axes":
    """Draw the matrix (k, k), rows actual, columns predicted, as `Interpretation.plot_confusion_matrix` says.

    The scale of the colours shows rare confusions too. Where there is no room for numbers, a colour bar says what the
    colours mean, and of the names only as many are written as can be read.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    k, labels = len(names), [_short(name) for name in names]
    if ax is None:
        side = min(11.0, 2.2 + 0.42 * k) + 0.06 * max(map(len, labels))  # inches
        ax = axes(figsize=(side, side))
        room = 72 * GOLDEN * side
    else:
        ax = axes(ax)
        room = GOLDEN * min(ax.bbox.width, ax.bbox.height) * 72 / ax.figure.dpi
    support = counts.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(support == 0, counts.shape), counts / np.maximum(support, 1))
    norm = PowerNorm(0.5, 0, 1)
    image = ax.imshow(shares, cmap=colormaps["Blues"].with_extremes(bad="0.9"), norm=norm, aspect="equal")
    cell = room / k  # points
    texts = [[f"{shares[i, j]:.2f}" if normalize else str(counts[i, j]) for j in range(k)] for i in range(k)]
    font = min(FONT[1], cell / BROAD / (1 + max(len(text) for row in texts for text in row)))
    if font >= FONT[0]:
        for i, j in zip(*np.nonzero(counts), strict=True):
            ax.text(j, i, texts[i][j], ha="center", va="center", fontsize=font,
                    color="white" if norm(shares[i, j]) > 0.6 else "black")
    else:
        ax.figure.colorbar(image, ax=ax, label="share of the actual class", shrink=0.7)
    _write_names(ax, labels, cell)
    right = int(np.trace(counts))
    ax.set_title(f"{right:,} of {counts.sum():,} right ({right / counts.sum():.1%})", fontsize="medium")
    return ax


def _write_names(ax: "Axes", labels: Sequence[str], cell: float) -> None:
    """The names at both axes: every one, or of many every second, third ... one."""
    font = max(6.0, min(FONT[1] - 1, 0.8 * cell))  # points
    every = max(1, int(np.ceil(1.2 * font / cell)))
    places = range(0, len(labels), every)
    shown = [labels[i] for i in places]
    is_flat = max(map(len, shown)) * BROAD * font < 0.9 * every * cell
    ax.set_xticks(places, shown, fontsize=font, parse_math=False, rotation=0 if is_flat else 90)
    ax.set_yticks(places, shown, fontsize=font, parse_math=False)
    ax.set_xlabel("predicted")
    ax.set_ylabel("actual")


def _short(name: str) -> str:
    """`name`, without its middle if it is long: the two ends tell more names apart than the beginning."""
    name = " ".join(name.split())
    half = LETTERS // 2
    return name if len(name) <= LETTERS else f"{name[:half]}…{name[1 - half:]}"
