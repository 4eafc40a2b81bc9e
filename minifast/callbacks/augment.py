"""Changing whole batches of images on the device: mixed samples, and small images first."""
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import snapshot
from ..batches import Batch, call_model, describe, scores
from ..callback import Callback
from ..errors import check_int, check_number, torchvision_errors
from ..losses import is_loss
from ..state import State

WANT_CLASSES = (nn.NLLLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss)  # losses that cannot take probabilities
WANT_CLASSES_FUNCTIONS = (F.nll_loss, F.multi_margin_loss, F.multilabel_margin_loss)
SMALLEST_ALPHA = 0.01  # below, torch's beta distribution underflows in float32: every second share would be 0.5


class Mixing(Callback):
    """What `MixUp` and `CutMix` have in common: each training batch is mixed with itself, moved on by one sample."""

    in_lr_find = True  # mixed batches have a loss of their own
    sets = ("the mixing of samples",)  # one of them in a fit
    capturable = True  # `after_pred` looks at shapes
    num_classes: int | None

    def _transforms(self) -> list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """One of these, drawn by chance, mixes a batch: images (n, c, h, w), targets (n, k)."""
        raise NotImplementedError(f"{type(self).__name__} is to define _transforms().")

    def before_fit(self, state: State) -> None:
        if is_loss(state.loss_func, WANT_CLASSES, *WANT_CLASSES_FUNCTIONS):
            loss_func = getattr(state.loss_func, "func", state.loss_func)  # of a partial
            name = getattr(loss_func, "__name__", type(loss_func).__name__)
            raise ValueError(f"{type(self).__name__} makes targets of probabilities, but {name} takes class indices. "
                             "Pass e.g. loss_func=nn.CrossEntropyLoss(), with a model that gives logits.")
        self._mix, self._n_classes = self._transforms(), self.num_classes

    def before_batch(self, state: State) -> None:
        x, y = self._checked(state)
        which = 0 if len(self._mix) == 1 else int(torch.randint(len(self._mix), ()))
        images = x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1)
        mixed, target = self._mix[which](images, self._as_shares(y, x.dtype, state).reshape(len(y), -1))
        state.batch = _like(state.batch, mixed.reshape(x.shape), target if _is_labels(y) else target.reshape(y.shape))

    def after_pred(self, state: State) -> None:
        outputs = scores(state.pred)
        if self.num_classes is None or state.batch_index > 0 or getattr(outputs, "ndim", 0) != 2:
            return
        if outputs.shape[1] != self.num_classes:
            raise ValueError(f"{type(self).__name__}(num_classes={self.num_classes}), but the model has "
                             f"{outputs.shape[1]} outputs. Give both one number.")

    def _checked(self, state: State) -> tuple[Tensor, Tensor]:
        x, y = _pair(self, state)
        if not isinstance(y, Tensor) or y.ndim == 0:
            raise TypeError(f"{type(self).__name__} mixes targets that are tensors (n, ...), got {describe(y)}.")
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} mixes floating-point inputs, got {describe(x)}. Convert them "
                            "first, e.g. by x.float() / 255.")
        return x, y

    def _as_shares(self, y: Tensor, dtype: torch.dtype, state: State) -> Tensor:
        """Targets that can be mixed: class labels (n,) as (n, classes), floating-point ones as they are."""
        name, n = type(self).__name__, self.num_classes
        if not _is_labels(y):
            if n is not None and tuple(y.shape[1:]) != (n,):
                raise ValueError(f"{name}(num_classes={n}) takes class labels, integers of shape (n,), or "
                                 f"probabilities of shape (n, {n}), got {describe(y)}. Leave num_classes out to mix "
                                 "floating-point targets as they are.")
            return y
        if y.ndim != 1:
            raise ValueError(f"{name} takes class labels of shape (n,), or floating-point targets, got {describe(y)}. "
                             "Call target.squeeze(1) for labels, target.float() for several labels per sample.")
        n = self._n_classes = self._n_classes or self._n_outputs(state)
        if state.batch_index == 0 and y.numel() and not (y.min() >= 0 and y.max() < n):  # a look at the device
            raise ValueError(f"labels must be 0..{n - 1} for {name}(num_classes={n}), got {int(y.min())}.."
                             f"{int(y.max())}.")
        return F.one_hot(y.long(), n).to(torch.promote_types(dtype, torch.float32))

    @torch.no_grad()
    def _n_outputs(self, state: State) -> int:
        """How many classes the model tells apart: it is asked once, about one sample, in eval mode."""
        restore_modes, restore_rng = snapshot.modes(state.model), snapshot.rng()
        state.model.eval()
        try:
            outputs = scores(call_model(state.model, state.unpack(state.batch)[0][:1]))
        finally:
            restore_modes()
            restore_rng()
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
            name = type(self).__name__
            raise ValueError(f"{name} must know how many classes there are, and the model's output does not tell: it "
                             f"is {describe(outputs)} for one sample. Pass e.g. {name}(num_classes=10).")
        return outputs.shape[1]


