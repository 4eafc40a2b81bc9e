"""What can be captured in a graph, and what a graph that was captured takes for granted."""
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import map_tensors
from .state import State

PLAIN = (int, float, bool, str, bytes, type(None))


class Unfit(Exception):
    """What cannot be captured; the message says why."""


class ModelForm:
    """What a captured graph takes for granted about the modules of model and loss."""

    def __init__(self, state: State) -> None:
        parts = [part for part in (state.model, state.loss_func) if isinstance(part, nn.Module)]
        self.modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
        self.params = list(dict.fromkeys(p for part in parts for p in part.parameters()))
        self.buffers = [(module._buffers, name) for module in self.modules for name in module._buffers]
        self.numbers = [(vars(module), name) for module in self.modules for name, value in vars(module).items()
                        if type(value) is float]
        self.hooks = [hooks for module in self.modules for hooks in (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)]

    def fingerprint(self, state: State) -> list[Any]:
        """What is different if a graph that was captured then may not be replayed now."""
        return [state.forward, state.loss_func, any(self.hooks),
                *[p.data_ptr() for p in self.params], *[p.requires_grad for p in self.params],
                *[None if (tensor := held.get(name)) is None else tensor.data_ptr() for held, name in self.buffers],
                *[held.get(name) for held, name in self.numbers],
                *[module.training for module in self.modules]]

    def check(self) -> None:
        """Raise Unfit for modules that a graph would cut off from their Python code."""
        for module in self.modules:
            name = type(module).__name__
            if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                raise Unfit(f"the model is in {name}")
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise Unfit("the model is compiled")
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or (
                    module._backward_pre_hooks):
                raise Unfit(f"there is a hook on {name}, which would not be called")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.params):
            raise Unfit("there is a hook on a parameter, which would not be called")

    def held(self) -> list[Tensor]:
        """The tensors that modules hold now, such as masks that are made when they are first used."""
        return [value for module in self.modules for value in (*vars(module).values(), *module._buffers.values())
                if isinstance(value, Tensor)]


def signature(nest: Any, device_type: str) -> Any:
    """What is the same for batches that one graph can run; raises Unfit for one that no graph can.

    >>> signature((torch.zeros(2, 3), "a"), "cpu")
    (<class 'tuple'>, (torch.Size([2, 3]), torch.float32), (<class 'str'>, 'a'))
    """
    kind = type(nest)
    if isinstance(nest, Tensor):
        if kind not in (Tensor, nn.Parameter) or nest.layout is not torch.strided or nest.requires_grad or (
                nest.device.type != device_type):
            raise Unfit(f"a batch holds a {kind.__name__} that is sparse, on another device, needs a gradient, or is "
                        "of a class of its own")
        return nest.shape, nest.dtype
    if kind in PLAIN:
        return kind, nest
    if isinstance(nest, Mapping):
        return kind, *[(key, signature(value, device_type)) for key, value in nest.items()]
    if isinstance(nest, (tuple, list)):
        return kind, *[signature(value, device_type) for value in nest]
    if is_dataclass(nest) and not isinstance(nest, type):
        return kind, *[signature(getattr(nest, part.name), device_type) for part in fields(nest)]
    raise Unfit(f"a batch, or the model's output, holds a {kind.__name__}, and nobody knows which tensors are in it")


def unfit_output(state: State) -> str:
    """Why what a batch gave cannot be copied out of a graph; "" if it can."""
    try:
        signature(map_tensors(Tensor.detach, state.pred), state.device.type)
    except Unfit as why:
        return str(why)
    sparse = any(p.grad is not None and p.grad.layout is not torch.strided for p in state.model.parameters())
    return "there are sparse gradients" if sparse else ""
