"""Plain trees: tensors and plain values in lists, tuples and dicts. What a file of ours may hold."""
import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..base.nest import map_tensors, tensors

DEPTH = 64  # levels of containers
MOST_VALUES = 10_000_000  # with what is shared counted each time: a small file could claim 2**64 of them
LARGEST_INT = 2**2000  # in size; torch cannot read larger ones back
_Path = tuple[Any, Any]  # (the path of the container, the key, or (index,), in it): made into text for an error only
_VALUES = (int, float, bool, str, bytes, type(None))
_ADVICE: tuple[tuple[Any, str], ...] = (
    (np.generic, "x.item()"), (np.ndarray, "torch.from_numpy(x)"), (Tensor, "x.as_subclass(torch.Tensor)"),
    ((os.PathLike, torch.dtype, torch.device), "str(x)"), ((set, frozenset), "sorted(x)"),
    *((kind, f"{kind.__name__}(x)") for kind in (bool, int, float, str, dict, list, tuple)))


def check_plain(tree: Any, name: str = "", *, ordered: bool = False) -> None:
    """Raise TypeError that names where in `tree`, which is called `name`, something is not plain.

    Plain are, of exactly these types: int (below 2**2000 in size), float, bool, str, bytes (not empty) and None; list,
    tuple, and dict with str or int as keys; Tensor and Parameter, dense and with values. At most 64 levels deep.
    ordered: an OrderedDict, as in files of others, is plain too.

    >>> check_plain({"best": [0.5, {1, 2}]}, "callbacks.SaveBest")
    Traceback (most recent call last):
        ...
    TypeError: callbacks.SaveBest.best[1] is a set: use sorted(x). Only tensors and plain values can be saved.
    """
    containers = (list, tuple, dict, OrderedDict) if ordered else (list, tuple, dict)
    sizes: dict[int, tuple[int, int]] = {}  # of each container: the values and the levels in it

    def look(value: Any, path: _Path, depth: int) -> tuple[int, int]:
        if type(value) not in containers:
            problem = _problem(value)
            if problem:
                raise TypeError(f"{_shown(path)} {problem}. Only tensors and plain values can be saved.")
            return 1, 0
        n, levels = sizes.get(id(value), (1, 1))
        if depth + levels > DEPTH:
            raise TypeError(f"{_shown(path):.80}... is nested more than {DEPTH} levels deep, or holds itself.")
        if id(value) not in sizes:
            for key, inner in _items(value, path):
                n_below, levels_below = look(inner, (path, key), depth + 1)
                n, levels = n + n_below, max(levels, levels_below + 1)
            sizes[id(value)] = n, levels
        if n > MOST_VALUES:
            raise TypeError(f"{_shown(path)} holds too much: more than {MOST_VALUES:,} values. Put numbers into a "
                            "tensor.")
        return n, levels

    look(tree, (None, name), 0)


def size_of(tree: Any) -> int:
    """Bytes of the tensors in `tree` as they will be written: what is shared once, a view without the rest.

    >>> size_of({"row": torch.zeros(1000, 10)[0], "tied": [torch.zeros(3)] * 2})
    52
    """
    return sum(sum(view.nbytes for view in views) if _is_copied(views) else views[0].untyped_storage().nbytes()
               for views in _by_storage(tree))


def to_save(tree: Any) -> Any:
    """The same tree with its tensors detached and on the CPU. Nothing is copied that need not be.

    A storage is written whole where its tensors in the tree cover it, else they are copied: so no view drags along
    what it is a part of. Tensors that share a storage share one, and tied ones are one, either way.
    """
    saved: dict[Any, Tensor] = {}
    for views in _by_storage(tree):
        is_copied = _is_copied(views)
        is_moved = not is_copied and views[0].device.type != "cpu"
        host: Any = views[0].untyped_storage().cpu() if is_moved else None  # all views of it into one copy
        for view in views:
            plain = view.detach()
            if is_copied:
                plain = plain.to("cpu", copy=True)
            elif is_moved:
                plain = torch.empty(0, dtype=view.dtype).set_(host, view.storage_offset(), view.shape, view.stride())
            saved[view_of(view)] = plain.resolve_conj().resolve_neg()
    return map_tensors(lambda tensor: saved[view_of(tensor)], tree)


def _by_storage(tree: Any) -> list[list[Tensor]]:
    """The tensors in `tree`, those of one storage together; tied ones once."""
    found: dict[Any, dict[Any, Tensor]] = {}
    for tensor in tensors(tree):
        storage, view = tensor.untyped_storage(), view_of(tensor)
        key = (tensor.device, storage.data_ptr()) if storage.nbytes() else view  # an empty one has no address
        found.setdefault(key, {}).setdefault(view, tensor)
    return [list(views.values()) for views in found.values()]


def _is_copied(views: list[Tensor]) -> bool:
    """Whether the views of one storage are written each by itself: they do not cover it, or cannot share it.

    Rows that repeat are written out, and torch refuses two dtypes of the same bytes.
    """
    n_bytes, sizes = views[0].untyped_storage().nbytes(), [view.nbytes for view in views]
    return sum(sizes) < n_bytes or max(sizes) > n_bytes or len({view.dtype for view in views}) > 1


def view_of(tensor: Tensor) -> Any:
    """What two tensors share if they are tied: one memory, seen in one way."""
    return (tensor.device, tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride(),
            tensor.is_conj(), tensor.is_neg())


def _items(container: Any, path: _Path) -> Iterable[tuple[Any, Any]]:
    if not isinstance(container, dict):
        return (((i,), value) for i, value in enumerate(container))
    for key in container:
        if type(key) not in (str, int):
            raise TypeError(f"{_shown(path)} has the key {key!r:.80}, a {_name(type(key))}: use str or int. Only "
                            "tensors and plain values can be saved.")
    if type(container) is OrderedDict and not vars(container).keys() <= {"_metadata"}:  # which a state dict carries
        raise TypeError(f"{_shown(path)} has attributes. Only tensors and plain values can be saved.")
    return container.items()


def _shown(path: _Path | None) -> str:
    """E.g. callbacks.SaveBest.best[1]."""
    text = ""
    while path is not None:
        path, key = path
        part = f"[{key[0]}]" if type(key) is tuple else f"{key}"[:200]
        text = part + ("" if not text or text.startswith("[") or not part else ".") + text
    return text or "it"


def _problem(value: Any) -> str:
    """What is wrong with `value`, which is no container; empty if it is plain."""
    kind = type(value)
    if is_lazy(value):
        return f"is a {_name(kind)}, which has no values yet: run a batch through the model first"
    if kind in (Tensor, nn.Parameter):
        if value.is_meta:
            return "is a tensor on the meta device, without values: load or initialise it first"
        is_odd = value.is_nested or value.is_quantized or value.layout is not torch.strided
        return "is a nested, sparse or quantized tensor: use x.to_dense(), or a list of dense ones" * is_odd
    if kind not in _VALUES:
        advice = next((text for kinds, text in _ADVICE if isinstance(value, kinds)), "")
        return f"is a {_name(kind)}{': use ' * bool(advice)}{advice}"
    if kind is int and abs(value) >= LARGEST_INT:
        return "is an int of 2000 bits or more: use str(x)"
    return "is empty bytes, which torch cannot read back: use None" if value == b"" else ""


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
