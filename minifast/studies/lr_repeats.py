"""The learning-rate finder several times over: a median curve, a band, and whether the runs agree."""
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch

from ..base import snapshot
from ..core.callback import Callback
from ..core.ownership import check_callbacks
from ..data.loader import generators, valid_sets
from ..errors import check_int
from ..finder.finder import LRFinder
from ..finder.result import ALL_TRIED, CUT_SHORT, LRFind, suggested
from ..finder.verdict import NOISY, OK, judge
from ..optim.rates import LR
from ..show.screen import say
from ..standard.progress import Progress
from ..suggest import Curve
from ..training.trainer import Trainer

# The runs disagree if their suggestions differ by more: beyond a decade one run's peak is another's end of the descent.
# Three runs of a convnet on the digits (tests/benchmarks/finder.py, 20 seeds) differ by a factor of 2 in the median,
# with AdamW in 2 of 20 by more than 10: there the loss falls in two stages, and "valley" takes one or the other.
MAX_FACTOR = 10.0


def find_repeatedly(learn: Trainer, start_lr: LR = 1e-7, end_lr: LR = 10.0, num_it: int = 100, *, repeats: int = 3,
                    stop_div: bool = True, callbacks: Iterable[Callback] = ()) -> LRFind:
    """See `Learner.lr_find`, of which this is `repeats > 1`."""
    repeats = check_int("repeats", repeats, example="lr_find(repeats=3)")
    callbacks, verbose = check_callbacks(callbacks, "callbacks"), learn.verbose
    runs: list[LRFind] = []
    with learn.sandbox():
        learn.verbose = False  # a bar for each run, but one report
        loaders = (learn.dls.train, *(loader for _, loader in valid_sets(learn.dls.valid)))
        own = [generator for loader in loaders for generator in generators(loader)]
        for k in range(repeats):
            if k == 1:  # not before: the first run is to see the random numbers that a single one would
                seeds = [int(torch.randint(2**32, ())) for _ in range(repeats)]
            if k:
                _reseed(seeds[k], own)
            shown = [Progress(f"lr_find {k + 1}/{repeats}")] if verbose else []
            learn.fit(learn.lr, callbacks=[LRFinder(start_lr, end_lr, num_it, stop_div=stop_div), *callbacks, *shown])
            runs.append(cast(LRFind, learn.recorder.lr_find))
    found = median_of(runs)
    learn.recorder.lr_find = found
    if verbose:
        say(str(found))
    return found


def median_of(runs: Sequence[LRFind]) -> LRFind:
    """The result of several runs over the same learning rates; see `LRFind` for how they are put together."""
    if len(runs) == 1:
        return runs[0]
    reached = sorted((len(run.lrs) for run in runs), reverse=True)
    n = reached[len(runs) // 2]  # more than half of the runs got that far
    lrs = max((run.lrs for run in runs), key=len)[:n]
    losses, smooth = (_median([getattr(run, name) for run in runs], n) for name in ("losses", "smooth_losses"))
    curves = _stack([run.smooth_losses for run in runs], n)
    num_it, ends = runs[0].num_it, Counter(run.stopped for run in runs)
    stopped = ", ".join(why if k == len(runs) else f"{why} ({k} of {len(runs)} runs)" for why, k in ends.items())
    exploded = CUT_SHORT not in ends and (n < num_it or ALL_TRIED not in ends)
    verdict, reason = judge(lrs, losses, smooth, num_it, stopped, exploded)
    if verdict in (OK, NOISY) and (disagreement := _disagreement(runs)):
        verdict, reason = NOISY, disagreement
    found = suggested(lrs, smooth, num_it, verdict)
    return LRFind(lrs, losses, smooth, found, found.get("valley"), stopped, reason, num_it, runs[0].pass_length,
                  verdict, tuple(runs), (np.fmin.reduce(curves), np.fmax.reduce(curves)))


def _disagreement(runs: Sequence[LRFind]) -> str:
    """In which way the runs give no common answer; '' if they do."""
    lrs = [run.suggestion for run in runs if run.suggestion is not None]
    if len(lrs) < len(runs):
        silent = next(run for run in runs if run.suggestion is None)
        return f"{len(runs) - len(lrs)} of {len(runs)} runs give no learning rate: {silent.reason}"
    if max(lrs) > MAX_FACTOR * min(lrs):
        return (f"the runs suggest {min(lrs):.1e} to {max(lrs):.1e}, a factor of {max(lrs) / min(lrs):.0f}, more than "
                f"{MAX_FACTOR:.0f}; try larger batches, or learn.race([{min(lrs):.0e}, ..., {max(lrs):.0e}])")
    return ""


def _stack(columns: Sequence[Curve], n: int) -> Curve:
    """The first `n` values of each, (runs, n), nan where a run had stopped."""
    return np.array([np.append(column, np.full(max(0, n - len(column)), np.nan))[:n] for column in columns])


def _median(columns: Sequence[Curve], n: int) -> Curve:
    """A run that had stopped, and what is not a number, count as if they lay above all others."""
    values = _stack(columns, n)
    with np.errstate(invalid="ignore"):
        median: Curve = np.median(np.where(np.isnan(values), np.inf, values), axis=0)
    return median


def _reseed(seed: int, own: Iterable[Any]) -> None:
    """Seed all global random generators, and `own` ones, whatever their kind."""
    snapshot.seed_all(seed)
    for generator in own:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        else:  # of numpy's old kind, or Python's
            generator.seed(seed)
