"""The weights at the end of every cycle, as an ensemble."""
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..base.batch import Batch
from ..base.losses import is_cross_entropy
from ..base.nest import describe, join, map_tensors
from ..base.snapshot import clone
from ..core.callback import Callback, Order
from ..core.ownership import owner_of
from ..core.state import State
from ..errors import check_flag, check_int
from ..schedules.scheduler import Scheduler
from ..training import fitting
from .averaging import WeightAverage
from .weights import swapped, update_norms, weights

if TYPE_CHECKING:
    from ..training.trainer import Trainer


class Snapshot(NamedTuple):
    """The weights after update `step` (0-based), by their names in the state dict, on the CPU."""

    step: int
    weights: dict[str, Tensor]


@dataclass(eq=False)
class SnapshotEnsemble(Callback):
    """Keeps the weights at the end of every cycle, where the learning rate is lowest, to predict with all of them.

    keep: how many at most, the newest; >= 1, None for all. `snapshots`: (step, weights), oldest first, on the CPU.

    The ends are those that the schedule of the fit names (`Scheduler.cycle_ends`); where steps are skipped, the first
    step past one. A schedule without cycles has one, the last step, or the end of the last epoch if steps were dropped.
    Each fit starts anew. Source: Huang et al. 2017 (arXiv 1704.00109).

        ensemble = SnapshotEnsemble()
        learn.fit(lr, 3, cycle_len=1, use_clr=(32, 5), callbacks=[ensemble])
        preds, targets = ensemble.get_preds(learn)
        with ensemble.averaged(learn):
            learn.validate()

    >>> SnapshotEnsemble(keep=5)
    SnapshotEnsemble(keep=5)
    """

    keep: int | None = None

    order = Order.RECORD  # sees the weights as all others have left them

    def __post_init__(self) -> None:
        self.keep = None if self.keep is None else check_int("keep", self.keep, example="SnapshotEnsemble(keep=5)")
        self.snapshots: list[Snapshot] = []
        self._n_passed = 0  # ends of cycles that are behind

    def before_fit(self, state: State) -> None:
        self.snapshots, self._n_passed = [], 0
        schedule = owner_of("lr", state.callbacks)
        self._ends = schedule.cycle_ends(state.n_steps) if isinstance(schedule, Scheduler) else (state.n_steps - 1,)

    def after_step(self, state: State) -> None:
        passed = sum(end <= state.schedule_step for end in self._ends[self._n_passed:])
        if passed:
            self._n_passed += passed
            self._take(state, state.step)

    def after_epoch(self, state: State) -> None:
        if state.epoch + 1 == state.n_epochs and self._n_passed < len(self._ends):
            self._n_passed = len(self._ends)
            self._take(state, state.step - 1)

    def _take(self, state: State, step: int) -> None:
        if step >= 0 and (not self.snapshots or self.snapshots[-1].step < step):
            self.snapshots.append(Snapshot(step, _on_cpu(weights(state.model))))
            del self.snapshots[:0 if self.keep is None else -self.keep]

    def state_dict(self) -> dict[str, Any]:
        return {"snapshots": clone([[step, kept] for step, kept in self.snapshots]), "n_passed": self._n_passed}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.snapshots = [Snapshot(step, _on_cpu(kept)) for step, kept in saved["snapshots"]]
        self._n_passed = saved["n_passed"]

    def get_preds(self, learn: "Trainer", dl: Iterable[Batch] | str | None = None, *,
                  activation: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
        """(predictions, targets) as `learn.get_preds(dl)` gives them, from all snapshots together.

        The outputs are averaged; with cross entropy as the loss the probabilities, given as the logarithms of their
        mean, which metrics, loss and softmax read as the model's own logits. activation: averages activation(outputs)
        instead, e.g. of `torch.sigmoid`. One pass over the data for each snapshot; the model is left as it was.
        Raises RuntimeError before the first snapshot, TypeError for outputs that are not floats.
        """
        self._check_any(learn)
        if activation is not None and not callable(activation):
            raise TypeError(f"activation must be a function of the outputs, got {activation!r:.80}.")
        is_classes = activation is None and is_cross_entropy(learn.loss_func)
        add = torch.logaddexp if is_classes else torch.add
        total: Any = None
        for snapshot in self.snapshots:
            with _only(learn, snapshot.weights):
                preds, targets = learn.get_preds(dl)
            preds = map_tensors(_checked, preds if activation is None else activation(preds))
            preds = map_tensors(lambda scores: scores.log_softmax(1), preds) if is_classes else preds
            total = preds if total is None else join(
                lambda leaves: add(*leaves) if isinstance(leaves[0], Tensor) else leaves[0], [total, preds])
        n = len(self.snapshots)
        return map_tensors(lambda tensor: tensor - math.log(n) if is_classes else tensor / n, total), targets

    @contextmanager
    def averaged(self, learn: "Trainer", *, norms: bool = True) -> Iterator[None]:
        """A block in which the learner's model has the mean of the snapshots' weights; then its own again.

        norms: compute the statistics of its BatchNorm layers anew, in one pass over the training data; else they are
        averaged, too. Tensors that are no floats are the newest. Raises RuntimeError before the first snapshot.
        """
        self._check_any(learn)
        norms = check_flag("norms", norms)
        names = self.snapshots[0].weights
        with _only(learn, {name: _mean([snapshot.weights[name] for snapshot in self.snapshots]) for name in names}):
            if norms:
                update_norms(fitting.new_state(learn))
            yield

    def _check_any(self, learn: "Trainer") -> None:
        if not hasattr(learn, "model"):
            raise TypeError(f"learn must be the Learner, got a {type(learn).__name__}: pass learn, not learn.model.")
        if not self.snapshots:
            raise RuntimeError(f"{self!r} has no snapshots: fit with it first, learn.fit(0.01, callbacks=[ensemble]).")


@contextmanager
def _only(learn: "Trainer", values: dict[str, Tensor]) -> Iterator[None]:
    """The weights `values` in the model, and no average that a callback of the Learner would put in their place."""
    callbacks = learn.callbacks
    learn.callbacks = [callback for callback in callbacks if not isinstance(callback, WeightAverage)]
    try:
        with swapped(learn.model, values):
            yield
    finally:
        learn.callbacks = callbacks


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in values.items()}


def _mean(column: list[Tensor]) -> Tensor:
    newest = column[-1]
    if not newest.is_floating_point() and not newest.is_complex():
        return newest
    wide = torch.complex128 if newest.is_complex() else torch.float64
    return sum((tensor.to(wide) for tensor in column[1:]), column[0].to(wide)).div(len(column)).to(newest.dtype)


def _checked(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise TypeError(f"an ensemble averages outputs that are floats, got {describe(tensor)}. Give the scores.")
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
