"""One fit that is saved, resumed, or both."""
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from ..base import rng
from ..core import loop
from ..core.callback import Callback, CancelFit
from ..core.emitter import Emitter
from ..core.state import State
from ..files.writing import probe, sweep
from . import saved_state
from .checkpoint import Checkpoint
from .folder import FitFolder, locked, newest
from .identity import facts
from .replay import leave
from .rewind import WayBack, taking_up
from .verify import check
from .where import Place, Resume, place

log = logging.getLogger("minifast")
_ended_here: set[tuple[str, int]] = set()  # (run, number) of the fits that have ended in this process


def run(state: State, fits_ended: Mapping[str, int], resume: Resume) -> dict[str, int]:
    """Run a fit that is saved, resumed, or both. Gives how many fits have ended in each run's folder.

    Raises what `session` does.
    """
    at = place(state.callbacks, fits_ended, resume)
    key = at.real_run, at.number
    with session(state, at) as kept:
        if kept.is_finished:
            if at.saver is not None and key in _ended_here:
                log.warning("fit %d in %s was ended by another Learner of this process: this one is not trained, but "
                            "gets its final state. Give each Learner a folder of its own.", at.number, at.run)
            kept.restore_final()
        else:
            kept.begin()
            loop.run(state, kept.emitter)
            kept.finish()
    _ended_here.add(key)
    return {**fits_ended, at.real_run: at.number}


@contextmanager
def session(state: State, at: Place) -> Iterator["Session"]:
    """A block for one fit: the folder of its checkpoints is locked, and the checkpoint that it goes on from is read.

    Raises what `Place.candidates` does, ValueError for a checkpoint of another fit, OSError for a folder that cannot
    be written, RuntimeError for one that is in use: all before anything is changed.
    """
    with nullcontext() if at.folder is None else _made_ready(at.folder):
        made = Session(state, at.saver, at.folder, at.candidates())
        try:
            yield made
        finally:
            made.close()


@contextmanager
def _made_ready(folder: FitFolder) -> Iterator[None]:
    with locked(folder.path.parent):
        folder.make()
        probe(folder.path)
        sweep(folder.path)
        yield


class Session:
    """One fit that is saved, resumed, or both."""

    def __init__(self, state: State, saver: Checkpoint | None, folder: FitFolder | None, candidates: list[Path] | None
                 ) -> None:
        self._state, self._saver, self._folder = state, saver, folder
        self._loss = state.loss_func  # before any callback wraps it
        own = facts(state)
        self._path: Path | None = None
        self._saved: dict[str, Any] | None = None
        if candidates:
            self._path, self._saved, skipped = newest(candidates)
            for reason in skipped:
                log.warning("skipped: %s", reason)
            check(self._path, self._saved, state, own)
            if folder is not None and self._saved.get("best") is not None and self._path.parent == folder.path:
                folder.mend_best(self._path)
        elif folder is not None:
            folder.set_aside(-1)  # a best checkpoint that is left of a run that was removed
        if saver is not None and folder is not None:
            saver.begin(folder, uuid4().hex if self._saved is None else self._saved["run"], state, own)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self._saved is not None and bool(self._saved["finished"])

    def begin(self) -> None:
        """Have the fit begin where the checkpoint is, if there is one."""
        if self._saved is None or self._path is None:
            return
        state, position = self._state, self._saved["position"]
        state.step, state.epoch = position["step"], position["epoch"]
        if self._folder is not None and self._path.resolve().parent == self._folder.path.resolve():
            for path in self._folder.set_aside(state.step):
                log.warning("%s is not what the fit goes on from: it was renamed to *.superseded", path)

    def restore_final(self) -> None:
        """Put everything where the finished fit has left it."""
        saved, state, path = self._saved, self._state, self._path
        assert saved is not None
        assert path is not None
        with saved_state.all_or_nothing(state), taking_up(path):
            self._load(saved)
            rng.restore(rng.from_plain(saved["rng"]), saved_state.loader_generators(state))
        self._say(f"this fit has ended before, after {saved['position']['step']} updates: its final state is restored")

    def finish(self) -> None:
        """The fit has ended well."""
        if self._saver is not None:
            self._saver.finish(self._state)

    def close(self) -> None:
        """The fit has ended, one way or another."""
        if self._saver is not None:
            self._saver.end()
        entry = self._state.source.entry
        if entry is not None and entry.iterator is not None:  # it was brought forward, and then not entered
            leave(self._state.train_dl, entry.iterator)

    def emitter(self, callbacks: Sequence[Callback], state: State) -> Emitter:
        """Who emits the events of this fit."""
        return Emitter(callbacks, state) if self._saved is None else _TakingUp(callbacks, state, self._take_up)

    def _take_up(self, state: State) -> None:
        """Make everything what it was, once all callbacks have heard `before_fit`."""
        saved, path = self._saved, self._path
        assert saved is not None
        assert path is not None
        position = saved["position"]
        with saved_state.all_or_nothing(state):
            with taking_up(path):
                new = self._load(saved)
            state.lr_scale, state.is_ending = position["lr_scale"], position["is_ending"]
            state.metrics = dict(position["metrics"])
            if self._saver is not None:
                self._saver.take_up(saved)
            text = WayBack(state, saved, path).go()
        self._say(text)
        self._saved = None  # it takes as much memory as all that it was taken up into
        if state.source.entry is not None:
            for cb in new:  # they come into an epoch that has begun
                cb.before_epoch(state)
        elif state.is_ending or state.epoch + 1 == state.n_epochs:
            raise CancelFit  # there is nothing left to train
        else:
            state.epoch += 1

    def _load(self, saved: Mapping[str, Any]) -> list[Callback]:
        """Load model, optimizer and callbacks; gives the callbacks of which the checkpoint holds nothing."""
        state, own = self._state, saved_state.keyed(self._state.callbacks)
        saved_state.load_model(state.model, saved["model"])
        saved_state.load_optimizer(state.opt, saved["optimizer"])
        if isinstance(self._loss, nn.Module):
            self._loss.load_state_dict(saved["loss"])
        for name, cb in own.items():
            if name in saved["callbacks"]:
                cb.load_state_dict(saved["callbacks"][name])
        return [cb for name, cb in own.items() if name not in saved["callbacks"]]

    def _say(self, text: str) -> None:
        self._state.say(f"{self._path}: {text}")


class _TakingUp(Emitter):
    """The events of a fit that goes on: what it was is taken up behind `before_fit`.

    If it goes on in the middle of an epoch, `before_epoch` was heard before, and is passed over once.
    """

    def __init__(self, callbacks: Sequence[Callback], state: State, take_up: Callable[[State], None]) -> None:
        super().__init__(callbacks, state)
        self._take_up = take_up

    @contextmanager
    def fit(self) -> Iterator[None]:
        with super().fit():
            self._take_up(self.state)
            if self.state.source.entry is not None:
                heard = self.hooks[Callback.before_epoch]
                self.hooks[Callback.before_epoch] = (lambda state: self._hear_again(heard),)
            yield

    def _hear_again(self, heard: tuple[Any, ...]) -> None:
        self.hooks[Callback.before_epoch] = heard
