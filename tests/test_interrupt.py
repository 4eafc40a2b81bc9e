"""Ctrl-C, by real signals: the first one finishes the batch and cleans up, the second one is at once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import At, Trace, batches, bits, everything, learner, spying, throw, trained, twin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import CancelEpoch, CancelFit, LRFinder
from minifast.callback import EVENTS

ROOT = Path(__file__).resolve().parent.parent
FOREVER = 60.0  # seconds: what lasts that long did not work


@pytest.fixture(autouse=True)
def python_handles_ctrl_c():
    """As in any program that was started in the foreground; and after the test the handler is this one again."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    left = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, previous)
    assert left is signal.default_int_handler


def ctrl_c(state=None):
    """A SIGINT to this process; Python's handler has run when it returns."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(3):  # the handler runs between two instructions of the main thread
        time.sleep(0)


def interrupted(fit):
    """Run `fit`, which must end with a KeyboardInterrupt; gives it.

    (pytest.raises would make a cycle of it and this frame. Of a cycle's workers torch cannot tell that they are done.)
    """
    try:
        fit()
    except KeyboardInterrupt as error:
        return error
    return pytest.fail("no KeyboardInterrupt")


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


@pytest.mark.parametrize("event", EVENTS)
def test_the_first_one_finishes_the_batch_and_cleans_up(event):
    log, learn = [], learner(batches(2), batches(1), opt_func=partial(spying(), momentum=0.8))
    callbacks = [At(event, ctrl_c, n=0), Trace(log, "a."), Trace(log, "b.")]
    interrupted(lambda: learn.fit_one_cycle(2, 0.1, callbacks=callbacks))
    heard = [name[2:] for name in log if name.startswith("b.")]
    begin = len(heard) if event == "after_fit" else heard.index(event) + 1
    assert heard[begin:] == [*REST[event].split(), *(["after_fit"] if event != "after_fit" else [])]
    assert log[-2:] == ["b.after_fit", "a.after_fit"]
    assert len(learn.recorder.losses) == len(learn.opt.seen) == heard.count("after_step")
    assert [group["momentum"] for group in learn.opt.param_groups] == [0.8, 0.8]
    assert [p.grad for p in learn.model.parameters()] == [None, None]
    assert learn.model.training


@pytest.mark.parametrize("event", EVENTS)
def test_the_learner_is_one_that_the_uninterrupted_fit_passed_through(event):
    learns = [learner(batches(2), batches(1), opt_func=partial(spying(), momentum=0.9)) for _ in range(2)]
    interrupted(lambda: learns[0].fit_one_cycle(2, 0.1, callbacks=[At(event, ctrl_c, n=0)]))
    learns[1].fit_one_cycle(2, 0.1)
    done = len(learns[0].opt.seen)
    assert done or event == "before_fit"
    assert bits(learns[0].opt.seen) == bits(learns[1].opt.seen[:done])
    assert bits(learns[0].recorder.losses) == bits(learns[1].recorder.losses[:done])
    other = twin(learns[0], opt_func=partial(spying(), momentum=0.9))
    for learn in (learns[0], other):
        learn.fit_one_cycle(1, 0.1)
    assert trained(learns[0]) == trained(other)


def test_from_another_thread_while_the_model_computes():
    pressed, learn = threading.Event(), learner(batches(50))
    presser = threading.Thread(target=lambda: (pressed.wait(FOREVER), ctrl_c()))
    presser.start()

    def wait(state):
        pressed.set()
        presser.join()
        begin = time.monotonic()
        while not state.interrupt.pending and time.monotonic() < begin + FOREVER:
            time.sleep(0.001)

    interrupted(lambda: learn.fit(0.1, callbacks=[At("after_pred", wait, n=7)]))
    assert len(learn.recorder.losses) == len(learn.opt.seen) == 8


@pytest.mark.parametrize("cancel", [CancelEpoch, CancelFit])
@pytest.mark.parametrize("event", ["before_epoch", "after_pred", "after_step"])
def test_a_cancel_after_it_does_not_swallow_it(event, cancel):
    learn = learner(batches(2), batches(1))
    callbacks = [At(event, ctrl_c, n=0), At(event, throw(cancel()), n=0)]
    interrupted(lambda: learn.fit(0.1, 2, callbacks=callbacks))
    assert len(learn.opt.seen) <= 1


def test_inside_an_accumulation_window_its_gradients_are_dropped():
    learn = learner(batches(4))
    interrupted(lambda: learn.fit(0.1, accumulate=2, callbacks=[At("after_backward", ctrl_c, n=2)]))
    assert len(learn.opt.seen) == len(learn.recorder.losses) == 1
    assert [p.grad for p in learn.model.parameters()] == [None, None]


def test_an_error_after_it_is_still_that_error():
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as info:
        learner().fit(0.1, callbacks=[At("after_pred", ctrl_c), At("after_loss", throw(error))])
    assert info.value is error


def test_a_loader_that_fails_after_it_counts_as_the_interrupt():
    class Loader:
        def __len__(self):
            return 3

        def __iter__(self):
            yield batches(1)[0]
            ctrl_c()
            raise RuntimeError("DataLoader worker (pid 4711) exited unexpectedly")

    error = interrupted(lambda: learner(Loader()).fit(0.1))
    assert isinstance(error.__cause__, RuntimeError)


# ---- the second one


class Stuck(nn.Linear):
    """Presses Ctrl-C in its second batch, and then once more in the middle of something that lasts."""

    calls, woke = 0, False

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            ctrl_c()
            threading.Timer(0.05, ctrl_c_in_main_thread).start()
            time.sleep(FOREVER)
            self.woke = True
        return super().forward(x)


def ctrl_c_in_main_thread():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.parametrize("fit", ["fit(0.1, 2)", "lr_find()", "fit(0.1, callbacks=[LRFinder()])"])
def test_the_second_one_is_at_once(fit):
    model = Stuck(3, 1)
    log, learn = [], learner(model=model)
    learn.callbacks.append(Trace(log))
    interrupted(lambda: eval(f"learn.{fit}", {"learn": learn, "LRFinder": LRFinder}))
    assert not model.woke
    if fit == "fit(0.1, 2)":
        assert log[-2:] == ["before_batch", "after_fit"]
        assert len(learn.recorder.losses) == len(learn.opt.seen) == 1
    assert [p.grad for p in model.parameters()] == [None, None]


def test_the_second_one_in_a_cleanup_lets_the_others_clean_up():
    log = []

    def press(state):
        ctrl_c()
        log.append("not reached")

    callbacks = [Trace(log), At("after_fit", press), At("after_pred", ctrl_c)]
    interrupted(lambda: learner().fit(0.1, callbacks=callbacks))
    assert log[-1] == "after_fit"
    assert "not reached" not in log


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


@pytest.mark.parametrize("n", [0, 5, 99])
def test_in_lr_find_everything_is_put_back(n):
    learn, calls = finder_learner(), []
    learn.model[0].register_forward_hook(lambda *args: (calls.append(1), ctrl_c() if len(calls) == n + 1 else None)[1])
    before = everything(learn)
    interrupted(lambda: learn.lr_find(1e-6, 1e-5))
    assert everything(learn) == before
    assert len(calls) == n + 1  # that batch was the last one


def test_in_a_sandbox_everything_is_put_back():
    learn = finder_learner()
    before = everything(learn)

    def try_out():
        with learn.sandbox():
            learn.freeze()
            learn.fit(0.1, callbacks=[At("after_pred", ctrl_c)])

    interrupted(try_out)
    assert everything(learn) == before


def test_while_everything_is_put_back_it_waits():
    learn = finder_learner()
    before = everything(learn)

    class Recorder(type(learn.recorder)):
        def keep(self):
            restore = super().keep()
            return lambda: (ctrl_c(), restore())

    learn.recorder.__class__ = Recorder

    def try_out():
        with learn.sandbox():
            learn.fit(0.1)

    interrupted(try_out)
    assert everything(learn) == before


# ---- other people's handlers, other threads


def host_handler(signum, frame):
    """A program that has its own idea of Ctrl-C."""


FITS = {
    "normal": lambda learn: learn.fit(0.1),
    "error": lambda learn: learn.fit(0.1, callbacks=[At("after_pred", throw(ZeroDivisionError))]),
    "Ctrl-C": lambda learn: learn.fit(0.1, callbacks=[At("after_pred", ctrl_c)]),
    "lr_find": lambda learn: learn.lr_find(),
}


@pytest.mark.parametrize("handler", [host_handler, signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
@pytest.mark.parametrize("fit", FITS)
def test_the_host_programs_handler_is_put_back(handler, fit):
    if handler is signal.SIG_DFL and fit == "Ctrl-C":
        return  # that ends a process
    signal.signal(signal.SIGINT, handler)
    try:
        FITS[fit](learner())
    except (ZeroDivisionError, KeyboardInterrupt):
        pass
    finally:
        left = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert left is handler


def test_where_the_host_program_ignores_ctrl_c_so_do_we():
    learn = learner(batches(3))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        learn.fit(0.1, callbacks=[At("after_pred", ctrl_c)])
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert len(learn.opt.seen) == 3


def fit_under(handler, *presses):
    """The updates of a fit of 3 with Ctrl-C in these events of its first batch, and what ended it."""
    learn = learner(batches(3))
    signal.signal(signal.SIGINT, handler)
    try:
        learn.fit(0.1, callbacks=[At(event, ctrl_c, n=0) for event in presses])
    except BaseException as error:
        return len(learn.opt.seen), type(error)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return len(learn.opt.seen), None


@pytest.mark.parametrize("presses", [["after_pred"], ["after_pred", "after_loss"]])
def test_the_host_programs_handler_hears_of_each(presses):
    calls = []
    assert fit_under(lambda *args: calls.append(args), *presses) == (1, KeyboardInterrupt)
    assert [signum for signum, _ in calls] == [signal.SIGINT] * len(presses)


def test_an_interrupt_that_the_host_programs_handler_raises_waits_too():
    def handler(signum, frame):
        raise KeyboardInterrupt

    assert fit_under(handler, "after_pred") == (1, KeyboardInterrupt)
    assert fit_under(handler, "after_pred", "after_loss") == (0, KeyboardInterrupt)


def test_anything_else_that_it_raises_does_not_wait():
    assert fit_under(lambda *args: sys.exit(3), "after_pred") == (0, SystemExit)


def test_another_learners_fit_inside_a_callback_hands_it_on():
    inner, outer = learner(batches(3)), learner(batches(3))
    press = At("after_pred", ctrl_c, n=0)
    nested = At("after_step", lambda state: inner.fit(0.1, callbacks=[press]), n=1)
    interrupted(lambda: outer.fit(0.1, callbacks=[nested]))
    assert (len(inner.opt.seen), len(outer.opt.seen)) == (1, 2)


def test_the_second_one_is_at_once_in_a_fit_inside_a_fit():
    inner = learner(model=Stuck(3, 1))
    interrupted(lambda: learner().fit(0.1, callbacks=[At("after_step", lambda state: inner.fit(0.1))]))
    assert not inner.model.woke


def test_a_fit_in_another_thread_leaves_the_handler_alone():
    learn, seen = learner(batches(3)), []
    look = At("after_pred", lambda state: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=lambda: learn.fit(0.1, callbacks=[look]))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler] * 3
    assert len(learn.opt.seen) == 3


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


def fits_with_workers(persistent):
    """How many updates each fit made, where the whole process group gets a Ctrl-C in the third."""
    data = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    loader = DataLoader(data, 4, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork")
    learn = learner(loader, loader)
    steps = []
    for fit in (learn.fit, learn.fit, learn.lr_find, learn.fit):
        done = len(learn.opt.seen)
        press = At("after_pred", lambda state: os.killpg(0, signal.SIGINT), n=2)
        press.in_lr_find = True
        interrupted(lambda: fit(0.1, callbacks=[press]))  # noqa: B023
        steps.append(len(learn.opt.seen) - done)
    learn.fit(0.1)
    return [*steps, len(learn.recorder.losses), len(learn.recorder.epochs)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_the_terminal_sends_it_to_the_workers_too(persistent, tmp_path):
    result = in_a_process_group_of_its_own(lambda: fits_with_workers(persistent), tmp_path / "result")
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


@pytest.mark.slow
def test_a_script_ends_as_others_do_that_were_interrupted():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout.splitlines()[-1] == "steps 3"
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
