"""Averages of the weights over the steps of a fit: EMA and SWA."""
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.callback import Callback, Order
from ..core.state import State
from ..data.loader import is_one_shot
from ..errors import check_flag, check_int, check_number
from .weights import FINAL_WEIGHTS, Slot, fingerprint, norms_to_update, put, slots, swapped, update_norms, weights

IN_VALIDATION = "the weights that are validated"  # one owner in a fit
HALF = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # what is averaged in another type


class WeightAverage(Callback):
    """What `EMA` and `SWA` have in common: a running average, used in validation and prediction.

    averages: name -> tensor, of parameters and persistent buffers by their names in the state dict; empty before the
    first update. Tensors that are no floats, and buffers that are not finite at first (masks), are copied instead; half
    precision is averaged in float32, where small steps still count. n_averaged: how many weights went into them.
    """

    order = Order.RECORD  # sees the weights as all others have left them
    saves: ClassVar[tuple[str, ...]] = ("averages", "n_averaged", "_copied", "_end")
    in_validation: bool

    def _prepare(self) -> None:
        self.in_validation = check_flag("in_validation", self.in_validation)
        self.owns = (IN_VALIDATION,) if self.in_validation else ()
        self._slots: dict[str, Slot] = {}
        self._start_anew()

    def _start_anew(self) -> None:
        self._is_of_earlier_fit = False
        self.averages: dict[str, Tensor] = {}
        self.n_averaged = 0
        self._copied: list[str] = []
        self._end: list[int] | None = None  # the fingerprint of the weights that the fit ended with
        self._pairs: list[tuple[bool, list[Tensor], list[Slot]]] = []

    def before_fit(self, state: State) -> None:
        self._is_of_earlier_fit = True  # until the first step: a fit that fails before that loses nothing
        self._slots = slots(state.model)

    def after_step(self, state: State) -> None:
        if self._is_of_earlier_fit:
            self._start_anew()

    def after_fit(self, state: State) -> None:
        self._slots, self._pairs = {}, []
        if not self._is_of_earlier_fit:
            self._end = fingerprint(state.model) if self.averages else None

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self._pairs, self._is_of_earlier_fit = [], False

    @torch.no_grad()
    def _add(self, share: float) -> None:
        """Move the averages by `share`, 0..1, of the way to the weights of now."""
        if not self.averages:
            now = {name: holder[key] for name, (holder, key) in self._slots.items()}
            self.averages = {name: tensor.detach().to(HALF.get(tensor.dtype, tensor.dtype), copy=True)
                             for name, tensor in now.items()}
            self._copied = [name for name, tensor in now.items() if not _can_be_averaged(tensor)]
        else:
            self._pairs = self._pairs or self._pair()
            for is_averaged, averages, followed in self._pairs:
                tensors = [holder[key].to(averages[0].dtype) for holder, key in followed]
                if is_averaged:
                    torch._foreach_lerp_(averages, tensors, share)
                else:
                    torch._foreach_copy_(averages, tensors)
        self.n_averaged += 1

    def _pair(self) -> list[tuple[bool, list[Tensor], list[Slot]]]:
        """The averages beside the slots that they follow; one device and type in each, as fast kernels want it."""
        pairs: dict[Any, tuple[bool, list[Tensor], list[Slot]]] = {}
        for name, slot in self._slots.items():
            now, is_averaged = slot[0][slot[1]], name not in self._copied
            _, averages, followed = pairs.setdefault((now.device, now.dtype, is_averaged), (is_averaged, [], []))
            self.averages[name] = self.averages[name].to(now.device)
            averages.append(self.averages[name])
            followed.append(slot)
        return list(pairs.values())

    def evaluating(self, model: nn.Module) -> AbstractContextManager[Any]:
        if self.in_validation and self.averages and (self._end is None or self._end == fingerprint(model)):
            return swapped(model, self.averages)
        return nullcontext()  # also if other weights were loaded since

    def swapped(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A block in which `model` has the averaged weights; then its own again, bit for bit, however the block ends.

        Raises RuntimeError if nothing was averaged yet, ValueError for a model of another shape.
        """
        return swapped(*self._checked(model))

    def copy_to(self, model: nn.Module) -> None:
        """Give `model` the averaged weights, in place, for good. Raises as `swapped` does."""
        put(*self._checked(model))

    def _checked(self, model: Any) -> tuple[nn.Module, dict[str, Tensor]]:
        if not self.averages:
            raise RuntimeError(f"{self!r} has no averaged weights: fit with it first. What a SWA(apply=True) has "
                               "averaged is in the model at the end of its fit.")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, got a {type(model).__name__}. Pass learn.model.")
        return model, self.averages


@dataclass(eq=False)
class EMA(WeightAverage):
    """An exponential moving average of the weights, swapped in for validation and prediction.

    decay: after each step the average is decay * average + (1 - decay) * weights, 0 <= decay < 1.
    half_life: instead of it, the steps after which a weight counts half, > 0.
    in_validation: every validation of the fit looks at the averaged weights; given to the Learner, so do
        `learn.validate`, `get_preds` and `predict` after it, as long as the model has the weights that the fit ended
        with. A fit has one such average; one given to the fit takes the place of the Learner's. False: it is only kept.

    The average begins with the weights after the first step, in each fit anew. It lags: for the first few half-lives
    it looks worse than the raw weights, so let one be some percent of the fit. Buffers (the statistics of BatchNorm)
    are averaged too; dropped steps, as at an fp16 overflow, do not count. It is that of torch's `AveragedModel` with
    `get_ema_multi_avg_fn(decay)`. `learn.save` writes the raw weights, which are trained.

        with ema.swapped(learn.model):  # for the length of a block
            learn.save("averaged.pt")
        ema.copy_to(learn.model)        # for good

    Costs one copy of the weights, in validation two. Every swap copies all weights twice: to predict often, use
    `copy_to`. Raises ValueError for values out of range.

    >>> ema = EMA(half_life=100)
    >>> round(ema.rate, 6)
    0.993092
    """

    decay: float | None = None
    half_life: float | None = None
    in_validation: bool = True

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.half_life is None):
            given = "neither" if self.decay is None else f"decay={self.decay!r} and half_life={self.half_life!r}"
            raise ValueError(f"EMA takes either decay or half_life, got {given}. Pass e.g. EMA(half_life=100): steps.")
        if self.decay is not None:
            self.decay = check_number("decay", self.decay, minimum=0, below=1, example="EMA(decay=0.999)")
        if self.half_life is not None:
            self.half_life = check_number("half_life", self.half_life, above=0, example="EMA(half_life=100)")
        self._prepare()

    @property
    def rate(self) -> float:
        """The decay per step, 0..1."""
        return self.decay if self.decay is not None else 0.5 ** (1 / self.half_life)  # type: ignore[operator]

    def after_step(self, state: State) -> None:
        super().after_step(state)
        self._add(1 - self.rate)


@dataclass(eq=False)
class SWA(WeightAverage):
    """Stochastic weight averaging: the plain mean of the weights at the end of each epoch, late in the fit.

    start: the share of the fit, 0..1, that is over when averaging begins: 0.75 takes the ends of epochs 3 and 4 of 4.
    every: average every so many steps instead, >= 1.
    apply: when the fit has gone to its end, the model gets the averaged weights for good, and its BatchNorm layers new
        statistics: one more pass over the training data, without gradients, random generators put back. The raw weights
        and `averages` are gone then. A fit that is cut short (an error, Ctrl-C, CancelFit), or ends before anything was
        averaged, keeps both; so does apply=False.
    in_validation: as in `EMA`, as are `swapped` and `copy_to`, with the mean of the BatchNorm statistics.

    For a learning rate that stays high or comes in cycles: one cycle leaves nothing to average out. Each fit starts
    anew. Raises ValueError for values out of range, and for a fit that would need a second pass over an iterator.
    Source: Izmailov et al. 2018 (arXiv 1803.05407).

    >>> SWA(0.5)
    SWA(start=0.5, every=None, apply=True, in_validation=True)
    """

    start: float = 0.75
    every: int | None = None
    apply: bool = True
    in_validation: bool = True

    saves: ClassVar[tuple[str, ...]] = (*WeightAverage.saves, "_is_newest", "_is_complete")

    def __post_init__(self) -> None:
        self.start = check_number("start", self.start, minimum=0, maximum=1)
        self.every = None if self.every is None else check_int("every", self.every)
        self.apply = check_flag("apply", self.apply)
        self._prepare()
        self.owns += (FINAL_WEIGHTS,) if self.apply else ()

    def before_fit(self, state: State) -> None:
        super().before_fit(state)
        self._is_newest = True  # whether there was no step since the last average
        self._is_complete = False
        if self.apply and is_one_shot(state.train_dl) and norms_to_update(state):
            raise ValueError("for BatchNorm, SWA makes one more pass over the training data, but this is an iterator "
                             f"({type(state.train_dl).__name__}), good for one. Pass SWA(apply=False), or a loader.")

    def after_step(self, state: State) -> None:
        super().after_step(state)
        self._is_newest = False
        if self.every is not None and (state.step + 1) % self.every == 0:
            self._add_if_late(state, state.step + 1)

    def after_batch(self, state: State) -> None:
        if self.every is None and (state.is_ending or state.batch_index + 1 == state.n_batches):
            self._add_if_late(state, state.step)  # validation comes next, and uses the average

    def after_epoch(self, state: State) -> None:
        if self.every is None:
            self._add_if_late(state, state.step)  # the epoch was cancelled, or shorter than announced
        self._is_complete = state.is_ending or state.epoch + 1 == state.n_epochs

    def after_fit(self, state: State) -> None:
        try:
            if self.apply and self._is_complete and self.averages and not self._is_of_earlier_fit:
                self._apply(state)
        finally:
            super().after_fit(state)

    def _apply(self, state: State) -> None:
        raw = {name: tensor.clone() for name, tensor in weights(state.model).items()}
        try:
            self.copy_to(state.model)
            update_norms(state)
        except BaseException:
            put(state.model, raw)
            raise
        self.averages = {}

    def _add_if_late(self, state: State, steps: int) -> None:
        done = steps if state.elapsed is None else state.elapsed + 1
        if not self._is_newest and done >= self.start * state.n_steps - 1e-9:  # 0.28 * 25 is 7.000000000000001
            self._add(1 / (self.n_averaged + 1))
            self._is_newest = True


def _can_be_averaged(tensor: Tensor) -> bool:
    is_float = tensor.is_floating_point() or tensor.is_complex()
    return is_float and (isinstance(tensor, nn.Parameter) or bool(tensor.isfinite().all()))
