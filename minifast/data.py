"""Loaders: the pair that a Learner trains on, one for tensors in memory, and what can be asked of any of them."""
import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from . import datasets
from .batches import Batch, check_device, n_samples
from .errors import check_callable, check_flag, check_int, quoted

MOST_LEVELS, MOST_OBJECTS, MOST_PARTS = 6, 500, 100  # of the objects in which generators are looked for


@dataclass
class DataLoaders:
    """The training data and, if there is any, the validation data: iterables of batches.

    A torch `DataLoader`, a `TensorLoader`, a list of batches, or any object whose `__iter__` starts a new pass. Several
    validation sets are a dict of name -> loader: then the columns of the epoch rows begin with the name. A worker
    process that hangs is waited for until the `timeout` of its DataLoader, which torch leaves at 0: for ever.

    >>> dls = DataLoaders([(torch.zeros(2, 3), torch.zeros(2))])
    >>> dls.valid is None
    True
    """

    train: Iterable[Batch]
    valid: Iterable[Batch] | Mapping[str, Iterable[Batch]] | None = None

    def __post_init__(self) -> None:
        sets = self.valid if isinstance(self.valid, Mapping) and self.valid else {"valid": self.valid}
        if not all(isinstance(name, str) and name for name in sets):
            raise ValueError(f"valid must name each of its loaders, got {list(sets)}. "
                             "Pass e.g. {'clean': loader, 'noisy': other}.")
        if isinstance(self.valid, Mapping) and self.valid:
            sets = {f"valid[{name!r}]": loader for name, loader in sets.items()}
        for name, loader in (("train", self.train), *sets.items()):
            if self.valid is None and name == "valid":
                continue
            if isinstance(loader, (list, tuple)) and loader and isinstance(loader[0], (DataLoader, TensorLoader)):
                raise TypeError(f"{name} must hold batches, got a {type(loader).__name__} of loaders. Several "
                                "validation sets are a dict of them, e.g. {'clean': loader, 'noisy': other}.")
            is_one_thing = isinstance(loader, (str, bytes, Mapping, Tensor, np.ndarray))
            if is_one_thing or not isinstance(loader, Iterable):
                raise TypeError(f"{name} must be an iterable of batches, got {type(loader).__name__}. "
                                "Pass e.g. a torch DataLoader.")

    @classmethod
    def from_datasets(cls, train: Any, valid: Any = None, *, batch_size: int = 64, num_workers: int | None = None,
                      **options: Any) -> "DataLoaders":
        """Torch DataLoaders over data sets: shuffled for training, in order for validation.

        train, valid: map-style data sets, IterableDatasets, or lists of samples; of `valid` also a dict of name -> data
        set. batch_size: samples a batch, >= 1. num_workers: processes that load, >= 0; None: one for each CPU but
        one, 8 at most; none for data that is in memory (TensorDataset, a list), for an IterableDataset, and where
        workers are not forked (Windows, macOS). options: those of torch's DataLoader; `shuffle`, `sampler` and
        `drop_last` are for training only.

        What torch leaves off and is on here: `pin_memory` where there is a CUDA device; `drop_last` for training where
        the last batch would have one sample, of which BatchNorm cannot take statistics. `persistent_workers` stays
        off: workers that persist save their start in each epoch, but their random generators cannot be saved, so a
        resumed fit would go on with other augmentation. Raises TypeError or ValueError for what is no data set or no
        option.

        >>> dls = DataLoaders.from_datasets([(torch.zeros(3), 0)] * 65, batch_size=32)
        >>> len(dls.train), dls.train.num_workers, dls.valid
        (2, 0, None)
        """
        datasets.check_datasets(train, valid)
        datasets.check_options(batch_size, num_workers, options)

        def make(dataset: Any) -> Iterable[Batch]:
            return datasets.valid_loader(dataset, batch_size, num_workers, **options)

        if isinstance(valid, Mapping):
            valid = {name: make(dataset) for name, dataset in valid.items()}
        return cls(datasets.train_loader(train, batch_size, num_workers, **options),
                   valid if valid is None or isinstance(valid, Mapping) else make(valid))


def valid_sets(valid: Any) -> tuple[tuple[str, Any], ...]:
    """The validation data as (name, loader) pairs; a single loader has the name "".

    >>> valid_sets(None), valid_sets([1]), valid_sets({"clean": [1], "noisy": [2]})
    ((), (('', [1]),), (('clean', [1]), ('noisy', [2])))
    """
    if isinstance(valid, Mapping):
        return tuple(valid.items())
    return () if valid is None else (("", valid),)


