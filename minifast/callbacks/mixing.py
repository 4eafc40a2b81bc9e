"""Samples of a batch that are mixed with one another, on the device."""
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

    def _transforms(self, v2: Any) -> list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """One of these, of torchvision's `v2`, is drawn to mix a batch: images (n, c, h, w), targets (n, k)."""
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
        name, (x, y) = type(self).__name__, inputs_and_target(self, state)
        if not isinstance(y, Tensor) or y.ndim == 0:
            raise TypeError(f"{name} mixes targets that are tensors (n, ...), got {describe(y)}.")
        if not x.is_floating_point():
            raise TypeError(f"{name} mixes floating-point inputs, got {describe(x)}. Convert them first, e.g. by "
                            "x.float() / 255.")
        if self.takes_only_images and x.ndim != 4:
            raise ValueError(f"{name} takes images (n, channels, height, width), got {describe(x)}.")
        which = 0 if len(self._mix) == 1 else int(torch.randint(len(self._mix), ()))
        images = x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1)
        mixed, target = self._mix[which](images, self._as_shares(y, x.dtype, state).reshape(len(y), -1))
        target = target.reshape(y.shape) if y.is_floating_point() else target
        state.batch = batch_like(state.batch, mixed.reshape(x.shape), target)

    def after_pred(self, state: State) -> None:
        outputs = scores(state.pred)
        if self.num_classes is None or state.batch_index > 0 or getattr(outputs, "ndim", 0) != 2:
            return
        if outputs.shape[1] != self.num_classes:
            raise ValueError(f"{type(self).__name__}(num_classes={self.num_classes}), but the model has "
                             f"{outputs.shape[1]} outputs. Give both one number.")

    def _as_shares(self, y: Tensor, dtype: torch.dtype, state: State) -> Tensor:
        """Targets that can be mixed: class labels (n,) as (n, classes), floating-point ones as they are."""
        name, n = type(self).__name__, self.num_classes
        if y.is_floating_point():
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
        training. The default is fastai's; torchvision's is 1.0.
    num_classes: how many classes there are, an int >= 2: class labels (n,) become probabilities (n, num_classes). None:
        as many as the model has outputs (n, classes), for which it is called once. Floating-point targets (n, ...) are
        mixed as they are.

    Takes batches (inputs, target), inputs (n, ...) of any floating-point type. The loss must take probabilities, as
    `nn.CrossEntropyLoss` does, with label_smoothing too. Metrics of the training data see the mixed targets, of which
    `accuracy` takes the largest share; validation sees nothing of it. Each (micro-)batch is mixed within itself, each
    sample with the one before it, so the data should be shuffled. Shares come from torch's global generator.

    Source: Zhang et al. 2017 (arXiv 1710.09412); the mixing is torchvision's `v2.MixUp`.

    >>> MixUp(num_classes=10)
    MixUp(alpha=0.4, num_classes=10)
    """

    alpha: float = 0.4
    num_classes: int | None = None

    def _transforms(self, v2: Any) -> list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
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

    takes_only_images = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixup_alpha is not None:
            self.mixup_alpha = check_number("mixup_alpha", self.mixup_alpha, minimum=SMALLEST_ALPHA)

    def _transforms(self, v2: Any) -> list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        return [v2.CutMix(alpha=self.alpha), *([] if self.mixup_alpha is None else [v2.MixUp(alpha=self.mixup_alpha)])]


def inputs_and_target(callback: Callback, state: State) -> tuple[Tensor, Any]:
    """The inputs and the target of a batch that can be put together again."""
    batch = state.batch
    inputs, target = state.unpack(batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(inputs, Tensor) \
            and inputs is batch[0] and target is batch[1]:
        return inputs, target
    raise TypeError(f"{type(callback).__name__} takes batches (inputs, target) with one tensor of inputs, got "
                    f"{describe(batch)}.")


def batch_like(batch: Batch, inputs: Tensor, target: Any) -> Batch:
    """The two in a tuple, list or namedtuple as `batch` is one."""
    make = getattr(type(batch), "_make", type(batch))
    return make((inputs, target))
