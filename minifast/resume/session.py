"""One fit that is saved, resumed, or both: where its checkpoints are, what `resume=` means, and how it is run."""
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..base import rng
from ..core import loop
from ..core.callback import Callback, CancelFit
from ..core.emitter import Emitter
from ..core.state import State
from ..files.writing import probe, sweep
from ..standard.recorder import Recorder
from . import saved_state
from .checkpoint import Checkpoint
from .folder import FitFolder, locked, newest
from .identity import Facts, check, facts
from .replay import Rewind, leave, taking_up

Resume = bool | str | os.PathLike[str]
log = logging.getLogger("minifast")
_ended_here: set[tuple[str, int]] = set()  # (run, number) of the fits that have ended in this process


class Where:
    """Where a fit keeps its checkpoints, and which ones it may go on from; `fits_ended` is what `run` gives."""

    def __init__(self, callbacks: Iterable[Callback], fits_ended: Mapping[str, int], resume: Resume) -> None:
        self.resume, self.saver = resume, next((cb for cb in callbacks if isinstance(cb, Checkpoint)), None)
        self.run = "" if self.saver is None else os.path.abspath(self.saver.path)  # a callback may change the directory
        self.real_run = os.path.realpath(self.run)  # by whatever name it is reached, its fits are counted together
        self.number = fits_ended.get(self.real_run, 0) + 1  # of the fit in it
        self.folder = None if self.saver is None else FitFolder(Path(self.run) / f"fit-{self.number}")

    def candidates(self) -> list[Path]:
        """The checkpoints to go on from, newest first; none to start afresh.

        Raises FileNotFoundError where there has to be one, FileExistsError for a run that would be overwritten.
        """
        folder, resume = self.folder, self.resume
        if folder is None and (resume is True or resume == "auto"):
            raise ValueError(f"resume={resume!r} has to know where the checkpoints are: pass "
                             'callbacks=[Checkpoint("runs/a")], or the path of a checkpoint.')
        own = [] if folder is None else folder.checkpoints()
        if resume is False and own:
            raise FileExistsError(f"{own[0].parent} holds a run already, up to {own[0].name}. To go on with it pass "
                                  'resume="auto"; to start afresh pass another folder, or remove this one.')
        if resume is True and folder is not None and not own:
            raise FileNotFoundError(f'there is no checkpoint in {folder.path}. Pass resume="auto" to start afresh.')
        if isinstance(resume, bool) or resume == "auto":
            return own
        path = Path(resume)
        named = [path] if path.exists() else []
        if path.is_dir():
            named = FitFolder(path).checkpoints() or FitFolder(path / f"fit-{self.number}").checkpoints()
        if not named:
            raise FileNotFoundError(f"there is no checkpoint {'in ' * path.is_dir()}{path} to resume.")
        if folder is not None and own and named[0].resolve().parent != folder.path.resolve():
            raise FileExistsError(f"{own[0].parent} holds another run already, up to {own[0].name}, which this one "
                                  "would overwrite. Give Checkpoint another folder.")
        return named


def run(state: State, fits_ended: Mapping[str, int], resume: Resume) -> dict[str, int]:
    """Run a fit that is saved, resumed, or both. Gives how many fits have ended in each run's folder.

    Raises what `Where.candidates` does, ValueError for a checkpoint of another fit, OSError for a folder that cannot
    be written, RuntimeError for one that is in use: all before anything is changed.
    """
    where = Where(state.callbacks, fits_ended, resume)
    saver, folder, key = where.saver, where.folder, (where.real_run, where.number)
    with nullcontext() if folder is None else locked(folder.path.parent):
        if folder is not None:
            folder.make()
            probe(folder.path)
            sweep(folder.path)
        own = facts(state)
        resumed = _found(state, where, own)
        try:
            if saver is not None and folder is not None:
                saver.begin(folder, uuid4().hex if resumed is None else resumed.run_id, state, own)
            if resumed is not None and resumed.is_finished:
                if saver is not None and key in _ended_here:
                    log.warning("fit %d in %s was ended by another Learner of this process: this one is not trained, "
                                "it gets its final state. Give each Learner its own folder.", where.number, where.run)
                resumed.restore_final()
            else:
                if resumed is not None:
                    resumed.begin(folder)
                loop.run(state, Emitter if resumed is None else partial(_TakingUp, resumed))
                if saver is not None:
                    saver.finish(state)
        finally:
            if saver is not None:
                saver.end()
            entry = state.source.entry
            if entry is not None and entry.iterator is not None:  # it was brought forward, and then not entered
                leave(state.train_dl, entry.iterator)
    _ended_here.add(key)
    return {**fits_ended, where.real_run: where.number}


