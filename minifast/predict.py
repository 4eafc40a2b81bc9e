"""Predictions over a whole loader."""
import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .batches import Batch, UnpackBatch, call_model, n_samples, scores, to_device


@torch.no_grad()
def predict_all(model: Callable[..., Any], batches: Iterable[Batch], unpack: UnpackBatch,
                loss_func: Any = None) -> tuple[Any, ...]:
    """(outputs, targets) of all batches, each concatenated on the CPU; with `loss_func` also the loss of each sample.

    The outputs are the `.logits` of those that have them. Raises ValueError if there is no batch.
    """
    columns: list[list[Any]] = [[], [], []]
    for batch in batches:
        inputs, target = unpack(batch)
        output = call_model(model, inputs)
        columns[0].append(to_device(scores(output), "cpu"))
        columns[1].append(to_device(target, "cpu"))
        if loss_func is not None:
            columns[2].append(sample_losses(loss_func, output, target).cpu())
    if not columns[0]:
        raise ValueError("there is nothing to predict: the data yielded 0 batches.")
    return tuple(concatenate(column) for column in columns[:2 if loss_func is None else 3])


def concatenate(parts: list[Any]) -> Any:
    """Batches of a nest of tensors as one: concatenated along the first dimension."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part.reshape(-1) if part.ndim == 0 else part for part in parts])
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(concatenate(list(column)) for column in zip(*parts, strict=True))
    return None if first is None else parts


def sample_losses(loss_func: Any, pred: Any, target: Any) -> Tensor:
    """The loss of each sample of a batch, (n,).

    A loss with a `reduction` is called without it; any other is called sample by sample.
    """
    n = n_samples(target, pred)
    losses = None
    if isinstance(getattr(loss_func, "reduction", None), str):
        unreduced = copy.copy(loss_func)
        unreduced.reduction = "none"
        losses = unreduced(pred, target)
    elif inspect.isfunction(loss_func) and "reduction" in inspect.signature(loss_func).parameters:
        losses = loss_func(pred, target, reduction="none")
    if isinstance(losses, Tensor) and losses.ndim and losses.shape[0] == n:
        return losses.reshape(n, -1).mean(1)
    return torch.stack([loss_func(pred[i:i + 1], target[i:i + 1]).reshape(()) for i in range(n)])
