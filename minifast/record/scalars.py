"""A column of numbers that are born on the device and read on the host many at a time."""
import math
from array import array
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FLUSH_EVERY = 1024


class ScalarColumn:
    """Append 0-dimensional tensors (or numbers) without waiting for the device; read them as float64.

    What was appended stays on the device until someone reads, or until 1,024 are waiting: then all of it comes over
    in one copy, to 8 bytes a row.

    >>> column = ScalarColumn()
    >>> column.append(torch.tensor(0.5)); column.append(torch.tensor(2.0))
    >>> column.read()
    array([0.5, 2. ])
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._waiting: list[Tensor | float] = []
        self._values = array("d", values)

    def append(self, value: Tensor | float) -> None:
        """Add one value; a tensor of any floating or integer dtype, without its graph."""
        if isinstance(value, Tensor) or self._waiting:
            self._waiting.append(value)
            if len(self._waiting) >= FLUSH_EVERY:
                self._flush()
        else:
            self._values.append(value)

    def read(self) -> NDArray[np.float64]:
        """All values so far: a copy, shape (rows,)."""
        self._flush()
        return np.array(self._values, dtype=np.float64)

    def tail(self, start: int) -> "array[float]":
        """The values from row `start` on."""
        self._flush()
        return self._values[start:]

    def __len__(self) -> int:
        return len(self._values) + len(self._waiting)

    def _flush(self) -> None:
        tensors = [value for value in self._waiting if isinstance(value, Tensor)]
        if tensors:
            read = iter(torch.stack(tensors).cpu().double().tolist())  # .cpu() first: some devices have no float64
            self._values.extend(next(read) if isinstance(value, Tensor) else value for value in self._waiting)
            self._waiting.clear()


class Ema:
    """Exponential moving average with bias correction: after t values, sum of weights beta**(t-i), normalised.

    A value that is not finite is skipped: it leaves the average as it was.

    >>> ema = Ema(0.5)
    >>> [round(ema.add(value), 4) for value in (1.0, 2.0, float("nan"), 2.0)]
    [1.0, 1.6667, 1.6667, 1.8571]
    """

    def __init__(self, beta: float = 0.98) -> None:
        self.beta = beta
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """Take in `value`; gives the average so far, nan before the first finite value."""
        if math.isfinite(value):
            self._sum = self.beta * self._sum + (1 - self.beta) * value
            self._weight = self.beta * self._weight + (1 - self.beta)
        return self._sum / self._weight if self._weight else math.nan