def _found(state: State, where: Where, own: Facts) -> "Resumed | None":
    """What the fit goes on from, checked; None to start afresh."""
    candidates, folder = where.candidates(), where.folder
    if not candidates:
        if folder is not None:
            folder.set_aside(-1)  # a best checkpoint that is left of a run that was removed
        return None
    path, saved = newest(candidates)
    check(path, saved, state, own)
    if folder is not None and saved.get("best") is not None and path.parent == folder.path:
        folder.link_best(path)  # in case a kill came after the file had its name, and before it was the best one
    return Resumed(state, path, saved, where.saver)


class Resumed:
    """A fit that goes on from `saved`, the checkpoint that was read from `path`."""

    def __init__(self, state: State, path: Path, saved: dict[str, Any], saver: Checkpoint | None) -> None:
        self._state, self._path, self._saved, self._saver = state, path, saved, saver
        self._loss = state.loss_func  # before any callback wraps it
        self.run_id: str = saved["run"]
        self.is_finished: bool = saved["finished"]  # there is nothing left to train

    def begin(self, folder: FitFolder | None) -> None:
        """Have the fit begin where the checkpoint is; `folder` is to hold its own ones."""
        position = self._saved["position"]
        self._state.step, self._state.epoch = position["step"], position["epoch"]
        if folder is not None and self._path.resolve().parent == folder.path.resolve():
            for path in folder.set_aside(self._state.step):
                log.warning("%s is not what the fit goes on from: it was renamed to *.superseded", path)

    def restore_final(self) -> None:
        """Put everything where the finished fit has left it."""
        state, saved = self._state, self._saved
        with saved_state.all_or_nothing(state), taking_up(self._path):
            for cb in state.callbacks:
                if isinstance(cb, Recorder):
                    cb.before_fit(state)  # it is to have a record of its own for this fit, as for one that runs
            saved_state.load(state, self._loss, saved)
            rng.restore(rng.from_plain(saved["rng"]), saved_state.loader_generators(state))
        state.say(f"{self._path}: this fit has ended before, after {saved['position']['step']} updates: its final "
                  "state is restored")

    def take_up(self) -> None:
        """Make everything what it was, once all callbacks have heard `before_fit`."""
        state, saved, position = self._state, self._saved, self._saved["position"]
        with saved_state.all_or_nothing(state):
            with taking_up(self._path):
                new = saved_state.load(state, self._loss, saved)
            state.lr_scale, state.is_ending = position["lr_scale"], position["is_ending"]
            state.metrics = dict(position["metrics"])
            if self._saver is not None:
                self._saver.take_up(saved)
            text = Rewind(state, saved, self._path).go()
        state.say(f"{self._path}: {text}")
        self._saved = {}  # it takes as much memory as all that it was taken up into
        if state.source.entry is not None:
            for cb in new:  # they come into an epoch that has begun
                cb.before_epoch(state)
        elif state.is_ending or state.epoch + 1 == state.n_epochs:
            raise CancelFit  # there is nothing left to train
        else:
            state.epoch += 1


class _TakingUp(Emitter):
    """The events of a fit that goes on: what it was is taken up behind `before_fit`."""

    def __init__(self, resumed: Resumed, callbacks: Sequence[Callback], state: State) -> None:
        super().__init__(callbacks, state)
        self._resumed = resumed

    @contextmanager
    def fit(self) -> Iterator[None]:
        with super().fit():
            self._resumed.take_up()
            if self.state.source.entry is not None:  # in an epoch, whose `before_epoch` was heard before
                event, heard = Callback.before_epoch, self.hooks[Callback.before_epoch]
                self.hooks[event] = (lambda state: self.hooks.update({event: heard}),)
            yield
