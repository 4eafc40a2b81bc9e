"""What can be seen to be wrong with the data before, or at, the first batch."""
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..base.batch import Batch, n_samples
from ..base.losses import ignored_label, is_cross_entropy, is_loss
from ..base.nest import describe
from ..data.loader import is_one_shot, n_batches, smallest_batch
from ..data.tensor_loader import TensorLoader
from ..errors import quoted

ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
ELEMENTWISE_FUNCTIONS = (nn.functional.mse_loss, nn.functional.l1_loss, nn.functional.smooth_l1_loss,
                         nn.functional.huber_loss)


def check_loader(loader: Iterable[Batch], n_epochs: int, modules: Iterable[nn.Module],
                 steps_per_epoch: int | None = None) -> None:
    """Raise ValueError if `loader` cannot feed `n_epochs` epochs in which `modules` are trained."""
    if is_one_shot(loader) and n_epochs > 1:
        raise ValueError(f"the training data is an iterator ({type(loader).__name__}), good for one pass, but "
                         f"{n_epochs} epochs are asked for. Pass a DataLoader, a list, or an object whose __iter__ "
                         "starts a new pass.")
    if n_batches(loader) == 0:
        raise ValueError(f"the training data yields 0 batches: {_sizes(loader)}, drop_last="
                         f"{getattr(loader, 'drop_last', False)}. Lower batch_size or set drop_last=False.")
    reaches_the_last = steps_per_epoch is None  # a shortened epoch may end before it: then torch has the last word
    if reaches_the_last and any(isinstance(module, _BatchNorm) for module in modules) and smallest_batch(loader) == 1:
        which, given, remedy = "the last", f" ({_sizes(loader)})", "Set drop_last=True or another batch_size"
        if isinstance(loader, Sequence):
            which = "the last" if n_samples(None, loader[-1]) == 1 else "a"
            given, remedy = "", "Leave it out, or put it together with another"
        raise ValueError(f"{which} training batch has 1 sample{given}, and the model's BatchNorm cannot take "
                         f"statistics of one. {remedy}.")


def _sizes(loader: Iterable[Batch]) -> str:
    n = n_items(loader)
    return ("" if n is None else f"{n} samples, ") + f"batch_size {getattr(loader, 'batch_size', None)}"


def check_valid(loader: Iterable[Batch] | None) -> None:
    """Raise ValueError if there is validation data, but no batch of it."""
    if loader is not None and n_batches(loader) == 0:
        raise ValueError("the validation data yields 0 batches. Pass DataLoaders(train) to train without.")


def check_optimizer(model: nn.Module, opt: Optimizer, grouped: Iterable[nn.Parameter]) -> None:
    """Raise ValueError if `opt`, or the layer groups with their parameters `grouped`, are not of `model`."""
    own = {id(p) for p in model.parameters()}
    if own != {id(p) for p in grouped}:
        raise ValueError("learn.model is not the model that this Learner was made for: its layer groups and its "
                         "optimizer hold the parameters of another. Make a new Learner for a new model.")
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    if own != held:
        raise ValueError(f"learn.opt and learn.model do not belong together: {len(own - held)} parameters of the "
                         f"model are not in the optimizer, {len(held - own)} of the optimizer not in the model. "
                         "Make a new Learner for a new model.")


def check_trainable(model: nn.Module, group_names: Sequence[str]) -> None:
    """Raise ValueError if there is nothing to train."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"there is no trainable parameter: all {len(group_names)} layer groups "
                         f"({', '.join(group_names)}) are frozen. Call unfreeze() or freeze_to(n).")


def check_target(pred: Any, target: Any, loss_func: Any) -> None:
    """Raise ValueError where a loss of torch's would be silently wrong, or fail far from the cause."""
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        return
    if is_loss(loss_func, ELEMENTWISE, *ELEMENTWISE_FUNCTIONS) and pred.shape != target.shape:
        raise ValueError(f"the model's output {tuple(pred.shape)} and the target {tuple(target.shape)} would be "
                         "broadcast against each other by the loss. Give both one shape, e.g. by "
                         "target.unsqueeze(1) or output.squeeze(1).")
    if not is_cross_entropy(loss_func) or pred.ndim < 2 or target.shape == pred.shape:
        return
    shape = (pred.shape[0], *pred.shape[2:])
    if target.shape != shape:
        one_column = target.shape == (shape[0], 1)
        hint = "Call target.squeeze(1)" if one_column else "Classes are dimension 1 of the output"
        raise ValueError(f"labels must have shape {shape} for outputs of shape {tuple(pred.shape)}, got "
                         f"{tuple(target.shape)}. {hint}.")
    if target.dtype not in (torch.int64, torch.uint8):
        raise ValueError(f"labels must be int64 class indices, got {describe(target)}. Call target.long().")
    labels = target[target != ignored_label(loss_func)]
    if labels.numel() and not (labels.min() >= 0 and labels.max() < pred.shape[1]):
        raise ValueError(f"labels must be 0..{pred.shape[1] - 1} for the model's {pred.shape[1]} outputs, got "
                         f"{int(labels.min())}..{int(labels.max())}. Give the model one output per class, or number "
                         "the labels from 0.")


def check_loss(loss: Any) -> None:
    """Raise ValueError or TypeError if `loss` cannot be trained on."""
    wanted = "loss_func must return a scalar tensor with grad, got"
    if not isinstance(loss, Tensor):
        hint = " A sum and its count are a tuple: return (sum, count)." if isinstance(loss, list) else ""
        raise TypeError(f"{wanted} {quoted(loss)}.{hint}")
    if loss.ndim:
        raise ValueError(f"{wanted} {describe(loss)}. Did you leave reduction='none'?")
    if not loss.requires_grad:
        raise ValueError(f"{wanted} {describe(loss)} without. Was the model's output detached, or does the loss go "
                         "through .item(), .argmax() or integers?")


def check_passes(what: str, n_seen: int, n_expected: int | None = None) -> None:
    """Raise ValueError after a pass without a batch; warn after one with another number than was announced."""
    if n_seen == 0:
        raise ValueError(f"the {what} data yielded 0 batches. Is it empty, or was its iterator used up before?")
    if n_expected not in (None, n_seen):
        warnings.warn(f"the {what} data yielded {n_seen} batches, but {n_expected} were announced (len() or "
                      "steps_per_epoch): the schedule is off by that.", stacklevel=2)


def n_items(loader: Any) -> int | None:
    """How many samples a loader has, as far as that can be told without drawing one."""
    if isinstance(loader, TensorLoader):
        return loader.n_samples
    for owner in (getattr(loader, "sampler", None), getattr(loader, "dataset", None), getattr(loader, "tensors", None)):
        try:
            return len(owner[0]) if isinstance(owner, tuple) else len(owner)  # type: ignore[arg-type]
        except TypeError:
            continue
    return None
