"""A fit that goes on where it was killed: what `resume=` finds, whether it is this fit, and how it is taken up."""
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from . import replay, rng, saved_state
from .callback import CancelFit
from .checkpoint import FORMAT, Checkpoint
from .errors import shown
from .files import probe, sweep
from .identity import differences, environment, facts
from .progress import Progress, say
from .replay import Entry
from .run_folder import FitFolder, locked, newest
from .signals import DeferredInterrupt
from .state import State
from .tables import listed

Resume = bool | str | os.PathLike[str]
PARTS = ("run", "finished", "facts", "environment", "position", "rng", "epoch_rng", "loader", "window", "callbacks",
         "model", "optimizer")  # of a checkpoint
log = logging.getLogger("minifast")


def check_resume(resume: Any) -> Resume:
    """`resume` if it has one of its forms. Raises TypeError or ValueError otherwise."""
    if not isinstance(resume, (bool, str, os.PathLike)):
        raise TypeError(f'resume must be "auto", True, False, or the path of a checkpoint, got {shown(resume)}.')
    if not isinstance(resume, bool) and not os.fspath(resume):
        raise ValueError('resume must be "auto", True, False, or the path of a checkpoint, got an empty path.')
    return resume


@contextmanager
def session(state: State, number: int, resume: Resume) -> Iterator["Session"]:
    """A block for one fit: the folder of its checkpoints is locked, and the checkpoint that it goes on from is read.

    number: which fit of its run it is, from 1. Raises ValueError for a checkpoint of another fit, FileNotFoundError
    where there has to be one, FileExistsError for a run that would be overwritten, OSError for a folder that cannot
    be written, RuntimeError for one that is in use: all before anything is changed.
    """
    saver = next((cb for cb in state.callbacks if isinstance(cb, Checkpoint)), None)
    if saver is None:
        if resume is True or resume == "auto":
            raise ValueError(f"resume={resume!r} has to know where the checkpoints are: pass "
                             'callbacks=[Checkpoint("runs/a")], or the path of a checkpoint.')
        yield Session(state, None, None, None if resume is False else _named(Path(resume), number))
        return
    run = Path(saver.path)
    folder = FitFolder(run / f"fit-{number}")
    with locked(run):
        folder.make()
        probe(folder.path)
        sweep(folder.path)
        try:
            yield Session(state, saver, folder, _find(folder, resume, number))
        finally:
            saver.end()


def _find(folder: FitFolder, resume: Resume, number: int) -> list[Path] | None:
    """The checkpoints to go on from, newest first; None to start afresh."""
    own = folder.checkpoints()
    if resume is False:
        if own:
            raise FileExistsError(f"{folder.path} holds a run already, up to {own[0].name}. To go on with it pass "
                                  'resume="auto"; to start afresh pass another folder, or remove this one.')
        return None
    if resume == "auto":
        return own or None
    if resume is True:
        if not own:
            raise FileNotFoundError(f"there is no checkpoint in {folder.path}. Pass resume=\"auto\" to start afresh "
                                    "where there is none.")
        return own
    named = _named(Path(resume), number)
    if own and named[0].resolve().parent != folder.path.resolve():
        raise FileExistsError(f"{folder.path} holds another run already, up to {own[0].name}, which this one would "
                              "overwrite. Give Checkpoint another folder.")
    return named


def _named(path: Path, number: int) -> list[Path]:
    """The checkpoints that `path` means: a file; or the folder of a fit, or of a run, newest first."""
    if path.is_dir():
        found = FitFolder(path).checkpoints() or FitFolder(path / f"fit-{number}").checkpoints()
        if found:
            return found
    elif path.exists():
        return [path]
    raise FileNotFoundError(f"there is no checkpoint {'in ' * path.is_dir()}{path} to resume.")


