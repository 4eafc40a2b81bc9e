"""The gradients of one weight update, gathered over one or several micro-batches."""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..base.losses import Weight, nonzero
from ..base.nest import to_device
from ..optim import fused


class Window:
    """Adds up the gradients of `size` micro-batches so that they are those of one big batch.

    The big batch's loss is the mean over its samples (or tokens, ...: whatever the losses are means over). So each
    micro-batch's mean is weighted by its samples, relative to the first one's: even ones are not scaled before the
    division at the end. The last window of an epoch, after batch `n_batches` (None: unknown), may be short. A window
    that lost a micro-batch is dropped whole.
    """

    def __init__(self, opt: Optimizer, size: int, n_batches: int | None) -> None:
        self._size, self._n_batches = size, n_batches
        self._params = [p for group in opt.param_groups for p in group["params"]]
        self._is_dropped = self.is_full = False
        self._one, self._run = torch.ones(()), fused.backward()
        self.loss_scale: Tensor | None = None  # () the gradient that backward begins with, if not 1: for fp16
        self._forget()
        opt.zero_grad()

    def _forget(self) -> None:
        self._is_sum = self._size > 1
        self._loss: Any = 0.0  # the sum of the losses so far, or the one there is
        self._unit: float = 1  # the weight of the first micro-batch
        self.weight: Weight = 0  # what the losses so far are means over
        self.is_open = False  # whether gradients wait for a step

    def admits(self, batch_index: int) -> bool:
        """Batch `batch_index` of the epoch begins: whether its window is still wanted."""
        if batch_index % self._size == 0:
            self._is_dropped = False
        self.is_full = (batch_index + 1) % self._size == 0 or batch_index + 1 == self._n_batches
        return not self._is_dropped

    def backward(self, loss: Tensor, weight: Weight) -> None:
        """Add the gradient of `loss`, a mean over `weight` samples."""
        if not self._is_sum:
            self._back(loss)
            self._loss, self.weight = loss.detach(), weight
        else:
            if isinstance(weight, Tensor):
                self._back(loss * weight / self._unit)  # in this order: an integer tensor / 5 would be float32
            else:
                self._unit = self._unit if self.is_open else weight or 1
                self._back(loss if weight == self._unit else loss * (weight / self._unit))
            self._loss = loss.detach() * weight + self._loss
            self.weight = self.weight + weight
        self.is_open = True

    @contextmanager
    def in_parts(self, n: int) -> Iterator[None]:
        """A block for one micro-batch in `n` parts: either all of them are added, or, on an error, none."""
        kept = self._is_sum, self._loss, self._unit, self.weight, self.is_open
        grads = [p.grad for p in self._params]
        for p in self._params:
            p.grad = None
        self._is_sum = self._is_sum or n > 1
        try:
            yield
        except BaseException:
            self._is_sum, self._loss, self._unit, self.weight, self.is_open = kept
            for p, grad in zip(self._params, grads, strict=True):
                p.grad = grad
            raise
        for p, grad in zip(self._params, grads, strict=True):
            p.grad = grad if p.grad is None else p.grad if grad is None else p.grad.add_(grad)

    def close(self) -> Tensor:
        """Turn the summed gradients into those of the mean; gives the mean loss over the window's samples, ()."""
        loss: Tensor = self._loss
        if not self._is_sum:
            return loss
        if isinstance(self.weight, Tensor):
            torch._foreach_div_(self._grads(), nonzero(self.weight))  # 1 / an integer tensor would be float32
            if self._unit != 1:
                torch._foreach_mul_(self._grads(), self._unit)
        elif self.weight != self._unit:
            torch._foreach_mul_(self._grads(), self._unit / nonzero(self.weight))
        return loss / nonzero(self.weight)

    def end(self) -> None:
        """Forget the gradients: the update is done, or will not be."""
        for p in self._params:  # what opt.zero_grad() does, without its hooks and its profiler
            p.grad = None
        self._forget()

    def drop(self) -> None:
        """Forget the gradients gathered so far, and refuse the rest of the window."""
        self.end()
        self._is_dropped = True

    def state_dict(self) -> dict[str, Any]:
        """What a window that is open, or dropped, has to remember over a kill. Holds no copies."""
        return {"grads": [p.grad for p in self._params], "is_sum": self._is_sum, "loss": self._loss, "unit": self._unit,
                "weight": self.weight, "is_open": self.is_open, "is_dropped": self._is_dropped}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError for anything else."""
        flags = [saved[name] for name in ("is_sum", "is_open", "is_dropped")]
        numbers = [saved[name] for name in ("loss", "unit", "weight")]
        if not all(isinstance(flag, bool) for flag in flags) or not all(map(_is_number, numbers)):
            raise ValueError(f"this is not the state of a window of gradients: {saved!r:.200}")
        for p, grad in zip(self._params, saved["grads"], strict=True):
            p.grad = None if grad is None else grad.to(p.device, copy=True)
        self._is_sum, self.is_open, self._is_dropped = flags
        device = self._params[0].device if self._params else torch.device("cpu")
        self._loss, self._unit, self.weight = to_device(numbers, device)

    def _back(self, loss: Tensor) -> None:
        """`loss.backward(self.loss_scale)`, by the shortest way."""
        gradient = self.loss_scale
        if loss.ndim:  # one number in another shape
            loss.backward(gradient)
            return
        if gradient is None:
            gradient = self._one  # made once: torch would make it in each batch
            if gradient.dtype is not loss.dtype or gradient.device != loss.device:
                gradient = self._one = torch.ones_like(loss)
        self._run(loss, gradient)

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._params if p.grad is not None]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)
