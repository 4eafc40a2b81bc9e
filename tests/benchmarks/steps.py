"""What a step costs, beside the loop one would write by hand.

Every row does as many updates of the same kind on the same batches from the same weights. Before anything is timed it
is checked that a Learner makes the very updates of a plain loop.
"""
import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from harness import Goal, Options, Table, interleave, seconds
from workloads import (
    CONVNET,
    DEEP_MLP,
    MLP,
    by_hand,
    by_hand_fused,
    check_same_updates,
    with_learner,
    without_direct_kernels,
)

REFERENCE, FUSED = "by hand: torch's defaults, OneCycleLR", "by hand: fused, float schedule"
DEFAULT, LEAN, INDIRECT = "Learner, default", "Learner, silent", "Learner, default, opt.step()"
TASKS = (MLP, replace(MLP, n_groups=3), DEEP_MLP, CONVNET)


def rows():
    """name -> a function (task, model, batches, device) that trains."""
    return {REFERENCE: by_hand, FUSED: by_hand_fused, DEFAULT: with_learner,
            LEAN: partial(with_learner, verbose=False), INDIRECT: partial(without_direct_kernels, with_learner)}


def goals(task):
    if task.name == CONVNET.name:
        return [Goal(DEFAULT, 1.0)]
    if task.name != MLP.name or task.n_groups > 1:
        return []
    return [Goal(DEFAULT, 0.5), Goal(INDIRECT, 0.72), Goal(DEFAULT, 15, "more", FUSED)]


def check(task, batches, device):
    """That the Learner's rows make the updates of a plain loop, with the same weight decay for all parameters."""
    learners = {name: run for name, run in rows().items() if name in (DEFAULT, LEAN, INDIRECT)}
    check_same_updates(task, {name: lambda model, batches, run=run: run(task, model, batches, device, wd_norm_bias=True)
                              for name, run in learners.items()}, batches, device)


def measure(task, options: Options) -> Table:
    """Microseconds per step of each row."""
    batches, start = task.batches(task.steps(options.steps), options.device), task.make_model().to(options.device)
    check(task, batches[:200 if task.name == MLP.name else 20], options.device)

    def run(row):
        model = copy.deepcopy(start)
        return 1e6 * seconds(lambda: row(task, model, batches, options.device), options.device) / len(batches)

    found = interleave({name: partial(run, row) for name, row in rows().items()}, options)
    return Table(f"{task.title}; {len(batches)} steps", "us per step", found, REFERENCE, goals(task))


def suite(options: Options) -> Iterator[Table]:
    for task in TASKS:
        for opt in ("AdamW", "SGD, momentum"):
            yield measure(replace(task, opt=opt), options)
