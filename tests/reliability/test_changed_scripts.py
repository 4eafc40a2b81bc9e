"""A script that was changed, or does what scripts should not: what is said, and what still holds."""
import os

import numpy as np
import pytest
import torch
from helpers import At
from resuming import data, every_step, kill, learner, noise, same, tensors, uninterrupted
from torch import nn

from minifast import Callback, DataLoaders, GradientClip, MixUp, SaveBest, TensorLoader

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.mark.parametrize(("change", "said"), [
    (lambda learn, own: setattr(learn, "loss_func", nn.CrossEntropyLoss(label_smoothing=0.1)), "the loss is another"),
    (lambda learn, own: learn.model.__setitem__(2, nn.Tanh()), "the layers of the model is another"),
    (lambda learn, own: own.__setitem__(slice(None), [GradientClip(norm=0.5), MixUp()]),
     "GradientClip is another; MixUp is new"),
    (lambda learn, own: own.clear(), "GradientClip is gone"),
])  # fmt: skip
def test_what_else_decides_is_a_warning(tmp_path, change, said):
    kill(clipped, learner(), tmp_path, "after_loss", 9)
    learn, own = learner(), [GradientClip(norm=1.0)]
    change(learn, own)
    with pytest.warns(UserWarning, match=said) as caught:
        clipped(learn, [every_step(tmp_path)], "auto", own)
    assert len(caught) == 1


def clipped(learn, callbacks, resume, own=None):
    own = [GradientClip(norm=1.0)] if own is None else own
    learn.fit_one_cycle(3, 0.01, callbacks=[*own, *callbacks], resume=resume)


def test_other_data_of_the_same_length_is_refused(tmp_path):
    """As in a loop over the folds of a cross-validation, each with a Learner of its own."""
    learner(data()).fit(0.01, callbacks=[every_step(tmp_path)], resume="auto")
    with pytest.raises(ValueError, match="first and last samples"):
        learner(data_of(seed=5)).fit(0.01, callbacks=[every_step(tmp_path)], resume="auto")


def data_of(seed):
    return DataLoaders(TensorLoader(*tensors(24, seed), batch_size=4, shuffle=True, transform=noise),
                       TensorLoader(*tensors(8, 1), batch_size=4))  # fmt: skip


def test_another_learner_of_this_process_is_told_that_it_is_not_trained(tmp_path, caplog):
    for _ in range(2):
        learner().fit(0.01, callbacks=[every_step(tmp_path)], resume="auto")
    assert f"fit 1 in {tmp_path} was ended by another Learner of this process: this one is not trained" in caplog.text


def test_a_value_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    class Odd(Callback):
        saves = ("value",)

        def before_fit(self, state):
            self.value = np.float64(3)

    learn = learner()
    with pytest.raises(TypeError, match=r"callbacks\.Odd\.value is a numpy\.float64: use x\.item\(\)"):
        learn.fit(0.01, callbacks=[every_step(tmp_path), Odd()])
    assert learn.opt.seen == []


def test_buffers_of_the_loss_go_on(tmp_path):
    class Centred(nn.Module):
        """Cross entropy less its running mean, as a factor: what it has seen decides the gradient."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.ones(()))

        def forward(self, pred, target):
            loss = nn.functional.cross_entropy(pred, target)
            if torch.is_grad_enabled():
                self.mean.lerp_(loss.detach(), 0.1)
            return loss * self.mean

    def make():
        learn = learner()
        learn.loss_func = Centred()
        return learn

    def fit(learn, callbacks, resume):
        learn.fit_one_cycle(3, 0.01, callbacks=callbacks, resume=resume)

    reference = uninterrupted(fit, make())
    kill(fit, make(), tmp_path, "after_loss", 9)
    learn = make()
    fit(learn, [every_step(tmp_path)], "auto")
    same(learn, reference)


def test_a_damaged_best_checkpoint_is_left_behind(tmp_path):
    """It is the newest one too: one file under two names."""
    def fit(learn, callbacks, resume):
        learn.fit_one_cycle(3, 0.01, callbacks=[SaveBest("train_loss"), *callbacks], resume=resume)

    reference = uninterrupted(fit, learner())
    kill(fit, learner(), tmp_path, "before_batch", 13)
    best = tmp_path / "fit-1" / "best.ckpt"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.write_bytes(content)  # in place: of both names
    learn = learner()
    fit(learn, [every_step(tmp_path)], "auto")
    same(learn, reference)
    learn.load_best(tmp_path)


@pytest.mark.parametrize("resume", [True, "file"])
def test_fine_tune_goes_on_with_its_second_phase(tmp_path, resume):
    def fit(learn, callbacks, resume):
        learn.fine_tune(1, 0.01, callbacks=callbacks, resume=resume)

    reference = uninterrupted(fit, learner())
    kill(fit, learner(), tmp_path, "before_batch", 4)
    learn = learner()
    fit(learn, [every_step(tmp_path, keep=1)],
        tmp_path / "fit-1" / "step-00000003.ckpt" if resume == "file" else True)
    same(learn, reference)


def test_a_callback_that_goes_elsewhere_takes_no_checkpoint_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    leave = At("before_epoch", lambda state: os.chdir(tmp_path / "sub"))
    learner().fit(0.01, 2, callbacks=[every_step("runs/a"), leave])
    assert list((tmp_path / "sub").iterdir()) == []
    assert len(list((tmp_path / "runs" / "a" / "fit-1").glob("*.ckpt"))) == 12


def test_a_run_that_is_reached_by_another_name_is_the_same(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    learn = learner()
    for name in ("real", "link"):
        learn.fit(0.01, callbacks=[every_step(tmp_path / name)], resume="auto")
    assert len(learn.opt.seen) == 12
    assert sorted(path.name for path in (tmp_path / "real").glob("fit-*")) == ["fit-1", "fit-2"]


def test_a_folder_in_place_of_a_checkpoint_is_named_when_it_is_skipped(tmp_path, caplog):
    kill(clipped, learner(), tmp_path, "after_loss", 9)
    odd = tmp_path / "fit-1" / "step-99999999.ckpt"
    odd.mkdir()
    clipped(learner(), [every_step(tmp_path)], "auto")
    assert f"skipped: {odd}: " in caplog.text
