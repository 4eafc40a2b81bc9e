"""Batches of tensors that sit in memory."""
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..base.nest import describe
from ..errors import check_callable, check_device, check_flag, check_int, quoted

Transform = Callable[[tuple[Tensor, ...]], Any]


class TensorLoader:
    """Batches of tensors that already sit in memory, gathered whole: no worker, no collating sample by sample.

    tensors: each of shape (n, ...), dense, on one device, of any dtype: images stay uint8 until the batch.
    batch_size: samples a batch, >= 1.
    shuffle: a new permutation each epoch, a function of the global torch generator (or of `generator`, of whatever
        device) at the moment the epoch starts: the same one for data on a CPU and on a GPU.
    transform: called with the tuple of tensors of each batch, where they are, gives the batch; what it draws from
        global generators is no part of the order.
    device: moved there once, when constructed.
    drop_last: leave out the last, smaller batch.

    A batch is a copy, in order too: whoever writes into it changes neither the data nor another batch. `tensors` itself
    is not copied. Raises TypeError for what is no tensor; ValueError for tensors of different lengths or on different
    devices, sparse ones, and those that require grad.

    >>> loader = TensorLoader(torch.arange(5), torch.arange(5) * 10, batch_size=2)
    >>> len(loader), [y.tolist() for x, y in loader]
    (3, [[0, 10], [20, 30], [40]])
    """

    def __init__(self, *tensors: Tensor, batch_size: int = 64, shuffle: bool = False,
                 transform: Transform | None = None, device: torch.device | str | None = None,
                 drop_last: bool = False, generator: torch.Generator | None = None) -> None:
        _check(tensors)
        if transform is not None:
            check_callable("transform", transform, "a function of the tuple of tensors of a batch")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {quoted(generator)}.")
        self.tensors = tensors if device is None else _moved(tensors, check_device(device))
        devices = {str(tensor.device): None for tensor in self.tensors}
        if len(devices) > 1:
            raise ValueError(f"tensors must be on one device, got {', '.join(devices)}. Pass device=, to which all are "
                             "moved.")
        self.batch_size = check_int("batch_size", batch_size)
        self.shuffle = check_flag("shuffle", shuffle)
        self.drop_last = check_flag("drop_last", drop_last)
        self.transform, self.generator = transform, generator
        self.rank, self.world_size = 0, 1

    @property
    def dataset(self) -> TensorDataset:
        """The tensors as a data set, for who asks a loader for its `.dataset`: all samples, without `transform`."""
        return TensorDataset(*self.tensors)

    @property
    def n_samples(self) -> int:
        """How many samples one pass goes through; those that `drop_last` leaves out of the batches count."""
        n = len(self.tensors[0])
        return n // self.world_size if self.drop_last else math.ceil(n / self.world_size)

    def __len__(self) -> int:
        n = self.n_samples
        return n // self.batch_size if self.drop_last else math.ceil(n / self.batch_size)

    def shard(self, rank: int, world_size: int) -> "TensorLoader":
        """A loader of the same tensors for one of `world_size` processes, the `rank`-th (from 0) of them.

        Of the order of an epoch it takes every `world_size`-th sample from `rank` on: so the batches of all ranks
        together are those of one process with batches `world_size` times as large. All ranks get equally many samples
        and batches: the first ones of the order come once more at its end, or with drop_last the last are left out.

        Nothing is communicated: shuffling takes a `generator` with the same seed in all processes, of which the shard
        has a copy, as global ones drift apart. Raises ValueError for a `rank` that is not below `world_size`, for a
        shard of a shard, and for shuffling by the global generator.

        >>> loader = TensorLoader(torch.arange(5), batch_size=2)
        >>> [[x.tolist() for x, in loader.shard(rank, 2)] for rank in range(2)]
        [[[0, 2], [4]], [[1, 3], [0]]]
        """
        world_size = check_int("world_size", world_size)
        rank = check_int("rank", rank, 0, world_size - 1)
        if self.world_size > 1:
            raise ValueError(f"this is the shard {self.rank} of {self.world_size} already. Call shard() of the whole "
                             "loader.")
        if self.shuffle and self.generator is None:
            raise ValueError("shards of a loader that shuffles need one order in all processes. Pass "
                             "TensorLoader(..., generator=torch.Generator().manual_seed(0)), with one seed for all.")
        share = copy.copy(self)
        share.rank, share.world_size = rank, world_size
        if self.generator is not None:
            share.generator = torch.Generator(self.generator.device)
            share.generator.set_state(self.generator.get_state())
        return share

    def __iter__(self) -> Iterator[Any]:
        return self.iter_from(0)

    def iter_from(self, first: int) -> Iterator[Any]:
        """A pass that begins with batch `first` (0-based): what lies before it is skipped, not gathered.

        The order is drawn at once, from the generator as it is now.

        >>> [x.tolist() for x, in TensorLoader(torch.arange(5), batch_size=2).iter_from(1)]
        [[2, 3], [4]]
        """
        return self._batches(first, self._order())

    def _batches(self, first: int, order: Tensor | None) -> Iterator[Any]:
        # One index_select per tensor and batch is as fast as memory allows: measured beside fancy indexing (2 to 6
        # times slower), int32 indices, flat rows, out=, and several batches at once (slower, as they leave the cache).
        tensors, transform, size = self.tensors, self.transform, self.batch_size
        for start in range(first * size, len(self) * size, size):
            if order is None:
                batch = tuple([tensor[start:start + size].clone() for tensor in tensors])
            else:
                rows = order[start:start + size]
                batch = tuple([tensor.index_select(0, rows) for tensor in tensors])
            yield batch if transform is None else transform(batch)

    def _order(self) -> Tensor | None:
        """The indices of one pass, where the data is; None: all, from the first to the last."""
        if not self.shuffle and self.world_size == 1:
            return None
        n = len(self.tensors[0])
        order = self._permutation(n) if self.shuffle else torch.arange(n)
        if self.world_size > 1 and n:
            order = order.repeat(math.ceil(self.n_samples * self.world_size / n))[:self.n_samples * self.world_size]
            order = order[self.rank::self.world_size].contiguous()
        return order.to(self.tensors[0].device)

    def _permutation(self, n: int) -> Tensor:
        generator = self.generator
        if generator is None:  # as torch's RandomSampler: one draw from the global generator seeds the epoch's own
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        return torch.randperm(n, generator=generator, device=generator.device)

    def __repr__(self) -> str:
        parts = [*map(describe, self.tensors), f"batch_size={self.batch_size}", f"shuffle={self.shuffle}"]
        parts += ["drop_last=True"] if self.drop_last else []
        parts += [f"device='{self.tensors[0].device}'"] if self.tensors[0].device.type != "cpu" else []
        shard = f".shard({self.rank}, {self.world_size})" if self.world_size > 1 else ""
        return f"TensorLoader({', '.join(parts)}){shard}"


def _check(tensors: tuple[Any, ...]) -> None:
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        given = ", ".join(type(tensor).__name__ for tensor in tensors) or "none"
        hint = " Pass torch.from_numpy(array)." if "ndarray" in given else ""
        raise TypeError(f"TensorLoader takes tensors of shape (n, ...), got {given}.{hint}")
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise ValueError(f"tensors must have one length, got {lengths}. Each row is one sample.")
    for i, tensor in enumerate(tensors):
        if tensor.requires_grad:
            raise ValueError(f"tensors must be data, but number {i} requires grad: its graph would be kept for every "
                             "batch. Pass tensor.detach().")
        if tensor.layout is not torch.strided:
            raise ValueError(f"tensors must be dense, but number {i} is {tensor.layout}. Pass tensor.to_dense().")


def _moved(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    try:
        return tuple(tensor.to(device) for tensor in tensors)
    except (RuntimeError, MemoryError) as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
        error.add_note(f"while all {size:,.0f} MB of the tensors were moved to {device}. Without device= they stay "
                       "where they are, and a Learner moves each batch")
        raise
