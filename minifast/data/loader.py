"""What can be asked of any loader, and how a pass over it begins and ends."""
import copy
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from ..base.batch import Batch, n_samples
from ..errors import check_int
from .tensor_loader import TensorLoader

MOST_LEVELS, MOST_OBJECTS, MOST_PARTS = 5, 500, 100  # of the objects in which generators are looked for


def valid_sets(valid: Any) -> tuple[tuple[str, Any], ...]:
    """The validation data as (name, loader) pairs; a single loader has the name ""."""
    if isinstance(valid, Mapping):
        return tuple(valid.items())
    return () if valid is None else (("", valid),)


def named_sets(train: Any, valid: Any) -> dict[str, Any]:
    """The training and validation data by the names that messages call them.

    >>> list(named_sets([1], None)), list(named_sets([1], [2])), list(named_sets([1], {"clean": [2]}))
    (['train'], ['train', 'valid'], ['train', "valid['clean']"])
    """
    return {"train": train} | {f"valid[{name!r}]" if name else "valid": data for name, data in valid_sets(valid)}


def n_batches(loader: Iterable[Batch]) -> int | None:
    """How many batches one pass yields, or None if the loader does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # no len(), or a base class's that says so, as Sampler's once did
        return None


def count_steps(loader: Iterable[Batch], steps_per_epoch: int | None, accumulate: int, *, is_sized: bool = True
                ) -> tuple[int | None, int | None, int | None]:
    """How long an epoch is: (weight updates, batches, batches to stop after or None for all that the loader has).

    Raises ValueError for a loader that does not know its length, without `steps_per_epoch` (unless it need not be
    sized: then nothing is known), and for more steps than one pass makes.

    >>> count_steps([1, 2, 3, 4, 5], None, accumulate=2)
    (3, 5, None)
    """
    accumulate, batches = check_int("accumulate", accumulate), n_batches(loader)
    if steps_per_epoch is None:
        if batches is None and not is_sized:
            return None, None, None
        if batches is None:
            raise ValueError(f"the training data ({type(loader).__name__}) has no len(), and a schedule has to know "
                             "how long it is. Pass steps_per_epoch=, the weight updates per epoch.")
        return math.ceil(batches / accumulate), batches, None
    steps = check_int("steps_per_epoch", steps_per_epoch)
    if batches is None:
        return steps, steps * accumulate, steps * accumulate
    if steps > math.ceil(batches / accumulate):
        raise ValueError(f"steps_per_epoch={steps} is more than the {math.ceil(batches / accumulate)} updates that one "
                         f"pass over {batches} batches makes. Train more epochs instead.")
    return steps, min(steps * accumulate, batches), min(steps * accumulate, batches)


def micro_batches(loader: Iterable[Batch], accumulate: int, effective_batch_size: int | None) -> int:
    """Batches per weight update: `accumulate`, or as many as make `effective_batch_size` samples.

    Raises ValueError if both are given, or if that is no whole number of batches.

    >>> micro_batches(TensorLoader(torch.zeros(100), batch_size=8), 1, effective_batch_size=32)
    4
    """
    accumulate = check_int("accumulate", accumulate)
    if effective_batch_size is None:
        return accumulate
    wanted = check_int("effective_batch_size", effective_batch_size)
    if accumulate != 1:
        raise ValueError(f"accumulate={accumulate} and effective_batch_size={wanted} both say how many batches make a "
                         "weight update: pass one of them.")
    size = getattr(loader, "batch_size", None)
    if size is None and isinstance(loader, Sequence) and loader:
        size = n_samples(None, loader[0])
    if not isinstance(size, int):
        raise ValueError(f"effective_batch_size={wanted} needs to know how many samples a batch has, and the training "
                         f"data ({type(loader).__name__}) has no batch_size. Pass accumulate= instead.")
    if wanted % size:
        below, above = wanted // size * size, -(-wanted // size) * size
        raise ValueError(f"effective_batch_size={wanted} is no multiple of the {size} samples in a batch. Pass e.g. "
                         f"{f'{below} or ' if below else ''}{above}.")
    return wanted // size


def is_one_shot(loader: Iterable[Batch]) -> bool:
    """Whether a second pass would find it empty."""
    return isinstance(loader, Iterator)


def smallest_batch(loader: Iterable[Batch]) -> int | None:
    """How many samples the smallest batch holds, as far as that can be told without drawing one."""
    if isinstance(loader, TensorLoader):
        n, size = loader.n_samples, loader.batch_size
    elif isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        n, size = len(loader.sampler), loader.batch_size  # type: ignore[arg-type]
    elif isinstance(loader, Sequence) and loader:
        return min(n_samples(None, batch) for batch in loader)
    else:
        return None
    return size if loader.drop_last else n % size or size


def in_order(loader: Iterable[Batch]) -> Iterable[Batch]:
    """All samples in the order of the data set, `plain`; a loader with a sampler of its own gives its own order."""
    return plain(_ordered(loader))


def plain(loader: Iterable[Batch]) -> Iterable[Batch]:
    """A loader whose `batch_transform` augments nothing: the same transform's `plain`, if it has that."""
    transform = getattr(loader, "batch_transform", None)
    without = getattr(transform, "plain", transform)
    return loader if without is transform else with_transform(loader, without)


