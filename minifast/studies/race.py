"""A race of learning rates: short fits from the same weights on the same batches, and which of them wins."""
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..base.batch import Batch
from ..core.callback import Callback
from ..core.checks import check_loader, check_valid
from ..core.ownership import check_callbacks
from ..core.state import State
from ..data.dataloaders import DataLoaders
from ..data.feed import feed
from ..data.loader import valid_sets
from ..errors import check_int, check_items
from ..optim.rates import as_written, spread_lrs
from ..record.scalars import Ema, ScalarColumn
from ..schedules.scheduler import Scheduler, last_lr
from ..show import plots
from ..show.tables import Table
from ..standard.finite import Unchecked
from ..standard.progress import Progress
from ..training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Column = NDArray[np.float64]
STANDARD_ERRORS = 2.0  # how many of them a margin has to exceed
STANDSTILL, START_STEPS = 1e-30, 10  # a learning rate that moves nothing, to see the loss at the start on some batches
MAX_RISE = 4.0  # times that loss
MIN_COMPARED = 5  # steps, below which there is no telling how much the losses scatter


@dataclass(frozen=True, eq=False, repr=False)
class Race:
    """What a race of learning rates came to; prints as a table and a sentence.

    rows: one per candidate: lr, train_loss (the mean over the last quarter of the steps), valid_loss (if there is
    validation data), behind (train_loss minus the lowest one), noise (the standard error of that), result.
    """

    lrs: tuple[Any, ...]  # the candidates as they were given
    losses: Column  # training loss of each step, (candidates, steps)
    rows: Table  # in the order of the candidates
    winner: Any  # one of `lrs`, or None
    verdict: str  # who wins, or why nobody does

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the smoothed training loss of every candidate against the step; the winner's line is thick."""
        ax = plots.axes(ax)
        beta = max(0.0, min(0.98, 1 - 10 / self.losses.shape[1]))  # over a tenth of the steps
        for lr, losses, row in zip(self.lrs, self.losses, self.rows, strict=True):
            ema, result = Ema(beta), row["result"]
            smooth = np.where(np.isfinite(losses), [ema.add(loss) for loss in losses], np.nan)
            plots.line(ax, smooth, label=f"{as_written(lr)}: {result}" if result else as_written(lr),
                       linewidth=2.5 if result == "wins" else 1.3)
        start, (bottom, highest) = np.nan_to_num(self.losses[:, 0], posinf=0.0).max(), ax.get_ylim()
        if highest > 3 * start > 0:  # an explosion would flatten all others: show where it leaves
            ax.set_ylim(bottom if np.nanmin(self.losses) < 0 else 0.0, 2 * start)
        plots.count_on_x(ax, plots.STEPS)
        ax.set_ylabel("training loss (smoothed)")
        ax.legend(title="learning rate")
        return ax

    def __repr__(self) -> str:
        n, steps = self.losses.shape
        return (f"{n} learning rates, {steps} weight update{'s' * (steps > 1)} each from the same weights and batches\n"
                f"{self.rows}\n{self.verdict}")


def race(learn: Trainer, lrs: Iterable[Any], steps: int = 100, *, schedule: Scheduler | None = None,
         callbacks: Iterable[Callback] = ()) -> Race:
    """See `Learner.race`."""
    candidates = _check_candidates(learn, lrs)
    steps = check_int("steps", steps, example="race([1e-3, 1e-2], steps=100)")
    if schedule is not None and not isinstance(schedule, Scheduler):
        raise TypeError(f"schedule must be None or a schedule such as OneCycle(), got {schedule!r:.80}.")
    if schedule is not None and ("lr" not in schedule.owns or schedule.max_lr is not None):
        raise ValueError(f"schedule={schedule!r} sets {'its own peak' if 'lr' in schedule.owns else 'no lr'}: give one "
                         "that takes its peak from the candidates, such as OneCycle().")
    running = [cb for cb in (*learn.callbacks, *check_callbacks(callbacks, "callbacks")) if cb.in_lr_find]
    check_loader(learn.dls.train, 1, learn.model.modules())
    for _, loader in valid_sets(learn.dls.valid)[:1]:
        check_valid(loader)
    start = _run(learn, STANDSTILL, min(steps, START_STEPS), [], running, "race", validates=False).losses
    runs = [_run(learn, lr, steps, [schedule] if schedule else [], running, f"race {k + 1}/{len(candidates)}")
            for k, lr in enumerate(candidates)]
    return _judge(candidates, runs, float(np.abs(start).mean()) if len(start) else math.nan)


