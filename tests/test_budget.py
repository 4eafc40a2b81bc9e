"""Fits that are limited in time, by a clock that the test moves."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import At, batches, bits, learner, throw, trained, twin
from torch import nn

from minifast import (
    CancelBatch,
    CircularLR,
    CircularLRBeta,
    ConstantLR,
    CosineAnnealing,
    ExponentialLR,
    FlatCos,
    LinearLR,
    OneCycle,
    PiecewiseLR,
    PolynomialLR,
    Schedule,
    schedules,
)
from minifast.schedules import time_limit as budget
from minifast.schedules.time_limit import TICKS, TimeLimit

SCHEDULES = [
    ConstantLR(), LinearLR(), PolynomialLR(), ExponentialLR(), OneCycle(), OneCycle(pct_start=0.99),
    CircularLR(n_cycles=3), CircularLR(20, 8, moms=(0.95, 0.85)), CircularLRBeta(), CosineAnnealing(),
    CosineAnnealing(3, 2), FlatCos(), Schedule("lr", schedules.cosine),
    PiecewiseLR([(0.2, LinearLR(0.1, 1.0)), (0.8, CosineAnnealing(warmup_frac=0))]),
]  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock.now += seconds` moves it. It does not begin at 0."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def each(clock, seconds, event="after_batch"):
    """A callback: every `event` takes `seconds`, a number or a function of the step."""

    def wait(state):
        clock.now += seconds(state.step) if callable(seconds) else seconds

    return At(event, wait)


def lrs(learn):
    return [seen["lr"] for seen in learn.opt.seen]


# ---- the schedules reach their end


@pytest.mark.table
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("seconds", [7.0, 6.0, 59.9, 200.0, lambda step: 0.5 if step < 20 else 13.0])
def test_every_schedule_begins_at_its_beginning_and_ends_at_its_end(clock, schedule, seconds):
    learn = learner(batches(3))
    learn.fit(0.1, minutes=1, callbacks=[schedule, each(clock, seconds)])
    assert lrs(learn)[0] == 0.1 * schedule.value("lr", 0, TICKS)
    assert lrs(learn)[-1] == 0.1 * schedule.value("lr", TICKS - 1, TICKS)
    if "momentum" in schedule.owns:
        assert learn.opt.seen[-1]["momentum"] == schedule.value("momentum", TICKS - 1, TICKS)


@pytest.mark.parametrize("schedule", [OneCycle(), CircularLR(), FlatCos()], ids=repr)
def test_in_between_it_runs_on_the_share_of_the_time(clock, schedule):
    took = [1.0, 10.0, 4.0, 30.0, 3.0, 12.0, 0.0]
    learn = learner(batches(4))
    learn.fit(0.1, minutes=1, callbacks=[schedule, each(clock, lambda step: took[step - 1])])
    shares = [sum(took[:i]) / 60 for i in range(6)] + [1.0]
    assert lrs(learn) == [0.1 * schedule.value("lr", int(share * (TICKS - 1)), TICKS) for share in shares]


def test_the_number_of_steps_does_not_matter(clock):
    """Twenty steps that take no time."""
    learn = learner(batches(4))
    learn.fit(0.1, minutes=1, callbacks=[LinearLR(), each(clock, lambda step: 0.0 if step < 21 else 31.0)])
    assert lrs(learn) == [0.1 * LinearLR().value("lr", int(share * (TICKS - 1)), TICKS)
                          for share in [0.0] * 21 + [31 / 60, 1.0]]  # fmt: skip


def test_it_ends_with_the_first_batch_after_the_time(clock):
    learn = learner(batches(4))
    learn.fit(0.1, minutes=1, callbacks=[each(clock, 9.0)])
    assert len(learn.opt.seen) == math.ceil(60 / 9) + 1


def test_a_step_longer_than_the_limit(clock):
    """The second one is the last: it is there so that the schedule ends at its end."""
    learn = learner(batches(4))
    learn.fit_one_cycle(max_lr=0.1, minutes=0.1, callbacks=[each(clock, 1e6)])
    assert len(learn.opt.seen) == 2
    assert lrs(learn)[-1] == 0.1 * OneCycle().value("lr", TICKS - 1, TICKS)


@pytest.mark.parametrize(("event", "seconds"), [("after_epoch", 25.0), ("after_valid_batch", 12.5)])
def test_validation_takes_time_too(clock, event, seconds):
    learn = learner(batches(2), batches(2))
    learn.fit(0.1, minutes=1, callbacks=[each(clock, seconds, event)])
    assert len(learn.recorder.epochs) == 4
    assert len(learn.opt.seen) == 7, "3 epochs of two steps, and the first step after the time"


# ---- the end of the fit


def test_it_validates_and_records_a_row(clock):
    learn = learner(batches(4), batches(2))
    heard = []
    watch = [At(event, lambda state, event=event: heard.append(event)) for event in ("after_validate", "after_epoch")]
    learn.fit(0.1, minutes=1, callbacks=[each(clock, 11.0), *watch])
    assert heard == ["after_validate", "after_epoch"] * 2
    assert [list(row) for row in learn.recorder.epochs] == [["epoch", "train_loss", "valid_loss", "time"]] * 2
    assert learn.recorder.newest.epoch_ends == [4, 7], "the second epoch is short"
    assert learn.recorder.epochs[-1]["valid_loss"] == learn.validate()["valid_loss"]


@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_a_window_of_micro_batches_is_finished(clock, accumulate):
    learn = learner(batches(12))
    stepped = []
    learn.fit_one_cycle(max_lr=0.1, minutes=1, accumulate=accumulate, callbacks=[
        each(clock, 8.0), At("after_step", lambda state: stepped.append(state.batch_index))])  # fmt: skip
    late = math.ceil(60 / 8)  # the first batch after the time
    assert stepped == list(range(accumulate - 1, late + accumulate, accumulate))[:late // accumulate + 1]
    assert lrs(learn)[-1] == 0.1 * OneCycle().value("lr", TICKS - 1, TICKS)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_ends_even_if_every_batch_is_cancelled(clock, accumulate):
    learn = learner(batches(4), batches(1))
    learn.fit(0.1, minutes=1, accumulate=accumulate,
              callbacks=[each(clock, 10.0), At("before_step", throw(CancelBatch))])  # fmt: skip
    assert learn.opt.seen == []
    assert clock.now <= 1000 + 60 + 10 * (accumulate + 4)


def test_one_epoch_may_be_all_there_is_time_for(clock):
    learn = learner(batches(1000), batches(1))
    learn.fit(0.1, 3, minutes=1, callbacks=[each(clock, 1.0)])
    assert len(learn.recorder.epochs) == 1
    assert len(learn.opt.seen) == 61


def test_a_second_fit_has_all_its_time(clock):
    limit = TimeLimit(1)
    learn = learner(batches(4))
    for _ in range(2):
        learn.fit(0.1, 1000, callbacks=[limit, each(clock, 9.0)])
        assert len(learn.recorder.lrs) == 8
        clock.now += 1e5


def test_fine_tune_shares_the_time(clock):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    learn = learner(batches(4), model=model, splitter=lambda model: [model[0], model[1]])
    learn.fine_tune(3, minutes=2, callbacks=[each(clock, 3.0)])
    head, rest = learn.recorder.fits[-1], learn.recorder.newest
    assert (len(head), len(rest)) == (11, 31), "30 s and 90 s"
    assert rest.lrs[-1] == pytest.approx(1e-3 * OneCycle(None, 5.0).value("lr", TICKS - 1, TICKS))


# ---- beside a number of epochs


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("schedule", [OneCycle(), CosineAnnealing(2), FlatCos()], ids=repr)
def test_a_limit_that_is_not_reached_changes_no_bit(clock, schedule, accumulate):
    learn = learner(batches(5), batches(2))
    other = twin(learn)
    learn.fit(0.1, 4, callbacks=[schedule, TimeLimit(60), each(clock, 1.0)], accumulate=accumulate)
    other.fit(0.1, 4, callbacks=[schedule], accumulate=accumulate)
    assert trained(learn) == trained(other)
    assert bits(learn.recorder.lrs) == bits(other.recorder.lrs)
    assert len(learn.recorder.epochs) == 4


class Longer(list):
    """Announces fewer batches than it yields."""

    def __len__(self):
        return 3


@pytest.mark.filterwarnings("ignore:the training data yielded 5 batches, but 3 were announced")
def test_the_end_of_the_schedule_is_not_the_end_of_the_time(clock):
    learn = learner(Longer(batches(5)))
    learn.fit(0.1, 2, callbacks=[TimeLimit(60), each(clock, 1.0)])
    assert len(learn.opt.seen) == 10


def test_a_limit_that_is_reached_brings_the_schedule_to_its_end(clock):
    learn = learner(batches(5))
    learn.fit_one_cycle(100, 0.1, callbacks=[TimeLimit(1), each(clock, 5.0)])
    assert len(learn.opt.seen) == 13
    assert lrs(learn)[-1] == 0.1 * OneCycle().value("lr", 499, 500)
    assert max(lrs(learn)) > 0.09


# ---- going on after a kill


def test_the_used_time_is_kept_and_the_pause_is_not_counted(clock):
    killed = TimeLimit(1)
    with pytest.raises(RuntimeError, match="killed"):
        learner(batches(4)).fit(0.1, 1000, callbacks=[
            killed, each(clock, 9.0), At("before_batch", throw(RuntimeError("killed")), 4)])  # fmt: skip
    saved = killed.state_dict()
    assert saved == {"_used": 36.0}
    clock.now += 1e6
    resumed = TimeLimit(1)
    learn = learner(batches(4))
    learn.fit(0.1, 1000, callbacks=[resumed, each(clock, 9.0),
                                    At("before_fit", lambda state: resumed.load_state_dict(saved))])  # fmt: skip
    assert len(learn.opt.seen) == 4, "at 36, 45, 54 and 63 s"


# ---- arguments


def test_lr_find_takes_its_time(clock):
    learn = learner(batches(4), callbacks=[TimeLimit(1), each(clock, 1000.0)])
    assert len(learn.lr_find(num_it=10, stop_div=False).lrs) == 10


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), "10", True])
def test_minutes_must_be_a_number(minutes):
    with pytest.raises(ValueError, match=r"minutes must be a finite number > 0, got "):
        TimeLimit(minutes)
    with pytest.raises(ValueError, match=r"minutes must be a finite number > 0, got "):
        learner().fit(0.1, minutes=minutes)


def test_two_limits_are_refused():
    with pytest.raises(ValueError, match=r"both TimeLimit\(minutes=1.0\) and TimeLimit\(minutes=2.0\) set"):
        learner().fit(0.1, minutes=2, callbacks=[TimeLimit(1)])


def test_minutes_take_the_place_of_the_learners_limit(clock):
    learn = learner(batches(4), callbacks=[TimeLimit(100)])
    learn.fit(0.1, minutes=1, callbacks=[each(clock, 30.0)])
    assert len(learn.opt.seen) == 3


def test_its_repr_rebuilds_it():
    assert repr(eval(repr(TimeLimit(0.5)))) == repr(TimeLimit(0.5)) == "TimeLimit(minutes=0.5)"


def test_by_the_real_clock():
    learn = learner(batches(4), batches(1))
    torch.manual_seed(0)
    learn.fit_one_cycle(max_lr=0.01, minutes=0.05 / 60)
    assert lrs(learn)[-1] == 0.01 * OneCycle().value("lr", TICKS - 1, TICKS)
    assert "valid_loss" in learn.recorder.epochs[-1]


def test_data_for_one_pass_is_refused():
    with pytest.raises(ValueError, match=r"minutes=0.1 takes .* an iterator \(list_iterator\), good for"):
        learner(iter(batches(3))).fit_one_cycle(max_lr=0.1, minutes=0.1, steps_per_epoch=3)


def test_flat_cos_by_the_clock_needs_no_epochs():
    learn = learner(batches(3))
    learn.fit_flat_cos(lr=0.1, minutes=1e-4)
    assert len(learn.recorder.lrs) > 0
    with pytest.raises(ValueError, match="n_epoch must be an int >= 1, got None"):
        learn.fit_flat_cos(lr=0.1)
