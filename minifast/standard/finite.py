"""What is not finite stops a fit before it reaches the weights."""
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.losses import ignored_label, is_cross_entropy
from ..base.nest import tensors
from ..core.callback import Callback, Order
from ..core.ownership import FINITE_CHECK
from ..core.state import State
from ..errors import NonFiniteGradient, NonFiniteLoss, check_flag
from ..optim.hypers import group_lrs

LOOK_EVERY = 1.0  # seconds between two looks at an accelerator's flag, each of which waits for it
MAX_NAMES = 5  # parameters that an error names
STRICT = "FiniteLoss(strict=True)"


@dataclass(eq=False)
class FiniteLoss(Callback):
    """Ends a fit with `NonFiniteLoss` when the loss of an update is NaN or infinite, before the weights change.

    Every fit has one. The error names the epoch, the step and the learning rate, and what it finds in the batch:
    values that are not finite, no sample, no label but the ignored one. Weights and optimizer are then, bit for bit,
    those of the step before. The forward pass has been made: running statistics (BatchNorm) have seen the batch; the
    error names those that are not finite any more. The loss is that of the whole update: of an accumulation window it
    is not finite if that of one micro-batch is not. Updates that `MixedPrecision("fp16")` skips are not looked at.

    On the CPU the host reads each loss at once. On an accelerator it does not wait for it: a flag on the device tells
    the optimizer to make no more updates, and the host looks at that flag about once a second, before validation, and
    at the end of epochs and of the fit. So the error comes up to a second late, at the latest with the epoch; it names
    the step at which it happened, but not what was in the batch (but for the first batch of a fit, which is looked at
    at once). The steps in between are recorded, and other callbacks hear of them, but no update was made. That takes
    torch's fused SGD, Adam or AdamW, which `Learner` makes wherever it can; any other optimizer on an accelerator goes
    on with what it is given until the host looks, and the weights may be lost.

    strict: True: the host reads every loss at once on every device, which waits for the device once per update (once
    per micro-batch with `accumulate`), with any optimizer.

    `GradientClip` has gradients refused in the same way (`NonFiniteGradient`). An epoch row with a number that is not
    finite is said once per fit, in a warning: such a value is recorded, but never the best. `lr_find`, `race` and
    `overfit` do without all this: there, a loss that explodes is a result like any other. To do without it in a fit,
    give that fit a callback of yours with the same `owns`.

    Raises TypeError for a `strict` that is neither True nor False.

    >>> FiniteLoss()
    FiniteLoss(strict=False)
    """

    strict: bool = False

    order = Order.SETUP + 1  # after MixedPrecision, which skips overflows; before clipping, which would follow from it
    owns = (FINITE_CHECK,)

    def __post_init__(self) -> None:
        check_flag("strict", self.strict)
        self._begin(is_exact=True)

    def _begin(self, is_exact: bool) -> None:
        self._is_exact, self._is_first = is_exact, True  # exact: the host reads every loss before the step
        self._flag: Tensor | None = None  # () float32 on the device, 1 once anything was refused; None where exact
        self._opt_obeys = self._is_clipping = self._is_raised = self._has_warned = False
        self._first_row = 0  # the step of the record's first row
        self._causes: dict[int, str] = {}  # step -> what is wrong with a batch of its window
        self._next_look = 0.0

    def before_fit(self, state: State) -> None:
        self._begin(self.strict or reads_at_once(state.device))
        self._next_look = time.perf_counter() + LOOK_EVERY
        if not self._is_exact:
            self._flag = torch.zeros((), device=state.device)
            self._opt_obeys = obeys(state.opt)
            if self._opt_obeys:
                state.opt.found_inf = self._flag  # type: ignore[attr-defined]

    def after_loss(self, state: State) -> None:
        if not (self._is_first or (self._is_exact and state.accumulate > 1)):
            return  # in before_step, `batch` is still the one and only of its window
        self._is_first = False
        if not math.isfinite(float(state.loss.detach())):
            self._causes = {state.step: what_is_wrong(state)}
            self._next_look = 0.0

    def before_step(self, state: State) -> None:
        if self._flag is None:
            loss = float(state.step_loss)
            if not math.isfinite(loss):
                cause = self._causes.get(state.step) or what_is_wrong(state)
                raise NonFiniteLoss(f"{_now(state, 'loss is', loss)} {cause or ADVICE}")
        else:
            self._first_row = state.step - len(state.record)
            self._note(self._flag, state.step_loss)

    def check_gradient(self, state: State, norm: Tensor) -> None:
        """Refuse the gradient of this update if its `norm`, (), is not finite: for what clips, in `before_step`."""
        self._is_clipping = True
        if self._flag is not None:
            self._note(self._flag, norm)
        elif not math.isfinite(value := float(norm)):
            which = _which_gradients(state.model)
            raise NonFiniteGradient(f"{_now(state, NORM, value, which)} {GRADIENT_ADVICE}")

    @property
    def to_zero(self) -> Tensor | None:
        """() bool on the device, where a refused gradient is to be zeroed since the optimizer does not skip it."""
        return None if self._flag is None or self._opt_obeys else self._flag > 0

    def check(self, state: State) -> None:
        """Raise now what the device has found so far; waits for it. For what is about to keep the weights.

        On the CPU and with `strict` that costs nothing: there, what is not finite was raised before the step.
        """
        if self._flag is not None and float(self._flag):
            self._is_raised = True
            raise self._found_late(state)
        self._next_look = time.perf_counter() + LOOK_EVERY

    def after_batch(self, state: State) -> None:
        if self._flag is not None and time.perf_counter() >= self._next_look:
            self.check(state)

    def before_validate(self, state: State) -> None:
        self.check(state)

    def after_epoch(self, state: State) -> None:
        self.check(state)
        bad = [f"{name} is {value}" for name, value in state.metrics.items()
               if isinstance(value, float) and not math.isfinite(value)]
        if bad and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{', '.join(bad)} in epoch {state.epoch}. Training goes on; such a value is recorded, but "
                          "is never the best, and counts as no improvement.", stacklevel=2)

    def after_fit(self, state: State) -> None:
        vars(state.opt).pop("found_inf", None)
        try:
            if not self._is_raised:
                self.check(state)
        finally:
            self._flag = None

    @staticmethod
    def _note(flag: Tensor, value: Tensor) -> None:
        """Raise `flag` if `value` is not finite, in three small kernels and without a wait."""
        flag.logical_or_((value - value).ne(0).to(flag.device, non_blocking=True))

    def _found_late(self, state: State) -> ValueError:
        """What to raise for a flag that was found raised: the record tells at which step that was."""
        record = state.record
        losses = record.losses
        norms = record.column("grad_norm") if self._is_clipping else np.zeros(len(losses))
        bad_loss, bad_norm = (_first_bad(column) for column in (losses, norms))
        row = min(bad_loss, bad_norm)
        left = what_is_left(state.model)
        if not self._opt_obeys and left == UNHARMED:
            left = f"{UNHARMED[:-1]}, but for momentum and weight decay."
        if row == len(losses):  # its update was cancelled by a later callback, so that it is not in the record
            return NonFiniteLoss(f"a loss or gradient was not finite before epoch {state.epoch}, step {state.step}. "
                                 f"{left} {STRICT} stops at once.")
        epoch = next((epoch["epoch"] for epoch, end in zip(record.epochs, record.epoch_ends, strict=True)
                      if row < end), state.epoch)
        step, rates = self._first_row + row, [column[row] for column in record.lr_columns]
        is_norm, late = bad_norm < bad_loss, f"Found at step {state.step}; {STRICT} stops at once"
        what, value = (NORM, norms[row]) if is_norm else ("loss is", losses[row])
        where = f"{_at(what, value, epoch, step, state.group_names, rates)} {left}"
        if is_norm:
            return NonFiniteGradient(f"{where} {GRADIENT_ADVICE} {late}, and names the parameters.")
        return NonFiniteLoss(f"{where} {self._causes.get(step) or ADVICE} {late}, and looks at the batch.")


