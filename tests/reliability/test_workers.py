"""Worker processes: none is left behind, and what happens to one is said."""

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import At, batches, learner, throw
from torch.utils.data import DataLoader, Dataset

FULL = bool(os.environ.get("MINIFAST_FULL"))  # set by `make crash`
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FORKED = {"num_workers": 2, "multiprocessing_context": "fork"}
PR_GET_PDEATHSIG = 2
FOREVER = 60.0  # seconds
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system can be asked for it")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Samples(Dataset):
    """80 samples (x (3,), y (1,)); `look(i)` is called for each, and what it gives, if anything, is y."""

    def __init__(self, look):
        self.look = look

    def __len__(self):
        return 80

    def __getitem__(self, i):
        seen = self.look(i)
        return torch.ones(3), torch.ones(1) if seen is None else torch.tensor([float(seen)])


def loader(look, **options):
    return DataLoader(Samples(look), 4, **FORKED | options)


# ---- kill -9 of the trainer


def orphans(*arguments):
    done = subprocess.run([sys.executable, HERE / "orphans.py", *arguments], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
@pytest.mark.slow
@pytest.mark.case("R2")
@pytest.mark.parametrize("trials", [{"early": 1, "late": 1, "random": 5}, pytest.param(
    {"early": 3, "late": 3, "random": 150 if FULL else 20}, marks=pytest.mark.nightly)], ids=["few", "more"])
def test_no_worker_outlives_a_trainer_that_is_killed(trials):
    assert orphans(*(f"{when}={n}" for when, n in trials.items())) == dict.fromkeys(trials, 0)


if FULL:  # it waits for 8 s
    @linux
    @pytest.mark.slow
    @pytest.mark.case("R2")
    def test_torch_alone_leaves_some():
        """Else there is nothing to do for minifast here, and the test above shows nothing."""
        assert orphans("alone", "early=3", "late=3") == {"early": 3, "late": 3}


def death_signal(i=None):
    """The signal that this process gets when its parent dies; 0 for none."""
    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(value))
    return value.value


def death_signal_of_a_fork(i=None):
    """That of a child forked now; 0 as well if it has a parent it knows nothing of."""
    pid = os.fork()
    if pid == 0:
        os._exit(death_signal())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def seen_by_workers(look, **options):
    """The values of `look` in the workers of a fit."""
    seen = set()
    note = At("before_batch", lambda state: seen.update(state.batch[1].flatten().tolist()))
    learner(loader(look, **options)).fit(0.1, callbacks=[note])
    return seen


@linux
@pytest.mark.case("R2")
@pytest.mark.parametrize("persistent", [False, True])
def test_the_kernel_is_asked_for_workers(persistent):
    assert seen_by_workers(death_signal, persistent_workers=persistent) == {signal.SIGKILL}


@linux
@pytest.mark.case("R2")
def test_it_is_not_asked_for_any_other_process():
    assert seen_by_workers(lambda i: i < 2 and death_signal_of_a_fork()) == {0}  # forked by a worker
    assert death_signal_of_a_fork() == 0  # after a fit
    learn, seen = learner(loader(lambda i: None)), []
    learn.fit(0.1, callbacks=[At("after_pred", lambda state: seen.append(death_signal_of_a_fork()), n=1)])
    assert seen == [0]  # while workers run


@linux
@pytest.mark.case("R2")
def test_nor_for_one_that_another_thread_forks_meanwhile():
    seen = []

    class Loader:
        def __len__(self):
            return 2

        def __iter__(self):
            thread = threading.Thread(target=lambda: seen.append(death_signal_of_a_fork()))
            thread.start()
            thread.join()
            return iter(batches(2))

    learner(Loader()).fit(0.1)
    assert seen == [0]


