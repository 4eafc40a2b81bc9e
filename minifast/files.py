"""Files that are whole or not there, and plain values in them that are checked when they are read."""
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

MOST_ENTRIES = 1_000_000  # of an archive: one for each tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once its block has ended well and all of it is on the disk.

    Until then, and if anything fails, what was at `path` is as it was. Raises OSError that says what is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot save to {path}: it is a folder. Pass the name of a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save to {path}: there is no folder {path.parent}. Make it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        failure = _os_error(error)
        if failure is None:
            raise
        raise type(failure)(failure.errno, _explain(path, temporary, failure)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tree(tree: Any, path: str | os.PathLike[str]) -> None:
    """Write a tree of tensors and plain values to `path`: whole, or not at all."""
    with replacing(path) as file:
        torch.save(tree, file)


def load_tree(path: str | os.PathLike[str]) -> Any:
    """What `save_tree` wrote, on the CPU. Nothing in the file is executed.

    The check sums of all its parts are compared first: torch itself takes a flipped bit for a weight. Raises
    ValueError for a file that is damaged, packed, or holds more than tensors and plain values.
    """
    path = Path(path)  # torch would take an open file too, and fail on anything else without naming it
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's own message advises to load the file in a way that can run code from it
        reason = f": {error}" if type(error) is ValueError else f" ({type(error).__name__})"
        raise ValueError(f"{path} is damaged, or holds more than plain tensors{reason}. Nothing was loaded.") from error


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive that is not as torch writes it: not packed, each entry with its check sum."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > MOST_ENTRIES:
            raise ValueError(f"it claims to hold {len(entries)} entries")
        packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:  # it could unpack to any size
            raise ValueError(f"its entry {packed.filename!r:.80} is packed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the check sum of its entry {damaged!r:.80} is wrong")


def _sync_folder(folder: Path) -> None:
    """Have the new name on the disk, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`: torch raises a RuntimeError where a write fails."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _explain(path: Path, temporary: Path, failure: OSError) -> str:
    text = failure.strerror or str(failure)
    try:
        written, free = temporary.stat().st_size, shutil.disk_usage(path.parent).free
    except OSError:
        return f"cannot save to {path}: {text}. What was there is as it was."
    return (f"cannot save to {path}: {text} ({written / 1e6:,.1f} MB were written, {free / 1e6:,.1f} MB are free). "
            "What was there is as it was.")


def probe(folder: Path) -> None:
    """Temporary."""


def sweep(folder: Path) -> list[Path]:
    """Temporary."""
    return []
