"""Ctrl-C and SIGTERM, by real signals: the first one finishes the batch and cleans up, a second Ctrl-C is at once."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import At, Trace, batches, bits, everything, learner, spying, throw, trained, twin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import CancelEpoch, CancelFit, LRFinder
from minifast.core.callback import EVENTS
from minifast.machine.signals import DeferredInterrupt

ROOT = Path(__file__).resolve().parent.parent
FOREVER = 60.0  # seconds: what lasts that long did not work
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
both = pytest.mark.parametrize("number", DEFAULTS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def python_handles_signals():
    """As in any program that was started in the foreground; and after the test the handlers are these again."""
    previous = {number: signal.signal(number, handler) for number, handler in DEFAULTS.items()}
    yield
    left = {number: signal.signal(number, handler) for number, handler in previous.items()}
    assert left == DEFAULTS


def sends(number):
    """An action for `At`: this signal to this process; Python's handler has run when it returns."""

    def send(state=None):
        os.kill(os.getpid(), number)
        for _ in range(3):  # the handler runs between two instructions of the main thread
            time.sleep(0)

    return send


ctrl_c, sigterm = sends(signal.SIGINT), sends(signal.SIGTERM)


def interrupted(fit, number=signal.SIGINT):
    """Run `fit`, which must end as it does by this signal; gives the exception.

    (pytest.raises would make a cycle of it and this frame. Of a cycle's workers torch cannot tell that they are done.)
    """
    try:
        fit()
    except KeyboardInterrupt as error:
        if number == signal.SIGINT:
            return error
    except SystemExit as error:
        if (number, error.code) == (signal.SIGTERM, 143):
            return error
    return pytest.fail(f"it was not interrupted as by {number.name}")


# ---- the first one

# What still happens after a Ctrl-C in each event of the first epoch, of two batches and one validation batch.
BATCH = "before_batch after_pred after_loss after_backward before_step after_step after_batch"
REST = {  # (the loop looks between batches and between epochs)
    "before_fit": "",
    "before_epoch": BATCH,
    **{event: BATCH.partition(event)[2] for event in BATCH.split()},
    "before_validate": "before_valid_batch after_valid_batch",
    "before_valid_batch": "after_valid_batch",
    "after_valid_batch": "",
    "after_validate": "after_epoch",
    "after_epoch": "",
    "after_fit": "",
}


@pytest.mark.table
@both
@pytest.mark.parametrize("event", EVENTS)
def test_the_first_one_finishes_the_batch_and_cleans_up(event, number):
    log, learn = [], learner(batches(2), batches(1), opt_func=partial(spying(), momentum=0.8))
    callbacks = [At(event, sends(number), n=0), Trace(log, "a."), Trace(log, "b.")]
    interrupted(lambda: learn.fit_one_cycle(2, 0.1, callbacks=callbacks), number)
    heard = [name[2:] for name in log if name.startswith("b.")]
    begin = len(heard) if event == "after_fit" else heard.index(event) + 1
    assert heard[begin:] == [*REST[event].split(), *(["after_fit"] if event != "after_fit" else [])]
    assert log[-2:] == ["b.after_fit", "a.after_fit"]
    assert len(learn.recorder.losses) == len(learn.opt.seen) == heard.count("after_step")
    assert [group["momentum"] for group in learn.opt.param_groups] == [0.8, 0.8]
    assert [p.grad for p in learn.model.parameters()] == [None, None]
    assert learn.model.training


@pytest.mark.table
@both
@pytest.mark.parametrize("event", EVENTS)
def test_the_learner_is_one_that_the_uninterrupted_fit_passed_through(event, number):
    learns = [learner(batches(2), batches(1), opt_func=partial(spying(), momentum=0.9)) for _ in range(2)]
    interrupted(lambda: learns[0].fit_one_cycle(2, 0.1, callbacks=[At(event, sends(number), n=0)]), number)
    learns[1].fit_one_cycle(2, 0.1)
    done = len(learns[0].opt.seen)
    assert done or event == "before_fit"
    assert bits(learns[0].opt.seen) == bits(learns[1].opt.seen[:done])
    assert bits(learns[0].recorder.losses) == bits(learns[1].recorder.losses[:done])
    other = twin(learns[0], opt_func=partial(spying(), momentum=0.9))
    for learn in (learns[0], other):
        learn.fit_one_cycle(1, 0.1)
    assert trained(learns[0]) == trained(other)


