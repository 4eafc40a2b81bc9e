"""Reading files of tensors: whole and undamaged, or refused in words."""
import errno
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..base.nest import tensors
from .trees import check_plain
from .writing import PathLike

_ENTRY = re.compile(r"[^/]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|"
                    r"\.data/serialization_id|data/\d+)")
# What tensors and plain values are written with. torch's reader takes more, such as bytearray(10**11), or a Tensor of
# memory that nobody has written to.
_NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)|_codecs encode|"
                    r"torch (\w+Storage|(complex|u?int|b?float)\w+|bool)|torch\.storage UntypedStorage")


class AsksForCode(ValueError):
    """A file that names something to be called which is no part of a plain tree."""


def load_tree(path: PathLike, *, checked: bool = False) -> Any:
    """What `save_tree` wrote, on the CPU. Nothing in the file is called, imported, evaluated or used as a path.

    The check sums of all its parts are compared first: torch itself takes a flipped bit for a weight. Memory is in
    proportion to the file. checked: refuse what other programs write and `save_tree` does not: an OrderedDict, and rows
    that repeat in memory. Raises ValueError for a file that is damaged, asks to run code, holds more than tensors and
    plain values, or is of torch before 1.6; OSError for one that cannot be read, a folder or a device.
    """
    path = Path(path)
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            storages = _check_archive(file, size)
            file.seek(0)
            tree = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
            _check_loaded(tree, storages, checked)
            return tree
        except OSError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError) or "allocate memory" in str(error):  # the file may well be whole
                raise MemoryError(f"{path} was not loaded: there is not enough memory for its {size / 1e6:,.1f} "
                                  "MB.") from error
            raise refused(path, error) from error


def refused(path: Path, error: Exception) -> ValueError:
    """What there is to say; torch's own message advises to load the file in a way that can run code from it."""
    if isinstance(error, AsksForCode):
        return ValueError(f"{path} was not loaded: {error}.")
    reason = f": {error}" if type(error) is ValueError else f" ({type(error).__name__})"
    return ValueError(f"{path} is damaged, or holds more than plain tensors{reason:.300}. Nothing was loaded.")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """`path` to read; a pipe or a device is refused without waiting for it."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, f"cannot load {path}: it is a pipe or a device. Pass the name of a file.")
        yield file


def _check_archive(file: BinaryIO, size: int) -> set[int]:
    """The sizes of the storages in an archive; ValueError unless torch writes such ones of plain trees."""
    if file.read(4) != b"PK\3\4":
        raise ValueError("it is no archive as torch writes it since 1.6; load an older file by torch.load(path, "
                         "weights_only=True) and save that")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        if any(name.endswith("/constants.pkl") for name in names):
            raise AsksForCode("it is a TorchScript program, which runs code: refused")
        strange = next((name for name in names if not _ENTRY.fullmatch(name)), None)
        if strange is not None or len({name.partition("/")[0] for name in names}) != 1:
            raise ValueError(f"it holds {strange or 'several folders'!r:.80}, which torch does not write")
        if len(names) != len(entries):
            raise ValueError("the names of its entries are not all different")
        packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:  # it could unpack to any size
            raise ValueError(f"its entry {packed!r:.80} is packed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries overlap")
        if min(entry.header_offset for entry in entries):  # torch would find another list of them
            raise ValueError("its list of entries is not where it says")
        wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"the check sum of its entry {wrong!r:.80} is wrong")
        _check_names(archive.read(next(name for name in names if name.endswith("/data.pkl"))))
        return {entry.file_size for entry in entries if "/data/" in entry.filename}


def _check_names(pickled: bytes) -> None:
    """Raise AsksForCode if it names what no tensor and no plain value is made of."""
    for op, argument, _ in pickletools.genops(pickled):
        if op.name == "GLOBAL" and not _NAMES.fullmatch(str(argument)):
            raise AsksForCode(f"it asks to run code ({str(argument).replace(' ', '.')!r:.80}): refused")
        if op.name == "PROTO" and argument != 2:
            raise ValueError(f"it is not written as torch writes (protocol {argument})")


def _check_loaded(tree: Any, storages: set[int], checked: bool) -> None:
    try:
        check_plain(tree, ordered=not checked)
    except TypeError as error:
        raise ValueError(str(error).removesuffix(" Only tensors and plain values can be saved.").rstrip(".")) from error
    for tensor in tensors(tree):
        n_bytes = tensor.untyped_storage().nbytes()  # torch enlarges a storage that is no entry of the archive
        # rows that repeat, which `save_tree` writes out: a kernel that takes them for dense writes behind the end
        repeats = (tensor.storage_offset() + tensor.numel()) * tensor.element_size() > n_bytes
        if n_bytes not in storages or (checked and repeats):
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)!r:.60} does not lie in a storage of the file")
