"""SnapshotEnsemble and where cycles end: told by the curve of the rate itself and by the optimizer."""
import io
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, everything, learner, throw, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from minifast import (
    Callback,
    CancelBatch,
    CancelEpoch,
    CircularLR,
    CircularLRBeta,
    ConstantLR,
    CosineAnnealing,
    LinearLR,
    OneCycle,
    PiecewiseLR,
    Schedule,
    schedules,
)
from minifast.callbacks.averaging import EMA, SWA
from minifast.callbacks.ensemble import SnapshotEnsemble

ignore_short_cycles = pytest.mark.filterwarnings("ignore:a cycle of .* steps is shorter than cut_div")


# ---- where cycles end


def restarts(lrs, lowest, at_end):
    """The steps before the rate is back at `lowest`, the first of a cycle, and the last step; read off the curve."""
    return (*(step for step in range(len(lrs) - 1) if lrs[step + 1] == lowest and at_end(lrs, step)), len(lrs) - 1)


@ignore_short_cycles
@given(n_cycles=st.integers(1, 4), cycle_mult=st.integers(1, 3), extra=st.integers(0, 200))
def test_cycles_end_where_the_rate_starts_again(n_cycles, cycle_mult, extra):
    n_steps = 12 * sum(cycle_mult**c for c in range(n_cycles)) + extra
    options = {"n_cycles": n_cycles, "cycle_mult": cycle_mult}
    for schedule, lowest, at_end in (
        (CircularLR(32, 5, **options), 1 / 32, lambda lrs, step: True),
        (CircularLRBeta(10, 20, **options), 1 / 10, lambda lrs, step: lrs[step] < 1 / 10),
        (CosineAnnealing(warmup_frac=0, **options), 1, lambda lrs, step: True),
    ):
        ends = schedule.cycle_ends(n_steps)
        assert ends == restarts(schedule.values(n_steps)["lr"], lowest, at_end)
        assert len(ends) == n_cycles


@given(n_steps=st.integers(1, 300), n_cycles=st.integers(1, 12), cycle_mult=st.integers(1, 4))
def test_cycles_follow_each_other_and_end_with_the_fit(n_steps, n_cycles, cycle_mult):
    ends = schedules.cycle_ends(n_steps, n_cycles, cycle_mult)
    first = [step for step in range(n_steps) if schedules.cycle_at(step, n_steps, n_cycles, cycle_mult)[0] == 0]
    assert ends == (*(step - 1 for step in first[1:]), n_steps - 1)
    assert len(ends) <= n_cycles
    if cycle_mult == 1:
        assert len(ends) == min(n_cycles, n_steps)


@pytest.mark.table
@pytest.mark.parametrize(("schedule", "ends"), [
    (ConstantLR(), (99,)),
    (OneCycle(), (99,)),
    (Schedule("lr", schedules.linear), (99,)),
    (CircularLR(n_cycles=3), (32, 65, 99)),
    (CosineAnnealing(3, 2), (13, 41, 99)),
    (PiecewiseLR([(0.2, LinearLR(0.1, 1)), (0.8, CosineAnnealing(2))]), (59, 99)),  # a warm-up is no cycle
    (PiecewiseLR([(0.5, CircularLR(n_cycles=2)), (0.5, OneCycle(moms=None))]), (24, 49, 99)),
    (PiecewiseLR([(0.5, CosineAnnealing(2)), (0.5, LinearLR(0.1, 1))]), (24, 49, 99)),
    (PiecewiseLR([(0.5, ConstantLR()), (0.5, ConstantLR())]), (99,)),
    (PiecewiseLR([(0.5, Schedule("momentum", schedules.linear)), (0.5, Schedule("momentum", schedules.linear))]),
     (99,)),
])  # fmt: skip
def test_the_ends_of_every_kind_of_schedule(schedule, ends):
    assert schedule.cycle_ends(100) == ends


