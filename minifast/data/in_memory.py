"""Data sets read once into memory: whether they fit, reading them, and the loaders of what was read."""
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..base import snapshot
from ..base.nest import map_tensors, tensors
from ..errors import check_callable, check_device, check_flag, check_int
from ..machine.limits import MOST_WORKERS, available, n_cpus
from ..machine.workers import explain
from ..show import screen
from . import samples
from .feed import begin, end_workers
from .loader import generators, named_sets
from .tensor_loader import TensorLoader

Transform = Callable[[Any], Any]
USABLE = 0.9  # of the memory that is free
SLOW = 5.0  # seconds of reading from which worker processes are worth their start
MOST_AT_ONCE, MOST_BYTES = 256, 2**24  # samples, and bytes, that are read at once
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


def loaders(train: Any, valid: Any, *, transform: Transform | None, valid_transform: Transform | None,
            device: torch.device | str | None, num_workers: int | None, verbose: bool, **options: Any
            ) -> tuple[TensorLoader, Any]:
    """What `DataLoaders.in_memory` makes: the loader that trains, and the one that validates, a dict of them, or None.

    options: those of the TensorLoader that trains: batch_size, drop_last, generator.
    """
    for name, function in (("transform", transform), ("valid_transform", valid_transform)):
        if function is not None:
            check_callable(name, function, "a function of a batch")
    check_flag("verbose", verbose)
    place = torch.device("cpu") if device is None else check_device(device)
    TensorLoader(torch.empty(0), **options)  # what is wrong is said before anything is read
    if num_workers is not None:
        check_int("num_workers", num_workers, 0)
    (first, columns), *others = read_all(named_sets(train, valid), place, num_workers, verbose)
    made = [TensorLoader(*columns, batch_size=options["batch_size"], transform=_transform(first, valid_transform))
            for first, columns in others]
    return (TensorLoader(*columns, shuffle=True, transform=_transform(first, transform), **options),
            dict(zip(valid, made, strict=True)) if isinstance(valid, Mapping) else made[0] if made else None)


def _transform(first: Any, transform: Transform | None) -> Transform | None:
    if type(first) is tuple and all(isinstance(part, Tensor) for part in first):
        return transform  # a flat tuple of tensors is what a TensorLoader gives by itself
    return samples.Nested(map_tensors(lambda tensor: tensor.new_empty(0), first), transform)


def read_all(sets: dict[str, Any], device: torch.device, num_workers: int | None, verbose: bool
             ) -> list[tuple[Any, list[Tensor]]]:
    """(sample 0 as a nest, the columns) of each data set."""
    began = time.perf_counter()
    lengths = {name: samples.check_data_set(name, data) for name, data in sets.items()}
    restore = snapshot.rng([generator for data in sets.values() for generator in generators(data)])
    try:
        firsts = {name: samples.read(name, data, 0) for name, data in sets.items()}
        for name, first in firsts.items():
            if next(tensors(first), None) is None:
                raise ValueError(f"{name}: sample 0 holds nothing ({type(first).__name__}).")
        wanted = sum(lengths[name] * _n_bytes(first) for name, first in firsts.items())
        free = available(device)
        if free is not None and wanted > USABLE * free:
            raise MemoryError(f"{' and '.join(sets)} would take {wanted / 1e6:,.0f} MB in the memory of {device}, "
                              f"where {free / 1e6:,.0f} MB are free, of which {USABLE:.0%} may be used. Read the "
                              "samples as you train: DataLoaders.from_datasets(train, valid, num_workers=2).")
        i = samples.changing("train", sets["train"], lengths["train"])
        if i is not None:
            raise ValueError(f"train: sample {i} is another one each time it is read: its random augmentation would be "
                             "frozen. Move it to transform= (of minifast.vision: augment=), which is called with each "
                             "training batch. If one version of each is meant, pass a list of the samples.")
        kept = [(first, _columns(name, sets[name], first, lengths[name], device, num_workers, verbose))
                for name, first in firsts.items()]
    finally:
        restore()
    if verbose:
        screen.say(f"in memory: {' + '.join(f'{n:,}' for n in lengths.values())} samples, "
                   f"{wanted / 1e6:,.1f} MB on {device}, read in {time.perf_counter() - began:.1f} s")
    return kept


def _n_bytes(sample: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(sample))


def _columns(name: str, data: Any, first: Any, n: int, device: torch.device, num_workers: int | None, verbose: bool
             ) -> list[Tensor]:
    """All samples, each tensor of a sample in a tensor (n, ...) on `device`."""
    at_once = max(1, min(MOST_AT_ONCE, MOST_BYTES // max(1, _n_bytes(first))))
    num_workers = _workers(name, data, n) if num_workers is None else num_workers
    num_workers = min(num_workers, -(-n // at_once))  # no more than there are parts to read
    loader = DataLoader(samples.Samples(name, data, first), at_once, num_workers=num_workers, collate_fn=_stacked)
    columns = [torch.empty((n, *tensor.shape), dtype=tensor.dtype, device=device) for tensor in tensors(first)]
    shown = screen.screen(n, BAR) if verbose else None
    done, next_look, iterator = 0, 0.0, None
    try:
        iterator = begin(loader)
        for batch in iterator:
            if isinstance(batch, str):
                raise ValueError(f"all samples must have one shape and dtype to be kept in memory. {batch}. Bring them "
                                 "to one form in the data set, or pass a DataLoader with a collate_fn.")
            for column, part in zip(columns, batch, strict=True):
                column[done:done + len(part)] = part
            done += len(batch[0])
            if shown is not None and shown.has_bar and time.perf_counter() >= next_look:
                shown.bar(done, f"reading {name}", "")
                next_look = time.perf_counter() + screen.REFRESH
    except Exception as error:
        explain(error, iterator)
        raise
    finally:
        end_workers(loader, iterator)
        if shown is not None:
            shown.close()
    return columns


def _workers(name: str, data: Any, n: int) -> int:
    began = time.perf_counter()
    samples.read(name, data, n - 1)
    if (time.perf_counter() - began) * n < SLOW:
        return 0
    return min(n_cpus(), MOST_WORKERS)


def _stacked(parts: list[list[Tensor] | str]) -> list[Tensor] | str:
    """The columns of some samples; the first text among them instead, which says how a sample differs."""
    odd = next((part for part in parts if isinstance(part, str)), None)
    return [torch.stack(column) for column in zip(*parts, strict=True)] if odd is None else odd
