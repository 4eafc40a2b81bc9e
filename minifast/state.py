"""The record of one fit: everything a callback may read or change."""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .batches import Batch, UnpackBatch
from .signals import DeferredInterrupt

if TYPE_CHECKING:
    from .callback import Callback
    from .recorder import Recorder


@dataclass(slots=True, repr=False)  # a repr of fields that are not set yet would be an error
class State:
    """What one fit reads and changes; the only argument of every event, dropped when the fit ends.

    The first block is set before `before_fit` and holds for the whole fit. The fields without a value are written by
    the loop as it goes: reading one too early is an AttributeError. There are no others: what a callback wants to
    remember is kept by the callback.
    """

    model: nn.Module
    loss_func: Callable[[Any, Any], Tensor]
    opt: Optimizer
    device: torch.device
    unpack: UnpackBatch  # batch -> (inputs, target)
    group_names: tuple[str, ...]  # of the layer groups, first layers first
    lrs: tuple[float, ...]  # peak learning rate of each layer group; a schedule with peaks of its own replaces them
    n_epochs: int
    steps_per_epoch: int | None  # weight updates per epoch; None where only the finder trains on an unsized loader
    n_steps: int  # weight updates in the whole fit: the length of its schedules
    train_dl: Iterable[Batch]
    valid_dl: Iterable[Batch] | None
    callbacks: Sequence["Callback"]
    recorder: "Recorder"  # its rows end with the newest step of this fit
    accumulate: int = 1  # micro-batches per weight update
    n_batches: int | None = None  # micro-batches per epoch, as far as that is known
    max_batches: int | None = None  # micro-batches per epoch at most; None: all that the loader has
    norms_in_eval: tuple[nn.Module, ...] = ()  # frozen norm layers that do not train
    weight_decays: tuple[float, ...] = ()  # of each of the optimizer's param_groups, as the fit began
    interrupt: DeferredInterrupt = field(default_factory=DeferredInterrupt)
    lr_scale: float = 1.0  # multiplies every scheduled learning rate: lowered by callbacks that watch for a plateau

    epoch: int = 0  # 0-based
    step: int = 0  # weight updates done, over the whole fit; rises right after `after_step`
    batch_index: int = 0  # 0-based number of the batch in its epoch, in training and in validation
    batch: Batch = field(init=False)  # on the device; `before_batch` may replace it
    n_samples: int = field(init=False)  # samples in the newest batch
    target: Any = field(init=False)  # of the newest batch; None if it has none
    pred: Any = field(init=False)  # the model's output for the newest batch
    loss: Tensor = field(init=False)  # () mean loss of the newest batch
    step_loss: Tensor = field(init=False)  # () mean loss over all samples of the newest update, without graph
    step_samples: int = field(init=False)  # samples in the newest update
    metrics: dict[str, Any] = field(init=False)  # the newest epoch row; complete in `after_validate`, but for "time"
