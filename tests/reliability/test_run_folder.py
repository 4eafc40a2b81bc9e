"""The folder of a run: who may write there, what is in it, what stays when the disk, the clock or a user interferes."""
import errno
import fcntl
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, everything, learner, throw, trained

from minifast import Callback, Checkpoint, SaveBest
from minifast.files import writing as files
from minifast.files.reading import load_tree
from minifast.files.writing import save_tree

NAMES = re.compile(r"step-\d{8}\.ckpt|best\.ckpt")


class Given(Callback):
    """A metric with these values, one an epoch."""

    def __init__(self, values, name):
        self.values, self.__name__, self.epoch = values, name, 0

    def before_validate(self, state):
        self.epoch = state.epoch

    def reset(self): ...
    def update(self, pred, target): ...
    def compute(self):
        return self.values[self.epoch]


def make(values=(0.0,) * 9, name="given", **options):
    given = Given(values, name)
    return learner(batches(4), batches(1), metrics=[given], callbacks=[given], **options)


def fit(learn, run, *callbacks, n_epochs=3, every_steps=2, keep=2, resume="auto"):
    """12 updates, 4 an epoch."""
    saver = Checkpoint(run, every_steps=every_steps, every_seconds=None, keep=keep)
    learn.fit_one_cycle(n_epochs, 0.05, callbacks=[saver, *callbacks], resume=resume)


