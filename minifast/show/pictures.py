"""Pictures in a grid: batches of images as what is drawn, and the one place that draws them."""
import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import quoted
from .plots import axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]
POINTS = 8  # size of the titles' font
LETTER = 0.65 * POINTS / 72  # inches: a rather broad one, so that a line of them stays over its picture
LINE = 1.3 * POINTS / 72  # inches
MOST_LINES = 6  # of a title
TALLEST = 2.0  # height / width of the room for a picture; a taller one is drawn smaller


def are_pictures(x: Any) -> bool:
    """Whether `x` is a batch of images: a tensor (n, 1 or 3, height, width)."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) > 0 \
        and not x.is_complex()


def to_pictures(x: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Picture:
    """A batch of images (n, 1 or 3, height, width) as uint8 (n, height, width, channels), which is drawn as it is.

    Integers are 0..255 already. Floats are multiplied by `std` and moved by `mean`, one number per channel, if these
    are given (not None, not empty): then black is 0, white is 1, and what lies beyond is cut off. Without them floats
    in 0..1 are taken as they are; if any lies outside, each image is stretched from its smallest to its largest value.
    What is not finite is black.

    Raises TypeError for what is no such batch, ValueError for `mean` and `std` that do not fit its channels.
    """
    if not are_pictures(x):
        shape = f" of shape {tuple(x.shape)}" if isinstance(x, Tensor) else ""
        raise TypeError(f"x must be a tensor (n, 1 or 3, height, width) of images, got a {type(x).__name__}{shape}.")
    x, shift, scale = x.detach().cpu(), _per_channel("mean", mean, 0.0, x), _per_channel("std", std, 1.0, x)
    if x.is_floating_point() or x.dtype == torch.bool:
        is_known = any(values is not None and len(values) > 0 for values in (mean, std))
        x = _unit(x.float() * scale + shift, is_known).mul(255).round()
    elif x.dtype != torch.uint8:
        x = x.to(torch.int64).clamp(0, 255)
    pixels: Picture = x.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def _per_channel(name: str, values: Sequence[float] | None, usual: float, x: Tensor) -> Tensor:
    values = [usual] * x.shape[1] if values is None or len(values) == 0 else values
    if len(values) != x.shape[1]:
        raise ValueError(f"{name} must have one number for each of {x.shape[1]} channels, got {quoted(values)}.")
    return torch.tensor([float(value) for value in values]).reshape(-1, 1, 1)


def _unit(x: Tensor, is_known: bool) -> Tensor:
    """Floats as 0..1. is_known: whether 0 is black and 1 is white."""
    finite = torch.isfinite(x)
    if not is_known and (finite & ((x < 0) | (x > 1))).any():
        low = torch.where(finite, x, torch.inf).amin((1, 2, 3), keepdim=True)
        high = torch.where(finite, x, -torch.inf).amax((1, 2, 3), keepdim=True)
        x = (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.where(finite, x.clamp(0, 1), 0)


def grid(pictures: Iterable[Picture], titles: Sequence[str], colors: Sequence[str | None] | None = None,
         figure: "Figure | None" = None) -> "Figure":
    """Draw `pictures`, each uint8 (height, width, 1 or 3), under their `titles`, in rows and columns; gives the figure.

    titles: one for each; a long one is wrapped to the width of its picture and cut after six lines.
    colors: of the titles, one for each, None for the usual one.
    figure: an empty one, or a part of one, that is filled; None: a new one, as large as the number of pictures wants.

    Raises ValueError for no picture and for titles of another number, TypeError for what is no figure.
    """
    pictures = list(pictures)
    n = len(pictures)
    if n == 0:
        raise ValueError("pictures must hold at least one picture, got none.")
    colors = [None] * n if colors is None else colors
    for name, given in (("titles", titles), ("colors", colors)):
        if len(given) != n:
            raise ValueError(f"{name} must have one for each of {n} pictures, got {len(given)}.")
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    side = 2.0 if n <= 9 else 1.7 if n <= 25 else 1.3  # inches, of a picture in a figure of our own
    if figure is not None:
        if isinstance(figure, type) or not (hasattr(figure, "subplots") and hasattr(figure, "bbox")):
            raise TypeError(f"figure must be a figure of matplotlib or None, got {quoted(figure)}.")
        side = figure.bbox.width / figure.dpi / columns
    texts = [_wrapped(title, max(4, int(side / LETTER))) for title in titles]
    above = LINE * (0.7 + max(text.count("\n") + 1 for text in texts))
    if figure is None:
        tallest = min(TALLEST, max(picture.shape[0] / picture.shape[1] for picture in pictures))
        figure = _new_figure((columns * side, rows * (side * tallest + above) + 0.1))
    height = figure.bbox.height / figure.dpi
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw={
        "left": 0.01, "right": 0.99, "bottom": 0.1 / height, "top": max(0.2, 1 - above / height), "wspace": 0.06,
        "hspace": above / max(0.1, (height - 0.1) / rows - above)}).flatten()
    for ax, picture, text, color in zip(panels, pictures, texts, colors, strict=False):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
        ax.set_title(text, fontsize=POINTS, parse_math=False, **({} if color is None else {"color": color}))
        ax.set_axis_off()
    for ax in panels[n:]:
        ax.remove()
    return figure


def _wrapped(title: str, letters: int) -> str:
    """`title` in lines of at most `letters`. Each of its own lines gets as many of them; what is cut ends in "…"."""
    own = title.split("\n")[:MOST_LINES]
    most = MOST_LINES // len(own)
    wrapped = [textwrap.wrap(line, letters) or [""] for line in own]
    for lines in wrapped:
        if len(lines) > most:
            lines[most - 1:] = [lines[most - 1][:letters - 1] + "…"]
    return "\n".join(line for lines in wrapped for line in lines)


def _new_figure(size: tuple[float, float]) -> "Figure":
    import matplotlib

    figure: Figure = axes(figsize=size).figure  # type: ignore[assignment]  # new axes are on no part of a figure
    figure.clear()
    figure.set_layout_engine("none")  # the constrained one takes seconds for 64 pictures
    if "inline" in matplotlib.get_backend():
        figure._ipython_display_ = partial(_close, figure.number)  # type: ignore[attr-defined]
    return figure


def _close(number: int | str) -> None:
    """Called by IPython before it shows a figure: it would come twice, as a cell's value and from pyplot at its end."""
    import matplotlib.pyplot as plt
    plt.close(number)
    raise NotImplementedError  # which tells IPython to show it as it shows any other
