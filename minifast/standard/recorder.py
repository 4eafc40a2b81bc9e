"""The Recorder: what the newest fit did, step by step and epoch by epoch, and what earlier ones did."""
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..core.callback import Callback, Order
from ..core.state import State
from ..optim.hypers import get_momentum
from ..record.record import Column, FitRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..finder.result import LRFind


class Recorder(Callback):
    """Writes down every weight update and every epoch without waiting for the device; always `learn.recorder`.

    It reads what the optimizer really used. `fits`: the records of earlier fits, oldest first. `lr_find`: the newest
    result of the LR finder, or None.
    """

    order = Order.SETUP  # first: a step that another callback ends the fit in has moved the weights all the same

    def __init__(self) -> None:
        self.fits: list[FitRecord] = []
        self.lr_find: LRFind | None = None
        self.newest = self._record = FitRecord()  # _record: of the fit under way
        self._is_new, self._epoch, self._first_step, self._began = True, -1, 0, 0.0

    def before_fit(self, state: State) -> None:
        self._record, self._is_new, self._epoch = state.record, True, -1
        heads = {group["layer_group"]: group for group in reversed(state.opt.param_groups)}
        self._heads = [heads[i] for i in range(len(state.group_names))]

    def before_epoch(self, state: State) -> None:
        if self._is_new:  # not before: a fit that another callback refuses to begin leaves the record as it was
            self._begin()
        self._epoch, self._began, self._first_step = state.epoch, time.perf_counter(), len(self.newest)
        state.metrics = {"epoch": state.epoch}

    def after_step(self, state: State) -> None:
        record = self.newest
        for column, head in zip(record.lr_columns, self._heads, strict=True):
            column.append(head["lr"])
        record.mom_column.append(get_momentum(state.opt))
        record.loss_column.append(state.step_loss)
        record.weight_column.append(state.step_weight)

    def before_validate(self, state: State) -> None:
        self._note_train_loss(state)

    def after_epoch(self, state: State) -> None:
        if self._epoch != state.epoch:  # cancelled by a callback that comes before this one
            self.before_epoch(state)
        self._note_train_loss(state)
        state.metrics["time"] = time.perf_counter() - self._began
        self.newest.epochs.append(state.metrics)
        self.newest.epoch_ends.append(len(self.newest))

    def after_fit(self, state: State) -> None:
        self._heads = []

    def state_dict(self) -> dict[str, Any]:
        """The record of the newest fit, and where in its epoch it is. Earlier fits have checkpoints of their own."""
        return {**self.newest.state_dict(), "epoch": self._epoch, "first_step": self._first_step,
                "seconds": time.perf_counter() - self._began}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on with the record that `state_dict` gave; what is recorded now becomes an earlier fit."""
        epoch, first_step, n = saved["epoch"], saved["first_step"], len(saved["moms"])
        if type(epoch) is not int or type(first_step) is not int or not 0 <= first_step <= n:
            raise ValueError(f"this is not the state of a Recorder: epoch {epoch!r:.80}, first step {first_step!r:.80}")
        began = time.perf_counter() - saved["seconds"]
        self._record.load_state_dict(saved)
        self._begin()
        self._epoch, self._first_step, self._began = epoch, first_step, began

    def keep(self) -> Callable[[], None]:
        """Note what is recorded so far; returns what restores it."""
        newest, fits, found = self.newest, list(self.fits), self.lr_find

        def restore() -> None:
            self.newest, self.fits[:], self.lr_find = newest, fits, found
        return restore

    def _begin(self) -> None:
        """The record of this fit is the newest one from now on."""
        if len(self.newest) or self.newest.epochs:
            self.fits.append(self.newest)
        self.newest, self._is_new = self._record, False

    def _note_train_loss(self, state: State) -> None:
        if len(self.newest) > self._first_step and "train_loss" not in state.metrics:
            state.metrics["train_loss"] = self.newest.mean_loss(self._first_step)

    # The newest fit: what `FitRecord` has under the same names.

    @property
    def lrs(self) -> Column:
        """Learning rate of the last layer group at each step, (steps,)."""
        return self.newest.lrs

    @property
    def lr_groups(self) -> Column:
        """Learning rate of every layer group at each step, (steps, layer groups)."""
        return self.newest.lr_groups

    @property
    def moms(self) -> Column:
        """Momentum (SGD) or beta1 (Adam) at each step, (steps,)."""
        return self.newest.moms

    @property
    def losses(self) -> Column:
        """Training loss of each step, (steps,)."""
        return self.newest.losses

    @property
    def smooth_losses(self) -> Column:
        """`losses` as an exponential moving average (0.98, bias-corrected), (steps,)."""
        return self.newest.smooth_losses

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """One row per epoch: epoch, train_loss (the true mean), valid_loss, metrics, time (s)."""
        return self.newest.epochs

    def column(self, name: str) -> Column:
        """What callbacks have logged, e.g. "grad_norm" of `GradientClip`: see `FitRecord.column`."""
        return self.newest.column(name)

    def plot_lr(self, show_moms: bool = False, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the learning rates and, if asked, the momentum: see `FitRecord.plot_lr`."""
        return self.newest.plot_lr(show_moms, ax=ax)

    def plot_losses(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw training and validation losses: see `FitRecord.plot_losses`."""
        return self.newest.plot_losses(ax=ax)

    def plot_metrics(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw every metric against the epoch: see `FitRecord.plot_metrics`."""
        return self.newest.plot_metrics(ax=ax)

    def to_csv(self, path: str | os.PathLike[str], *, epochs: bool = False) -> None:
        """Write one line per step, or per epoch if `epochs`: see `FitRecord.to_csv`."""
        self.newest.to_csv(path, epochs=epochs)

    def plot(self, skip_start: int = 10, skip_end: int = 5, suggestions: bool = True, *,
             ax: "Axes | None" = None) -> "Axes":
        """Draw the newest LR finder run: see `LRFind.plot`. Raises RuntimeError before the first run of `lr_find`."""
        if self.lr_find is None:
            raise RuntimeError("there is no LR finder run to plot. Call learn.lr_find() first; a fit is drawn by "
                               "plot_lr() and plot_losses().")
        return self.lr_find.plot(skip_start, skip_end, suggestions, ax=ax)

    def __repr__(self) -> str:
        return f"Recorder({len(self.newest)} steps, {len(self.epochs)} epochs, {len(self.fits)} earlier fits)"