class _Watch(Unchecked):  # a candidate that explodes has lost, and is no error
    """Keeps the validation loss of each batch; and beside it, what the recorder has of a candidate's fit."""

    losses: Column  # the training loss of each step
    valid_loss: float | None

    def __init__(self) -> None:
        self.valid_losses = ScalarColumn()

    def after_valid_batch(self, state: State) -> None:
        self.valid_losses.append(state.loss)


class _Passes:
    """Pass after pass over `loader`, as one without end; `close` ends the workers of the newest."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._loader = loader
        self.close: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Batch]:
        is_empty = False
        while not is_empty:  # or this would never end
            batches = feed(self._loader, torch.device("cpu"), what="the training data")
            self.close, is_empty = batches.close, True
            for batch in batches:
                is_empty = False
                yield batch


def _run(learn: Trainer, lr: Any, steps: int, schedule: list[Scheduler], running: list[Callback],
         title: str, validates: bool = True) -> _Watch:
    """One candidate's fit, in a sandbox: leaving it also puts the random generators back for the next one."""
    watch = _Watch()
    with learn.sandbox(running):
        shown = [Progress(title)] if learn.verbose else []
        # One long epoch: a schedule then has exactly these steps, however long a pass is, and validation comes once.
        with closing(_Passes(learn.dls.train)) as passes:
            valid = next((loader for _, loader in valid_sets(learn.dls.valid) if validates), None)
            learn.dls = DataLoaders(passes, valid)
            learn.callbacks, learn.metrics, learn.train_metrics = [], [], False
            learn.fit(lr, 1, steps_per_epoch=steps, callbacks=[*schedule, *running, watch, *shown], verbose=False)
        watch.losses = learn.recorder.losses
        watch.valid_loss = learn.recorder.epochs[-1].get("valid_loss") if learn.recorder.epochs else None
    return watch


def _check_candidates(learn: Trainer, lrs: Any) -> tuple[Any, ...]:
    candidates = tuple(check_items("lrs", lrs, "a list of learning rates", example="race([1e-3, 3e-3, 1e-2])"))
    if len(candidates) < 2:
        raise ValueError(f"lrs must hold at least 2 learning rates, got {len(candidates)}. Pass e.g. race([0.1, 1]).")
    spread = [spread_lrs(lr, learn.groups.names, f"lrs[{i}]") for i, lr in enumerate(candidates)]
    for i, values in enumerate(spread):
        if (first := spread.index(values)) < i:
            raise ValueError(f"lrs[{first}] and lrs[{i}] are the same learning rate, {as_written(candidates[i])}. "
                             "Leave one of them out.")
    return candidates


