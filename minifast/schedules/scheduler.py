"""What every schedule has in common: it writes before each batch, and can be looked at before that, as a plan."""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.callback import Callback, Order
from ..core.state import State
from ..errors import check_int, check_items, check_number
from ..optim.hypers import has_momentum, set_lrs, set_momentum
from ..optim.rates import check_lr, spread_lrs
from ..show.plots import plot_hypers
from ..show.tables import Table
from .shapes import cycle_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Scheduler(Callback):
    """A callback that writes hyper-parameters before every batch, as a pure function of the step.

    Subclasses are frozen dataclasses that name what they own in `owns` and define `value`. They remember nothing, so
    what `values`, `table` and `plot` show without training is, to the last bit, what a fit of that length does.
    """

    order = Order.HYPER
    owns = ("lr",)
    max_lr: Any = None  # a peak of the schedule's own, in every form of a learning rate; None: the fit's
    n_cycles: int = 1
    cycle_mult: int = 1

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        """What update `step` (0-based) of `n_steps` uses.

        "lr" and "weight_decay": the fraction of each group's own; "momentum" and any other: the value itself.
        """
        raise NotImplementedError(f"{type(self).__name__} is to define value(hyper, step, n_steps) -> float.")

    def cycle_ends(self, n_steps: int) -> tuple[int, ...]:
        """The 0-based steps after which a cycle of the learning rate is complete; a schedule without cycles is one.

        >>> from minifast import CircularLR
        >>> CircularLR(n_cycles=3).cycle_ends(15)
        (4, 9, 14)
        """
        return cycle_ends(n_steps, self.n_cycles, self.cycle_mult)

    def check_steps(self, n_steps: int) -> None:
        """Warn or raise if `n_steps` updates are not what the schedule is made for."""

    def before_fit(self, state: State) -> None:
        if self.max_lr is not None:
            state.lrs = spread_lrs(self.max_lr, state.group_names, "max_lr")
        if "momentum" in self.owns and not has_momentum(state.opt):
            raise ValueError(f"{self!r} schedules the momentum, but {type(state.opt).__name__} has none. "
                             "Pass moms=None.")
        self.check_steps(state.n_steps)

    def before_batch(self, state: State) -> None:
        step = state.schedule_step
        for hyper in self.owns:
            write(state, hyper, self.value(hyper, step, state.n_steps))

    def values(self, n_steps: int, peak: float | None = None) -> dict[str, list[float]]:
        """What each of `n_steps` updates will use: {"lr": [...], "momentum": [...]}, as far as it is scheduled.

        peak: the peak learning rate, > 0; None: the schedule's own `max_lr` (of the last layer group), else 1.0.
        Raises ValueError for n_steps < 1 and a peak that is no number > 0.
        """
        n_steps = check_int("n_steps", n_steps)
        own = 1.0 if self.max_lr is None else last_lr(self.max_lr)
        scale = own if peak is None else check_number("peak", peak, above=0)
        self.check_steps(n_steps)
        return {hyper: [(scale if hyper == "lr" else 1.0) * self.value(hyper, step, n_steps)
                        for step in range(n_steps)] for hyper in self.owns}

    def table(self, n_epochs: int, steps_per_epoch: int, peak: float | None = None) -> Table:
        """What the first update of each epoch uses: rows of epoch (0-based), step, lr, ...; prints as a table.

        Raises ValueError for counts < 1.
        """
        n_epochs, per_epoch = check_int("n_epochs", n_epochs), check_int("steps_per_epoch", steps_per_epoch)
        values = self.values(n_epochs * per_epoch, peak)
        return Table({"epoch": epoch, "step": epoch * per_epoch}
                     | {hyper: column[epoch * per_epoch] for hyper, column in values.items()}
                     for epoch in range(n_epochs))

    def plot(self, n_steps: int, peak: float | None = None, *, ax: "Axes | None" = None) -> "Axes":
        """Draw what a fit of `n_steps` updates will use; gives the axes of the first hyper-parameter."""
        return plot_hypers({hyper: np.array(column) for hyper, column in self.values(n_steps, peak).items()},
                           title=repr(self), ax=ax)


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
        steps = sorted({*range(0, self.n_steps, self.steps_per_epoch), self.n_steps - 1})
        return Table({"epoch": step // self.steps_per_epoch, "step": step} | self._row(step) for step in steps)

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw every scheduled hyper-parameter against the step."""
        return plot_hypers(self.values, self.group_names, self.title, ax)

    def __repr__(self) -> str:
        return (f"{self.title}: {self.n_epochs} epochs of {self.steps_per_epoch} steps = {self.n_steps} weight "
                f"updates; first step of each epoch, and the last\n{self.table()}")

    def _row(self, step: int) -> dict[str, float]:
        row: dict[str, float] = {}
        for hyper, column in self.values.items():
            values = np.atleast_1d(column[step]).tolist()
            names = [hyper] if len(values) == 1 else [f"{hyper} {name}" for name in self.group_names]
            row |= dict(zip(names, values, strict=True))
        return row


def plan_of(schedule: Scheduler, n_epochs: int, steps_per_epoch: int, group_names: tuple[str, ...], lr: Any) -> Plan:
    """What a fit with `schedule` does to each layer group; lr: its peak, where the schedule has none of its own."""
    lrs = np.array(spread_lrs(lr if schedule.max_lr is None else schedule.max_lr, group_names))
    values = {hyper: np.array(column) for hyper, column in schedule.values(n_epochs * steps_per_epoch, 1.0).items()}
    if "lr" in values:
        values["lr"] = values["lr"][:, None] * lrs
    return Plan(n_epochs, steps_per_epoch, group_names, values, repr(schedule))


def write(state: State, hyper: str, value: float) -> None:
    """Write one scheduled value into the optimizer; learning rates are scaled by `state.lr_scale`, only here."""
    if hyper == "lr":
        scale = value * state.lr_scale
        set_lrs(state.opt, [lr * scale for lr in state.lrs])
    elif hyper == "momentum":
        set_momentum(state.opt, value)
    elif hyper == "weight_decay":
        for group, weight_decay in zip(state.opt.param_groups, state.weight_decays, strict=True):
            group["weight_decay"] = weight_decay * value
    else:
        for group in state.opt.param_groups:
            group[hyper] = value


def own_momentum(schedule: Scheduler, moms: Any, counts: tuple[int, ...] = (2,)) -> None:
    """Check `moms`, as many as one of `counts`, and make a frozen schedule their owner; a number is a constant one."""
    if moms is None:
        return
    is_number = isinstance(moms, (int, float)) or getattr(moms, "ndim", None) == 0
    try:
        values = [moms, moms] if is_number else check_items("moms", moms, "momentums")
    except TypeError:
        values = []
    if len(values) not in counts:
        raise ValueError(f"moms must hold {' or '.join(map(str, counts))} momentums or be None, got {moms!r:.80}. "
                         "Pass e.g. moms=(0.95, 0.85).")
    checked = tuple(check_number(f"moms[{i}]", value, minimum=0, below=1) for i, value in enumerate(values))
    object.__setattr__(schedule, "moms", checked)
    object.__setattr__(schedule, "owns", ("lr", "momentum"))


def last_lr(lr: Any) -> float:
    """The learning rate of the last layer group, however many there are.

    >>> last_lr(slice(1e-5, 1e-3)), last_lr([0.1, 0.2]), last_lr(3)
    (0.001, 0.2, 3.0)
    """
    lr = check_lr("lr", lr)
    return float(lr.stop if isinstance(lr, slice) else lr[-1] if isinstance(lr, tuple) else lr)
