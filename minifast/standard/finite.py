"""What is not finite stops a fit before it reaches the weights."""
import math
import time
import warnings
from dataclasses import dataclass

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
from ..record.record import Column
from ..show.tables import listed

LOOK_EVERY = 1.0  # seconds between two looks at an accelerator's flag, each of which waits for it
LOSS, NORM = "loss is", "norm of the gradient is"
UNHARMED = "The weights are those of the step before."
ADVICE = "Lower the learning rate, clip gradients (GradientClip(norm=1.0)), or look at the batch."
GRADIENT_ADVICE = ("Look for what has no finite derivative where it is taken (sqrt, log or a norm of 0, a division by "
                   "0), or lower the learning rate.")
STRICT = "FiniteLoss(strict=True) stops at once"


@dataclass(eq=False)
class FiniteLoss(Callback):
    """Ends a fit with `NonFiniteLoss` when the loss of an update is NaN or infinite, before the weights change.

    Every fit has one. The error names the epoch, the step and the learning rate, and what it finds in the batch:
    values that are not finite, no sample, no label but the ignored one. Weights and optimizer are then, bit for bit,
    those of the step before; running statistics (BatchNorm) have seen the batch, and the error names those that are
    not finite any more. Updates that `MixedPrecision("fp16")` skips are not looked at.

    On the CPU the host reads each loss at once. On an accelerator it does not wait for it: a flag on the device tells
    the optimizer to make no more updates, and the host looks at that flag about once a second, before validation, and
    at the end of epochs and of the fit. So the error comes up to a second late; it names the step at which it
    happened, but not what was in the batch (but for the first of a fit). The steps in between are recorded, and other
    callbacks hear of them. That takes torch's fused SGD, Adam or AdamW, which `Learner` makes wherever it can; with any
    other optimizer the weights may be lost until the host looks.

    strict: True: the host reads every loss at once on every device, which waits for the device once per update (once
    per micro-batch with `accumulate`), with any optimizer. Raises TypeError for what is neither True nor False.

    `GradientClip` has gradients refused in the same way (`NonFiniteGradient`). An epoch row with a number that is not
    finite is said once per fit, in a warning: such a value is recorded, but never the best. `lr_find`, `race` and
    `overfit` do without all this. To do without it in a fit, give that fit a callback of yours with the same `owns`.

    >>> FiniteLoss()
    FiniteLoss(strict=False)
    """

    strict: bool = False

    order = Order.SETUP + 1  # after MixedPrecision, which skips overflows; before clipping, which would follow from it
    owns = (FINITE_CHECK,)

    def __post_init__(self) -> None:
        check_flag("strict", self.strict)

    def before_fit(self, state: State) -> None:
        self._is_exact = self.strict or reads_at_once(state.device)  # the host reads every loss before the step
        self._is_first = True
        self._is_clipping = self._is_raised = self._has_warned = False
        self._causes: dict[int, str] = {}  # step -> what is wrong with a batch of its window
        self._next_look = time.perf_counter() + LOOK_EVERY
        # () float32 on the device, 1 once anything was refused
        self._flag = None if self._is_exact else torch.zeros((), device=state.device)
        self._opt_obeys = self._flag is not None and obeys(state.opt)
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
        if self._flag is not None:
            self._note(self._flag, state.step_loss)
        elif not math.isfinite(loss := float(state.step_loss)):
            cause = self._causes.get(state.step) or what_is_wrong(state) or ADVICE
            raise NonFiniteLoss(f"{_now(state, LOSS, loss)} {what_is_left(state.model)} {cause}")

    def check_gradient(self, state: State, norm: Tensor) -> None:
        """Refuse the gradient of this update if its `norm`, (), is not finite: for what clips, in `before_step`."""
        self._is_clipping = True
        if self._flag is not None:
            self._note(self._flag, norm)
        elif not math.isfinite(value := float(norm)):
            raise NonFiniteGradient(f"{_now(state, NORM, value)} {_which_gradients(state.model)} "
                                    f"{what_is_left(state.model)} {GRADIENT_ADVICE}")

    @property
    def to_zero(self) -> Tensor | None:
        """() bool on the device, where a refused gradient is to be zeroed since the optimizer does not skip it."""
        return None if self._flag is None or self._opt_obeys else self._flag > 0

    def check(self, state: State) -> None:
        """Raise now what an accelerator has found so far; waits for it. For what is about to keep the weights."""
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
        if not self._is_raised:
            self.check(state)
        self._flag = None

    @staticmethod
    def _note(flag: Tensor, value: Tensor) -> None:
        """Raise `flag` if `value` is not finite, in three small kernels and without a wait."""
        flag.logical_or_((value - value).ne(0).to(flag.device, non_blocking=True))

    def _found_late(self, state: State) -> ValueError:
        """What to raise for a flag that was found raised: the record tells at which step that was."""
        record, left = state.record, what_is_left(state.model)
        if not self._opt_obeys and left == UNHARMED:
            left = f"{UNHARMED[:-1]}, but for momentum and weight decay."
        losses = record.losses
        norms = record.column("grad_norm") if self._is_clipping else np.zeros(len(losses))
        bad_loss, bad_norm = _first_bad(losses), _first_bad(norms)
        step = min(bad_loss, bad_norm)
        if step == len(losses):  # its update was cancelled by a later callback, so that it is not in the record
            return NonFiniteLoss(f"a loss or gradient was not finite before epoch {state.epoch}, step {state.step}. "
                                 f"{left} {STRICT}.")
        epoch = next((row["epoch"] for row, end in zip(record.epochs, record.epoch_ends, strict=True) if step < end),
                     state.epoch)
        at = _at(epoch, step, state.group_names, [float(lr) for lr in record.lr_groups[step]])
        late = f"Found at step {state.step}; {STRICT}"
        if bad_norm < bad_loss:
            return NonFiniteGradient(f"the {NORM} {norms[step]} {at} {left} {GRADIENT_ADVICE} {late}, and names the "
                                     "parameters.")
        return NonFiniteLoss(f"the {LOSS} {losses[step]} {at} {left} {self._causes.get(step) or ADVICE} {late}, and "
                             "looks at the batch.")