# ---- which weights are kept


def fit(ensemble, fit, n=15, **options):
    learn = learner(batches(n), batches(2, seed=5), callbacks=[ensemble], **options)
    fit(learn)
    return learn


def steps_of(ensemble, learn):
    """The steps of the snapshots; their weights are those that the optimizer had after just these steps."""
    for step, weights in ensemble.snapshots:
        seen = learn.opt.seen[step]["weights"]
        assert bits([weights["weight"], weights["bias"]]) == bits(seen)
    return [step for step, _ in ensemble.snapshots]


def test_the_call_that_people_ask_for():
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1, use_clr=(32, 5)))
    lrs = [note["lr"] for note in learn.opt.seen]
    lows = [step for step in range(44) if lrs[step + 1] == min(lrs)] + [44]
    assert steps_of(ensemble, learn) == lows == [14, 29, 44]


@pytest.mark.parametrize(("call", "steps"), [
    (lambda learn: learn.fit(0.1, 2, cycle_len=1, cycle_mult=2), [14, 44]),
    (lambda learn: learn.fit(0.1, 2, cycle_len=1, cycle_mult=2, accumulate=2), [7, 23]),
    (lambda learn: learn.fit(0.1, 2, cycle_len=1, use_clr_beta=(10, 10), steps_per_epoch=6), [5, 11]),
    (lambda learn: learn.fit_sgdr(3, 1, 0.1), [14, 44, 104]),
    (lambda learn: learn.fit_one_cycle(2, 0.1), [29]),
    (lambda learn: learn.fit(0.1, 2), [29]),
])  # fmt: skip
def test_the_ends_of_the_cycles_of_every_fit(call, steps):
    ensemble = SnapshotEnsemble()
    assert steps_of(ensemble, fit(ensemble, call)) == steps


def test_keep_the_newest():
    ensemble = SnapshotEnsemble(keep=2)
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 4, cycle_len=1))
    assert steps_of(ensemble, learn) == [44, 59]


def test_each_fit_starts_anew_and_keeps_no_model():
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 4, cycle_len=1))
    learn.opt.seen.clear()
    learn.fit(0.1, 1, cycle_len=1)
    assert steps_of(ensemble, learn) == [14]
    assert not any(isinstance(value, nn.Module) for value in vars(ensemble).values())


class Jump(Callback):
    """Moves the schedule ahead, as a limit in time does."""

    order = 0

    def __init__(self, *positions):
        self.positions = positions

    def before_batch(self, state):
        state.elapsed = self.positions[state.step]


def test_a_cycle_end_that_no_step_hits_is_crossed():
    ensemble, jump = SnapshotEnsemble(), Jump(0, 2, 6, 6, 6, 6, 6)  # of 7 steps: ends at 1, 3 and 6
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 1, callbacks=[jump, CosineAnnealing(3)]), 7)
    assert steps_of(ensemble, learn) == [1, 2]  # position 2 is past 1; position 6 is past 3 and 6: one snapshot


def test_dropped_steps_make_the_last_cycle_end_with_the_fit():
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1, callbacks=[At("before_step", throw(CancelBatch),
                                                                                    20)]))
    assert steps_of(ensemble, learn) == [14, 29, 43]  # the end of the second cycle is a batch later than its epoch's


def test_a_last_cycle_without_a_step_has_no_snapshot():
    ensemble = SnapshotEnsemble()

    def drop(state):
        if state.epoch:
            raise CancelBatch

    learn = fit(ensemble, lambda learn: learn.fit(0.1, 2, cycle_len=1, callbacks=[At("before_step", drop)]))
    assert steps_of(ensemble, learn) == [14]