def as_dataloaders(model: Any, dls: Any) -> DataLoaders:
    """`dls` as `DataLoaders`. Raises TypeError for what is no data, or for model and data swapped."""
    if isinstance(dls, nn.Module) and not isinstance(model, nn.Module):
        raise TypeError(f"model and data are swapped: got Learner({type(model).__name__}, {type(dls).__name__}). "
                        "The call is Learner(model, dls, loss_func).")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r:.80} ({type(model).__name__}).")
    if isinstance(dls, DataLoaders):
        return dls
    if isinstance(dls, tuple) and len(dls) == 2:
        return DataLoaders(*dls)
    raise TypeError(f"dls must be DataLoaders(train, valid) or a tuple (train, valid), got a {type(dls).__name__}. "
                    "Without validation data pass DataLoaders(train).")


class TensorLoader:
    """Batches of tensors that already sit in memory, gathered whole: no worker, no collating sample by sample.

    tensors: each of shape (n, ...), on one device. batch_size: samples a batch, >= 1. shuffle: a new permutation each
    epoch, a function of the global torch generator (or of `generator`) at the moment the epoch starts. transform:
    called with the tuple of tensors of each batch, returns the batch. device: moved there once, when constructed.
    drop_last: leave out the last, smaller batch. Raises ValueError for tensors of different lengths.

    >>> loader = TensorLoader(torch.arange(5), torch.arange(5) * 10, batch_size=2)
    >>> len(loader), [y.tolist() for x, y in loader]
    (3, [[0, 10], [20, 30], [40]])
    """

    def __init__(self, *tensors: Tensor, batch_size: int = 64, shuffle: bool = False,
                 transform: Callable[[tuple[Tensor, ...]], Batch] | None = None,
                 device: torch.device | str | None = None, drop_last: bool = False,
                 generator: torch.Generator | None = None) -> None:
        if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
            raise TypeError(f"TensorLoader takes tensors of shape (n, ...), got "
                            f"{', '.join(type(tensor).__name__ for tensor in tensors) or 'none'}.")
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) > 1:
            raise ValueError(f"tensors must have one length, got {lengths}. Each row is one sample.")
        if transform is not None:
            check_callable("transform", transform, "a function of the tuple of tensors of a batch")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {quoted(generator)}.")
        device = None if device is None else check_device(device)
        self.tensors = tensors if device is None else tuple(tensor.to(device) for tensor in tensors)
        self.batch_size = check_int("batch_size", batch_size)
        self.shuffle = check_flag("shuffle", shuffle)
        self.drop_last = check_flag("drop_last", drop_last)
        self.transform, self.generator = transform, generator

    def __len__(self) -> int:
        n = len(self.tensors[0])
        return n // self.batch_size if self.drop_last else math.ceil(n / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.iter_from(0)

    def iter_from(self, first: int) -> Iterator[Batch]:
        """A pass that begins with batch `first` (0-based): what lies before it is skipped, not gathered.

        >>> [x.tolist() for x, in TensorLoader(torch.arange(5), batch_size=2).iter_from(1)]
        [[2, 3], [4]]
        """
        return self._batches(first, self._order())

    def _batches(self, first: int, order: Tensor | None) -> Iterator[Batch]:
        for i in range(first, len(self)):
            rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
            batch = tuple(tensor[rows] if order is None else tensor.index_select(0, order[rows])
                          for tensor in self.tensors)
            yield batch if self.transform is None else self.transform(batch)

    def _order(self) -> Tensor | None:
        if not self.shuffle:
            return None
        generator = self.generator
        if generator is None:  # as torch's RandomSampler: one draw from the global generator seeds the epoch's own
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        return torch.randperm(len(self.tensors[0]), generator=generator).to(self.tensors[0].device)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors)
        return f"TensorLoader({shapes}, batch_size={self.batch_size}, shuffle={self.shuffle})"


