"""The folder of a run: which files are in it, in which order they appear and go, and who may write there.

    runs/a/.lock                    held by the process that trains
    runs/a/fit-1/step-00000200.ckpt the state after update 200 of the first fit
    runs/a/fit-1/best.ckpt          a link to the checkpoint of the best epoch

Names are fixed and nothing in a file is used as one. Newer is what has done more steps: clocks are not asked.
"""
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from ..files.reading import load_tree
from ..files.weights import put_weights
from ..files.writing import replacing, save_tree, sweep, sync_folder, temporary

BEST = "best.ckpt"
log = logging.getLogger("minifast")
_held: set[str] = set()  # the runs that this process trains: its own lock would not keep it out


class FitFolder:
    """The checkpoints of one fit of a run."""

    def __init__(self, path: Path) -> None:
        self.path, self.best = path, path / BEST

    def checkpoints(self) -> list[Path]:
        """The checkpoint files, newest first."""
        found = [path for path in self.path.glob("step-*.ckpt") if re.fullmatch(r"step-\d{8,}", path.stem)]
        return sorted(found, key=_step_of, reverse=True)

    def save(self, step: int, tree: Any, keep: int, is_best: bool = False) -> None:
        """Write the state after update `step`; older ones than the newest `keep` go once it is on the disk."""
        path = self.path / f"step-{step:08d}.ckpt"
        self.make()
        save_tree(tree, path)
        if is_best:
            self.link_best(path)
        for older in self.checkpoints()[keep:]:
            try:
                older.unlink(missing_ok=True)
            except OSError as error:  # it takes room, that is all
                log.warning("cannot remove the old checkpoint %s: %s", older, error.strerror)
        sweep(self.path)

    def link_best(self, path: Path) -> None:
        """Have `best` be the same file as `path`, in one move."""
        try:
            with temporary(self.best) as link:
                os.link(path, link)
                os.replace(link, self.best)
            sync_folder(self.path)
        except OSError as error:
            log.debug("no hard link in %s (%s): the best checkpoint is a copy", self.path, error.strerror)
            with open(path, "rb") as source, replacing(self.best) as copy:
                shutil.copyfileobj(source, copy)

    def make(self) -> None:
        """Make the folder, if it is not there."""
        with _explaining(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def set_aside(self, step: int) -> list[Path]:
        """Rename what is newer than `step`, for a fit that goes on from there: else it would pass for the newest."""
        newer = [path for path in self.checkpoints() if _step_of(path) > step]
        try:
            is_best_newer = self.best.exists() and load_tree(self.best, checked=True)["position"]["step"] > step
        except (OSError, ValueError, TypeError, KeyError):
            is_best_newer = True  # or cannot be read
        if is_best_newer:
            newer.append(self.best)
        for path in newer:
            os.replace(path, path.with_suffix(".superseded"))
        return newer


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def newest(paths: list[Path]) -> tuple[Path, Any]:
    """The first of `paths` that can be read, and what is in it. Raises ValueError if none can be read."""
    skipped: list[str] = []
    for path in paths:
        try:
            saved = load_tree(path, checked=True)
        except (ValueError, OSError) as error:
            skipped.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        for reason in skipped:
            log.warning("skipped: %s", reason)
        return path, saved
    raise ValueError(f"no checkpoint can be read: {' '.join(skipped)} To start afresh, remove or change their folder.")


def load_best(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `Learner.load_best` does; gives {"monitor", "value", "epoch"} of the best weights."""
    file = _best_file(Path(path))
    saved = load_tree(file, checked=True)
    best = saved.get("best") if isinstance(saved, dict) else None
    if not isinstance(best, dict) or not {"monitor", "value", "epoch", "weights"} <= best.keys():
        raise ValueError(f"{file} is not the best checkpoint of a run. Its weights are loaded by learn.load(path).")
    beside = FitFolder(file.parent).checkpoints()
    if beside and newest(beside)[1].get("run") != saved.get("run"):
        raise ValueError(f"{file} is of another run than the checkpoints beside it: there is no best in this one.")
    put_weights(model, saved["model"]["weights"] if best["weights"] is None else best["weights"], file)
    return {name: best[name] for name in ("monitor", "value", "epoch")}


def _best_file(path: Path) -> Path:
    if path.is_file():
        return path
    numbered = {int(fit.name[4:]): FitFolder(fit) for fit in path.glob("fit-*")
                if re.fullmatch(r"fit-[1-9]\d*", fit.name)}
    fits = [fit for _, fit in sorted(numbered.items()) if fit.checkpoints() or fit.best.exists()] or [FitFolder(path)]
    folder = fits[-1]
    if folder.best.is_file():
        return folder.best
    others = [str(fit.path) for fit in fits if fit.best.is_file()]
    hint = f"There is one in {', '.join(others)}." if others else \
        "It is written by callbacks=[Checkpoint(path), SaveBest(...)] once an epoch was the best."
    raise FileNotFoundError(f"there is no {BEST} in {folder.path}. {hint}")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """A block in which no other process, and no other fit of this one, writes to the folder `run`, made if need be.

    Raises RuntimeError that says who does. The lock ends with the process. Some file systems have none.
    """
    key = os.path.realpath(run)
    if key in _held:
        raise RuntimeError(f"{run} is in use by another fit of this process. Give each Learner a folder of its own.")
    _held.add(key)
    try:
        with _explaining(run):
            run.mkdir(parents=True, exist_ok=True)
            handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(handle, run)
            yield
        finally:
            os.close(handle)  # and with it goes the lock
    finally:
        _held.discard(key)


@contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    """An OSError of the block says what to do."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"cannot use {folder} for checkpoints: {error.strerror}. Make it a folder that "
                                       "can be written, or pass another folder.") from error


def _lock(handle: int, run: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        log.debug("no lock on %s: this system has none of the kind", run)
        return
    try:
        # a lock of this process alone: one of flock would go on with its children, and outlive a kill by theirs
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        raise RuntimeError(f"{run} is in use by {owner}. Wait for it, or pass another folder.") from None
    except OSError as error:
        log.debug("no lock on %s: %s", run, error.strerror)
        return
    text = f"pid {os.getpid()} on host {socket.gethostname()} since {datetime.now(UTC).isoformat(timespec='seconds')}"
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)