def test_a_cancelled_epoch():
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1, callbacks=[At("after_batch", throw(CancelEpoch),
                                                                                    20)]))
    assert len(learn.opt.seen) == 36
    assert steps_of(ensemble, learn) == [14, 29, 35]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_fit_that_is_cut_short_has_the_cycles_that_were_complete(error):
    ensemble = SnapshotEnsemble()
    learn = learner(batches(15), callbacks=[ensemble])
    with pytest.raises(error):
        learn.fit(0.1, 3, cycle_len=1, callbacks=[At("after_loss", throw(error), 32)])
    assert steps_of(ensemble, learn) == [14, 29]


def test_a_fit_without_a_step_has_none():
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, callbacks=[At("before_step", throw(CancelBatch))]))
    assert ensemble.snapshots == []
    with pytest.raises(RuntimeError, match=r"SnapshotEnsemble\(keep=None\) has no snapshots: fit with it first"):
        ensemble.get_preds(learn)
    with pytest.raises(RuntimeError, match="has no snapshots"), ensemble.averaged(learn):
        pass


def test_an_owner_of_lr_that_is_no_schedule_has_one_cycle():
    class Own(Callback):
        owns = ("lr",)

    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 2, callbacks=[Own()]))
    assert steps_of(ensemble, learn) == [29]


def test_training_is_the_same_with_it():
    ensemble = SnapshotEnsemble()
    with_it = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1))
    without = learner(batches(15), batches(2, seed=5))
    without.fit(0.1, 3, cycle_len=1)
    assert trained(with_it) == trained(without)


class Killed(Callback):
    """Replaces an ensemble after `n` steps by a new one that takes up its state through a file."""

    order = 400

    def __init__(self, n):
        self.n, self.inner = n, SnapshotEnsemble(keep=2)

    def before_fit(self, state): self.inner.before_fit(state)

    def after_step(self, state):
        self.inner.after_step(state)
        if state.step == self.n:
            file = io.BytesIO()
            torch.save(self.inner.state_dict(), file)
            file.seek(0)
            self.inner = SnapshotEnsemble(keep=2)
            self.inner.before_fit(state)
            self.inner.load_state_dict(torch.load(file, weights_only=True))

    def after_epoch(self, state): self.inner.after_epoch(state)


@pytest.mark.parametrize("n", [0, 14, 20, 29, 44])
def test_goes_on_where_it_was_killed(n):
    whole, killed = SnapshotEnsemble(keep=2), Killed(n)
    learn = fit(whole, lambda learn: learn.fit(0.1, 3, cycle_len=1, callbacks=[killed]))
    assert steps_of(killed.inner, learn) == [29, 44]
    assert bits(whole.state_dict()) == bits(killed.inner.state_dict())


def test_the_sandbox_puts_it_back():
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1))
    before = bits(ensemble.state_dict())
    with learn.sandbox():
        learn.fit(0.1)
    assert bits(ensemble.state_dict()) == before


# ---- what they predict


def classes(n, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, generator=generator), torch.randint(0, 4, (size,), generator=generator))
            for _ in range(n)]


def classifier(ensemble=None, norm=True, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.ReLU(), nn.Linear(5, 4)]
    return learner(classes(8), classes(2, seed=1), model=nn.Sequential(*layers), **{
        "loss_func": nn.CrossEntropyLoss(), "callbacks": [ensemble] if ensemble else []} | options)


def by_hand(ensemble, learn, function=lambda x: x):
    """The mean of function(output) over the snapshots, each loaded into the model by its state dict."""
    own = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    outputs = []
    for _, weights in ensemble.snapshots:
        learn.model.load_state_dict(weights)
        learn.model.eval()
        with torch.no_grad():
            outputs.append(function(torch.cat([learn.model(x) for x, _ in learn.dls.valid]).double()))
    learn.model.load_state_dict(own)
    return sum(outputs) / len(outputs)


