"""The gradient of each weight update: its norm written down, and clipped."""
from dataclasses import dataclass

from torch import Tensor, nn

from ..core.callback import Callback
from ..core.ownership import finite_check
from ..core.state import State
from ..errors import check_number


@dataclass(eq=False)
class GradientNorm(Callback):
    """Records the L2 norm of the gradient of every weight update: `learn.recorder.column("grad_norm")`.

    Of all parameters together, averaged over the accumulation window and unscaled. Nothing waits for the device.

    >>> import torch
    >>> from minifast import Learner
    >>> learn = Learner(nn.Linear(1, 1, bias=False), ([(torch.ones(2, 1), torch.ones(2, 1))], None),
    ...                 lambda pred, target: 3 * pred.mean(), verbose=False)
    >>> learn.fit(0.1, 2, callbacks=[GradientNorm()])
    >>> learn.recorder.column("grad_norm")
    array([3., 3.])
    """

    owns = ("grad_norm",)  # one writer of this column in a fit

    def before_fit(self, state: State) -> None:
        self._params = [p for group in state.opt.param_groups for p in group["params"]]

    def before_step(self, state: State) -> None:
        self._norm = nn.utils.get_total_norm(self._grads())

    def after_step(self, state: State) -> None:
        state.record.log("grad_norm", self._norm)

    def after_fit(self, state: State) -> None:
        self._params = []

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._params if p.grad is not None]


@dataclass(eq=False)
class GradientClip(GradientNorm):
    """Clips the gradient of every weight update, and records its norm before that, as `GradientNorm` does.

    norm: > 0, the largest L2 norm of the gradient of all parameters together; a longer one is shortened to it.
    value: > 0, the largest absolute value of each element. Exactly one of the two is given, else ValueError. The
    gradient is that of the whole update: averaged over the accumulation window, and unscaled.

    A gradient that is not finite (or whose norm is not) is refused before the step, with `NonFiniteGradient`, which
    names epoch, step, learning rate and parameters: weights and optimizer are those of the step before. On an
    accelerator the error comes up to a second late, as `FiniteLoss` describes; until then, an optimizer that is not one
    of torch's fused ones makes updates with a gradient of 0. Inside `lr_find`, nothing is refused.

    >>> GradientClip(norm=1.0)
    GradientClip(norm=1.0, value=None)
    """

    norm: float | None = None
    value: float | None = None

    in_lr_find = True

    def __post_init__(self) -> None:
        if (self.norm is None) == (self.value is None):
            raise ValueError(f"GradientClip takes either a norm or a value, got norm={self.norm!r:.80} and "
                             f"value={self.value!r:.80}. Pass e.g. GradientClip(norm=1.0).")
        if self.norm is not None:
            self.norm = check_number("norm", self.norm, above=0, example="GradientClip(norm=1.0)")
        if self.value is not None:
            self.value = check_number("value", self.value, above=0, example="GradientClip(value=0.5)")

    def before_fit(self, state: State) -> None:
        super().before_fit(state)
        self._check = finite_check(state.callbacks)

    def before_step(self, state: State) -> None:
        super().before_step(state)
        if self._check is not None:
            self._check.check_gradient(state, self._norm)
        if self.norm is not None:
            nn.utils.clip_grads_with_norm_(self._params, self.norm, self._norm)
        elif self.value is not None:
            nn.utils.clip_grad_value_(self._params, self.value)
        if self._check is not None and self._check.to_zero is not None:
            for grad in self._grads():
                (grad._values() if grad.is_sparse else grad).masked_fill_(self._check.to_zero, 0.0)
