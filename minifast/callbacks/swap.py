"""The weights of a model by name, and others in their place for the length of a block."""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..machine.signals import DeferredInterrupt
from ..show.tables import listed

Slot = tuple[dict[str, Any], str]  # where a module keeps one of its tensors: it may put another one there
FINAL_WEIGHTS = "the weights that the fit ends with"  # what a callback owns (`owns`) that puts them into the model
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
        transient = module._non_persistent_buffers_set
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is None or id(tensor) in seen or (holder is module._buffers and name in transient):
                    continue
                seen.add(id(tensor))
                found[f"{prefix}.{name}" if prefix else name] = holder, name
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model` by name: the tensors themselves, without graph."""
    return {name: holder[key].detach() for name, (holder, key) in slots(model).items()}


@torch.no_grad()
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

    Costs a copy of its own for the time. Raises ValueError if `values` do not fit.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> with swapped(model, {"weight": torch.tensor([[3.0, 4.0]])}):
    ...     model(torch.ones(2)).item()
    7.0
    """
    kept = [(slot, slot[0][slot[1]]) for slot in slots(model).values()]
    copies = [tensor.detach().clone() for _, tensor in kept]
    try:
        put(model, values)
        yield
    finally:
        with DeferredInterrupt(is_held=True), torch.no_grad():  # Ctrl-C must not stop this half way
            for ((holder, key), tensor), copy in zip(kept, copies, strict=True):
                tensor.copy_(copy)
                holder[key] = tensor


def fingerprint(model: nn.Module) -> list[int]:
    """A number for each of the weights that is the same if all bits are, on whatever device. Waits for the device.

    It is the sum of the bits read as integers: that is exact in any order, and much cheaper than a copy.
    """
    sums = [_bits(tensor).sum(dtype=torch.int32 if tensor.element_size() == 4 else torch.int64)
            for tensor in weights(model).values()]
    return [] if not sums else torch.stack([number.to(sums[0].device, torch.int64) for number in sums]).tolist()


def _bits(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().view(_INTS[tensor.element_size()])