class Unchecked(Callback):
    """In place of `FiniteLoss`, for a fit in which a loss that explodes is a result like any other."""

    owns = FiniteLoss.owns


NORM = "norm of the gradient is"
UNHARMED = "The weights are those of the step before."
ADVICE = "Lower the learning rate, clip gradients (GradientClip(norm=1.0)), or look at the batch."
GRADIENT_ADVICE = ("Look for what has no finite derivative where it is taken (sqrt, log or a norm of 0, a division by "
                   "0), or lower the learning rate.")


def reads_at_once(device: torch.device) -> bool:
    """Whether the host can read a number from `device` without waiting for it."""
    return device.type == "cpu"


def obeys(opt: Optimizer) -> bool:
    """Whether `opt` makes no update while its `found_inf` is 1, as `torch.amp.GradScaler` asks of it."""
    return getattr(opt, "_step_supports_amp_scaling", False) and all(group.get("fused") for group in opt.param_groups)


def what_is_wrong(state: State) -> str:
    """What the newest batch has that makes a loss not finite; '' if nothing is found."""
    if state.n_samples == 0:
        return "The batch is empty: leave such batches out."
    for tensor in tensors(state.batch):
        bad = ~torch.isfinite(tensor)
        if bad.any():
            first = ", ".join(str(int(i)) for i in bad.nonzero()[0])
            return (f"The batch itself has {int(bad.sum())} values that are NaN or infinite in a tensor of shape "
                    f"{tuple(tensor.shape)}, the first at [{first}]. Clean the data.")
    target = state.target
    if is_cross_entropy(state.loss_func) and isinstance(target, Tensor) and not target.is_floating_point():
        label = ignored_label(state.loss_func)
        if bool((target == label).all()):
            return (f"The batch has no valid target: all {target.numel()} are {label}, the label that is ignored, so "
                    "that their mean is 0 / 0. Leave such batches out, or let loss_func return (sum, count).")
    return ""


