"""A stand-in for CUDA graphs on the CPU: what operators did is written down, and done again in the same memory."""
import random

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class Tape:
    """What `minifast.graph.capturing` gives, for the CPU.

    Like a CUDA graph it runs no Python code in a replay: operators are called again with the tensors of the capture,
    and leave their results in the tensors of the capture. Unlike one, it cannot write without doing: so a capture is
    undone. The host may not read from a tensor in it.
    """

    def __init__(self):
        self.n_run = self.n_watched = self.n_captured = self.n_replayed = 0

    def run(self, work):
        self.n_run += 1
        work()

    def watch(self, work):
        self.n_watched += 1
        before, reads = (random.getstate(), np.random.get_state()[1].tobytes()), Reads()
        with reads:
            work()
        if reads.n:
            return "the model or the loss waits for the device, by .item(), a mask or the like"
        changed = (random.getstate(), np.random.get_state()[1].tobytes()) != before
        return "the model or the loss draws random numbers on the host" if changed else ""

    def capture(self, work):
        rng, recording = torch.get_rng_state(), Recording()
        try:
            with recording:
                work()
        finally:
            torch.set_rng_state(rng)  # as on a device, where nothing has been drawn
            recording.undo()
        self.n_captured += 1

        def replay():
            self.n_replayed += 1
            recording.replay()
        return replay


class Reads(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(kwargs[argument.name])
        if func.namespace == "aten" and func._schema.name == "aten::native_batch_norm" and args[5]:
            self._keep([args[3], args[4]])  # it writes its statistics without saying so
        out = func(*args, **kwargs)
        # detached: autograd gives its tensors a life of their own, the memory is what counts
        plain = tree_map_only(Tensor, Tensor.detach, (args, kwargs, out))
        self.calls.append((func, *plain))
        return out

    def _keep(self, value):
        for tensor in tree_flatten(value)[0]:
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in self.before:
                self.before[tensor.data_ptr()] = tensor.detach(), tensor.detach().clone()

    @torch.no_grad()
    def undo(self):
        for tensor, value in reversed(self.before.values()):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for old, value in zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)
