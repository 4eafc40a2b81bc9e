"""A fit that a signal ends: it is saved where it stopped, and goes on from there."""
import os
import signal
import sys
from functools import partial

import pytest
import torch
from helpers import At, bits, rngs, tiers, trained
from torch import nn

from minifast import EMA, Checkpoint, DataLoaders, Learner, SaveBest, TensorLoader, accuracy
from minifast.core.callback import EVENTS
from minifast.files.reading import load_tree

SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


def learner(verbose=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    x, y = torch.randn(23, 3), torch.randint(0, 2, (23,))
    dls = DataLoaders(TensorLoader(x, y, batch_size=4, shuffle=True), TensorLoader(x, y, batch_size=9, shuffle=True))
    return Learner(model, dls, nn.CrossEntropyLoss(), metrics=[accuracy], device="cpu", verbose=verbose)


def fit(learn, path, *callbacks, accumulate=1, **options):
    """3 epochs of 6 batches, 3 validation batches each; nothing is saved but for a signal, the best and the end."""
    saver = Checkpoint(path, every_seconds=None)
    learn.fit_one_cycle(3, 0.01, callbacks=[EMA(half_life=3), SaveBest("valid_loss"), saver, *callbacks],
                        accumulate=accumulate, resume="auto", **options)  # fmt: skip


def press(number):
    return lambda state: os.kill(os.getpid(), number)


def newest(path):
    """What the newest checkpoint holds, but for the time at which it was written."""
    return load_tree(max((path / "fit-1").glob("step-*.ckpt")), checked=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each `accumulate`: the bits of the fit that nobody interrupts."""
    found = {}
    for accumulate in (1, 4):
        learn = learner()
        fit(learn, tmp_path_factory.mktemp("whole"), accumulate=accumulate)
        found[accumulate] = result(learn)
    return found


def result(learn):
    rows = [{key: value for key, value in row.items() if key != "time"} for row in learn.recorder.epochs]
    return trained(learn) | rngs() | bits({"losses": learn.recorder.losses, "rows": rows, "lrs": learn.recorder.lrs})


@pytest.mark.case("I1", "I3", "S4", "S12")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("nth", tiers([0, 1, 2], quick=[1]))
@pytest.mark.parametrize("event", [event for event in EVENTS if event not in ("before_fit", "after_fit")])
def test_it_goes_on_where_the_signal_came(event, nth, accumulate, number, tmp_path, whole):
    steps = []
    learn = learner()
    with pytest.raises(SIGNALS[number]):
        fit(learn, tmp_path, At(event, press(number), nth), At("after_step", lambda state: steps.append(state.step)),
            accumulate=accumulate)  # fmt: skip
    assert newest(tmp_path)["position"]["step"] == len(steps), "an update is lost"
    again = learner()
    fit(again, tmp_path, accumulate=accumulate)
    assert result(again) == whole[accumulate]


@pytest.mark.case("I1", "I3")
@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_batch_there_is_nothing_to_save(number, tmp_path, whole):
    with pytest.raises(SIGNALS[number]):
        fit(learner(), tmp_path, At("before_fit", press(number)))
    assert list((tmp_path / "fit-1").iterdir()) == []
    learn = learner()
    fit(learn, tmp_path)
    assert result(learn) == whole[1]


@pytest.mark.case("I3")
def test_after_the_last_event_the_fit_is_whole_and_saved(tmp_path, whole):
    with pytest.raises(SystemExit) as caught:
        fit(learner(), tmp_path, At("after_fit", press(signal.SIGTERM)))
    assert caught.value.code == 143
    learn = learner()
    fit(learn, tmp_path)
    assert result(learn) == whole[1]


@pytest.mark.case("I3")
def test_a_signal_while_a_checkpoint_is_written(tmp_path, whole, monkeypatch):
    real, done = os.fsync, []

    def fsync(handle):
        done.append(handle)
        if len(done) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        fit(learner(), tmp_path)
    monkeypatch.undo()
    learn = learner()
    fit(learn, tmp_path)
    assert result(learn) == whole[1]


def test_it_says_where_it_was_saved_and_where_it_goes_on(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        fit(learner(verbose=True), tmp_path, At("after_step", press(signal.SIGINT), 8))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (f"interrupted: the state after 9 updates is in {tmp_path / 'fit-1'}. The same call with "
                    'resume="auto" goes on from there.')  # fmt: skip
    fit(learner(verbose=True), tmp_path)
    file = tmp_path / "fit-1" / "step-00000009.ckpt"
    assert capsys.readouterr().out.splitlines()[0] == f"{file}: resumed in epoch 1, 3 batches and 9 of 18 updates"


@pytest.mark.table
@pytest.mark.case("I2", "I14")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", range(5))
@pytest.mark.parametrize("opt_func", [
    torch.optim.AdamW, partial(torch.optim.Adam, amsgrad=True), partial(torch.optim.AdamW, foreach=False),
    torch.optim.NAdam, torch.optim.Adamax, partial(torch.optim.RMSprop, momentum=0.9)])  # fmt: skip
def test_an_update_that_is_cut_while_it_makes_its_state_does_not_spoil_the_next(opt_func, nth, error, monkeypatch):
    make, calls = torch.zeros_like, []

    def zeros_like(*args, **options):
        if f"{os.sep}optim{os.sep}" in sys._getframe(1).f_code.co_filename:
            calls.append(1)
            if len(calls) == nth + 1:
                raise error("made up")
        return make(*args, **options)
    learn = learner()
    learn.opt_func = opt_func
    learn.opt = opt_func(learn.model.parameters(), lr=0.01)
    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    with pytest.raises(error, match="made up"):
        learn.fit(0.01, 1)
    learn.fit(0.01, 1)
    assert len(learn.recorder.losses) == 6
    assert all(float(learn.opt.state[p]["step"]) >= 6 for p in learn.model.parameters())