def what_is_left(model: nn.Module) -> str:
    """What a model is worth after an update that was refused."""
    weights = [name for name, p in model.named_parameters() if not _is_finite(p)]
    if weights:
        return (f"The weights were not finite before that ({_some(weights)}): an earlier update has made them so, or "
                "they were loaded like that. Go back to good ones; with GradientClip, a gradient that is not finite "
                "is refused.")
    norms = [f"{name}.{key}" for name, module in model.named_modules() for key in ("running_mean", "running_var")
             if isinstance(value := getattr(module, key, None), Tensor) and not _is_finite(value)]
    if norms:
        return (f"The weights are those of the step before, but the forward pass has left running statistics that are "
                f"not finite ({_some(norms)}): go back to good ones, or reset them.")
    return UNHARMED


def _which_gradients(model: nn.Module) -> str:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, grad in grads.items() if not _is_finite(grad.coalesce().values() if grad.is_sparse else grad)]
    return f"It is not finite in {_some(bad)}." if bad else "Its elements are finite, but too large for a norm."


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _now(state: State, what: str, value: float, which: str = "") -> str:
    """What is refused in this step, and what the model is worth now."""
    rates = group_lrs(state.opt, len(state.group_names))
    where = _at(what, value, state.epoch, state.step, state.group_names, rates)
    return " ".join(filter(None, [where, which, what_is_left(state.model)]))


def _first_bad(column: Any) -> int:
    """The first row that is not finite; the number of rows if all are."""
    bad = np.flatnonzero(~np.isfinite(column))
    return int(bad[0]) if len(bad) else len(column)


def _at(what: str, value: float, epoch: int, step: int, names: Sequence[str], lrs: Sequence[float]) -> str:
    """
    >>> _at("loss is", math.nan, 0, 5, ["body", "head"], [0.003, 0.03])
    'the loss is nan at epoch 0, step 5 (lr 0.003 of body, 0.03 of head).'
    """
    rates = f"{lrs[-1]:.3g}" if len(set(lrs)) == 1 else ", ".join(f"{lr:.3g} of {name}"
                                                                 for name, lr in zip(names, lrs, strict=True))
    return f"the {what} {value} at epoch {epoch}, step {step} (lr {rates})."
