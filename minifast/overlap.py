"""Batches that are copied to a GPU while it computes."""
from functools import cache

import torch
from torch import Tensor

from .batches import Batch, to_device

# Bytes. The copy of a smaller tensor takes less time than the calls that would put it beside the computation, and CUDA
# takes up to 64 kB out of unpinned memory at once, however much work is queued.
WORTH = 2**16


class SideStream:
    """Moves batches to a CUDA device. Large tensors go on a stream of their own, beside the work that is queued.

    Nothing is read ahead: a batch is drawn from its loader where it always was, after the step before it was launched.
    That is early enough. The launches of a step return long before the GPU has done them, so the host draws the next
    batch while the GPU computes; and its copy does not queue up behind that computation, but runs at the same time.
    Drawing a batch earlier would win nothing more, but change the order of random numbers: batches would be other ones
    than on a CPU, and a resumed fit could not go on with the same bits.

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
        if tensor.device.type != "cpu" or not _is_plain(tensor) or tensor.nbytes < WORTH:
            return tensor.to(self._device, non_blocking=True)
        if self._current is None:
            self._current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copy = tensor.to(self._device, non_blocking=True)
        copy.record_stream(self._current)  # its memory serves no other copy before what uses it there is done
        return copy


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is one piece of memory; subclasses, sparse and nested tensors may hold several."""
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One stream for each device, for good: memory is kept by stream, and a new one would take as much again."""
    return torch.cuda.Stream(device)
