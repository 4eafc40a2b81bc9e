"""What all loggers have in common: they read the Recorder's new rows now and then, and an error ends no training."""
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from typing import Any, ClassVar

import torch

from ..core.callback import Callback, Order
from ..core.state import State
from ..record.record import FitRecord
from ..standard.recorder import Recorder

log = logging.getLogger("minifast")


class Logger(Callback):
    """Writes the new steps and epochs of the Recorder: about every `every_seconds`, and when an epoch or fit ends.

    A subclass defines of `open`, `close` and the methods that write those that it needs. No step waits for the device.
    """

    order = Order.RECORD
    in_sandbox = False
    saves: ClassVar[tuple[str, ...]] = ("_n_steps", "_n_epochs")
    every_seconds: float = math.inf
    target = ""  # where it writes, for messages
    _is_open = False
    _settings: dict[str, Any] | None = None  # what `write_settings` is still to write

    def open(self, state: State) -> None: """Begin. An error here ends the fit before it has begun."""
    def write_settings(self, settings: dict[str, Any]) -> None: """Before all else, what `open` put into `_settings`."""
    def write_steps(self, first: int, columns: dict[str, list[float]]) -> None: """One value a step, from `first` on."""
    def write_epoch(self, step: int, row: dict[str, Any]) -> None: """Of an epoch that ended after `step` updates."""
    def close(self, state: State) -> None: """End, however the fit ended."""

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
        # a sandbox gives back the state from before it, but what is written stays written
        n_saved, n_written = (of.get("_earlier", 0) + of.get("_n_steps", 0) for of in (saved, vars(self)))
        if self._is_open or n_saved > n_written:
            super().load_state_dict(saved)
            self._has_begun = True

    def after_batch(self, state: State) -> None:
        if time.perf_counter() >= self._next_time:
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

    after_epoch = _write_new

    def _write(self, record: FitRecord) -> None:
        """All that is new: what an OSError keeps from being written is new the next time, too."""
        if self._settings is not None:
            self.write_settings(self._settings)
            self._settings = None
        if len(record) > self._n_steps:
            self.write_steps(self._n_steps, _step_columns(record, self._n_steps))
            self._n_steps = len(record)
        for row, step in zip(record.epochs[self._n_epochs:], record.epoch_ends[self._n_epochs:], strict=True):
            self.write_epoch(step, row)
            self._n_epochs += 1

    def _try(self, write: Callable[[Any], None], what: Any) -> None:
        """Only the first OSError of a fit is logged."""
        try:
            write(what)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s cannot write to %s (%s): training goes on, and what is missing is tried again",
                            type(self).__name__, self.target, error.strerror or error)


def _step_columns(record: FitRecord, first: int) -> dict[str, list[float]]:
    """The steps from `first` on: lr of each layer group, momentum, loss, and what callbacks have logged."""
    lrs = ["lr"] if len(record.group_names) == 1 else [f"lr_{name}" for name in record.group_names]
    columns = {name: column[first:].tolist() for name, column in zip(lrs, record.lr_columns, strict=True)}
    columns |= {"momentum": record.mom_column[first:].tolist(), "loss": record.loss_column.tail(first).tolist()}
    columns |= {name: column.tail(first).tolist() for name, column in record.columns.items()}
    return {name: values + [math.nan] * (len(record) - first - len(values)) for name, values in columns.items()}


@contextmanager
def opening(logger: Logger) -> Iterator[None]:
    """An OSError inside names the logger and its target, a path."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{type(logger).__name__} cannot write to {logger.target!r}: {error.strerror or error}. "
                          "Pass a path that can be written.") from error


def load(module: str, owner: str, extra: str) -> Any:
    """Import `module`. Raises ImportError that names the extra to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{owner} needs the package {extra} ({error}). Install it: "
                          f"pip install 'minifast[{extra}]'.") from error


def settings(state: State) -> dict[str, Any]:
    """Versions, device, model, optimizer, layer groups, lengths, schedule and callbacks of a fit, in `before_fit`."""
    sizes = [(p.numel(), p.requires_grad) for p in state.model.parameters()]
    name = f" ({torch.cuda.get_device_name(state.device)})" if state.device.type == "cuda" else ""
    texts = [(cb, type(cb).__name__ if type(cb).__repr__ is object.__repr__ else f"{cb!r:.1000}")  # no address
             for cb in state.callbacks]
    return {
        "time": now(),
        "versions": {"minifast": sys.modules["minifast"].__version__, "torch": str(torch.__version__),
                     "python": platform.python_version()},
        "device": f"{state.device}{name}",
        "model": {"class": type(state.model).__name__, "parameters": sum(n for n, _ in sizes),
                  "trainable": sum(n for n, is_trained in sizes if is_trained)},
        "optimizer": {"class": type(state.opt).__name__, "defaults": dict(state.opt.defaults)},
        "group_names": list(state.group_names), "lrs": list(state.lrs),
        "n_epochs": state.n_epochs, "n_steps": state.n_steps, "steps_per_epoch": state.steps_per_epoch,
        "accumulate": state.accumulate, "batch_size": getattr(state.train_dl, "batch_size", None),
        "schedule": next((text for callback, text in texts if "lr" in callback.owns), None),
        "callbacks": [text for callback, text in texts if not isinstance(callback, Recorder)],
    }


def now() -> str:
    """UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
