"""Training batches that are changed on their device: samples mixed with one another, images smaller at first."""
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import snapshot
from ..base.batch import Batch, call_model, scores
from ..base.losses import is_loss
from ..base.nest import describe
from ..core.callback import Callback
from ..core.state import State
from ..errors import check_int, check_number, torchvision_errors

WANT_CLASSES = (nn.NLLLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss)  # losses that cannot take probabilities
WANT_CLASSES_FUNCTIONS = (F.nll_loss, F.multi_margin_loss, F.multilabel_margin_loss)
SMALLEST_ALPHA = 0.01  # below, torch's beta distribution underflows in float32: every second share would be 0.5
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of images (n, c, h, w) and targets (n, k)


class Mixing(Callback):
    """What `MixUp` and `CutMix` have in common: each training batch is mixed with itself, moved on by one sample."""

    in_lr_find = True  # mixed batches have a loss of their own
    owns = ("the mixing of samples",)  # one of them in a fit
    takes_only_images = False
    alpha: float
    num_classes: int | None

    def __post_init__(self) -> None:
        self.alpha = check_number("alpha", self.alpha, minimum=SMALLEST_ALPHA)
        if self.num_classes is not None:
            check_int("num_classes", self.num_classes, minimum=2)

    def _transforms(self, v2: Any) -> list[Mix]:
        """One of these, of torchvision's `v2`, is drawn to mix a batch."""
        raise NotImplementedError(f"{type(self).__name__} is to define _transforms(v2).")

    def before_fit(self, state: State) -> None:
        if is_loss(state.loss_func, WANT_CLASSES, *WANT_CLASSES_FUNCTIONS):
            loss_func = getattr(state.loss_func, "func", state.loss_func)  # of a partial
            name = getattr(loss_func, "__name__", type(loss_func).__name__)
            raise ValueError(f"{type(self).__name__} makes targets of probabilities, but {name} takes class indices. "
                             "Pass e.g. loss_func=nn.CrossEntropyLoss(), with a model that gives logits.")
        with torchvision_errors():
            from torchvision.transforms import v2
        self._mix, self._n_classes = self._transforms(v2), self.num_classes

    def before_batch(self, state: State) -> None:
        name, (x, y) = type(self).__name__, _inputs_and_target(self, state)
        if not isinstance(y, Tensor) or y.ndim == 0:
            raise TypeError(f"{name} mixes targets that are tensors (n, ...), got {describe(y)}.")
        if not x.is_floating_point():
            raise TypeError(f"{name} mixes floating-point inputs, got {describe(x)}. Convert them: x.float() / 255.")
        if self.takes_only_images and x.ndim != 4:
            raise ValueError(f"{name} takes images (n, channels, height, width), got {describe(x)}.")
        which = 0 if len(self._mix) == 1 else int(torch.randint(len(self._mix), ()))
        images = x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1)
        mixed, target = self._mix[which](images, self._as_shares(y, x.dtype, state).reshape(len(y), -1))
        target = target.reshape(y.shape) if y.is_floating_point() else target
        state.batch = _batch_like(state.batch, mixed.reshape(x.shape), target)

    def after_pred(self, state: State) -> None:
        n, outputs = self.num_classes, scores(state.pred)
        if n is not None and state.batch_index == 0 and getattr(outputs, "ndim", 0) == 2 and outputs.shape[1] != n:
            raise ValueError(f"{type(self).__name__}(num_classes={n}), but the model has {outputs.shape[1]} outputs. "
                             "Give both one number.")

    def _as_shares(self, y: Tensor, dtype: torch.dtype, state: State) -> Tensor:
        """Targets that can be mixed: class labels (n,) as (n, classes), floating-point ones as they are."""
        name, n = type(self).__name__, self.num_classes
        if y.is_floating_point():
            if n is not None and tuple(y.shape[1:]) != (n,):
                raise ValueError(f"{name}(num_classes={n}) takes class labels, integers (n,), or probabilities "
                                 f"(n, {n}), got {describe(y)}. Leave num_classes out to mix targets as they are.")
            return y
        if y.ndim != 1:
            raise ValueError(f"{name} takes class labels of shape (n,), or floating-point targets, got {describe(y)}. "
                             "Call target.squeeze(1) for labels, target.float() for several labels per sample.")
        n = self._n_classes = self._n_classes or self._n_outputs(state)
        if state.batch_index == 0 and y.numel() and not (y.min() >= 0 and y.max() < n):  # a look at the device
            raise ValueError(f"labels must be 0..{n - 1} for {name}(num_classes={n}), got {y.min()}..{y.max()}.")
        return F.one_hot(y.long(), n).to(torch.promote_types(dtype, torch.float32))

    @torch.no_grad()
    def _n_outputs(self, state: State) -> int:
        """How many classes the model tells apart, asked once, about one sample."""
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
        training. The default is fastai's; torchvision's is 1.0.
    num_classes: how many classes there are, an int >= 2: class labels (n,) become probabilities (n, num_classes). None:
        as many as the model has outputs (n, classes), for which it is called once. Floating-point targets (n, ...) are
        mixed as they are.

    Takes batches (inputs, target), inputs (n, ...) of any floating-point type. The loss must take probabilities, as
    `nn.CrossEntropyLoss` does, with label_smoothing too. Metrics of the training data see the mixed targets, of which
    `accuracy` takes the largest share; validation sees nothing of it. Each (micro-)batch is mixed within itself, so the
    data should be shuffled. Shares come from torch's global generator. Raises ValueError or TypeError for other
    arguments, batches and losses. Source: Zhang et al. 2017 (arXiv 1710.09412); torchvision's `v2.MixUp` mixes.

    >>> MixUp(num_classes=10)
    MixUp(alpha=0.4, num_classes=10)
    """

    alpha: float = 0.4
    num_classes: int | None = None

    def _transforms(self, v2: Any) -> list[Mix]:
        return [v2.MixUp(alpha=self.alpha)]


@dataclass(eq=False)
class CutMix(Mixing):
    """Trains on images in which a rectangle shows another image of the batch; targets are mixed by the areas.

    alpha: 1 - area of the rectangle, before it is cut at the border, is drawn for each batch from Beta(alpha, alpha),
    >= 0.01. mixup_alpha: if given, a batch is, with probability 1/2, mixed by `MixUp(mixup_alpha)` instead: a fit
    takes one callback that mixes. For everything else, errors too, see `MixUp`; the inputs are images (n, c, h, w).
    Source: Yun et al. 2019 (arXiv 1905.04899); torchvision's `v2.CutMix` mixes.

    >>> CutMix(num_classes=10, mixup_alpha=0.4)
    CutMix(alpha=1.0, num_classes=10, mixup_alpha=0.4)
    """

    alpha: float = 1.0
    num_classes: int | None = None
    _: KW_ONLY
    mixup_alpha: float | None = None

    takes_only_images = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixup_alpha is not None:
            self.mixup_alpha = check_number("mixup_alpha", self.mixup_alpha, minimum=SMALLEST_ALPHA)

    def _transforms(self, v2: Any) -> list[Mix]:
        return [v2.CutMix(alpha=self.alpha), *([] if self.mixup_alpha is None else [v2.MixUp(alpha=self.mixup_alpha)])]


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
    antialiasing; the model must take images of any size. List it before `MixUp`: less is to be mixed. It does not run
    in `lr_find`, which so finds the rate for full size. Raises ValueError or TypeError for other arguments and batches.
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
        """The side in pixels of images in each of `n_steps` updates, of full side `size`. ValueError if one is < 1."""
        n_steps, size = check_int("n_steps", n_steps), check_int("size", size)
        return {"size": [self._side(size, self.scale(step, n_steps)) for step in range(n_steps)]}

    def before_batch(self, state: State) -> None:
        x, y = _inputs_and_target(self, state)
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError("ProgressiveResizing takes floating-point images (n, channels, height, width), got "
                             f"{describe(x)}.")
        if isinstance(y, Tensor) and y.ndim > 2 and y.shape[-2:] == x.shape[-2:]:
            raise ValueError(f"ProgressiveResizing leaves targets as they are, but these, {describe(y)}, are as large "
                             f"as the images, {describe(x)}: they would not fit the smaller ones.")
        scale = self.scale(state.schedule_step, state.n_steps)
        size = [self._side(side, scale) for side in x.shape[-2:]]
        if size != list(x.shape[-2:]):
            state.batch = _batch_like(state.batch, F.interpolate(x, size, mode="bilinear", antialias=True), y)

    def _side(self, full: int, scale: float) -> int:
        multiples = max(1, round(full * scale / self.size_increment))
        return full if scale == 1 else min(full, multiples * self.size_increment)


def _inputs_and_target(callback: Callback, state: State) -> tuple[Tensor, Any]:
    """The inputs and the target of a batch that can be put together again."""
    inputs, target = state.unpack(state.batch)
    is_pair = isinstance(state.batch, (tuple, list)) and len(state.batch) == 2
    if is_pair and isinstance(inputs, Tensor) and inputs is state.batch[0] and target is state.batch[1]:
        return inputs, target
    raise TypeError(f"{type(callback).__name__} takes batches (inputs, target) with one tensor of inputs, got "
                    f"{describe(state.batch)}.")


def _batch_like(batch: Batch, inputs: Tensor, target: Any) -> Batch:
    make = getattr(type(batch), "_make", type(batch))  # a namedtuple's, or tuple or list
    return make((inputs, target))
