"""A fit that goes on where it was killed: what `resume=` finds, whether it is this fit, and how it is taken up."""
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from . import replay, rng, saved_state
from .callback import Callback, CancelFit
from .checkpoint import FORMAT, Checkpoint
from .data import begin
from .errors import check_path, quoted
from .files import probe, sweep
from .identity import differences, environment, facts
from .progress import Progress, say
from .replay import Entry
from .run_folder import FitFolder, locked, newest
from .state import State
from .tables import listed
from .window import Window

Resume = bool | str | os.PathLike[str]
PARTS = ("run", "finished", "facts", "environment", "position", "rng", "epoch_rng", "loader", "window", "callbacks",
         "model", "optimizer")  # of a checkpoint
MOST = 2**53  # of anything that is counted
log = logging.getLogger("minifast")


def check_resume(resume: Any) -> Resume:
    """`resume` if it has one of its forms. Raises TypeError or ValueError otherwise."""
    if isinstance(resume, bool):
        return resume
    if not isinstance(resume, (str, os.PathLike)):
        raise TypeError(f'resume must be "auto", True, False, or the path of a checkpoint, got {quoted(resume)}.')
    return check_path("resume", resume)


@dataclass(frozen=True)
class Place:
    """Where a fit keeps its checkpoints, and which ones it may go on from."""

    saver: Checkpoint | None
    run: str  # the folder of the run
    number: int  # of the fit in it, from 1
    resume: Resume

    @property
    def folder(self) -> FitFolder | None:
        """Where the fit's own checkpoints are; None if it keeps none."""
        return None if self.saver is None else FitFolder(Path(self.saver.path) / f"fit-{self.number}")

    def candidates(self) -> list[Path] | None:
        """The checkpoints to go on from, newest first; None to start afresh.

        Raises FileNotFoundError where there has to be one, FileExistsError for a run that would be overwritten.
        """
        return _find(self.folder, self.resume, self.number)


def place(callbacks: Iterable[Callback], fits_ended: Mapping[str, int], resume: Resume) -> Place:
    """The place of a fit with `callbacks`. fits_ended: how many fits of the Learner have ended in each run's folder."""
    saver = next((cb for cb in callbacks if isinstance(cb, Checkpoint)), None)
    run = "" if saver is None else os.path.realpath(saver.path)
    return Place(saver, run, fits_ended.get(run, 0) + 1, resume)


@contextmanager
def session(state: State, at: Place) -> Iterator["Session"]:
    """A block for one fit: the folder of its checkpoints is locked, and the checkpoint that it goes on from is read.

    Raises what `Place.candidates` does, ValueError for a checkpoint of another fit, OSError for a folder that cannot
    be written, RuntimeError for one that is in use: all before anything is changed.
    """
    saver, folder = at.saver, at.folder
    if saver is None or folder is None:
        yield Session(state, None, None, at.candidates())
        return
    with locked(folder.path.parent):
        folder.make()
        probe(folder.path)
        sweep(folder.path)
        try:
            yield Session(state, saver, folder, at.candidates())
        finally:
            saver.end()


