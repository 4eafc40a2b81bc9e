"""A fit that is killed and goes on equals one that was not, bit for bit: schedules, epoch ends, windows, fits."""
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import At, everything, throw, tiers
from resuming import Kill, Killed, every_step, kill, learner, outcome, rows, same, uninterrupted
from torch import nn

from minifast import EMA, Callback, CancelBatch, Checkpoint, GradientClip, MixedPrecision

pytestmark = pytest.mark.usefixtures("quick_disk")

FITS = {
    "constant": lambda learn, cbs, resume: learn.fit(0.01, 4, callbacks=cbs, resume=resume),
    "cosine": lambda learn, cbs, resume: learn.fit(slice(0.001, 0.01), 2, cycle_len=2, callbacks=cbs, resume=resume),
    "use_clr": lambda learn, cbs, resume: learn.fit(0.01, 2, cycle_len=2, use_clr=(10, 4, 0.95, 0.85), callbacks=cbs,
                                                    resume=resume),
    "use_clr_beta": lambda learn, cbs, resume: learn.fit(0.01, 1, cycle_len=4, use_clr_beta=(10, 15, 0.95, 0.85),
                                                         callbacks=cbs, resume=resume),
    "one_cycle": lambda learn, cbs, resume: learn.fit_one_cycle(4, slice(0.001, 0.02), callbacks=cbs, resume=resume),
    "flat_cos": lambda learn, cbs, resume: learn.fit_flat_cos(4, 0.01, callbacks=cbs, resume=resume),
    "sgdr": lambda learn, cbs, resume: learn.fit_sgdr(2, 1, 0.01, cycle_mult=3, callbacks=cbs, resume=resume),
}  # fmt: skip
STEPS = 24


@pytest.mark.case("S1", "S13")
@pytest.mark.parametrize("name", tiers(FITS, quick=["one_cycle", "cosine"]))
def test_from_every_step_it_ends_with_the_same_bits(tmp_path, name):
    fit = FITS[name]
    reference = uninterrupted(fit, learner())
    fit(learner(), [every_step(tmp_path / "run")], "auto")
    files = sorted((tmp_path / "run" / "fit-1").glob("step-*.ckpt"))
    assert len(files) == STEPS
    for done, file in enumerate(files[:-1], 1):
        learn = learner()
        fit(learn, [], file)
        assert same(learn, reference) == STEPS - done


@pytest.mark.case("S1")
@pytest.mark.parametrize("name", FITS)
def test_killed_and_run_again_three_times(tmp_path, name):
    fit = FITS[name]
    reference = uninterrupted(fit, learner())
    for n in (4, 9, 5):
        kill(fit, learner(), tmp_path, "before_batch", n)
    learn = learner()
    fit(learn, [every_step(tmp_path)], "auto")
    assert same(learn, reference) == STEPS - (3 + 8 + 4)


# ---- where an epoch, a window or the fit ends


def one_cycle(learn, callbacks, resume, **options):
    learn.fit_one_cycle(4, 0.01, callbacks=callbacks, resume=resume, **options)


def again(fit, path, learn=None, **options):
    """Run the script again."""
    learn = learner() if learn is None else learn
    fit(learn, [every_step(path, **options)], "auto")
    return learn


@pytest.mark.table
@pytest.mark.case("S4")
@pytest.mark.parametrize("event", ["before_validate", "before_valid_batch", "after_valid_batch", "after_validate",
                                   "after_epoch", "before_epoch", "before_batch", "after_fit"])
@pytest.mark.parametrize("every_seconds", [None, 1e-9])
def test_killed_around_the_end_of_an_epoch(tmp_path, event, every_seconds):
    reference = uninterrupted(one_cycle, learner())
    count = {"before_valid_batch": 3, "after_valid_batch": 4, "before_batch": 13, "after_fit": 1}.get(event, 2)
    kill(one_cycle, learner(), tmp_path, event, count, every_seconds=every_seconds)
    learn = learner()
    validated = At("before_validate", lambda state: epochs.append(state.epoch))
    epochs = []
    one_cycle(learn, [every_step(tmp_path), validated], "auto")
    same(learn, reference)
    assert [row["epoch"] for row in learn.recorder.epochs] == [0, 1, 2, 3]
    assert epochs == sorted(set(epochs))


