"""What a pickle would build, told without building it: nothing in it is called, imported or evaluated.

torch's own reader calls the functions that a file names, from a list of harmless ones. These still take a storage of 4
bytes for a tensor of any size, and look up any codec. Here their arguments are compared with the file first.
"""
import math
import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

_DTYPES = {f"torch {name}": value for name, value in vars(torch).items()
           if isinstance(value, torch.dtype) and str(value) == f"torch.{name}"}
_STORAGES = {f"torch {kind}Storage": n_bytes for kind, n_bytes in (
    ("Double", 8), ("Float", 4), ("Half", 2), ("BFloat16", 2), ("Long", 8), ("Int", 4), ("Short", 2), ("Char", 1),
    ("Byte", 1), ("Bool", 1), ("ComplexDouble", 16), ("ComplexFloat", 8))} | {"torch.storage UntypedStorage": 1}
_FUNCTIONS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
              "torch._utils _rebuild_parameter", "_codecs encode"}
MOST_DIMENSIONS = 64


class AsksForCode(ValueError):
    """A file that names something to be called which is no part of a plain tree."""


@dataclass(frozen=True)
class Name:
    """Something that the file names: never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    key: str
    n_bytes: int
    item_size: int


@dataclass(frozen=True)
class Built:
    """In place of a tensor, or of bytes."""

    kind: str


def read(file: BinaryIO, storages: dict[str, int]) -> Any:
    """The next pickle in `file`, a `Built` in place of each tensor. `storages`: bytes by key, those found are added.

    Raises AsksForCode, or ValueError (KeyError, IndexError, TypeError, ... for a damaged one).
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}
    arg: Any
    for op, arg, _ in pickletools.genops(file):
        name = op.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"):
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marked.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "APPENDS":
                _list(stack[-1]).extend(items)
            else:
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _put(stack[-1], key, value)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name == "APPEND":
            item = stack.pop()
            _list(stack[-1]).append(item)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _put(stack[-1], key, value)
        elif name == "GLOBAL":
            stack.append(_named(arg))
        elif name == "BINPERSID":
            stack.append(_stored(stack.pop(), storages))
        elif name == "REDUCE":
            args = stack.pop()
            stack[-1] = _called(stack[-1], args)
        elif name == "BUILD":
            _check_attributes(stack.pop(), stack[-1])
        elif name == "STOP":
            return stack.pop()
        elif not (name == "PROTO" and arg == 2):
            if name in _CALLS:
                raise AsksForCode(f"it asks to run code ({name}): refused")
            raise ValueError(f"it is not written as torch writes ({name})")
    raise ValueError("it ends too early")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CALLS = ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID")


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("it appends to what is no list")
    return value


def _put(container: Any, key: Any, value: Any) -> None:
    if type(container) not in (dict, OrderedDict):
        raise ValueError("it adds keys to what is no dict")
    if type(key) not in (str, int):  # the hash of a nest of tuples can take for ever
        raise ValueError("it has keys that are neither str nor int")
    container[key] = value


def _named(name: str) -> Name:
    if name not in _FUNCTIONS and name not in _STORAGES and name not in _DTYPES:
        raise AsksForCode(f"it asks to run code ({name.replace(' ', '.')!r:.80}): refused")
    return Name(name)


def _stored(given: Any, storages: dict[str, int]) -> Storage:
    word, kind, key, place, n, *view = given
    if (word != "storage" or type(kind) is not Name or kind.name not in _STORAGES or type(key) is not str
            or type(place) is not str or type(n) is not int or n < 0 or view not in ([], [None])):
        raise ValueError("it refers to what is no storage")
    item_size = _STORAGES[kind.name]
    if storages.setdefault(key, n * item_size) != n * item_size:
        raise ValueError(f"it gives storage {key!r:.20} two sizes")
    return Storage(key, n * item_size, item_size)


def _called(function: Any, args: Any) -> Any:
    if type(function) is not Name or type(args) is not tuple:
        raise AsksForCode("it asks to run code (what is no function): refused")
    name = function.name.rpartition(" ")[2]
    if name == "OrderedDict" and args == ():
        return OrderedDict()
    if name == "encode" and len(args) == 2 and type(args[0]) is str and args[1] == "latin1":
        return Built("bytes")
    if name == "_rebuild_parameter" and len(args) == 3 and args[0] == Built("tensor") and _is_hooks(args[2]):
        return Built("tensor")
    if name == "_rebuild_tensor_v2" and len(args) == 6 and _is_hooks(args[5]) and type(args[0]) is Storage:
        return _tensor(args, args[0].item_size)
    if name == "_rebuild_tensor_v3" and len(args) == 7 and _is_hooks(args[5]) and type(args[0]) is Storage:
        return _tensor(args, _DTYPES[args[6].name].itemsize)
    raise AsksForCode(f"it asks to run code ({name} with other arguments than torch writes): refused")


def _is_hooks(value: Any) -> bool:
    return type(value) is OrderedDict and not value


def _tensor(args: tuple[Any, ...], item_size: int) -> Built:
    """Check that a tensor lies in its storage: torch would enlarge the storage to any size."""
    storage, offset, shape, strides, requires_grad = args[:5]
    is_as_written = (type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides) <= MOST_DIMENSIONS
                     and all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
                     and type(requires_grad) is bool)
    if not is_as_written:
        raise ValueError("the shape of a tensor is not one")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (last + 1 if math.prod(shape) else 0) * item_size > storage.n_bytes:
        raise ValueError(f"a tensor of shape {shape!r:.60} does not lie in its storage of {storage.n_bytes} bytes")
    return Built("tensor")


def _check_attributes(attributes: Any, owner: Any) -> None:
    """An OrderedDict of `state_dict` carries the versions of the layers, and nothing else has attributes."""
    if type(owner) is not OrderedDict or type(attributes) is not dict or set(attributes) != {"_metadata"}:
        raise AsksForCode("it asks to run code (it sets attributes): refused")