@pytest.mark.parametrize("loss_func", [nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=.1)])
def test_probabilities_are_averaged_and_given_as_logits(loss_func):
    ensemble = SnapshotEnsemble()
    learn = classifier(ensemble, loss_func=loss_func)
    learn.fit(0.3, 3, cycle_len=1)
    before = everything(learn)
    preds, targets = ensemble.get_preds(learn)
    assert everything(learn) == before
    expected = by_hand(ensemble, learn, lambda x: x.softmax(1))
    torch.testing.assert_close(preds.softmax(1).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(preds.exp().double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(targets, torch.cat([y for _, y in learn.dls.valid]))
    assert preds.dtype == torch.float32
    assert not torch.allclose(preds.softmax(1).double(), by_hand(ensemble, learn).softmax(1))  # not those of the logits


def test_probabilities_of_what_is_certain_do_not_underflow():
    ensemble = SnapshotEnsemble()
    learn = classifier(ensemble, norm=False)
    learn.fit(0.1, 2, cycle_len=1)
    for _, weights in ensemble.snapshots:
        weights["2.weight"] *= 1e4
    preds, _ = ensemble.get_preds(learn)
    assert preds.isfinite().all()


def test_other_outputs_are_averaged_as_they_are():
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1))
    preds, _ = ensemble.get_preds(learn)
    torch.testing.assert_close(preds.double(), by_hand(ensemble, learn), rtol=1e-5, atol=1e-6)
    preds, _ = ensemble.get_preds(learn, activation=torch.sigmoid)
    torch.testing.assert_close(preds.double(), by_hand(ensemble, learn, torch.sigmoid), rtol=1e-5, atol=1e-6)


def test_other_data_and_nests():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x):
            return {"a": self.linear(x), "b": [self.linear(x).half(), None]}

    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 2, cycle_len=1), model=Two(),
                loss_func=lambda pred, y: F.mse_loss(pred["a"], y))
    other = batches(1, 7, seed=8)
    preds, targets = ensemble.get_preds(learn, other)
    mean = sum(other[0][0] @ w["linear.weight"].T + w["linear.bias"] for _, w in ensemble.snapshots) / 2
    torch.testing.assert_close(preds["a"], mean)
    torch.testing.assert_close(preds["b"][0], mean, rtol=1e-3, atol=1e-3)
    assert preds["b"][0].dtype == torch.float32
    assert preds["b"][1] is None
    assert torch.equal(targets, other[0][1])


def test_outputs_that_are_no_floats_are_an_error():
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1))
    with pytest.raises(TypeError, match=r"averages outputs that are floats, got bool \(8, 1\)"):
        ensemble.get_preds(learn, activation=lambda x: x > 0)
    with pytest.raises(TypeError, match="activation must be a function of the outputs, got 'softmax'"):
        ensemble.get_preds(learn, activation="softmax")
    with pytest.raises(TypeError, match="norms must be True or False, got 0"), ensemble.averaged(learn, norms=0):
        pass


def test_another_average_of_the_learner_does_not_get_between():
    ensembles, preds, losses = [SnapshotEnsemble(), SnapshotEnsemble()], [], []
    for ensemble, others in zip(ensembles, ([], [EMA(0.9)]), strict=True):
        learn = classifier(callbacks=[*others, ensemble])
        learn.fit(0.3, 3, cycle_len=1)
        preds.append(ensemble.get_preds(learn)[0])
        with ensemble.averaged(learn):
            losses.append(learn.validate()["valid_loss"])
    assert torch.equal(*preds)
    assert losses[0] == losses[1]


