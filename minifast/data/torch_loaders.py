"""Torch DataLoaders with the settings that most data sets want."""
import inspect
import multiprocessing
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from ..errors import check_flag, check_int
from ..machine.limits import MOST_WORKERS, n_cpus

OF_TRAINING = ("shuffle", "sampler", "drop_last")  # options that say which samples are trained on, and in which order
OF_WORKERS = ("multiprocessing_context", "persistent_workers", "prefetch_factor", "timeout", "in_order")


def train_loader(dataset: Any, batch_size: int, num_workers: int | None, **options: Any) -> "DataLoader[Any]":
    """A shuffling DataLoader over `dataset`. What `options` do not say is as in `DataLoaders.from_datasets`."""
    if not isinstance(dataset, IterableDataset):
        options.setdefault("shuffle", options.get("sampler") is None)
        # a last batch of one: BatchNorm cannot take statistics of it
        options.setdefault("drop_last", len(dataset) > batch_size and len(dataset) % batch_size == 1)
    return _loader(dataset, batch_size, num_workers, options)


def valid_loader(dataset: Any, batch_size: int, num_workers: int | None, **options: Any) -> "DataLoader[Any]":
    """A DataLoader over all of `dataset` in its order."""
    return _loader(dataset, batch_size, num_workers, {k: v for k, v in options.items() if k not in OF_TRAINING})


def check_options(batch_size: int, num_workers: int | None, options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for what the loaders of two data sets cannot have."""
    check_int("batch_size", batch_size)
    if num_workers is not None:
        check_int("num_workers", num_workers, minimum=0)
    known = inspect.signature(DataLoader.__init__).parameters.keys() - {"self", "dataset"}
    unknown = options.keys() - known
    if unknown:
        raise TypeError(f"there is no argument {', '.join(sorted(unknown))}. from_datasets takes batch_size, "
                        "num_workers and those of torch's DataLoader.")
    for name in ("shuffle", "drop_last", "pin_memory", "persistent_workers"):
        if name in options:
            check_flag(name, options[name])
    if options.get("batch_sampler") is not None:
        raise ValueError("batch_sampler says what batch_size and shuffle say. Make the DataLoader yourself, and pass "
                         "it to DataLoaders(train, valid).")


def default_workers(dataset: Any, is_forking: bool) -> int:
    """How many worker processes a DataLoader over `dataset` gets if nobody says.

    0 for what is in memory already, where handing batches over costs more than making them; for an IterableDataset,
    of which each worker would read all; and where workers are not forked: there a data set has to go through pickle,
    and a script needs `if __name__ == "__main__":`.

    >>> default_workers(TensorDataset(torch.zeros(3)), is_forking=True)
    0
    """
    if is_in_memory(dataset) or isinstance(dataset, IterableDataset) or not is_forking:
        return 0
    return min(n_cpus() - 1, MOST_WORKERS)


def is_in_memory(dataset: Any) -> bool:
    """Whether the samples of `dataset` are there without reading: tensors, a list, or a part of them.

    >>> is_in_memory(Subset(TensorDataset(torch.zeros(3)), [0, 2])), is_in_memory([1, 2]), is_in_memory(range(9))
    (True, True, False)
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return isinstance(dataset, (TensorDataset, list, tuple))


def _loader(dataset: Any, batch_size: int, num_workers: int | None, options: dict[str, Any]) -> "DataLoader[Any]":
    options.setdefault("pin_memory", torch.cuda.is_available())
    if num_workers is None:
        num_workers = default_workers(dataset, _is_forking(options))
        if num_workers == 0:  # torch refuses what is of no use without workers
            options = {name: value for name, value in options.items() if name not in OF_WORKERS}
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, **options)


def _is_forking(options: Mapping[str, Any]) -> bool:
    """Whether workers are forked if nobody changes that; asking does not settle it."""
    if options.get("multiprocessing_context") is not None:
        return True  # whoever says how to start them wants them
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork"
