"""What all loggers have in common: they read the Recorder's new rows now and then, and an error ends no training."""
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

from ..core.callback import Callback, Order
from ..core.state import State
from ..record.record import FitRecord

log = logging.getLogger("minifast")


class Logger(Callback):
    """Writes the new steps and epochs of the Recorder: about every `every_seconds`, and when an epoch or fit ends.

    A subclass defines `target`, and of the methods that write those that it needs. No step waits for the device: one
    copy brings over what is new. What could not be written because of an OSError is tried again the next time.
    """

    order = Order.RECORD
    in_sandbox = False
    saves: ClassVar[tuple[str, ...]] = ("_n_steps", "_n_epochs")
    every_seconds: float = math.inf
    _is_open = False
    _settings: dict[str, Any] | None = None  # what `write_settings` is still to write

    def open(self, state: State) -> None:
        """Begin. An error here ends the fit before it has begun."""

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write, before all else, what `open` has put into `_settings`."""

    def write_steps(self, first: int, columns: dict[str, list[float]]) -> None:
        """Write steps `first`, `first` + 1, ...: one value each in every column."""

    def write_epoch(self, step: int, row: dict[str, Any]) -> None:
        """Write the row of an epoch that ended after `step` updates."""

    def close(self, state: State) -> None:
        """End, however the fit ended."""

    @property
    def target(self) -> str:
        """Where it writes, for messages."""
        raise NotImplementedError(f"{type(self).__name__} is to define target.")

    def before_fit(self, state: State) -> None:
        self._n_steps = self._n_epochs = 0  # written so far
        self._has_begun = self._has_warned = False
        self.open(state)
        self._is_open = True
        self._next_time = time.perf_counter() + self.every_seconds

    def before_epoch(self, state: State) -> None:
        # not in before_fit: another callback may refuse the fit, and a resumed one learns of its steps behind it
        self._has_begun = True
        self._write_new(state)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        # A sandbox gives back the state from before it, but what is written stays written. So outside of a fit, a state
        # with fewer steps is not taken up.
        if self._is_open or _n_written(saved) > _n_written(vars(self)):
            super().load_state_dict(saved)
            self._has_begun = True

    def after_batch(self, state: State) -> None:
        if time.perf_counter() >= self._next_time:
            self._write_new(state)

    def after_epoch(self, state: State) -> None:
        self._write_new(state)

    def after_fit(self, state: State) -> None:
        try:
            if self._has_begun:
                self._write_new(state)
        finally:
            self._is_open = False
            self._try(self.close, state)

    def _write_new(self, state: State) -> None:
        self._try(self._write, state.record)
        self._next_time = time.perf_counter() + self.every_seconds

    def _write(self, record: FitRecord) -> None:
        """All that is new: what an OSError keeps from being written is new the next time, too."""
        if self._settings is not None:
            self.write_settings(self._settings)
            self._settings = None
        n_steps = len(record)
        if n_steps > self._n_steps:
            self.write_steps(self._n_steps, step_columns(record, self._n_steps))
            self._n_steps = n_steps
        for row, step in zip(record.epochs[self._n_epochs:], record.epoch_ends[self._n_epochs:], strict=True):
            self.write_epoch(step, row)
            self._n_epochs += 1

    def _try(self, write: Callable[[Any], None], what: Any) -> None:
        """`write(what)`; the first OSError of a fit is logged."""
        try:
            write(what)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s cannot write to %s (%s): training goes on, and what is missing is tried again",
                            type(self).__name__, self.target, error.strerror or error)


def _n_written(attributes: Mapping[str, Any]) -> int:
    """The steps that a logger with these attributes has written, in all its fits."""
    return int(attributes.get("_earlier", 0) + attributes.get("_n_steps", 0))


def step_columns(record: FitRecord, first: int) -> dict[str, list[float]]:
    """The steps from `first` on: lr of each layer group, momentum, loss, and what callbacks have logged."""
    lrs = ["lr"] if len(record.group_names) == 1 else [f"lr_{name}" for name in record.group_names]
    columns = {name: column[first:].tolist() for name, column in zip(lrs, record.lr_columns, strict=True)}
    columns |= {"momentum": record.mom_column[first:].tolist(), "loss": record.loss_column.tail(first).tolist()}
    columns |= {name: column.tail(first).tolist() for name, column in record.columns.items()}
    return {name: values + [math.nan] * (len(record) - first - len(values)) for name, values in columns.items()}


@contextmanager
def opening(owner: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError inside names the logger and the path."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{owner} cannot write to {os.fspath(path)!r}: {error.strerror or error}. Pass a path that "
                          "can be written.") from error


def load(module: str, owner: str, extra: str) -> Any:
    """Import `module`. Raises ImportError that names the extra to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{owner} needs the package {extra} ({error}). Install it: "
                          f"pip install 'minifast[{extra}]'.") from error
