"""A race of learning rates: short fits from the same weights on the same batches, and which of them wins."""
import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..base.batch import Batch
from ..core.callback import Callback, Order
from ..core.checks import check_loader, check_valid
from ..core.ownership import check_callbacks
from ..core.state import State
from ..data.dataloaders import DataLoaders
from ..data.feed import feed
from ..data.loader import valid_sets
from ..errors import check_int, check_items
from ..machine.signals import DeferredInterrupt
from ..optim.rates import spread_lrs
from ..record.scalars import Ema, ScalarColumn
from ..schedules.scheduler import Scheduler, last_lr
from ..show import plots
from ..show.tables import Table
from ..standard.finite import FiniteLoss
from ..standard.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..training.trainer import Trainer

Column = NDArray[np.float64]
STANDARD_ERRORS = 2.0  # how many of them a margin has to exceed
STANDSTILL, START_STEPS = 1e-30, 10  # a learning rate that moves nothing, to see the loss at the start on some batches
MAX_RISE = 4.0  # times that loss: the finder's "3 times the best above it"
MIN_COMPARED = 5  # steps, below which there is no telling how much the losses scatter


@dataclass(frozen=True, eq=False, repr=False)
class Race:
    """What a race of learning rates came to; prints as a table and a sentence.

    lrs: the candidates as they were given. losses: training loss of each step, float64 (candidates, steps). rows: one
    per candidate, in their order: lr, train_loss (the mean over the last quarter of the steps), valid_loss (if there
    is validation data), behind (train_loss minus the lowest one), noise (the standard error of that), result. winner:
    one of `lrs`, or None. verdict: who wins, or why nobody does.
    """

    lrs: tuple[Any, ...]
    losses: Column
    rows: Table
    winner: Any
    verdict: str

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the smoothed training loss of every candidate against the step; the winner's line is thick."""
        ax = plots.axes(ax)
        beta = max(0.0, min(0.98, 1 - 10 / self.losses.shape[1]))  # over a tenth of the steps
        seen = []
        for lr, losses, row in zip(self.lrs, self.losses, self.rows, strict=True):
            ema = Ema(beta)
            smooth = np.array([ema.add(loss) for loss in losses])
            smooth[~np.isfinite(losses)] = np.nan
            label = f"{name_of(lr)}: {row['result']}" if row["result"] else name_of(lr)
            plots.line(ax, smooth, label=label, linewidth=2.5 if row["result"] == "wins" else 1.3)
            seen += [smooth[0], smooth.max()] if row["behind"] == 0 else [smooth[0]]
        top = max((value for value in seen if np.isfinite(value)), default=0.0)
        if ax.get_ylim()[1] > 2 * top > 0:  # an explosion would flatten all others: show where it leaves
            lowest = ax.get_ylim()[0] if np.nanmin(self.losses) < 0 else 0.0
            ax.set_ylim(lowest, 1.5 * top)
        plots.count_on_x(ax, plots.STEPS)
        ax.set_ylabel("training loss (smoothed)")
        ax.legend(title="learning rate")
        return ax

    def __str__(self) -> str:
        n, steps = self.losses.shape
        return (f"{n} learning rates, {steps} weight update{'s' * (steps > 1)} each from the same weights and batches\n"
                f"{self.rows}\n{self.verdict}")

    __repr__ = __str__


