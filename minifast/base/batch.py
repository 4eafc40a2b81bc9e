"""A batch: taking it apart, calling the model with it, counting and cutting its samples."""
import dataclasses
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from .nest import is_container, rebuilt, tensors

Batch = Any  # any nest of tensors: tuple, list, dict, namedtuple, dataclass
UnpackBatch = Callable[[Batch], tuple[Any, Any]]


def split_batch(batch: Batch) -> tuple[Any, Any]:
    """(inputs, target) of a batch: the last element is the target; of a mapping, `labels` is, if there is one.

    `(x, y)` gives x, y; `(x1, x2, y)` gives (x1, x2), y; `((x1, x2), y)` likewise. A mapping goes to the model whole,
    as keywords. Dataclasses are read like tuples. Raises TypeError for anything else: pass `unpack=` to the Learner.

    >>> split_batch(("x1", "x2", "y"))
    (('x1', 'x2'), 'y')
    >>> split_batch({"input_ids": "x", "labels": "y"})
    ({'input_ids': 'x', 'labels': 'y'}, 'y')
    """
    if type(batch) in (tuple, list) and len(batch) == 2:  # by far the most common: no more questions
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        return batch, batch.get("labels")
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = tuple(getattr(batch, field.name) for field in dataclasses.fields(batch))
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]
    what = f"one bare tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else (
        f"a {type(batch).__name__}" + (f" of {len(batch)} element(s)" if isinstance(batch, (tuple, list)) else ""))
    raise TypeError(f"a batch must hold inputs and a target, got {what}. Yield (inputs, target), or pass "
                    "Learner(..., unpack=lambda batch: (inputs, target)).")


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """`model(*inputs)` for a tuple, `model(**inputs)` for a mapping, `model(inputs)` for anything else."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def output_loss(pred: Any, target: Any) -> Tensor:
    """The loss that the model's output carries: its `.loss`, or its "loss" if it is a mapping."""
    loss = pred.get("loss") if isinstance(pred, Mapping) else getattr(pred, "loss", None)
    if loss is None:
        raise TypeError(f"loss_func=None needs a model whose output has `.loss`, but it returned a "
                        f"{type(pred).__name__}. Pass a loss_func, or labels in the batch.")
    return loss  # type: ignore[no-any-return]


def scores(pred: Any) -> Any:
    """What metrics compare with the target: the `.logits` of an output that has them, else the output itself."""
    if isinstance(pred, Mapping):
        return pred.get("logits", pred)
    return getattr(pred, "logits", pred)


def n_samples(target: Any, inputs: Any = None) -> int:
    """How many samples a batch holds: the first dimension of its first tensor, in the target if it has one."""
    if isinstance(target, Tensor):
        return target.shape[0] if target.ndim else 1
    tensor = next((leaf for leaf in tensors((target, inputs)) if leaf.ndim), None)
    return 1 if tensor is None else tensor.shape[0]


def parts(batch: Batch, n: int, size: int) -> list[Batch]:
    """A batch of `n` samples as batches of at most `size`, of which no two differ by more than one sample.

    Tensors and arrays whose first dimension is `n` are split along it (their parts are views), and so are lists of
    `n` things that hold no tensors, such as texts. Numbers, text, None, tensors without dimensions and those whose
    first dimension is 1 are kept whole. Raises ValueError for a tensor of another length, and TypeError for an object
    that cannot be looked into.

    >>> import torch
    >>> parts((torch.arange(5), ["a", "b", "c", "d", "e"], 0.5), 5, 3)
    [(tensor([0, 1]), ['a', 'b'], 0.5), (tensor([2, 3, 4]), ['c', 'd', 'e'], 0.5)]
    """
    count = -(-n // size)
    bounds = [n * i // count for i in range(count + 1)]
    return [_cut(batch, n, slice(start, end)) for start, end in pairwise(bounds)]


def _cut(nest: Any, n: int, samples: slice) -> Any:
    shape = getattr(nest, "shape", None)  # of a tensor or a numpy array
    if shape is not None:
        if len(shape) == 0 or (shape[0] == 1 and n != 1):
            return nest
        if shape[0] == n:
            return nest[samples]
        raise ValueError(f"a batch of {n} samples cannot be split: it holds a tensor of shape {tuple(shape)}, whose "
                         f"first dimension is neither {n} nor 1. Give it one row per sample, or make smaller batches.")
    is_list = isinstance(nest, (list, tuple)) and not hasattr(nest, "_fields")
    if is_list and len(nest) == n and next(tensors(nest), None) is None:
        return nest[samples]
    if is_container(nest):
        return rebuilt(nest, lambda part: _cut(part, n, samples))
    if hasattr(nest, "to"):
        raise TypeError(f"a batch of {n} samples cannot be split: it holds a {type(nest).__name__}, and nobody knows "
                        "which of it belongs to which sample. Yield tensors, tuples or dicts, or make smaller batches.")
    return nest
