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
ROOM = 0.8  # share of the axes that is left for the matrix, about, when names and title have theirs


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
    """`Interpretation.most_confused` of the table `counts`, rows actual, columns predicted; equal counts in order."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong >= min_val)
    order = np.argsort(-wrong[rows, columns], kind="stable")
    pairs = zip(rows[order], columns[order], strict=True)
    return MostConfused(Confused(names[i], names[j], int(wrong[i, j])) for i, j in pairs)


def report(counts: Counts, names: Sequence[str]) -> Table:
    """`Interpretation.report` of the table `counts`."""
    right, support, taken, n = np.diag(counts), counts.sum(1), counts.sum(0), int(counts.sum())
    shares = {"precision": right / np.maximum(taken, 1), "recall": right / np.maximum(support, 1),
              "f1": 2 * right / np.maximum(support + taken, 1)}  # as 2 p r / (p + r), without 0 / 0
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        known = {key: float(share[i]) if support[i] or key == "precision" else None for key, share in shares.items()}
        rows.append({"class": name, **known, "support": int(support[i])})
    rows.append({"class": "accuracy", "precision": None, "recall": None, "f1": float(right.sum() / n), "support": n})
    means = {key: float(share[support > 0].mean()) for key, share in shares.items()}
    return Table([*rows, {"class": "macro avg", **means, "support": n}])


def plot(counts: Counts, names: Sequence[str], normalize: bool = False, ax: "Axes | None" = None) -> "Axes":
    """Draw the matrix (k, k), rows actual, columns predicted.

    The colour is the share of the row, on a scale that shows rare confusions too. Where there is no room for numbers,
    a colour bar says what it means, and only as many names are written as can be read.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    k, labels = len(names), [_short(name) for name in names]
    side = min(11.0, 2.2 + 0.42 * k) + 0.06 * max(map(len, labels))  # inches
    ax = axes(ax, figsize=(side, side))
    cell = ROOM * min(ax.bbox.width, ax.bbox.height) * 72 / ax.figure.dpi / k  # points
    support = counts.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(support == 0, counts.shape), counts / np.maximum(support, 1))
    norm = PowerNorm(0.5, 0, 1)
    image = ax.imshow(shares, cmap=colormaps["Blues"].with_extremes(bad="0.9"), norm=norm, aspect="equal")
    texts = [[f"{shares[i, j]:.2f}" if normalize else str(counts[i, j]) for j in range(k)] for i in range(k)]
    font = min(FONT[1], cell / BROAD / (1 + max(len(text) for row in texts for text in row)))
    if font >= FONT[0]:
        for i, j in zip(*np.nonzero(counts), strict=True):
            ax.text(j, i, texts[i][j], ha="center", va="center", fontsize=font,
                    color="white" if norm(shares[i, j]) > 0.6 else "black")
    else:
        ax.figure.colorbar(image, ax=ax, label="share of the actual class", shrink=0.7)
    font = max(6.0, min(FONT[1] - 1, 0.8 * cell))  # of the names, of which the 1st, 3rd, ... are written if many
    every = max(1, int(np.ceil(1.2 * font / cell)))
    places, shown = range(0, len(labels), every), labels[::every]
    is_flat = max(map(len, shown)) * BROAD * font < 0.9 * every * cell
    ax.set_xticks(places, shown, fontsize=font, parse_math=False, rotation=0 if is_flat else 90)
    ax.set_yticks(places, shown, fontsize=font, parse_math=False)
    ax.set_xlabel("predicted")
    ax.set_ylabel("actual")
    right = int(np.trace(counts))
    ax.set_title(f"{right:,} of {counts.sum():,} right ({right / counts.sum():.1%})", fontsize="medium")
    return ax


def _short(name: str) -> str:
    """`name`, without its middle if it is long: the two ends tell more names apart than the beginning."""
    name, half = " ".join(name.split()), LETTERS // 2
    return name if len(name) <= LETTERS else f"{name[:half]}…{name[1 - half:]}"
