"""What a schedule shows without training is, to the last bit, what a fit then does; and the shapes keep their word."""
import copy
import dataclasses
import itertools
import math
import pickle
import re
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from helpers import batches, learner, spying
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minifast
from minifast import (
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


def rising(step, n_steps):
    return schedules.linear(step, n_steps, 0.8, 0.9)


SCHEDULES = [
    ConstantLR(), LinearLR(), LinearLR(0.1, 1.0), ExponentialLR(), PolynomialLR(power=0.9), FlatCos(), FlatCos(0.0, 10),
    CircularLR(32, 5), CircularLR(10, 10, n_cycles=2, moms=(0.95, 0.85)), CircularLR(4, 2, n_cycles=3, cycle_mult=2),
    CircularLRBeta(), CircularLRBeta(10, 20, n_cycles=2, cycle_mult=3, moms=(0.95, 0.85)),
    OneCycle(), OneCycle(0.3), OneCycle(slice(1e-4, 0.1), 10, 0.25, final_div=100, moms=(0.9, 0.8, 0.85)),
    OneCycle(moms=None), OneCycle(pct_start=0), OneCycle(pct_start=1),
    CosineAnnealing(), CosineAnnealing(3, 2), CosineAnnealing(n_cycles=4, warmup_frac=0),
    PiecewiseLR([(0.2, LinearLR(0.1, 1.0)), (0.8, CosineAnnealing(warmup_frac=0))]),
    PiecewiseLR([(0.35, CircularLR(moms=(0.9, 0.8))), (0.65, OneCycle())]),
    Schedule("lr", schedules.linear), Schedule({"lr": schedules.cosine, "momentum": rising}),
]  # fmt: skip
NAMES = [type(schedule).__name__ for schedule in SCHEDULES]
IDS = [re.sub(r"<function (\w+) at \w+>", r"\1", repr(schedule)) for schedule in SCHEDULES]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
ignore_short_cycles = pytest.mark.filterwarnings("ignore:a cycle of .* steps is shorter than cut_div")
OPTIMIZERS = {"SGD": partial(spying(torch.optim.SGD), momentum=0.9), "AdamW": spying(torch.optim.AdamW)}


def make(n_batches=5, groups=1, optimizer="AdamW", **options):
    """A learner whose layer groups are single weights, so that each is one of the optimizer's param_groups."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(groups)), nn.Linear(3, 1, bias=False))
    splitter = (lambda model: [*model[:-2], [model[-2], model[-1]]]) if groups > 1 else None
    return learner(batches(n_batches), **{"model": model, "splitter": splitter, "opt_func": OPTIMIZERS[optimizer]}
                   | options)


def done(learn):
    """What the optimizer held at each step of the newest fit: lrs (steps, groups), momentums (steps,)."""
    seen = learn.opt.seen
    return [note["lrs"] for note in seen], [note["betas"][0] if "betas" in note else note["momentum"] for note in seen]


def agrees(learn, plan, momentum=0.9):
    """Whether the fit that ran did what `plan` says, to the last bit; what is not scheduled stays as it was."""
    lrs, moms = done(learn)
    assert plan.values["lr"].tolist() == lrs
    assert plan.values.get("momentum", np.full(len(lrs), momentum)).tolist() == moms
    assert learn.recorder.lr_groups.tolist() == lrs, "and the Recorder saw it"
    assert learn.recorder.moms.tolist() == moms


# ---- the preview is the fit


@pytest.mark.table
@every_schedule
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("n_epochs", "n_batches"), [(3, 7), (1, 1), (2, 5)])
@ignore_short_cycles
def test_values_are_what_a_fit_does(schedule, optimizer, n_epochs, n_batches):
    learn = make(n_batches, optimizer=optimizer)
    learn.fit(0.07, n_epochs, callbacks=[schedule])
    lrs, moms = done(learn)
    values = schedule.values(n_epochs * n_batches, None if schedule.max_lr else 0.07)
    assert [[lr] for lr in values["lr"]] == lrs
    assert values.get("momentum", [0.9] * len(moms)) == moms


@pytest.mark.table
@every_schedule
@ignore_short_cycles
def test_the_plan_is_what_a_fit_does_to_three_groups(schedule):
    learn = make(5, groups=3)
    plan = learn.plan(2, schedule, lr=slice(1e-4, 0.07))
    assert len(learn.opt.seen) == 0
    learn.fit(slice(1e-4, 0.07), 2, callbacks=[schedule])
    agrees(learn, plan)
    assert plan.group_names == ("group 0", "group 1", "group 2")
    assert plan.n_steps == 10


@pytest.mark.table
@pytest.mark.parametrize(("fit", "n_epochs", "schedule"), [
    (lambda learn: learn.fit(0.1, 3), 3, None),
    (lambda learn: learn.fit(0.1, 3, cycle_len=1, cycle_mult=2), 7, CosineAnnealing(3, 2)),
    (lambda learn: learn.fit(0.1, 2, cycle_len=2), 4, CosineAnnealing(2)),
    (lambda learn: learn.fit(0.1, 1, cycle_len=3, use_clr=(32, 5)), 3, CircularLR(32, 5)),
    (lambda learn: learn.fit(0.1, 2, cycle_len=1, cycle_mult=3, use_clr=(8, 2, 0.95, 0.85)), 4,
     CircularLR(8, 2, n_cycles=2, cycle_mult=3, moms=(0.95, 0.85))),
    (lambda learn: learn.fit(0.1, 2, cycle_len=2, use_clr_beta=(10, 15, 0.9, 0.8)), 4,
     CircularLRBeta(10, 15, n_cycles=2, moms=(0.9, 0.8))),
    (lambda learn: learn.fit_one_cycle(3, 0.1), 3, OneCycle()),
    (lambda learn: learn.fit_one_cycle(cyc_len=3, lr_max=0.1, div_factor=10., pct_start=0.2, final_div=50, moms=None),
     3, OneCycle(None, 10., 0.2, final_div=50, moms=None)),
    (lambda learn: learn.fit_flat_cos(3, 0.1, pct_start=0.5), 3, FlatCos(0.5)),
    (lambda learn: learn.fit_sgdr(2, 1, 0.1), 3, CosineAnnealing(2, 2, warmup_frac=0)),
])  # fmt: skip
def test_every_fit_has_its_plan(fit, n_epochs, schedule):
    learn = make(7, groups=3)
    plan = learn.plan(n_epochs, schedule, lr=0.1)
    fit(learn)
    agrees(learn, plan)


def test_a_plan_counts_updates_as_the_fit_does():
    learn = make(7)
    options = {"steps_per_epoch": 3, "accumulate": 2}
    plan = learn.plan(2, OneCycle(0.1), **options)
    learn.fit(0.1, 2, callbacks=[OneCycle()], **options)
    assert (plan.n_epochs, plan.steps_per_epoch, plan.n_steps) == (2, 3, 6)
    agrees(learn, plan)


def test_a_plan_is_no_training():
    learn = make(5, groups=3)
    before = [p.clone() for p in learn.model.parameters()], torch.get_rng_state()
    learn.plan(2, OneCycle(0.1))
    assert all(map(torch.equal, learn.model.parameters(), before[0]))
    assert torch.equal(torch.get_rng_state(), before[1])
    assert len(learn.recorder.lrs) == 0


def test_weight_decay_is_a_fraction_of_each_groups_own_and_momentum_a_value():
    learn = learner(batches(4), opt_func=partial(spying(torch.optim.AdamW), weight_decay=0.3))
    schedule = Schedule({"weight_decay": schedules.cosine, "momentum": partial(schedules.linear, start=0.5, end=0.7)})
    plan = learn.plan(1, schedule)
    learn.fit(0.1, callbacks=[schedule], wd=0.2)
    shares = schedule.values(4)["weight_decay"]
    assert plan.values["weight_decay"].tolist() == shares
    assert [group["weight_decay"] for group in learn.opt.param_groups] == [0.3, 0.0], "restored; none on biases"
    assert [note["betas"][0] for note in learn.opt.seen] == plan.values["momentum"].tolist() == pytest.approx(
        [0.5, 0.55, 0.6, 0.65])
    assert [note["weight_decay"] for note in learn.opt.seen] == [0.0] * 4, "of the biases, the last param_group"


def test_scheduled_weight_decay_reaches_the_weights():
    learn = make(4)
    learn.fit(0.1, callbacks=[Schedule("weight_decay", schedules.cosine)], wd=0.2)
    assert [note["weight_decay"] for note in learn.opt.seen] == [0.2 * share for share in
                                                                 Schedule("weight_decay", schedules.cosine)
                                                                 .values(4)["weight_decay"]]
    assert [note["lrs"] for note in learn.opt.seen] == [[0.1]] * 4, "the learning rate has no owner: constant"


def test_any_hyper_parameter_of_the_optimizer_can_be_scheduled():
    learn = make(3)
    learn.fit(0.1, callbacks=[Schedule({"eps": lambda step, n_steps: 10.0 ** -step})])
    assert [note["eps"] for note in learn.opt.seen] == [1.0, 0.1, 0.01]
    assert learn.opt.param_groups[0]["eps"] == 1e-8


# ---- the peak


@pytest.mark.parametrize(("schedule", "peak", "highest"), [
    (OneCycle(), None, 1.0), (OneCycle(0.3), None, 0.3), (OneCycle(0.3), 2.0, 2.0), (OneCycle(), 0.05, 0.05),
    (OneCycle(slice(1e-4, 0.1)), None, 0.1), (OneCycle([0.3, 0.2]), None, 0.2), (FlatCos(), 0.5, 0.5),
])  # fmt: skip
def test_the_peak_is_the_schedules_own_else_one(schedule, peak, highest):
    assert max(schedule.values(100, peak)["lr"]) == highest
    assert max(row["lr"] for row in schedule.table(100, 1, peak)) == highest


@pytest.mark.parametrize(("max_lr", "given", "peaks"), [
    (None, 0.2, [0.2, 0.2, 0.2]), (0.1, 0.2, [0.1, 0.1, 0.1]), (slice(1e-3, 0.1), 0.2, [1e-3, 0.01, 0.1]),
    (None, slice(0.1), [0.01, 0.01, 0.1]), ([0.1, 0.2, 0.3], 5.0, [0.1, 0.2, 0.3]), (None, None, [1e-3] * 3),
])  # fmt: skip
def test_a_schedules_own_peak_comes_before_the_fits(max_lr, given, peaks):
    learn, schedule = make(10, groups=3), OneCycle(max_lr)
    plan = learn.plan(1, schedule, lr=given)
    assert plan.values["lr"].max(axis=0).tolist() == pytest.approx(peaks, rel=1e-12)
    learn.fit(learn.lr if given is None else given, callbacks=[schedule])
    agrees(learn, plan)


# ---- tables and plots


def test_the_table_answers_what_people_ask():
    """fit_one_cycle(10, 0.1), 100 batches an epoch: the learning rate at the first batch of each epoch."""
    table = OneCycle(0.1).table(10, 100)
    assert [row["epoch"] for row in table] == list(range(10))
    assert [row["step"] for row in table] == list(range(0, 1000, 100))
    assert [round(row["lr"], 4) for row in table] == [.004, .028, .076, .1, .095, .0812, .0611, .0389, .0188, .005]
    assert [round(row["momentum"], 3) for row in table] == [.95, .925, .875, .85, .855, .869, .889, .911, .931, .945]
    lines = str(table).splitlines()
    assert lines[0] == "epoch  step      lr  momentum"
    assert lines[4] == "    3   300  0.1000    0.8500"
    assert len({len(line) for line in lines}) == 1, "aligned"


@pytest.mark.table
@every_schedule
@ignore_short_cycles
def test_tables_and_plots_are_the_values(schedule):
    values = schedule.values(12)
    assert list(values) == list(schedule.owns)
    for epoch, row in enumerate(schedule.table(4, 3)):
        assert row == {"epoch": epoch, "step": 3 * epoch} | {hyper: values[hyper][3 * epoch] for hyper in values}
    ax = schedule.plot(12)
    drawn = [line.get_ydata().tolist() for axes in ax.figure.axes for line in axes.get_lines()]
    assert drawn == list(values.values())
    assert ax.get_title().replace("\n", " ") == " ".join(repr(schedule).split())


def test_the_table_of_a_plan_names_the_groups_and_ends_with_the_last_step():
    learn = make(5, groups=3, splitter={"body": "0.*", "neck": "1.*", "head": ["2.*", "3.*"]})
    plan = learn.plan(2, OneCycle(slice(1e-3, 1e-1)))
    table = plan.table()
    assert [list(row) for row in table] == [["epoch", "step", "lr body", "lr neck", "lr head", "momentum"]] * 3
    assert [(row["epoch"], row["step"]) for row in table] == [(0, 0), (1, 5), (1, 9)]
    assert table[2]["lr head"] == plan.values["lr"][9, 2]
    text = str(plan)
    assert text.startswith("OneCycle(max_lr=slice(0.001, 0.1, None), ")
    assert "2 epochs of 5 steps = 10 weight updates; first step of each epoch, and the last\n" in text
    assert text.endswith(str(table))
    ax = plan.plot()
    assert [line.get_label() for line in ax.get_lines()] == [f"learning rate, {name}" for name in plan.group_names]
    assert np.array_equal(np.column_stack([line.get_ydata() for line in ax.get_lines()]), plan.values["lr"])


def test_a_plan_of_single_steps_lists_each_once():
    assert [row["step"] for row in make(1).plan(3).table()] == [0, 1, 2]


def test_a_plan_without_a_schedule_is_constant():
    assert make(2, groups=3).plan(1, lr=slice(0.1)).values["lr"].tolist() == [[0.1 / 10, 0.1 / 10, 0.1]] * 2


# ---- frozen dataclasses


@pytest.mark.table
@pytest.mark.parametrize("schedule", [one for one in SCHEDULES if not isinstance(one, Schedule)], ids=repr)
def test_repr_rebuilds_it(schedule):
    """But for `Schedule`, which is made of functions."""
    rebuilt = eval(repr(schedule), vars(minifast))
    assert rebuilt == schedule
    assert repr(rebuilt) == repr(schedule)
    assert rebuilt.owns == schedule.owns


@pytest.mark.table
@every_schedule
def test_it_is_frozen_and_can_be_copied(schedule):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, [*vars(schedule), "peak"][0], 1)
    for twin in (copy.copy(schedule), pickle.loads(pickle.dumps(schedule)), dataclasses.replace(schedule)):
        assert twin == schedule
        assert twin.owns == schedule.owns
        assert twin.values(40) == schedule.values(40)


@pytest.mark.parametrize(("one", "other"), [
    (OneCycle(0.1), OneCycle(0.2)), (OneCycle(moms=None), OneCycle()), (CircularLR(32, 5), CircularLR(32, 6)),
    (CircularLR(), CircularLRBeta()), (ConstantLR(), LinearLR()), (CosineAnnealing(2), CosineAnnealing(3)),
    (PiecewiseLR([(1, FlatCos())]), PiecewiseLR([(1, FlatCos(0.5))])),
    (Schedule("lr", schedules.linear), Schedule("lr", schedules.cosine)),
])  # fmt: skip
def test_equality(one, other):
    assert one == copy.deepcopy(one)
    assert one != other


def test_forms_that_mean_the_same_are_equal():
    assert OneCycle([0.1, 0.2]) == OneCycle((0.1, 0.2)) == OneCycle(np.array([0.1, 0.2]))
    assert OneCycle(moms=[0.95, 0.85]) == OneCycle()
    assert OneCycle(moms=0.9).values(5)["momentum"] == pytest.approx([0.9] * 5)
    assert Schedule("lr", schedules.linear) == Schedule({"lr": schedules.linear})
    assert PiecewiseLR([(1, FlatCos())]) == PiecewiseLR(((1, FlatCos()),))


def test_the_callers_dict_and_list_stay_theirs():
    shapes, pieces = {"lr": schedules.linear}, [(1, FlatCos())]
    schedule, piecewise = Schedule(shapes), PiecewiseLR(pieces)
    shapes["lr"] = schedules.cosine
    pieces.append(None)
    assert schedule == Schedule("lr", schedules.linear)
    assert piecewise == PiecewiseLR([(1, FlatCos())])


def test_every_public_schedule_is_in_the_list():
    public = [name for name in minifast.__all__ if isinstance(getattr(minifast, name), type)
              and issubclass(getattr(minifast, name), minifast.Scheduler)]  # fmt: skip
    assert set(NAMES) == set(public) - {"Scheduler"}


# ---- the shapes: bounds, ends, the peak

steps = st.integers(1, 300)
shares = st.floats(0, 1)
ratios = st.floats(1.01, 1e4)
momentums = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))
quick = settings(max_examples=60)


def within(values, low, high):
    return all(low * (1 - 1e-12) <= value <= high * (1 + 1e-12) for value in values)


@pytest.mark.case("A5")
@quick
@given(steps, ratios, shares, ratios, momentums)
def test_one_cycle_hits_its_peak_once_and_exactly(n, div, pct, final_div, moms):
    values = OneCycle(None, div, pct, final_div=final_div, moms=moms).values(n)
    top = max(1, math.floor(Fraction(pct) * n + Fraction(1, 10**9)))
    assert within(values["lr"], min(1 / div, 1 / final_div), 1)
    assert within(values["momentum"], *sorted(moms))
    assert values["lr"][0] == 1 / div
    assert values["momentum"][0] == moms[0]
    assert [step for step, lr in enumerate(values["lr"]) if lr == 1] == [top][: top < n]
    assert values["momentum"][top:top + 1] == [moms[1]][: top < n], "to the last bit, as the peak"
    assert values["lr"][: top + 1] == sorted(values["lr"][: top + 1])
    assert values["lr"][top:] == sorted(values["lr"][top:], reverse=True)
    assert n <= top or values["lr"][-1] > 1 / final_div, "the end is approached and not reached"


def cycle_starts(n, n_cycles, cycle_mult):
    total = sum(cycle_mult**c for c in range(n_cycles))
    return [n * sum(cycle_mult**j for j in range(c)) // total for c in range(n_cycles + 1)]


cycles = st.tuples(st.integers(1, 4), st.integers(1, 3))


@quick
@given(steps, ratios, st.floats(1, 20), cycles)
@ignore_short_cycles
def test_circular_hits_its_peak_once_in_each_cycle(n, div, cut_div, many):
    schedule = CircularLR(div, cut_div, n_cycles=many[0], cycle_mult=many[1], moms=(0.95, 0.85))
    values, starts = schedule.values(n), cycle_starts(n, *many)
    assert within(values["lr"], 1 / div, 1)
    assert within(values["momentum"], 0.85, 0.95)
    for start, end in itertools.pairwise(starts):
        length, of_cycle = end - start, values["lr"][start:end]
        rise = min(max(1, int(length // cut_div)), length)
        if length:
            assert of_cycle[0] == pytest.approx(1 / div, rel=1e-12)
        assert [step for step, lr in enumerate(of_cycle) if lr == 1] == [rise][: rise < length]
        for lr, mom in zip(of_cycle, values["momentum"][start:end], strict=True):
            position = (lr * div - 1) / (div - 1)
            assert mom == pytest.approx(0.95 - 0.1 * position, abs=1e-8), "the momentum stands where the rate does"


@quick
@given(steps, ratios, st.floats(0, 100), cycles)
def test_circular_beta_is_a_triangle_and_a_tail(n, div, pct, many):
    schedule = CircularLRBeta(div, pct, n_cycles=many[0], cycle_mult=many[1], moms=(0.95, 0.85))
    values = schedule.values(n)
    assert within(values["lr"], 1 / (100 * div), 1)
    assert within(values["momentum"], 0.85, 0.95)
    for start, end in itertools.pairwise(cycle_starts(n, *many)):
        half = max(1, int((end - start) * (1 - pct / 100) / 2))
        triangle = [1 - abs(step - half) / half if step <= 2 * half else 0 for step in range(end - start)]
        assert values["momentum"][start:end] == pytest.approx([0.95 - 0.1 * position for position in triangle])
        assert [step for step, lr in enumerate(values["lr"][start:end]) if lr == 1] == [half][: half < end - start]


@quick
@given(steps, cycles, st.floats(0, 0.5))
def test_cosine_annealing_begins_each_cycle_at_the_peak(n, many, warmup):
    lrs = CosineAnnealing(*many, warmup_frac=warmup).values(n)["lr"]
    assert within(lrs, 0, 1)
    cycles = [lrs[start:end] for start, end in itertools.pairwise(cycle_starts(n, *many)) if end > start]
    n_warm = math.ceil(warmup * len(cycles[0]))
    assert cycles[0][:n_warm] == [0.01] * n_warm
    assert all(cycle[0] == 1 for cycle in (cycles[1:] if n_warm else cycles))
    assert all(cycle == sorted(cycle, reverse=True) for cycle in [cycles[0][n_warm:], *cycles[1:]])


@quick
@given(steps, shares, ratios)
def test_flat_cos_is_flat_and_then_falls(n, pct, div_final):
    lrs = FlatCos(pct, div_final).values(n)["lr"]
    assert within(lrs, 1 / div_final, 1)
    assert lrs == sorted(lrs, reverse=True)
    assert all(lr == 1 for step, lr in enumerate(lrs) if step / n <= pct)


@quick
@given(steps, st.floats(0.01, 3), st.floats(0.01, 3), st.floats(0.1, 5))
def test_lines_and_powers_stay_between_their_ends(n, start, end, power):
    for schedule in (LinearLR(start, end), PolynomialLR(start, end, power), ExponentialLR(start, end)):
        lrs = schedule.values(n)["lr"]
        assert lrs[0] == pytest.approx(start, rel=1e-12)
        assert within(lrs, min(start, end), max(start, end))
        assert all((b - a) * (end - start) >= -1e-12 for a, b in itertools.pairwise(lrs)), "it never turns"


@quick
@given(steps, st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_pieces_follow_each_other_and_count_from_zero(n, weights):
    pieces = [(weight / sum(weights), LinearLR(1.0 + i, 2.0 + i)) for i, weight in enumerate(weights)]
    lrs = PiecewiseLR(pieces).values(n)["lr"]
    ends = [math.floor(Fraction(sum(weights[: i + 1]), sum(weights)) * n) for i in range(len(weights))]
    for i, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        assert lrs[start:end] == pieces[i][1].values(end - start)["lr"] if end > start else True


@pytest.mark.parametrize("n_steps", [1, 2, 9, 99])
def test_too_short_cycles_are_said(n_steps):
    with pytest.warns(UserWarning, match=rf"a cycle of {n_steps} steps is shorter than cut_div=100: its rise"):
        CircularLR(10, 100).values(n_steps)
    with pytest.warns(UserWarning, match=rf"a cycle of {n_steps} steps"):
        make(n_steps).fit(0.1, callbacks=[CircularLR(10, 100)])
    CircularLR(10, 100).values(100)