@both
def test_from_another_thread_while_the_model_computes(number):
    pressed, learn = threading.Event(), learner(batches(50))
    presser = threading.Thread(target=lambda: (pressed.wait(FOREVER), sends(number)()))
    presser.start()

    def wait(state):
        pressed.set()
        presser.join()
        begin = time.monotonic()
        while not state.interrupt.pending and time.monotonic() < begin + FOREVER:
            time.sleep(0.001)

    interrupted(lambda: learn.fit(0.1, callbacks=[At("after_pred", wait, n=7)]), number)
    assert len(learn.recorder.losses) == len(learn.opt.seen) == 8


@pytest.mark.table
@both
@pytest.mark.parametrize("cancel", [CancelEpoch, CancelFit])
@pytest.mark.parametrize("event", ["before_epoch", "after_pred", "after_step"])
def test_a_cancel_after_it_does_not_swallow_it(event, cancel, number):
    learn = learner(batches(2), batches(1))
    callbacks = [At(event, sends(number), n=0), At(event, throw(cancel()), n=0)]
    interrupted(lambda: learn.fit(0.1, 2, callbacks=callbacks), number)
    assert len(learn.opt.seen) <= 1


@both
def test_inside_an_accumulation_window_its_gradients_are_dropped(number):
    learn = learner(batches(4))
    interrupted(lambda: learn.fit(0.1, accumulate=2, callbacks=[At("after_backward", sends(number), n=2)]), number)
    assert len(learn.opt.seen) == len(learn.recorder.losses) == 1
    assert [p.grad for p in learn.model.parameters()] == [None, None]


@both
def test_an_error_after_it_is_still_that_error(number):
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as info:
        learner().fit(0.1, callbacks=[At("after_pred", sends(number)), At("after_loss", throw(error))])
    assert info.value is error


@both
def test_a_loader_that_fails_after_it_counts_as_the_interrupt(number):
    class Loader:
        def __len__(self):
            return 3

        def __iter__(self):
            yield batches(1)[0]
            sends(number)()
            raise RuntimeError("DataLoader worker (pid 4711) exited unexpectedly")

    error = interrupted(lambda: learner(Loader()).fit(0.1), number)
    assert isinstance(error.__cause__, RuntimeError)


# ---- the second one


class Stuck(nn.Linear):
    """Gets `first` in its second batch, and then a Ctrl-C in the middle of something that lasts."""

    first, calls, woke = signal.SIGINT, 0, False

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            sends(self.first)()
            threading.Timer(0.05, ctrl_c_in_main_thread).start()
            time.sleep(FOREVER)
            self.woke = True
        return super().forward(x)


def ctrl_c_in_main_thread():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@both
@pytest.mark.parametrize("fit", ["fit(0.1, 2)", "lr_find()", "fit(0.1, callbacks=[LRFinder()])"])
def test_a_second_ctrl_c_is_at_once_after_either(fit, number):
    model = Stuck(3, 1)
    model.first = number
    log, learn = [], learner(model=model)
    learn.callbacks.append(Trace(log))
    interrupted(lambda: eval(f"learn.{fit}", {"learn": learn, "LRFinder": LRFinder}), number)
    assert not model.woke
    if fit == "fit(0.1, 2)":
        assert log[-2:] == ["before_batch", "after_fit"]
        assert len(learn.recorder.losses) == len(learn.opt.seen) == 1
    assert [p.grad for p in model.parameters()] == [None, None]


@both
def test_a_sigterm_after_either_waits_too_and_outranks(number):
    learn = learner(batches(3))
    presses = [At("after_pred", sends(number), n=0), At("after_loss", sigterm, n=0), At("after_step", sigterm, n=0)]
    interrupted(lambda: learn.fit(0.1, callbacks=presses), signal.SIGTERM)
    assert len(learn.opt.seen) == 1