def _judge(lrs: tuple[Any, ...], runs: Sequence[_Watch], start: float) -> Race:
    """start: the size of the loss of the starting weights."""
    n_steps = min(len(run.losses) for run in runs)  # a callback may end a fit early
    if n_steps == 0:
        raise RuntimeError("a callback ended a fit before its first weight update: there is nothing to compare.")
    losses = np.array([run.losses[:n_steps] for run in runs])
    tails = losses[:, -max(1, n_steps // 4):]
    with np.errstate(all="ignore"):
        means = tails.mean(axis=1)
        worst = np.max([part.mean(axis=1) for part in np.array_split(losses, min(4, n_steps), axis=1)], axis=0)
        diverged = ~(np.isfinite(losses).all(axis=1) & (worst <= MAX_RISE * start))
    ranking = sorted(np.flatnonzero(~diverged).tolist(), key=lambda k: means[k])
    best = ranking[0] if ranking else None
    noises = [0.0 if k == best else _noise(tails[k] - tails[best]) if k in ranking else math.nan
              for k in range(len(lrs))]
    winner, verdict = _decide(lrs, runs, means, noises, ranking, tails.shape[1], start)
    rows = Table()
    for k, (lr, run) in enumerate(zip(lrs, runs, strict=True)):
        valid = {} if run.valid_loss is None else {"valid_loss": run.valid_loss}
        behind = math.nan if best is None else float(means[k] - means[best])
        rows.append({"lr": as_written(lr), "train_loss": float(means[k]), **valid, "behind": behind,
                     "noise": noises[k], "result": "wins" if k == winner else "diverged" if diverged[k] else ""})
    return Race(lrs, losses, rows, None if winner is None else lrs[winner], verdict)


def _decide(lrs: tuple[Any, ...], runs: Sequence[_Watch], means: Column, noises: Sequence[float],
            ranking: Sequence[int], n_compared: int, start: float) -> tuple[int | None, str]:
    """The number of the winner, or None; and the verdict in words."""
    if not math.isfinite(start):
        return None, f"no winner: the loss of the starting weights is {start}; look at data, model and loss"
    if not ranking:
        return None, "no winner: all of them diverged; try smaller learning rates"
    best, *others = ranking
    name, unclear = as_written(lrs[best]), "no clear winner: "
    if others and n_compared < MIN_COMPARED:
        return None, (f"{unclear}{n_compared} step{'s' * (n_compared > 1)} in the last quarter cannot tell a margin "
                      f"from noise; take steps={4 * MIN_COMPARED} or more")
    if others and np.ptp(means[ranking]) <= 1e-9 * abs(means[best]):
        return None, f"{unclear}flat: the training loss is {means[best]:.4g} with each of them; does the model learn?"
    for k in others:
        behind = float(means[k] - means[best])
        if not behind > STANDARD_ERRORS * noises[k]:
            return None, (f"{unclear}{name} has the lowest training loss, but {as_written(lrs[k])} is behind by only "
                          f"{behind:.2g}, with a noise of {noises[k]:.2g}; take either, or more steps")
    for k in others:
        ahead = runs[best].valid_losses.read() - runs[k].valid_losses.read()  # > 0: k has the lower one
        if len(ahead) and not ahead.mean() <= STANDARD_ERRORS * _noise(ahead):
            return None, (f"{unclear}{name} has the lowest training loss, but {as_written(lrs[k])} a validation loss "
                          f"of {runs[k].valid_loss:.4g} against {runs[best].valid_loss:.4g}; take more steps")
    peaks = [last_lr(lr) for lr in lrs]
    hint = ("; it is the highest: a higher one may do better" if peaks[best] == max(peaks) else
            "; it is the lowest: a lower one may do better" if peaks[best] == min(peaks) else "")
    if not others:
        gone = "the other" if len(lrs) == 2 else f"all {len(lrs) - 1} others"
        return best, f"{name} wins: {gone} diverged{hint}"
    second = others[0]
    return best, (f"{name} wins: the next, {as_written(lrs[second])}, is behind by {means[second] - means[best]:.2g} "
                  f"in training loss, with a noise of {noises[second]:.2g}{hint}")


def _noise(differences: Column) -> float:
    """The standard error of the mean of `differences`, (n,), more if neighbours are alike; inf for a single one."""
    n = len(differences)
    if n < 2:
        return math.inf
    with np.errstate(all="ignore"):
        centred = differences - differences.mean()
        power = float(centred @ centred)
        alike = min(max(float(centred[1:] @ centred[:-1]) / (power or 1.0), 0.0), 1 - 1 / n)
        return math.sqrt(power / (n - 1) / n * (1 + alike) / (1 - alike))
