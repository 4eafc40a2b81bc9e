"""Predictions over a whole loader."""
import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..base.batch import Batch, UnpackBatch, call_model, n_samples, scores
from ..base.losses import mean_and_weight
from ..base.nest import describe, join, map_tensors, to_device


@torch.no_grad()
def predict_all(model: Callable[..., Any], batches: Iterable[Batch], unpack: UnpackBatch,
                loss_func: Any = None) -> tuple[Any, ...]:
    """(outputs, targets) of all batches, each concatenated on the CPU; with `loss_func` also the loss of each sample.

    The outputs are the `.logits` of those that have them. Raises ValueError if there is no batch.
    """
    columns: list[list[Any]] = [[], [], []]
    sizes: list[int] = []
    for batch in batches:
        inputs, target = unpack(batch)
        output = call_model(model, inputs)
        sizes.append(n_samples(target, inputs))
        columns[0].append(to_device(scores(output), "cpu"))
        columns[1].append(to_device(target, "cpu"))
        if loss_func is not None:
            columns[2].append(sample_losses(loss_func, output, target).cpu())
    if not columns[0]:
        raise ValueError("there is nothing to predict: the data yielded 0 batches.")
    return tuple(concatenate(column, sizes) for column in columns[:2 if loss_func is None else 3])


def concatenate(parts: list[Any], sizes: list[int]) -> Any:
    """Batches of `sizes` samples of a nest of tensors as one, concatenated along the first dimension.

    Along the second where that is the one of the samples, as in the hidden state of a recurrent net, (layers, n, k).
    """
    return join(lambda leaves: _cat(leaves, sizes), parts)


def sample_losses(loss_func: Any, pred: Any, target: Any) -> Tensor:
    """The loss of each sample of a batch, (n,).

    A loss that takes the mean by its `reduction` is called without it; any other is called sample by sample.
    """
    n, losses, ignored = n_samples(target, pred), None, getattr(loss_func, "ignore_index", None)
    parameters = inspect.signature(loss_func).parameters if inspect.isfunction(loss_func) else {}
    if getattr(loss_func, "reduction", None) == "mean":
        unreduced = copy.copy(loss_func)
        unreduced.reduction = "none"
        losses = unreduced(pred, target)
    elif "reduction" in parameters:
        losses = loss_func(pred, target, reduction="none")
        ignored = parameters["ignore_index"].default if "ignore_index" in parameters else None
    if isinstance(losses, Tensor) and losses.ndim and losses.shape[0] == n:
        if ignored is not None and losses.shape == target.shape and not target.is_floating_point():
            counted = (target != ignored).reshape(n, -1).sum(1).clamp(min=1)  # the mean over what is not ignored
            return torch.div(losses.reshape(n, -1).sum(1), counted)
        return losses.reshape(n, -1).mean(1)
    singly = [mean_and_weight(loss_func(sample_of(pred, i), sample_of(target, i)), 1)[0] for i in range(n)]
    return torch.stack([loss.reshape(()) for loss in singly])


def sample_of(nest: Any, i: int) -> Any:
    """Sample `i` of a batch, as a batch of one."""
    return map_tensors(lambda tensor: tensor[i:i + 1] if tensor.ndim else tensor, nest)


def _cat(leaves: list[Any], sizes: list[int]) -> Any:
    if not isinstance(leaves[0], Tensor):
        return None if leaves[0] is None else leaves
    if (any(leaf.ndim > 1 and len(leaf) != n for leaf, n in zip(leaves, sizes, strict=True))
            and all(leaf.ndim > 1 and leaf.shape[1] == n for leaf, n in zip(leaves, sizes, strict=True))
            and len({(len(leaf), *leaf.shape[2:]) for leaf in leaves}) == 1):
        return torch.cat(leaves, 1)
    parts = [torch.atleast_1d(leaf) for leaf in leaves]
    odd = next((part for part in parts if part.shape[1:] != parts[0].shape[1:]), None)
    if odd is not None:
        raise ValueError(f"the batches do not fit together: {describe(parts[0])} and {describe(odd)} differ beyond the "
                         "first dimension. Pad all of them to one size, or call predict batch by batch.")
    return torch.cat(parts)
