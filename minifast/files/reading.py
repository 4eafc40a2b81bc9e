"""Reading files of tensors: whole and undamaged, or refused in words."""
import errno
import io
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from . import pickles
from .trees import check_plain
from .writing import PathLike

MOST_ENTRIES = 100_000  # of an archive: one for each tensor, and few others
MOST_PICKLED = 64_000_000  # bytes of its plain values and of the names and shapes of its tensors
_ENTRY = re.compile(r"[^/]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|"
                    r"\.data/serialization_id|data/\d+)")


def load_tree(path: PathLike, *, checked: bool = False) -> Any:
    """What `save_tree` wrote, on the CPU. Nothing in the file is called, imported, evaluated or used as a path.

    The check sums of all its parts are compared first: torch itself takes a flipped bit for a weight. Memory is in
    proportion to the file. checked: refuse what is no such archive (files of torch before 1.6 have no check sums) and
    an OrderedDict: what other programs write, and `save_tree` does not.

    Raises ValueError for a file that is damaged, asks to run code, or holds more than tensors and plain values;
    OSError for one that cannot be read, a folder or a device.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if _is_archive(file):
                _check_archive(file, size)
            elif checked:
                raise ValueError("it is no archive with check sums")
            else:
                _check_old(file, size)
            file.seek(0)
            tree = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
            _check_loaded(tree, checked)
            return tree
        except pickles.AsksForCode as error:
            raise ValueError(f"{path} was not loaded: {error}.") from error
        except OSError:
            raise
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "allocate memory" in str(error):  # the file may well be whole
                raise MemoryError(f"{path} was not loaded: there is not enough memory for its {size / 1e6:,.1f} "
                                  "MB.") from error
            raise ValueError(_damaged(path, error)) from error
        except Exception as error:
            raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    """What there is to say; torch's own message advises to load the file in a way that can run code from it."""
    reason = f": {error}" if type(error) is ValueError else f" ({type(error).__name__})"
    return f"{path} is damaged, or holds more than plain tensors{reason:.300}. Nothing was loaded."


def _check_loaded(tree: Any, checked: bool) -> None:
    try:
        check_plain(tree, ordered=not checked)
    except TypeError as error:
        raise ValueError(str(error).removesuffix(" Only tensors and plain values can be saved.").rstrip(".")) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """`path` to read; a pipe or a device is refused without waiting for it."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, f"cannot load {path}: it is a pipe or a device. Pass the name of a file.")
        yield file


def _is_archive(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) == b"PK\3\4"


def _check_archive(file: BinaryIO, size: int) -> None:
    """Raise ValueError for an archive that is not as torch writes it: not packed, each entry with its check sum."""
    n_entries = check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(archive.infolist()) != n_entries or len(entries) != n_entries:
            raise ValueError("the names of its entries are not all different")
        if any(name.endswith("/constants.pkl") for name in entries):
            raise pickles.AsksForCode("it is a TorchScript program, which runs code: refused")
        roots = {name.partition("/")[0] for name in entries}
        strange = next((name for name in entries if not _ENTRY.fullmatch(name)), None)
        if strange is not None or len(roots) != 1:
            raise ValueError(f"it holds {strange or 'several folders'!r:.80}, which torch does not write")
        packed = next((name for name, entry in entries.items()
                       if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size), None)
        if packed is not None:  # it could unpack to any size
            raise ValueError(f"its entry {packed!r:.80} is packed")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise ValueError("its entries overlap")
        root = roots.pop()
        plain = f"{root}/data.pkl"
        if plain not in entries or entries[plain].file_size > MOST_PICKLED:
            raise ValueError(f"it has no data.pkl of at most {MOST_PICKLED / 1e6:,.0f} MB")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the check sum of its entry {damaged!r:.80} is wrong")
        storages: dict[str, int] = {}
        pickles.read(io.BytesIO(archive.read(plain)), storages)
        for key, n_bytes in storages.items():
            entry = entries.get(f"{root}/data/{key}")
            if entry is None or entry.file_size != n_bytes:
                raise ValueError(f"its storage {key!r:.20} is not of {n_bytes:,} bytes, as it says")


def check_directory(file: BinaryIO, size: int) -> int:
    """The number of entries that an archive claims to hold, from its end: before a list of them is made.

    The end has to be as torch writes it, without a gap: then all readers find the same list.
    """
    file.seek(-min(size, 98), os.SEEK_END)
    tail = file.read(98)
    if len(tail) < 22:
        raise ValueError("its end is missing")
    mark, *_, n, n_bytes, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    end = size - 22
    if mark != b"PK\5\6" or comment:
        raise ValueError("its end is missing")
    if tail[-42:-38] == b"PK\6\7":  # larger numbers
        end = size - 98
        if struct.unpack("<4sLQL", tail[-42:-22])[2] != end or tail[:4] != b"PK\6\6":
            raise ValueError("its end is missing")
        n, n_bytes, start = struct.unpack("<3Q", tail[32:56])
    if n > MOST_ENTRIES:
        raise ValueError(f"it claims to hold {n:,} entries")
    if start + n_bytes != end:
        raise ValueError("its list of entries is not where it says")
    file.seek(start)
    if file.read(n_bytes).count(b"PK\1\2") > MOST_ENTRIES:
        raise ValueError(f"it holds more than {MOST_ENTRIES:,} entries")
    return cast(int, n)


def _check_old(file: BinaryIO, size: int) -> None:
    """Raise ValueError for a file that is not as torch wrote it before 1.6: five pickles, then the storages."""
    file.seek(0)
    head = io.BytesIO(file.read(MOST_PICKLED))
    storages: dict[str, int] = {}
    if pickles.read(head, {}) != torch.serialization.MAGIC_NUMBER:
        raise ValueError("torch has not written it")
    for _ in range(4):
        pickles.read(head, storages)
    if sum(storages.values()) > size:
        raise ValueError("its storages are larger than it")
