"""A fit that is limited in time: the same schedules, run on the share of the time that is used up."""
import time
from dataclasses import dataclass

from ..core.callback import Callback, Order
from ..core.state import State
from ..errors import check_number

TICKS = 10_000  # positions of a schedule in a fit of which only the duration is known


@dataclass(eq=False)
class TimeLimit(Callback):
    """Ends the fit after `minutes`, its schedules at their end.

    Schedules run on the share of the time that is used up, or of the steps that are done, whichever is larger: so
    they reach their end when the fit ends, by the clock or by its epochs. The time counts from the first batch, with
    validation, and over a kill and resume. The fit ends with the first weight update after the time (or, where every
    batch is cancelled, without one), validation and all: a little later than `minutes`. No two such fits have equal
    bits. Raises ValueError unless minutes > 0.

    >>> TimeLimit(minutes=30)
    TimeLimit(minutes=30.0)
    """

    minutes: float

    order = Order.SETUP  # before the schedules
    owns = ("the time limit",)  # one of them in a fit
    saves = ("_used",)

    def __post_init__(self) -> None:
        self.minutes = check_number("minutes", self.minutes, above=0, example="TimeLimit(10)")

    def before_fit(self, state: State) -> None:
        self._used = 0.0  # seconds
        self._last_look: float | None = None
        self._batches_late = 0

    def before_batch(self, state: State) -> None:
        now = time.monotonic()
        self._used += 0.0 if self._last_look is None else now - self._last_look
        self._last_look = now
        share = min(1.0, self._used / (60 * self.minutes))
        done = state.step if state.n_epochs is not None else 0
        state.elapsed = max(done, int(share * (state.n_steps - 1)))
        self._batches_late += share >= 1

    def after_step(self, state: State) -> None:
        if self._batches_late:
            state.is_ending = True

    def after_batch(self, state: State) -> None:
        if self._batches_late >= state.accumulate:  # even if nothing but cancelled batches comes
            state.is_ending = True
