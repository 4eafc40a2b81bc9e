"""The learning-rate finder: a ramp of learning rates, one per weight update, until the loss explodes."""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.callback import Callback, CancelFit, Order
from ..core.state import State
from ..errors import check_flag, check_int
from ..optim.hypers import set_lrs
from ..optim.rates import check_lr, spread_lrs
from ..record.scalars import Ema
from .result import ALL_TRIED, CUT_SHORT, LRFind, suggested
from .verdict import judge


@dataclass(eq=False)
class LRFinder(Callback):
    """Trains with a learning rate that grows from `start_lr` by a constant factor, and ends the fit.

    start_lr, end_lr: in every form of a learning rate; of a slice or sequence each layer group has its own ramp.
    num_it: how many learning rates are tried, one weight update each, over as many passes as that takes; >= 2.
    stop_div: stop once the smoothed loss exceeds its best by 3 times the best (a loss that is not finite always stops).
    In `learn.fit(callbacks=[LRFinder()])` it runs like `learn.lr_find()`: in a sandbox, its result in
    `learn.recorder.lr_find`. Raises ValueError for values out of range.

    Source: Smith 2015 (arXiv 1506.01186, section 3.3) in fastai's exponential form.

    >>> LRFinder(num_it=200)
    LRFinder(start_lr=1e-07, end_lr=10.0, num_it=200, stop_div=True)
    """

    start_lr: Any = 1e-7
    end_lr: Any = 10.0
    num_it: int = 100
    stop_div: bool = field(default=True, kw_only=True)

    order = Order.HYPER
    owns = ("lr",)

    def __post_init__(self) -> None:
        self.start_lr, self.end_lr = check_lr("start_lr", self.start_lr), check_lr("end_lr", self.end_lr)
        self.num_it = check_int("num_it", self.num_it, minimum=2, example="num_it=100")
        check_flag("stop_div", self.stop_div)
        if isinstance(self.start_lr, float) and isinstance(self.end_lr, float):
            _check_ramp((self.start_lr,), (self.end_lr,))
        self._forget()

    def _forget(self) -> None:
        self._rows: list[tuple[float, float, float]] = []  # learning rate, loss, smoothed loss
        self._ema, self._best, self._stopped = Ema(), math.inf, CUT_SHORT
        self._pass_length: int | None = None

    def ramps(self, group_names: Sequence[str]) -> tuple[tuple[float, float], ...]:
        """(start, end / start) of each layer group. Raises ValueError for a ramp that does not rise."""
        starts = spread_lrs(self.start_lr, group_names, "start_lr")
        ends = spread_lrs(self.end_lr, group_names, "end_lr")
        _check_ramp(starts, ends)
        return tuple((start, end / start) for start, end in zip(starts, ends, strict=True))

    def before_fit(self, state: State) -> None:
        self._forget()
        self._ramps = self.ramps(state.group_names)
        self._pass_length, state.n_steps = state.steps_per_epoch, self.num_it

    def before_batch(self, state: State) -> None:
        progress = state.step / self.num_it
        self._newest = [start * ratio**progress for start, ratio in self._ramps]
        set_lrs(state.opt, self._newest)

    def after_step(self, state: State) -> None:
        loss = float(state.step_loss)  # the one place that waits for the device: it has to know when to stop
        smooth = self._ema.add(loss)
        self._rows.append((self._newest[-1], loss, smooth))
        self._best = min(self._best, smooth)
        if not math.isfinite(loss):
            self._stopped = f"the loss is {loss}"
        elif self.stop_div and state.step >= self.num_it // 10 and smooth > self._best + 3 * abs(self._best):
            self._stopped = "the loss diverged"
        elif len(self._rows) == self.num_it:
            self._stopped = ALL_TRIED

    def after_batch(self, state: State) -> None:
        if self._stopped != CUT_SHORT:  # not in after_step: other callbacks are to hear of the last step too
            raise CancelFit

    def after_epoch(self, state: State) -> None:
        self._pass_length = self._pass_length or state.step
        self.after_batch(state)

    def result(self) -> LRFind:
        """What was found. Fewer than about 10 usable points, or no descent: no suggestions, and the reason."""
        lrs, losses, smooth = np.array(self._rows, dtype=float).reshape(-1, 3).T.copy()
        exploded = self._stopped not in (ALL_TRIED, CUT_SHORT)
        verdict, reason = judge(lrs, losses, smooth, self.num_it, self._stopped, exploded)
        found = suggested(lrs, smooth, self.num_it, verdict)
        return LRFind(lrs, losses, smooth, found, found.get("valley"), self._stopped, reason, self.num_it,
                      self._pass_length, verdict)


def _check_ramp(starts: Sequence[float], ends: Sequence[float]) -> None:
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise ValueError(f"start_lr must be below end_lr, got {start:g} and {end:g}. Pass e.g. lr_find(1e-7, 10).")
        if not math.isfinite(end / start):
            raise ValueError(f"start_lr={start:g} and end_lr={end:g} are so far apart that their ratio is infinite. "
                             "Pass e.g. lr_find(1e-7, 10).")
