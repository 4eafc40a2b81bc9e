"""The states of random generators: noted, put back, and as the plain values that a file can hold."""
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

INTEGERS = {name: np.dtype(name) for name in ("uint8", "uint32", "int64", "uint64")}  # what generators keep arrays of
MANY = 100  # numbers in a tuple


def capture(generators: Iterable[Any] = ()) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators, of the accelerators in use, and of `generators`.

    generators: torch, numpy or Python ones, such as those that a loader carries.
    """
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
            "own": [_get(generator) for generator in generators]}


def restore(noted: dict[str, Any], generators: Iterable[Any] = ()) -> None:
    """Put back what `capture` noted, with the same `generators` in the same order.

    A device that is not there, or not in use yet, is left alone. Raises ValueError for another number of `generators`.
    """
    generators = list(generators)
    if len(generators) != len(noted["own"]):
        raise ValueError(f"the loaders carry {len(generators)} random generators of their own, but the state of "
                         f"{len(noted['own'])} was noted. Resume with the same loaders.")
    for generator, state in zip(generators, noted["own"], strict=True):
        _set(generator, state)
    random.setstate(noted["python"])
    np.random.set_state(noted["numpy"])
    torch.set_rng_state(noted["torch"])
    if noted["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(noted["cuda"][:torch.cuda.device_count()])
    if noted["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(noted["mps"])


def to_plain(value: Any) -> Any:
    """A state without numpy's arrays and numbers, which a checkpoint does not hold.

    >>> to_plain(("MT19937", np.array([1, 2], dtype=np.uint32), np.int64(3)))
    ('MT19937', {'array': tensor([1, 2]), 'dtype': 'uint32'}, 3)
    """
    if isinstance(value, np.ndarray):
        wide = value.view(np.int64) if value.dtype == np.uint64 else value.astype(np.int64)
        return {"array": torch.from_numpy(wide.copy()), "dtype": value.dtype.name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: to_plain(inner) for key, inner in value.items()}
    if type(value) is tuple and len(value) > MANY:  # Python's own generator: one tensor is written much faster
        return {"ints": torch.tensor(value)}
    return type(value)(map(to_plain, value)) if type(value) in (list, tuple) else value


def from_plain(value: Any) -> Any:
    """The state that `to_plain` was given.

    >>> from_plain(to_plain(np.array([7], dtype=np.uint64)))
    array([7], dtype=uint64)
    """
    if isinstance(value, dict):
        if value.keys() == {"ints"}:
            return tuple(value["ints"].tolist())
        if value.keys() == {"array", "dtype"}:
            wide = value["array"].numpy()
            return wide.view(np.uint64) if value["dtype"] == "uint64" else wide.astype(INTEGERS[value["dtype"]])
        return {key: from_plain(inner) for key, inner in value.items()}
    return type(value)(map(from_plain, value)) if type(value) in (list, tuple) else value


def _get(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state.clone() if isinstance(state, Tensor) else state)