class Growing(nn.Module):
    """Keeps the means of all batches that it has seen in a buffer that is made late, grows, and is in no state dict."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)
        self.register_buffer("means", None, persistent=False)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            mean = x.detach().mean(0, keepdim=True)
            self.means = mean if self.means is None else torch.cat([self.means, mean])
        return self.head(x - self.means.mean(0))


@pytest.mark.parametrize("batch", [3, 6, 9, 12])
def test_a_cache_that_grows(tmp_path, batch):
    def make():
        torch.manual_seed(0)
        return learner(model=Growing(), splitter=None)

    reference = uninterrupted(one_cycle, make())
    kill(one_cycle, make(), tmp_path, "after_backward", batch)
    learn = make()
    same(again(one_cycle, tmp_path, learn), reference)
    assert len(learn.model.means) == 24


@pytest.mark.table
@pytest.mark.case("S11")
@pytest.mark.parametrize("batch", range(1, 24, 2))
def test_killed_inside_a_window(tmp_path, batch):
    """6 batches in windows of 4: the second is short. The checkpoint is that of the last whole window."""
    def fit(learn, callbacks, resume):
        one_cycle(learn, callbacks, resume, accumulate=4)

    reference = uninterrupted(fit, learner())
    kill(fit, learner(), tmp_path, "after_backward", batch)
    same(again(fit, tmp_path), reference)


@pytest.mark.table
@pytest.mark.case("I1", "S11")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("event", "n"), [
    ("after_pred", 2), ("after_loss", 9), ("after_batch", 11), ("after_batch", 12), ("before_validate", 2),
    ("after_valid_batch", 3), ("after_validate", 1), ("after_epoch", 1), ("before_epoch", 2), ("after_epoch", 4),
])  # fmt: skip
def test_ctrl_c_saves_at_once_and_inside_a_window_too(tmp_path, event, n, accumulate):
    def fit(learn, callbacks, resume):
        one_cycle(learn, callbacks, resume, accumulate=accumulate)

    reference = uninterrupted(fit, learner())
    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        fit(learn, [Checkpoint(tmp_path, every_seconds=None),
                    At(event, lambda state: os.kill(os.getpid(), signal.SIGINT), n - 1)], "auto")
    done = len(learn.opt.seen)
    other = again(fit, tmp_path)
    assert same(other, reference) == len(reference["seen"]) - done, "not a step was lost"


@pytest.mark.case("S11")
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_window_that_was_dropped_stays_dropped(tmp_path, n):
    class Drops(Callback):
        def after_loss(self, state):
            if state.batch_index == 1:
                raise CancelBatch

    def fit(learn, callbacks, resume):
        one_cycle(learn, [*callbacks, Drops()], resume, accumulate=4)

    reference = uninterrupted(fit, learner())
    with pytest.raises(KeyboardInterrupt):
        fit(learner(), [Checkpoint(tmp_path, every_seconds=None),
                        At("before_batch", lambda state: os.kill(os.getpid(), signal.SIGINT), n - 1)], "auto")
    same(again(fit, tmp_path), reference)


def test_weighted_losses_in_a_window(tmp_path):
    """A loss that is a sum and a count, both tensors: what the window has gathered is in the checkpoint."""
    def make():
        learn = learner()
        learn.loss_func = lambda pred, target: (
            torch.nn.functional.cross_entropy(pred, target, reduction="sum"), (target > 0).sum() + 1)
        return learn

    def fit(learn, callbacks, resume):
        one_cycle(learn, callbacks, resume, accumulate=3)

    reference = uninterrupted(fit, make())
    with pytest.raises(KeyboardInterrupt):
        fit(make(), [Checkpoint(tmp_path, every_seconds=None),
                     At("after_loss", lambda state: os.kill(os.getpid(), signal.SIGINT), 10)], "auto")
    same(again(fit, tmp_path, make()), reference)


@pytest.mark.parametrize("event", ["before_validate", "after_validate", "after_fit"])
@pytest.mark.parametrize("every_seconds", [None, 1e-9])
def test_a_fit_that_was_ending_ends(tmp_path, event, every_seconds):
    class Ends(Callback):
        def after_step(self, state):
            state.is_ending = state.is_ending or state.step == 7

    def fit(learn, callbacks, resume):
        one_cycle(learn, [Ends(), *callbacks], resume)

    reference = uninterrupted(fit, learner())
    assert len(reference["seen"]) == 8
    kill(fit, learner(), tmp_path, event, 1 if event == "after_fit" else 2, every_seconds=every_seconds)
    learn = learner()
    one_cycle(learn, [every_step(tmp_path)], "auto")
    assert same(learn, reference) == 0


@pytest.mark.case("S3")
def test_a_finished_fit_is_restored_and_writes_nothing(tmp_path):
    reference = uninterrupted(one_cycle, learner())
    again(one_cycle, tmp_path)

    def files():
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*.ckpt")}

    before = files()
    learn = again(one_cycle, tmp_path)
    assert same(learn, reference) == 0
    assert files() == before


@pytest.mark.case("S12")
def test_killed_while_the_average_is_in_the_models_place(tmp_path):
    def fit(learn, callbacks, resume):
        one_cycle(learn, [*callbacks, EMA(decay=0.5)], resume)

    reference = uninterrupted(fit, learner())
    kill(fit, learner(), tmp_path, "before_valid_batch", 3)
    same(again(fit, tmp_path), reference)


@pytest.mark.case("N4")
def test_the_scaler_goes_on(tmp_path):
    def fit(learn, callbacks, resume):
        one_cycle(learn, [*callbacks, MixedPrecision("fp16")], resume)

    reference = uninterrupted(fit, learner())
    for n in (3, 8):
        kill(fit, learner(), tmp_path, "before_batch", n)
    same(again(fit, tmp_path), reference)


def test_train_metrics_and_columns_go_on(tmp_path):
    def make():
        return learner(train_metrics=True)

    def fit(learn, callbacks, resume):
        one_cycle(learn, [*callbacks, GradientClip(norm=0.1)], resume)

    reference = uninterrupted(fit, make())
    kill(fit, make(), tmp_path, "before_batch", 9)
    same(again(fit, tmp_path, make()), reference)


def test_what_a_callback_has_unfrozen_stays_so(tmp_path):
    class Thaws(Callback):
        def before_epoch(self, state):
            if state.epoch == 1:
                state.model.requires_grad_(True)

    def fit(learn, callbacks, resume):
        learn.freeze()
        learn.fit(0.01, 3, callbacks=[*callbacks, Thaws()], resume=resume)

    reference = uninterrupted(fit, learner())
    kill(fit, learner(), tmp_path, "before_batch", 9)
    same(again(fit, tmp_path), reference)
    same(again(fit, tmp_path), reference)  # finished


@pytest.mark.parametrize("opt_func", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam,
                                      lambda params, **options: torch.optim.SGD(params, momentum=0.9, nesterov=True,
                                                                                **options)])  # fmt: skip
def test_other_optimizers(tmp_path, opt_func):
    def fit(learn, callbacks, resume):
        learn.fit(0.01, 2, callbacks=callbacks, resume=resume)

    def make():
        return learner(opt_func=opt_func)

    learn = make()
    fit(learn, [], False)
    expected = outcome(learn)
    make_then = make()
    with pytest.raises(Killed):
        fit(make_then, [every_step(tmp_path), Kill("before_batch", 8)], "auto")
    assert outcome(again(fit, tmp_path, make())) == expected


def test_a_limit_in_time_counts_over_a_kill(tmp_path, monkeypatch):
    """A clock that counts looks at it: so two such fits are the same."""
    def fit(learn, callbacks, resume):
        now = itertools.count()
        monkeypatch.setattr("minifast.schedules.time_limit.time", SimpleNamespace(monotonic=lambda: float(next(now))))
        learn.fit_one_cycle(lr_max=0.01, minutes=15 / 60, callbacks=callbacks, resume=resume)

    reference = uninterrupted(fit, learner())
    kill(fit, learner(), tmp_path, "before_batch", 8)
    learn = again(fit, tmp_path)
    # the clock stands still from the last look before the checkpoint to the first one after it
    assert abs(len(learn.recorder.lrs) - len(reference["seen"])) <= 1
    assert [lr.hex() for lr in learn.recorder.lrs[:7].tolist()] == [note["lr"] for note in reference["seen"]][:7]


# ---- several fits


def script(learn, callbacks, resume):
    learn.freeze()
    learn.fit(0.01, 1, callbacks=callbacks, resume=resume)
    learn.unfreeze()
    learn.fit_one_cycle(2, slice(0.001, 0.01), callbacks=callbacks, resume=resume)


def fine_tune(learn, callbacks, resume):
    learn.fine_tune(2, 0.01, freeze_epochs=1, callbacks=callbacks, resume=resume)


@pytest.mark.table
@pytest.mark.parametrize("fit", [script, fine_tune])
@pytest.mark.parametrize("batch", [1, 4, 7, 8, 13, 18])
def test_a_script_of_several_fits(tmp_path, fit, batch):
    reference = uninterrupted(fit, learner())
    learn = learner()
    count = Kill("before_batch", batch)
    with pytest.raises(Killed):
        fit(learn, [every_step(tmp_path), count], "auto")
    assert sorted(path.name for path in tmp_path.glob("fit-*")) == ["fit-1", "fit-2"][:1 + (batch > 6)]
    same(again(fit, tmp_path), reference)
    same(again(fit, tmp_path), reference)  # and once more: both are finished


def test_killed_between_two_fits(tmp_path):
    reference = uninterrupted(script, learner())
    first = learner()
    first.freeze()
    first.fit(0.01, 1, callbacks=[every_step(tmp_path)], resume="auto")
    same(again(script, tmp_path), reference)


def test_fits_without_a_checkpoint_are_not_counted(tmp_path):
    def fit(learn, callbacks, resume):
        learn.fit(0.02, 1)
        learn.lr_find(1e-4, 1, 5)
        learn.fit(0.01, 2, callbacks=callbacks, resume=resume)

    reference = uninterrupted(fit, learner())
    learn = learner()
    with pytest.raises(Killed):
        fit(learn, [every_step(tmp_path), Kill("before_batch", 8)], "auto")
    assert [path.name for path in tmp_path.glob("fit-*")] == ["fit-1"]
    assert outcome(again(fit, tmp_path)) == reference["outcome"]


def test_a_checkpoint_of_the_learner_serves_all_fits(tmp_path):
    def fit(learn, callbacks, resume):
        learn.callbacks += callbacks
        learn.fit(0.01, 1, resume=resume)
        learn.fit(0.02, 2, resume=resume)

    reference = uninterrupted(fit, learner())
    kill(fit, learner(), tmp_path, "before_batch", 10)
    same(again(fit, tmp_path), reference)
    assert sorted(path.name for path in tmp_path.glob("fit-*")) == ["fit-1", "fit-2"]


def test_an_interrupted_fit_keeps_its_number(tmp_path):
    """In a notebook: the same Learner, the same cell again."""
    reference = uninterrupted(one_cycle, learner())
    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        one_cycle(learn, [every_step(tmp_path), At("after_loss", throw(KeyboardInterrupt), 9)], "auto")
    one_cycle(learn, [every_step(tmp_path)], "auto")
    assert outcome(learn) | {"recorder": 0} == reference["outcome"] | {"recorder": 0}
    assert rows(learn.recorder)[-1] == reference["outcome"]["recorder"][-1]
    assert [path.name for path in tmp_path.glob("fit-*")] == ["fit-1"]


# ---- which checkpoint


def test_a_path_is_a_file_a_fit_or_a_run(tmp_path):
    reference = uninterrupted(one_cycle, learner())
    kill(one_cycle, learner(), tmp_path / "a", "before_batch", 9)
    for path in ("a/fit-1/step-00000003.ckpt", "a/fit-1", "a"):
        learn = learner()
        one_cycle(learn, [], str(tmp_path / path))
        assert same(learn, reference) == (21 if "step" in path else 16)
    learn = learner()
    one_cycle(learn, [every_step(tmp_path / "b")], tmp_path / "a")  # into a folder of its own
    same(learn, reference)
    assert len(list((tmp_path / "a" / "fit-1").glob("*.ckpt"))) == 8
    assert len(list((tmp_path / "b" / "fit-1").glob("*.ckpt"))) == 16
    with pytest.raises(FileExistsError, match="holds another run"):
        one_cycle(learner(), [every_step(tmp_path / "b")], tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nothing"):
        one_cycle(learner(), [], tmp_path / "nothing")


def test_an_older_checkpoint_sets_newer_ones_aside(tmp_path, caplog):
    reference = uninterrupted(one_cycle, learner())
    again(one_cycle, tmp_path)
    learn = learner()
    one_cycle(learn, [every_step(tmp_path), Kill("before_fit", 2)], tmp_path / "fit-1" / "step-00000020.ckpt")
    same(learn, reference)
    names = sorted(path.name for path in (tmp_path / "fit-1").iterdir())
    set_aside = [name for name in names if name.endswith(".superseded")]
    assert set_aside == [f"step-{n:08d}.superseded" for n in range(21, 25)]
    assert names.count("step-00000024.ckpt") == 1
    assert "renamed to *.superseded" in caplog.text


def test_true_demands_a_checkpoint_and_false_refuses_to_overwrite_one(tmp_path):
    learn = learner()
    before = everything(learn)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*fit-1"):
        one_cycle(learn, [every_step(tmp_path)], True)
    assert everything(learn) == before
    one_cycle(learn, [every_step(tmp_path)], False)
    other = learner()
    before = everything(other)
    with pytest.raises(FileExistsError, match=r"holds a run already, up to step-00000024.ckpt.*resume=\"auto\""):
        one_cycle(other, [every_step(tmp_path)], False)
    assert everything(other) == before
    one_cycle(other, [every_step(tmp_path)], True)
    assert outcome(other) == outcome(learn)


@pytest.mark.parametrize("resume", ["auto", True])
def test_without_a_checkpoint_callback_it_asks_for_one(resume):
    learn = learner()
    before = everything(learn)
    with pytest.raises(ValueError, match=r"callbacks=\[Checkpoint"):
        one_cycle(learn, [], resume)
    assert everything(learn) == before


@pytest.mark.parametrize("resume", [None, 1, 0.5, "", b"a", [], torch.ones(1)])
def test_what_resume_is_not(resume):
    with pytest.raises((TypeError, ValueError), match="resume must be"):
        one_cycle(learner(), [], resume)


def test_two_checkpoints_in_a_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"both .*Checkpoint.* set 'the checkpoints'"):
        one_cycle(learner(), [every_step(tmp_path / "a"), every_step(tmp_path / "b")], "auto")


@pytest.mark.case("K8")
def test_two_fits_in_a_folder_are_refused(tmp_path):
    caught = []

    def other(state):
        with pytest.raises(RuntimeError, match="in use by another fit of this process") as info:
            one_cycle(learner(), [every_step(tmp_path)], "auto")
        caught.append(info)

    one_cycle(learner(), [every_step(tmp_path), At("after_loss", other, 3)], "auto")
    assert len(caught) == 1


@pytest.mark.nightly
@pytest.mark.case("K8")
def test_another_process_is_refused_while_one_trains(tmp_path):
    code = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(path) for path in (Path(__file__).parent, Path(__file__).parents[1])]!r}
        from resuming import every_step, learner
        try:
            learner().fit(0.01, 1, callbacks=[every_step({str(tmp_path)!r})], resume="auto")
        except RuntimeError as error:
            print(error)
    """)
    said = []

    def start(state):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        said.append(result.stdout + result.stderr)

    one_cycle(learner(), [every_step(tmp_path), At("after_loss", start, 3)], "auto")
    assert f"is in use by pid {os.getpid()} on host" in said[0]
    assert "Wait for it, or pass another folder." in said[0]


# ---- what is said


def test_what_is_printed(tmp_path, capsys):
    def run(**options):
        one_cycle(learner(verbose=True), [every_step(tmp_path), *options.pop("others", [])], "auto", **options)
        return capsys.readouterr().out.splitlines()

    with pytest.raises(Killed):
        run(others=[Kill("before_batch", 9)])
    capsys.readouterr()
    lines = run()
    file = tmp_path / "fit-1" / "step-00000008.ckpt"
    assert lines[0] == f"{file}: resumed in epoch 1, 2 batches and 8 of 24 updates"
    assert lines[1].split() == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3"]
    file = tmp_path / "fit-1" / "step-00000024.ckpt"
    assert run() == [f"{file}: this fit has ended before, after 24 updates: its final state is restored"]


@pytest.mark.case("K4", "K5")
def test_what_is_damaged_is_skipped_and_named(tmp_path, caplog):
    reference = uninterrupted(one_cycle, learner())
    kill(one_cycle, learner(), tmp_path, "before_batch", 9)
    newest = tmp_path / "fit-1" / "step-00000008.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with caplog.at_level("INFO", "minifast"):
        learn = again(one_cycle, tmp_path)
    assert same(learn, reference) == 24 - 7
    messages = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("skipped: ") and "step-00000008" in text and "check sum" in text for text in messages)
    assert any("step-00000007.ckpt: resumed in epoch 1, 1 batch and 7 of 24 updates" in text for text in messages)


@pytest.mark.case("S15")
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path):
    class Odd(Callback):
        saves = ("best",)

        def before_fit(self, state):
            self.best = np.float64(3)

    with pytest.raises(TypeError, match=r"callbacks\.Odd\.best is a numpy\.float64: use x\.item\(\)"):
        one_cycle(learner(), [Odd(), every_step(tmp_path)], "auto")
    assert list(tmp_path.rglob("*.ckpt")) == []
