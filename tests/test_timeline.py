"""`learn.trace()` and `learn.profile()`: what they list is what a fit does, and nothing is left of them."""
import re
import time

import pytest
import torch
from helpers import Trace as EventLog
from helpers import batches, everything, learner

from minifast import Callback, CancelBatch, OneCycle
from minifast.studies.timeline import WORK


def events(moments):
    return [moment.event for moment in moments if moment.callback == "Trace"]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_events_are_those_of_a_fit_in_their_order(accumulate):
    log = EventLog()
    learn = learner(batches(3), batches(2))
    moments = learn.trace(3, callbacks=[log], accumulate=accumulate)
    traced = list(log.log)
    log.log.clear()
    learn.fit(0.01, callbacks=[log], accumulate=accumulate)
    assert traced == log.log
    assert events(moments) == log.log


def test_n_limits_training_and_validation():
    log = EventLog()
    learner(batches(5), batches(4)).trace(2, callbacks=[log])
    assert log.log.count("before_batch") == log.log.count("before_valid_batch") == 2


def test_nothing_is_left_of_it():
    learn = learner(batches(5), batches(2), callbacks=[OneCycle(0.1)])
    learn.fit(0.01)
    before = everything(learn)
    learn.trace()
    learn.profile(4)
    assert everything(learn) == before


class Meddler(Callback):
    """Changes one thing in each of some events."""

    def before_batch(self, state):
        state.batch = tuple(tensor * 2 for tensor in state.batch)

    def before_step(self, state):
        for p in state.model.parameters():
            p.grad.mul_(2)

    def after_step(self, state):
        with torch.no_grad():
            for p in state.model.parameters():
                p.add_(1)

    def after_epoch(self, state):
        state.metrics["mine"] = 1.0
        state.lr_scale = 0.5


@pytest.mark.parametrize(
    ("event", "changed"),
    [
        ("before_batch", "batch"), ("before_step", "gradients"), ("after_step", "weights"),
        ("after_epoch", "lr_scale 1.0000 -> 0.5000, metrics: mine"),
    ],
)  # fmt: skip
def test_what_a_callback_changed_is_named(event, changed):
    moments = learner(batches(1)).trace(1, callbacks=[Meddler()])
    assert [moment.changed for moment in moments if (moment.event, moment.callback) == (event, "Meddler")] == [changed]


def test_a_schedule_shows_its_numbers():
    moments = learner(batches(2)).trace(2, callbacks=[OneCycle(0.1, moms=None)])
    changes = [moment.changed for moment in moments if moment.callback == "OneCycle"]
    assert changes == ["lrs 0.0010 -> 0.1000", "lr 0.0010 -> 0.0040", "lr 0.0040 -> 0.1000"]


def test_it_prints_as_a_table():
    text = str(learner(batches(2)).trace(1))
    assert text.splitlines()[0].split() == ["step.batch", "event", "or", "work", "callback", "us", "changes"]
    assert "(the loop)" in text
    assert "optimizer step" in text


def test_an_error_of_a_callback_is_raised_as_in_a_fit():
    class Broken(Callback):
        def before_step(self, state):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        learner(batches(2)).trace(callbacks=[Broken()])
    assert caught.value.__notes__ == ["in Broken.before_step: epoch 0, step 0"]


def test_a_cancelled_batch_is_a_cancelled_batch():
    class Skip(Callback):
        def before_batch(self, state):
            raise CancelBatch

    moments = learner(batches(2)).trace(2, callbacks=[Skip()])
    assert [moment.event for moment in moments if moment.event in WORK.values()] == ["waiting for data"] * 2


class Slow(Callback):
    """A callback that takes 5 ms a batch."""

    def before_batch(self, state):
        time.sleep(0.005)


class SlowData(list):
    """A loader that takes 5 ms a batch."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.005)
            yield batch


def test_the_profile_finds_a_slow_callback():
    profile = learner(batches(8)).profile(callbacks=[Slow()])
    assert profile.rows[0]["callback"] == "Slow"
    assert profile.share("Slow") > 0.5
    assert profile.n_batches == 5  # 8 but for the first 3
    assert sum(row["share"] for row in profile.rows) == pytest.approx(1)
    assert profile.rows[0]["seconds"] >= 5 * 0.005


def test_the_profile_finds_slow_data():
    profile = learner(SlowData(batches(8))).profile()
    assert profile.rows[0]["what"] == "waiting for data"
    assert profile.share("waiting for data") > 0.5
    assert str(profile).splitlines()[1].split() == ["what", "calls", "us", "a", "call", "share"]


def test_the_profile_says_what_to_do_where_training_waits():
    text = str(learner(SlowData(batches(8))).profile())
    assert re.search(r"\n\n\d\d % of the time goes into waiting for data: the loader \(SlowData\) makes", text)
    assert "waiting for data:" not in str(learner(batches(8)).profile(callbacks=[Slow()]))


@pytest.mark.slow
def test_the_operators_on_request():
    assert "aten::" in str(learner(batches(4)).profile(4, ops=True))


def test_data_without_a_length_is_profiled():
    class Stream:
        def __iter__(self):
            yield from batches(10)

    assert learner(Stream()).profile(6).n_batches == 4  # 6 but for the first 2


@pytest.mark.parametrize("call", ["trace", "profile"])
def test_bad_numbers_are_refused(call):
    learn = learner()
    with pytest.raises(ValueError, match=r"n must be an int >= 1, got 0 \(int\)"):
        getattr(learn, call)(0)
    with pytest.raises(ValueError, match="the data is an iterator"):
        getattr(learner(iter(batches(2))), call)()
