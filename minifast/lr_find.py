"""The learning-rate finder: a ramp of learning rates, one per weight update, until the loss explodes."""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import plots
from .callback import Callback, CancelFit, Order
from .errors import check_flag, check_int
from .hypers import check_lr, set_lrs, spread_lrs
from .scalars import Ema
from .state import State
from .suggest import suggestions
from .verdict import FLAT, OK, judge

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Column = NDArray[np.float64]
ALL_TRIED, CUT_SHORT = "all were tried", "it was cut short"  # ends that are no explosion


@dataclass(frozen=True, eq=False, repr=False)
class LRFind:
    """What the LR finder found. Arrays are float64, one entry per weight update, the last one included.

    Of several runs (`lr_find(repeats=3)`) the curves are the median at each learning rate that more than half of the
    runs reached; a run that stopped before counts as above all others there. The suggestions are read off that curve.
    """

    lrs: Column  # learning rate of the last layer group, (n,)
    losses: Column  # training loss before the update at that rate, (n,)
    smooth_losses: Column  # the same as an exponential moving average (0.98, bias-corrected), (n,)
    suggestions: dict[str, float | None]  # rule -> learning rate, or None where it gives none
    suggestion: float | None  # the valley's: a peak to train with
    stopped: str  # why it ended
    reason: str = ""  # why there is no suggestion, or none to rely on; '' exactly if the verdict is "ok"
    num_it: int = 0  # learning rates asked for
    pass_length: int | None = None  # updates in one pass over the data; None: the data was not seen to its end
    verdict: str = OK  # "ok", "flat", "too noisy", "at the edge of the range" or "too few points"
    repeated: tuple["LRFind", ...] = ()  # the single runs, if there were several
    band: tuple[Column, Column] | None = None  # lowest and highest smoothed loss of the runs that got there, (n,) each

    @property
    def runs(self) -> tuple["LRFind", ...]:
        """The single runs, the first one first; of one run, itself."""
        return self.repeated or (self,)

    @property
    def spread(self) -> dict[str, tuple[float, float] | None]:
        """The lowest and highest suggestion of the runs by each rule; None where no run has one."""
        found = {rule: [lr for run in self.runs if (lr := run.suggestions[rule]) is not None]
                 for rule in self.suggestions}
        return {rule: (min(lrs), max(lrs)) if lrs else None for rule, lrs in found.items()}

    def __str__(self) -> str:
        """The run in words: what people ask about it."""
        n, several = len(self.lrs), len(self.runs) > 1
        passes = f" = {n / self.pass_length:.1f} epochs of {self.pass_length} batches" if self.pass_length else ""
        ended = f"stopped at {self.lrs[-1]:.2g} because {self.stopped}" if n else f"stopped because {self.stopped}"
        runs = f"median of {len(self.runs)} runs, " if several else ""
        found = ", ".join(f"{rule} {lr:.2e}{self._spread(rule) if several else ''}"
                          for rule, lr in self.suggestions.items() if lr is not None)
        verdict = f"verdict: {self.verdict}" + (f" ({self.reason})" if self.reason else "")
        return (f"{runs}{n} learning rates{passes}; training loss; {ended}\n"
                f"suggestions: {found + '; ' if found else 'none, '}{verdict}{self._note()}")

    def _spread(self, rule: str) -> str:
        lowest, highest = self.spread[rule] or (math.nan, math.nan)
        return f" ({lowest:.1e} to {highest:.1e})"

    def _note(self) -> str:
        """Said of runs that could not differ: they look like certainty and are none."""
        first, *others = self.runs
        same = others and all(np.array_equal(run.losses, first.losses, equal_nan=True) for run in others)
        return "; all runs are the same, for neither data order nor model is random" if same else ""

    def __repr__(self) -> str:
        """Short: a notebook shows it below the lines that `lr_find` has printed."""
        runs = f"{len(self.runs)} runs, " if len(self.runs) > 1 else ""
        return (f"LRFind(suggestion={self.suggestion}, {self.verdict}, {runs}{len(self.lrs)} learning rates, "
                f"{self.stopped})")

    def plot(self, skip_start: int = 10, skip_end: int = 5, suggestions: bool = True, *,
             ax: "Axes | None" = None) -> "Axes":
        """Draw the smoothed training loss against the learning rate, the suggestions marked.

        Of several runs the median, and the range of the runs as a shaded band. A verdict that is not "ok" is said
        above. skip_start, skip_end: points left out at the ends, >= 0; fewer where there are few.
        """
        skip_start = check_int("skip_start", skip_start, minimum=0)
        skip_end = check_int("skip_end", skip_end, minimum=0)
        suggestions = check_flag("suggestions", suggestions)
        n = len(self.lrs)
        share = min(1.0, n / 2 / max(1, skip_start + skip_end))  # at least half of the points stay
        shown = slice(int(skip_start * share), n - int(skip_end * share))
        lrs, losses = self.lrs[shown], self.smooth_losses[shown]
        ax = plots.axes(ax)
        ax.plot(lrs, losses, color="C0")
        highest = losses
        if self.band is not None:
            low, highest = (edge[shown] for edge in self.band)
            if np.isfinite(low).any():  # a band without a point has no limits: on a log axis that is an error
                ax.fill_between(lrs, low, highest, color="C0", alpha=0.2, linewidth=0, label=f"{len(self.runs)} runs")
        finite = losses[np.isfinite(losses)]
        if finite.size:
            top = max(finite[0], finite.min() + 4 * abs(finite.min()))
            if np.nanmax(highest) > 2 * top > 0:  # without stop_div: the explosion would flatten what there is to see
                ax.set_ylim(top=1.1 * top)
        ax.set(xscale="log", xlabel="learning rate", ylabel="training loss (smoothed)")
        marked = [(rule, lr) for rule, lr in self.suggestions.items() if lr is not None] if suggestions else []
        for i, (rule, lr) in enumerate(marked):
            ax.plot(lr, np.interp(math.log(lr), np.log(self.lrs), self.smooth_losses), "o", color=f"C{i + 1}",
                    label=f"{rule}: {lr:.2e}")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
        if self.verdict != OK:
            ax.set_title(f"verdict: {self.verdict}", fontsize="small")
        return ax


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
    sets = ("lr",)

    def __post_init__(self) -> None:
        self.start_lr, self.end_lr = check_lr("start_lr", self.start_lr), check_lr("end_lr", self.end_lr)
        self.num_it = check_int("num_it", self.num_it, minimum=2, example="num_it=100")
        check_flag("stop_div", self.stop_div)
        if isinstance(self.start_lr, float) and isinstance(self.end_lr, float):
            _check_ramp((self.start_lr,), (self.end_lr,))
        self._forget()

    def _forget(self) -> None:
        self._lrs: list[float] = []
        self._losses: list[float] = []
        self._smooth: list[float] = []
        self._ema, self._best, self._stopped = Ema(), math.inf, CUT_SHORT
        self._is_done = False
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
        self._pass_length = state.steps_per_epoch

    def before_batch(self, state: State) -> None:
        progress = state.step / self.num_it
        self._newest = [start * ratio**progress for start, ratio in self._ramps]
        set_lrs(state.opt, self._newest)

    def after_step(self, state: State) -> None:
        loss = float(state.step_loss)  # the one place that waits for the device: it has to know when to stop
        smooth = self._ema.add(loss)
        self._lrs.append(self._newest[-1])
        self._losses.append(loss)
        self._smooth.append(smooth)
        self._best = min(self._best, smooth)
        if not math.isfinite(loss):
            self._stopped = f"the loss is {loss}"
        elif self.stop_div and state.step >= self.num_it // 10 and smooth > self._best + 3 * abs(self._best):
            self._stopped = "the loss diverged"
        elif len(self._lrs) == self.num_it:
            self._stopped = ALL_TRIED
        else:
            return
        self._is_done = True

    def after_batch(self, state: State) -> None:
        self._end()  # not in after_step: other callbacks are to hear of the last step too

    def after_epoch(self, state: State) -> None:
        self._pass_length = self._pass_length or state.step
        self._end()

    def _end(self) -> None:
        if self._is_done:
            raise CancelFit

    def result(self) -> LRFind:
        """What was found. Fewer than about 10 usable points, or no descent: no suggestions, and the reason."""
        lrs, losses, smooth = np.array(self._lrs), np.array(self._losses), np.array(self._smooth)
        exploded = self._stopped not in (ALL_TRIED, CUT_SHORT)
        verdict, reason = judge(lrs, losses, smooth, self.num_it, self._stopped, exploded)
        found = suggested(lrs, smooth, self.num_it, verdict)
        return LRFind(lrs, losses, smooth, found, found.get("valley"), self._stopped, reason, self.num_it,
                      self._pass_length, verdict)


def suggested(lrs: Column, smooth_losses: Column, num_it: int, verdict: str) -> dict[str, float | None]:
    """What every rule says, given the verdict: nothing about a curve that is flat."""
    found = suggestions(lrs, smooth_losses, num_it)[0]
    return dict.fromkeys(found) if verdict == FLAT else found


def _check_ramp(starts: Sequence[float], ends: Sequence[float]) -> None:
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise ValueError(f"start_lr must be below end_lr, got {start:g} and {end:g}. "
                             "Pass e.g. lr_find(1e-7, 10).")
        if not math.isfinite(end / start):
            raise ValueError(f"start_lr={start:g} and end_lr={end:g} are so far apart that their ratio is infinite. "
                             "Pass e.g. lr_find(1e-7, 10).")
