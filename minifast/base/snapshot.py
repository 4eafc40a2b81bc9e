"""Everything a fit touches, kept in memory and put back bit for bit."""
import copy
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import check_int
from . import rng as random_state

Restore = Callable[[], object]


def capture(model: nn.Module, opt: Optimizer, generators: Iterable[Any] = ()) -> Restore:
    """Copy the state of `model`, `opt`, all global random generators and `generators`; returns what puts it back.

    Kept: parameters, buffers (persistent or not), gradients, `requires_grad`, the train/eval mode of every module,
    optimizer state and hyper-parameters. Parameters and buffers are restored in place: they stay the same objects.

    >>> model = nn.Linear(2, 1); opt = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> before = model.weight.detach().clone()
    >>> restore = capture(model, opt)
    >>> _ = model.weight.data.zero_(); opt.param_groups[0]["lr"] = 9.0
    >>> restore()
    >>> torch.equal(model.weight, before), opt.param_groups[0]["lr"]
    (True, 0.1)
    """
    try:
        parts = [_model(model), _optimizer(opt), rng(generators)]
    except (MemoryError, RuntimeError) as error:
        held = [*model.parameters(), *model.buffers(), *(value for values in opt.state.values()
                                                         for value in values.values() if isinstance(value, Tensor))]
        size = sum(tensor.numel() * tensor.element_size() for tensor in held) / 1e6
        error.add_note(f"in the copy of model and optimizer that is put back afterwards: it takes {size:,.0f} MB")
        raise

    def restore() -> None:
        for put_back in parts:
            put_back()
    return restore


def rng(generators: Iterable[Any] = ()) -> Restore:
    """Copy the state of all global random generators, and of `generators`; returns what puts it back."""
    generators = list(generators)
    return partial(random_state.restore, random_state.capture(generators), generators)


def seed_all(seed: Any) -> None:
    """Seed Python's, numpy's and torch's global generators with an int in 0 .. 2**32 - 1; ValueError otherwise."""
    seed = check_int("seed", seed, minimum=0, maximum=2**32 - 1)  # numpy's limit
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def modes(model: nn.Module) -> Restore:
    """Note the train/eval mode of every module; returns what puts it back."""
    noted = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in noted:
            module.training = training
    return restore


def _model(model: nn.Module) -> Restore:
    params = [(p, p.detach().clone(), p.requires_grad, clone(p.grad)) for p in model.parameters()]
    buffers = [(module, name, buffer, clone(buffer)) for module in model.modules()
               for name, buffer in module._buffers.items()]
    restore_modes = modes(model)

    @torch.no_grad()
    def restore() -> None:
        for p, value, requires_grad, grad in params:
            p.copy_(value)
            p.requires_grad_(requires_grad)
            p.grad = clone(grad)
        for module, name, buffer, value in buffers:
            if buffer is not None and not _is_expanded(buffer):
                buffer.copy_(value)
            module._buffers[name] = buffer  # a module may have put another tensor there
        restore_modes()
    return restore


def _optimizer(opt: Optimizer) -> Restore:
    state = {p: clone(values) for p, values in opt.state.items()}
    groups = [{key: copy.copy(value) for key, value in group.items()} for group in opt.param_groups]

    def restore() -> None:
        opt.state.clear()
        opt.state.update({p: clone(values) for p, values in state.items()})
        opt.param_groups[len(groups):] = []
        for group, kept in zip(opt.param_groups, groups, strict=True):
            group.clear()
            group.update({key: copy.copy(value) for key, value in kept.items()})
    return restore


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, as after `expand`: torch lets nobody write such a tensor in place."""
    return tensor.layout is torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def clone(value: Any) -> Any:
    """A copy of a nest that shares no tensor with it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(clone(inner) for inner in value)
    return copy.deepcopy(value)
