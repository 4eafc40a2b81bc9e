"""The protocol: which events happen when, what a cancel or an error does, and what is left when a fit has ended."""

import copy
import gc
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from helpers import At, Trace, batches, bits, learner, rngs, spying, throw, trained, twin
from torch import nn

from minifast import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CircularLR,
    ConstantLR,
    Metrics,
    OneCycle,
    Order,
    Recorder,
    Schedule,
    State,
)
from minifast.core.callback import EVENTS
from minifast.standard.finite import FiniteLoss

CANCELS = [CancelBatch, CancelEpoch, CancelFit]


# ---- which events, in which order

PLAIN = """
before_fit
  before_epoch
    before_batch  after_pred after_loss after_backward  before_step after_step  after_batch
    before_batch  after_pred after_loss after_backward  before_step after_step  after_batch
    before_validate
      before_valid_batch after_valid_batch
    after_validate
  after_epoch
  before_epoch
    before_batch  after_pred after_loss after_backward  before_step after_step  after_batch
    before_batch  after_pred after_loss after_backward  before_step after_step  after_batch
    before_validate
      before_valid_batch after_valid_batch
    after_validate
  after_epoch
after_fit
"""

ACCUMULATE_2_OF_3_BATCHES = """
before_fit
  before_epoch
    before_batch  after_pred after_loss after_backward  after_batch
    before_batch  after_pred after_loss after_backward  before_step after_step  after_batch
    before_batch  after_pred after_loss after_backward  before_step after_step  after_batch
  after_epoch
after_fit
"""

ACCUMULATE_2_ANNOUNCED_4_YIELDED_3 = """
before_fit
  before_epoch
    before_batch  after_pred after_loss after_backward  after_batch
    before_batch  after_pred after_loss after_backward  before_step after_step  after_batch
    before_batch  after_pred after_loss after_backward  after_batch
    before_step after_step
  after_epoch
after_fit
"""

NO_VALIDATION = """
before_fit
  before_epoch
    before_batch  after_pred after_loss after_backward  before_step after_step  after_batch
  after_epoch
after_fit
"""


def traced(learn, *callbacks, n_epochs=1, **options):
    """The names of the events of a fit."""
    trace = Trace()
    learn.fit(0.1, n_epochs, callbacks=[trace, *callbacks], **options)
    return trace.log


def test_there_are_exactly_these_events():
    assert set(EVENTS) == set(PLAIN.split())


def test_events_of_two_epochs_of_two_batches_with_validation():
    assert traced(learner(batches(2), batches(1)), n_epochs=2) == PLAIN.split()


def test_events_without_validation_data():
    assert traced(learner(batches(1))) == NO_VALIDATION.split()


def test_events_of_accumulation():
    assert traced(learner(batches(3)), accumulate=2) == ACCUMULATE_2_OF_3_BATCHES.split()


class Announcing(list):
    """Batches that say there are `announced` of them."""

    def __init__(self, batches, announced):
        super().__init__(batches)
        self.announced = announced

    def __len__(self):
        return self.announced


def test_events_of_a_window_that_the_loader_left_open():
    with pytest.warns(UserWarning, match="yielded 3 batches, but 4 were announced"):
        trace = traced(learner(Announcing(batches(3), 4)), accumulate=2)
    assert trace == ACCUMULATE_2_ANNOUNCED_4_YIELDED_3.split()


@pytest.mark.table
@pytest.mark.parametrize("event", EVENTS)
def test_callbacks_are_called_by_band_and_then_in_list_order_and_undone_in_reverse(event):
    log = []

    def named(name, order):
        return At(event, lambda state: log.append(name), n=0) if order is None else ordered(name, order)

    def ordered(name, order):
        callback = At(event, lambda state: log.append(name), n=0)
        callback.order = order
        return callback

    own = [ordered("record", Order.RECORD), named("first", None), ordered("setup", Order.SETUP)]
    given = [named("second", None), ordered("hyper", Order.HYPER), ordered("between", Order.USER + 1)]
    learner(batches(1), batches(1), callbacks=own).fit(0.1, callbacks=given)
    expected = ["setup", "hyper", "first", "second", "between", "record"]
    assert log == (expected[::-1] if event == "after_fit" else expected)


def test_only_callbacks_that_override_an_event_are_called():
    codes, called = {event.__code__: name for name, event in EVENTS.items()}, set()
    sys.setprofile(lambda frame, what, arg: called.add(codes.get(frame.f_code)) if what == "call" else None)
    try:
        learner(batches(2), batches(1)).fit(0.1, callbacks=[Callback(), Trace()])
    finally:
        sys.setprofile(None)
    assert called <= {None, "before_fit", "after_fit"}  # once per fit: no need to look who listens


