"""The weights of a model by name, others in their place for a block, and the BatchNorm statistics of those."""
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..base import snapshot
from ..base.batch import call_model
from ..core.checks import check_passes
from ..core.state import State
from ..data.feed import feed
from ..data.loader import generators
from ..machine.signals import DeferredInterrupt
from ..show.tables import listed

Slot = tuple[dict[str, Any], str]  # where a module keeps one of its tensors: it may put another one there
FINAL_WEIGHTS = "the weights that the fit ends with"  # what a callback owns that puts them into the model
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def slots(model: nn.Module) -> dict[str, Slot]:
    """Where `model` keeps its weights: parameters and persistent buffers by their name in the state dict.

    What is shared (tied weights) is there once, by its first name.

    >>> list(slots(nn.BatchNorm1d(2, affine=False)))
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    found: dict[str, Slot] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            transient = module._non_persistent_buffers_set if holder is module._buffers else ()
            for name, tensor in holder.items():
                if tensor is not None and id(tensor) not in seen and name not in transient:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = holder, name
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model` by name: the tensors themselves, without graph."""
    return {name: holder[key].detach() for name, (holder, key) in slots(model).items()}


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the weights of `model`, in place: whoever holds these tensors sees it.

    Raises ValueError that names what does not fit, and then changes nothing.
    """
    own = weights(model)
    problems = [f"{kind} {listed(names)}" for kind, names in (
        ("no values for", [name for name in own if name not in values]),
        ("no place for", [name for name in values if name not in own]),
        ("another shape of", [f"{name} {tuple(values[name].shape)} for {tuple(tensor.shape)}"
                              for name, tensor in own.items()
                              if name in values and values[name].shape != tensor.shape])) if names]
    if problems:
        raise ValueError(f"these weights are not those of this model ({type(model).__name__}): {'; '.join(problems)}.")
    for name, tensor in own.items():
        tensor.copy_(values[name])


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which `model` has the weights `values`; then its own again, bit for bit, however the block ends.

    The values are exchanged in place, where the state dict, a compiled form of the model and callbacks see them too;
    `torch.func.functional_call` reaches only who calls the model. Costs a copy of the model's own for the time. Raises
    ValueError if `values` do not fit.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> with swapped(model, {"weight": torch.tensor([[3.0, 4.0]])}):
    ...     model(torch.ones(2)).item()
    7.0
    """
    own = slots(model)
    raw = {name: tensor.clone() for name, tensor in weights(model).items()}
    # no parameter is held: a sharded model puts others in their slots. Buffers are: forward may replace them for good
    buffers = [(holder, key, holder[key]) for holder, key in own.values() if not isinstance(holder[key], nn.Parameter)]
    try:
        put(model, values)
        yield
    finally:
        with DeferredInterrupt(is_held=True):  # Ctrl-C must not stop this half way
            for holder, key, buffer in buffers:
                holder[key] = buffer
            for name, (holder, key) in own.items():
                holder[key].detach().copy_(raw[name])


def fingerprint(model: nn.Module) -> list[int]:
    """A number for each of the weights that is the same if all bits are, on whatever device. Waits for the device.

    It is the sum of the bits read as integers: exact in any order, and much cheaper than a copy.
    """
    sums = []
    for tensor in weights(model).values():
        bits = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous()
        bits = bits.view(_INTS[bits.element_size()])
        sums.append(bits.sum(dtype=torch.int32 if bits.element_size() == 4 else torch.int64))
    return [] if not sums else torch.stack([number.to(sums[0].device, torch.int64) for number in sums]).tolist()


def norms_to_update(state: State) -> list[_BatchNorm]:
    """The BatchNorm layers that keep statistics and are not frozen."""
    frozen = set(state.norms_in_eval)
    return [module for module in state.model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module not in frozen]


@torch.no_grad()
def update_norms(state: State) -> None:
    """Compute the statistics of BatchNorm layers anew: the mean over the batches of one pass over the training data.

    As torch's `update_bn`, which knows no frozen layers and no `unpack`, and puts nothing back after an error.
    Raises what loader and model raise, ValueError for a pass without batches, and KeyboardInterrupt.
    """
    norms = norms_to_update(state)
    if not norms:
        return
    restore_modes, restore_rng = snapshot.modes(state.model), snapshot.rng(generators(state.train_dl))
    momenta = [norm.momentum for norm in norms]
    try:
        state.model.train()
        for frozen in state.norms_in_eval:
            frozen.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        n = 0
        with closing(feed(state.train_dl, state.device, state.source.limit, state.interrupt)) as batches:
            for n, batch in enumerate(batches, 1):  # noqa: B007
                call_model(state.forward, state.unpack(batch)[0])
                state.interrupt.check()
        check_passes("training", n)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        restore_modes()
        restore_rng()
