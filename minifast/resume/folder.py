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

from ..files.reading import load_tree
from ..files.writing import replacing, save_tree, sweep, sync_folder

NAME = re.compile(r"step-(\d{8,})\.ckpt")
FIT = re.compile(r"fit-([1-9]\d*)")
BEST = "best.ckpt"
log = logging.getLogger("minifast")
_held: set[Path] = set()  # the runs that this process trains: its own lock would not keep it out


class FitFolder:
    """The checkpoints of one fit of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def best(self) -> Path:
        return self.path / BEST

    def checkpoints(self) -> list[Path]:
        """The checkpoint files, newest first."""
        found = [path for path in self.path.glob("step-*.ckpt") if NAME.fullmatch(path.name)]
        return sorted(found, key=step_of, reverse=True)

    def save(self, step: int, tree: Any, keep: int, is_best: bool = False) -> Path:
        """Write the state after update `step`; older ones than the newest `keep` go once it is on the disk."""
        path = self.path / f"step-{step:08d}.ckpt"
        self.make()
        save_tree(tree, path)
        if is_best:
            _link(path, self.best)
        for older in self.checkpoints()[keep:]:
            try:
                older.unlink(missing_ok=True)
            except OSError as error:  # it takes room, that is all
                log.warning("cannot remove the old checkpoint %s: %s", older, error.strerror)
        sweep(self.path)
        return path

    def mend_best(self, path: Path) -> None:
        """Have `best` be `path`, in case a kill came after `path` had its name, and before it was the best one."""
        if not (self.best.exists() and self.best.samefile(path)):
            _link(path, self.best)

    def make(self) -> None:
        """Make the folder, if it is not there."""
        with _explaining(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def set_aside(self, step: int) -> list[Path]:
        """Rename what is newer than `step`, for a fit that goes on from there: else it would pass for the newest."""
        newer = [path for path in self.checkpoints() if step_of(path) > step]
        if self.best.exists() and not self._has_best_up_to(step):
            newer.append(self.best)
        for path in newer:
            os.replace(path, path.with_suffix(".superseded"))
        return newer

    def _has_best_up_to(self, step: int) -> bool:
        """Whether the best checkpoint can be read, and is of `step` or before."""
        try:
            return bool(load_tree(self.best, checked=True)["position"]["step"] <= step)
        except (OSError, ValueError, TypeError, KeyError):
            return False


def fits_of(run: Path) -> list[FitFolder]:
    """The folders of the fits of a run that hold anything, in their order."""
    found = {int(match[1]): path for path in run.glob("fit-*") if (match := FIT.fullmatch(path.name))}
    folders = [FitFolder(path) for _, path in sorted(found.items())]
    return [folder for folder in folders if folder.checkpoints() or folder.best.exists()]


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint.

    >>> step_of(Path("runs/a/fit-1/step-00000200.ckpt"))
    200
    """
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is not the name of a checkpoint, such as step-00000200.ckpt.")
    return int(match[1])


def newest(paths: list[Path]) -> tuple[Path, Any, list[str]]:
    """The first of `paths` that can be read, what is in it, and why those before it were skipped.

    Raises ValueError if none can be read.
    """
    skipped: list[str] = []
    for path in paths:
        try:
            return path, load_tree(path, checked=True), skipped
        except (ValueError, OSError) as error:
            text = str(error)
            skipped.append(text if str(path) in text else f"{path}: {text}")
    raise ValueError(f"no checkpoint can be read: {' '.join(skipped)} To start afresh, remove their folder "
                     "or pass another one.")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """A block in which no other process, and no other fit of this one, writes to the folder `run`.

    Raises RuntimeError that says who does. The lock ends with the process. Where the file system has no locks, there
    is none.
    """
    with _explaining(run):
        run.mkdir(parents=True, exist_ok=True)
    key = run.resolve()
    if key in _held:
        raise RuntimeError(f"{run} is in use by another fit of this process. Give each Learner a folder of its own.")
    _held.add(key)
    try:
        with _explaining(run):
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


def _link(path: Path, best: Path) -> None:
    """Have `best` be the same file as `path`, in one move."""
    temporary = best.with_name(f".{best.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError as error:
        log.debug("no hard link in %s (%s): the best checkpoint is a copy", best.parent, error.strerror)
        with open(path, "rb") as source, replacing(best) as copy:
            shutil.copyfileobj(source, copy)
        return
    try:
        os.replace(temporary, best)  # of two links to one file it is no move, and leaves the temporary
        sync_folder(best.parent)
    finally:
        temporary.unlink(missing_ok=True)
