"""Files that are whole or not there, and plain values in them that are checked when they are read.

Each call that changes the disk goes through `os.` or `write` here, so that a test can stop the process at any of them.
"""
import errno
import io
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from .trees import check_plain, size_of, to_save

BUFFER = 64 * 1024
PathLike = str | os.PathLike[str]
log = logging.getLogger("minifast")

_TEMPORARY = re.compile(r"\..+\.([1-9]\d{0,9})\.tmp", re.DOTALL)
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR)
_in_use: set[Path] = set()  # temporaries of this process that are being written


# ---- writing


@contextmanager
def replacing(path: PathLike, needed: int | None = None) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once its block has ended well and all of it is on the disk.

    Until then, and if anything fails, what was at `path` is as it was: a link is replaced, not followed. needed: bytes
    that it will take, for the message. Raises OSError that says which step failed and how much space there is.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot save to {path}: it is a folder. Pass the name of a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save to {path}: there is no folder {path.parent}. Make it first.")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"cannot save to {path}: it is a pipe or a device. Pass the name of a file.")
    temporary = _temporary(path)
    step, raw, is_renamed = "open", None, False
    try:
        raw = _Raw(_create(temporary))
        if path.exists() and hasattr(os, "fchmod"):  # who may read it does not change
            os.fchmod(raw.fileno(), stat.S_IMODE(path.stat().st_mode))
        step = ""
        file = io.BufferedWriter(raw, BUFFER)
        yield cast(BinaryIO, file)
        file.flush()
        step = "fsync"
        os.fsync(raw.fileno())
        step = "close"
        raw.close()
        step = "rename"
        os.replace(temporary, path)
        is_renamed = True
        step = "fsync of the folder"
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        failure = _os_error(error)
        if failure is None:
            raise
        raise type(failure)(failure.errno, _explain(path, temporary, failure, step, needed)) from error
    finally:
        if raw is not None:
            _drop(temporary, raw, is_renamed)


def save_tree(tree: Any, path: PathLike) -> None:
    """Write a plain tree to `path`: whole, or not at all. Tensors are written as they lie in memory, one by one.

    Raises TypeError that names the place of what is not plain (see `trees`), OSError for what the disk refuses.
    """
    check_plain(tree)
    with replacing(path, needed=size_of(tree)) as file, _check_sums():
        torch.save(to_save(tree), file)


def sweep(folder: PathLike) -> list[Path]:
    """Remove the temporaries of processes of this machine that are dead from `folder`; gives what was removed."""
    if os.name != "posix":  # no way to ask for a process there without the risk of ending it
        return []
    removed = []
    with suppress(OSError):
        for path in sorted(Path(folder).iterdir()):
            match = _TEMPORARY.fullmatch(path.name)
            if match is not None and not _is_alive(int(match[1])):
                with suppress(OSError):  # gone already, or a folder
                    os.unlink(path)
                    removed.append(path)
    return removed


def probe(folder: PathLike) -> None:
    """Write a small file into `folder`, have it on the disk and remove it. Raises OSError that says what to do."""
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, f"cannot write into {folder}: it is no folder. Pass the name of "
                                                    "a folder.")
        raise FileNotFoundError(errno.ENOENT, f"cannot write into {folder}: there is no such folder. Make it first.")
    temporary = _temporary(folder / "probe")
    raw = None
    try:
        raw = _Raw(_create(temporary))
        raw.write(bytes(4096))
        os.fsync(raw.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Make room" if full else "Make it writable"
        raise type(error)(error.errno, f"cannot write into {folder}: {error.strerror or error}{_free(folder)}. "
                                       f"{advice}, or pass another folder.") from error
    finally:
        if raw is not None:
            _drop(temporary, raw)


def write(handle: int, data: bytes | memoryview) -> int:
    """All that is ever written to a file by this module comes through here; gives how many bytes were taken."""
    return os.write(handle, data)


@contextmanager
def _check_sums() -> Iterator[None]:
    """Have torch write them, whatever it is set to."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Raw(io.RawIOBase):
    """A file to write to, by its handle."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        n = len(left)
        while left:
            left = left[write(self._handle, left):]
        return n

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._handle)

    def shut(self) -> None:
        """Close it, whatever the disk says: for after a failure."""
        with suppress(OSError):
            self.close()


def _temporary(path: Path) -> Path:
    return Path(os.path.abspath(path.parent)) / f".{path.name}.{os.getpid()}.tmp"


def _create(temporary: Path) -> int:
    """A handle of a new file: one that is there is never written to, nor what a link there points to."""
    if temporary in _in_use:
        raise OSError(errno.EBUSY, "another thread of this process is saving to it")
    _in_use.add(temporary)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        try:
            return os.open(temporary, flags, 0o666)  # less what the umask takes away
        except FileExistsError:  # of a process that is dead, since its number is ours; or put there
            os.unlink(temporary)
            return os.open(temporary, flags, 0o666)
    except BaseException:
        _in_use.discard(temporary)
        raise


def _drop(temporary: Path, raw: _Raw, is_renamed: bool = False) -> None:
    """Close the file and, unless it has another name by now, remove it: as far as a failing disk lets us."""
    raw.shut()
    if not is_renamed:
        with suppress(OSError):  # `sweep` takes what is left
            os.unlink(temporary)
    _in_use.discard(temporary)


def sync_folder(folder: Path) -> None:
    """Have the new name on the disk, where the system can do that."""
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError as error:  # a folder to write to, but not to be listed
        log.debug("no fsync of the folder %s: %s", folder, error.strerror)
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
        log.debug("no fsync of the folder %s: %s", folder, error.strerror)
    finally:
        os.close(handle)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks whether it is there
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of somebody else; or no process's number
        return True
    return True


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`: torch raises a RuntimeError where a write fails."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _explain(path: Path, temporary: Path, failure: OSError, step: str, needed: int | None) -> str:
    text = f"{failure.strerror or failure}{' in ' * bool(step)}{step}"
    if step == "fsync of the folder":
        return f"cannot save to {path} for sure: {text}. The new file is there, but a power cut might lose it."
    space = _free(path.parent, needed)
    if needed is None:
        with suppress(OSError):
            space = _free(path.parent, temporary.stat().st_size, "{:,.1f} MB were written")
    return f"cannot save to {path}: {text}{space}. What was there is as it was."


def _free(folder: Path, n: int | None = None, what: str = "needs {:,.1f} MB") -> str:
    """E.g. " (needs 41.0 MB, 2.0 MB are free)"; nothing where the system does not tell."""
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError:
        return ""
    return f" ({free})" if n is None else f" ({what.format(n / 1e6)}, {free})"


# ---- reading


