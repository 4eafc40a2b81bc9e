"""SIGINT and SIGTERM at any instant: of real programs, of worker processes that begin, and drawn at random."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiers

ROOT = Path(__file__).resolve().parent.parent.parent
TRIALS = int(os.environ.get("MINIFAST_SIGNAL_TRIALS", "150"))  # 0 failures in n bound the rate by 3 / n
FEW = 15
FOREVER = 60  # seconds: what lasts that long did not work
both = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
pytestmark = pytest.mark.slow


def run(*arguments, **options):
    """A Python program, with this minifast and the helpers of the tests; warnings are errors."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-W", "error", *arguments], cwd=ROOT, env=environment, text=True,
                          **options)  # fmt: skip


# ---- programs

BEGIN = """
import multiprocessing, os, signal, sys, threading, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from helpers import At, batches, everything, learner
from minifast import Callback

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs this in the background hands down SIG_IGN
NUMBER = signal.Signals[sys.argv[1]]
def send(state=None): os.kill(os.getpid(), NUMBER)
"""

PROGRAMS = {
    "training": """
learn = learner(batches(5), verbose=True)
try:
    learn.fit(0.1, callbacks=[At("after_pred", send, n=2)])
finally:
    print("did", len(learn.opt.seen))
""",
    "validation": """
seen, learn = [], learner(batches(2), batches(5), verbose=True)
try:
    learn.fit(0.1, 3, callbacks=[At("before_valid_batch", send, n=2), At("after_valid_batch", seen.append)])
finally:
    print("did", len(seen))
""",
    "lr_find": """
learn, calls = learner(batches(5), verbose=True), []
before = everything(learn)
def hook(*args):
    calls.append(1)
    if len(calls) == 7: send()
handle = learn.model.register_forward_hook(hook)
try:
    learn.lr_find()
finally:
    assert everything(learn) == before
    print("did", len(calls))
""",
    "saving": """
class Save(Callback):  # a file that takes long; what is pressed in the middle does not cut it off
    def after_epoch(self, state):
        threading.Timer(0.05, send).start()
        with open(sys.argv[2], "w") as file:
            while not state.interrupt.pending: time.sleep(0.001)
            for i in range(20):
                file.write(f"{i}\\n")
                time.sleep(0.005)
learn = learner(batches(2), batches(1), verbose=True)
try:
    learn.fit(0.1, 3, callbacks=[Save()])
finally:
    with open(sys.argv[2]) as file: print("did", len(file.readlines()))
""",
}
DONE = {"training": 3, "validation": 3, "lr_find": 7, "saving": 20}
STATUS = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}  # a shell shows 130 for the first: Python ends by it


@both
@pytest.mark.case("I1", "I3")
@pytest.mark.parametrize("where", tiers(PROGRAMS, quick=["training"]))
def test_a_program_finishes_what_it_does_and_ends_with_the_status_of_the_signal(where, number, tmp_path):
    done = run("-c", BEGIN + PROGRAMS[where], number.name, str(tmp_path / "file"))
    assert done.returncode == STATUS[number], done.stderr
    assert done.stdout.splitlines()[-1] == f"did {DONE[where]}"
    if number == signal.SIGTERM:
        assert done.stderr == ""


@both
@pytest.mark.nightly
@pytest.mark.case("I13")
def test_nobody_reads_the_output_any_more(number):
    read, write = os.pipe()
    os.close(read)
    try:
        done = run("-c", BEGIN + PROGRAMS["training"].replace("finally", "except ZeroDivisionError"), number.name,
                   stdout=write)  # fmt: skip
    finally:
        os.close(write)
    assert done.returncode == STATUS[number], done.stderr


STUCK = """
class Stuck(torch.nn.Linear):
    def forward(self, x):
        send()
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        time.sleep(60)
        print("woke")
        os._exit(1)
learner(model=Stuck(3, 1)).fit(0.1)
"""


@both
@pytest.mark.nightly
@pytest.mark.case("I2")
def test_a_second_ctrl_c_stops_a_batch_that_is_stuck(number):
    done = run("-c", BEGIN + STUCK, number.name)
    assert (done.returncode, done.stdout) == (STATUS[number], "")


WORKERS_BEGIN = """
def stay_in_the_window():  # of a worker that was forked and has not come to torch's own handlers
    time.sleep(60)
    os._exit(7)
def end_them(state=None):
    while len(multiprocessing.active_children()) < 2 or len(entered) < 1: time.sleep(0.01)
    time.sleep(0.2)
    workers = multiprocessing.active_children()
    for worker in workers: worker.terminate()
    for worker in workers: worker.join(20)
    print([how_it_ended(worker) for worker in workers], flush=True)
    os._exit(0)
def how_it_ended(worker):
    try: os.kill(worker.pid, 0)
    except ProcessLookupError:  # the main thread, whose loader fails meanwhile, may have taken its status
        return worker.exitcode or -15
    return "alive"
entered = []
data = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
loader = DataLoader(data, 4, num_workers=2, multiprocessing_context="fork")
def begin(state):
    os.register_at_fork(after_in_child=stay_in_the_window)
    entered.append(1)
    threading.Thread(target=end_them, daemon=True).start()
learner(loader).fit(0.1, callbacks=[At("before_epoch", begin)])
"""


@pytest.mark.nightly
@pytest.mark.case("I3", "R2")
def test_sigterm_ends_workers_that_have_only_just_been_forked():
    done = run("-W", "ignore::DeprecationWarning", "-c", BEGIN + WORKERS_BEGIN, "SIGTERM", timeout=FOREVER)
    assert done.stdout.splitlines() == ["[-15, -15]"], done.stderr


# ---- random instants


def trials(number, n, seed, burst=1):
    """What came out of `n` children that got the signal at a random instant; where it came is printed."""
    done = run(str(Path(__file__).with_name("signal_trials.py")), number.name, str(n), str(seed), str(burst))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(f"{n} x {burst} {number.name}: {result['phases']}, exit statuses {result['statuses']}")
    return result


@pytest.mark.case("I1", "I3", "I5")
@pytest.mark.parametrize(("number", "n"), [
    pytest.param(signal.SIGINT, FEW, id="few"),
    *(pytest.param(number, TRIALS, id=number.name, marks=pytest.mark.nightly)
      for number in (signal.SIGINT, signal.SIGTERM))])
def test_at_any_instant_the_state_is_one_that_an_uninterrupted_run_passes_through(number, n):
    result = trials(number, n, seed=number)
    assert result["wrong"] == []
    if n == TRIALS:
        assert result["states"] > 60
        assert {"lr_find", "training", "validation"} <= result["phases"].keys()


@pytest.mark.nightly
@pytest.mark.case("I2", "I5", "I12")
def test_three_ctrl_c_in_a_row_leave_a_learner_that_trains():
    result = trials(signal.SIGINT, TRIALS, seed=5, burst=3)
    assert result["wrong"] == []
