"""The gradients of one weight update, gathered over one or several micro-batches."""
import torch
from torch import Tensor
from torch.optim import Optimizer


class Window:
    """Adds up the gradients of `size` micro-batches so that they are those of one big batch.

    The big batch's loss is the mean over its samples. So each micro-batch's mean is weighted by its samples, relative
    to the first one's: even micro-batches are not scaled at all before the division at the end. The last window of an
    epoch, after batch `n_batches` (None: unknown), may be short. A window that lost a micro-batch is dropped whole.
    """

    def __init__(self, opt: Optimizer, size: int, n_batches: int | None) -> None:
        self._size, self._n_batches = size, n_batches
        self._params = [p for group in opt.param_groups for p in group["params"]]
        self._dropped = False
        self._loss: Tensor | float = 0.0
        self._unit = self.n_samples = 0
        opt.zero_grad()

    def admits(self, batch_index: int) -> bool:
        """Batch `batch_index` of the epoch begins: whether its window is still wanted."""
        if batch_index % self._size == 0:
            self._dropped = False
        self.is_full = (batch_index + 1) % self._size == 0 or batch_index + 1 == self._n_batches
        return not self._dropped

    def backward(self, loss: Tensor, n_samples: int) -> None:
        """Add the gradient of `loss`, the mean over `n_samples` samples."""
        if self._size == 1:
            loss.backward()
            self._loss = loss.detach()
        else:
            self._unit = self._unit or n_samples
            (loss if n_samples == self._unit else loss * (n_samples / self._unit)).backward()
            self._loss = loss.detach() * n_samples + self._loss
        self.n_samples += n_samples

    @property
    def is_open(self) -> bool:
        """Whether gradients wait for a step."""
        return self.n_samples > 0

    def close(self) -> Tensor:
        """Turn the summed gradients into those of the mean; gives the mean loss over the window's samples, ()."""
        assert isinstance(self._loss, Tensor)
        if self._size == 1:
            return self._loss
        if self.n_samples != self._unit:
            grads = [p.grad for p in self._params if p.grad is not None]
            torch._foreach_mul_(grads, self._unit / self.n_samples)
        return self._loss / self.n_samples

    def end(self) -> None:
        """Forget the gradients: the update is done, or will not be."""
        for p in self._params:  # what opt.zero_grad() does, without its hooks and its profiler: 10 us a step
            p.grad = None
        self._loss = 0.0
        self._unit = self.n_samples = 0

    def drop(self) -> None:
        """Forget the gradients gathered so far, and refuse the rest of the window."""
        self.end()
        self._dropped = True