def race(learn: "Trainer", lrs: Iterable[Any], steps: int = 100, *, schedule: Scheduler | None = None,
         callbacks: Iterable[Callback] = ()) -> Race:
    """Train shortly with each of `lrs`, from the same weights on the same batches, and say which wins.

    lrs: two or more candidates, each in a form of a learning rate: float, slice(hi), slice(lo, hi), or one value per
    layer group. steps: weight updates of each, >= 1, over as many passes as that takes. schedule: None for a constant
    rate, or one without a peak of its own, such as OneCycle(), over these steps. callbacks: as in `lr_find`, only those
    with `in_lr_find = True` run, of these and of the learner's; they hear of one epoch.

    Each candidate sees the same random numbers too, and is validated once at the end (of several sets, on the first).
    All of it is undone, however it ends, as `learn.sandbox` does. Costs len(lrs) * steps + 10 weight updates (10 show
    the starting loss), a copy of model and optimizer state in memory, and no file.

    The winner has the lowest mean training loss over the last quarter of the steps. Since the batches are the same, its
    margin is compared with the standard error of the differences step by step, raised for differences that hang
    together (lag-1 autocorrelation): it has to exceed 2 of these against every other candidate, and no candidate may
    have a validation loss that is lower by as much (the differences are then those of the batches; a single one says
    nothing). Otherwise there is no clear winner. That noise is of this start and these batches: another order of the
    data can decide otherwise. A candidate has diverged if a loss is not finite, or the mean over a quarter of the steps
    exceeds 4 times the loss of the starting weights.

    Raises ValueError for fewer than 2 candidates, two that are the same, steps < 1, or one-pass data.

    >>> from minifast import Learner
    >>> data = [(torch.eye(4), torch.ones(4, 1))] * 5
    >>> model = torch.nn.Linear(4, 1)
    >>> learn = Learner(model, (data, None), torch.nn.MSELoss(), opt_func=torch.optim.SGD, verbose=False)
    >>> race(learn, [1e-3, 1e-1, 1e3], steps=20).winner
    0.1
    """
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
    start = _run(learn, STANDSTILL, min(steps, START_STEPS), [], running, "race", validates=False)
    runs = [_run(learn, lr, steps, [schedule] if schedule else [], running, f"race {k + 1}/{len(candidates)}")
            for k, lr in enumerate(candidates)]
    return _judge(candidates, runs, _level(start))


class _Watch(Callback):
    """Keeps the training loss of each step and the validation loss of each batch."""

    order = Order.RECORD
    owns = FiniteLoss.owns  # in its place: a candidate that explodes has lost, and is no error
    in_lr_find = True

    def __init__(self) -> None:
        self.losses, self.valid_losses = ScalarColumn(), ScalarColumn()
        self.valid_loss: float | None = None

    def after_step(self, state: State) -> None:
        self.losses.append(state.step_loss)

    def after_valid_batch(self, state: State) -> None:
        self.valid_losses.append(state.loss)

    def after_epoch(self, state: State) -> None:
        self.valid_loss = state.metrics.get("valid_loss")


