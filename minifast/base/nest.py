"""Nests, such as batches: tensors and other leaves in tuples, lists, mappings and dataclasses."""
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def is_container(nest: Any) -> bool:
    if isinstance(nest, (tuple, list, dict, Mapping)):  # dict: a faster question than Mapping
        return True
    return dataclasses.is_dataclass(nest) and not isinstance(nest, (type, Tensor))


def parts(container: Any) -> Iterable[Any]:
    """What lies in a container, in order."""
    if isinstance(container, (tuple, list)):
        return container
    if isinstance(container, (dict, Mapping)):
        return container.values()
    return [getattr(container, field.name) for field in dataclasses.fields(container)]


def rebuilt(container: Any, function: Callable[[Any], Any]) -> Any:
    """A container of the same kind with `function` of each of its parts; of a mapping that is no dict, a dict."""
    if isinstance(container, (tuple, list)):
        made = [function(part) for part in container]
        return type(container)(*made) if hasattr(container, "_fields") else type(container)(made)
    if isinstance(container, (dict, Mapping)):
        changed = {key: function(part) for key, part in container.items()}
        if type(container) is dict or not isinstance(container, dict):
            return changed
        twin = copy.copy(container)  # a defaultdict or OrderedDict stays one
        for key, value in changed.items():
            twin[key] = value
        return twin
    made = [function(part) for part in parts(container)]
    fields = zip(dataclasses.fields(container), made, strict=True)
    return dataclasses.replace(container, **{field.name: value for field, value in fields if field.init})


def tensors(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif is_container(nest):
        for part in parts(nest):
            yield from tensors(part)


def map_leaves(function: Callable[[Any], Any], nest: Any) -> Any:
    """The same nest with `function` of each of its parts that holds no others, tensor or not."""
    return rebuilt(nest, lambda part: map_leaves(function, part)) if is_container(nest) else function(nest)


def map_tensors(function: Callable[[Tensor], Any], nest: Any) -> Any:
    """The same nest with `function` of each of its tensors.

    >>> map_tensors(lambda tensor: tensor.shape[0], {"x": torch.zeros(3, 2), "name": "a"})
    {'x': 3, 'name': 'a'}
    """
    if isinstance(nest, Tensor):
        return function(nest)
    return rebuilt(nest, lambda part: map_tensors(function, part)) if is_container(nest) else nest


def join(function: Callable[[list[Any]], Any], nests: list[Any]) -> Any:
    """Nests of one structure as one: each leaf is `function` of the list of theirs.

    >>> join(sum, [{"a": 1, "b": [2]}, {"a": 10, "b": [20]}])
    {'a': 11, 'b': [22]}
    """
    first = nests[0]
    if not is_container(first):
        return function(nests)
    rows = [[nest[key] for key in first] if isinstance(first, Mapping) else parts(nest) for nest in nests]
    columns = zip(*rows, strict=True)
    return rebuilt(first, lambda _: join(function, list(next(columns))))


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
    return rebuilt(nest, lambda part: to_device(part, device, copy)) if is_container(nest) else nest


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
