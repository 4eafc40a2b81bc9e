"""Plain trees: tensors and plain values in lists, tuples and dicts. What a file of ours may hold."""
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

DEPTH = 64  # levels of containers
MOST_VALUES = 10_000_000  # with what is shared counted each time: a small file could claim 2**64 of them
LARGEST_INT = 2**2000  # in size; torch cannot read larger ones back
_Place = tuple[Any, Any]  # (the place of the container, the key, or (index,), in it): made into text for an error only
_TENSORS = (Tensor, nn.Parameter)
_VALUES = (int, float, bool, str, bytes, type(None))
_ADVICE = {"set": ": use sorted(x)", "frozenset": ": use sorted(x)", "OrderedDict": ": use dict(x)",
           "defaultdict": ": use dict(x)", "Counter": ": use dict(x)", "deque": ": use list(x)",
           "ndarray": ": use torch.from_numpy(x)", "Size": ": use tuple(x)", "dtype": ": use str(x)",
           "device": ": use str(x)", "complex": ": use [x.real, x.imag]"}


def check_plain(tree: Any, name: str = "", *, ordered: bool = False) -> None:
    """Raise TypeError that names the place of what is not plain in `tree`, which is called `name`.

    Plain are, of exactly these types: int (below 2**2000 in size), float, bool, str, bytes (not empty) and None; list,
    tuple, and dict with str or int as keys; Tensor and Parameter, dense and with values. At most 64 levels deep.
    ordered: an OrderedDict, as in files of others, is plain too.

    >>> check_plain({"best": {"epoch": 3, "values": [0.5, None]}})
    >>> check_plain({"best": [0.5, {1, 2}]}, "callbacks.SaveBest")
    Traceback (most recent call last):
        ...
    TypeError: callbacks.SaveBest.best[1] is a set: use sorted(x). Only tensors and plain values can be saved.
    """
    containers = (list, tuple, dict, OrderedDict) if ordered else (list, tuple, dict)
    level: dict[int, tuple[Any, _Place, int]] = {}  # by id: what is shared is looked at once per level

    def look(value: Any, place: _Place, times: int) -> None:
        if type(value) in containers:
            seen = level.get(id(value))
            level[id(value)] = (value, place, times) if seen is None else (value, seen[1], seen[2] + times)
        else:
            problem = _problem(value)
            if problem:
                raise TypeError(f"{_shown(place)} {problem}. Only tensors and plain values can be saved.")

    look(tree, (None, name), 1)
    n_values = 1
    for _ in range(DEPTH):
        if not level:
            return
        waiting, level = list(level.values()), {}
        for container, place, times in waiting:
            n_values += times * len(container)
            if n_values > MOST_VALUES:
                raise TypeError(f"{_shown(place)} holds too much: more than {MOST_VALUES:,} values in the whole. Put "
                                "numbers into a tensor.")
            for key, value in _items(container, place):
                look(value, (place, key), times)
    if level:
        place = next(iter(level.values()))[1]
        raise TypeError(f"{_shown(place):.80}... is nested more than {DEPTH} levels deep, or holds itself.")


def size_of(tree: Any) -> int:
    """Bytes of the tensors in `tree` as they will be written: what is shared once, a view without the rest.

    >>> size_of({"row": torch.zeros(1000, 10)[0], "tied": [torch.zeros(3)] * 2})
    52
    """
    return sum(plan.size for plan in _plans(tree).values())


def to_save(tree: Any) -> Any:
    """The same tree with its tensors detached and on the CPU. Nothing is copied that need not be.

    A storage is written whole where its tensors in the tree cover it, else they are copied: so no view drags along
    what it is a part of. Tensors that share a storage share one, and tied ones are one, either way.
    """
    plans = _plans(tree)
    done: dict[int, Any] = {}
    saved: dict[Any, Tensor] = {}

    def one(tensor: Tensor) -> Tensor:
        plan, view = plans[_storage(tensor)], _view(tensor)
        if view not in saved:
            plain = tensor.detach()
            if plan.copies:
                plain = plain.to("cpu", copy=True)
            elif tensor.device.type != "cpu":  # all views of it into one copy of the storage
                plan.host = plan.host if plan.host is not None else tensor.untyped_storage().cpu()
                plain = torch.empty(0, dtype=tensor.dtype).set_(plan.host, tensor.storage_offset(), tensor.shape,
                                                                tensor.stride())
            saved[view] = plain.cpu().resolve_conj().resolve_neg()
        return saved[view]

    def rebuild(value: Any) -> Any:  # no deeper than check_plain allows
        if isinstance(value, Tensor):
            return one(value)
        if type(value) not in (list, tuple, dict):
            return value
        if id(value) not in done:
            if type(value) is dict:
                done[id(value)] = {key: rebuild(inner) for key, inner in value.items()}
            else:
                done[id(value)] = type(value)(rebuild(inner) for inner in value)
        return done[id(value)]
    return rebuild(tree)


