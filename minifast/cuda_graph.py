"""Work on a CUDA device, captured once and replayed: what is torch's and the driver's of it.

What is here has to be so, and is nowhere else:

* Everything runs on one side stream, first eagerly, then captured, as torch asks for: there, libraries make their
  workspaces and choose their kernels, and autograd ties each parameter's gradient to the stream of its forward pass.
  Each use begins by waiting for the caller's stream and ends with the caller's waiting for it, on the device. So
  memory that either of them frees and takes up again is never used by both at once.
* The capture is `thread_local`: a thread that pins memory for a DataLoader must not break it, nor be broken by it.
* A capture that was broken off leaves torch's allocator in it, which then keeps memory that other streams have used,
  and in some versions the random generator, which then refuses to draw. Both are put right.
"""
import random
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np
import torch

Work = Callable[[], None]

# Of captures that were broken off: the allocator may still ask them whether they go on.
_broken: list[torch.cuda.CUDAGraph] = []


class CudaCapture:
    """Runs and captures work on the CUDA device `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device)

    def run(self, work: Work) -> None:
        """Run `work` eagerly where it will be captured."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            caller.wait_stream(self._stream)

    def watch(self, work: Work) -> str:
        """Run `work` eagerly; gives what would be wrong with it in a replay: "" if nothing was seen."""
        before, mode = _host_rng(), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.run(work)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = False
        for warning in caught:
            if "called a synchronizing CUDA operation" in str(warning.message):
                waits = True
            elif "ynchronization debug mode" not in str(warning.message):  # torch says that it is new
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if waits:
            return "the model or the loss waits for the device, by .item(), a mask or the like"
        return "the model or the loss draws random numbers on the host" if _host_rng() != before else ""

    def capture(self, work: Work) -> Work:
        """Record what `work` launches, without running it; gives what replays it on the caller's stream.

        Raises whatever ended the capture; the device is then as it was before.
        """
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[self._stream.device_index]
        kept, mode = generator.clone_state(), torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")  # before a capture the host waits for the device once
        try:
            # this block leaves the stream even where the inner one fails to
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, pool, self._stream,
                                                                   capture_error_mode="thread_local"):
                work()
        except BaseException:
            self._give_up(graph, pool)
            generator.graphsafe_set_state(kept)
            raise
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return graph.replay

    def _give_up(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        _broken.append(graph)
        with suppress(Exception):
            graph.reset()
        with suppress(Exception):  # it raises where the capture was ended in order
            torch._C._cuda_endAllocateToPool(self._stream.device_index, pool)
            torch._C._cuda_releasePool(self._stream.device_index, pool)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: libraries keep a workspace for every stream that they have worked on."""
    return torch.cuda.Stream(device)


def _host_rng() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, np.asarray(keys).tobytes(), rest, torch.get_rng_state().numpy().tobytes()
