"""One pass over a loader: its batches on the device, its errors explained, its workers ended."""
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import cache
from time import perf_counter

import torch
from torch import Tensor

from ..base.batch import Batch
from ..base.nest import describe, to_device
from ..machine.signals import DeferredInterrupt
from ..machine.workers import bound_to_this_process, deaths_ignored, explain
from .waiting import Waiting

BLINK = 1e-4  # seconds; a batch that comes within it was not waited for
END = object()


def feed(loader: Iterable[Batch], device: torch.device, limit: int | None = None,
         interrupt: DeferredInterrupt | None = None, what: str = "the data", first: int = 0,
         iterator: Iterator[Batch] | None = None, waiting: Waiting | None = None,
         noted: Callable[[Batch], None] | None = None) -> Generator[Batch, None, None]:
    """The batches of one pass over `loader` on `device`. Close it: that ends its workers.

    limit: the batch to stop before.
    interrupt: an error of the loader that comes after its signal is the interrupt itself: worker processes get the
        signal too and die of it. Any other gains a note that counts the batch.
    what: the name of the data in that note.
    first: how many batches of the pass are behind already, of which `iterator` is the rest.
    waiting: is told how long each batch was waited for.
    noted: is given each batch as it came from the loader.

    A batch is drawn when it is asked for, and none behind `limit`; the loader's `batch_transform`, a function
    batch -> batch, is then called with it on the device. So all random numbers come in one order on every device, and
    a resumed fit goes on with the same ones.
    """
    waiting = Waiting() if waiting is None else waiting
    side = SideStream(device) if device.type == "cuda" else None
    transform = getattr(loader, "batch_transform", None)
    count = first
    try:
        asked = perf_counter()
        while limit is None or count < limit:
            try:
                iterator = begin(loader) if iterator is None else iterator
                batch = next(iterator, END)  # not `for`: what an `__iter__` gives need not be iterable itself
            except Exception as error:
                if interrupt is not None and interrupt.pending:
                    # between two batches, as by `check`; without workers, half a batch may have drawn random numbers
                    interrupt.was_raised = bool(getattr(loader, "num_workers", 0))
                    raise interrupt.exception() from error
                error.add_note(f"while loading batch {count} of {what} ({type(loader).__name__})")
                explain(error, iterator)
                raise
            if batch is END:
                return
            came = perf_counter()
            if count == first:
                waiting.begin(came - asked)
            elif side is None or came - asked < BLINK or not side.has_work():
                # exact on the CPU, which also computes; of a GPU that has run dry nobody knows when it did
                waiting.waited += came - asked
            else:  # while the device computes nobody waits, however long the host takes to make a batch
                waiting.worked += came - asked
            if noted is not None:
                noted(batch)
            if side is not None:
                batch = side(batch)
            elif device.type != "cpu":  # batches come from loaders on the CPU: nothing to walk through
                batch = to_device(batch, device)
            yield batch if transform is None else _transformed(transform, what, batch)
            count += 1
            asked = perf_counter()
            waiting.worked += asked - came
    finally:
        # an error's traceback keeps the iterator, and with it the worker processes, alive for as long as it is kept
        end_workers(loader, iterator)


def first_batch(loader: Iterable[Batch], device: torch.device) -> Batch:
    """The first batch of a pass over `loader`, as `feed` gives it; None if there is none."""
    with closing(feed(loader, device, 1)) as batches:
        return next(batches, None)


def _transformed(transform: Callable[[Batch], Batch], what: str, batch: Batch) -> Batch:
    try:
        return transform(batch)
    except Exception as error:
        error.add_note(f"in the batch_transform of {what}, called with {describe(batch)}")
        raise


def end_workers(loader: Iterable[Batch], iterator: Iterator[Batch] | None) -> None:
    """End the worker processes of a pass over `loader`, unless they are to serve for more passes."""
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None and not getattr(loader, "persistent_workers", False):
        with deaths_ignored():
            shut_down()


@bound_to_this_process()
def begin(loader: Iterable[Batch]) -> Iterator[Batch]:
    try:
        return iter(loader)
    except (RuntimeError, OSError):
        if getattr(loader, "_iterator", None) is None:
            raise
        loader._iterator = None  # type: ignore[attr-defined]  # persistent workers died, e.g. of Ctrl-C in a terminal
        return iter(loader)


# Bytes. The copy of a smaller tensor takes less time than the calls that would put it beside the computation, and CUDA
# takes up to 64 kB out of unpinned memory at once, however much work is queued.
WORTH = 2**16


class SideStream:
    """Moves batches to a CUDA device. Large tensors go on a stream of their own, beside the work that is queued.

    Nothing is read ahead: the launches of a step return long before the GPU has done them, so the host draws the next
    batch while the GPU computes. Drawing it earlier would win nothing, but change the order of random numbers.

    Copies out of unpinned memory, too: they make the host wait for the copy alone, not for all that was queued before.
    What moves itself, by a `.to` of its own, does so on the current stream: nobody knows which memory it holds.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._copied = device, _side(device), torch.cuda.Event()
        self._current: torch.cuda.Stream | None = None  # the one that waits, while a batch has copies under way

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, for work on the current stream; the host does not wait."""
        self._current = None
        batch = to_device(batch, self._device, self._copy)
        if self._current is not None:
            self._copied.record(self._stream)
            self._current.wait_event(self._copied)
        return batch

    def has_work(self) -> bool:
        """Whether the device has anything left to do. It is asked, not waited for."""
        return not torch.cuda.current_stream(self._device).query()

    def _copy(self, tensor: Tensor) -> Tensor:
        # subclasses, sparse and nested tensors may hold several pieces of memory
        is_one_piece = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested
        if tensor.device.type != "cpu" or not is_one_piece or tensor.nbytes < WORTH:
            return tensor.to(self._device, non_blocking=True)
        if self._current is None:
            self._current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copy = tensor.to(self._device, non_blocking=True)
        copy.record_stream(self._current)  # its memory serves no other copy before what uses it there is done
        return copy


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One stream for each device, for good: memory is kept by stream, and a new one would take as much again."""
    return torch.cuda.Stream(device)