def test_the_state_at_each_event():
    seen = {}
    names = ("epoch", "step", "batch_index")

    def note(event):
        return lambda state: seen.setdefault(event, []).append(tuple(getattr(state, name) for name in names))

    learner(batches(3), batches(2)).fit(0.1, 2, callbacks=[At(event, note(event)) for event in EVENTS], accumulate=2)
    assert seen["before_batch"] == [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 0), (1, 2, 1), (1, 3, 2)]
    assert seen["after_step"] == seen["before_step"] == [(0, 0, 1), (0, 1, 2), (1, 2, 1), (1, 3, 2)]
    assert seen["after_batch"] == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 2, 0), (1, 3, 1), (1, 4, 2)]
    assert seen["before_valid_batch"] == seen["after_valid_batch"] == [(0, 2, 0), (0, 2, 1), (1, 4, 0), (1, 4, 1)]
    assert [row[:2] for row in seen["before_epoch"]] == [(0, 0), (1, 2)]
    assert [row[:2] for row in seen["after_epoch"]] == [(0, 2), (1, 4)]


def test_modes_and_gradients_at_each_event():
    seen = {}

    def note(event):
        return lambda state: seen.setdefault(event, []).append(
            (state.model.training, torch.is_grad_enabled(), state.model.weight.grad is not None)
        )

    learner(batches(1), batches(1)).fit(0.1, 2, callbacks=[At(event, note(event)) for event in EVENTS])
    for event in ("before_batch", "after_pred", "after_loss", "after_batch"):
        assert seen[event] == [(True, True, False)] * 2, event
    for event in ("after_backward", "before_step", "after_step"):
        assert seen[event] == [(True, True, True)] * 2, event
    for event in ("before_validate", "before_valid_batch", "after_valid_batch", "after_validate"):
        assert seen[event] == [(False, False, False)] * 2, event


def test_before_batch_and_before_valid_batch_may_replace_the_batch():
    ones = (torch.ones(5, 3), torch.ones(5, 1))
    seen = []

    def look(state):
        seen.append((state.n_samples, bits(state.target)))

    def replace(state):
        state.batch = ones

    actions = {"before_batch": replace, "before_valid_batch": replace, "after_pred": look, "after_valid_batch": look}
    learner(batches(1), batches(1)).fit(0.1, callbacks=[At(event, action) for event, action in actions.items()])
    assert seen == [(5, bits(ones[1]))] * 2


# ---- cancels

BATCH_EVENTS = ["before_batch", "after_pred", "after_loss", "after_backward", "before_step"]
VALID_EVENTS = ["before_validate", "before_valid_batch", "after_valid_batch", "after_validate"]
# Raised in epoch 0 (of 2) and, in a training event, in batch 1 (of 0, 1, 2): which (epoch, batch) move the weights.
ALL = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
WITHOUT = {
    CancelBatch: {event: [(0, 1)] for event in BATCH_EVENTS},
    CancelEpoch: {event: [(0, 1), (0, 2)] for event in BATCH_EVENTS}
    | {"after_step": [(0, 2)], "after_batch": [(0, 2)], "before_epoch": ALL[:3]}
    | {event: [] for event in VALID_EVENTS},
    CancelFit: {event: ALL[1:] for event in BATCH_EVENTS}
    | {"after_step": ALL[2:], "after_batch": ALL[2:], "before_epoch": ALL, "before_fit": ALL, "after_epoch": ALL[3:]}
    | {event: ALL[3:] for event in VALID_EVENTS},
}
MEANT = [(cancel, event) for cancel, events in WITHOUT.items() for event in events]
SENSELESS = [(cancel, event) for cancel in CANCELS for event in EVENTS if event not in WITHOUT[cancel]]


def cancelling(cancel, event):
    """Raises `cancel` in `event` of epoch 0 and, in a training event, of batch 1."""
    in_batch = event in (*BATCH_EVENTS, "after_step", "after_batch")
    return At(event, throw(cancel()), n=1 if in_batch else 0)


