"""The record of one fit: everything a callback may read or change.

`State` and `Callback` know each other, on purpose: the one circle between files of minifast. A fit holds its callbacks,
and its state is the only argument of theirs. This file imports `callback` for annotations alone.
"""
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.batch import Batch, UnpackBatch
from ..base.losses import Weight
from ..data.waiting import Waiting
from ..machine.signals import DeferredInterrupt
from ..record.record import FitRecord
from .window import Window

if TYPE_CHECKING:
    from .callback import Callback

log = logging.getLogger("minifast")


@dataclass
class Entry:
    """Where a resumed fit enters its first epoch."""

    n_done: int  # batches of the epoch that are behind
    iterator: Iterator[Batch] | None = None  # the rest of the pass; None: a new pass
    limit: int | None = None  # the epoch ends before batch `limit`; None: with its loader
    is_cut: bool = False  # the rest of the epoch is left out
    window: Mapping[str, Any] | None = None  # the gradients that were gathered, if a window was open


@dataclass(slots=True)
class Source:
    """The passes of one fit over its training data; `passes.training_pass` reads and writes it."""

    limit: int | None = None  # batches per epoch at most; None: all that the loader has
    waiting: Waiting = field(default_factory=Waiting)  # how long training waited for its batches so far
    newest: Batch = None  # the newest training batch as its loader gave it: what a checkpoint compares
    entry: Entry | None = None  # where a resumed fit enters its first epoch; the pass takes it

    def take_entry(self) -> Entry:
        """Where the pass that begins now enters its epoch: at its start, but in the first epoch of a resumed fit."""
        entry, self.entry = self.entry or Entry(0, limit=self.limit), None
        return entry

    def note(self, batch: Batch) -> None:
        self.newest = batch


@dataclass(slots=True, repr=False)  # a repr of fields that are not set yet would be an error
class State:
    """What one fit reads and changes; the only argument of every event, dropped when the fit ends.

    The first block is set before `before_fit` and holds for the whole fit. The fields without a value are written by
    the loop as it goes: reading one too early is an AttributeError. What a callback wants to remember, it keeps itself.
    """

    model: nn.Module
    forward: Callable[..., Any]  # called with the inputs: the model, or it compiled; `before_fit` may wrap it
    loss_func: Callable[[Any, Any], Any]  # (output, target) -> mean loss, or (sum, count); `before_fit` may wrap it
    gradient: Callable[..., None]  # (state, emit, window): forward, loss, backward; `before_fit` may wrap it
    opt: Optimizer
    update: Callable[[], None]  # one weight update: what `opt.step()` does, in less time where that is possible
    device: torch.device
    unpack: UnpackBatch  # batch -> (inputs, target)
    group_names: tuple[str, ...]  # of the layer groups, first layers first
    lrs: tuple[float, ...]  # peak learning rate of each layer group; a schedule with peaks of its own replaces them
    n_epochs: int | None  # None: until a callback ends the fit
    steps_per_epoch: int | None  # weight updates per epoch; None where only the finder trains on an unsized loader
    n_steps: int  # weight updates in the whole fit: the length of its schedules
    train_dl: Iterable[Batch]
    valid_sets: Sequence[tuple[str, Iterable[Batch]]]  # (name, loader) of each; a single one has the name ""
    callbacks: Sequence["Callback"]
    record: FitRecord  # its rows end with the newest step of this fit
    weight_decays: tuple[float, ...] = ()  # of each of the optimizer's param_groups, as the fit began
    accumulate: int = 1  # micro-batches per weight update
    n_batches: int | None = None  # micro-batches per epoch, as far as that is known
    norms_in_eval: tuple[nn.Module, ...] = ()  # frozen norm layers that do not train
    source: Source = field(default_factory=Source)  # how far the fit has come in a pass over `train_dl`
    interrupt: DeferredInterrupt = field(default_factory=DeferredInterrupt)
    say: Callable[[str], None] = log.info  # shows a person one line of text, unless the fit is to be silent
    lr_scale: float = 1.0  # multiplies every scheduled learning rate: lowered by callbacks that watch for a plateau
    elapsed: int | None = None  # the step that schedules use in a fit that is limited in time; written by TimeLimit
    is_ending: bool = False  # set it to end the fit after this batch, with validation (CancelFit: without)

    epoch: int = 0  # 0-based; a resumed fit begins with a later one
    step: int = 0  # weight updates done, over the whole fit; rises right after `after_step`
    batch_index: int = -1  # 0-based number of the batch in its epoch, in training and in validation
    window: Window = field(init=False)  # the gradients of the update under way
    batch: Batch = field(init=False)  # on the device; `before_batch` may replace it
    valid_set: str = field(init=False)  # the name of the validation set that is looked at
    n_samples: int = field(init=False)  # samples in the newest batch
    target: Any = field(init=False)  # of the newest batch; None if it has none
    pred: Any = field(init=False)  # the model's output for the newest batch
    loss: Tensor = field(init=False)  # () mean loss of the newest batch
    loss_weight: Weight = field(init=False)  # what `loss` is the mean over: its samples, or what loss_func counted
    step_loss: Tensor = field(init=False)  # () mean loss over all samples of the newest update, without graph
    step_weight: Weight = field(init=False)  # what `step_loss` is the mean over
    metrics: dict[str, Any] = field(init=False)  # the newest epoch row; complete in `after_validate`, but for "time"

    @property
    def schedule_step(self) -> int:
        """The step that schedules use, 0 .. n_steps - 1: `step`, or what a limit in time makes of it."""
        step = self.step if self.elapsed is None else self.elapsed
        return min(step, self.n_steps - 1)  # a loader may yield more than its len()

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs, from `epoch` on, until the fit is to end. Raises if a signal came."""
        for epoch in count(self.epoch) if self.n_epochs is None else range(self.epoch, self.n_epochs):
            self.interrupt.check()
            yield epoch
            if self.is_ending:
                break

    def ends(self) -> bool:
        """Whether the fit is to end after this batch. Raises if a signal came."""
        self.interrupt.check()
        return self.is_ending