@linux
@pytest.mark.case("R2")
def test_nor_for_workers_of_a_fit_outside_the_main_thread():
    """The kernel would take the end of that thread for the death of the process."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(seen_by_workers(death_signal)))
    thread.start()
    thread.join()
    assert seen == [{0}]


# ---- what happens to a worker


def failure(learn, **options):
    """What ends a fit: the error, with its notes in one text."""
    try:
        learn.fit(0.1, **options)
    except Exception as error:
        return error, "\n".join(getattr(error, "__notes__", []))
    return pytest.fail("it did not fail")


def assert_usable(learn):
    assert multiprocessing.active_children() == []
    learn.dls.train = batches(2)
    learn.fit(0.1)
    assert len(learn.recorder.losses) == 2


def at_37(action):
    return lambda i: action() if i == 37 else None


def divide():
    return 1 / 0


@pytest.mark.case("B3")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_raises(workers):
    learn = learner(DataLoader(Samples(at_37(divide)), 4, num_workers=workers,
                               multiprocessing_context="fork" if workers else None))
    error, notes = failure(learn)
    assert type(error) is ZeroDivisionError
    assert notes == "while loading batch 9 of epoch 0, training data (DataLoader)"
    assert_usable(learn)


@pytest.mark.case("B3")
def test_a_file_that_is_not_there_is_no_dead_worker():
    error, notes = failure(learner(loader(at_37(Path("/nowhere").read_text))))
    assert type(error) is FileNotFoundError
    assert "worker process" not in notes


@pytest.mark.case("B10")
@pytest.mark.parametrize("how", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3)], ids=["9", "exit"])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_that_dies(how, persistent):
    learn = learner(loader(at_37(how), persistent_workers=persistent))
    error, notes = failure(learn)  # RuntimeError, or an OSError if it died while it handed a batch over
    for words in ("while loading batch", "worker process", "died", "memory has run out", "/dev/shm", "num_workers=0"):
        assert words in notes, error
    learn.dls.train._iterator = None  # of the persistent ones the other one is well
    assert notes.count("num_workers=0") == 1
    del error
    assert_usable(learn)


@pytest.mark.case("B10")
@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_broken_connection_to_a_dead_worker(error):
    """As which torch shows it, if the worker dies while it hands over a batch."""

    class Pass:
        def __init__(self):
            self._workers = [multiprocessing.get_context("fork").Process(target=os._exit, args=(code,))
                             for code in (0, 5)]
            for worker in self._workers:
                worker.start()

        def __next__(self):
            raise error

    class Loader:
        def __len__(self):
            return 2

        def __iter__(self):
            return Pass()

    raised, notes = failure(learner(Loader()))
    assert raised is error
    assert "died of exit code 5. Often memory has run out" in notes


def kill_a_worker(state):
    """And wait for torch to say so: its handler raises in whatever the main thread does."""
    multiprocessing.active_children()[0].kill()
    begin = time.monotonic()
    while time.monotonic() < begin + FOREVER:
        time.sleep(0.01)


@pytest.mark.case("B10")
def test_a_worker_that_dies_while_the_model_computes():
    learn = learner(loader(lambda i: None))
    error, notes = failure(learn, callbacks=[At("after_pred", kill_a_worker, n=1)])
    assert "is killed by signal" in str(error)
    assert "memory has run out" in notes
    assert_usable(learn)


class Dying:
    """A loader one of whose workers dies while they are ended, as torch says it."""

    def __init__(self, error):
        self.error, self.batches = error, iter(batches(2))

    def __len__(self):
        return 2

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)

    def _shutdown_workers(self):
        raise self.error


DEATH = "DataLoader worker (pid 4711) is killed by signal: Killed. "


@pytest.mark.case("B10", "R3")
def test_a_worker_that_dies_while_workers_are_ended_hides_no_error():
    error = ZeroDivisionError()
    raised, _ = failure(learner(Dying(RuntimeError(DEATH))), callbacks=[At("after_pred", throw(error), n=0)])
    assert raised is error


@pytest.mark.case("B10")
def test_after_the_last_batch_it_is_no_error_at_all():
    learn = learner(Dying(RuntimeError(DEATH)))
    learn.fit(0.1)
    assert len(learn.recorder.losses) == 2


def test_any_other_error_there_is_one():
    error = RuntimeError("something else")
    assert failure(learner(Dying(error)))[0] is error


@pytest.mark.case("B11")
def test_a_worker_that_hangs_is_given_up_after_the_timeout_of_the_loader(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # it would be waited for for 5 s
    learn = learner(loader(at_37(lambda: time.sleep(FOREVER)), timeout=1))
    error, notes = failure(learn)
    assert str(error) == "DataLoader timed out after 1 seconds"
    assert notes == "while loading batch 9 of epoch 0, training data (DataLoader)"
    assert_usable(learn)


@pytest.mark.case("E3")
@pytest.mark.filterwarnings("ignore:Got pickle error")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_cannot_go_to_a_spawned_worker(method):
    learn = learner(loader(lambda i: None, multiprocessing_context=method))
    error, notes = failure(learn)
    assert "<lambda>" in str(error)
    assert "at the top level of a module" in notes
    assert "num_workers=0" in notes
    assert_usable(learn)
