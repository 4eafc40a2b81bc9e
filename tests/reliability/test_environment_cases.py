"""Machines that lack something, or are not trusted: packages, versions, folders, memory, threads."""
import ast
import json
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import threading
import tomllib
import warnings
from multiprocessing.context import ForkContext
from pathlib import Path

import pytest
import torch
from helpers import At, batches, learner, throw
from torch.utils.data import DataLoader, TensorDataset

import minifast
from minifast import Checkpoint, SaveBest, errors

TESTS = Path(__file__).resolve().parent.parent
PACKAGE = Path(minifast.__file__).parent


def python(script, *args, cwd=None, **env):
    """What a program of its own prints; it must end well and warn of nothing."""
    path = os.pathsep.join(map(str, (PACKAGE.parent, TESTS)))
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, args)], text=True,
                          capture_output=True, cwd=cwd, env=os.environ | {"PYTHONPATH": path} | env)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


# ---- packages

WITHOUT = """
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == NAME:
                raise ERROR

    sys.meta_path.insert(0, Refuse())
    from helpers import *
    from minifast import *
"""


def without(name, error):
    return WITHOUT.replace("NAME", repr(name)).replace("ERROR", error)


USE = """
    learn = learner(batches(4), batches(1), callbacks=[EMA(half_life=3)])
    found = learn.lr_find(num_it=20)
    learn.fit_one_cycle(2, 0.05, callbacks=[Checkpoint("run", every_steps=2), SaveBest("valid_loss")], resume="auto")
    learn.load_best("run")
    learn.validate(), learn.get_preds()
"""


@pytest.mark.nightly
@pytest.mark.case("R6")
def test_without_matplotlib_all_but_plots_works(tmp_path):
    lines = python(without("matplotlib", "ModuleNotFoundError(\"No module named 'matplotlib'\", name=name)") + USE + """
    for draw in (found.plot, learn.recorder.plot_losses, learn.recorder.plot_lr, OneCycle().plot):
        try:
            draw(*[9] * (draw.__name__ == "plot" and draw.__self__ is not found))
        except ModuleNotFoundError as error:
            print(error)
    """, cwd=tmp_path)
    assert lines == ["No module named 'matplotlib'"] * 4
    assert (tmp_path / "run" / "fit-1" / "best.ckpt").exists()


@pytest.mark.nightly
@pytest.mark.case("R6")
def test_training_imports_no_matplotlib_and_plots_need_no_display(tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    assert python("""
    from helpers import *
    from minifast import *
    """ + USE + """
    import sys
    print("matplotlib" in sys.modules)
    learn.recorder.plot_losses().figure.savefig("losses.png")
    found.plot().figure.savefig("found.png")
    import matplotlib.pyplot
    print(matplotlib.pyplot.get_fignums(), matplotlib.get_backend().lower())
    """, cwd=tmp_path) == ["False", "[] agg"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("losses.png", "found.png"))


UNFIT = 'RuntimeError("operator torchvision::nms does not exist")'


@pytest.mark.nightly
@pytest.mark.case("E1")
def test_a_torchvision_that_does_not_fit_torch_is_named_where_it_is_needed(tmp_path):
    lines = python(without("torchvision", UNFIT) + USE + """
    import numpy as np
    from minifast.vision import from_arrays
    data = np.zeros((9, 65, 65, 3), dtype=np.uint8), range(9)
    from types import SimpleNamespace
    state = SimpleNamespace(loss_func=None)
    for use in (lambda: from_arrays(*data, None), lambda: MixUp().before_fit(state),
                lambda: CutMix().before_fit(state)):
        try:
            use()
        except ImportError as error:
            print(error)
    """, cwd=tmp_path)
    message = (r"torchvision \d+\.\d+\.\d+\S* does not work with torch \d+\.\d+\.\d+\S* "
               r"\(operator torchvision::nms does not exist\): reinstall both from one index")  # fmt: skip
    assert len(lines) == 3
    assert all(re.fullmatch(message, line) for line in lines)


@pytest.mark.case("E1")
def test_a_torchvision_that_is_not_there(monkeypatch):
    def version(name):
        raise errors.PackageNotFoundError(name)

    monkeypatch.setattr(errors, "version", version)
    message = "^this takes torchvision, which is not installed: pip install torchvision$"
    with pytest.raises(ImportError, match=message), errors.torchvision_errors():
        raise ModuleNotFoundError("No module named 'torchvision'")


@pytest.mark.slow
@pytest.mark.case("X8")
def test_a_torch_with_known_holes_is_refused_when_minifast_is_imported():
    lines = python("""
    import sys, torch
    from torch.torch_version import TorchVersion
    for version in ("1.13.1", "2.5.1", "2.9.1+cu128", "2.10.0a0", "2.10.0", "2.13.0+cpu", "3.0.0"):
        torch.__version__ = TorchVersion(version)
        for name in [name for name in sys.modules if name.partition(".")[0] == "minifast"]:
            del sys.modules[name]
        try:
            import minifast
            print("ok")
        except ImportError as error:
            print(error)
    """)
    message = ("minifast needs torch 2.10 or newer, this is {}: older ones can run code from a file of weights "
               "(CVE-2025-32434, CVE-2026-24747). Install a newer one: pip install --upgrade torch.")  # fmt: skip
    old = ["1.13.1", "2.5.1", "2.9.1+cu128"]
    assert lines[:3] == [message.format(version) for version in old]
    assert lines[4:] == ["ok"] * 3
    assert lines[3] in ("ok", message.format("2.10.0a0")), "a version on the way to 2.10"


@pytest.mark.case("X8")
def test_the_installer_asks_for_such_a_torch():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "torch>=2.10" in project["dependencies"]


# ---- what is not there to be misused


def names_called(file):
    """The last part of every name that is used in a source file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]


OBJECTS = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
           "recv_object_list"}  # fmt: skip
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "Unpickler"}


@pytest.mark.table
@pytest.mark.case("X9")
@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_object_is_sent_to_another_process_and_none_is_pickled(file):
    """torch's collectives of objects unpickle what another process sends."""
    assert set(names_called(file)) & (OBJECTS | PICKLES) == set()


def test_that_would_be_found(tmp_path):
    file = tmp_path / "bad.py"
    for line in ("torch.distributed.all_gather_object(a, b)", "from torch.distributed import broadcast_object_list",
                 "import pickle", "from pickle import Unpickler as U"):  # fmt: skip
        file.write_text(line)
        assert set(names_called(file)) & (OBJECTS | PICKLES)


@pytest.mark.case("X6")
def test_there_are_no_pickled_learners_and_files_hold_plain_values(tmp_path):
    offered = {name.lower() for name in [*minifast.__all__, *dir(minifast.Learner)]}
    assert not {name for name in offered if re.search(r"load_learner|save_learner|pickle|from_pickle", name)}
    learn = learner(batches(4), batches(1))
    learn.fit(0.01, callbacks=[Checkpoint(tmp_path / "run"), SaveBest("valid_loss", tmp_path / "best.pt")])
    learn.save(tmp_path / "weights.pt")
    learn.export(tmp_path / "net")
    found = [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".ckpt")]
    assert len(found) >= 4
    for path in found:
        torch.load(path, weights_only=True)
    assert isinstance(json.loads((tmp_path / "net" / "model.json").read_text()), dict)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".pt", ".ckpt", ".json", ""}


# ---- threads


def threaded_fit(run, n_threads, **options):
    torch.set_num_threads(n_threads)
    learn = learner(batches(4), batches(1))
    learn.fit(0.05, 2, callbacks=[Checkpoint(run, every_steps=1, every_seconds=None), *options.get("callbacks", ())],
              resume="auto")
    return learn


@pytest.mark.case("E2")
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_another_number_of_threads_is_told(tmp_path, before, after):
    with pytest.raises(ZeroDivisionError):
        threaded_fit(tmp_path, before, callbacks=[At("before_batch", throw(ZeroDivisionError), 5)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn = threaded_fit(tmp_path, after)
    said = [str(warning.message) for warning in caught]
    if before == after:
        assert said == []
    else:
        [text] = said
        assert f"was made elsewhere (threads {before} then, {after} now): training goes on, but maybe not with" in text
    assert len(learn.recorder.losses) == 8


class Counted(ForkContext):
    """A way to start processes that counts them."""

    started = 0

    def Process(self, *args, **options):
        self.started += 1
        return super().Process(*args, **options)


@pytest.mark.case("E8")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_way_to_start_processes_is_the_loaders_everywhere(monkeypatch):
    """In a program with threads a user has to choose another way than fork; none is ever started in torch's."""
    data = TensorDataset(torch.linspace(-1, 1, 36).reshape(12, 3), torch.linspace(0, 1, 12).reshape(12, 1))
    counted, default = Counted(), Counted()
    monkeypatch.setattr(multiprocessing, "get_context", lambda *args: default)
    monkeypatch.setattr(torch.multiprocessing, "Process", default.Process)
    loader = DataLoader(data, 4, shuffle=True, num_workers=1, multiprocessing_context=counted)
    learn = learner(loader, loader)
    stop = threading.Event()
    thread = threading.Thread(target=lambda: stop.wait(60))
    thread.start()
    try:
        for n, use in [(2, lambda: learn.fit(0.01)), (1, lambda: learn.validate(loader)),
                       (1, lambda: learn.get_preds(loader)), (2, lambda: learn.lr_find(num_it=4)),
                       (2, lambda: learn.check()), (4, lambda: learn.fit(0.01, 2))]:  # fmt: skip
            before = counted.started
            use()
            assert counted.started - before >= min(n, 1)
            assert default.started == 0
    finally:
        stop.set()
        thread.join()
    assert loader.multiprocessing_context is counted
    assert len(learn.recorder.losses) == 6


# ---- folders

WATCH = """
    import os, sys, tempfile

    written = set()

    def hear(event, args):
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.add(os.path.abspath(args[0]))
        if event in ("os.mkdir", "os.rename", "os.link", "shutil.copyfile"):
            written.update(os.path.abspath(arg) for arg in args if isinstance(arg, str))
        if event.startswith("tempfile."):
            written.add(event)

    from helpers import *
    from minifast import *
    learner(batches(1)).fit(0.01)  # what torch itself makes when it first trains
    sys.addaudithook(hear)
"""


@pytest.mark.nightly
@pytest.mark.case("E4")
def test_home_and_tmpdir_are_not_used(tmp_path):
    """They cannot be written, by anybody: as if they were full. All that is written lies in the folder of the run."""
    written = python(WATCH + """
    def run(**options):
        learn = learner(batches(4), batches(1), callbacks=[EMA(half_life=3)])
        learn.lr_find(num_it=20)
        learn.fit_one_cycle(2, 0.05, resume="auto", callbacks=[
            Checkpoint("run", every_steps=2), SaveBest("valid_loss", "run/best.pt"), *options.get("callbacks", ())])
        learn.load_best("run")

    try:
        run(callbacks=[At("before_batch", throw(ZeroDivisionError), 5)])
    except ZeroDivisionError:
        run()
    print("\\n".join(sorted(written)))
    """, cwd=tmp_path, **dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "TMP", "TEMP"), "/proc/nowhere"))
    run = str(tmp_path / "run")
    assert any(path.endswith("step-00000002.ckpt") for path in written)
    assert [path for path in written if path != run and not path.startswith(run + os.sep)] == []


UNPRIVILEGED = """
    import os, stat, sys, tempfile
    from pathlib import Path
    from helpers import *
    from minifast import *
    learn = learner(batches(4), batches(1))
    learn.fit(0.01)  # what torch imports when it first trains
    folder = Path(tempfile.mkdtemp())
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "empty").chmod(0o555), (folder / "run").chmod(0o555), folder.chmod(0o555)
    os.chdir(folder / "empty")
    if os.geteuid() == 0:  # whom permissions do not bind
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    assert not os.access(folder / "run", os.W_OK) and not os.access(".", os.W_OK)
"""