@dataclass(eq=False)
class MixUp(Mixing):
    """Trains on weighted means of two samples: share * sample + (1 - share) * the sample before it, targets alike.

    alpha: the share is drawn for each batch from Beta(alpha, alpha), >= 0.01; 1.0 is uniform, less is closer to plain
    training. The default is fastai's; torchvision's is 1.0. num_classes: how many classes there are, an int >= 2:
    class labels (n,) become probabilities (n, num_classes). None: as many as the model has outputs (n, classes), for
    which it is called once. Floating-point targets (n, ...) are mixed as they are.

    Takes batches (inputs, target), inputs (n, ...) of any floating-point type. The loss must take probabilities, as
    `nn.CrossEntropyLoss` does, with label_smoothing too. Metrics of the training data see the mixed targets, of which
    `accuracy` takes the largest share; validation sees nothing of it. Each batch is mixed within itself, so with
    `accumulate` each micro-batch is; as the partner is the sample before, the data should be shuffled. Shares come from
    torch's global generator. Raises ValueError or TypeError for other arguments, batches and losses.

    Source: Zhang et al. 2017 (arXiv 1710.09412); the mixing is torchvision's `v2.MixUp`.

    >>> MixUp(num_classes=10)
    MixUp(alpha=0.4, num_classes=10)
    """

    alpha: float = 0.4
    num_classes: int | None = None

    def __post_init__(self) -> None:
        self.alpha = check_number("alpha", self.alpha, minimum=SMALLEST_ALPHA)
        _check_classes(self.num_classes)

    def _transforms(self) -> list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        with torchvision_errors():
            from torchvision.transforms import v2
        return [v2.MixUp(alpha=self.alpha)]


@dataclass(eq=False)
class CutMix(Mixing):
    """Trains on images in which a rectangle shows another image of the batch; targets are mixed by the areas.

    alpha: 1 - area of the rectangle, before it is cut at the border, is drawn for each batch from Beta(alpha, alpha),
    >= 0.01. mixup_alpha: if given, a batch is, with probability 1/2, mixed by `MixUp(mixup_alpha)` instead: a fit
    takes one callback that mixes, because mixed targets are not to be mixed again. For everything else see `MixUp`;
    the inputs are images (n, c, h, w).

    Source: Yun et al. 2019 (arXiv 1905.04899); the mixing is torchvision's `v2.CutMix`.

    >>> CutMix(num_classes=10, mixup_alpha=0.4)
    CutMix(alpha=1.0, num_classes=10, mixup_alpha=0.4)
    """

    alpha: float = 1.0
    num_classes: int | None = None
    _: KW_ONLY
    mixup_alpha: float | None = None

    def __post_init__(self) -> None:
        self.alpha = check_number("alpha", self.alpha, minimum=SMALLEST_ALPHA)
        if self.mixup_alpha is not None:
            self.mixup_alpha = check_number("mixup_alpha", self.mixup_alpha, minimum=SMALLEST_ALPHA)
        _check_classes(self.num_classes)

    def _transforms(self) -> list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        with torchvision_errors():
            from torchvision.transforms import v2
        mixup = [] if self.mixup_alpha is None else [v2.MixUp(alpha=self.mixup_alpha)]
        return [v2.CutMix(alpha=self.alpha), *mixup]

    def _checked(self, state: State) -> tuple[Tensor, Tensor]:
        x, y = super()._checked(state)
        if x.ndim != 4:
            raise ValueError(f"CutMix takes images (n, channels, height, width), got {describe(x)}.")
        return x, y


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
    antialiasing on their device; targets stay as they are. The model must take images of any size. List it before
    `MixUp`: less is to be mixed. It does not run in `lr_find`, which so finds the rate for full size. Raises
    ValueError or TypeError for other arguments and batches.

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
        """The side in pixels that each of `n_steps` updates trains on, of images with full side `size`.

        Raises ValueError for n_steps or size < 1.
        """
        n_steps, size = check_int("n_steps", n_steps), check_int("size", size)
        return {"size": [self._side(size, self.scale(step, n_steps)) for step in range(n_steps)]}

    def before_batch(self, state: State) -> None:
        x, y = _pair(self, state)
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"ProgressiveResizing takes floating-point images (n, channels, height, width), got "
                             f"{describe(x)}.")
        if isinstance(y, Tensor) and y.ndim > 2 and y.shape[-2:] == x.shape[-2:]:
            raise ValueError(f"ProgressiveResizing leaves targets as they are, but these, {describe(y)}, are as large "
                             f"as the images, {describe(x)}: they would not fit the smaller ones.")
        scale = self.scale(state.position, state.n_steps)
        size = [self._side(side, scale) for side in x.shape[-2:]]
        if size != list(x.shape[-2:]):
            state.batch = _like(state.batch, F.interpolate(x, size, mode="bilinear", antialias=True), y)

    def _side(self, full: int, scale: float) -> int:
        if scale == 1:
            return full
        multiples = max(1, round(full * scale / self.size_increment))
        return min(full, multiples * self.size_increment)


def _check_classes(num_classes: Any) -> None:
    if num_classes is not None:
        check_int("num_classes", num_classes, minimum=2)


def _is_labels(target: Tensor) -> bool:
    return not target.is_floating_point()


def _pair(callback: Callback, state: State) -> tuple[Tensor, Any]:
    """The inputs and the target of a batch that can be put together again."""
    batch = state.batch
    inputs, target = state.unpack(batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(inputs, Tensor) \
            and inputs is batch[0] and target is batch[1]:
        return inputs, target
    raise TypeError(f"{type(callback).__name__} takes batches (inputs, target) with one tensor of inputs, got "
                    f"{describe(batch)}.")


def _like(batch: Batch, inputs: Tensor, target: Any) -> Batch:
    """The two in a tuple, list or namedtuple as `batch` is one."""
    make = getattr(type(batch), "_make", type(batch))
    return make((inputs, target))
