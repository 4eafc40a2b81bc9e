"""The formats that accelerators are fast with: half precision, and channels last."""
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.nest import map_tensors, tensors
from ..core.callback import Callback, CancelBatch, Order
from ..core.state import State

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**16  # GradScaler's own
MIN_SCALE = 2.0**-16  # what overflows here is finite at no scale; 32 overflows in a row lead here from 2**16


@dataclass(eq=False)
class MixedPrecision(Callback):
    """Runs the model in half precision where that is safe, by `torch.autocast`; weights and optimizer stay float32.

    precision: "bf16", or "fp16" for devices without bfloat16. The model's outputs are converted to float32, in fits,
    validation and predictions alike: so the loss, metrics and what `get_preds` returns are computed in float32. Left
    as they are: outputs that are no nest of tensors (a plain object with attributes), and tensors of float64.

    bf16 needs no loss scaling. fp16 multiplies the loss by the scale of a `torch.amp.GradScaler`, kept as `scaler` over
    all fits and in `state_dict`; recorded losses and the gradients that clipping sees are unscaled. An update whose
    gradients overflow is skipped like a cancelled batch and the scale is halved: to know that, the host waits for the
    device once per update. At a scale of 2**-16 the update is made: what overflows there is finite at no scale.

    Given to the Learner, it holds for `validate`, `get_preds` and `predict`, too; there a model compiled by `compile=`
    is called in its own precision by `validate`. Raises ValueError for another precision, and before the fit for a
    device that lacks it, or for weights in float16.

    >>> MixedPrecision("bf16")
    MixedPrecision(precision='bf16')
    """

    precision: str = "bf16"

    order = Order.SETUP  # unscales before anyone looks at the gradients
    owns = ("the precision",)  # one of them in a fit
    in_lr_find = True

    def __post_init__(self) -> None:
        if not isinstance(self.precision, str) or self.precision not in DTYPES:
            raise ValueError(f'precision must be "bf16" or "fp16", got {self.precision!r:.80}.')
        self.scaler: torch.amp.GradScaler | None = None
        self._checked: set[str] = set()  # devices on which it works
        self._saved: dict[str, Any] | None = None  # what a scaler that is not made yet begins with

    def before_fit(self, state: State) -> None:
        forward, device = state.forward, state.device.type  # not the state itself, which would hold this function
        self._check(device)

        def in_autocast(*args: Any, **kwargs: Any) -> Any:
            with self._autocast(device):
                return to_float32(forward(*args, **kwargs))
        state.forward = in_autocast
        if self.precision == "fp16":
            half = next((name for name, p in state.model.named_parameters() if p.dtype is torch.float16), None)
            if half is not None:
                raise ValueError(f'MixedPrecision("fp16") needs weights in float32, but {half} is float16. Call '
                                 "model.float() before the Learner is made.")
            self._one = torch.ones((), device=state.device)
            if self.scaler is None:
                self.scaler = torch.amp.GradScaler(state.device.type)
                if self._saved is not None:
                    self.scaler.load_state_dict(self._saved)
            self._scale = self.scaler.get_scale()

    def before_batch(self, state: State) -> None:
        if self.scaler is not None:
            state.window.loss_scale = self.scaler.scale(self._one)

    def after_loss(self, state: State) -> None:
        if state.loss.dtype in DTYPES.values():  # the loss function computes in half precision
            state.loss = state.loss.float()

    def before_step(self, state: State) -> None:
        if self.scaler is None:
            return
        scale = self._scale
        self.scaler.unscale_(state.opt)
        self.scaler.update()
        self._scale = self.scaler.get_scale()  # waits for the device
        has_overflowed = self._scale < scale
        if has_overflowed and scale > MIN_SCALE:
            raise CancelBatch
        if scale <= MIN_SCALE:  # a smaller one would not help: the scale stays, and begins anew after a finite gradient
            self._scale = MIN_SCALE if has_overflowed else FIRST_SCALE
            self.scaler.update(self._scale)

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Autocast for calls of the model only: data, metrics and the loss are left in float32."""
        device = next((tensor.device.type for tensor in (*model.parameters(), *model.buffers())), "cpu")
        entered: list[AbstractContextManager[Any]] = []
        self._check(device)

        def enter(module: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():  # the compiler cannot follow it; in a fit, `forward` does it
                is_on = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == DTYPES[self.precision]
                # within the autocast of a fit's `forward`, a model that fails would leave the outer one first
                entered.append(nullcontext() if is_on else self._autocast(device))
                entered[-1].__enter__()

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.compiler.is_compiling():
                entered.pop().__exit__(None, None, None)
            return to_float32(output)
        hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, prepend=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for autocast in reversed(entered):  # those that a model that failed has not left
                autocast.__exit__(None, None, None)

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self._saved if self.scaler is None else self.scaler.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._saved = saved["scaler"]
        if self._saved is None:
            self.scaler = None
        elif self.scaler is not None:
            self.scaler.load_state_dict(self._saved)
            self._scale = self.scaler.get_scale()

    def _autocast(self, device: str) -> torch.autocast:
        """A new one for each use: one that is entered twice forgets what it found."""
        return torch.autocast(device, DTYPES[self.precision])

    def _check(self, device: str) -> None:
        if device in self._checked:  # a `catch_warnings` makes Python forget which warnings it has shown already
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self._autocast(device)
        except (RuntimeError, UserWarning) as error:
            raise ValueError(f'MixedPrecision("{self.precision}") does not work on the device {device!r}: {error} '
                             "Pass another precision, or leave it out.") from error
        self._checked.add(device)


def to_float32(output: Any) -> Any:
    """The same nest with its half-precision tensors in float32.

    >>> to_float32({"logits": torch.ones(1, dtype=torch.bfloat16)})
    {'logits': tensor([1.])}
    """
    if any(tensor.dtype in DTYPES.values() for tensor in tensors(output)):
        return map_tensors(lambda tensor: tensor.float() if tensor.dtype in DTYPES.values() else tensor, output)
    return output


@dataclass(eq=False)
class ChannelsLast(Callback):
    """Keeps images and convolutions in `torch.channels_last` during the fit: the order that fast kernels work in.

    Parameters and buffers with 4 dimensions, their optimizer state, and all tensors of a batch with 4 dimensions.
    Results are equal within rounding; at the end of the fit, model and optimizer are put back, with the same values.

    >>> ChannelsLast()
    ChannelsLast()
    """

    order = Order.SETUP

    def before_fit(self, state: State) -> None:
        self._moved = [tensor for tensor in (*state.model.parameters(), *state.model.buffers())
                       if _is_image(tensor) and tensor.is_contiguous()]
        self._opt = state.opt
        self._move(torch.channels_last)

    def before_batch(self, state: State) -> None:
        state.batch = map_tensors(_to_channels_last, state.batch)

    before_valid_batch = before_batch

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


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.layout is torch.strided


def _to_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if _is_image(tensor) else tensor
