"""Convolutions in the memory format that accelerators prefer."""
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.nest import map_tensors
from ..core.callback import Callback, Order
from ..core.state import State


@dataclass(eq=False)
class ChannelsLast(Callback):
    """Keeps images and convolutions in `torch.channels_last` during the fit: the order that fast kernels work in.

    Parameters and buffers with 4 dimensions, their optimizer state, and all tensors of a batch with 4 dimensions.
    Only the order in memory changes, so results are equal within rounding; at the end of the fit, model and optimizer
    are put back, without a change of their values.

    >>> ChannelsLast()
    ChannelsLast()
    """

    order = Order.SETUP

    def before_fit(self, state: State) -> None:
        held = [*state.model.parameters(), *state.model.buffers()]
        self._moved = [tensor for tensor in held if tensor.ndim == 4 and _is_plain(tensor)]
        self._opt = state.opt
        self._move(torch.channels_last)

    def before_batch(self, state: State) -> None:
        state.batch = map_tensors(_to_channels_last, state.batch)

    def before_valid_batch(self, state: State) -> None:
        state.batch = map_tensors(_to_channels_last, state.batch)

    def after_fit(self, state: State) -> None:
        self._move(torch.contiguous_format)
        del self._moved, self._opt

    def _move(self, memory_format: torch.memory_format) -> None:
        for tensor in self._moved:
            values = self._opt.state.get(tensor, {})
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    values[name] = value.contiguous(memory_format=memory_format)
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous()


def _to_channels_last(tensor: Tensor) -> Tensor:
    is_image = tensor.ndim == 4 and tensor.layout is torch.strided
    return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor
