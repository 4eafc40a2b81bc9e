"""lr_find and sandbox leave no trace: however they end, everything is bit for bit what it was."""

import math
import os
import random
import tempfile
from functools import partial

import numpy as np
import pytest
import torch
from helpers import At, Trace, batches, bits, everything, learner, rngs, spying, throw, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from minifast import CancelFit, CircularLR, LRFinder, OneCycle, TensorLoader

OPTIMIZERS = {"SGD": partial(spying(), momentum=0.9), "AdamW": spying(torch.optim.AdamW)}


class Noise(nn.Module):
    """Draws from every global generator, and changes buffers: one in place, one by putting another tensor there."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("table", torch.zeros(1).expand(4))  # one element of memory: it cannot be written in place
        self.register_buffer("nothing", None)
        self.seen_object = self.seen

    def forward(self, x):
        if self.training:
            self.seen += len(x)
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x + 0.1 * (torch.randn_like(x) + random.random() + np.random.rand())


def noisy_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), Noise(), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))


class NoisyData(Dataset):
    """Samples that differ each time they are drawn."""

    def __init__(self, generator=None):
        self.generator = generator

    def __len__(self):
        return 24

    def __getitem__(self, i):
        noise = torch.randn(3) + random.random() + np.random.rand()
        if self.generator is not None:
            noise += self.generator.random()
        return noise + i / 24, torch.tensor([i / 24])


def seed(value=0):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def torch_generator():
    return torch.Generator().manual_seed(3)


def tensor_loader(**options):
    x, y = batches(1, 24)[0]
    return TensorLoader(x, y, batch_size=4, shuffle=True, **options)


def data_loader(data=None, **options):
    workers = {"num_workers": 2, "multiprocessing_context": "fork"} if options.pop("workers", False) else {}
    return DataLoader(data or NoisyData(), **({"batch_size": 4} | workers | options))


def batch_sampler():
    return torch.utils.data.BatchSampler(RandomSampler(NoisyData(), generator=torch_generator()), 4, drop_last=False)


LOADERS = {
    "list": lambda: batches(6),
    "TensorLoader": tensor_loader,
    "TensorLoader, generator": lambda: tensor_loader(generator=torch_generator()),
    "DataLoader": lambda: data_loader(shuffle=True),
    "DataLoader, generator": lambda: data_loader(shuffle=True, generator=torch_generator()),
    "DataLoader, sampler with generator": lambda: data_loader(
        sampler=RandomSampler(NoisyData(), generator=torch_generator())
    ),
    "DataLoader, weighted sampler": lambda: data_loader(
        sampler=WeightedRandomSampler([1.0, 2.0] * 12, 24, generator=torch_generator())
    ),
    "DataLoader, batch sampler with generator": lambda: data_loader(batch_sampler=batch_sampler(), batch_size=1),
    "DataLoader, data with numpy generator": lambda: data_loader(NoisyData(np.random.default_rng(3)), shuffle=True),
    "DataLoader, data with Python generator": lambda: data_loader(NoisyData(random.Random(3)), shuffle=True),
    "2 workers": lambda: data_loader(shuffle=True, workers=True),
    "2 workers, generator": lambda: data_loader(shuffle=True, workers=True, generator=torch_generator()),
    "2 persistent workers": lambda: data_loader(shuffle=True, workers=True, persistent_workers=True),
    "2 persistent workers, generator": lambda: data_loader(
        shuffle=True, workers=True, persistent_workers=True, generator=torch_generator()
    ),
}
WITHOUT_WORKERS = [name for name in LOADERS if "workers" not in name]
WITH_WORKERS = [
    pytest.param(name, marks=[pytest.mark.slow if name == "2 workers, generator" else pytest.mark.nightly,
                              pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")])
    for name in LOADERS
    if name not in WITHOUT_WORKERS
]


def noisy_learner(loader="DataLoader, generator", optimizer="SGD", **options):
    """A learner all of whose parts have a state, and one validation batch."""
    seed()
    options = {"opt_func": OPTIMIZERS[optimizer], "model": noisy_model()} | options
    return learner(LOADERS[loader](), batches(1), **options)


def worn(learn):
    """The same learner after training, and with marks of its user's everywhere."""
    learn.fit_one_cycle(1, 0.01, wd=0.1)
    learn.model[0].weight.requires_grad_(False)
    learn.model[5].weight.grad = torch.full_like(learn.model[5].weight, 0.5)
    learn.model[1].eval()
    learn.opt.param_groups[0]["lr"] = 0.123
    return learn


