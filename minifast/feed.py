"""One pass over a loader: its batches on the device, its errors explained, its workers ended."""
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from time import perf_counter

import torch

from .batches import Batch, to_device
from .overlap import SideStream
from .signals import DeferredInterrupt
from .waiting import Waiting
from .workers import bound_to_this_process, deaths_ignored, explain

BLINK = 1e-4  # seconds; a batch that comes within it was not waited for
END = object()


def feed(loader: Iterable[Batch], device: torch.device, limit: int | None, interrupt: DeferredInterrupt,
         what: str = "the data", first: int = 0, iterator: Iterator[Batch] | None = None,
         waiting: Waiting | None = None) -> Generator[Batch, None, None]:
    """The batches of one pass over `loader`, up to batch `limit`, on `device`. Close it: that ends its workers.

    first: how many batches of the pass are behind already, of which `iterator` is the rest. waiting: is told how long
    each batch was waited for.

    A batch is drawn when it is asked for, and none behind `limit`: what loader and model draw from the random
    generators comes in one order on every device. An error of the loader gains a note that counts the batch. One that
    comes after SIGINT or SIGTERM is the interrupt itself: worker processes get the signal too and die of it.
    """
    waiting = Waiting() if waiting is None else waiting
    if device.type == "cpu":  # batches come from loaders on the CPU: nothing to walk through
        return _drawn(loader, limit, interrupt, what, first, iterator, waiting)
    if device.type == "cuda":
        side = SideStream(device)
        return _moved(_drawn(loader, limit, interrupt, what, first, iterator, waiting, side.has_work), side)
    batches = _drawn(loader, limit, interrupt, what, first, iterator, waiting)
    return _moved(batches, lambda batch: to_device(batch, device))


def _moved(batches: Generator[Batch, None, None], move: Callable[[Batch], Batch]) -> Generator[Batch, None, None]:
    with closing(batches):
        for batch in batches:
            yield move(batch)


def _drawn(loader: Iterable[Batch], limit: int | None, interrupt: DeferredInterrupt, what: str, first: int,
           iterator: Iterator[Batch] | None, waiting: Waiting, has_work: Callable[[], bool] | None = None
           ) -> Generator[Batch, None, None]:
    """The batches as the loader gives them.

    has_work: whether the device still computes. While it does, nobody waits for a batch, however long the host takes
    to make one. Where it has run dry in the meantime, the whole time counts: when it ran dry is not known. On the CPU,
    where the process that loads is the one that computes, all of the time is exact.
    """
    count = first
    try:
        if limit is not None and first >= limit:
            return
        asked = perf_counter()
        iterator = begin(loader) if iterator is None else iterator
        while limit is None or count < limit:
            batch = next(iterator, END)  # not `for`: what an `__iter__` gives need not be iterable itself
            if batch is END:
                return
            came = perf_counter()
            if count == first:
                waiting.begin(came - asked)
            elif has_work is None or came - asked < BLINK or not has_work():
                waiting.waited += came - asked
            else:
                waiting.worked += came - asked
            yield batch
            count += 1
            asked = perf_counter()
            waiting.worked += asked - came
    except Exception as error:
        if interrupt.pending:
            # between two batches, as by `check`; without workers, half a batch may have drawn random numbers
            interrupt.was_raised = bool(getattr(loader, "num_workers", 0))
            raise interrupt.exception() from error
        error.add_note(f"while loading batch {count} of {what} ({type(loader).__name__})")
        explain(error, iterator)
        raise
    finally:
        # an error's traceback keeps the iterator, and with it the worker processes, alive for as long as it is kept
        end_workers(loader, iterator)


def end_workers(loader: Iterable[Batch], iterator: Iterator[Batch] | None) -> None:
    """End the worker processes of a pass over `loader`, unless they are to serve for more passes."""
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None and not getattr(loader, "persistent_workers", False):
        with deaths_ignored():
            shut_down()


@bound_to_this_process()
def begin(loader: Iterable[Batch]) -> Iterator[Batch]:
    """`iter(loader)`."""
    try:
        return iter(loader)
    except (RuntimeError, OSError):
        if getattr(loader, "_iterator", None) is None:
            raise
        loader._iterator = None  # type: ignore[attr-defined]  # persistent workers died, e.g. of Ctrl-C in a terminal
        return iter(loader)