def with_transform(loader: Any, transform: Any, name: str = "batch_transform") -> Any:
    """A loader over the same data with another transform; the running workers of `loader` are left alone."""
    twin = second_copy(loader) if isinstance(loader, DataLoader) else copy.copy(loader)
    setattr(twin, name, transform)
    return twin


def _ordered(loader: Iterable[Batch]) -> Iterable[Batch]:
    if isinstance(loader, TensorLoader) and (loader.shuffle or loader.drop_last):
        ordered = copy.copy(loader)
        ordered.shuffle = ordered.drop_last = False
        return ordered
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__ and loader.batch_size:
        sampler = type(loader.sampler)
        if sampler is RandomSampler or (sampler is SequentialSampler and loader.drop_last):
            return _unshuffled(loader)
    return loader


def _unshuffled(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    ordered: Any = DataLoader(
        loader.dataset, batch_size=loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory, timeout=loader.timeout, worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context, generator=loader.generator)
    if hasattr(loader, "batch_transform"):
        ordered.batch_transform = loader.batch_transform
    return ordered  # type: ignore[no-any-return]


def second_copy(loader: Iterable[Batch]) -> Iterable[Batch]:
    """A loader over the same data that leaves the first one's running workers alone.

    Raises ValueError for an iterator: what is read from it cannot be put back.
    """
    if is_one_shot(loader):
        raise ValueError(f"the data is an iterator ({type(loader).__name__}), good for one pass: what is tried out on "
                         "it would be missing from training. Pass a DataLoader, a list, or an object whose __iter__ "
                         "starts a new pass.")
    if isinstance(loader, DataLoader):
        twin = copy.copy(loader)
        twin._iterator = None
        return twin
    return loader


def generators(loader: Any) -> list[Any]:
    """The random generators that a loader carries: it, its samplers, its data set, their transforms.

    Looked for in attributes of attributes, lists and dicts, not in closures; in no more than a few hundred objects.

    >>> len(generators(TensorLoader(torch.zeros(1), generator=torch.Generator())))
    1
    """
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    seen, level = {id(loader): loader}, [loader]
    for _ in range(MOST_LEVELS):
        below = {id(part): part for owner in level for part in _parts(owner)}
        level = [part for key, part in below.items() if key not in seen][:MOST_OBJECTS]
        seen |= {id(part): part for part in level}
    return [owner for owner in seen.values() if isinstance(owner, kinds)]


def _parts(owner: Any) -> Iterable[Any]:
    if type(owner) in (list, tuple, dict):  # of no other type: who knows what an iteration does
        parts = owner.values() if isinstance(owner, dict) else owner
        return [] if len(owner) > MOST_PARTS else parts
    if isinstance(owner, (Tensor, np.ndarray, type, ModuleType, FunctionType, MethodType)):
        return []
    # _iterator: the pass under way of a DataLoader
    return [value for name, value in getattr(owner, "__dict__", {}).items() if name != "_iterator"]