@both
def test_a_callback_can_tell_where_the_fit_stopped(number):
    seen = []

    class Look(Trace):
        def after_fit(self, state):
            interrupt = state.interrupt
            seen.append((interrupt.pending, interrupt.signal, interrupt.was_raised))

    learn = learner(batches(3), batches(3))
    learn.fit(0.1, callbacks=[Look()])
    interrupted(lambda: learn.fit(0.1, callbacks=[Look(), At("after_pred", sends(number), n=0)]), number)
    interrupted(lambda: learn.fit(0.1, callbacks=[Look(), At("after_valid_batch", sends(number), n=0)]), number)
    at_once = [At("after_pred", sends(number), n=0), At("after_loss", ctrl_c, n=0)]
    interrupted(lambda: learn.fit(0.1, callbacks=[Look(), *at_once]), number)
    assert seen == [(False, None, False), (True, number, True), (True, number, True), (True, number, False)]


def test_held_signals_wait_even_the_second_one():
    steps = []

    def hold():
        with DeferredInterrupt() as interrupt:
            interrupt.is_held = True
            for _ in range(3):
                ctrl_c()
            steps.append("done")

    interrupted(hold)
    assert steps == ["done"]


def test_held_inside_a_fit_the_second_one_is_raised_where_that_ends():
    steps = []

    def put_back(state):
        with DeferredInterrupt(is_held=True):
            ctrl_c()
            ctrl_c()
            steps.append("put back")
        steps.append("not reached")

    interrupted(lambda: learner().fit(0.1, callbacks=[At("after_pred", put_back, n=0)]))
    assert steps == ["put back"]


@both
def test_a_short_block_inside_a_fit_leaves_it_to_the_fit(number):
    learn, steps = learner(batches(3)), []

    def put_back(state):
        with DeferredInterrupt():
            sends(number)()
        steps.append("after the block")

    interrupted(lambda: learn.fit(0.1, callbacks=[At("after_pred", put_back, n=0)]), number)
    assert (steps, len(learn.opt.seen)) == (["after the block"], 1)


@both
def test_a_fit_that_begins_after_it_does_not_train(number):
    inner, outer = learner(batches(3)), learner(batches(3))
    actions = [At("after_pred", sends(number), n=0), At("after_step", lambda state: inner.fit(0.1), n=0)]
    interrupted(lambda: outer.fit(0.1, callbacks=actions), number)
    assert (len(inner.opt.seen), len(outer.opt.seen)) == (0, 1)


def test_the_second_one_in_a_cleanup_lets_the_others_clean_up():
    log = []

    def press(state):
        ctrl_c()
        log.append("not reached")

    callbacks = [Trace(log), At("after_fit", press), At("after_pred", ctrl_c)]
    interrupted(lambda: learner().fit(0.1, callbacks=callbacks))
    assert log[-1] == "after_fit"
    assert "not reached" not in log


@pytest.mark.table
@pytest.mark.parametrize("event", EVENTS)
def test_one_that_a_callback_raises_by_itself_is_at_once(event):
    error, log = KeyboardInterrupt("mine"), []
    learn = learner(batches(1), batches(1))
    with pytest.raises(KeyboardInterrupt) as info:
        learn.fit(0.1, callbacks=[Trace(log), At(event, throw(error), n=0)])
    assert info.value is error
    assert log[-1] == "after_fit"
    assert event in ("before_fit", "after_fit") or log[-2] == event
    learn.fit(0.1)


# ---- lr_find


def finder_learner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    learn = learner(batches(4), batches(1), model=model, opt_func=partial(spying(), momentum=0.9))
    learn.fit_one_cycle(1, 0.1)
    return learn


@pytest.mark.case("L2")
@both
@pytest.mark.parametrize("n", [0, 5, 99])
def test_in_lr_find_everything_is_put_back(n, number):
    learn, calls = finder_learner(), []

    def press(*args):
        calls.append(1)
        if len(calls) == n + 1:
            sends(number)()

    learn.model[0].register_forward_hook(press)
    before = everything(learn)
    interrupted(lambda: learn.lr_find(1e-6, 1e-5), number)
    assert everything(learn) == before
    assert len(calls) == n + 1  # that batch was the last one


@both
def test_in_a_sandbox_everything_is_put_back(number):
    learn = finder_learner()
    before = everything(learn)

    def try_out():
        with learn.sandbox():
            learn.freeze()
            learn.fit(0.1, callbacks=[At("after_pred", sends(number))])

    interrupted(try_out, number)
    assert everything(learn) == before


