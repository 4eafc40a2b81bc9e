"""The finder and the world around it: a kill, a folder that takes no file, what is attached to the learner."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import At, Trace, batches, bits, everything, learner, rngs, spying, trained
from torch import nn

from minifast import EMA, Checkpoint, EarlyStopping, OneCycle, ReduceLROnPlateau, SaveBest

TESTS = Path(__file__).resolve().parent.parent

KILLED = """
import sys, time
from helpers import At, batches, learner
from minifast import Checkpoint, SaveBest

def wait(state):
    print("begun", flush=True)
    time.sleep(600)

slow = At("after_step", wait, 5)
slow.in_lr_find = True
learn = learner(batches(4), batches(1), callbacks=[Checkpoint("run"), SaveBest("valid_loss", "best.pt"), slow])
learn.lr_find()
"""


@pytest.mark.nightly
@pytest.mark.case("L3")
def test_a_kill_leaves_no_file(tmp_path):
    folders = {name: tmp_path / name for name in ("cwd", "tmp", "home")}
    for folder in folders.values():
        folder.mkdir()
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    env = os.environ | {"TMPDIR": str(folders["tmp"]), "HOME": str(folders["home"]), "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=folders["cwd"], env=env, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"begun\n"
        assert set(tmp_path.rglob("*")) == set(folders.values()), "none while it runs"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert set(tmp_path.rglob("*")) == set(folders.values())


@pytest.mark.case("L8", "L4")
def test_nothing_of_the_fit_runs_saves_or_counts(tmp_path, monkeypatch):
    """What is attached goes on after it as if it had not been: its state is the same, and so is the fit."""
    monkeypatch.chdir(tmp_path)

    def results(find):
        given = [EMA(half_life=3), EarlyStopping(patience=1), SaveBest("valid_loss", "best.pt"), ReduceLROnPlateau(),
                 Checkpoint("run", every_steps=1), OneCycle(0.05)]
        learn = learner(batches(4), batches(1), callbacks=given, opt_func=spying(torch.optim.AdamW))
        if find:
            trace = Trace()
            before = bits([cb.state_dict() for cb in given])
            learn.callbacks.append(trace)
            learn.lr_find(1e-3, 10, 20)
            learn.callbacks.remove(trace)
            assert trace.log == []
            assert os.listdir() == []
            assert bits([cb.state_dict() for cb in given]) == before
        learn.fit(0.1, 3)
        (tmp_path / "best.pt").unlink()
        [file.unlink() for file in (tmp_path / "run" / "fit-1").iterdir()]
        (tmp_path / "run" / "fit-1").rmdir(), (tmp_path / "run" / ".lock").unlink(), (tmp_path / "run").rmdir()
        return trained(learn), bits([cb.state_dict() for cb in given]), bits(learn.recorder.losses)

    assert results(True) == results(False)


@pytest.mark.case("L9")
def test_each_layer_group_has_its_own_rate_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 1))
    learn = learner(batches(4), model=model, splitter=list, lr=[0.1, 0.01, 0.003])
    learn.fit_one_cycle(1, [0.2, 0.05, 0.01])
    before = everything(learn)
    rates = [group["lr"] for group in learn.opt.param_groups]
    assert len(rates) == 6, "each group's weights and, without decay, its biases"
    assert len(set(rates)) == 3
    ratios = []
    look = At("after_step", lambda state: ratios.append([group["lr"] / state.opt.param_groups[0]["lr"]
                                                         for group in state.opt.param_groups[::2]]))  # fmt: skip
    look.in_lr_find = True
    learn.lr_find(slice(1e-6, 1e-4), 1, 20, stop_div=False, callbacks=[look])
    learn.lr_find([1e-6, 1e-5, 1e-4], [1e-2, 1e-1, 1], 20, stop_div=False, callbacks=[look])
    assert everything(learn) == before
    assert [group["lr"] for group in learn.opt.param_groups] == rates
    assert ratios[20:] == [pytest.approx([1, 10, 100])] * 20
    assert ratios[0] == pytest.approx([1, 10, 100])


@pytest.mark.case("L10")
@pytest.mark.parametrize("stop_div", [True, False])
def test_weights_that_became_infinite_are_as_they_were(stop_div):
    learn = learner(batches(4), batches(1), opt_func=spying(torch.optim.AdamW))
    learn.fit(0.01)
    before, rng = everything(learn), rngs()
    weights = []
    look = At("after_step", lambda state: weights.append(state.model.weight.detach().isfinite().all().item()))
    look.in_lr_find = True
    learn.lr_find(1e25, 1e30, 60, stop_div=stop_div, callbacks=[look])
    assert not all(weights), "so there was something to put back"
    assert (everything(learn), rngs()) == (before, rng)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    learn.fit(0.01)
    assert learn.validate()["valid_loss"] < 1e3


@pytest.mark.case("L5")
@pytest.mark.parametrize("losses", [[float("nan")] * 9, [float("inf")] * 9, [1.0, 2.0, 4.0, 8.0] * 10, [1.0] * 30,
                                    [1.0, 0.5], [3.0, 2.0, 1.0]])  # fmt: skip
def test_a_run_without_an_answer_says_why_and_is_drawn(losses):
    values = iter(losses)
    learn = learner(batches(4), loss_func=lambda pred, target: (pred * 0).sum() + next(values))
    found = learn.lr_find(num_it=len(losses))
    assert found.suggestion is None
    assert len(found.reason) > 20
    assert found.reason in str(found)
    found.plot().figure.canvas.draw()
    learn.recorder.plot().figure.canvas.draw()
