"""A full, failing or read-only disk, and a process that is killed while it writes: what was there stays."""

import errno
import logging
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forks import in_fork, told, virtual_size
from helpers import bits, learner

from minifast import SaveBest
from minifast.files import writing as files
from minifast.files.reading import load_tree
from minifast.files.writing import probe, replacing, save_tree, sweep

OLD = {"weight": torch.arange(1000.0), "epoch": 1}
NEW = {"weight": torch.arange(60_000.0) + 1, "epoch": 2}
SPACE = r"\(needs 0\.2 MB, [\d,]+\.\d MB are free\)\. What was there is as it was\.$"


@pytest.fixture
def saved(tmp_path):
    save_tree(OLD, tmp_path / "tree.pt")
    return tmp_path / "tree.pt"


def is_as_it_was(path, before=OLD):
    assert bits(load_tree(path, checked=True)) == bits(before)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def failing(name, number):
    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    return lambda monkeypatch: monkeypatch.setattr(files if name == "write" else os, name, fail)


# ---- full


@pytest.mark.table
@pytest.mark.case("K2")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("part", ["first byte", "second byte", "middle", "last byte"])
def test_a_disk_that_is_full_after_n_bytes(saved, monkeypatch, part, number):
    written = []
    real = files.write
    monkeypatch.setattr(files, "write", lambda handle, data: (written.append(len(data)), real(handle, data))[1])
    save_tree(NEW, saved.parent / "whole")
    (saved.parent / "whole").unlink()
    n_bytes = sum(written)
    left = {"first byte": 0, "second byte": 1, "middle": n_bytes // 2, "last byte": n_bytes - 1}[part]

    def write(handle, data):
        nonlocal left
        if left == 0:
            raise OSError(number, os.strerror(number))
        n = real(handle, data[: min(left, len(data))])  # a full disk takes what fits
        left -= n
        return n

    monkeypatch.setattr(files, "write", write)
    with pytest.raises(OSError, match=rf"^\[Errno {number}\] cannot save to .*tree\.pt: {os.strerror(number)} {SPACE}"):
        save_tree(NEW, saved)
    is_as_it_was(saved)
    left = 10**9  # there is space again
    save_tree(NEW, saved)
    is_as_it_was(saved, NEW)


@pytest.mark.case("K2")
def test_a_limit_of_the_kernel(saved):
    """Without any patch: the kernel takes 100 kB, no more."""

    def save(tell):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match=rf"cannot save to .*tree\.pt: File too large {SPACE}") as caught:
            save_tree(NEW, saved)
        tell(caught.value.errno)

    assert told(save) == [errno.EFBIG]
    is_as_it_was(saved)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a file system of 2 MB needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system of 2 MB can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.case("K2")
def test_a_real_disk_of_2_MB(small_disk):
    path = small_disk / "tree.pt"
    tree = {"weight": torch.rand(300_000)}  # 1.2 MB
    save_tree(tree, path)
    message = r"cannot save to .*: No space left on device \(needs 1\.2 MB, 0\.\d MB are free\)\. What was there is as"
    with pytest.raises(OSError, match=message) as caught:
        save_tree({"weight": torch.zeros(300_000)}, path)
    assert caught.value.errno == errno.ENOSPC
    is_as_it_was(path, tree)
    path.unlink()
    save_tree(NEW, path)
    is_as_it_was(path, NEW)
    with suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with pytest.raises(OSError, match=r"No space left on device \(0\.0 MB are free\)\. Make room, or pass"):
        probe(small_disk)


# ---- failing


STEPS = ("fsync", "replace", "open", "close")


@pytest.mark.table
@pytest.mark.case("K7")
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_what_was_there(saved, monkeypatch, step, number):
    failing(step, number)(monkeypatch)
    with pytest.raises(OSError, match=rf"cannot save to .*tree\.pt: {os.strerror(number)} {SPACE}") as caught:
        files.save_tree(NEW, saved)
    monkeypatch.undo()
    assert caught.value.errno == number
    is_as_it_was(saved)
    save_tree(NEW, saved)
    is_as_it_was(saved, NEW)


def failing_for_folders(monkeypatch, number):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.case("K7")
def test_a_folder_that_cannot_be_synced_is_an_error_that_does_not_claim_too_much(saved, monkeypatch):
    failing_for_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=r"cannot save to .*tree\.pt for sure: Input/output error in fsync of the folder"
                                      r"\. The new file is there, but a power cut might lose it\."):
        save_tree(NEW, saved)
    is_as_it_was(saved, NEW)


@pytest.mark.case("E5")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_of_folders(saved, monkeypatch, caplog, number):
    caplog.set_level(logging.DEBUG, "minifast")
    failing_for_folders(monkeypatch, number)
    save_tree(NEW, saved)
    is_as_it_was(saved, NEW)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert re.fullmatch(rf"no fsync of the folder .*: {os.strerror(number)}", caplog.messages[0])


