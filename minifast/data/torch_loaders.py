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
    options = {name: value for name, value in options.items() if name not in OF_TRAINING}
    return _loader(dataset, batch_size, num_workers, options)


def check_options(batch_size: int, num_workers: int | None, options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for what the loaders of two data sets cannot have."""
    check_int("batch_size", batch_size)
    if num_workers is not None:
        check_int("num_workers", num_workers, minimum=0)
    known = inspect.signature(DataLoader.__init__).parameters.keys() - {"self", "dataset"}
    if unknown := options.keys() - known:
        raise TypeError(f"there is no argument {', '.join(sorted(unknown))}. from_datasets takes batch_size, "
                        "num_workers and those of torch's DataLoader.")
    for name in ("shuffle", "drop_last", "pin_memory", "persistent_workers"):
        check_flag(name, options.get(name, False))
    if options.get("batch_sampler") is not None:
        raise ValueError("batch_sampler says what batch_size and shuffle say. Make the DataLoader yourself, and pass "
                         "it to DataLoaders(train, valid).")


def _loader(dataset: Any, batch_size: int, num_workers: int | None, options: dict[str, Any]) -> "DataLoader[Any]":
    options.setdefault("pin_memory", torch.cuda.is_available())
    if num_workers is None:
        num_workers = _default_workers(dataset, options)
        if num_workers == 0:  # torch refuses what is of no use without workers
            options = {name: value for name, value in options.items() if name not in OF_WORKERS}
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, **options)


def _default_workers(dataset: Any, options: Mapping[str, Any]) -> int:
    """How many worker processes load if nobody says.

    0 for what is in memory already, where handing batches over costs more than making them; for an IterableDataset,
    of which each worker would read all; and where workers are not forked: there a data set has to go through pickle,
    and a script needs `if __name__ == "__main__":`.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, (TensorDataset, list, tuple, IterableDataset)):
        return 0
    # asked so that it is not settled; whoever says how to start workers wants them
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    is_wanted = options.get("multiprocessing_context") is not None or method == "fork"
    return min(n_cpus() - 1, MOST_WORKERS) if is_wanted else 0
