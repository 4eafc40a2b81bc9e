"""The gradient of each weight update: its norm written down, and clipped."""
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..callback import Callback
from ..errors import check_number
from ..state import State


@dataclass(eq=False)
class GradientNorm(Callback):
    """Records the L2 norm of the gradient of every weight update: `learn.recorder.column("grad_norm")`.

    It is the norm over all parameters together, averaged over the accumulation window and unscaled. Nothing is
    changed, and nothing waits for the device.

    >>> from minifast import Learner
    >>> learn = Learner(nn.Linear(1, 1, bias=False), ([(torch.ones(2, 1), torch.ones(2, 1))], None),
    ...                 lambda pred, target: 3 * pred.mean(), verbose=False)
    >>> learn.fit(0.1, 2, callbacks=[GradientNorm()])
    >>> learn.recorder.column("grad_norm")
    array([3., 3.])
    """

    sets = ("grad_norm",)  # one writer of this column in a fit

    def before_fit(self, state: State) -> None:
        self._params = [p for group in state.opt.param_groups for p in group["params"]]

    def before_step(self, state: State) -> None:
        self._norm = nn.utils.get_total_norm(self._grads())

    def after_step(self, state: State) -> None:
        state.recorder.newest.log("grad_norm", self._norm)

    def after_fit(self, state: State) -> None:
        self._params = []

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._params if p.grad is not None]


@dataclass(eq=False)
class GradientClip(GradientNorm):
    """Clips the gradient of every weight update, and records its norm before that, as `GradientNorm` does.

    norm: > 0, the largest L2 norm of the gradient of all parameters together; a longer one is shortened to it.
    value: > 0, the largest absolute value of each element. Exactly one of the two is given. The gradient is that of
    the whole update: averaged over the accumulation window, and unscaled under `MixedPrecision("fp16")`.

    A gradient that is not finite (a NaN or infinite element, or a norm beyond the largest number) cannot be clipped:
    it is refused. Its update is made with a gradient of 0, so only momentum and weight decay move the weights, which
    stay finite. The column "grad_norm" has its norm, and a warning at the end of the epoch says how many there were:
    to say it at once, the host would have to wait for the device at every update. This costs one small kernel per
    parameter.

    Raises ValueError for none or both of the two, and for one that is no number > 0.

    >>> GradientClip(norm=1.0)
    GradientClip(norm=1.0, value=None)
    """

    norm: float | None = None
    value: float | None = None

    in_lr_find = True
    saves = ("_n_refused", "_n_updates")

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
        self.before_epoch(state)  # an epoch that is cancelled at once ends without having begun here

    def before_epoch(self, state: State) -> None:
        self._n_refused, self._n_updates = torch.zeros((), dtype=torch.int64, device=state.device), 0

    def before_step(self, state: State) -> None:
        super().before_step(state)
        if self.norm is not None:
            nn.utils.clip_grads_with_norm_(self._params, self.norm, self._norm)
        elif self.value is not None:
            nn.utils.clip_grad_value_(self._params, self.value)
        is_bad = ~torch.isfinite(self._norm)
        for grad in self._grads():
            (grad._values() if grad.is_sparse else grad).masked_fill_(is_bad, 0.0)
        self._n_refused = self._n_refused + is_bad
        self._n_updates += 1

    def after_epoch(self, state: State) -> None:
        n = int(self._n_refused)
        if n:
            self._n_refused = torch.zeros_like(self._n_refused)  # said once
            warnings.warn(f"the gradient of {n} of {self._n_updates} updates in epoch {state.epoch} was not finite: "
                          "GradientClip refused it, and these updates were made with a gradient of 0. Look for NaN in "
                          "the data, or lower the learning rate.", stacklevel=2)