def by_hand(data, steps, lr=0.1, momentum=0.9):
    """The weights after plain SGD over the batches `steps`, in the model that `learner` makes."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    opt = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    for _, i in steps:
        opt.zero_grad()
        nn.functional.mse_loss(model(data[i][0]), data[i][1]).backward()
        opt.step()
    return bits(list(model.parameters()))


@pytest.mark.table
@pytest.mark.case("I9")
@pytest.mark.parametrize(("cancel", "event"), MEANT)
def test_a_cancelled_batch_epoch_or_fit_moves_no_weight_and_leaks_no_gradient(cancel, event):
    data = batches(3)
    learn = learner(data, batches(1, seed=1), opt_func=partial(spying(), momentum=0.9))
    learn.fit(0.1, 2, callbacks=[cancelling(cancel, event)])
    steps = [step for step in ALL if step not in WITHOUT[cancel][event]]
    assert bits(list(learn.model.parameters())) == by_hand(data, steps)
    assert len(learn.opt.seen) == len(learn.recorder.losses) == len(steps)


@pytest.mark.table
@pytest.mark.case("I9")
@pytest.mark.parametrize(("cancel", "event"), MEANT)
def test_a_cancel_skips_to_its_after_event(cancel, event):
    log = []
    callbacks = [Trace(log), cancelling(cancel, event)]
    learner(batches(3), batches(1)).fit(0.1, 2, callbacks=callbacks)
    after = {CancelBatch: "after_batch", CancelEpoch: "after_epoch", CancelFit: "after_fit"}[cancel]
    at = [i for i, name in enumerate(log) if name == event][callbacks[1].n]
    assert log[at + 1] == after
    validated = {CancelBatch: 2, CancelEpoch: 1 + (event == "after_validate"),
                 CancelFit: int(event in ("after_validate", "after_epoch"))}  # fmt: skip
    assert log.count("after_validate") == validated[cancel]
    assert log.count("after_epoch") == {CancelBatch: 2, CancelEpoch: 2, CancelFit: int(event == "after_epoch")}[cancel]
    assert log[-1] == "after_fit"


@pytest.mark.table
@pytest.mark.case("I9")
@pytest.mark.parametrize(("cancel", "event"), MEANT)
def test_the_schedule_counts_the_updates_that_were_done(cancel, event):
    learn = learner(batches(3), batches(1))
    learn.fit_one_cycle(2, 0.1, callbacks=[cancelling(cancel, event)], moms=None)
    done = len(learn.opt.seen)
    expected = OneCycle(0.1, moms=None).values(6)["lr"][:done]
    assert [note["lr"] for note in learn.opt.seen] == expected  # no value left out, none used twice
    assert learn.recorder.lrs.tolist() == expected


@pytest.mark.table
@pytest.mark.case("I9")
@pytest.mark.parametrize(("cancel", "event"), SENSELESS)
def test_a_cancel_that_has_no_meaning_is_an_error_that_says_where_it_has(cancel, event):
    trace, learn = Trace(), learner(batches(3), batches(1))
    with pytest.raises(RuntimeError, match=rf"^{cancel.__name__} has no meaning in {event}: raise it in ") as info:
        learn.fit(0.1, 2, callbacks=[trace, cancelling(cancel, event)])
    listed = str(info.value).partition("raise it in one of ")[2].rstrip(".").split(", ")
    assert listed == [name for name in EVENTS if name in WITHOUT[cancel]]
    assert info.value.__notes__[0].startswith(f"in At.{event}: epoch ")
    assert isinstance(info.value.__cause__, cancel)
    assert trace.log[-1] == "after_fit"
    learn.fit(0.1)


@pytest.mark.parametrize("cancel", CANCELS)
def test_a_subclass_of_a_cancel_is_that_cancel(cancel):
    sub = type("Enough", (cancel,), {})
    data, learns = batches(3), []
    for kind in (cancel, sub):
        learns.append(learner(data))
        learns[-1].fit(0.1, 2, callbacks=[cancelling(kind, "after_loss")])
    assert trained(learns[0]) == trained(learns[1])
    with pytest.raises(RuntimeError, match=r"^Enough has no meaning in after_fit"):
        learns[0].fit(0.1, callbacks=[cancelling(sub, "after_fit")])


def test_a_cancelled_epoch_has_a_row_without_validation():
    learn = learner(batches(3), batches(1))
    learn.fit(0.1, 2, callbacks=[cancelling(CancelEpoch, "after_step")])
    assert [row.keys() - {"time"} for row in learn.recorder.epochs] == [
        {"epoch", "train_loss"},
        {"epoch", "train_loss", "valid_loss"},
    ]
    learn.fit(0.1, 1, callbacks=[cancelling(CancelEpoch, "before_epoch")])
    assert [row.keys() - {"time"} for row in learn.recorder.epochs] == [{"epoch"}]


def test_every_batch_of_an_epoch_may_be_cancelled():
    learn = learner(batches(3), batches(1))
    before = bits(list(learn.model.parameters()))
    learn.fit(0.1, 2, callbacks=[At("after_loss", throw(CancelBatch()))])
    assert bits(list(learn.model.parameters())) == before
    assert len(learn.recorder.losses) == 0
    assert len(learn.recorder.epochs) == 2


# ---- after_fit

ENDINGS = {
    "normal": [],
    "CancelBatch": [At("after_loss", throw(CancelBatch), n=1)],
    "CancelEpoch": [At("after_step", throw(CancelEpoch), n=1)],
    "CancelFit": [At("after_step", throw(CancelFit), n=1)],
    "CancelFit in validation": [At("after_valid_batch", throw(CancelFit))],
    "CancelFit in before_fit": [At("before_fit", throw(CancelFit))],
    "error in training": [At("after_backward", throw(ZeroDivisionError), n=1)],
    "error in validation": [At("after_valid_batch", throw(ZeroDivisionError))],
    "error in before_fit": [At("before_fit", throw(ZeroDivisionError))],
    "error in after_fit": [At("after_fit", throw(ZeroDivisionError))],
    "KeyboardInterrupt in training": [At("after_backward", throw(KeyboardInterrupt), n=1)],
    "KeyboardInterrupt in validation": [At("after_valid_batch", throw(KeyboardInterrupt))],
    "KeyboardInterrupt in after_fit": [At("after_fit", throw(KeyboardInterrupt))],
    "SystemExit in training": [At("after_pred", throw(SystemExit))],
}


def fit_to_the_end(learn, ending, *callbacks, fit=None, **options):
    """A fit of 2 epochs with the callbacks of an ending; gives the exception that it ended with."""
    enders = copy.deepcopy(ENDINGS[ending])
    try:
        (fit or partial(learn.fit, 0.1, 2))(callbacks=[*callbacks, *enders], **options)
    except BaseException as error:
        return error
    return None


@pytest.mark.table
@pytest.mark.case("I6")
@pytest.mark.parametrize("ending", ENDINGS)
def test_after_fit_runs_for_all_whose_before_fit_ran_last_first(ending):
    log = []
    error = fit_to_the_end(learner(batches(3), batches(1)), ending, Trace(log, "a."), Trace(log, "b."))
    assert log[:2] == ["a.before_fit", "b.before_fit"]
    assert log[-2:] == ["b.after_fit", "a.after_fit"]
    assert log.count("a.after_fit") == log.count("b.after_fit") == 1
    assert (error is None) == (ending == "normal" or ending.startswith("Cancel"))


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), CancelFit()])
def test_after_fit_runs_only_for_those_that_began(error):
    class Failing(Trace):
        def before_fit(self, state):
            raise error

    log = []
    callbacks = [Trace(log, "a."), Failing(log, "failing."), Trace(log, "b.")]
    if isinstance(error, CancelFit):
        learner().fit(0.1, callbacks=callbacks)
    else:
        with pytest.raises(type(error)) as info:
            learner().fit(0.1, callbacks=callbacks)
        assert info.value is error
    assert log == ["a.before_fit", "a.after_fit"]


@pytest.mark.table
@pytest.mark.case("I7")
@pytest.mark.parametrize("second", [OSError("second"), KeyboardInterrupt("second"), CancelFit("second")])
@pytest.mark.parametrize("first", [ValueError("first"), KeyboardInterrupt("first")])
@pytest.mark.parametrize("event", ["before_epoch", "after_loss", "after_valid_batch", "after_epoch", "after_fit"])
def test_the_first_error_stays_primary_and_the_rest_still_run(event, first, second):
    log, first, second = [], copy.copy(first), copy.copy(second)
    callbacks = [Trace(log, "a."), At("after_fit", throw(second)), Trace(log, "b."), At(event, throw(first))]
    with pytest.raises(type(first)) as info:
        learner(batches(1), batches(1)).fit(0.1, callbacks=callbacks)
    assert info.value is first
    told = "CancelFit has no meaning in after_fit" if isinstance(second, CancelFit) else "second"
    assert info.value.__notes__[-1].startswith("and then At.after_fit failed: ")
    assert told in info.value.__notes__[-1]
    assert log[-2:] == ["b.after_fit", "a.after_fit"]


@pytest.mark.case("I7")
def test_two_failing_after_fits_are_both_told():
    learn = learner()
    with pytest.raises(ValueError, match="last in the list") as info:
        learn.fit(0.1, callbacks=[At("after_fit", throw(OSError("it, too"))),
                                  At("after_fit", throw(ValueError("last in the list")))])  # fmt: skip
    assert info.value.__notes__ == [
        "in At.after_fit: epoch 0, step 2",
        "and then At.after_fit failed: OSError('it, too')",
    ]


def test_an_error_in_after_fit_is_more_than_a_cancel():
    with pytest.raises(OSError, match="disk full"):
        learner().fit(0.1, callbacks=[At("after_fit", throw(OSError("disk full"))), At("after_step", throw(CancelFit))])


# ---- what a fit leaves behind


def model_with_modes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[1].eval()
    return model


@pytest.mark.table
@pytest.mark.case("I12")
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("opt_func", [partial(spying(), momentum=0.8), spying(torch.optim.AdamW)], ids=["SGD", "AdamW"])
def test_a_fit_leaves_hypers_modes_and_gradients_as_they_were(ending, opt_func):
    learn = learner(batches(3), batches(1), model=model_with_modes(), opt_func=opt_func, wd=0.01)

    def look():
        hypers = [{key: value for key, value in group.items() if key not in ("params", "lr")}
                  for group in learn.opt.param_groups]  # fmt: skip
        return hypers, [m.training for m in learn.model.modules()], [p.grad for p in learn.model.parameters()]

    before = look()
    schedule = Schedule("weight_decay", lambda step, n: 1 - step / n)
    fit_to_the_end(learn, ending, schedule, fit=partial(learn.fit_one_cycle, 2, 0.1), wd=0.3)
    assert look() == before
    if learn.opt.seen:
        note = learn.opt.seen[0]
        assert note.get("momentum", note.get("betas", (None,))[0]) == 0.95  # so there was something to restore
        assert learn.opt.param_groups[0]["weight_decay"] == 0.01


@pytest.mark.table
@pytest.mark.case("I6")
@pytest.mark.parametrize("ending", ENDINGS)
def test_after_any_ending_a_fit_equals_that_of_a_fresh_learner_in_the_same_state(ending):
    learn = learner(batches(3), batches(1), opt_func=partial(spying(), momentum=0.9))
    fit_to_the_end(learn, ending)
    other = twin(learn, opt_func=partial(spying(), momentum=0.9))
    for each in (learn, other):
        each.fit_one_cycle(2, 0.1)
    assert trained(learn) == trained(other)
    assert bits(learn.recorder.losses) == bits(other.recorder.losses)
    strip = [[{**row, "time": 0} for row in each.recorder.epochs] for each in (learn, other)]
    assert strip[0] == strip[1]


@pytest.mark.table
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_of_a_fit_is_kept_alive(ending, accumulate):
    learn, alive = learner([], batches(1)), []

    class Loader:
        def __len__(self):
            return 3

        def __iter__(self):
            for x, y in batches(3):
                alive.append(weakref.ref(x))
                yield x, y
                del x, y

    learn.dls.train = Loader()

    class Note(Callback):
        def after_batch(self, state):
            alive.extend(weakref.ref(t) for t in (state.pred, state.loss) if hasattr(state, "pred"))

    def states():  # a State has no weak references
        return [thing for thing in gc.get_objects() if type(thing) is State]

    note, before = Note(), len(states())
    gc.disable()  # what only the garbage collector finds stays for long, and on a GPU it is what "out of memory" is of
    try:
        fit_to_the_end(learn, ending, note, accumulate=accumulate)
        assert alive or "before_fit" in ending
        assert [ref for ref in alive if ref() is not None] == []
        assert len(states()) == before
    finally:
        gc.enable()


def test_a_caller_keeps_its_lists():
    own, given, metrics = [Trace()], [Trace(), OneCycle()], [nn.functional.l1_loss]
    lists = [list(each) for each in (own, given, metrics)]
    learn = learner(batches(1), batches(1), callbacks=own, metrics=metrics)
    learn.fit(0.1, callbacks=given)
    learn.fit_one_cycle(1, callbacks=given[:1])
    learn.callbacks.append(Trace())
    learn.metrics.clear()
    assert [own, given, metrics] == lists


@pytest.mark.case("I6")
def test_callbacks_of_one_fit_are_not_run_in_the_next():
    once, always = Trace(), Trace()
    learn = learner(callbacks=[always])
    learn.fit(0.1, callbacks=[once])
    seen = len(once.log)
    learn.fit(0.1)
    assert len(once.log) == seen
    assert len(always.log) == 2 * seen


def test_fields_are_unset_until_the_loop_writes_them():
    unset = {}

    def look(event):
        names = ("batch", "n_samples", "target", "pred", "loss", "step_loss", "step_weight", "metrics")
        return lambda state: unset.setdefault(event, {name for name in names if not hasattr(state, name)})

    learner(batches(1), batches(1)).fit(0.1, callbacks=[At(event, look(event)) for event in EVENTS])
    assert unset["before_fit"] >= {"batch", "n_samples", "target", "pred", "loss", "step_loss", "step_weight"}
    assert unset["before_batch"] == {"n_samples", "target", "pred", "loss", "step_loss", "step_weight"}
    assert unset["after_pred"] == {"loss", "step_loss", "step_weight"}
    assert unset["after_backward"] == {"step_loss", "step_weight"}
    assert unset["before_step"] == unset["after_fit"] == set()


def test_reading_a_field_too_early_and_a_misspelt_one_are_attribute_errors():
    with pytest.raises(AttributeError, match="pred"):
        learner().fit(0.1, callbacks=[At("before_batch", lambda state: state.pred)])
    with pytest.raises(AttributeError, match="n_epoch"):
        learner().fit(0.1, callbacks=[At("before_batch", lambda state: setattr(state, "n_epoch", 3))])


@pytest.mark.case("I11")
@pytest.mark.parametrize("call", ["fit(0.1)", "fit_one_cycle(1)", "lr_find()", "fit(0.1, callbacks=[LRFinder()])"])
def test_a_fit_inside_a_fit_is_an_error(call):
    from minifast import LRFinder

    learn = learner()
    again = At("after_step", lambda state: eval(f"learn.{call}", {"learn": learn, "LRFinder": LRFinder}), n=1)
    with pytest.raises(RuntimeError, match="this Learner is already fitting"):
        learn.fit(0.1, 2, callbacks=[again])
    assert len(learn.recorder.losses) == 2
    learn.fit(0.1)


def test_looking_at_the_learner_inside_a_fit_changes_nothing():
    def results(look):
        learn = learner(batches(3), batches(1), model=model_with_modes())
        torch.manual_seed(1)
        learn.fit(0.1, 2, callbacks=[At(event, lambda state: look(learn)) for event in EVENTS])
        return trained(learn), rngs(), bits(learn.recorder.losses)

    assert results(lambda learn: learn.validate()) == results(lambda learn: None)


# ---- errors


class Broken(Exception):
    """Not an error that anything else would raise; refuses to be rebuilt from its arguments."""

    def __init__(self, a, *, b):
        super().__init__(a)


@pytest.mark.table
@pytest.mark.case("I6")
@pytest.mark.parametrize("event", EVENTS)
def test_an_error_in_a_callback_is_the_same_object_with_a_note(event):
    error, learn = Broken("x", b="y"), learner(batches(3), batches(2))
    hit = At(event, throw(error), n=0 if event.endswith("_fit") else 1)
    trace = Trace()
    with pytest.raises(Broken) as info:
        learn.fit(0.1, 3, callbacks=[trace, hit])
    epoch, step = {"before_fit": (0, 0), "after_fit": (2, 9), "after_epoch": (1, 6), "before_epoch": (1, 3),
                   "before_validate": (1, 6), "after_validate": (1, 6), "before_valid_batch": (0, 3),
                   "after_valid_batch": (0, 3), "after_batch": (0, 2)}.get(event, (0, 1))  # fmt: skip
    assert info.value is error
    assert error.__notes__ == [f"in At.{event}: epoch {epoch}, step {step}"]
    assert error.__cause__ is None
    assert trace.log[-1] == "after_fit"


@pytest.mark.table
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_is_no_error_passes_as_it_is(event, error):
    error, trace = copy.copy(error), Trace()
    with pytest.raises(type(error)) as info:
        learner(batches(1), batches(1)).fit(0.1, callbacks=[trace, At(event, throw(error))])
    assert info.value is error
    assert not hasattr(error, "__notes__")
    assert trace.log[-1] == "after_fit"
    assert trace.log[-2] == event or event in ("before_fit", "after_fit")  # at once: no other event came between


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"model": nn.Linear(3, 1).requires_grad_(True)}, "in the model: epoch 0, step 1, inputs float32 (4, 3)"),
        ({"loss_func": "raises"}, "in the loss: epoch 0, step 1, output float32 (4, 1), target float32 (4, 1)"),
        ({"train": "raises"}, "while loading batch 1 of epoch 0, training data (Failing)"),
        ({"metrics": "raises"}, "in the metric failing"),
    ],
    ids=["model", "loss", "loader", "metric"],
)
def test_an_error_elsewhere_says_where_too(options, note):
    error, count = Broken("x", b="y"), 0

    def failing(*args):
        nonlocal count
        count += 1
        if count == 2:
            raise error
        return nn.functional.mse_loss(*args) if len(args) > 1 else None

    class Failing:
        def __len__(self):
            return 3

        def __iter__(self):
            yield batches(1)[0]
            raise error

    learn = learner(batches(3), batches(2))
    if "model" in options:
        learn.model.register_forward_pre_hook(lambda module, args: failing())
    if "loss_func" in options:
        learn.loss_func = failing
    if "train" in options:
        learn.dls.train = Failing()
    if "metrics" in options:
        learn.metrics = [failing]
    trace = Trace()
    with pytest.raises(Broken) as info:
        learn.fit(0.1, callbacks=[trace])
    assert info.value is error
    assert error.__notes__[0] == note
    assert trace.log[-1] == "after_fit"


# ---- what is refused


@pytest.mark.case("A8")
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("after_bacth", "did you mean after_batch?"),
        ("before_valid", "did you mean before_validate?"),
        ("aftr_step", "did you mean after_step?"),
        ("before_train", "did you mean "),
        ("after_create", "did you mean "),
        ("before_everything_else_happens", "the events are before_fit, before_epoch, "),
    ],
)
def test_a_misspelt_event_is_refused_when_the_class_is_defined(name, hint):
    with pytest.raises(TypeError) as info:
        type("Mine", (Callback,), {name: lambda self, state: None})
    assert str(info.value).startswith(f"Mine.{name} is not an event: {hint}")


@pytest.mark.parametrize("name", ["helper", "reset", "_after_batch", "batch", "fit", "step"])
def test_other_methods_are_nobodys_business(name):
    type("Mine", (Callback,), {name: lambda self, x, y: None})


@pytest.mark.parametrize(
    ("method", "signature"),
    [
        (lambda self: None, r"\(self\)"),
        (lambda: None, r"\(\)"),
        (lambda self, state, more: None, r"\(self, state, more\)"),
        (lambda self, *, state: None, r"\(self, \*, state\)"),
    ],
)
def test_a_wrong_signature_is_refused_when_the_class_is_defined(method, signature):
    with pytest.raises(TypeError, match=rf"^Mine\.after_step{signature} must take \(self, state\)\.$"):
        type("Mine", (Callback,), {"after_step": method})


@pytest.mark.parametrize(
    "method", [lambda self, state: None, lambda self, s, x=1: None, lambda *args: None, lambda self, state, **k: None]
)
def test_a_right_signature_is_not(method):
    learner(callbacks=[type("Mine", (Callback,), {"after_step": method})()]).fit(0.1)


def test_an_inherited_event_is_heard():
    class Base(Callback):
        def after_step(self, state):
            heard.append(state.step)

    heard = []
    learner(callbacks=[type("Sub", (Base,), {})()]).fit(0.1)
    assert heard == [0, 1]


class Owner(Callback):
    """Owns what it is told to own, and does nothing."""

    def __init__(self, *owns):
        self.owns = owns

    def __repr__(self):
        return f"Owner{self.owns}"


@pytest.mark.parametrize(
    ("own", "given", "both"),
    [
        ([], [OneCycle(0.1), CircularLR(10, 5)], ("OneCycle(max_lr=0.1", "CircularLR(div=10", "'lr'")),
        ([OneCycle(0.1), Owner("momentum")], [], ("OneCycle(max_lr=0.1", "Owner('momentum',)", "'momentum'")),
        ([], [Owner("a", "b"), Owner("c"), Owner("b")], ("Owner('a', 'b')", "Owner('b',)", "'b'")),
    ],
)
def test_two_owners_are_refused_by_name_before_anything_happens(own, given, both):
    learn = learner(callbacks=own)
    before, rng = trained(learn), rngs()
    with pytest.raises(ValueError, match="one would overwrite the other") as info:
        learn.fit(0.1, callbacks=given)
    assert all(part in str(info.value) for part in both)
    assert (trained(learn), rngs()) == (before, rng)
    assert learn.opt.seen == []


def test_a_schedule_of_the_fit_itself_conflicts_with_one_given_to_it():
    with pytest.raises(ValueError, match=r"both .*CircularLR\(div=8.* and .*OneCycle\(.* set 'lr'"):
        learner().fit_one_cycle(1, 0.1, moms=None, callbacks=[CircularLR(8, 2)])


def lrs_of(learn, fit):
    fit(learn)
    return [note["lr"] for note in learn.opt.seen]


@pytest.mark.parametrize(
    ("fit", "schedule"),
    [
        (lambda learn: learn.fit(0.1, 2), CircularLR(4, 2)),
        (lambda learn: learn.fit(0.1, 2, callbacks=[OneCycle(moms=None)]), OneCycle(moms=None)),
        (lambda learn: learn.fit_one_cycle(2, 0.1, moms=None), OneCycle(moms=None)),
        (lambda learn: learn.fit(0.1, 1, cycle_len=2, use_clr=(8, 4)), CircularLR(8, 4)),
        (lambda learn: learn.fit(0.1, 2, callbacks=[ConstantLR()]), ConstantLR()),
    ],
)
def test_an_owner_of_the_fit_takes_the_place_of_the_learners(fit, schedule):
    learn = learner(callbacks=[CircularLR(4, 2)])
    assert lrs_of(learn, fit) == schedule.values(4, peak=0.1)["lr"]
    assert lrs_of(learn, lambda learn: learn.fit(0.1, 2))[4:] == CircularLR(4, 2).values(4, peak=0.1)["lr"]


SAME = Trace()


@pytest.mark.case("A7")
@pytest.mark.parametrize(("own", "given"), [([SAME, SAME], []), ([], [SAME, SAME]), ([SAME], [SAME])])
def test_the_same_instance_twice_is_refused(own, given):
    with pytest.raises(ValueError, match=r"the same callback is given twice: <helpers\.Trace"):
        learner(callbacks=own).fit(0.1, callbacks=given)


@pytest.mark.case("A7")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Trace], r"Trace is a class: pass an instance, did you mean Trace\(\.\.\.\)\?"),
        (Trace, r"^callbacks must be a list of callbacks, got <class 'helpers.Trace'> \(type\)\."),
        ("Trace", r"^callbacks must be a list of callbacks, got 'Trace' \(str\)\."),
        (["Trace"], r"^callbacks must hold callbacks, got 'Trace' \(str\)\. Subclass minifast.Callback\."),
        (None, r"^callbacks must be a list of callbacks, got None \(NoneType\)\."),
        ([None], r"^callbacks must hold callbacks, got None \(NoneType\)"),
        (3, r"^callbacks must be a list of callbacks, got 3 \(int\)\."),
        ([print], r"^callbacks must hold callbacks, got <built-in function print>"),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused(given, message):
    learn = learner()
    for call in (learner, partial(learn.fit, 0.1), partial(learn.fit_one_cycle, 1), learn.lr_find):
        with pytest.raises(TypeError, match=message):
            call(callbacks=given)
    assert learn.opt.seen == []


@pytest.mark.parametrize("make", [tuple, iter, lambda callbacks: callbacks[0]], ids=["tuple", "iterator", "one"])
def test_any_iterable_of_callbacks_will_do(make):
    own, given = Trace(), Trace()
    learner(callbacks=make([own])).fit(0.1, callbacks=make([given]))
    assert own.log == given.log != []


@pytest.mark.case("A7")
def test_a_second_recorder_is_refused():
    with pytest.raises(ValueError, match=r"a Learner has its own Recorder: read learn\.recorder"):
        learner().fit(0.1, callbacks=[Recorder()])
    with pytest.raises(ValueError, match="a Learner has its own Recorder"):
        learner(callbacks=[Recorder()]).fit(0.1)


def test_metrics_as_a_callback_of_ones_own_are_allowed():
    learn = learner(batches(1), batches(1))
    learn.fit(0.1, callbacks=[Metrics([nn.functional.l1_loss])])
    assert "l1_loss" in learn.recorder.epochs[0]


# ---- evaluating


class Evaluating(Callback):
    def __init__(self, enter):
        self.enter = enter

    @contextmanager
    def evaluating(self, model):
        self.enter()
        yield


@pytest.mark.parametrize("look", ["fit", "validate", "get_preds"])
def test_an_error_in_evaluating_says_where_it_came_from(look):
    def fail():
        raise KeyError("mine")

    learn = learner(valid=batches(1), callbacks=[Evaluating(fail)])
    with pytest.raises(KeyError, match="mine") as caught:
        learn.fit(0.1) if look == "fit" else getattr(learn, look)()
    assert "in Evaluating.evaluating" in caught.value.__notes__


def test_a_cancel_has_no_meaning_in_evaluating():
    def cancel():
        raise CancelBatch

    with pytest.raises(RuntimeError, match=r"CancelBatch has no meaning in Evaluating\.evaluating: raise it in"):
        learner(valid=batches(1), callbacks=[Evaluating(cancel)]).fit(0.1)


def test_an_error_inside_the_block_is_not_that_of_evaluating():
    learn = learner(valid=batches(1), callbacks=[Evaluating(lambda: None)])
    with pytest.raises(KeyError) as caught:
        learn.fit(0.1, callbacks=[At("after_valid_batch", throw(KeyError("mine")))])
    assert caught.value.__notes__ == ["in At.after_valid_batch: epoch 0, step 2"]
    learn.fit(0.1, callbacks=[At("after_valid_batch", throw(CancelFit), 0)])  # and a cancel is still one


# ---- slips in a class of one's own


@pytest.mark.parametrize("name", ["owns", "sets", "saves"])
def test_a_forgotten_comma(name):
    with pytest.raises(TypeError, match=rf"Mine.{name} must be a tuple of names, got 'lr': write \('lr',\)"):
        type("Mine", (Callback,), {name: ("lr")})


@dataclass(frozen=True)
class Frozen(Callback):
    sets: tuple = ("a",)


class Former(Callback):
    sets = ("lr", "momentum")

    def __init__(self, *own):
        if own:
            self.sets = own


class Computed(Callback):
    @property
    def sets(self):
        return ("b",)


@pytest.mark.table
@pytest.mark.parametrize(("callback", "owns"), [
    (Former(), ("lr", "momentum")), (Former("momentum"), ("momentum",)), (type("Sub", (Former,), {})(), Former.owns),
    (type("Sub", (Former,), {"owns": ("c",)})(), ("c",)), (Frozen(), ("a",)), (Frozen(("d",)), ("d",)),
    (Computed(), ("b",)), (Callback(), ()), (OneCycle(0.1), ("lr", "momentum")), (OneCycle(0.1, moms=None), ("lr",)),
], ids=repr)
def test_sets_is_the_former_name_of_owns(callback, owns):
    assert callback.owns == callback.sets == owns
    assert copy.copy(callback).owns == copy.deepcopy(callback).owns == owns


def test_a_class_with_the_former_name_is_an_owner_like_any_other():
    assert Former.sets == Former.owns == ("lr", "momentum")
    assert Callback.sets == Callback.owns == ()
    assert type("Twin", (Callback,), {"sets": FiniteLoss.sets}).owns == FiniteLoss.owns
    with pytest.raises(ValueError, match=r"both OneCycle.* and .*Former.* set 'lr'"):
        learner().fit(0.1, callbacks=[OneCycle(0.1), Former()])
    kept, owner = [], Former()
    look = At("before_fit", lambda state: kept.extend(state.callbacks))
    learner(callbacks=[OneCycle(0.1)]).fit(0.1, callbacks=[owner, look])
    assert [callback for callback in kept if "lr" in callback.owns] == [owner]  # the Learner's schedule has made room


def test_an_event_that_would_never_run():
    async def before_batch(self, state):
        pass

    with pytest.raises(TypeError, match=r"Mine.before_batch must be a plain function: a coroutine or generator"):
        type("Mine", (Callback,), {"before_batch": before_batch})


def test_a_mapping_that_the_model_does_not_take_says_what_to_do():
    with pytest.raises(TypeError) as caught:
        learner([{"input": torch.ones(2, 3), "labels": torch.ones(2, 1)}]).fit(0.1)
    assert any("pass Learner(..., unpack=lambda batch: (inputs, target))" in note for note in caught.value.__notes__)
