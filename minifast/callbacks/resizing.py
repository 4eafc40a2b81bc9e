"""Small pictures first, larger ones later."""
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..base.nest import describe
from ..core.callback import Callback
from ..core.state import State
from ..errors import check_int, check_number
from .mixing import batch_like, inputs_and_target


@dataclass(eq=False)
class ProgressiveResizing(Callback):
    """Trains on small images first: faster epochs, and full size at the end. Validation is always at full size.

    With share = position in the fit, 0..1, the sides of the images are multiplied by
        initial_scale                                                               while share < delay_fraction
        1                                                                           once share >= 1 - finetune_fraction
        initial_scale + (1 - initial_scale) * (share - delay_fraction) / (what lies between)   in between
    and rounded to the nearest multiple of `size_increment`, but for the full size, which is left as it is.

    initial_scale: 0..1, not 0. finetune_fraction, delay_fraction: shares of the fit, 0..1, at most 1 together.
    size_increment: pixels, an int >= 1; larger ones make fewer sizes: a compiled model is compiled for each of them.

    Takes batches (images, target), images floating point (n, channels, height, width), resized bilinearly with
    antialiasing on their device; the model must take images of any size. List it before `MixUp`: less is to be mixed.
    It does not run in `lr_find`, which so finds the rate for full size.

    Source: Howard 2018 (fast.ai in DAWNBench); names and defaults as in Composer's progressive resizing.

    >>> ProgressiveResizing(0.5, finetune_fraction=0.2, delay_fraction=0.2).values(10, 32)
    {'size': [16, 16, 16, 20, 20, 24, 28, 28, 32, 32]}
    """

    initial_scale: float = 0.5
    finetune_fraction: float = 0.2
    delay_fraction: float = 0.5
    size_increment: int = 4

    def __post_init__(self) -> None:
        self.initial_scale = check_number("initial_scale", self.initial_scale, above=0, maximum=1)
        self.finetune_fraction = check_number("finetune_fraction", self.finetune_fraction, minimum=0, maximum=1)
        self.delay_fraction = check_number("delay_fraction", self.delay_fraction, minimum=0, maximum=1)
        if self.finetune_fraction + self.delay_fraction > 1 + 1e-9:
            raise ValueError(f"finetune_fraction + delay_fraction must be at most 1, got {self.finetune_fraction:g} + "
                             f"{self.delay_fraction:g}: nothing would be left to grow in.")
        self.size_increment = check_int("size_increment", self.size_increment)

    def scale(self, step: int, n_steps: int) -> float:
        """What the sides of the images are multiplied by in update `step` (0-based) of `n_steps`."""
        share, last = round(step / n_steps, 9), round(1 - self.finetune_fraction, 9)  # 1 - 0.7 > 0.3 in floating point
        if share >= last:
            return 1.0
        if share < self.delay_fraction:
            return self.initial_scale
        return self.initial_scale + (1 - self.initial_scale) * (share - self.delay_fraction) / (
            last - self.delay_fraction)

    def values(self, n_steps: int, size: int) -> dict[str, list[int]]:
        """The side in pixels that each of `n_steps` updates trains on, of images with full side `size`."""
        n_steps, size = check_int("n_steps", n_steps), check_int("size", size)
        return {"size": [self._side(size, self.scale(step, n_steps)) for step in range(n_steps)]}

    def before_batch(self, state: State) -> None:
        x, y = inputs_and_target(self, state)
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"ProgressiveResizing takes floating-point images (n, channels, height, width), got "
                             f"{describe(x)}.")
        if isinstance(y, Tensor) and y.ndim > 2 and y.shape[-2:] == x.shape[-2:]:
            raise ValueError(f"ProgressiveResizing leaves targets as they are, but these, {describe(y)}, are as large "
                             f"as the images, {describe(x)}: they would not fit the smaller ones.")
        scale = self.scale(state.schedule_step, state.n_steps)
        size = [self._side(side, scale) for side in x.shape[-2:]]
        if size != list(x.shape[-2:]):
            state.batch = batch_like(state.batch, F.interpolate(x, size, mode="bilinear", antialias=True), y)

    def _side(self, full: int, scale: float) -> int:
        if scale == 1:
            return full
        multiples = max(1, round(full * scale / self.size_increment))
        return min(full, multiples * self.size_increment)
