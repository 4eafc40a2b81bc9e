"""What every test may rely on: no global state left over from the test before it, and no window that opens."""
import gc
import os
import random
import signal
import sys
from types import SimpleNamespace

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: on a busy machine threads that wait for each other cost seconds
# Bytecode is kept, whatever the environment says: without it each run rewrites the asserts of all tests again, and each
# process that a test starts compiles the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import numpy as np
import pytest
import torch
from helpers import FakeRun
from hypothesis import settings
from tables import pytest_addoption, pytest_pycollect_makeitem, pytest_runtest_protocol  # noqa: F401 (hooks)

pytest.register_assert_rewrite("resuming")

# programs, not tests
collect_ignore = ["benchmarks", "reliability/orphans.py", "reliability/signal_trials.py", "reliability/soak.py",
                  "reliability/crash_table.py", "reliability/crash"]
# A process that was started in the background has SIGINT ignored, and with it all whom it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine, and no time limit for a single one: a busy machine is no failure.
settings.register_profile("minifast", derandomize=True, deadline=None, database=None)
settings.load_profile("minifast")


def pytest_collection_modifyitems(config, items):
    """Quick tests first: what fails fails soon. Among several processes slow ones first: or one ends long after all."""
    moving = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if moving and not config.getoption("rows"):
        raise pytest.UsageError(f"an address, which each process has another of, in the id of a test: {moving[0]}")
    first = hasattr(config, "workerinput")
    items.sort(key=lambda item: any(map(item.get_closest_marker, ("slow", "nightly"))) is not first)


def pytest_collection_finish():
    """What is imported by now stays: `gc.collect` in a test need not look at all of it again."""
    gc.collect()
    gc.freeze()


# Their set-up takes long, and all of their tests share it.
STAY_TOGETHER = {"tests/reliability/test_crash.py"}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Tests go to the processes one by one, so that no process is left with a long queue."""
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file in STAY_TOGETHER else nodeid

    return OneByOne(config, log)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def open_figures():
    return sys.modules["matplotlib.pyplot"].get_fignums() if "matplotlib.pyplot" in sys.modules else []


@pytest.fixture(autouse=True)
def leaves_no_trace():
    """Restore the RNGs and the thread count; fail a test that leaves a signal handler or a pyplot figure behind."""
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    figures = open_figures()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_num_threads(threads)
    changed = [number.name for number, handler in handlers.items() if signal.getsignal(number) is not handler]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    left = set(open_figures()) - set(figures)
    for number in left:
        sys.modules["matplotlib.pyplot"].close(number)
    assert not changed, f"the test left its own handler for {', '.join(changed)}"
    assert not left, f"the test left pyplot figures open: {sorted(left)}"


@pytest.fixture
def wandb(monkeypatch):
    """As much of wandb as is used; it is not installed."""
    fake = SimpleNamespace(run=None, runs=[])

    def init(**options):
        fake.runs.append(FakeRun(**options))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def quick_disk(monkeypatch):
    """Files need not outlive a power cut: on a busy machine waiting for the disk takes most of a test's time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