class _Passes:
    """One pass over `loader` after another, as one pass without end."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._loader = loader
        self._open: list[Generator[Batch, None, None]] = []

    def __iter__(self) -> Generator[Batch, None, None]:
        while True:
            batches = feed(self._loader, torch.device("cpu"), None, DeferredInterrupt(), "the training data")
            self._open = [batches]
            is_empty = True
            for batch in batches:
                is_empty = False
                yield batch
            if is_empty:  # or this would never end
                return

    def close(self) -> None:
        """End the worker processes of the pass that was left in the middle."""
        for batches in self._open:
            batches.close()


def _run(learn: "Trainer", lr: Any, steps: int, schedule: list[Scheduler], running: list[Callback],
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
    return watch


def _check_candidates(learn: "Trainer", lrs: Any) -> tuple[Any, ...]:
    candidates = tuple(check_items("lrs", lrs, "a list of learning rates", example="race([1e-3, 3e-3, 1e-2])"))
    if len(candidates) < 2:
        raise ValueError(f"lrs must hold at least 2 learning rates, got {len(candidates)}. "
                         "Pass e.g. race([1e-3, 3e-3, 1e-2]).")
    spread = [spread_lrs(lr, learn.groups.names, f"lrs[{i}]") for i, lr in enumerate(candidates)]
    for i, values in enumerate(spread):
        first = spread.index(values)
        if first < i:
            raise ValueError(f"lrs[{first}] and lrs[{i}] are the same learning rate, {name_of(candidates[i])}. "
                             "Leave one of them out.")
    return candidates


def name_of(lr: Any) -> str:
    """A learning rate in any form, as people write it.

    >>> name_of(3e-3), name_of(slice(1e-5, 1e-3)), name_of([1e-3, 1e-2])
    ('0.003', 'slice(1e-05, 0.001)', '[0.001, 0.01]')
    """
    if isinstance(lr, slice):
        return f"slice({lr.stop:.4g})" if lr.start is None else f"slice({lr.start:.4g}, {lr.stop:.4g})"
    if np.ndim(lr):
        return f"[{', '.join(f'{value:.4g}' for value in lr)}]"
    return f"{lr:.4g}"


def _judge(lrs: tuple[Any, ...], runs: Sequence[_Watch], start: float) -> Race:
    n_steps = min(len(run.losses) for run in runs)  # a callback may end a fit early
    if n_steps == 0:
        raise RuntimeError("a callback ended a fit before its first weight update: there is nothing to compare.")
    losses = np.array([run.losses.read()[:n_steps] for run in runs])
    tails = losses[:, -max(1, n_steps // 4):]
    with np.errstate(all="ignore"):
        means = tails.mean(axis=1)
        worst = np.max([part.mean(axis=1) for part in np.array_split(losses, min(4, n_steps), axis=1)], axis=0)
        diverged = ~(np.isfinite(losses).all(axis=1) & (worst <= MAX_RISE * start))
    ranking = sorted((k for k in range(len(lrs)) if not diverged[k]), key=lambda k: means[k])
    best = ranking[0] if ranking else None
    noises = [0.0 if k == best else _noise(tails[k] - tails[best]) if k in ranking else math.nan
              for k in range(len(lrs))]
    winner, verdict = _decide(lrs, runs, means, noises, ranking, tails.shape[1], start)
    rows = Table()
    for k, (lr, run) in enumerate(zip(lrs, runs, strict=True)):
        result = "wins" if k == winner else "diverged" if diverged[k] else ""
        valid = {} if run.valid_loss is None else {"valid_loss": run.valid_loss}
        behind = math.nan if best is None else float(means[k] - means[best])
        rows.append({"lr": name_of(lr), "train_loss": float(means[k])} | valid
                    | {"behind": behind, "noise": noises[k], "result": result})
    return Race(lrs, losses, rows, None if winner is None else lrs[winner], verdict)


def _level(start: _Watch) -> float:
    losses = np.abs(start.losses.read())
    return float(losses.mean()) if len(losses) else math.nan


def _decide(lrs: tuple[Any, ...], runs: Sequence[_Watch], means: Column, noises: Sequence[float],
            ranking: Sequence[int], n_compared: int, start: float) -> tuple[int | None, str]:
    """The number of the winner, or None; and the verdict in words."""
    if not math.isfinite(start):
        return None, f"no winner: the loss of the starting weights is {start}; look at data, model and loss"
    if not ranking:
        return None, "no winner: all of them diverged; try smaller learning rates"
    best, *others = ranking
    name, unclear = name_of(lrs[best]), "no clear winner: "
    if others and n_compared < MIN_COMPARED:
        return None, (f"{unclear}{n_compared} step{'s' * (n_compared > 1)} in the last quarter cannot tell a margin "
                      f"from noise; take steps={4 * MIN_COMPARED} or more")
    if others and np.ptp(means[ranking]) <= 1e-9 * abs(means[best]):
        return None, f"{unclear}flat: the training loss is {means[best]:.4g} with each of them; does the model learn?"
    for k in others:
        behind = float(means[k] - means[best])
        if not behind > STANDARD_ERRORS * noises[k]:
            return None, (f"{unclear}{name} has the lowest training loss, but {name_of(lrs[k])} is behind by only "
                          f"{behind:.2g}, with a noise of {noises[k]:.2g}; take either, or more steps")
    for k in others:
        ahead = runs[best].valid_losses.read() - runs[k].valid_losses.read()  # > 0: k has the lower one
        if len(ahead) and not ahead.mean() <= STANDARD_ERRORS * _noise(ahead):
            return None, (f"{unclear}{name} has the lowest training loss, but {name_of(lrs[k])} a validation loss of "
                          f"{runs[k].valid_loss:.4g} against {runs[best].valid_loss:.4g}; take more steps")
    gone = len(lrs) - len(ranking)
    peaks = [last_lr(lr) for lr in lrs]
    hint = ("; it is the highest: a higher one may do better" if peaks[best] == max(peaks) else
            "; it is the lowest: a lower one may do better" if peaks[best] == min(peaks) else "")
    if not others:
        return best, f"{name} wins: {'the other' if gone == 1 else f'all {gone} others'} diverged{hint}"
    second = others[0]
    return best, (f"{name} wins: the next, {name_of(lrs[second])}, is behind by {means[second] - means[best]:.2g} in "
                  f"training loss, with a noise of {noises[second]:.2g}{hint}")


def _noise(differences: Column) -> float:
    """The standard error of the mean of `differences`, (n,): of n independent ones, more if neighbours are alike.

    inf for a single difference, of which there is no telling.
    """
    n = len(differences)
    if n < 2:
        return math.inf
    with np.errstate(all="ignore"):
        centred = differences - differences.mean()
        power = float(centred @ centred)
        alike = float(centred[1:] @ centred[:-1]) / power if power else 0.0
        alike = min(max(alike, 0.0), 1 - 1 / n)
        return math.sqrt(power / (n - 1) / n * (1 + alike) / (1 - alike))