@pytest.mark.nightly
@pytest.mark.case("A14", "L4")
def test_a_read_only_folder(tmp_path):
    """The finder needs none; a fit that is to be saved there is refused before it begins."""
    lines = python(UNPRIVILEGED + """
    os.environ["HOME"] = os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)
    before = everything(learn)
    learn.lr_find(num_it=20)
    assert everything(learn) == before | {"the learner's attributes": everything(learn)["the learner's attributes"]}
    before = everything(learn)
    for path in ("run", folder / "run", folder / "new"):
        try:
            learn.fit(0.01, callbacks=[Checkpoint(path)], resume="auto")
        except PermissionError as error:
            print(error.errno, error.strerror)
    assert everything(learn) == before
    print(len(os.listdir(folder)))
    """, cwd=tmp_path)
    assert len(lines) == 4
    assert all(re.fullmatch(r"13 cannot use .*(run|new) for checkpoints: Permission denied\. Make it a folder that can "
                            r"be written, or pass another folder\.", line) for line in lines[:3])  # fmt: skip
    assert lines[3] == "2"


# ---- memory

TIGHT = """
    import io, os, resource, torch
    from pathlib import Path
    from torch import nn
    from minifast import *
    from helpers import bits, trained, throw, At
    SIZE = 80e6  # bytes of the model

    def make():
        torch.manual_seed(0)
        data = [(torch.ones(2, 2000), torch.zeros(2, 10000))] * 3
        return Learner(nn.Linear(2000, 10000, bias=False), (data, None), nn.MSELoss(), opt_func=torch.optim.SGD,
                       device="cpu", verbose=False)

    def within(copies, action):
        "Whether `action` needs no more memory than so many copies of the model."
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(copies * SIZE), resource.RLIM_INFINITY))
        try:
            action()
        except (MemoryError, RuntimeError) as error:
            return error
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        return None

    learn = make()
    learn.fit(1e-9, callbacks=[Checkpoint("warm")])  # what torch imports when it first trains and saves
"""


@pytest.mark.nightly
@pytest.mark.case("E9")
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited and read as Linux does it")
def test_memory_of_saving_loading_and_the_finder(tmp_path):
    """A fit that saves itself after each update takes what a fit takes: a gradient as large as the model.

    Loading takes two copies: what is in the file, and what was there, for an error on the way. With less, nothing is
    changed, and the file is not called damaged.
    """
    lines = python(TIGHT + """
    import logging
    logging.getLogger("minifast").setLevel("ERROR")  # it would say that another Learner has ended this fit

    def save():
        learn.fits_ended = {}
        learn.fit(1e-9, callbacks=[Checkpoint("run", every_steps=1, every_seconds=None)])

    def resume():
        other.fits_ended = {}
        other.fit(1e-9, callbacks=[Checkpoint("warm")], resume=True)

    def spoil():
        with torch.no_grad():
            other.model.weight.zero_()
        return trained(other)

    print(type(within(0.3, lambda: learn.save("weights.pt"))).__name__)
    print(type(within(0.5, lambda: torch.save(learn.model.state_dict(), io.BytesIO()))).__name__)
    print(type(within(1.25, lambda: learn.fit(1e-9))).__name__)
    print(type(within(1.25, save)).__name__)
    print(type(within(0.5, lambda: learn.fit(1e-9))).__name__)
    print(len(os.listdir("run/fit-1")))
    other = make()
    for action in (lambda: other.load("weights.pt"), resume):
        before = spoil()
        for copies in (0.5, 1.5):
            error = within(copies, action)
            print(type(error).__name__, str(error) if type(error) is MemoryError else "allocate memory" in str(error))
            assert trained(other) == before
        print(within(2.25, action), trained(other) == before)
    before = trained(learn)
    error = within(0.5, lambda: learn.lr_find(num_it=4))
    print(type(error).__name__, error.__notes__)
    assert trained(learn) == before
    print(within(2.5, lambda: learn.lr_find(num_it=4)))
    """, cwd=tmp_path)
    assert lines[:6] == ["NoneType", "RuntimeError", "NoneType", "NoneType", "RuntimeError", "2"]
    message = r"MemoryError {} was not loaded: there is not enough memory for its 80\.\d MB\."
    for i, name in ((6, "weights.pt"), (9, str(tmp_path / "warm/fit-1/step-00000003.ckpt"))):
        assert re.fullmatch(message.format(name), lines[i])
        assert lines[i + 1:i + 3] == ["RuntimeError True", "None False"]
    note = "in the copy of model and optimizer that is put back afterwards: it takes 80 MB"
    assert lines[12:] == [f"RuntimeError {[note]}", "None"]