def test_the_mean_of_the_weights_and_its_statistics():
    ensemble = SnapshotEnsemble()
    learn = classifier(ensemble)
    learn.fit(0.3, 3, cycle_len=1)
    learn.model.eval()
    before = everything(learn)
    snapshots = [weights for _, weights in ensemble.snapshots]
    for norms in (False, True):
        with ensemble.averaged(learn, norms=norms):
            inside = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
            linear, norm = learn.model[0], learn.model[1]
            assert not any(module.training for module in learn.model.modules())
            with torch.no_grad():
                outputs = [linear(x) for x, _ in learn.dls.train]
            losses = learn.validate()
        assert everything(learn) == before
        for name in ("0.weight", "1.bias", "3.weight"):
            torch.testing.assert_close(inside[name], torch.stack([w[name] for w in snapshots]).mean(0))
        averaged = torch.stack([w["1.running_mean"] for w in snapshots]).mean(0)
        new = torch.stack([x.mean(0) for x in outputs]).mean(0)
        torch.testing.assert_close(inside["1.running_mean"], new if norms else averaged)
        assert not torch.allclose(new, averaged)
        assert inside["1.num_batches_tracked"] == (8 if norms else 24)
        assert losses["valid_loss"] != learn.validate()["valid_loss"]
        assert norm.momentum == 0.1


def test_the_weights_come_back_after_an_error():
    ensemble = SnapshotEnsemble()
    learn = classifier(ensemble)
    learn.fit(0.3, 3, cycle_len=1)
    before = everything(learn)
    with pytest.raises(ZeroDivisionError), ensemble.averaged(learn):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        ensemble.get_preds(learn, activation=lambda x: 1 / 0)
    learn.dls.valid = [(torch.ones(2, 9), torch.zeros(2).long())]
    with pytest.raises(RuntimeError):
        ensemble.get_preds(learn)
    learn.dls.valid = classes(2, seed=1)
    after = everything(learn)
    assert {key for key in before if before[key] != after[key]} == set()


def test_beside_other_averages_in_one_fit():
    ensemble, ema, swa = SnapshotEnsemble(), EMA(0.5), SWA(0, apply=False, in_validation=False)
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1, callbacks=[ema, swa]))
    assert steps_of(ensemble, learn) == [14, 29, 44]
    torch.testing.assert_close(swa.averages["weight"], sum(w["weight"] for _, w in ensemble.snapshots) / 3)


def test_settings():
    assert repr(eval(repr(SnapshotEnsemble(3)))) == "SnapshotEnsemble(keep=3)"
    with pytest.raises(ValueError, match=r"keep must be an int >= 1, got 0 \(int\). Pass e.g. SnapshotEnsemble"):
        SnapshotEnsemble(0)


@ignore_short_cycles
@pytest.mark.parametrize("n", [1, 2, 3])
def test_cycles_of_a_single_step(n):
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1, use_clr=(32, 5)), n)
    assert steps_of(ensemble, learn) == list(np.cumsum([n] * 3) - 1)




def test_a_fit_that_is_limited_in_time(monkeypatch):
    from minifast.schedules import time_limit as budget

    now = itertools.count()
    monkeypatch.setattr(budget.time, "monotonic", lambda: float(next(now)))  # one second per batch
    ensemble = SnapshotEnsemble()
    learn = fit(ensemble, lambda learn: learn.fit(0.1, 3, cycle_len=1, minutes=30 / 60))
    assert steps_of(ensemble, learn) == [10, 20, 30]  # the first after a third, two thirds and all of the time


def test_a_partial_of_cross_entropy_is_cross_entropy():
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    preds = []
    for loss_func in (nn.CrossEntropyLoss(label_smoothing=0.1), partial(F.cross_entropy, label_smoothing=0.1)):
        torch.manual_seed(0)
        ensemble = SnapshotEnsemble()
        learn = learner([(x, y)] * 4, [(x, y)], model=nn.Linear(4, 3), loss_func=loss_func)
        learn.fit(0.5, 3, cycle_len=1, callbacks=[ensemble])
        preds.append(ensemble.get_preds(learn)[0])
    torch.testing.assert_close(preds[1], preds[0])


def test_a_model_is_no_learner():
    ensemble = SnapshotEnsemble()
    with pytest.raises(TypeError, match=r"learn must be the Learner, got a Linear: pass learn, not learn\.model"):
        ensemble.get_preds(nn.Linear(1, 1))