def digits(batch_size: int = 64) -> DataLoaders:
    """1,797 real handwritten digits, 8x8, embedded in the package: a first data set that needs no download.

    Images float32 (n, 1, 8, 8) in 0..1, labels int64 (n,) in 0..9. Every fifth image is held back for validation
    (360), the other 1,437 are the shuffled training data. Source: UCI, Alpaydin and Kaynak 1998, CC BY 4.0.

    >>> x, y = next(iter(digits().valid))
    >>> x.shape, y.shape
    (torch.Size([64, 1, 8, 8]), torch.Size([64]))
    """
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as data:
        images = torch.from_numpy(data["images"]).unsqueeze(1).float() / 16
        labels = torch.from_numpy(data["labels"]).long()
    held_back = torch.arange(len(labels)) % 5 == 0
    return DataLoaders(TensorLoader(images[~held_back], labels[~held_back], batch_size=batch_size, shuffle=True),
                       TensorLoader(images[held_back], labels[held_back], batch_size=batch_size))


def n_batches(loader: Iterable[Batch]) -> int | None:
    """How many batches one pass yields, or None if the loader does not know.

    >>> n_batches([1, 2, 3]), n_batches(iter([1, 2, 3]))
    (3, None)
    """
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # no len(), or a base class's that says so, as Sampler's once did
        return None


def count_steps(loader: Iterable[Batch], steps_per_epoch: int | None, accumulate: int) -> tuple[int, int, int | None]:
    """How long an epoch is: (weight updates, batches, batches to stop after or None for all that the loader has).

    Raises ValueError for a loader that does not know its length, without `steps_per_epoch`, and for more steps than
    one pass makes.

    >>> count_steps([1, 2, 3, 4, 5], None, accumulate=2)
    (3, 5, None)
    """
    accumulate, batches = check_int("accumulate", accumulate), n_batches(loader)
    if steps_per_epoch is None:
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
        near = f"{below} or {above}" if below else str(above)
        raise ValueError(f"effective_batch_size={wanted} is no multiple of the {size} samples in a batch. "
                         f"Pass e.g. {near}.")
    return wanted // size


def is_one_shot(loader: Iterable[Batch]) -> bool:
    """Whether `loader` is an iterator, which a second pass would find empty."""
    return isinstance(loader, Iterator)


def smallest_batch(loader: Iterable[Batch]) -> int | None:
    """How many samples the smallest batch holds, as far as that can be told without drawing one."""
    if isinstance(loader, TensorLoader):
        samples, batch_size, drop_last = len(loader.tensors[0]), loader.batch_size, loader.drop_last
    elif isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        samples, batch_size, drop_last = len(loader.sampler), loader.batch_size, loader.drop_last  # type: ignore[arg-type]
    elif isinstance(loader, Sequence) and loader:
        return min(n_samples(None, batch) for batch in loader)
    else:
        return None
    return batch_size if drop_last else samples % batch_size or batch_size


def in_order(loader: Iterable[Batch]) -> Iterable[Batch]:
    """The same samples in the order of the data set, all of them: without torch's shuffling, without drop_last.

    A loader with a sampler of its own is returned as it is.
    """
    if isinstance(loader, TensorLoader) and (loader.shuffle or loader.drop_last):
        ordered = copy.copy(loader)
        ordered.shuffle = ordered.drop_last = False
        return ordered
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__ and loader.batch_size:
        shuffles, sequential = type(loader.sampler) is RandomSampler, type(loader.sampler) is SequentialSampler
        if shuffles or (sequential and loader.drop_last):
            return _rebuilt(loader)
    return loader


def _rebuilt(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    return DataLoader(loader.dataset, batch_size=loader.batch_size, num_workers=loader.num_workers,
                      collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, timeout=loader.timeout,
                      worker_init_fn=loader.worker_init_fn, multiprocessing_context=loader.multiprocessing_context,
                      generator=loader.generator)


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
    found: list[Any] = []
    seen, level = {id(loader)}, [loader]
    for _ in range(MOST_LEVELS):
        below: list[Any] = []
        for owner in level:
            if isinstance(owner, kinds):
                found.append(owner)
                continue
            for part in _parts(owner):
                if id(part) not in seen:
                    seen.add(id(part))
                    below.append(part)
        level = below[:MOST_OBJECTS]
    return found


def _parts(owner: Any) -> Iterable[Any]:
    """What `owner` consists of, as far as generators may be in it."""
    if type(owner) in (list, tuple, dict):  # of no other type: who knows what an iteration does
        parts = owner.values() if isinstance(owner, dict) else owner
        return [] if len(owner) > MOST_PARTS else parts
    if isinstance(owner, (Tensor, np.ndarray, type, ModuleType, FunctionType, MethodType)):
        return []
    # _iterator: the pass under way of a DataLoader
    return [value for name, value in getattr(owner, "__dict__", {}).items() if name != "_iterator"]
