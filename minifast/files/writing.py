"""Files that are whole or not there.

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
# what the fsync of a folder may say: there is none; or the folder is to be written to, but not to be listed
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR,
                    errno.EACCES, errno.EPERM)
_in_use: set[Path] = set()  # temporaries of this process that are being written


@contextmanager
def replacing(path: PathLike, needed: int | None = None) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once its block has ended well and all of it is on the disk.

    Until then, and if anything fails, what was at `path` is as it was: a link is replaced, not followed. needed: bytes
    that it will take, for the message. Raises OSError that says what failed and how much space there is.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot save to {path}: it is a folder. Pass the name of a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save to {path}: there is no folder {path.parent}. Make it first.")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"cannot save to {path}: it is a pipe or a device. Pass the name of a file.")
    is_renamed = False
    try:
        with temporary(path) as new:
            with _new_file(new) as (handle, file):
                if path.exists() and hasattr(os, "fchmod"):  # who may read it does not change
                    os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))
                yield file
            os.replace(new, path)
        is_renamed = True
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        failure = _os_error(error)
        if failure is None:
            raise
        text = failure.strerror or failure
        raise type(failure)(failure.errno, (
            f"cannot save to {path} for sure: {text} in fsync of the folder. The new file is there, but a power cut "
            "might lose it." if is_renamed else
            f"cannot save to {path}: {text}{_free(path.parent, needed)}. What was there is as it was.")) from error


def save_tree(tree: Any, path: PathLike) -> None:
    """Write a plain tree to `path`: whole, or not at all. Tensors are written as they lie in memory, one by one.

    Raises TypeError that names what is not plain (see `trees`), OSError for what the disk refuses.
    """
    check_plain(tree)
    has_sums = torch.serialization.get_crc32_options()
    with replacing(path, needed=size_of(tree)) as file:
        try:
            torch.serialization.set_crc32_options(True)  # whatever it is set to
            torch.save(to_save(tree), file)
        finally:
            torch.serialization.set_crc32_options(has_sums)


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
    try:
        with temporary(folder / "probe") as new, _new_file(new) as (_, file):
            file.write(bytes(4096))
    except OSError as error:
        advice = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Make it writable"
        raise type(error)(error.errno, f"cannot write into {folder}: {error.strerror or error}{_free(folder)}. "
                                       f"{advice}, or pass another folder.") from error


def sync_folder(folder: Path) -> None:
    """Have the new name on the disk, where the system can do that."""
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
        log.debug("no fsync of the folder %s: %s", folder, error.strerror)


def write(handle: int, data: bytes | memoryview) -> int:
    """All that is ever written to a file by this module comes through here; gives how many bytes were taken."""
    return os.write(handle, data)


class _Raw(io.FileIO):
    def write(self, data: Any) -> int:
        return write(self.fileno(), memoryview(data).cast("B"))


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that is free, and free again after the block."""
    name = Path(os.path.abspath(path.parent)) / f".{path.name}.{os.getpid()}.tmp"
    if name in _in_use:
        raise OSError(errno.EBUSY, "another thread of this process is saving to it")
    _in_use.add(name)
    try:
        yield name
    finally:
        if os.path.lexists(name):  # it has no other name by now
            with suppress(OSError):  # `sweep` takes what a failing disk does not let us
                os.unlink(name)
        _in_use.discard(name)


@contextmanager
def _new_file(path: Path) -> Iterator[tuple[int, BinaryIO]]:
    """A new file and its handle; on the disk and closed if the block ends well."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags, 0o666)  # less what the umask takes away
    except FileExistsError:  # of a dead process that had our number, or put there: never written to, nor followed
        os.unlink(path)
        handle = os.open(path, flags, 0o666)
    raw = _Raw(handle, "wb", closefd=False)
    try:
        file = io.BufferedWriter(raw, BUFFER)
        yield handle, cast(BinaryIO, file)
        file.flush()
        os.fsync(handle)
    finally:
        raw.close()  # else what is left in the buffer would go to whoever gets the number of the handle next
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


def _free(folder: Path, needed: int | None = None) -> str:
    """E.g. " (needs 41.0 MB, 2.0 MB are free)"; nothing where the system does not tell."""
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError:
        return ""
    return f" ({free})" if needed is None else f" (needs {needed / 1e6:,.1f} MB, {free})"