@both
def test_while_everything_is_put_back_it_waits(number):
    learn = finder_learner()
    before = everything(learn)

    class Recorder(type(learn.recorder)):
        def keep(self):
            restore = super().keep()
            return lambda: (sends(number)(), restore())

    learn.recorder.__class__ = Recorder

    def try_out():
        with learn.sandbox():
            learn.fit(0.1)

    interrupted(try_out, number)
    assert everything(learn) == before


# ---- other people's handlers, other threads


def host_handler(signum, frame):
    """A program that has its own idea of Ctrl-C."""


FITS = {
    "normal": lambda learn, number: learn.fit(0.1),
    "error": lambda learn, number: learn.fit(0.1, callbacks=[At("after_pred", throw(ZeroDivisionError))]),
    "at once": lambda learn, number: learn.fit(0.1, callbacks=[At("after_pred", throw(SystemExit(3)))]),
    "signal": lambda learn, number: learn.fit(0.1, callbacks=[At("after_pred", sends(number))]),
    "several": lambda learn, number: learn.fit(0.1, callbacks=[
        At("after_pred", sends(number)), At("after_pred", sigterm), At("after_loss", ctrl_c)]),
    "lr_find": lambda learn, number: learn.lr_find(),
}  # fmt: skip


@pytest.mark.table
@both
@pytest.mark.parametrize("handler", [host_handler, signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
@pytest.mark.parametrize("fit", FITS)
def test_the_host_programs_handlers_are_put_back(handler, fit, number):
    if handler is signal.SIG_DFL and number == signal.SIGINT and fit in ("signal", "several"):
        return  # that ends a process
    if handler is signal.SIG_IGN and fit == "several":
        return  # the other one is not ignored: see below
    handlers = DEFAULTS | {number: handler}
    signal.signal(number, handler)
    try:
        FITS[fit](learner(), number)
    except (ZeroDivisionError, KeyboardInterrupt, SystemExit):
        pass
    finally:
        left = {number: signal.signal(number, handler) for number, handler in DEFAULTS.items()}
    assert all(left[number] is handler for number, handler in handlers.items())


@both
def test_each_is_left_to_the_host_program_that_ignores_it_and_the_other_is_not(number):
    other = next(iter(DEFAULTS.keys() - {number}))
    assert fit_under(number, signal.SIG_IGN, "after_pred") == (3, None)
    signal.signal(number, signal.SIG_IGN)
    learn = learner(batches(3))
    try:
        presses = [At("after_pred", sends(number), n=0), At("after_pred", sends(other), n=1)]
        interrupted(lambda: learn.fit(0.1, callbacks=presses), other)
    finally:
        signal.signal(number, DEFAULTS[number])
    assert len(learn.opt.seen) == 2


def fit_under(number, handler, *presses):
    """The updates of a fit of 3 with this signal in these events of its first batch, and what ended it."""
    learn = learner(batches(3))
    signal.signal(number, handler)
    try:
        learn.fit(0.1, callbacks=[At(event, sends(number), n=0) for event in presses])
    except BaseException as error:
        return len(learn.opt.seen), error
    finally:
        signal.signal(number, DEFAULTS[number])
    return len(learn.opt.seen), None


@both
def test_the_host_programs_handler_is_not_called_meanwhile(number):
    calls = []
    steps, error = fit_under(number, lambda *args: calls.append(args), "after_pred")
    interrupted(lambda: throw(error)(None), number)
    assert (steps, calls) == (1, [])
    steps, error = fit_under(number, lambda *args: calls.append(args), "after_pred", "after_loss")
    interrupted(lambda: throw(error)(None), number)
    assert (steps, calls) == (0 if number == signal.SIGINT else 1, [])


@both
def test_nothing_keeps_the_state_alive(number):
    """A cycle of what is raised and its frames would hold the worker processes."""
    import gc
    import weakref

    states = []
    note = At("before_fit", lambda state: states.append(weakref.ref(state.interrupt)))
    gc.disable()
    try:
        learn = learner()
        with suppress(KeyboardInterrupt, SystemExit):
            learn.fit(0.1, callbacks=[note, At("after_pred", sends(number), n=0)])
        assert states[-1]() is None
    finally:
        gc.enable()


@both
def test_another_learners_fit_inside_a_callback_hands_it_on(number):
    inner, outer = learner(batches(3)), learner(batches(3))
    press = At("after_pred", sends(number), n=0)
    nested = At("after_step", lambda state: inner.fit(0.1, callbacks=[press]), n=1)
    interrupted(lambda: outer.fit(0.1, callbacks=[nested]), number)
    assert (len(inner.opt.seen), len(outer.opt.seen)) == (1, 2)


def test_the_second_one_is_at_once_in_a_fit_inside_a_fit():
    inner = learner(model=Stuck(3, 1))
    interrupted(lambda: learner().fit(0.1, callbacks=[At("after_step", lambda state: inner.fit(0.1))]))
    assert not inner.model.woke


@pytest.mark.case("I4")
def test_a_fit_in_another_thread_leaves_the_handlers_alone_and_says_so(caplog):
    learn, seen = learner(batches(3)), []
    look = At("after_pred", lambda state: seen.append({number: signal.getsignal(number) for number in DEFAULTS}))
    thread = threading.Thread(target=lambda: learn.fit(0.1, callbacks=[look]))
    with caplog.at_level(logging.DEBUG, "minifast"):
        thread.start()
        thread.join()
    assert seen == [DEFAULTS] * 3
    assert len(learn.opt.seen) == 3
    assert {record.levelname for record in caplog.records if "not in the main thread" in record.message} == {"DEBUG"}


# ---- in processes of their own


def in_a_process_group_of_its_own(function, result):
    """What `function()` gives in a forked child that leads a process group, as a job in a terminal does."""

    def child():
        os.setsid()
        torch.set_num_threads(1)  # the other threads of torch were not forked
        result.write_text(str(function()))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(FOREVER)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode == 0
    return result.read_text()


def to_the_group(number):
    """This signal, from outside, to this process and its workers; SIGTERM ends them, and torch hears of it."""
    workers = multiprocessing.active_children()
    subprocess.run(["kill", "-s", number.name[3:], "--", f"-{os.getpgrp()}"], check=True, start_new_session=True)
    for worker in workers if number == signal.SIGTERM else []:
        worker.join(FOREVER)
        assert worker.exitcode == -signal.SIGTERM


def fits_with_workers(persistent, number):
    """How many updates each fit made, where the whole process group gets a signal in the third."""
    data = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    loader = DataLoader(data, 4, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork")
    learn = learner(loader, loader)
    steps, of_children = [], set()
    for fit in (learn.fit, learn.fit, learn.lr_find, learn.fit):
        done = len(learn.opt.seen)
        press = At("after_pred", lambda state: to_the_group(number), n=2)
        press.in_lr_find = True
        interrupted(lambda: fit(0.1, callbacks=[press]), number)  # noqa: B023
        steps.append(len(learn.opt.seen) - done)
        of_children.add(signal.getsignal(signal.SIGCHLD))
    assert len(of_children) == 1  # torch's own is back
    learn.fit(0.1)
    return [*steps, len(learn.recorder.losses), len(learn.recorder.epochs)]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@both
@pytest.mark.parametrize("persistent", [False, True])
def test_a_terminal_or_a_scheduler_sends_it_to_the_workers_too(persistent, number, tmp_path):
    result = in_a_process_group_of_its_own(lambda: fits_with_workers(persistent, number), tmp_path / "result")
    assert result == "[3, 3, 3, 3, 10, 1]"


SCRIPT = """
import os, signal, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from minifast import Callback, Learner

class Press(Callback):
    def after_pred(self, state):
        if state.step == 2: os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs this in the background hands down SIG_IGN
learn = Learner(nn.Linear(3, 1), ([(torch.ones(2, 3), torch.ones(2, 1))] * 5, None), nn.MSELoss(), device="cpu")
try:
    learn.fit(0.1, 1, callbacks=[Press()])
finally:
    print("steps", len(learn.recorder.losses))
"""


@pytest.mark.nightly
def test_a_script_ends_as_others_do_that_were_interrupted():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout.splitlines()[-1] == "steps 3"
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