def generators_of(learn):
    """The generators that belong to the data."""
    loader = learn.dls.train
    owners = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
    owners += [getattr(owner, "sampler", None) for owner in owners]
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if generator is not None]


def snapshot(learn):
    return everything(learn, *generators_of(learn))


# ---- lr_find in every way it can end


def on_call(learn, n, action):
    """Call `action` when the model is called the n-th time (from 0) from now on."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return action(output) if len(calls) == n + 1 else None

    return learn.model.register_forward_hook(hook)


def hooked(n, action, **options):
    def find(learn):
        handle = on_call(learn, n, action)
        try:
            learn.lr_find(**options)
        finally:
            handle.remove()

    return find


def with_callback(event, action, n=0):
    def find(learn):
        callback = At(event, action, n=n)
        callback.in_lr_find = True
        learn.lr_find(callbacks=[callback])

    return find


ENDINGS = {
    "all were tried": (lambda learn: learn.lr_find(1e-7, 1e-6, 20), None),
    "divergence": (lambda learn: learn.lr_find(1e-5, 1e5, 50), None),
    "nan": (hooked(7, lambda output: output * math.nan), None),
    "inf weights": (lambda learn: learn.lr_find(1e10, 1e30, 50, stop_div=False), None),
    "CancelFit": (with_callback("after_pred", throw(CancelFit), n=3), None),
    "error in the model": (hooked(5, throw(ZeroDivisionError)), ZeroDivisionError),
    "error in the model at once": (hooked(0, throw(ZeroDivisionError)), ZeroDivisionError),
    "KeyboardInterrupt in the model": (hooked(5, throw(KeyboardInterrupt)), KeyboardInterrupt),
    "error in before_fit": (with_callback("before_fit", throw(ZeroDivisionError)), ZeroDivisionError),
    "error in after_backward": (with_callback("after_backward", throw(ZeroDivisionError), n=4), ZeroDivisionError),
    "error in after_fit": (with_callback("after_fit", throw(ZeroDivisionError)), ZeroDivisionError),
    "LRFinder in fit": (lambda learn: learn.fit(0.1, 3, wd=0.3, callbacks=[LRFinder(1e-5, 1e5, 30)]), None),
}


def run_to_the_end(action, error, learn):
    if error is None:
        action(learn)
    else:
        with pytest.raises(error):
            action(learn)


@pytest.mark.table
@pytest.mark.case("L2", "L10")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("is_worn", [False, True], ids=["new", "worn"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_lr_find_leaves_no_trace(ending, is_worn, optimizer):
    learn = noisy_learner(optimizer=optimizer)
    learn = worn(learn) if is_worn else learn
    before, steps = snapshot(learn), len(learn.opt.seen)
    run_to_the_end(*ENDINGS[ending], learn)
    assert snapshot(learn) == before
    assert len(learn.opt.seen) > steps or "at once" in ending or "before_fit" in ending  # it did train


@pytest.mark.case("L7")
@pytest.mark.parametrize("loader", [*WITHOUT_WORKERS, *WITH_WORKERS])
def test_lr_find_leaves_the_generators_of_the_data_alone(loader):
    learn = noisy_learner(loader)
    for _ in range(2):
        before = snapshot(learn)
        learn.lr_find(num_it=10)
        assert snapshot(learn) == before
        learn.fit(0.01)


def test_there_are_generators_to_look_at():
    assert [len(generators_of(noisy_learner(name))) > 0 for name in LOADERS] == [
        "generator" in name or "weighted" in name for name in LOADERS
    ]


FOUND = {
    "lr_find": lambda learn: learn.lr_find(num_it=15),
    "LRFinder": lambda learn: learn.fit(0.1, callbacks=[LRFinder(num_it=15)]),
    "an lr_find that fails": lambda learn: run_to_the_end(*ENDINGS["error in the model"], learn),
    "sandbox": lambda learn: fit_in_sandbox(learn),
}


def fit_in_sandbox(learn):
    with learn.sandbox():
        learn.fit_one_cycle(1, 0.1)
        learn.validate()


def results_of_a_fit(loader, is_worn, before=lambda learn: None):
    learn = noisy_learner(loader)
    if is_worn:
        learn.fit_one_cycle(1, 0.01)
    before(learn)
    learn.fit_one_cycle(2, 0.01)
    return trained(learn), rngs(), bits([learn.recorder.losses, learn.recorder.lrs, learn.recorder.moms])


@pytest.mark.table
@pytest.mark.case("L1")
@pytest.mark.parametrize("is_worn", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize("loader", WITHOUT_WORKERS)
def test_a_fit_after_it_equals_a_fit_without_it(loader, found, is_worn):
    without = results_of_a_fit(loader, is_worn)
    after = results_of_a_fit(loader, is_worn, FOUND[found])
    assert after == without


@pytest.mark.case("L1")
@pytest.mark.parametrize("is_worn", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("loader", WITH_WORKERS)
def test_a_fit_after_it_equals_a_fit_without_it_with_workers(loader, is_worn):
    without = results_of_a_fit(loader, is_worn)
    after = results_of_a_fit(loader, is_worn, FOUND["lr_find"])
    assert after == without


def test_the_fit_in_these_tests_would_notice():
    """A fit after another one, or with another seed, is another one."""
    seen = {
        bits(results_of_a_fit("TensorLoader", False, before)[2])[0][2]
        for before in (lambda learn: None, lambda learn: learn.fit(0.01), lambda learn: torch.rand(1),
                       lambda learn: random.random(), lambda learn: np.random.rand())
    }  # fmt: skip
    assert len(seen) == 5


# ---- sandbox


def change_everything(learn):
    learn.freeze()
    learn.fit_one_cycle(1, 0.1)
    learn.unfreeze()
    learn.lr_find(num_it=5)
    learn.validate()
    seed(99)
    learn.fit(0.1, 2)
    learn.model.eval()
    learn.callbacks.append(Trace())
    learn.metrics.append(nn.functional.l1_loss)
    learn.opt = torch.optim.SGD(learn.model.parameters(), 1.0)
    learn.loss_func, learn.lr, learn.is_new = nn.L1Loss(), 3.0, True
    for p in learn.model.parameters():
        p.requires_grad_(not p.requires_grad)
        p.grad = torch.ones_like(p)
        p.data.fill_(math.nan)


@pytest.mark.table
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("is_worn", [False, True], ids=["new", "worn"])
def test_a_sandbox_leaves_no_trace(is_worn, error):
    learn = noisy_learner(splitter=lambda model: [model[:4], model[4:]])
    learn = worn(learn) if is_worn else learn
    before = snapshot(learn)

    def use(learn):
        with learn.sandbox() as inside:
            assert inside is learn
            change_everything(learn)
            assert all(after != here for after, here in zip(snapshot(learn).items(), before.items(), strict=False)
                       if "weight" in after[0])  # fmt: skip
            if error:
                raise error

    run_to_the_end(use, error, learn)
    assert snapshot(learn) == before


def test_sandboxes_can_be_nested():
    learn = noisy_learner()
    outer = snapshot(learn)
    with learn.sandbox():
        learn.fit(0.1)
        inner = snapshot(learn)
        with learn.sandbox():
            change_everything(learn)
        assert snapshot(learn) == inner
    assert snapshot(learn) == outer


@pytest.mark.parametrize("kind", [tuple, lambda callbacks: callbacks[0]], ids=["a tuple", "one callback"])
def test_a_sandbox_of_a_learner_whose_callbacks_were_assigned(kind):
    learn = noisy_learner()
    learn.callbacks = kind([Trace()])
    before = trained(learn)
    learn.lr_find(num_it=5)
    assert trained(learn) == before


def test_the_result_of_an_lr_find_inside_goes_with_the_sandbox():
    learn = noisy_learner()
    with learn.sandbox():
        assert learn.lr_find(num_it=5) is learn.recorder.lr_find
    assert learn.recorder.lr_find is None


@pytest.mark.parametrize("where", ["train", "valid"])
@pytest.mark.parametrize("use", ["lr_find", "LRFinder", "sandbox"])
def test_data_for_one_pass_is_refused(use, where):
    learn = learner(batches(5), batches(1))
    setattr(learn.dls, where, iter(batches(5)))
    before, rng = everything(learn), rngs()
    with pytest.raises(ValueError, match=r"the data is an iterator \(list_iterator\), good for one pass"):
        FOUND[use](learn)
    assert (everything(learn), rngs(), len(list(getattr(learn.dls, where)))) == (before, rng, 5)


@pytest.mark.case("L4")
def test_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = []
    look = At("after_step", lambda state: files.extend(os.listdir(tmp_path)))
    look.in_lr_find = True
    learn = noisy_learner(callbacks=[look])
    learn.lr_find(num_it=10)
    fit_in_sandbox(learn)
    assert look.count == 10 + 6
    assert files == os.listdir(tmp_path) == []


# ---- what runs inside lr_find

STEP = ["before_batch", "after_pred", "after_loss", "after_backward", "before_step", "after_step"]


@pytest.mark.case("L8")
@pytest.mark.parametrize("find", ["lr_find", "LRFinder"])
def test_only_callbacks_that_want_to_run_and_no_validation(find):
    class Here(Trace):
        in_lr_find = True

    calls = {
        "lr_find": lambda learn, callbacks: learn.lr_find(num_it=3, callbacks=callbacks),
        "LRFinder": lambda learn, callbacks: learn.fit(0.1, 2, callbacks=[LRFinder(num_it=3), *callbacks]),
    }
    wanted, unwanted = [Here(), Here()], [Trace(), Trace(), OneCycle(0.1), CircularLR()]
    learn = learner(batches(2), batches(1), callbacks=[wanted[0], unwanted[0], unwanted[2]], metrics=[throw])
    calls[find](learn, [wanted[1], unwanted[1]])
    epoch = ["before_epoch", *STEP, "after_batch", *STEP, "after_batch", "after_epoch"]
    # The finder, a schedule, comes before the wanted ones, and ends the fit in the last after_batch.
    expected = ["before_fit", *epoch, "before_epoch", *STEP, "after_fit"]
    assert wanted[0].log == wanted[1].log == expected
    assert unwanted[0].log == unwanted[1].log == []


def test_momentum_and_weight_decay_are_the_learners():
    learn = learner(opt_func=partial(spying(), momentum=0.7), wd=0.3, callbacks=[OneCycle()])
    learn.lr_find(num_it=5)
    assert {(note["momentum"], note["layer_group"]) for note in learn.opt.seen} == {(0.7, 0)}
    assert learn.opt.param_groups[0]["weight_decay"] == 0.3


def test_lr_finder_in_a_fit_is_lr_find():
    found = []
    for find in (
        lambda learn: learn.lr_find(1e-4, 1e2, 25),
        lambda learn: learn.fit(0.1, 7, cycle_len=2, use_clr=(8, 4), callbacks=[LRFinder(1e-4, 1e2, 25)]),
        lambda learn: learn.fit_one_cycle(3, callbacks=[LRFinder(1e-4, 1e2, 25)]),
    ):
        learn = noisy_learner()
        learn.fit(0.01)
        find(learn)
        result = learn.recorder.lr_find
        found.append(bits([result.lrs, result.losses, result.smooth_losses, result.suggestions, result.stopped]))
        assert len(learn.recorder.losses) == 6  # of the fit before
    assert found[0] == found[1] == found[2]


def test_an_lr_finder_can_be_used_again():
    finder, learn = LRFinder(1e-4, 1e2, 25), noisy_learner()
    results = []
    for _ in range(2):
        learn.fit(0.1, callbacks=[finder])
        results.append(learn.recorder.lr_find)
    assert results[0] is not results[1]
    assert bits([results[0].lrs, results[0].losses]) == bits([results[1].lrs, results[1].losses])


# ---- which rates are tried, and when it stops


def ramp(start, end, num_it):
    return [start * (end / start) ** (i / num_it) for i in range(num_it)]


@pytest.mark.parametrize(("start", "end", "num_it"), [(1e-7, 10, 100), (1e-6, 1e-2, 7), (0.5, 0.75, 2), (1e-3, 1, 250)])
def test_every_rate_is_the_formulas(start, end, num_it):
    learn = learner(batches(3))
    result = learn.lr_find(start, end, num_it, stop_div=False)
    rates = [lr for note in learn.opt.seen for lr in set(note["lrs"])]
    assert rates == pytest.approx(ramp(start, end, num_it), rel=1e-12)
    assert result.lrs.tolist() == rates
    assert (result.stopped, result.num_it, result.pass_length) == ("all were tried", num_it, 3)


@pytest.mark.case("L9")
@pytest.mark.parametrize(
    ("start", "end", "ramps"),
    [
        (slice(1e-6, 1e-4), 1, [(1e-6, 1), (1e-5, 1), (1e-4, 1)]),
        (1e-6, slice(1e-1), [(1e-6, 1e-2), (1e-6, 1e-2), (1e-6, 1e-1)]),
        ([1e-6, 1e-5, 1e-4], slice(1e-2, 1), [(1e-6, 1e-2), (1e-5, 1e-1), (1e-4, 1)]),
        (1e-6, 1e-1, [(1e-6, 1e-1)] * 3),
    ],
)
def test_each_layer_group_has_its_own_ramp(start, end, ramps):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 1))
    learn = learner(model=model, splitter=list)
    result = learn.lr_find(start, end, 20, stop_div=False)
    for group in range(3):
        rates = [[lr for param_group, lr in zip(learn.opt.param_groups, note["lrs"], strict=True)
                  if param_group["layer_group"] == group] for note in learn.opt.seen]  # fmt: skip
        assert all(len(set(each)) == 1 for each in rates)
        assert [each[0] for each in rates] == pytest.approx(ramp(*ramps[group], 20), rel=1e-12)
    assert result.lrs.tolist() == [each[0] for each in rates]


def find_in(losses, **options):
    """The result of an lr_find whose batch losses are these."""
    values = iter(losses)
    learn = learner(batches(4), loss_func=lambda pred, target: (pred * 0).sum() + next(values))
    return learn.lr_find(**{"num_it": len(losses), **options})


def diverges_at(losses, num_it, beta=0.98):
    """The step at which the smoothed loss has left its best by three times the best; None if it does not."""
    smooth = []
    for i in range(len(losses)):
        weights = [beta ** (i - j) for j in range(i + 1)]
        smooth.append(sum(w * x for w, x in zip(weights, losses, strict=False)) / sum(weights))
        if i >= num_it // 10 and smooth[i] > min(smooth) + 3 * abs(min(smooth)):
            return i
    return None


CURVES = {
    "explodes": [1.0] * 40 + [1.5**k for k in range(60)],
    "explodes slowly": [1.0] * 20 + [1 + k for k in range(80)],
    "explodes at once": [1.0] + [100.0] * 99,
    "one spike at once": [1.0, 1000.0] + [1.0] * 98,
    "negative": [-1.0] * 50 + [float(k) for k in range(50)],
    "negative, explodes at once": [-1.0] + [50.0] * 99,
    "falls": [100.0 - k for k in range(100)],
    "flat at zero": [0.0] * 100,
}


@pytest.mark.parametrize("curve", CURVES)
def test_it_stops_where_the_loss_diverges(curve):
    result, at = find_in(CURVES[curve]), diverges_at(CURVES[curve], 100)
    assert len(result.lrs) == len(result.losses) == (100 if at is None else at + 1)  # the last one is recorded too
    assert result.stopped == ("all were tried" if at is None else "the loss diverged")
    assert result.losses == pytest.approx(CURVES[curve][: len(result.losses)], rel=1e-6)


def test_these_curves_stop_everywhere():
    stops = {curve: diverges_at(losses, 100) for curve, losses in CURVES.items()}
    assert stops["explodes at once"] == stops["negative, explodes at once"] == 10  # not before num_it // 10
    assert stops["falls"] is stops["flat at zero"] is None
    assert 10 < stops["explodes"] < 99
    assert 10 < stops["explodes slowly"] < 99


@pytest.mark.parametrize("curve", CURVES)
def test_with_stop_div_false_only_a_loss_that_is_not_finite_stops_it(curve):
    assert len(find_in(CURVES[curve], stop_div=False).lrs) == 100


@pytest.mark.table
@pytest.mark.case("L5")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 57])
@pytest.mark.parametrize("stop_div", [True, False])
def test_a_loss_that_is_not_finite_always_stops_it(value, at, stop_div):
    result = find_in([1.0] * at + [value] + [1.0] * 99, num_it=100, stop_div=stop_div)
    assert len(result.lrs) == at + 1
    assert bits(result.losses[-1]) == bits(np.float64(value))
    assert result.stopped == f"the loss is {value}"


class Unsized(IterableDataset):
    """Four batches, and no len()."""

    def __iter__(self):
        return iter(batches(4))


@pytest.mark.parametrize("make", [Unsized, lambda: DataLoader(Unsized(), batch_size=None)], ids=["plain", "DataLoader"])
def test_a_loader_without_len_needs_no_steps_per_epoch(make):
    learn = learner(make())
    result = learn.lr_find(1e-6, 1e-3, 10)
    assert len(learn.opt.seen) == 10
    assert result.pass_length == 4


@pytest.mark.case("L7")
@pytest.mark.parametrize(("n", "num_it", "passes"), [(1, 9, 9), (3, 10, 4), (5, 10, 2), (20, 10, 1)])
def test_as_many_passes_as_that_takes(n, num_it, passes):
    class Loader:
        def __len__(self):
            return n

        def __iter__(self):
            began.append(1)
            return iter(batches(n))

    began = []
    learn = learner(Loader())
    learn.lr_find(1e-6, 1e-3, num_it)
    assert (len(learn.opt.seen), len(began)) == (num_it, passes)


def test_accumulation_counts_updates():
    learn = learner(batches(5))
    learn.fit(0.1, callbacks=[LRFinder(1e-6, 1e-3, 7)], accumulate=2)
    assert [note["lrs"][0] for note in learn.opt.seen] == pytest.approx(ramp(1e-6, 1e-3, 7), rel=1e-12)
    assert learn.recorder.lr_find.pass_length == 3
