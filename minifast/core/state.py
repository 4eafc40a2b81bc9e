"""The record of one fit: everything a callback may read or change."""
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.batch import Batch, UnpackBatch
from ..base.losses import Weight
from ..data.waiting import Waiting
from ..machine.signals import DeferredInterrupt

if TYPE_CHECKING:
    from ..standard.finite import FiniteLoss
    from ..standard.recorder import Recorder
    from .callback import Callback
    from .emitter import Emitter
    from .window import Window


class Best(NamedTuple):
    """The epoch that a callback holds for the best one so far."""

    monitor: str  # the column of the epoch table
    value: float
    epoch: int  # 0-based


@dataclass
class Entry:
    """Where a resumed fit enters its first epoch."""

    n_done: int  # batches of the epoch that are behind
    iterator: Iterator[Batch] | None = None  # the rest of the pass; None: a new pass
    limit: int | None = None  # the epoch ends before batch `limit`; None: with its loader
    is_cut: bool = False  # the rest of the epoch is left out
    window: Mapping[str, Any] | None = None  # the gradients that were gathered, if a window was open


def begin_anew(state: "State") -> None:
    """What `State.take_up` is in a fit that is not resumed: nothing is taken up."""


@dataclass(slots=True, repr=False)  # a repr of fields that are not set yet would be an error
class State:
    """What one fit reads and changes; the only argument of every event, dropped when the fit ends.

    The first block is set before `before_fit` and holds for the whole fit. The fields without a value are written by
    the loop as it goes: reading one too early is an AttributeError. There are no others: what a callback wants to
    remember is kept by the callback.
    """

    model: nn.Module
    forward: Callable[..., Any]  # called with the inputs: the model, or it compiled; `before_fit` may wrap it
    loss_func: Callable[[Any, Any], Any]  # (output, target) -> mean loss, or (sum, count); `before_fit` may wrap it
    gradient: Callable[["State", "Emitter", "Window"], None]  # forward, loss, backward; `before_fit` may wrap it
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
    recorder: "Recorder"  # its rows end with the newest step of this fit
    accumulate: int = 1  # micro-batches per weight update
    n_batches: int | None = None  # micro-batches per epoch, as far as that is known
    max_batches: int | None = None  # micro-batches per epoch at most; None: all that the loader has
    norms_in_eval: tuple[nn.Module, ...] = ()  # frozen norm layers that do not train
    weight_decays: tuple[float, ...] = ()  # of each of the optimizer's param_groups, as the fit began
    interrupt: DeferredInterrupt = field(default_factory=DeferredInterrupt)
    waiting: Waiting = field(default_factory=Waiting)  # how long training waited for its batches so far
    metric_names: tuple[str, ...] = ()  # keys that every complete epoch row of this fit has
    lr_scale: float = 1.0  # multiplies every scheduled learning rate: lowered by callbacks that watch for a plateau
    schedule_step: int | None = None  # where the schedules are, if that is not at `step`: written by TimeLimit
    loss_scale: Tensor | None = None  # () the gradient that backward begins with, if that is not 1: for fp16
    finite_check: "FiniteLoss | None" = None  # whom clipping and checkpoints ask; None where nobody checks: in lr_find
    is_ending: bool = False  # set it to end the fit after this batch, with validation (CancelFit: without)
    best: Best | None = None  # written by SaveBest after its epoch, read by Checkpoint
    take_up: Callable[["State"], None] = begin_anew  # after `before_fit` of all: puts a resumed fit where it was
    entry: Entry | None = None  # where a resumed fit enters its first epoch; the loop takes it

    epoch: int = 0  # 0-based; a resumed fit begins with a later one
    step: int = 0  # weight updates done, over the whole fit; rises right after `after_step`
    batch_index: int = -1  # 0-based number of the batch in its epoch, in training and in validation
    window: "Window" = field(init=False)  # the gradients of the update under way
    loaded: Batch = field(init=False)  # the newest training batch as its loader gave it
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
    def position(self) -> int:
        """The step that schedules use, 0 .. n_steps - 1: `step`, but for a fit that is limited in time."""
        step = self.step if self.schedule_step is None else self.schedule_step
        return min(step, self.n_steps - 1)  # a loader may yield more than its len()
