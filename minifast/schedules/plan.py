"""What a fit will do, before it does it."""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..optim.rates import spread_lrs
from ..show import plots
from ..show.tables import Table
from .scheduler import Scheduler

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plan_of(schedule: Scheduler, n_epochs: int, steps_per_epoch: int, group_names: tuple[str, ...], lr: Any) -> "Plan":
    """What a fit with `schedule` does to each layer group; lr: its peak, where the schedule has none of its own."""
    lrs = np.array(spread_lrs(lr if schedule.max_lr is None else schedule.max_lr, group_names))
    values = {hyper: np.array(column) for hyper, column in schedule.values(n_epochs * steps_per_epoch, 1.0).items()}
    if "lr" in values:
        values["lr"] = values["lr"][:, None] * lrs
    return Plan(n_epochs, steps_per_epoch, group_names, values, repr(schedule))


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The hyper-parameters of every step of a fit that has not been run; prints as a table of its epochs.

    values: "lr" -> (steps, layer groups), "momentum" and others -> (steps,), as far as they are scheduled; float64.
    """

    n_epochs: int
    steps_per_epoch: int
    group_names: tuple[str, ...]
    values: dict[str, NDArray[np.float64]]
    title: str = ""

    @property
    def n_steps(self) -> int:
        """Weight updates in the whole fit."""
        return self.n_epochs * self.steps_per_epoch

    def table(self) -> Table:
        """What the first step of each epoch uses, and the last step of all: rows of epoch, step, lr, ..."""
        steps = [epoch * self.steps_per_epoch for epoch in range(self.n_epochs)]
        if self.n_steps - 1 not in steps:
            steps.append(self.n_steps - 1)
        return Table({"epoch": step // self.steps_per_epoch, "step": step} | self._row(step) for step in steps)

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw every scheduled hyper-parameter against the step."""
        return plots.plot_hypers(self.values, self.group_names, self.title, ax)

    def __repr__(self) -> str:
        return (f"{self.title}: {self.n_epochs} epochs of {self.steps_per_epoch} steps = {self.n_steps} weight "
                f"updates; first step of each epoch, and the last\n{self.table()}")

    __str__ = __repr__

    def _row(self, step: int) -> dict[str, float]:
        row: dict[str, float] = {}
        for hyper, column in self.values.items():
            if column.ndim == 1 or column.shape[1] == 1:
                row[hyper] = float(column.reshape(self.n_steps, -1)[step, 0])
            else:
                row |= {f"{hyper} {name}": float(v) for name, v in zip(self.group_names, column[step], strict=True)}
        return row
