"""A loader in the middle of a pass: how it is brought back to where a fit was killed.

A user's loader is never wrapped. What is known is the state of the random generators when the pass began. From there
the pass is begun again and brought forward, by the cheapest way that gives the same batches:

    state    the loader has `state_dict` and `load_state_dict`: it does it by itself
    skip     a TensorLoader or a sequence of batches: it begins at the batch that is wanted
    indices  a DataLoader of torch's without workers, whose sampler draws all that it needs when the pass begins: the
             indices are drawn, no sample is read
    draw     anything else: batches are drawn and dropped. Whether they are the same is seen by the last one of them.

Some loaders remember over passes what no one can ask for: a sampler that counts epochs, a stream that goes on where
it ended. For them a pass is begun again even if it was over, and whether it is the same is seen by its first batch.
"""
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils import data as torch_data
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..base.batch import Batch
from ..base.nest import tensors
from ..data.feed import begin, end_workers
from ..data.tensor_loader import TensorLoader
from ..machine.signals import DeferredInterrupt

AT_ONCE = (torch_data.SequentialSampler, torch_data.RandomSampler, torch_data.SubsetRandomSampler,
           torch_data.WeightedRandomSampler)  # they draw all that they need when the pass begins


def way(loader: Iterable[Batch]) -> str:
    """How `loader` is brought forward: "state", "skip", "indices" or "draw".

    >>> way([1, 2]), way(DataLoader([1, 2])), way(DataLoader([1, 2], num_workers=1)), way(iter([1, 2]))
    ('skip', 'indices', 'draw', 'draw')
    """
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return "state"
    if type(loader) in (list, tuple) or (
            isinstance(loader, TensorLoader) and type(loader).__iter__ is TensorLoader.__iter__):
        return "skip"
    if (isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__ and loader.num_workers == 0
            and not isinstance(loader.dataset, IterableDataset) and _draws_at_once(loader)):
        return "indices"
    return "draw"


def _draws_at_once(loader: "DataLoader[Any]") -> bool:
    """Whether no index depends on random numbers that are drawn while the pass goes on."""
    sampler: Any = loader.sampler
    if loader.batch_sampler is not None:
        if type(loader.batch_sampler) is not BatchSampler:
            return False
        sampler = loader.batch_sampler.sampler
    return type(sampler) in AT_ONCE


def remembers(loader: Iterable[Batch]) -> bool:
    """Whether the batches of a pass may depend on the passes before it, in a way that the loader cannot tell.

    >>> remembers(DataLoader([1, 2], num_workers=1)), remembers(DataLoader([1, 2], sampler=[1, 0]))
    (False, True)
    """
    if way(loader) != "draw":
        return False
    if getattr(loader, "persistent_workers", False) or type(loader).__iter__ is not DataLoader.__iter__:
        return True
    assert isinstance(loader, DataLoader)
    if isinstance(loader.dataset, IterableDataset):
        return loader.num_workers == 0  # worker processes get a new copy in each pass
    return not _draws_at_once(loader)


def digest(batch: Batch) -> str | None:
    """A number that two batches share if all bits of their tensors are the same; None if there is no tensor.

    >>> digest((torch.ones(2), "text")) == digest((torch.ones(2), "other"))
    True
    """
    hasher, found = hashlib.blake2b(digest_size=8), list(tensors(batch))
    for tensor in found:
        plain = tensor.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
        hasher.update(repr((plain.dtype, tuple(plain.shape))).encode())
        hasher.update(plain.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest() if found else None


class Pass(NamedTuple):
    """A pass that was begun again."""

    iterator: Iterator[Batch]
    first: str | None = None  # the `digest` of its first batch, and of the newest, where batches were drawn
    last: str | None = None


def forward(loader: Any, n_done: int, interrupt: DeferredInterrupt) -> Pass:
    """Begin a pass and bring it behind its batch `n_done`; there are no digests if it ends before.

    Call it with the random generators as they were when the pass began.
    """
    kind = way(loader)
    if kind == "skip":
        return Pass(loader.iter_from(n_done) if isinstance(loader, TensorLoader) else iter(loader[n_done:]))
    iterator = begin(loader)
    if kind == "indices":
        for _ in islice(iterator._sampler_iter, n_done):  # type: ignore[attr-defined]
            interrupt.check()
    if kind in ("indices", "state"):  # the state was loaded before
        return Pass(iterator)
    first = batch = None
    try:
        for i in range(n_done):
            interrupt.check()
            batch = next(iterator)
            first = digest(batch) if i == 0 else first
    except StopIteration:
        return Pass(iterator)
    except BaseException:
        leave(loader, iterator)
        raise
    return Pass(iterator, first, digest(batch))


def leave(loader: Iterable[Batch], iterator: Iterator[Batch]) -> None:
    """End a pass in the middle."""
    end_workers(loader, iterator)
    close = getattr(iterator, "close", None)  # of a generator
    if close is not None:
        close()