class _Plan:
    """How one storage is to be written: whole, or as copies of the views of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.n_bytes = tensor.untyped_storage().nbytes()
        self.views: dict[Any, int] = {}
        self.has_to_copy = False
        self.dtype = tensor.dtype
        self.host: Any = None

    def add(self, tensor: Tensor) -> None:
        n_bytes = tensor.numel() * tensor.element_size()
        self.views[_view(tensor)] = n_bytes
        # rows that repeat are written out, and torch refuses two dtypes of the same bytes
        self.has_to_copy |= n_bytes > self.n_bytes or tensor.dtype != self.dtype

    @property
    def copies(self) -> bool:
        return self.has_to_copy or sum(self.views.values()) < self.n_bytes

    @property
    def size(self) -> int:
        return sum(self.views.values()) if self.copies else self.n_bytes


def _plans(tree: Any) -> dict[Any, _Plan]:
    plans: dict[Any, _Plan] = {}
    for tensor in tensors(tree):
        key = _storage(tensor)
        if key not in plans:
            plans[key] = _Plan(tensor)
        plans[key].add(tensor)
    return plans


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in a plain tree; those of a container that is shared come once."""
    seen: set[int] = set()
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple, dict) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(reversed(value.values() if type(value) is dict else value))


def _storage(tensor: Tensor) -> Any:
    """What tells the storage of `tensor` from others; an empty one has no address."""
    storage = tensor.untyped_storage()
    return (tensor.device, storage.data_ptr()) if storage.nbytes() else ("empty", _view(tensor))


def _view(tensor: Tensor) -> Any:
    return (tensor.device, tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride(),
            tensor.is_conj(), tensor.is_neg())


def _items(container: Any, place: _Place) -> Iterator[tuple[Any, Any]]:
    if not isinstance(container, dict):
        for i, value in enumerate(container):
            yield (i,), value
        return
    for key, value in container.items():
        if type(key) not in (str, int):
            raise TypeError(f"{_shown(place)} has the key {key!r:.80}, a {_name(type(key))}: use str or int. Only "
                            "tensors and plain values can be saved.")
        yield key, value


def _shown(place: _Place | None) -> str:
    """E.g. callbacks.SaveBest.best[1]."""
    text = ""
    while place is not None:
        place, key = place
        part = f"[{key[0]}]" if type(key) is tuple else f"{key}"[:200]
        text = part + ("" if not text or text.startswith("[") or not part else ".") + text
    return text or "it"


def _problem(value: Any) -> str:
    """What is wrong with `value`, which is no container; empty if it is plain."""
    kind = type(value)
    if kind in _TENSORS:
        return _tensor_problem(value)
    if kind not in _VALUES:
        return f"is a {_name(kind)}{_advice(value)}"
    if kind is int and abs(value) >= LARGEST_INT:
        return "is an int of 2000 bits or more: use str(x)"
    return "is empty bytes, which torch cannot read back: use None" if value == b"" else ""


def _tensor_problem(tensor: Tensor) -> str:
    for is_so, problem in _TENSOR_PROBLEMS:
        if is_so(tensor):
            return problem
    return ""


_TENSOR_PROBLEMS: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (lambda tensor: tensor.is_meta, "is a tensor on the meta device, without values: load or initialise it first"),
    (lambda tensor: tensor.is_nested, "is a nested tensor: use list(x.unbind())"),
    (lambda tensor: tensor.layout is not torch.strided, "is a sparse tensor: use x.to_dense()"),
    (lambda tensor: tensor.is_quantized, "is a quantized tensor: use x.int_repr(), and its scale and zero point"),
)


def _advice(value: Any) -> str:
    kind = type(value)
    if is_lazy(value):
        return ", which has no values yet: run a batch through the model first"
    if isinstance(value, Tensor):
        return ": use x.as_subclass(torch.Tensor)"
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return f": use {'str' if 'str' in kind.__name__ else type(value.item()).__name__}(x)"
    if hasattr(value, "__fspath__"):
        return ": use str(x)"
    for plain in (bool, int, float, str, bytes, dict, list, tuple):
        if isinstance(value, plain):
            return f": use {plain.__name__}(x)"
    return _ADVICE.get(kind.__name__, "")


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
