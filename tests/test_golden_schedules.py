"""What the optimizer holds at every step of a fit, against what fastai's held in the same fit.

Observed from below: the optimizer itself writes down its param_groups when it steps.
"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from golden_data import floats, load, params
from torch import nn

from minifast import Learner, Schedule, schedules

EXACT = {"rel": 1e-12, "abs": 1e-15}  # float64 there and here; the last bits depend on the order of operations
FLOAT32 = {"rel": 1e-6, "abs": 1e-9}  # fastai 2 computes the shapes in float32
DRIFT = {"rel": 1e-6, "abs": 3e-8}  # ... and adds up its progress: at the foot of a cycle with peak 0.1 that is seen
OPTIMIZERS = {"SGD": partial(torch.optim.SGD, momentum=0.9), "AdamW": torch.optim.AdamW}


def spy(opt_func):
    """`opt_func` as one that appends a row (lr of each layer group, momentum, layer groups with gradients) per step."""
    base, options = (opt_func.func, opt_func.keywords) if isinstance(opt_func, partial) else (opt_func, {})
    rows = []

    class Spy(base):
        def step(self, closure=None):
            lrs, moms, moved = {}, set(), set()
            for group in self.param_groups:
                assert lrs.setdefault(group["layer_group"], group["lr"]) == group["lr"], "two rates in a layer group"
                moms.add(group["betas"][0] if "betas" in group else group["momentum"])
                if any(p.grad is not None for p in group["params"]):
                    moved.add(group["layer_group"])
            assert len(moms) == 1, "two momentums in one step"
            rows.append(([lrs[i] for i in range(len(lrs))], moms.pop(), moved))
            return super().step(closure)

    return partial(Spy, **options), rows


def run(fit, *, batches=4, groups=1, optimizer="AdamW", losses=None):
    """Run `fit(learn)` on a tiny model: lrs (steps, groups), momentums (steps,), groups that moved, and the learner.

    losses: the loss of each batch, one after the other; None: all are 0.
    """
    opt_func, rows = spy(OPTIMIZERS.get(optimizer, optimizer))
    values = itertools.repeat(0.0) if losses is None else iter(losses)
    batch = (torch.ones(2, 1), torch.ones(2, 1))
    learn = Learner(
        nn.Sequential(*(nn.Linear(1, 1) for _ in range(groups))),
        ([batch] * batches, None),
        lambda pred, target: (pred * 0).sum() + next(values),
        opt_func=opt_func,
        splitter=list if groups > 1 else None,
        device="cpu",
        verbose=False,
    )
    before = [dict(group, params=None, lr=None) for group in learn.opt.param_groups]
    fit(learn)
    assert [dict(group, params=None, lr=None) for group in learn.opt.param_groups] == before, "a hyper-parameter leaks"
    lrs, moms, moved = zip(*rows, strict=True)
    return np.array(lrs), np.array(moms), moved, learn


def lr_of(value):
    return slice(*value["slice"]) if isinstance(value, dict) else value


def options_of(config, *names):
    return {name: config[name] for name in names if name in config}


def n_cycles(n_steps, first, cycle_mult):
    """How many cycles, the first `first` steps long, make `n_steps`."""
    return next(n for n in itertools.count(1) if sum(first * cycle_mult**c for c in range(n)) == n_steps)


def check_circular(recording, optimizer, batches, fit):
    lrs, moms, _, learn = run(fit, batches=batches, optimizer=optimizer, groups=len(recording["lr"][0]))
    assert lrs == pytest.approx(floats(recording["lr"]), **EXACT)
    expected = floats(recording.get("momentum") or [0.9] * len(lrs))
    if len(set(expected)) > 1:  # 0.7 writes the momentum of the step that follows, at the end that of the next cycle
        expected = np.roll(expected, 1)
    assert moms == pytest.approx(expected, **EXACT)
    return learn


CALLS = {  # of the two whole fits: cycle_len and use_clr
    "learn.fit(0.01, 1, cycle_len=10, use_clr=(20,10))": (10, (20, 10)),
    "learn.fit(lr, 1, cycle_len=3, use_clr=(32,5))": (3, (32, 5)),
}


@pytest.mark.table
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", params("circular"))
def test_circular_lr(recording, optimizer):
    config = recording["config"]
    if "call" in config:
        batches, (cycle_len, clr) = config["batches_per_epoch"], CALLS[config["call"]]
        check_circular(recording, optimizer, batches, partial(Learner.fit, lr=0.01, cycle_len=cycle_len, use_clr=clr))
        return
    batches, clr = config["nb"], (config["div"], config["cut_div"], *(config["momentums"] or ()))
    cycles = config["n_iter"] // batches
    fit = partial(Learner.fit, lr=config["lrs"], n_cycle=cycles, cycle_len=1, use_clr=clr)
    check_circular(recording, optimizer, batches, fit)


@pytest.mark.table
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", params("circular_beta"))
def test_circular_lr_beta(recording, optimizer):
    config = recording["config"]
    batches, clr = config["nb"], (config["div"], config["pct"], *config["momentums"])
    cycles = config["n_iter"] // batches
    fit = partial(Learner.fit, lr=config["lrs"], n_cycle=cycles, cycle_len=1, use_clr_beta=clr)
    check_circular(recording, optimizer, batches, fit)


@pytest.mark.table
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", params("cosine_annealing"))
def test_cosine_annealing(recording, optimizer):
    config = recording["config"]
    cycles = n_cycles(config["n_iter"], config["nb"], config["cycle_mult"])
    lrs, moms, _, _ = run(
        lambda learn: learn.fit(*config["lrs"], cycles, cycle_len=1, cycle_mult=config["cycle_mult"]),
        batches=config["nb"],
        optimizer=optimizer,
    )
    assert lrs == pytest.approx(floats(recording["lr"]), **EXACT)
    assert set(moms) == {0.9}


@pytest.mark.table
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", params("one_cycle"))
def test_one_cycle(recording, optimizer):
    config, golden = recording["config"], floats(recording["lr"])
    options = options_of(config, "div_factor", "pct_start", "final_div", "moms")
    cycle_len = config.get("tot_epochs") or config.get("cyc_len", 10)
    first = (config.get("start_epoch") or 0) * config["batches_per_epoch"]  # a resumed fit is recorded from there on
    lrs, moms, _, _ = run(
        lambda learn: learn.fit_one_cycle(cycle_len, lr_of(config.get("max_lr", 0.1)), **options),
        batches=config["batches_per_epoch"],
        groups=config["n_groups"],
        optimizer=optimizer,
    )
    part = slice(first, first + len(golden))
    assert lrs[part] == pytest.approx(golden, **EXACT)
    assert moms[part] == pytest.approx(floats(recording["momentum"]), **EXACT)
    assert len(lrs) == cycle_len * config["batches_per_epoch"]


@pytest.mark.table
@pytest.mark.parametrize("recording", params("one_cycle"))
def test_one_cycle_goes_where_fastai_left_it(recording):
    """fastai 1 writes one more step than it trains: the end of the curve, unless the fit was cut short."""
    config, golden, after = recording["config"], floats(recording["lr"]), recording["after"]
    per_epoch = config["batches_per_epoch"]
    n_steps = per_epoch * (config.get("tot_epochs") or config.get("cyc_len", 10))
    first = per_epoch * (config.get("start_epoch") or 0)
    curve = partial(schedules.one_cycle, n_steps=n_steps, **options_of(config, "div_factor", "pct_start", "final_div"))
    momentum = partial(schedules.one_cycle_momentum, n_steps=n_steps, **options_of(config, "pct_start", "moms"))
    peak, end = golden[0] / curve(first), first + len(golden)
    assert peak * curve(end) == pytest.approx(floats(after["lr"]), **EXACT)
    assert momentum(end) == pytest.approx(after["momentum"], **EXACT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", params("flat_cosine"))
def test_flat_cosine(recording, optimizer):
    config = recording["config"]
    lrs, moms, _, _ = run(
        lambda learn: learn.fit_flat_cos(
            config["n_epoch"], lr_of(config["lr"]), **options_of(config, "pct_start", "div_final")
        ),
        batches=config["batches_per_epoch"],
        groups=config["n_groups"],
        optimizer=optimizer,
    )
    assert lrs == pytest.approx(floats(recording["lr"]), **FLOAT32)
    assert set(moms) == {0.9}


MISSED_RESTARTS = {(3, 2, 2): [24], (6, 1, 2): [12, 28, 60, 124]}  # (n_cycles, cycle_len, cycle_mult): steps


@pytest.mark.table
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", params("sgdr"))
def test_sgdr(recording, optimizer):
    config, golden = recording["config"], floats(recording["lr"])
    cycles, cycle_len, cycle_mult = config["n_cycles"], config["cycle_len"], config["cycle_mult"]
    lrs, moms, _, _ = run(
        lambda learn: learn.fit_sgdr(cycles, cycle_len, lr_of(config["lr_max"]), cycle_mult=cycle_mult),
        batches=config["batches_per_epoch"],
        groups=config["n_groups"],
        optimizer=optimizer,
    )
    missed = MISSED_RESTARTS.get((cycles, cycle_len, cycle_mult), [])
    assert (golden[missed] < 1e-9).all()  # fastai 2 runs these as the end of the cycle before
    assert (lrs[missed] == 0.1).all()
    assert np.delete(lrs, missed, 0) == pytest.approx(np.delete(golden, missed, 0), **DRIFT)
    assert set(moms) == {0.9}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", params("fine_tune"))
def test_fine_tune(recording, optimizer):
    config, golden = recording["config"], floats(recording["lr"])
    options = options_of(config, "freeze_epochs", "lr_mult")
    lrs, moms, moved, _ = run(
        lambda learn: learn.fine_tune(config["epochs"], config["base_lr"], **options),
        batches=config["batches_per_epoch"],
        groups=config["n_groups"],
        optimizer=optimizer,
    )
    first = config["freeze_epochs"] * config["batches_per_epoch"]
    assert lrs.shape == golden.shape
    assert lrs / lrs[:, -1:] == pytest.approx(golden / golden[:, -1:], rel=1e-6)
    assert lrs[[0, first]] == pytest.approx(golden[[0, first]], **EXACT)
    assert moms[[0, first]] == pytest.approx([0.95, 0.95], **EXACT)
    assert all(groups == {2} for groups in moved[:first])
    assert all(groups == {0, 1, 2} for groups in moved[first:])
    # between the first steps the curve is fastai 1's, with the recorded peaks
    for part, options in ((slice(0, first), {"pct_start": 0.99}), (slice(first, None), {"div_factor": 5})):
        steps = range(len(lrs[part]))
        div = options.get("div_factor", 25)
        curve = floats([schedules.one_cycle(step, len(steps), **options) for step in steps])
        assert lrs[part] == pytest.approx(golden[part][0] * div * curve[:, None], **EXACT)


def test_fine_tune_rises_for_99_percent_of_the_frozen_steps():
    lrs, moms, _, _ = run(
        lambda learn: learn.fine_tune(1, 0.1), batches=30, groups=2
    )  # the recorded ones are too short
    assert (lrs[:30, -1].argmax(), moms[:30].argmin()) == (29, 29)
    assert (lrs[30:, -1].argmax(), moms[30:].argmin()) == (9, 9)


@pytest.mark.table
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", [p for p in params("fit") if "fit_opt_sched" not in p.id])
def test_fit(recording, optimizer):
    config = recording["config"]
    if config.get("opt") == "Adam(betas=(.7,.99))":
        optimizer = partial(OPTIMIZERS[optimizer], **({"betas": (0.7, 0.99)} if optimizer == "AdamW" else {}))
    lr = lr_of(config["lrs"] if "lrs" in config else config["lr"])
    epochs = config.get("n_cycle") or config.get("epochs") or config["n_epoch"]
    options = options_of(config, "cycle_len", "cycle_mult", "use_clr")
    fit = partial(Learner.fit, lr=lr, n_cycle=epochs, **options)
    learn = check_circular(recording, optimizer, config["batches_per_epoch"], fit)
    assert len(learn.recorder.epochs) * config["batches_per_epoch"] == len(recording["lr"])


def test_phases():
    recording = load("fit")["v07_fit_opt_sched"]

    def line_then_cosine(start, middle, end):
        line, cosine = (
            partial(schedules.linear, start=start, end=middle),
            partial(schedules.cosine, start=middle, end=end),
        )
        return partial(schedules.piecewise, pieces=[(1 / 3, line), (2 / 3, cosine)])

    shapes = {"lr": line_then_cosine(0.1, 1.0, 0.01), "momentum": line_then_cosine(0.95, 0.85, 0.95)}
    lrs, moms, _, _ = run(lambda learn: learn.fit(0.1, 3, callbacks=[Schedule(shapes)]), batches=6, optimizer="SGD")
    assert lrs == pytest.approx(floats(recording["lr"]), **EXACT)
    assert moms == pytest.approx(floats(recording["momentum"]), **EXACT)


@pytest.mark.table
@pytest.mark.parametrize(("call", "epochs"), load("sum_geom")["v07_sum_geom"]["results"].items())
def test_epochs_of_cycles(call, epochs):
    cycle_len, cycle_mult, cycles = (float(number) for number in call.split(","))
    if cycle_mult % 1:
        with pytest.raises(ValueError, match="cycle_mult"):
            run(lambda learn: learn.fit(0.1, int(cycles), cycle_len=int(cycle_len), cycle_mult=cycle_mult))
        return
    lrs, _, _, _ = run(
        lambda learn: learn.fit(0.1, int(cycles), cycle_len=int(cycle_len), cycle_mult=int(cycle_mult)), batches=1
    )
    assert len(lrs) == epochs


@pytest.mark.table
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recording", [p for p in params("lr_find") if "lr" in p.values[0]])
def test_lr_find(recording, optimizer):
    config = recording["config"]
    lrs, _, _, learn = run(
        lambda learn: learn.lr_find(**options_of(config, "start_lr", "end_lr", "num_it", "stop_div")),
        batches=config["batches_per_epoch"],
        groups=config["n_groups"],
        optimizer=optimizer,
        losses=recording["raw_losses"],  # one more batch than recorded would be an error
    )
    found = learn.recorder.lr_find
    assert lrs == pytest.approx(floats(recording["lr"]), **EXACT)
    assert (found.lrs == lrs[:, -1]).all()
    assert (found.losses == floats(recording["raw_losses"])).all()
    assert found.smooth_losses == pytest.approx(floats(recording["recorder_losses"]), rel=1e-5)
    assert (found.stopped == "the loss diverged") is (len(lrs) < config["num_it"])


@pytest.mark.parametrize("recording", [p for p in params("lr_find") if "batches_run" in p.values[0]])
def test_lr_find_stops_at_a_loss_that_is_not_finite(recording):
    bad = recording["config"]["loss"].split()[0]
    lrs, _, _, learn = run(
        lambda learn: learn.lr_find(num_it=recording["config"]["num_it"]),
        batches=recording["config"]["batches_per_epoch"],
        losses=[1.0] * 40 + [float(bad)] * 60,
    )
    assert len(lrs) == recording["batches_run"]
    assert len(learn.recorder.lr_find.lrs) == recording["recorded"]
    assert bad in learn.recorder.lr_find.stopped


@pytest.mark.parametrize("level", [1.0, -1.0])
@pytest.mark.parametrize("spike", [0, 4])
def test_lr_find_stops_once_the_loss_is_three_times_its_best_above_it(level, spike):
    losses = [level] * 20 + [level + 0.25 * i for i in range(80)]
    losses[1:6] = [level + spike] * 5  # before a tenth of num_it nothing counts
    weights = 0.98 ** np.arange(100)[::-1]
    smooth = np.array([losses[:i] @ weights[-i:] / weights[-i:].sum() for i in range(1, 101)])
    over = smooth > np.minimum.accumulate(smooth) + 3 * abs(np.minimum.accumulate(smooth))
    expected = 10 + int(over[10:].argmax())
    lrs, _, _, learn = run(lambda learn: learn.lr_find(), losses=losses)
    assert over[expected]
    assert over[:10].any() == (spike > 0)
    assert len(lrs) == expected + 1
    assert learn.recorder.lr_find.stopped == "the loss diverged"


@pytest.mark.parametrize("recording", params("smoothing"))
def test_smoothed_losses(recording):
    config = recording["config"]
    epochs = config.get("epochs", 1)  # the average goes on from epoch to epoch
    *_, learn = run(
        lambda learn: learn.fit(0.1, epochs), batches=len(recording["raw"]) // epochs, losses=recording["raw"]
    )
    assert learn.recorder.smooth_losses == pytest.approx(floats(recording["smoothed"]), rel=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recorder_has_what_the_optimizer_had(optimizer):
    lrs, moms, _, learn = run(
        lambda learn: learn.fit_one_cycle(3, slice(1e-4, 1e-2)), batches=7, groups=3, optimizer=optimizer
    )
    assert (learn.recorder.lr_groups == lrs).all()
    assert (learn.recorder.lrs == lrs[:, -1]).all()
    assert (learn.recorder.moms == moms).all()
