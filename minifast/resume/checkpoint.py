"""Checkpoints while a fit runs: when one is written, and what is in it."""
import logging
import math
import os
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..base import rng
from ..base.nest import map_tensors
from ..core.callback import Callback
from ..core.emitter import evaluating
from ..core.ownership import CHECKPOINTS, finite_check
from ..core.state import State
from ..errors import check_int, check_number, check_path
from ..files.trees import check_plain
from . import saved_state
from .folder import FitFolder
from .identity import FORMAT, environment, texts
from .replay import digest, remembers, way

MOST_FAILURES = 3  # in a row, before a fit ends because it cannot be saved
log = logging.getLogger("minifast")


@dataclass(eq=False)
class Checkpoint(Callback):
    """Writes the whole state of the fit to `path`, so that `resume="auto"` goes on where it was killed, bit for bit.

    path: the folder of the run, made if need be; one process at a time trains in it. Of a Learner's k-th fit in it
    (k from 1), the checkpoints are in `path/fit-<k>/step-<updates>.ckpt`. every_steps: after every so many weight
    updates, an int >= 1 or None. every_seconds: after so much time, > 0, or None; "auto": after a minute, or later
    where writing would take more than 1 % of the time. What is due first counts. keep: how many stay, the newest; an
    int >= 1.

    One is written, too, when SIGINT or SIGTERM ends the fit, when the fit has ended, and when an epoch was the best one
    for a `SaveBest` (`best.ckpt` is that one, for `learn.load_best`). It is whole or not there, and holds the model
    with its buffers, the optimizer, what callbacks keep (`state_dict`), the Recorder's rows and all random generators:
    about three times the weights with Adam, and what averages and the best weights take.

    If one cannot be written, a warning is logged and training goes on; the third failure in a row, and one at the end
    of the fit, is an error. Raises ValueError or TypeError for values out of range, and OSError before the fit for a
    folder that cannot be written.

    >>> Checkpoint("runs/a", every_steps=200)
    Checkpoint(path='runs/a', every_steps=200, every_seconds='auto', keep=2)
    """

    path: str | os.PathLike[str]
    every_steps: int | None = None
    every_seconds: float | str | None = "auto"
    keep: int = 2

    order = sys.maxsize  # hears each event last: then what all others keep is of one moment
    owns = (CHECKPOINTS,)  # one of them in a fit
    in_sandbox = False

    def __post_init__(self) -> None:
        self.path = check_path("path", self.path)
        if self.every_steps is not None:
            self.every_steps = check_int("every_steps", self.every_steps)
        seconds = self.every_seconds
        if seconds is not None and (not isinstance(seconds, str) or seconds != "auto"):
            self.every_seconds = check_number("every_seconds", seconds, above=0,
                                              example='every_seconds=60, "auto" or None')
        self.keep = check_int("keep", self.keep)
        self._folder: FitFolder | None = None

    def begin(self, folder: FitFolder, run_id: str, state: State, facts: dict[str, Any]) -> None:
        """A fit is about to begin that keeps its checkpoints in `folder`."""
        self._folder, self._run_id, self._facts = folder, run_id, facts
        self._loss, self._texts = state.loss_func, texts(state)  # before any callback wraps it

    def before_fit(self, state: State) -> None:
        if self._folder is None:
            raise RuntimeError(f"{self!r} works only in a fit of a Learner: learn.fit(..., callbacks=[...]).")
        self._n_failures, self._is_saved = 0, True  # nothing to lose before the first step
        self.before_epoch(state)  # a fit that goes on in the middle of an epoch does not hear it again
        self._before_validation: dict[str, Any] | None = None
        self._is_epoch_end = self._is_validating = self._is_in_batch = False
        self._seconds = 0.0  # that the last one took
        self._plan_next(state)
        check_plain({"callbacks": saved_state.capture_callbacks(state),  # now, not after hours at the first save
                     "model": saved_state.capture_model(state.model)})

    def take_up(self, saved: dict[str, Any]) -> None:
        """Go on behind a checkpoint: what it says of the epoch that it lies in."""
        self._at_epoch_start = rng.from_plain(saved["epoch_rng"])
        self._is_first_pass, self._first_batch = saved["loader"]["is_first_pass"], saved["loader"]["first"]
        self._n_done = saved["position"]["n_done"]

    def before_epoch(self, state: State) -> None:
        self._at_epoch_start = rng.capture(saved_state.loader_generators(state))  # the pass over the data begins now
        self._is_first_pass = getattr(state.train_dl, "_iterator", None) is None
        self._n_done = 0  # batches of the epoch that are behind
        self._first_batch = None  # the `digest` of its first one
        self._is_in_batch = True  # what comes before the first batch cannot be told from a part of it

    def after_batch(self, state: State) -> None:
        self._is_epoch_end = self._is_saved = self._is_in_batch = False
        self._n_done = state.batch_index + 1
        if self._n_done == 1 and remembers(state.train_dl):
            self._first_batch = digest(state.source.newest)
        is_due = state.step >= self._next_step or time.monotonic() >= self._next_time
        if state.interrupt.pending or (is_due and not state.window.is_open):
            self._save(state)
        is_last = state.batch_index + 1 == state.n_batches or state.is_ending
        if is_last and state.valid_sets and not state.window.is_open:
            self._before_validation = self._moment(state)  # of use if a signal ends the validation

    def before_validate(self, state: State) -> None:
        self._is_validating = True

    def after_epoch(self, state: State) -> None:
        self._before_validation, self._is_epoch_end, self._is_saved = None, True, False
        self._is_validating = self._is_in_batch = False
        is_best = state.record.best is not None and state.record.best.epoch == state.epoch
        if is_best or state.interrupt.pending or time.monotonic() >= self._next_time:
            self._save(state, is_best=is_best)

    def after_fit(self, state: State) -> None:
        try:
            if state.interrupt.was_raised and not self._is_in_batch:  # a signal has ended it between two batches
                moment = self._before_validation if self._is_validating else None
                if not self._is_saved and (moment is not None or not self._is_validating):
                    self._save(state, moment=moment)
                if self._is_saved and state.step and self._folder is not None:
                    state.say(f"interrupted: the state after {state.step} updates is in {self._folder.path}. The same "
                              'call with resume="auto" goes on from there.')
        finally:
            self._before_validation = None

    def finish(self, state: State) -> None:
        """The fit has ended well: write its final state. Raises OSError if that fails."""
        self._is_epoch_end = True
        self._write(state, self._moment(state) | {"finished": True})

    def end(self) -> None:
        """The fit has ended, one way or another."""
        self._folder = None

    def _plan_next(self, state: State) -> None:
        every, seconds = self.every_steps, self.every_seconds
        self._next_step = math.inf if every is None else (state.step // every + 1) * every
        wait = math.inf if seconds is None else max(60.0, 100 * self._seconds) if seconds == "auto" else float(seconds)
        self._next_time = time.monotonic() + wait

    def _save(self, state: State, is_best: bool = False, moment: dict[str, Any] | None = None) -> None:
        """Write a checkpoint, if that is possible."""
        began = time.monotonic()
        finite = finite_check(state.callbacks)
        if finite is not None:  # what is not finite must not take the place of what is
            finite.check(state)
        if not saved_state.has_finite_weights(state.model):
            log.warning("no checkpoint after update %d: the weights are not finite. Older ones stay.", state.step)
            return self._plan_next(state)
        moment = self._moment(state) if moment is None else moment
        try:
            self._write(state, moment, is_best)
            self._n_failures, self._is_saved = 0, True
        except OSError as error:
            self._n_failures += 1
            if self._n_failures >= MOST_FAILURES:
                error.add_note(f"this was the checkpoint number {self._n_failures} in a row that could not be written")
                raise
            log.warning("no checkpoint after update %d: %s Training goes on.", state.step, error.strerror or error)
        self._seconds = time.monotonic() - began
        self._plan_next(state)

    def _write(self, state: State, moment: dict[str, Any], is_best: bool = False) -> None:
        best = state.record.best if is_best else None
        tree = {**moment, **saved_state.capture_trained(state, self._loss),
                "best": None if best is None else {"monitor": best.monitor, "value": best.value, "epoch": best.epoch,
                                                   "weights": self._validated(state, best.monitor)}}
        assert self._folder is not None
        self._folder.save(state.step, tree, self.keep, is_best=best is not None)

    def _moment(self, state: State) -> dict[str, Any]:
        """All but model and optimizer."""
        return {"format": FORMAT, "run": self._run_id, "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "finished": False, "facts": self._facts, "texts": self._texts, "environment": environment(state),
                "position": {"epoch": state.epoch, "step": state.step, "n_done": self._n_done,
                             "is_epoch_end": self._is_epoch_end, "is_ending": state.is_ending,
                             "lr_scale": state.lr_scale, "metrics": dict(getattr(state, "metrics", {}))},
                "rng": rng.to_plain(rng.capture(saved_state.loader_generators(state))),
                "epoch_rng": rng.to_plain(self._at_epoch_start), "loader": self._loader(state),
                "window": None if self._is_epoch_end else state.window.state_dict(),
                "callbacks": saved_state.capture_callbacks(state)}

    def _loader(self, state: State) -> dict[str, Any]:
        loader: Any = state.train_dl
        kind = way(loader)
        in_pass = kind != "state" and self._n_done and not self._is_epoch_end
        return {"is_first_pass": self._is_first_pass, "first": self._first_batch,
                "last": digest(state.source.newest) if in_pass else None,
                "validating": [name for name, loader in state.valid_sets if getattr(loader, "_iterator", None)],
                "state": loader.state_dict() if kind == "state" else None}

    def _validated(self, state: State, monitor: str) -> dict[str, Any] | None:
        """The weights that were validated, if a callback puts others in the model's place for that."""
        if monitor.startswith("train_") or all(type(cb).evaluating is Callback.evaluating for cb in state.callbacks):
            return None
        with evaluating(state.callbacks, state.model):
            return {name: map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), value)
                    for name, value in state.model.state_dict().items()}