def broken_off(run, *callbacks, after=6, **options):
    """A fit that fails after so many updates."""
    fail = At("before_batch", throw(ZeroDivisionError), after)
    learn = options.pop("learn", None) or make()
    with pytest.raises(ZeroDivisionError):
        fit(learn, run, *callbacks, fail, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(run):
    return sorted(int(path.name[5:13]) for path in (run / "fit-1").glob("step-*.ckpt"))


def result(learn):
    return trained(learn), bits([learn.recorder.losses, learn.recorder.lrs])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the fit that nobody disturbs comes to."""
    learn = make()
    fit(learn, tmp_path_factory.mktemp("whole") / "run")
    return result(learn)


# ---- the folder itself


@pytest.mark.case("A14")
@pytest.mark.parametrize("where", [".", "a", "a/b/c", "../aside", "with space/ü"])
def test_the_folder_and_its_parents_are_made(tmp_path, monkeypatch, where):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    fit(make(), where)
    assert names(Path(where) / "fit-1") == ["best.ckpt", "step-00000010.ckpt", "step-00000012.ckpt"][1:]
    assert names(Path(where)) == [".lock", "fit-1"]


@pytest.mark.case("A14")
@pytest.mark.parametrize("where", ["file", "file/deeper", "link", "run"])
def test_a_file_in_the_way_is_an_error_before_the_fit(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fit-1").write_text("mine")
    learn, seen = make(), []
    before = everything(learn)
    message = "cannot use .*(file|link|run).* for checkpoints: .* Make it a folder that can be written, or pass another"
    with pytest.raises(OSError, match=message) as caught:
        fit(learn, tmp_path / where, At("before_fit", seen.append))
    assert caught.value.errno in (errno.EEXIST, errno.ENOTDIR)
    assert (everything(learn), seen, learn.is_fitting) == (before, [], False)
    assert (tmp_path / "file").read_text() == (tmp_path / "run" / "fit-1").read_text() == "mine"
    fit(learn, tmp_path / "other")


@pytest.mark.table
@pytest.mark.case("A14")
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync"])
def test_a_folder_that_takes_no_file_is_an_error_before_the_fit(tmp_path, monkeypatch, call, code):
    learn, real = make(), getattr(os, call)
    before = everything(learn)

    def fails(*args, **options):
        writes = call != "open" or args[1] & os.O_CREAT
        if writes:
            raise OSError(code, os.strerror(code), str(args[0]))
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        message = rf"cannot (use|write into) .*run.*: {os.strerror(code)}.*\. .* or pass another folder"
        with pytest.raises(OSError, match=message) as caught:
            fit(learn, tmp_path / "run")
    assert caught.value.errno == code
    assert everything(learn) == before
    fit(learn, tmp_path / "run")
    assert steps(tmp_path / "run") == [10, 12]


# ---- one run in one folder


@pytest.mark.case("K8")
@pytest.mark.parametrize("alias", ["run", "./run", "link", "run/../run"])
def test_two_learners_of_one_process(tmp_path, monkeypatch, alias, whole):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    inner = make()
    before, refused = everything(inner), []

    def start_another(state):
        path = os.path.abspath(alias)
        with pytest.raises(RuntimeError, match=f"{path} is in use by another fit of this process. Give"):
            fit(inner, alias)
        refused.append(state.step)

    outer = make()
    fit(outer, "run", At("after_step", start_another))
    assert len(refused) == 12, "a refused one does not free the folder"
    assert everything(inner) == before
    assert result(outer) == whole
    fit(inner, alias)
    assert result(inner) == whole


SECOND = """
import sys
from test_run_folder import fit, make
try:
    fit(make(), sys.argv[1])
except RuntimeError as error:
    print(error)
else:
    print("it trained")
"""
FIRST = """
import os, sys, time
from helpers import At
from test_run_folder import fit, make
fit(make(), sys.argv[1], At("after_step", lambda state: (print("begun", flush=True), time.sleep(600)), 3))
"""


def start(script, *args):
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(map(str, (here.parent.parent, here.parent, here)))
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": path})  # fmt: skip


@pytest.mark.nightly
@pytest.mark.case("K8")
def test_two_processes_and_a_kill(tmp_path, whole):
    first = start(FIRST, tmp_path)
    try:
        assert first.stdout.readline() == "begun\n"
        learn = make()
        before = everything(learn)
        message = rf"{tmp_path} is in use by pid {first.pid} on host \S+ since \d{{4}}-\d\d-\d\dT\S+\. Wait for it, or "
        with pytest.raises(RuntimeError, match=message):
            fit(learn, tmp_path)
        assert everything(learn) == before
        assert steps(tmp_path) == [2], "the first one goes on"
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    fit(learn, tmp_path)
    assert result(learn) == whole, "the lock ends with its process"


@pytest.mark.nightly
@pytest.mark.case("K8")
def test_this_process_keeps_another_one_out(tmp_path, whole):
    said = []
    learn = make()
    fit(learn, tmp_path, At("after_step", lambda state: said.append(start(SECOND, tmp_path).communicate()[0]), 4))
    assert said[0].startswith(f"{tmp_path} is in use by pid {os.getpid()} on host ")
    assert result(learn) == whole
    assert start(SECOND, tmp_path).communicate()[0] == "it trained\n", "after the fit the folder is free"


@pytest.mark.case("K8")
def test_a_fit_that_fails_frees_the_folder(tmp_path, whole):
    broken_off(tmp_path)
    learn = make()
    fit(learn, tmp_path)
    assert result(learn) == whole


# ---- temporaries


def dead_pid():
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.case("K9")
def test_temporaries_of_dead_processes_go_at_the_start_and_after_each_save(tmp_path):
    folder, dead = tmp_path / "fit-1", dead_pid()
    folder.mkdir()
    others = [folder / f".step-00000001.ckpt.{os.getppid()}.tmp", folder / "notes.tmp", folder / ".hidden"]
    left = [folder / f".{name}.{dead}.tmp" for name in ("step-00000007.ckpt", "best.ckpt", "probe")]
    seen = []

    def litter():
        for path in (*others, *left):
            path.write_bytes(bytes(100))

    def look(state):
        seen.append((state.step, [path.exists() for path in left], all(path.exists() for path in others)))
        if state.step == 5:
            litter()

    litter()
    fit(make(), tmp_path, At("before_fit", look), At("before_batch", look, 5), At("before_batch", look, 6),
        every_steps=6)  # fmt: skip
    assert seen == [(0, [False] * 3, True), (5, [False] * 3, True), (6, [False] * 3, True)]
    assert [path.exists() for path in left] == [False] * 3


# ---- a full disk, where one checkpoint is kept


def full(number):
    """Such a disk: the n-th files, from 1, find no room when half of them is written."""
    opened = []
    real_open, real_write = os.open, files.write

    def open_(path, flags, *args, **options):
        if flags & os.O_CREAT and str(path).endswith(".tmp") and ".probe." not in str(path):
            opened.append(path)
        return real_open(path, flags, *args, **options)

    def write(handle, data):
        if len(opened) in number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(handle, data)

    return open_, write


@pytest.mark.case("K3")
def test_the_only_checkpoint_goes_when_the_next_one_is_on_the_disk(tmp_path, monkeypatch, caplog, whole):
    """With keep=1 the second and third save of six fail."""
    open_, write = full({2, 3})
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(files, "write", write)
    kept = []

    def look(state):
        if state.step % 2 == 0:
            kept.append(steps(tmp_path))
            for path in (tmp_path / "fit-1").iterdir():
                assert load_tree(path, checked=True)["position"]["step"] == kept[-1][0]

    class Look(Callback):
        order = sys.maxsize  # behind the Checkpoint, which comes before it in the list
        after_batch = lambda self, state: look(state)  # noqa: E731

    learn = make()
    fit(learn, tmp_path, Look(), keep=1)
    assert kept == [[2], [2], [2], [8], [10], [12]]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2
    assert all(re.match(rf"no checkpoint after update {n}: .*No space left on device.* Training goes on\.", text)
               for n, text in zip((4, 6), said, strict=True))  # fmt: skip
    assert result(learn) == whole
    assert names(tmp_path / "fit-1") == ["step-00000012.ckpt"]


@pytest.mark.case("K3")
def test_where_room_is_missing_at_the_end_it_is_an_error_and_the_older_one_stays(tmp_path, monkeypatch):
    open_, write = full({3})
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(files, "write", write)
    with pytest.raises(OSError, match="No space left on device") as caught:
        fit(make(), tmp_path, keep=1, every_steps=5)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path / "fit-1") == ["step-00000010.ckpt"]
    assert load_tree(tmp_path / "fit-1" / "step-00000010.ckpt", checked=True)["position"]["step"] == 10


@pytest.mark.case("K3")
def test_nothing_is_removed_before_the_new_one_is_durable(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace", "unlink"):
        real = getattr(os, name)

        def call(*args, name=name, real=real, **options):
            done.append((name, Path(args[-1]).name if name != "fsync" else ""))
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)
    fit(make(), tmp_path, keep=1)
    first = done.index(("unlink", "step-00000002.ckpt"))
    renamed = done.index(("replace", "step-00000004.ckpt"))
    assert done[renamed - 1:first + 1] == [("fsync", ""), ("replace", "step-00000004.ckpt"), ("fsync", ""),
                                           ("unlink", "step-00000002.ckpt")]  # fmt: skip


# ---- the best one

NAN, INF = math.nan, math.inf
SEQUENCES = [
    [NAN, NAN, NAN], [NAN, 0.5, 0.9, 0.95], [INF, 3.0, -INF], [1.0, 1.0, 1.0], [3.0, 1.0, 1.0, 2.0], [-INF, 2.0, 1.0],
    [0.0, -0.0, NAN, 0.0], [2.0, NAN, 3.0, INF],
]  # fmt: skip


def best_of(values, mode):
    """(value, epoch) of the first of the best finite ones; None if there is none."""
    finite = [(value, epoch) for epoch, value in enumerate(values) if math.isfinite(value)]
    key = {"min": lambda pair: (pair[0], pair[1]), "max": lambda pair: (-pair[0], pair[1])}[mode]
    return min(finite, key=key, default=None)


@pytest.mark.table
@pytest.mark.filterwarnings("ignore:given is:UserWarning")  # of what is not finite, which is meant here
@pytest.mark.case("K11")
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("values", SEQUENCES)
def test_the_best_one_is_the_first_of_the_best_finite_values(tmp_path, values, mode):
    weights, learn = [], make(values)
    look = At("after_epoch", lambda state: weights.append(bits(dict(state.model.state_dict()))))
    fit(learn, tmp_path, look, SaveBest("given", mode=mode), n_epochs=len(values), keep=1)
    best, file = best_of(values, mode), tmp_path / "fit-1" / "best.ckpt"
    other = make(seed=1)
    if best is None:
        assert not file.exists()
        with pytest.raises(FileNotFoundError, match=r"there is no best.ckpt in .*fit-1. It is written by"):
            other.load_best(tmp_path)
        return
    kept = load_tree(file, checked=True)["best"]
    assert (kept["monitor"], kept["value"], kept["epoch"]) == ("given", *best)
    other.load_best(tmp_path)
    assert bits(dict(other.model.state_dict())) == weights[best[1]]


@pytest.mark.case("K11")
@pytest.mark.parametrize("into", ["same", "other"])
@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [3.0, 1.0, 1.0], [1.0, 2.0, 0.5]])
def test_the_best_value_goes_over_a_resume_into_the_same_and_another_folder(tmp_path, values, into):
    a, b = tmp_path / "a", tmp_path / "b"
    broken_off(a, SaveBest("given", mode="min"), after=9, learn=make(values))  # in the last epoch
    run, resume = (a, "auto") if into == "same" else (b, a)
    save, learn = SaveBest("given", mode="min"), make(values)
    fit(learn, run, save, resume=resume)
    best = best_of(values, "min")
    assert (save.best, save.best_epoch) == best
    holder = b if into == "other" and best[1] == 2 else a
    loaded = make(seed=1)
    loaded.load_best(holder)
    if best[1] < 2:
        assert names(b / "fit-1") == ["step-00000010.ckpt", "step-00000012.ckpt"] if into == "other" else not b.exists()
    assert load_tree(holder / "fit-1" / "best.ckpt", checked=True)["best"]["value"] == best[0]


@pytest.mark.filterwarnings("ignore:given is:UserWarning")  # of what is not finite, which is meant here
@pytest.mark.case("K12")
def test_a_best_one_that_an_earlier_run_has_left_is_not_this_ones(tmp_path):
    fit(make([1.0, 2.0, 3.0]), tmp_path, SaveBest("given", mode="min"))
    for path in (tmp_path / "fit-1").glob("step-*.ckpt"):
        path.unlink()
    fit(make([NAN, NAN, NAN], seed=2), tmp_path, SaveBest("given", mode="min"))
    assert names(tmp_path / "fit-1") == ["best.superseded", "step-00000010.ckpt", "step-00000012.ckpt"]
    with pytest.raises(FileNotFoundError, match=r"there is no best\.ckpt in "):
        make().load_best(tmp_path)


@pytest.mark.filterwarnings("ignore:given is:UserWarning")  # of what is not finite, which is meant here
@pytest.mark.case("K12")
def test_a_best_one_that_was_copied_from_another_run_is_refused(tmp_path):
    fit(make([1.0, 2.0, 3.0]), tmp_path / "a", SaveBest("given", mode="min"))
    fit(make([NAN, NAN, NAN]), tmp_path / "b", SaveBest("given", mode="min"))
    shutil.copy(tmp_path / "a" / "fit-1" / "best.ckpt", tmp_path / "b" / "fit-1")
    learn = make(seed=3)
    before = everything(learn)
    for path in ("b", "b/fit-1", "b/fit-1/best.ckpt"):
        with pytest.raises(ValueError, match=r"is of another run than .* beside it: there is no best in this one"):
            learn.load_best(tmp_path / path)
    assert everything(learn) == before


# ---- what a user, or the clock, does meanwhile


def remove_all(folder):
    shutil.rmtree(folder)


def remove_run(folder):
    shutil.rmtree(folder.parent)


def remove_files(folder):
    for path in folder.glob("*.ckpt"):
        path.unlink()


def remove_oldest(folder):
    min(folder.glob("step-*.ckpt")).unlink()


def move(folder):
    folder.rename(folder.parent / "moved")


@pytest.mark.case("K14")
@pytest.mark.parametrize("meddle", [remove_all, remove_run, remove_files, remove_oldest, move])
def test_checkpoints_that_vanish_while_it_trains(tmp_path, meddle, whole):
    run, learn = tmp_path / "run", make()
    fit(learn, run, At("before_batch", lambda state: meddle(run / "fit-1"), 7))
    assert result(learn) == whole
    assert steps(run) == [10, 12]
    again = make(seed=5)
    fit(again, run)
    assert trained(again) == whole[0]


@pytest.mark.case("K14")
def test_a_checkpoint_that_vanishes_just_before_it_would_be_removed(tmp_path, monkeypatch, whole):
    real = os.unlink

    def unlink(path, *args, **options):
        if re.search(r"step-\d{8}\.ckpt$", str(path)):
            real(path)  # somebody else was faster
        return real(path, *args, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    learn = make()
    fit(learn, tmp_path)
    assert result(learn) == whole
    assert steps(tmp_path) == [10, 12]


@pytest.mark.case("K15")
@pytest.mark.parametrize("name", ["../../outside", "a/b", "/etc/x", "ü 100 %", "a\0b", "{epoch}", "x" * 400])
def test_no_name_of_a_metric_is_the_name_of_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    fit(make([3.0, 2.0, 1.0], name), "run", SaveBest(name, mode="min"))
    assert names(tmp_path) == ["run"]
    assert names(Path("run")) == [".lock", "fit-1"]
    assert all(NAMES.fullmatch(found) for found in names(Path("run/fit-1")))
    make(seed=1).load_best("run")


@pytest.mark.case("K17")
@pytest.mark.parametrize("when", [lambda step: 1e9 - step, lambda step: 1e9, lambda step: 4e9 - step])
def test_the_newest_is_what_has_done_most_steps_whatever_the_clock_says(tmp_path, monkeypatch, when, whole):
    monkeypatch.setattr(time, "time", lambda: when(0))

    def touch(state):
        for path in (tmp_path / "fit-1").glob("step-*.ckpt"):
            at = when(int(path.name[5:13]))
            os.utime(path, (at, at))

    broken_off(tmp_path, At("before_batch", touch), after=9)
    assert steps(tmp_path) == [6, 8]
    begun, learn = [], make()
    fit(learn, tmp_path, At("before_batch", lambda state: begun.append(state.step), 0))
    assert begun == [8]
    assert result(learn) == whole
    assert steps(tmp_path) == [10, 12]


@pytest.mark.case("K18")
@pytest.mark.parametrize("resume", ["auto", True, "path"])
def test_a_checkpoint_of_a_newer_version(tmp_path, resume):
    broken_off(tmp_path)
    for path in (tmp_path / "fit-1").glob("step-*.ckpt"):
        save_tree(load_tree(path, checked=True) | {"format": 3}, path)
    newest = tmp_path / "fit-1" / "step-00000006.ckpt"
    learn, kept = make(), newest.read_bytes()
    before = everything(learn)
    message = rf"{newest} has format 3, and this version of minifast reads up to 1\. Upgrade minifast\."
    with pytest.raises(ValueError, match=message):
        fit(learn, tmp_path, resume=newest if resume == "path" else resume)
    assert everything(learn) == before
    assert newest.read_bytes() == kept


# ---- what callbacks keep


class Keeps(Callback):
    saves = ("best",)

    def __init__(self, best):
        self.best = best


class Nests(Callback):
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"rows": [1, {"x": self.value}]}


@pytest.mark.table
@pytest.mark.case("S15")
@pytest.mark.parametrize(("value", "message"), [
    (np.float64(0.5), r"is a numpy\.float64: use x\.item\(\)"),
    (np.int32(3), r"is a numpy\.int32: use x\.item\(\)"),
    (np.zeros(3), r"is a numpy\.ndarray"),
    (Path("a"), r"is a pathlib\.(_local\.)?PosixPath: use str\(x\)"),
    (object(), "is a object"),
    (torch.float32, "is a torch.dtype"),
    ({1, 2}, "is a set"),
    (len, "is a builtin_function_or_method"),
], ids=lambda value: type(value).__name__)  # fmt: skip
@pytest.mark.parametrize(("kind", "place"), [(Keeps, r"callbacks\.Keeps\.best"),
                                             (Nests, r"callbacks\.Nests\.rows\[1\]\.x")])  # fmt: skip
def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path, kind, place, value, message):
    learn = make()
    with pytest.raises(TypeError, match=rf"{place} {message}"):
        fit(learn, tmp_path, kind(value))
    assert names(tmp_path / "fit-1") == []
    assert not learn.is_fitting


@pytest.mark.case("S15")
def test_the_checkpoints_before_it_stay(tmp_path):
    keeps = Keeps(0.5)
    with pytest.raises(TypeError, match=r"callbacks\.Keeps\.best is a numpy\.float32: use x\.item\(\)"):
        fit(make(), tmp_path, keeps, At("before_batch", lambda state: setattr(keeps, "best", np.float32(1)), 5))
    assert steps(tmp_path) == [2, 4]
    assert all(load_tree(path, checked=True) for path in (tmp_path / "fit-1").iterdir())


# ---- file systems that can do less


def refuses(code):
    def call(*args, **options):
        raise OSError(code, os.strerror(code))

    return call


def no_folder_fsync(code):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        return real(handle)

    return fsync


LESS = {
    "no links": [(os, "link", refuses(errno.EOPNOTSUPP))],
    "links not permitted": [(os, "link", refuses(errno.EPERM))],
    "no locks": [(fcntl, "lockf", refuses(errno.ENOLCK))],
    "locks not supported": [(fcntl, "lockf", refuses(errno.ENOTSUP))],
    "no fsync of folders": [(os, "fsync", no_folder_fsync(errno.EINVAL))],
    "fsync of folders not supported": [(os, "fsync", no_folder_fsync(errno.ENOTSUP))],
}
LESS["all of it"] = [change for name in ("no links", "no locks", "no fsync of folders") for change in LESS[name]]


@pytest.mark.case("E5")
@pytest.mark.parametrize("less", LESS)
def test_a_file_system_that_can_do_less_is_enough(tmp_path, monkeypatch, caplog, less, whole):
    caplog.set_level(logging.DEBUG, "minifast")
    for owner, name, replacement in LESS[less]:
        monkeypatch.setattr(owner, name, replacement)
    broken_off(tmp_path, SaveBest("given", mode="min"), learn=make([2.0, 1.0, 3.0]))
    learn = make([2.0, 1.0, 3.0])
    fit(learn, tmp_path, SaveBest("given", mode="min"))
    assert result(learn) == whole
    assert names(tmp_path / "fit-1") == ["best.ckpt", "step-00000010.ckpt", "step-00000012.ckpt"]
    assert load_tree(tmp_path / "fit-1" / "best.ckpt", checked=True)["best"]["epoch"] == 1
    make(seed=1).load_best(tmp_path)
    said = {record.getMessage().split(" ")[1] for record in caplog.records if record.getMessage().startswith("no ")}
    expected = {"hard": "links" in less, "lock": "locks" in less, "fsync": "fsync" in less}
    assert said == (set(expected) if less == "all of it" else {word for word, is_said in expected.items() if is_said})
    assert all(record.levelno <= logging.INFO for record in caplog.records)


@pytest.mark.case("E5")
def test_a_best_one_that_is_a_copy_outlives_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuses(errno.EOPNOTSUPP))
    fit(make([1.0, 2.0, 3.0]), tmp_path, SaveBest("given", mode="min"), keep=1)
    best = tmp_path / "fit-1" / "best.ckpt"
    assert best.stat().st_nlink == 1
    assert load_tree(best, checked=True)["position"]["step"] == 4
    assert steps(tmp_path) == [12]