class Unchecked(Callback):
    """In place of `FiniteLoss`, for a fit in which a loss that explodes is a result like any other."""

    owns = FiniteLoss.owns


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
            return (f"The batch itself has {int(bad.sum())} values that are NaN or infinite in a tensor of shape "
                    f"{tuple(tensor.shape)}, the first at {bad.nonzero()[0].tolist()}. Clean the data.")
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
        return (f"The weights were not finite before that ({listed(weights)}): an earlier update has made them so, or "
                "they were loaded like that. Go back to good ones; with GradientClip, a gradient that is not finite "
                "is refused.")
    norms = [f"{name}.{key}" for name, module in model.named_modules() for key in ("running_mean", "running_var")
             if isinstance(value := getattr(module, key, None), Tensor) and not _is_finite(value)]
    if norms:
        return (f"The weights are those of the step before, but the forward pass has left running statistics that are "
                f"not finite ({listed(norms)}): go back to good ones, or reset them.")
    return UNHARMED


def _which_gradients(model: nn.Module) -> str:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, grad in grads.items() if not _is_finite(grad.coalesce().values() if grad.is_sparse else grad)]
    return f"It is not finite in {listed(bad)}." if bad else "Its elements are finite, but too large for a norm."


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _first_bad(column: Column) -> int:
    """The first row that is not finite; the number of rows if all are."""
    return next(iter(np.flatnonzero(~np.isfinite(column)).tolist()), len(column))


def _now(state: State, what: str, value: float) -> str:
    rates = group_lrs(state.opt, len(state.group_names))
    return f"the {what} {value} {_at(state.epoch, state.step, state.group_names, rates)}"


def _at(epoch: int, step: int, names: tuple[str, ...], lrs: list[float]) -> str:
    one, each = f"{lrs[-1]:.3g}", [f"{lr:.3g} of {name}" for name, lr in zip(names, lrs, strict=True)]
    return f"at epoch {epoch}, step {step} (lr {one if len(set(lrs)) == 1 else ', '.join(each)})."
