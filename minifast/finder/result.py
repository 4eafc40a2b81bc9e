"""What the learning-rate finder found."""
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import check_flag, check_int
from ..show import plots
from ..suggest import suggestions
from .verdict import FLAT, OK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Column = NDArray[np.float64]
ALL_TRIED, CUT_SHORT = "all were tried", "it was cut short"  # ends that are no explosion


@dataclass(frozen=True, eq=False, repr=False)
class LRFind:
    """What the LR finder found. Arrays are float64, one entry per weight update, the last one included.

    Of several runs (`lr_find(repeats=3)`) the curves are the median at each learning rate that more than half of the
    runs reached; a run that stopped before counts as above all others. The suggestions are read off that curve.
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
        n, (first, *others) = len(self.lrs), self.runs
        passes = f" = {n / self.pass_length:.1f} epochs of {self.pass_length} batches" if self.pass_length else ""
        at = f" at {self.lrs[-1]:.2g}" if n else ""
        runs = f"median of {len(self.runs)} runs, " if others else ""
        spread = {rule: " ({:.1e} to {:.1e})".format(*ends) for rule, ends in self.spread.items() if ends and others}
        found = ", ".join(f"{rule} {lr:.2e}{spread.get(rule, '')}" for rule, lr in self.suggestions.items()
                          if lr is not None)
        verdict = f"verdict: {self.verdict}" + (f" ({self.reason})" if self.reason else "")
        same = others and all(np.array_equal(run.losses, first.losses, equal_nan=True) for run in others)
        note = "; all runs are the same, for neither data order nor model is random" if same else ""
        return (f"{runs}{n} learning rates{passes}; training loss; stopped{at} because {self.stopped}\n"
                f"suggestions: {found + '; ' if found else 'none, '}{verdict}{note}")

    def __repr__(self) -> str:
        """Short: a notebook shows it below the lines that `lr_find` has printed."""
        runs = f"{len(self.runs)} runs, " * (len(self.runs) > 1) + f"{len(self.lrs)} learning rates"
        return f"LRFind(suggestion={self.suggestion}, {self.verdict}, {runs}, {self.stopped})"

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
        low, highest = (losses, losses) if self.band is None else (edge[shown] for edge in self.band)
        if self.band is not None and np.isfinite(low).any():  # on a log axis a band without a point is an error
            ax.fill_between(lrs, low, highest, color="C0", alpha=0.2, linewidth=0, label=f"{len(self.runs)} runs")
        finite = losses[np.isfinite(losses)]
        top = max(finite[0], finite.min() + 4 * abs(finite.min())) if finite.size else 0.0
        if top > 0 and np.nanmax(highest) > 2 * top:  # without stop_div: the explosion would flatten all the rest
            ax.set_ylim(top=1.1 * top)
        ax.set(xscale="log", xlabel="learning rate", ylabel="training loss (smoothed)")
        marked = [(rule, lr) for rule, lr in self.suggestions.items() if lr is not None and suggestions]
        for i, (rule, lr) in enumerate(marked):
            ax.plot(lr, np.interp(math.log(lr), np.log(self.lrs), self.smooth_losses), "o", color=f"C{i + 1}",
                    label=f"{rule}: {lr:.2e}")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
        if self.verdict != OK:
            ax.set_title(f"verdict: {self.verdict}", fontsize="small")
        return ax


def suggested(lrs: Column, smooth_losses: Column, num_it: int, verdict: str) -> dict[str, float | None]:
    """What every rule says, given the verdict: nothing about a curve that is flat."""
    found = suggestions(lrs, smooth_losses, num_it)[0]
    return dict.fromkeys(found) if verdict == FLAT else found
