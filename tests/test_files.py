"""Files of weights: whole or not there, checked when read, and never believed."""
import errno
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import bits

from minifast import files
from minifast.files import load_tree, replacing, save_tree

ROOT = Path(__file__).resolve().parent.parent
TREE = {"weight": torch.arange(300.0), "count": torch.tensor(3), "text": ["a", 1, None, 2.5]}


@pytest.fixture
def saved(tmp_path):
    save_tree(TREE, tmp_path / "tree.pt")
    return tmp_path / "tree.pt"


def test_a_tree_comes_back(saved):
    assert bits(load_tree(saved)) == bits(TREE)
    assert [path.name for path in saved.parent.iterdir()] == ["tree.pt"]


def test_no_damaged_byte_is_loaded(saved):
    """Flipped bits, zeroed blocks and cuts: refused, or (in what has no meaning, such as padding) without effect."""
    whole, refused = saved.read_bytes(), 0
    numbers = random.Random(0)
    for trial in range(300):
        data = bytearray(whole)
        at = numbers.randrange(len(data))
        if trial % 3 == 0:
            data[at] ^= 1 << numbers.randrange(8)
        elif trial % 3 == 1:
            data[at:at + 64] = bytes(len(data[at:at + 64]))
        else:
            del data[at:]
        saved.write_bytes(data)
        try:
            loaded = load_tree(saved)
        except ValueError as error:
            assert "tree.pt is damaged, or holds more than plain tensors" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert bits(loaded) == bits(TREE)
    assert refused > 200


def test_torch_alone_would_take_a_flipped_bit_for_a_weight(saved):
    """What the check sums are for."""
    data = bytearray(saved.read_bytes())
    at = data.index(torch.tensor(299.0).numpy().tobytes())
    data[at] ^= 1
    saved.write_bytes(data)
    assert not torch.equal(torch.load(saved, weights_only=True)["weight"], TREE["weight"])
    with pytest.raises(ValueError, match=r"the check sum of its entry '.*data/0' is wrong\. Nothing was"):
        load_tree(saved)


def test_a_packed_archive_is_refused_before_it_is_unpacked(saved, tmp_path):
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name) + bytes(10**7))
    with pytest.raises(ValueError, match=r"its entry '.*' is packed"):
        load_tree(bomb)


def test_overlapping_entries_are_refused(saved, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda archive: archive.filelist * 3)
    with pytest.raises(ValueError, match="its entries overlap"):
        load_tree(saved)


def test_too_many_entries_are_refused(saved, monkeypatch):
    monkeypatch.setattr(files, "MOST_ENTRIES", 2)
    with pytest.raises(ValueError, match=r"it claims to hold \d+ entries"):
        load_tree(saved)


FULL = """
import resource, sys, torch
from minifast.files import save_tree
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # of this process: the kernel refuses what comes after 2 kB
try:
    save_tree({"more": torch.ones(10_000)}, sys.argv[1])
except OSError as error:
    print(error.errno, error.strerror)
"""


@pytest.mark.slow
def test_a_write_that_fails_in_the_middle(saved):
    before = saved.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL, saved], capture_output=True, text=True, cwd=ROOT, check=True)
    message = r"cannot save to .*tree.pt: File too large \(0.0 MB were written, .* MB are free\)\. What was there is as"
    assert re.match(rf"{errno.EFBIG} {message}", done.stdout)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["tree.pt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_disk_that_fails_later(saved, monkeypatch, function, number):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match=rf"cannot save to .*tree.pt: {os.strerror(number)}"):
        save_tree({"weight": torch.ones(3)}, saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["tree.pt"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args))[1])
    save_tree(TREE, tmp_path / "tree.pt")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, its folder


def test_an_error_of_the_writer_is_its_own(tmp_path):
    with pytest.raises(KeyError, match="mine"), replacing(tmp_path / "a"):
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match=r"^mine$"), replacing(tmp_path / "a"):
        raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []


def test_a_link_or_a_folder_in_the_way(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"it is a folder\. Pass the name of a file in it"):
        save_tree(TREE, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone\. Make it first"):
        save_tree(TREE, tmp_path / "gone" / "tree.pt")
    with pytest.raises(FileNotFoundError):
        load_tree(tmp_path / "nowhere.pt")
