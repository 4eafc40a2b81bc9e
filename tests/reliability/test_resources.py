"""Memory, descriptors, processes, hooks and figures: as many after a fit as before it, however it ended.

MINIFAST_FULL=1, as `make crash` sets it, takes the numbers that the limits were made for.
"""

import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import At, batches, bits, learner, throw, trained
from torch import nn

from minifast import ActivationStats, Callback, CancelFit

FULL = bool(os.environ.get("MINIFAST_FULL"))
STEPS = "100_000, {}" if FULL else "8_000, {}, first=2_000"
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the numbers from")


def soak(call):
    done = subprocess.run([sys.executable, HERE / "soak.py", call], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=1200)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def counted():
    """What does not disturb each other's numbers, in one process; `files` is last, it limits the process."""
    n = (200, 50, 300) if FULL else (60, 20, 60)
    return soak(f"dict(steps=steps({STEPS.format(False)}), learners=learners({n[0]}), failures=failures({n[1]}), "
                f"files=files({n[2]}))")


# ---- memory


@proc
@pytest.mark.nightly
@pytest.mark.case("R1")
def test_the_memory_of_a_long_fit():
    """100,000 steps: 8 MB. 8,000 steps: as much per step, and 1 MB for the chunks in which memory is taken."""
    assert soak(f"steps({STEPS.format(True)})")["growth"] < (8 if FULL else 1.6)


@proc
@pytest.mark.nightly
@pytest.mark.case("R1")
def test_without_the_recorder_there_is_no_growth(counted):
    """100,000 steps: 1 MB. 8,000 steps: 0.3 MB, for the same reason."""
    assert counted["steps"]["growth"] < (1 if FULL else 0.3)


@proc
@pytest.mark.nightly
@pytest.mark.case("R7")
def test_learners_that_are_dropped_are_collected(counted):
    assert counted["learners"]["alive"] == 0
    assert counted["learners"]["growth"] < 5


def tensors_of(state):
    held = [state.loss, state.pred, state.step_loss, *state.batch]
    return [weakref.ref(tensor) for tensor in held]


class Watch(Callback):
    """Weak references to what the newest batch is made of."""

    refs = ()

    def after_step(self, state):
        self.refs = tensors_of(state)


def fresh(n):
    """A loader that keeps none of its batches."""

    class Loader:
        def __len__(self):
            return n

        def __iter__(self):
            return ((x.clone(), y.clone()) for x, y in batches(n))

    return Loader()


ENDS = {"well": (), "cancelled": (At("after_step", throw(CancelFit), n=1),),
        "with an error": (At("after_batch", throw(ZeroDivisionError), n=1),)}


@pytest.mark.case("R9")
@pytest.mark.parametrize("end", ENDS)
def test_nothing_of_a_batch_is_held_after_a_fit(end):
    watch, learn = Watch(), learner(fresh(3))
    try:
        learn.fit(0.1, callbacks=[watch, *ENDS[end]])
    except ZeroDivisionError:
        assert end == "with an error"
    len(learn.recorder.losses)  # the record holds the losses of the newest steps on the device until they are read
    gc.collect()
    assert len(watch.refs) == 5
    assert [ref() for ref in watch.refs] == [None] * 5


class OutOfMemory(nn.Linear):
    """Cannot take the third batch."""

    calls, refs = 0, ()

    def forward(self, x):
        self.calls += 1
        hidden = x * 2
        if self.calls == 3:
            self.refs = [weakref.ref(x), weakref.ref(hidden)]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(hidden)


@pytest.mark.case("I14", "R9")
def test_out_of_memory():
    """The learner is as after the last whole batch, the size of the batch is said, and the batch is let go."""
    learns = []
    for n in (3, 2):  # the second one never meets the batch that is too large
        torch.manual_seed(0)
        learns.append(learner(fresh(n), model=OutOfMemory(3, 1)))
    learn, notes = learns[0], ""
    try:
        learn.fit(0.1)
    except torch.OutOfMemoryError as error:
        notes = "\n".join(error.__notes__)
    assert notes.startswith("in the model: epoch 0, step 2, inputs ")
    assert "(4, 3)" in notes
    learns[1].fit(0.1)
    assert trained(learn) == trained(learns[1])
    assert bits(learn.recorder.losses) == bits(learns[1].recorder.losses)
    assert [p.grad for p in learn.model.parameters()] == [None, None]
    gc.collect()
    assert [ref() for ref in learn.model.refs] == [None, None]
    learn.fit(0.1)
    assert len(learn.recorder.losses) == 3


# ---- processes, descriptors, hooks


@proc
@pytest.mark.nightly
@pytest.mark.case("R3", "R4")
def test_fits_with_workers_that_fail_leave_nothing_behind(counted):
    failures = counted["failures"]
    assert failures["ends"] == ["KeyError", "OverflowError", "ZeroDivisionError", "cancelled"]
    assert failures["workers"] >= 20
    assert failures["after"] == failures["before"]
    assert failures["shm"] == []


@pytest.mark.case("R4")
@pytest.mark.parametrize("error", [ZeroDivisionError, CancelFit, KeyboardInterrupt])
def test_hooks_go_however_a_fit_ends(error):
    learn = learner(model=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), callbacks=[ActivationStats()])

    def hooks():
        return [len(module._forward_hooks) for module in learn.model.modules()]

    seen = []
    for _ in range(20):
        with suppress(error):
            learn.fit(0.1, callbacks=[At("after_pred", lambda state: seen.append(hooks()), n=0),
                                      At("after_loss", throw(error), n=1)])
    assert hooks() == [0, 0, 0]
    assert seen == [[0, 1, 1]] * 20


@proc
@pytest.mark.nightly
@pytest.mark.case("R8")
def test_saving_and_loading_leaves_no_file_open(counted):
    assert counted["files"]["after"] == counted["files"]["before"]
    assert counted["files"]["left"] == ["model"]


# ---- figures, output


@pytest.mark.nightly
@pytest.mark.case("R5")
def test_plots_leave_no_pyplot_figure_and_are_collected():
    import matplotlib.pyplot as plt

    learn, refs = learner(batches(8), batches(1)), []
    learn.fit_one_cycle(2, 0.1)
    before = plt.get_fignums()
    for _ in range(50):
        for axes in (learn.recorder.plot_lr(show_moms=True), learn.recorder.plot_losses()):
            refs.append(weakref.ref(axes.figure))
    del axes
    gc.collect()
    assert plt.get_fignums() == before
    assert sum(ref() is not None for ref in refs) == 0


@pytest.mark.case("R11")
def test_a_log_file_gets_one_line_per_epoch(capsys):
    learner(batches(300), batches(1), verbose=True).fit(0.01, 3)
    out, err = capsys.readouterr()
    assert err == ""
    assert "\r" not in out
    assert len(out.splitlines()) == 4  # and a header