def _find(folder: FitFolder | None, resume: Resume, number: int) -> list[Path] | None:
    if folder is None:
        if resume is True or resume == "auto":
            raise ValueError(f"resume={resume!r} has to know where the checkpoints are: pass "
                             'callbacks=[Checkpoint("runs/a")], or the path of a checkpoint.')
        return None if resume is False else _named(Path(resume), number)
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
        elif folder is not None:
            folder.set_aside(-1)  # a best checkpoint that is left of a run that was removed
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
        with saved_state.all_or_nothing(state), _taking_up(self._path):
            self._load(saved)
            rng.restore(rng.from_plain(saved["rng"]), saved_state.loader_generators(state))
        self._say(f"this fit has ended before, after {saved['position']['step']} updates: its final state is restored")

    def finish(self) -> None:
        """The fit has ended well."""
        if self._saver is not None:
            self._saver.finish(self._state)

    def _take_up(self, state: State) -> None:
        """What `State.take_up` is: everything as it was, once all callbacks have heard `before_fit`."""
        saved = self._saved
        assert saved is not None
        position = saved["position"]
        with saved_state.all_or_nothing(state):
            with _taking_up(self._path):
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
        n_done = position["n_done"]
        is_over = position["is_epoch_end"] and (state.is_ending or state.epoch + 1 == state.n_epochs)
        with _taking_up(self._path):
            now = rng.from_plain(saved["rng"])
            for noted in (rng.from_plain(saved["epoch_rng"]), now):
                rng.restore(noted, own)  # what cannot be restored fails here
            if replay.way(loader) == "state":
                loader.load_state_dict(saved["loader"]["state"])  # type: ignore[attr-defined]
            if saved["window"] is not None:
                Window(state.opt, state.accumulate, state.n_batches).load_state_dict(saved["window"])
        drawn = ""
        if position["is_epoch_end"] or state.is_ending or n_done == state.max_batches:
            if not state.is_ending and not is_over:
                self._end_pass(state, saved, own)
        else:
            drawn = self._go_into_pass(state, saved, own)
        if not position["is_epoch_end"]:
            state.entry = state.entry or Entry(n_done, limit=n_done)
            state.entry.window = None if state.entry.is_cut else saved["window"]
        rng.restore(now, own)
        if position["is_epoch_end"]:
            self._say(f"resumed after epoch {state.epoch}, {_updates(state)}")
            state.epoch += not is_over
        else:
            batches = f"{n_done} batch{'es' * (n_done != 1)}"
            self._say(f"resumed in epoch {state.epoch}, {batches} and {_updates(state)}{drawn}")
        return is_over

    def _go_into_pass(self, state: State, saved: Mapping[str, Any], own: list[Any]) -> str:
        """Have the fit enter its epoch where it was killed. Gives what is to be said of the way there."""
        loader, noted, n_done = state.train_dl, saved["loader"], saved["position"]["n_done"]
        kind, is_whole = replay.way(loader), n_done == state.n_batches
        if is_whole and kind == "draw" and not replay.remembers(loader):
            return ""  # nothing of the pass is left, and nothing stays of it
        rng.restore(rng.from_plain(saved["epoch_rng"]), own)
        again = replay.forward(loader, n_done, state.interrupt)
        if kind == "draw" and (again.is_over or not _are_same(noted, again, is_whole)):
            replay.leave(loader, again.iterator)
            state.entry = self._new_pass(n_done, is_whole)
            return ""
        state.entry = Entry(n_done, again.iterator, state.max_batches)
        self._doubt(noted)
        return (f"; these batches were drawn again and dropped, as the training data ({type(loader).__name__}) can be "
                "brought there in no other way") if kind == "draw" else ""

    def _end_pass(self, state: State, saved: Mapping[str, Any], own: list[Any]) -> None:
        """Have the loader be where it was when the epoch had drawn all its batches; a new pass comes next."""
        loader, noted, n_done = state.train_dl, saved["loader"], saved["position"]["n_done"]
        is_exhausted = state.max_batches is None and n_done == state.n_batches and saved["position"]["is_epoch_end"]
        if replay.way(loader) == "state":
            if not is_exhausted:  # else the next pass would be the rest of this one
                replay.leave(loader, begin(loader))
        elif self._doubt(noted) or not replay.remembers(loader) or not n_done:
            return
        else:
            rng.restore(rng.from_plain(saved["epoch_rng"]), own)
            again = replay.forward(loader, n_done, state.interrupt)
            if is_exhausted:
                next(again.iterator, None)
            replay.leave(loader, again.iterator)
            if not _are_same(noted, again, is_whole=True):
                warnings.warn(self._other("the next epochs may not have the batches that they would have had"),
                              stacklevel=2)

    def _doubt(self, noted: Mapping[str, Any]) -> bool:
        """Whether other batches may come without anyone noticing. Warns of it."""
        loader = self._state.train_dl
        doubt = replay.can_differ(loader, noted["is_first_pass"])
        if doubt:
            warnings.warn(f"{self._path}: the training data ({type(loader).__name__}) may go on with other batches "
                          f"than it would have: {doubt}.", stacklevel=2)
        return bool(doubt)

    def _new_pass(self, n_done: int, is_whole: bool) -> Entry:
        """How the fit goes on if the data cannot be brought back into the middle of its pass. Warns of it."""
        state = self._state
        if is_whole:
            warnings.warn(self._other("the next epochs may not have the batches that they would have had"),
                          stacklevel=2)
            return Entry(n_done, limit=n_done)
        if state.n_epochs is not None and state.epoch + 1 == state.n_epochs:
            warnings.warn(self._other(f"the rest of this last epoch, behind batch {n_done - 1}, comes from a new pass"),
                          stacklevel=2)
            return Entry(n_done, limit=state.n_batches)
        warnings.warn(self._other(f"the rest of epoch {state.epoch}, behind batch {n_done - 1}, is left out"),
                      stacklevel=2)
        return Entry(n_done, limit=n_done, is_cut=True)

    def _other(self, what: str) -> str:
        return (f"{self._path}: the training data ({type(self._state.train_dl).__name__}) gives other batches when its "
                f"pass is begun again, so {what}. A loader with state_dict() and load_state_dict() goes on exactly.")

    def _say(self, text: str) -> None:
        text = f"{self._path}: {text}"
        if any(isinstance(cb, Progress) for cb in self._state.callbacks):
            say(text)
        else:
            log.info(text)


@contextmanager
def _taking_up(path: Path | None) -> Iterator[None]:
    """An error inside means that a checkpoint holds what nobody can take up: a ValueError that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be taken up: {error!r}. Nothing was changed.") from error


def _check_form(saved: Mapping[str, Any], state: State) -> None:
    """Raise ValueError unless what a fit relies on has its type and range."""
    position, loader = saved["position"], saved["loader"]
    counts = [position[name] for name in ("epoch", "step", "n_done")]
    is_right = (
        all(type(count) is int and 0 <= count < MOST for count in counts)
        and (state.n_epochs is None or position["epoch"] < state.n_epochs)
        and all(type(flag) is bool for flag in (saved["finished"], position["is_epoch_end"], position["is_ending"],
                                                loader["is_first_pass"]))
        and type(position["lr_scale"]) is float and 0 < position["lr_scale"] < math.inf
        and all(isinstance(part, dict) for part in (position["metrics"], saved["rng"], *saved["callbacks"].values()))
        and (isinstance(saved["epoch_rng"], dict) or saved["finished"])
        and all(isinstance(loader[name], (str, type(None))) for name in ("first", "last"))
        and isinstance(saved["run"], str) and isinstance(saved["window"], (dict, type(None))))
    if not is_right:
        raise ValueError("what says where the fit was is not in its form")


def _are_same(noted: Mapping[str, Any], again: replay.Pass, is_whole: bool) -> bool:
    """Whether a pass gives the batches that it gave: the newest, or, of one that is whole, the first.

    Batches that come after it may depend on random numbers that the model has drawn in between.
    """
    then, now = (noted["first"], again.first) if is_whole else (noted["last"], again.last)
    return now is not None and bool(then == now)


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
        if not problems:
            _check_form(saved, state)
        changed = [f"{name} {saved['environment'].get(name)} then, {value} now"
                   for name, value in environment(state).items() if saved["environment"].get(name) != value]
        gone = [name for name, kept in saved["callbacks"].items() if kept and name not in mine]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
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
