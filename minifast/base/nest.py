"""Batches of any shape: taking them apart, moving them, counting their samples."""
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(nest: Any) -> Iterator[Tensor]:
    """The tensors of a nest, in order."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from tensors(value)
    elif isinstance(nest, (tuple, list)):
        for value in nest:
            yield from tensors(value)
    elif dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        for field in dataclasses.fields(nest):
            yield from tensors(getattr(nest, field.name))


def to_device(nest: Any, device: torch.device | str, copy: Callable[[Tensor], Tensor] | None = None) -> Any:
    """The same nest with its tensors on `device`; whatever has a `.to(device)` of its own is moved by that.

    copy: gives a tensor's copy there, in place of torch's own.
    """
    if isinstance(nest, Tensor):
        if copy is not None:
            return copy(nest)
        return nest.to(device, non_blocking=str(device) != "cpu")  # a copy to the host must be waited for
    if hasattr(nest, "to") and not isinstance(nest, type):
        return nest.to(device)
    return _rebuilt(nest, lambda part: to_device(part, device, copy))


def map_tensors(function: Callable[[Tensor], Any], nest: Any) -> Any:
    """The same nest with `function` of each of its tensors.

    >>> map_tensors(lambda tensor: tensor.shape[0], {"x": torch.zeros(3, 2), "name": "a"})
    {'x': 3, 'name': 'a'}
    """
    return function(nest) if isinstance(nest, Tensor) else _rebuilt(nest, lambda part: map_tensors(function, part))


def map_leaves(function: Callable[[Any], Any], nest: Any) -> Any:
    """The same nest with `function` of each of its parts that holds no others, tensor or not.

    >>> map_leaves(type, {"x": torch.zeros(3), "more": [1, "a"]})
    {'x': <class 'torch.Tensor'>, 'more': [<class 'int'>, <class 'str'>]}
    """
    return _rebuilt(nest, lambda part: map_leaves(function, part)) if _is_container(nest) else function(nest)


def _is_container(nest: Any) -> bool:
    return isinstance(nest, (Mapping, tuple, list)) or (dataclasses.is_dataclass(nest) and not isinstance(nest, type))


def _rebuilt(nest: Any, function: Callable[[Any], Any]) -> Any:
    """A container of the same kind with `function` of each of its parts; anything else as it is."""
    if isinstance(nest, Mapping):
        made = {key: function(value) for key, value in nest.items()}
        if type(nest) is dict or not isinstance(nest, dict):
            return made
        twin = copy.copy(nest)  # a defaultdict or OrderedDict stays one
        for key, value in made.items():
            twin[key] = value
        return twin
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(function(value) for value in nest))
    if isinstance(nest, (tuple, list)):
        return type(nest)(function(value) for value in nest)
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return dataclasses.replace(nest, **{field.name: function(getattr(nest, field.name))
                                            for field in dataclasses.fields(nest) if field.init})
    return nest


def describe(nest: Any, leaf: Callable[[Tensor], str] | None = None) -> str:
    """A nest in words, for error messages; leaf: gives those for a tensor, None for its dtype and shape.

    >>> describe((torch.zeros(64, 3), {"y": torch.zeros(64, dtype=torch.int64)}))
    '(float32 (64, 3), {y: int64 (64,)})'
    """
    if isinstance(nest, Tensor):
        return leaf(nest) if leaf else f"{str(nest.dtype).removeprefix('torch.')} {tuple(nest.shape)}"
    if isinstance(nest, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value, leaf)}" for key, value in nest.items()) + "}"
    words = ", ".join(describe(part, leaf) for part in (nest if isinstance(nest, (tuple, list)) else tensors(nest)))
    kind = "" if isinstance(nest, (tuple, list)) else type(nest).__name__
    return f"{kind}({words})" if words or not kind else kind


def join(function: Callable[[list[Any]], Any], nests: list[Any]) -> Any:
    """Nests of one structure as one: each leaf is `function` of the list of theirs."""
    first = nests[0]
    if isinstance(first, Mapping):
        joined = {key: join(function, [nest[key] for nest in nests]) for key in first}
        return joined if type(first) is dict else type(first)(joined)  # type: ignore[call-arg]
    if isinstance(first, (tuple, list)):
        columns = [join(function, list(column)) for column in zip(*nests, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        return dataclasses.replace(first, **{field.name: join(function, [getattr(nest, field.name) for nest in nests])
                                             for field in dataclasses.fields(first) if field.init})
    return function(nests)
