"""Errors, cancels and endings, where a fit saves itself and where others look on."""
import io
import itertools
import re
import threading

import pytest
import torch
from helpers import At, Trace, batches, bits, learner, throw, trained, twin
from torch import nn

from minifast import (
    EMA,
    ActivationStats,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    Checkpoint,
    EarlyStopping,
    MixedPrecision,
    SaveBest,
)
from minifast.core.callback import EVENTS
from minifast.files.reading import load_tree
from minifast.standard import progress


def saving(run, *callbacks, every_steps=1, **options):
    return [Checkpoint(run, every_steps=every_steps, every_seconds=None, **options), SaveBest("valid_loss"), *callbacks]


def newest(run):
    return load_tree(max((run / "fit-1").glob("step-*.ckpt")), checked=True)


def result(learn):
    rows = [{**row, "time": 0} for row in learn.recorder.epochs]
    return trained(learn), bits([learn.recorder.losses, learn.recorder.lrs]), rows


def fresh(**options):
    return learner(batches(3), batches(2), **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    learn = fresh()
    learn.fit_one_cycle(2, 0.1, callbacks=saving(tmp_path_factory.mktemp("whole")))
    return result(learn)


# ---- errors of a fit that saves itself


class Mine(Exception):
    pass


@pytest.mark.table
@pytest.mark.case("I6", "I8")
@pytest.mark.parametrize("nth", [0, 1])
@pytest.mark.parametrize("event", EVENTS)
def test_an_error_passes_through_a_fit_that_saves_itself_and_the_next_one_goes_on(tmp_path, event, nth, whole):
    if event.endswith("_fit") and nth:
        return  # there is one
    error, trace, learn = Mine(), Trace(), fresh()
    own = list(learn.callbacks)
    with pytest.raises(Mine) as caught:
        learn.fit_one_cycle(2, 0.1, callbacks=saving(tmp_path, trace, At(event, throw(error), nth)), resume="auto")
    assert caught.value is error
    [note] = error.__notes__
    assert note.startswith(f"in At.{event}: epoch ")
    assert trace.log[-1] == "after_fit"
    assert learn.callbacks == own
    again = fresh()
    again.fit_one_cycle(2, 0.1, callbacks=saving(tmp_path), resume="auto")
    assert result(again) == whole
    other = twin(learn)
    for each in (learn, other):
        each.fit(0.1)
    assert trained(learn) == trained(other)


@pytest.mark.case("I7", "I8")
def test_an_error_in_a_cleanup_is_second_and_the_folder_is_free_again(tmp_path, whole):
    learn, trace = fresh(), Trace()
    with pytest.raises(Mine) as caught:
        learn.fit_one_cycle(2, 0.1, callbacks=[trace, *saving(tmp_path), At("after_fit", throw(OSError("second"))),
                                               At("after_step", throw(Mine()), 3)])  # fmt: skip
    assert caught.value.__notes__[0].startswith("in At.after_step: epoch 1")
    assert caught.value.__notes__[1] == "and then At.after_fit failed: OSError('second')"
    assert trace.log[-1] == "after_fit"
    again = fresh()
    again.fit_one_cycle(2, 0.1, callbacks=saving(tmp_path), resume="auto")
    assert result(again) == whole


@pytest.mark.table
@pytest.mark.case("I9")
@pytest.mark.parametrize("cancel", [CancelBatch, CancelEpoch, CancelFit])
@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_backward", "before_step"])
def test_a_cancelled_batch_is_in_no_record_and_no_checkpoint(tmp_path, event, cancel):
    learn = fresh()
    learn.fit_one_cycle(2, 0.1, callbacks=saving(tmp_path, At(event, throw(cancel()), 1)))
    done = {CancelBatch: 5, CancelEpoch: 4, CancelFit: 1}[cancel]
    saved = newest(tmp_path)
    assert len(learn.recorder.losses) == len(learn.opt.seen) == saved["position"]["step"] == done
    assert saved["finished"]
    assert bits(saved["model"]["weights"]) == bits(dict(learn.model.state_dict()))
    again = fresh(seed=4)
    again.fit_one_cycle(2, 0.1, callbacks=saving(tmp_path), resume="auto")
    assert trained(again) == trained(learn)


@pytest.mark.case("I10")
def test_a_fit_that_failed_inside_a_window_goes_on_with_it(tmp_path):
    def fit(learn, run, *callbacks):
        learn.fit_one_cycle(2, 0.1, callbacks=saving(run, *callbacks), resume="auto", accumulate=2)

    reference, learn = fresh(), fresh()
    fit(reference, tmp_path / "whole")
    with pytest.raises(Mine):
        fit(learn, tmp_path / "run", At("after_backward", throw(Mine()), 4))
    assert [p.grad for p in learn.model.parameters()] == [None, None]
    again = fresh()
    fit(again, tmp_path / "run")
    assert result(again) == result(reference)


# ---- two fits


@pytest.mark.case("I11")
@pytest.mark.parametrize("call", ["fit(0.1)", "fit_one_cycle(1)", "lr_find()"])
def test_a_fit_while_another_thread_fits_is_an_error_and_changes_nothing(call):
    begun, go_on, failed = threading.Event(), threading.Event(), []

    def wait(state):
        begun.set()
        assert go_on.wait(60)

    def train():
        try:
            learn.fit(0.1, 2, callbacks=[At("after_step", wait, 1)])
        except BaseException as error:
            failed.append(error)

    reference, learn = learner(batches(3)), learner(batches(3))
    reference.fit(0.1, 2)
    thread = threading.Thread(target=train)
    thread.start()
    assert begun.wait(60)
    try:
        with pytest.raises(RuntimeError, match="this Learner is already fitting: a callback, or another thread"):
            eval(f"learn.{call}", {"learn": learn})
    finally:
        go_on.set()
        thread.join()
    assert failed == []
    assert result(learn) == result(reference)
    learn.fit(0.1)


# ---- what is left


class Model(nn.Module):
    """Fails at the n-th call; some of it is in another mode than the rest, or is not trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 1)
        self.body[1].eval()
        self.body[0].bias.requires_grad_(False)
        self.calls = itertools.count()
        self.fails_at = None

    def forward(self, x):
        if next(self.calls) == self.fails_at:
            raise Mine
        return self.head(self.body(x))


def traces(learn):
    """Modes, gradients and hooks of the model, and torch's modes."""
    model = learn.model
    return {"modes": {name: module.training for name, module in model.named_modules()},
            "trained": [p.requires_grad for p in model.parameters()], "grads": [p.grad for p in model.parameters()],
            "hooks": {(name, kind): len(value) for name, module in model.named_modules()
                      for kind, value in vars(module).items() if "hooks" in kind and hasattr(value, "__len__")},
            "torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))}


LOOKS = {
    "fit": lambda learn, run: learn.fit(0.1, 2, callbacks=[ActivationStats(), EMA(0.5), MixedPrecision("bf16"),
                                                           *saving(run)]),
    "lr_find": lambda learn, run: learn.lr_find(num_it=20, callbacks=[MixedPrecision("bf16")]),
    "validate": lambda learn, run: learn.validate(),
    "get_preds": lambda learn, run: learn.get_preds(),
    "predict": lambda learn, run: [learn.predict(x) for x, _ in learn.dls.valid],
}  # fmt: skip


@pytest.mark.table
@pytest.mark.case("I12")
@pytest.mark.parametrize("error", [None, Mine])
@pytest.mark.parametrize("look", LOOKS)
def test_modes_hooks_and_contexts_are_as_before(tmp_path, look, error):
    learn = learner(batches(3), batches(2), model=Model())
    before = traces(learn)
    assert any("hooks" in kind for _, kind in before["hooks"])
    if error is None:
        LOOKS[look](learn, tmp_path)
        assert traces(learn) == before
        return
    for at in range({"fit": 10, "lr_find": 6}.get(look, 2)):
        learn.model.calls, learn.model.fails_at = itertools.count(), at
        with pytest.raises(error):
            LOOKS[look](learn, tmp_path / str(at))
        assert traces(learn) == before, at
        assert not learn.is_fitting


# ---- the last epoch


@pytest.mark.case("I15")
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("valid_losses", [[3.0, 2.0, 2.5, 2.5, 1.0], [3.0, 3.0, 3.0, 1.0, 1.0]])
def test_early_stopping_and_checkpoint_in_one_epoch(tmp_path, order, valid_losses):
    """In whichever order they are given: the epoch is validated, recorded, and saved with what all others keep."""
    def make():
        learn = learner(batches(3), batches(1))
        learn.loss_func = lambda pred, target: (pred - target).square().mean() if learn.model.training else \
            pred.sum() * 0 + valid_losses[epochs[0]]
        return learn

    epochs = [0]
    stop, best = EarlyStopping(patience=2), SaveBest("valid_loss")
    given = [Checkpoint(tmp_path, every_steps=1, every_seconds=None), stop, best]
    given = given[order:] + given[:order]
    note = At("before_validate", lambda state: epochs.__setitem__(0, state.epoch))
    learn, saved = make(), []
    learn.fit(0.01, 5, callbacks=[*given, note])
    stopped = 3 if valid_losses[1] == 2.0 else 2
    best_epoch = 1 if valid_losses[1] == 2.0 else 0
    assert (stop.stopped_epoch, best.best_epoch) == (stopped, best_epoch)
    assert [row["valid_loss"] for row in learn.recorder.epochs] == valid_losses[:stopped + 1]
    saved = newest(tmp_path)
    position = saved["position"]
    assert (saved["finished"], position["epoch"], position["step"]) == (True, stopped, 3 * stopped + 3)
    assert saved["callbacks"]["EarlyStopping"]["stopped_epoch"] == stopped
    assert saved["callbacks"]["SaveBest"]["best_epoch"] == best_epoch
    assert load_tree(tmp_path / "fit-1" / "best.ckpt", checked=True)["best"]["epoch"] == best_epoch
    assert bits(saved["model"]["weights"]) == bits(dict(learn.model.state_dict()))
    again = make()
    before = len(again.opt.seen)
    again.fit(0.01, 5, callbacks=[EarlyStopping(patience=2), SaveBest("valid_loss"),
                                  Checkpoint(tmp_path, every_steps=1, every_seconds=None)], resume="auto")  # fmt: skip
    assert len(again.opt.seen) == before, "it had ended"
    assert trained(again) == trained(learn)


# ---- the bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(text):
    """The lines that a terminal shows after `text`, with tqdm's way of having two bars: a line down, and up again."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\r|\n|\x1b\[A)", text):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part):]
            column += len(part)
    return lines


@pytest.mark.case("R11")
def test_no_terminal_gets_one_line_an_epoch_and_never_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    inner = learner(batches(20), verbose=True)
    learner(batches(50), batches(9), verbose=True).fit(
        0.01, 2, callbacks=[At("after_step", lambda state: inner.fit(0.01), 9)])
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 3 + 2
    assert "\r" not in out


@pytest.mark.case("R11")
@pytest.mark.parametrize("error", [None, Mine])
def test_a_bar_inside_a_bar_is_closed_like_the_other(monkeypatch, error):
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    inner = learner(batches(4), verbose=True, callbacks=[At("after_step", throw(error), 2)] if error else ())

    def fit_inner(state):
        if error is None:
            inner.fit(0.01)
        else:
            with pytest.raises(error):
                inner.fit(0.01)

    threads = threading.active_count()
    outer = learner(batches(4), verbose=True)
    outer.fit(0.01, 2, callbacks=[At("after_step", fit_inner, 1)])
    assert "%|" in screen.getvalue()
    assert any("%|" in line for line in shown(screen.getvalue()[:-100])), "so there was one to see"
    assert not any("%|" in line for line in shown(screen.getvalue())), "no bar is left to see"
    assert len(outer.recorder.epochs) == 2
    assert threading.active_count() == threads
