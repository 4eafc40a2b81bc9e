"""What `ActivationStats` and `GradientStats` have in common: a row of numbers for every n-th weight update."""
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.callback import Callback, Order
from ..errors import check_same_names

FLUSH_EVERY = 128  # rows that wait on the device, to come over in one copy


class StepStats(Callback):
    """The rows of the newest fit, which can be read while it runs. No step waits for the device."""

    order = Order.RECORD  # last: what it looks at is as all others have left it
    kind: ClassVar[str]  # what `names` are names of, for messages

    def _clear(self, names: Sequence[str], *shape: int) -> None:
        """Begin with no rows, which will have `shape`, about what is called `names`."""
        self.names = tuple(names)
        self._steps: list[int] = []
        self._waiting: list[Tensor] = []
        self._flushed = [torch.empty(0, *shape)]

    def _add(self, step: int, row: Tensor) -> None:
        self._steps.append(step)
        self._waiting.append(row)
        if len(self._waiting) >= FLUSH_EVERY:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._flushed.append(torch.stack(self._waiting).cpu())
            self._waiting.clear()

    def _rows(self) -> Tensor:
        """All rows so far, on the CPU: a copy."""
        self._flush()
        return torch.cat(self._flushed)

    def _check_any(self) -> None:
        if not self._steps:
            raise RuntimeError("no step was recorded. Train first, e.g. learn.fit(0.01, callbacks=[stats]).")

    @property
    def steps(self) -> NDArray[np.int64]:
        """The recorded weight updates, by their 0-based number, (rows,)."""
        return np.array(self._steps, dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """What was recorded so far, as plain values."""
        return {"names": list(self.names), "steps": list(self._steps), "rows": self._rows()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on after the rows of `state_dict`. Raises ValueError if they are of another model."""
        if self.names and saved["steps"]:  # else it is what was before the first fit
            check_same_names(self.kind, saved["names"], self.names)
        self.names, self._steps = tuple(saved["names"]), list(saved["steps"])
        self._waiting, self._flushed = [], [saved["rows"].cpu().clone()]