class Session:
    """One fit that is saved, resumed, or both."""

    def __init__(self, state: State, saver: Checkpoint | None, folder: FitFolder | None, candidates: list[Path] | None
                 ) -> None:
        self._state, self._saver, self._folder = state, saver, folder
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
        if saver is not None and folder is not None:
            saver.begin(folder, uuid4().hex if self._saved is None else self._saved["run"], own)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self._saved is not None and bool(self._saved["finished"])

    def begin(self) -> None:
        """Have the fit begin where the checkpoint is, if there is one."""
        if self._saved is None or self._path is None:
            return
        state, position = self._state, self._saved["position"]
        state.step, state.epoch, state.take_up = position["step"], position["epoch"], self._take_up
        if self._folder is not None and self._path.resolve().parent == self._folder.path.resolve():
            for path in self._folder.set_aside(state.step):
                log.warning("%s is newer than what the fit goes on from: it was renamed to *.superseded", path)

    def restore_final(self) -> None:
        """Put everything where the finished fit has left it."""
        saved, state = self._saved, self._state
        assert saved is not None
        with DeferredInterrupt(), saved_state.all_or_nothing(state):
            self._load(saved)
            rng.restore(rng.from_plain(saved["rng"]), saved_state.loader_generators(state))
        self._say(f"this fit has ended before, after {saved['position']['step']} updates: its final state is restored")

    def finish(self) -> None:
        """The fit has ended well."""
        if self._saver is not None:
            with DeferredInterrupt():
                self._saver.finish(self._state)

    def _take_up(self, state: State) -> None:
        """What `State.take_up` is: everything as it was, once all callbacks have heard `before_fit`."""
        saved = self._saved
        assert saved is not None
        position = saved["position"]
        with saved_state.all_or_nothing(state):
            new = self._load(saved)
            state.lr_scale, state.is_ending = position["lr_scale"], position["is_ending"]
            state.metrics = dict(position["metrics"])
            if self._saver is not None:
                self._saver.take_up(saved)
            is_over = self._enter(state, saved)
        if state.entry is not None:
            for cb in new:  # they come into an epoch that has begun
                cb.before_epoch(state)
        if is_over:
            raise CancelFit

    def _load(self, saved: Mapping[str, Any]) -> list[Any]:
        """Load model, optimizer and callbacks; gives the callbacks of which the checkpoint holds nothing."""
        state, own = self._state, saved_state.keyed(self._state.callbacks)
        saved_state.load_model(state.model, saved["model"])
        saved_state.load_optimizer(state.opt, saved["optimizer"])
        for name, cb in own.items():
            if name in saved["callbacks"]:
                cb.load_state_dict(saved["callbacks"][name])
        return [cb for name, cb in own.items() if name not in saved["callbacks"]]

    def _enter(self, state: State, saved: Mapping[str, Any]) -> bool:
        """Bring the loader and the random generators to where they were. Whether the fit has nothing left to do."""
        position, loader, own = saved["position"], state.train_dl, saved_state.loader_generators(state)
        kind, now = replay.way(loader), rng.from_plain(saved["rng"])
        if kind == "state":
            loader.load_state_dict(saved["loader"]["state"])  # type: ignore[attr-defined]
        if position["is_epoch_end"]:
            rng.restore(now, own)
            self._say(f"resumed after epoch {state.epoch}, {_updates(state)}")
            is_over = state.is_ending or state.epoch + 1 == state.n_epochs
            state.epoch += not is_over
            return is_over
        n_done = position["n_done"]
        if state.is_ending or (n_done == state.n_batches and kind != "state"):
            state.entry = Entry(n_done, limit=n_done)  # no batch is left: none has to be drawn
        else:
            rng.restore(rng.from_plain(saved["epoch_rng"]), own)
            iterator = replay.forward(loader, n_done, state.interrupt, saved["loader"]["digest"])
            state.entry = Entry(n_done, iterator, state.max_batches) if iterator is not None else self._new_pass(n_done)
            doubt = replay.can_differ(loader, saved["loader"]["is_first_pass"])
            if doubt and iterator is not None:
                warnings.warn(f"{self._path}: the training data ({type(loader).__name__}) may go on with other batches "
                              f"than it would have: {doubt}.", stacklevel=2)
        state.entry.window = None if state.entry.is_cut else saved["window"]
        rng.restore(now, own)
        self._say(f"resumed in epoch {state.epoch}, {n_done} batches and {_updates(state)}"
                  + (f"; these batches were drawn again and dropped, as the training data ({type(loader).__name__}) "
                     "can be brought there in no other way" if kind == "draw" and state.entry.iterator else ""))
        return False

    def _new_pass(self, n_done: int) -> Entry:
        """How the fit goes on if the data cannot be brought back into the middle of its pass. Warns of it."""
        state = self._state
        what = f"{self._path}: the training data ({type(state.train_dl).__name__}) gives other batches when its pass " \
               f"is begun again, so it cannot go on behind batch {n_done - 1} of epoch {state.epoch}"
        hint = "A loader with state_dict() and load_state_dict() goes on exactly"
        if state.n_epochs is not None and state.epoch + 1 == state.n_epochs:
            warnings.warn(f"{what}: the rest of this last epoch comes from a new pass. {hint}.", stacklevel=2)
            return Entry(n_done, limit=state.n_batches)
        warnings.warn(f"{what}: training goes on with the next epoch. {hint}.", stacklevel=2)
        return Entry(n_done, limit=n_done, is_cut=True)

    def _say(self, text: str) -> None:
        text = f"{self._path}: {text}"
        if any(isinstance(cb, Progress) for cb in self._state.callbacks):
            say(text)
        else:
            log.info(text)


def check(path: Path, saved: Any, state: State, own: dict[str, Any]) -> None:
    """Raise ValueError unless `saved`, read from `path`, is a checkpoint of this fit; warn of what may change bits.

    own: the fit's `facts`.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("format"), int):
        raise ValueError(f"{path} is not a checkpoint of a fit. Weights are loaded by learn.load(path).")
    if saved["format"] > FORMAT:
        raise ValueError(f"{path} has format {saved['format']}, and this version of minifast reads up to {FORMAT}. "
                         "Upgrade minifast.")
    missing = [part for part in PARTS if part not in saved]
    mine = saved_state.keyed(state.callbacks)
    try:
        problems = [f"it has no {listed(missing)}"] if missing else [
            *differences(saved["facts"], own), *saved_state.model_misfits(state.model, saved["model"]),
            *saved_state.optimizer_misfits(state.model, state.opt, saved["optimizer"])]
        changed = [f"{name} {saved['environment'].get(name)} then, {value} now"
                   for name, value in environment(state).items() if saved["environment"].get(name) != value]
        gone = [name for name, kept in saved["callbacks"].items() if kept and name not in mine]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint that minifast has written ({error!r}).") from error
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{path} was made by another fit:\n  {lines}\nTo go on with it, call the fit with the same "
                         "arguments. To train on from its weights by another plan, load them by learn.load(path) and "
                         "give Checkpoint another folder.")
    new = [name for name, cb in mine.items() if name not in saved["callbacks"] and saved_state.keeps_anything(cb)]
    for names, text in ((gone, "in this fit: what it has kept is left out"),
                        (new, "in the checkpoint: it begins in the middle of the fit")):
        for name in names:
            warnings.warn(f"{path}: there is no {name} {text}.", stacklevel=2)
    if changed:
        warnings.warn(f"{path} was made elsewhere ({'; '.join(changed)}): training goes on, but maybe not with "
                      "the same bits.", stacklevel=2)


def _updates(state: State) -> str:
    of = "" if state.n_epochs is None else f" of {state.n_steps}"
    return f"{state.step}{of} updates"
