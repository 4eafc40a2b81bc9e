"""Predictions over a whole loader."""
import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, UnpackBatch, call_model, n_samples, scores


@torch.no_grad()
def predictions(model: nn.Module, batches: Iterable[Batch], unpack: UnpackBatch) -> Iterator[tuple[Any, Any, Any]]:
    """(output, target, inputs) of each batch; the output is the `.logits` of one that has them."""
    for batch in batches:
        inputs, target = unpack(batch)
        yield scores(call_model(model, inputs)), target, inputs


def concatenate(parts: list[Any]) -> Any:
    """Batches of a nest of tensors as one: concatenated along the first dimension, on the CPU."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part.cpu().reshape(-1) if part.ndim == 0 else part.cpu() for part in parts])
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