@pytest.mark.case("K7")
def test_a_temporary_that_cannot_be_removed_hides_no_error(saved, monkeypatch):
    failing("replace", errno.EIO)(monkeypatch)
    failing("unlink", errno.EROFS)(monkeypatch)
    with pytest.raises(OSError, match=r"Input/output error"):
        save_tree(NEW, saved)
    monkeypatch.undo()
    assert len(list(saved.parent.iterdir())) == 2
    save_tree(NEW, saved)  # the same process takes its place
    is_as_it_was(saved, NEW)


@pytest.mark.case("K7")
def test_a_folder_that_is_really_read_only():
    """As a user without rights: root may write anywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tree(OLD, folder / "tree.pt")
        (folder / "tree.pt").chmod(0o644)
        folder.chmod(0o555)

        def save(tell):
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            for call in (lambda: save_tree(NEW, folder / "tree.pt"), lambda: probe(folder)):
                with pytest.raises(PermissionError) as caught:
                    call()
                tell(str(caught.value))
            tell(load_tree(folder / "tree.pt")["epoch"])

        of_save, of_probe, epoch = told(save)
        folder.chmod(0o755)
        assert re.search(rf"cannot save to .*tree\.pt: Permission denied {SPACE}", of_save)
        assert re.search(r"cannot write into .*: Permission denied \([\d,.]+ MB are free\)\. Make it writable, or pass "
                         r"another folder\.", of_probe)
        assert epoch == 1
        is_as_it_was(folder / "tree.pt")


@pytest.mark.case("K2", "K7")
@pytest.mark.parametrize(("name", "number", "advice"), [
    ("open", errno.EROFS, "Make it writable"), ("fsync", errno.EIO, "Make it writable"),
    ("fsync", errno.ENOSPC, "Make room"), ("write", errno.EDQUOT, "Make room")])  # fmt: skip
def test_probe_says_what_to_do(tmp_path, monkeypatch, name, number, advice):
    failing(name, number)(monkeypatch)
    with pytest.raises(OSError, match=rf"cannot write into .*: {os.strerror(number)} \([\d,.]+ MB are free\)\. {advice}"
                                      r", or pass another folder\."):
        probe(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    probe(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.case("K2")
def test_training_goes_on_with_a_full_disk(tmp_path, monkeypatch, caplog):
    """Through the public API: SaveBest keeps the older file."""
    learn = learner()
    learn.fit(0.01, 1, callbacks=[SaveBest("train_loss", tmp_path / "best.pt")])
    before = (tmp_path / "best.pt").read_bytes()
    failing("write", errno.ENOSPC)(monkeypatch)
    save = SaveBest("train_loss", tmp_path / "best.pt")
    learn.fit(0.01, 2, callbacks=[save])
    assert save.best is None
    assert re.search(r"SaveBest, after epoch 0: cannot save to .*best\.pt: No space left on device \(needs 0\.0 MB, .* "
                     r"MB are free\)\. What was there is as it was\. Training goes on\.", caplog.text)
    assert (tmp_path / "best.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


# ---- killed


@pytest.mark.case("K1", "K9")
def test_a_kill_at_any_call_to_the_disk_leaves_one_whole_file(tmp_path):
    """Each point of a save, before and after the call: the old tree or the new one, and nothing else after a sweep."""
    calls = ["fsync", "replace", "unlink", "open", "close"]

    def save(path, stop):
        """Save, killed at the `stop`-th point; tells each point that is reached."""

        def run(tell):
            count = 0

            def point(name):
                nonlocal count
                count += 1
                tell(name)
                if count == stop:
                    os.kill(os.getpid(), signal.SIGKILL)

            def around(module, name):
                real = getattr(module, name)

                def call(*args, **options):
                    point(f"before {name}")
                    result = real(*args, **options)
                    point(f"after {name}")
                    return result

                setattr(module, name, call)

            around(files, "write")
            for name in calls:
                around(os, name)
            save_tree(NEW, path)

        return in_fork(run)

    points = save(tmp_path / "first.pt", 0).lines
    assert {f"{when} {name}" for when in ("before", "after") for name in ("open", "write", "fsync", "replace")} <= set(
        points)
    assert len(points) >= 16
    found = []
    for stop in range(1, len(points) + 1):
        folder = tmp_path / str(stop)
        folder.mkdir()
        save_tree(OLD, folder / "tree.pt")
        outcome = save(folder / "tree.pt", stop)
        assert (outcome.signal, outcome.lines) == (signal.SIGKILL, points[:stop])
        left = set(folder.iterdir()) - {folder / "tree.pt"}
        assert set(sweep(folder)) == left
        tree = load_tree(folder / "tree.pt", checked=True)
        assert bits(tree) in (bits(OLD), bits(NEW))
        assert [path.name for path in folder.iterdir()] == ["tree.pt"]
        found.append((tree["epoch"], len(left)))
    renamed = points.index("after replace")
    assert [epoch for epoch, _ in found] == [1] * renamed + [2] * (len(points) - renamed)
    assert {n for _, n in found} == {0, 1}  # some were killed with a temporary there


@pytest.mark.case("K9")
def test_sweep_takes_temporaries_of_dead_processes_only(tmp_path):
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    kept = [f".a.pt.{os.getpid()}.tmp", f".a.pt.{os.getppid()}.tmp", ".a.pt.1.tmp", ".a.pt.0.tmp", f".a.pt.{dead}",
            f"a.pt.{dead}.tmp", f".a.pt.0{dead}.tmp", ".a.pt.tmp", ".a.pt.99999999999999999999.tmp", "tree.pt"]
    for name in (*kept, f".a.pt.{dead}.tmp", f".step 1\n.ckpt.{dead}.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "target").write_text("mine")
    (tmp_path / f".link.{dead}.tmp").symlink_to("target")
    (tmp_path / f".folder.{dead}.tmp").mkdir()
    removed = sweep(tmp_path)
    assert {path.name for path in removed} == {f".a.pt.{dead}.tmp", f".step 1\n.ckpt.{dead}.tmp", f".link.{dead}.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "target", f".folder.{dead}.tmp"}
    assert (tmp_path / "target").read_text() == "mine"
    assert sweep(tmp_path) == [] == sweep(tmp_path / "gone")


@pytest.mark.case("K9")
def test_sweep_of_files_that_vanish(tmp_path, monkeypatch):
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    (tmp_path / f".a.{dead}.tmp").touch()
    failing("unlink", errno.ENOENT)(monkeypatch)
    assert sweep(tmp_path) == []


# ---- names, links, rights


@pytest.mark.case("X7")
@pytest.mark.parametrize("is_there", [True, False], ids=["", "dangling"])
def test_a_link_in_place_of_the_temporary_is_not_followed(saved, tmp_path_factory, is_there):
    target = tmp_path_factory.mktemp("elsewhere") / "target"
    if is_there:
        target.write_text("mine")
    (saved.parent / f".tree.pt.{os.getpid()}.tmp").symlink_to(target)
    save_tree(NEW, saved)
    is_as_it_was(saved, NEW)
    assert target.read_text() == "mine" if is_there else not target.exists()
    assert not saved.is_symlink()


@pytest.mark.case("K13", "X7")
def test_a_link_at_the_path_is_replaced_and_its_target_stays(saved, tmp_path):
    (tmp_path / "best.pt").symlink_to("tree.pt")
    save_tree(NEW, tmp_path / "best.pt")
    assert not (tmp_path / "best.pt").is_symlink()
    assert bits(load_tree(tmp_path / "best.pt")) == bits(NEW)
    assert bits(load_tree(saved)) == bits(OLD)


@pytest.mark.case("K13")
def test_saving_over_the_file_that_was_loaded(saved):
    loaded = load_tree(saved)
    save_tree({"weight": loaded["weight"] * 0, "epoch": 2}, saved)
    assert bits(loaded) == bits(OLD)
    save_tree(loaded, saved)
    is_as_it_was(saved)


@pytest.mark.case("K16")
@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_the_rights_of_a_file_are_those_of_any_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tree(OLD, tmp_path / "tree.pt")
        save_tree(NEW, tmp_path / "tree.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "tree.pt").stat().st_mode) == mode


@pytest.mark.case("E4")
def test_no_other_folder_is_used(saved, monkeypatch):
    """HOME and TMPDIR may be full or read-only; each file that is opened to write lies beside its target."""
    for name in ("HOME", "TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", None)
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *args, **options: (opened.append(Path(path)),
                                                                    real(path, *args, **options))[1])
    save_tree(NEW, saved)
    assert bits(load_tree(saved)) == bits(NEW)
    torch.save(dict(OLD), saved)
    assert bits(load_tree(saved)) == bits(OLD)
    assert opened
    assert {path.parent if path != saved.parent else path for path in opened} == {saved.parent}


def test_two_threads_that_save_to_one_file(tmp_path):
    """One of them saves; the other is told so, or comes later. The file is whole."""
    path, errors = tmp_path / "tree.pt", []

    def other():
        try:
            save_tree(OLD, path)
        except OSError as error:
            errors.append(str(error))

    with replacing(path) as file:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        file.write(b"mine")
    assert path.read_bytes() == b"mine"
    assert re.search(r"cannot save to .*tree\.pt: another thread of this process is saving to it", errors[0])
    other()
    is_as_it_was(path)


# ---- memory


MB = 10**6


@pytest.mark.slow
@pytest.mark.case("E9")
def test_saving_and_loading_hold_no_second_copy(tmp_path):
    """100 MB of weights, in a process that may map 40 MB more, or, to load them, 100 MB and that."""
    tree = {f"layer{i}": torch.ones(1_000_000) for i in range(25)}

    def save(tell):
        save_tree(tree, tmp_path / "tree.pt")

    told(save, memory=40 * MB)
    assert abs((tmp_path / "tree.pt").stat().st_size - 100 * MB) < 0.1 * MB

    def load(tell):
        before = virtual_size()
        assert bits(load_tree(tmp_path / "tree.pt", checked=True)) == bits(tree)
        tell(virtual_size("VmPeak") - before)

    told(load, memory=140 * MB)
