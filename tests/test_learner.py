"""The Learner as its users type it, and beside the loop that they would write by hand."""
import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import Callback, DataLoaders, Learner, LRFinder, OneCycle, accuracy, digits, schedules


def convnet():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(128, 10))


def loaders(batch_size=32):
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(100, 1, 8, 8), torch.randint(0, 10, (100,)))
    return DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size)


@pytest.mark.parametrize("opt_func", [partial(torch.optim.SGD, momentum=0.9, fused=True),
                                      partial(torch.optim.AdamW, fused=True)])
def test_a_fit_is_the_loop_written_by_hand_to_the_last_bit(opt_func):
    train, valid = loaders()
    model, twin = convnet(), convnet()
    twin.load_state_dict(model.state_dict())
    loss_func = nn.CrossEntropyLoss()

    opt = opt_func(twin.parameters(), lr=1.0)
    torch.manual_seed(2)
    means = []
    for epoch in range(3):
        twin.train()
        total = 0.0
        for i, (x, y) in enumerate(train):
            step = epoch * len(train) + i
            momentum = schedules.one_cycle_momentum(step, 12)
            opt.param_groups[0]["lr"] = 0.05 * schedules.one_cycle(step, 12)
            if "betas" in opt.param_groups[0]:
                opt.param_groups[0]["betas"] = (momentum, 0.999)
            else:
                opt.param_groups[0]["momentum"] = momentum
            loss = loss_func(twin(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            total += loss.item() * len(y)
        means.append(total / 100)
        twin.eval()
        with torch.no_grad():
            for x, _ in valid:
                twin(x)

    learn = Learner(model, (train, valid), loss_func, opt_func=opt_func, wd_norm_bias=True, verbose=False)
    torch.manual_seed(2)
    learn.fit_one_cycle(3, 0.05)
    for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert [row["train_loss"] for row in learn.recorder.epochs] == pytest.approx(means, rel=1e-12)


def test_the_sentences_of_three_fastai_generations(capsys):
    learn = Learner(convnet(), DataLoaders(*loaders()), nn.CrossEntropyLoss(), metrics=[accuracy],
                    splitter=lambda model: [model[:3], model[3:]])
    lr = 1e-3
    learn.lr_find()
    learn.recorder.plot()
    learn.fit(lr, 1, cycle_len=3, use_clr=(32, 5))
    learn.sched.plot_lr()
    learn.fit_one_cycle(cycle_len=10, max_lr=0.1, div_factor=25.)
    learn.recorder.plot_lr(show_moms=True)
    learn.recorder.plot_losses()
    learn.recorder.plot_metrics()
    learn.freeze()
    learn.fit_one_cycle(1, slice(1e-3))
    learn.unfreeze()
    learn.fit_one_cycle(3, slice(1e-5, 1e-3))
    learn.fit(1e-2, 3, callbacks=[OneCycle(max_lr=0.1, div_factor=25, pct_start=0.3)])
    assert learn.sched is learn.recorder
    assert [len(fit.epochs) for fit in learn.recorder.fits] == [3, 10, 1, 3]
    assert len(learn.recorder.epochs) == 3
    assert "learning rates = " in capsys.readouterr().out


def test_the_first_lrs_of_the_seed_question():
    """fit_one_cycle(cycle_len=10, max_lr=0.1, div_factor=25) with 100 batches per epoch."""
    lrs = [row["lr"] for row in OneCycle(0.1, 25.).table(10, 100)]
    assert lrs == pytest.approx([.004, .028, .076, .1, .0950, .0812, .0611, .0389, .0188, .00495], rel=5e-3)


@pytest.mark.parametrize("call", [
    lambda learn: learn.fit_one_cycle(cyc_len=2, max_lr=0.1),
    lambda learn: learn.fit_one_cycle(2, lr_max=0.1),
    lambda learn: learn.fit_one_cycle(cycle_len=2, max_lr=0.1),
], ids=["cyc_len", "lr_max", "cycle_len"])
def test_aliases_of_fit_one_cycle(call):
    learn = Learner(nn.Linear(3, 1), ([(torch.ones(4, 3), torch.ones(4, 1))] * 5, None), nn.MSELoss(), verbose=False)
    call(learn)
    assert learn.recorder.lrs.tolist() == OneCycle(0.1).values(10)["lr"]


def test_an_argument_and_its_alias_together_are_refused():
    learn = Learner(nn.Linear(3, 1), ([(torch.ones(4, 3), torch.ones(4, 1))] * 5, None), nn.MSELoss(), verbose=False)
    with pytest.raises(ValueError, match="cycle_len=2 and cyc_len=3 are the same argument"):
        learn.fit_one_cycle(2, cyc_len=3)


def test_the_optimizer_state_persists_across_fits():
    learn = Learner(nn.Linear(3, 1), ([(torch.ones(4, 3), torch.ones(4, 1))] * 5, None), nn.MSELoss(), verbose=False)
    learn.fit(0.01, 1)
    learn.fit(0.01, 1)
    assert {int(state["step"]) for state in learn.opt.state.values()} == {10}


def test_fine_tune_trains_the_head_then_everything():
    class Watch(Callback):
        log = []  # noqa: RUF012

        def after_step(self, state):
            body, head = state.model[0].weight, state.model[1].weight
            self.log.append((body.grad is not None, head.grad is not None))

    learn = Learner(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), ([(torch.ones(4, 3), torch.ones(4, 1))] * 2, None),
                    nn.MSELoss(), splitter=list, verbose=False)
    learn.fine_tune(2, 2e-3, freeze_epochs=1, callbacks=[Watch()])
    assert Watch.log == [(False, True)] * 2 + [(True, True)] * 4
    frozen, whole = learn.recorder.fits[-1], learn.recorder
    assert frozen.lrs.tolist() == OneCycle(2e-3, pct_start=0.99).values(2)["lr"]
    assert whole.lr_groups[:, 1].tolist() == OneCycle(1e-3, 5.0).values(4)["lr"]
    assert whole.lr_groups[:, 0] == pytest.approx(whole.lr_groups[:, 1] / 100)


def test_seed_makes_two_learners_alike():
    def weights(seed):
        torch.manual_seed(0)
        model = convnet()
        learn = Learner(model, digits(), nn.CrossEntropyLoss(), seed=seed, verbose=False)
        learn.fit(0.01, 1, steps_per_epoch=5)
        return model[-1].weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.case("A15")
def test_without_a_seed_nothing_is_seeded():
    model = nn.Linear(2, 1)
    before = torch.get_rng_state()
    Learner(model, ([(torch.ones(2, 2), torch.ones(2, 1))], None), nn.MSELoss())
    assert torch.equal(before, torch.get_rng_state())


def test_attributes_may_be_assigned_between_fits():
    learn = Learner(nn.Linear(3, 1), ([(torch.ones(4, 3), torch.ones(4, 1))], None), nn.MSELoss(), verbose=False)
    learn.fit(0.1, 1)
    learn.dls = DataLoaders([(torch.zeros(4, 3), torch.zeros(4, 1))] * 3, [(torch.zeros(4, 3), torch.zeros(4, 1))])
    learn.loss_func = nn.L1Loss()
    learn.opt = torch.optim.SGD(learn.model.parameters(), lr=1.0, momentum=0.5)
    learn.metrics = [lambda pred, target: (pred - target).abs().max()]
    learn.fit(0.1, 1)
    assert list(learn.recorder.epochs[0]) == ["epoch", "train_loss", "valid_loss", "<lambda>", "time"]
    assert learn.recorder.lrs.tolist() == [0.1] * 3
    assert learn.recorder.moms.tolist() == [0.5] * 3


@pytest.mark.nightly
def test_learners_are_collected():
    code = """
import gc, weakref, torch
from torch import nn
from minifast import Learner
learn = Learner(nn.Linear(3, 1), ([(torch.ones(4, 3), torch.ones(4, 1))], None), nn.MSELoss(), verbose=False)
learn.fit_one_cycle(1, 0.1)
learn.lr_find()
gc.collect()
gc.disable()
ref = weakref.ref(learn.model)
del learn
print(ref())
"""
    printed = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout == "None\n"


def test_a_deep_copy_trains_on_its_own():
    learn = Learner(nn.Linear(3, 1), ([(torch.ones(4, 3), torch.ones(4, 1))], None), nn.MSELoss(), verbose=False)
    learn.fit(0.1, 1)
    twin, before = copy.deepcopy(learn), learn.model.weight.detach().clone()
    twin.fit(0.1, 1)
    assert torch.equal(learn.model.weight, before)
    assert not torch.equal(twin.model.weight, before)


def simple(**options):
    return Learner(nn.Linear(3, 2), ([(torch.ones(4, 3), torch.zeros(4).long())] * 3, None), nn.CrossEntropyLoss(),
                   **{"verbose": False} | options)


@pytest.mark.parametrize("where", ["learner", "fit"])
def test_a_finder_given_as_a_callback_finds_and_leaves_no_trace(where):
    finder = [LRFinder(num_it=5)]
    learn = simple(callbacks=finder if where == "learner" else ())
    before = learn.model.weight.detach().clone()
    learn.fit(0.01, 1, callbacks=finder if where == "fit" else ())
    assert torch.equal(before, learn.model.weight)
    assert len(learn.recorder.lr_find.lrs) == 5


@pytest.mark.parametrize("bad", [{"lr": float("nan")}, {"wd": -1}, {"resume": True}, {"steps_per_epoch": 0},
                                 {"accumulate": 0}, {"verbose": 1}], ids=str)
def test_a_finder_does_not_excuse_other_arguments(bad):
    with pytest.raises((ValueError, TypeError), match="|".join(bad)):
        simple().fit(**{"lr": 0.1} | bad, callbacks=[LRFinder(num_it=3)])


def test_a_misspelt_argument_of_a_fit_is_named():
    with pytest.raises(TypeError, match=r"there is no argument calbacks\. Those of every fit are wd, callbacks"):
        simple().fit_one_cycle(1, 0.1, calbacks=[])


@pytest.mark.case("B4")
@pytest.mark.parametrize(("target", "message"), [
    (torch.zeros(4), r"labels must be int64 class indices, got float32 \(4,\)\. Call target\.long"),
    (torch.zeros(4).int(), r"labels must be int64 class indices, got int32 \(4,\)"),
    (torch.zeros(4, 1).long(), r"labels must have shape \(4,\) for outputs of shape \(4, 2\), got \(4, 1\)\. "
                               r"Call target\.squeeze\(1\)"),
    (torch.tensor([0, 1, 2, 0]), r"labels must be 0\.\.1 for the model's 2 outputs, got 0\.\.2"),
], ids=["float", "int32", "column", "range"])
def test_labels_that_do_not_fit_are_explained(target, message):
    learn = simple()
    learn.dls = ([(torch.ones(4, 3), target)], None)
    with pytest.raises(ValueError, match=message):
        learn.fit(0.1)


def test_class_probabilities_are_labels_too():
    learn = simple()
    learn.dls = ([(torch.ones(4, 3), torch.full((4, 2), 0.5))], None)
    learn.fit(0.1)


def test_nan_in_the_first_batch_is_found():
    x = torch.ones(4, 3)
    x[2, 1] = x[3, 0] = float("nan")
    learn = simple()
    learn.dls = ([(x, torch.zeros(4).long())], None)
    before = learn.model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"2 values that are NaN or infinite in a tensor of shape \(4, 3\), the first "
                                         r"at \[2, 1\]"):
        learn.fit(0.1)
    assert torch.equal(before, learn.model.weight)


def test_a_model_that_copes_with_nan_may():
    x = torch.full((4, 3), float("nan"))
    learn = Learner(nn.Linear(3, 2), ([(x, torch.zeros(4).long())], None), nn.CrossEntropyLoss(), verbose=False,
                    unpack=lambda batch: (batch[0].nan_to_num(), batch[1]))
    learn.fit(0.1)


@pytest.mark.parametrize("bad", ["text", torch.ones(3), {"x": 1}])
def test_what_is_no_loader_is_refused(bad):
    with pytest.raises(TypeError, match="train must be an iterable of batches, got"):
        DataLoaders(bad)


@pytest.mark.case("L5")
def test_early_nan_is_the_reason_that_the_finder_gives():
    learn = simple()
    learn.loss_func = lambda pred, target: pred.sum() * float("nan")
    found = learn.lr_find()
    assert found.suggestion is None
    assert found.reason == "no usable descent: the loss is nan at 1e-07, after 1 learning rates"


@pytest.mark.case("L6")
def test_a_ramp_too_wide_for_floats_is_refused():
    with pytest.raises(ValueError, match=r"start_lr=1e-300 and end_lr=1e\+30 are so far apart"):
        simple().lr_find(1e-300, 1e30)
