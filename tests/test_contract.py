"""What holds for every public callback, alone and in pairs: a new one has to be added to `MAKE`."""
import gc
import inspect
import io
import itertools
import weakref

import pytest
import torch
from helpers import At, bits, everything, throw, trained
from torch import nn

import minifast
from minifast import Callback, CancelEpoch, DataLoaders, Learner, Order, TensorLoader, accuracy
from minifast.base import snapshot
from minifast.core.callback import EVENTS

NAMES = {name: getattr(minifast, name) for name in minifast.__all__}
PATH = "{}"  # in an argument: a file that does not exist yet, in a folder that does
# How to make each, as `repr` writes it down: with arguments that make a difference in a fit of 3 epochs of 4 batches.
MAKE = {
    "ActivationStats": "ActivationStats(layers=None, every=1, bins=8)",
    "AutoMicrobatch": "AutoMicrobatch(size=2, min_size=1)",
    "CSVLogger": "CSVLogger(path='{}.csv', append=False)",
    "ChannelsLast": "ChannelsLast()",
    "Checkpoint": "Checkpoint(path='{}', every_steps=2, every_seconds=None, keep=3)",
    "CircularLR": "CircularLR(div=4, cut_div=3, n_cycles=1, cycle_mult=1, moms=(0.9, 0.8))",
    "CircularLRBeta": "CircularLRBeta(div=10, pct=10, n_cycles=1, cycle_mult=1, moms=None)",
    "ConstantLR": "ConstantLR()",
    "CosineAnnealing": "CosineAnnealing(n_cycles=3, cycle_mult=1, warmup_frac=0.0)",
    "CutMix": "CutMix(alpha=1.0, num_classes=None, mixup_alpha=0.5)",
    "EMA": "EMA(decay=0.8, half_life=None, in_validation=True)",
    "EarlyStopping": "EarlyStopping('accuracy', patience=1)",
    "ExponentialLR": "ExponentialLR(end=0.1)",
    "FiniteLoss": "FiniteLoss(strict=True)",
    "FlatCos": "FlatCos(pct_start=0.5, div_final=10.0)",
    "GradientClip": "GradientClip(norm=0.1, value=None)",
    "GradientNorm": "GradientNorm()",
    "GradientStats": "GradientStats(every=2)",
    "LinearLR": "LinearLR(start=1.0, end=0.1)",
    "MixUp": "MixUp(alpha=0.4, num_classes=3)",
    "MixedPrecision": "MixedPrecision(precision='fp16')",
    "OneCycle": "OneCycle(max_lr=0.05, div_factor=10.0, pct_start=0.4)",
    "PiecewiseLR": "PiecewiseLR(pieces=((0.5, LinearLR()), (0.5, ConstantLR())))",
    "PolynomialLR": "PolynomialLR(power=2.0)",
    "ProgressiveResizing": "ProgressiveResizing(initial_scale=0.75, delay_fraction=0.3, size_increment=1)",
    "ReduceLROnPlateau": "ReduceLROnPlateau('valid_loss', factor=0.5, patience=1, min_delta=0.05)",
    "RunLog": "RunLog(path='{}', every_seconds=0.0)",
    "SWA": "SWA(start=0.3, every=2, apply=True, in_validation=True)",
    "SaveBest": "SaveBest('accuracy', restore=True)",
    "Schedule": "Schedule({'lr': schedules.cosine})",
    "SnapshotEnsemble": "SnapshotEnsemble(keep=2)",
    "TensorBoardLogger": "TensorBoardLogger(log_dir='{}', every_seconds=0.0)",
    "TimeLimit": "TimeLimit(minutes=10)",
    "Unfreeze": "Unfreeze(parts={'body': 0.4}, train_bn=False)",
    "WandbLogger": "WandbLogger(project='a', name=None, config=None, id=None, every_seconds=0.0)",
}
# Not in the list, each for a reason.
NOT_FOR_USERS = {
    "Callback": "the base class",
    "Scheduler": "a base class",
    "LRFinder": "runs alone, in a sandbox: tests/test_sandbox.py",
    "Recorder": "the Learner has its own",
    "Metrics": "the Learner makes its own",
    "Progress": "the fit makes its own",
}
STEPS = 12  # of a fit


def test_every_public_callback_is_in_the_list():
    classes = {name: getattr(minifast, name) for name in minifast.__all__ if inspect.isclass(getattr(minifast, name))}
    public = {name for name, kind in classes.items() if issubclass(kind, Callback)}
    assert public == set(MAKE) | set(NOT_FOR_USERS)


@pytest.fixture
def make(tmp_path, wandb):
    """`make("EMA")`: a new callback; the n-th writes to files of its own, and to a fake of W&B."""
    counter = itertools.count()

    def make(name):
        path = tmp_path / str(next(counter))
        return eval(MAKE[name].replace(PATH, str(path)), NAMES)

    return make


def dls():
    """4 batches of 5 images with 3 classes, and 2 of validation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 1, 8, 8, generator=generator)
    y = torch.randint(0, 3, (30,), generator=generator)
    return DataLoaders(TensorLoader(x[:20], y[:20], batch_size=5), TensorLoader(x[20:], y[20:], batch_size=5))


def learner(callbacks=(), **options):
    """A convnet with batch norm and dropout, in two layer groups, the same weights each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                          nn.Dropout(0.2), nn.Linear(16, 3))  # fmt: skip
    return Learner(model, options.pop("dls", None) or dls(), nn.CrossEntropyLoss(), metrics=[accuracy], lr=0.01,
                   splitter={"body": ["0.*", "1.*"], "head": "6.*"}, callbacks=callbacks, device="cpu", verbose=False,
                   **options)  # fmt: skip


def rows(learn, first=0):
    """What was recorded from step `first` on, and the epoch rows that began there, but for their time."""
    recorder = learn.recorder
    columns = {name: recorder.column(name)[first:] for name in recorder.newest.columns}
    epochs = [{key: value for key, value in row.items() if key != "time"} for row in recorder.epochs]
    return bits([recorder.lr_groups[first:], recorder.moms[first:], recorder.losses[first:], columns,
                 epochs[-(-first // 4):]])  # fmt: skip


@pytest.mark.table
@pytest.mark.parametrize("name", MAKE)
def test_repr_rebuilds_it(make, name):
    callback = make(name)
    again = eval(repr(callback), NAMES | vars(minifast.schedules))  # a Schedule prints the names of its functions
    assert type(again) is type(callback)
    assert repr(again) == repr(callback)
    assert again.owns == callback.owns


@pytest.mark.table
@pytest.mark.parametrize("name", MAKE)
def test_it_serves_for_two_fits(make, name):
    learn, callback = learner(), make(name)
    for _ in range(2):
        learn.fit(0.01, 3, callbacks=[callback])
        assert 1 <= len(learn.recorder.lrs) <= STEPS
        assert all(torch.isfinite(p).all() for p in learn.model.parameters())


@pytest.mark.table
@pytest.mark.parametrize("name", MAKE)
def test_it_works_with_accumulation(make, name):
    learn = learner()
    learn.fit(0.01, 3, callbacks=[make(name)], accumulate=3)
    assert 1 <= len(learn.recorder.lrs) <= 6
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


def traces(learn):
    """What a callback has to take away again when the fit ends."""
    model = learn.model
    return {"hooks": hooks(model), "modes": [module.training for module in model.modules()],
            "grads": [p.grad for p in model.parameters()],
            "strides": [p.stride() for p in model.parameters()],
            "lists": [list(map(id, values)) for values in (learn.callbacks, learn.metrics)]}  # fmt: skip


@pytest.mark.table
@pytest.mark.case("I12")
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("ending", ["well", "before_batch", "after_loss", "before_step", "after_valid_batch"])
def test_it_leaves_no_hooks_and_modes(make, name, ending):
    learn = learner()
    before = traces(learn)
    callbacks = [make(name)]
    if ending == "well":
        learn.fit(0.01, 3, callbacks=callbacks)
    else:
        with pytest.raises(ZeroDivisionError):
            learn.fit(0.01, 3, callbacks=[*callbacks, At(ending, throw(ZeroDivisionError), 1)])
    assert traces(learn) == before


@pytest.mark.table
@pytest.mark.case("L8")
@pytest.mark.parametrize("name", MAKE)
def test_inside_lr_find_it_does_nothing_or_leaves_nothing(make, name):
    callback = make(name)
    learn = learner(callbacks=[callback])
    learn.fit(0.01, 1)
    saved, before = bits(callback.state_dict()), everything(learn)
    learn.lr_find(1e-4, 1, 10)
    assert everything(learn) == before
    assert bits(callback.state_dict()) == saved
    if not callback.in_lr_find:
        twin = twin_of(learn)
        torch.manual_seed(1)
        expected = twin.lr_find(1e-4, 1, 10)
        torch.manual_seed(1)
        found = learn.lr_find(1e-4, 1, 10)
        assert bits(found.losses) == bits(expected.losses)


WRITERS = {"CSVLogger", "Checkpoint", "RunLog", "TensorBoardLogger", "WandbLogger"}  # it stays written


@pytest.mark.table
@pytest.mark.parametrize("has_fitted", [False, True])
@pytest.mark.parametrize("name", [name for name in MAKE if name not in WRITERS])
def test_a_sandbox_takes_back_what_it_remembers(make, name, has_fitted):
    callback = make(name)
    learn = learner(callbacks=[callback])
    if has_fitted:
        learn.fit(0.01, 1)
    saved = bits(callback.state_dict())
    with learn.sandbox():
        learn.fit(0.05, 2)
    assert bits(callback.state_dict()) == saved
    learn.fit(0.01, 1)


@pytest.mark.table
@pytest.mark.parametrize("name", MAKE)
def test_check_trace_and_profile_leave_it_alone(make, name):
    callback = make(name)
    learn = learner(callbacks=[callback])
    saved, before = bits(callback.state_dict()), everything(learn)
    assert learn.check().problems == []
    learn.trace(1)
    learn.profile(1)
    assert everything(learn) == before
    assert bits(callback.state_dict()) == saved
    learn.fit(0.01, 1)


def twin_of(learn):
    """A learner with the weights and the optimizer state of `learn`, without its callbacks."""
    other = learner(dls=learn.dls)
    other.model.load_state_dict(learn.model.state_dict())
    other.opt.load_state_dict(snapshot.clone(learn.opt.state_dict()))
    for p, q in zip(other.model.parameters(), learn.model.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    return other


# Those that look on, or keep weights for later: training and the weights in the end are what they are without them.
ONLY_LOOK = ["ActivationStats", "CSVLogger", "EMA", "GradientNorm", "GradientStats", "RunLog", "SnapshotEnsemble",
             "TensorBoardLogger", "WandbLogger"]  # fmt: skip


@pytest.mark.table
@pytest.mark.parametrize("name", ONLY_LOOK)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_only_looks_changes_no_bit(make, name, accumulate):
    plain, watched = learner(), learner()
    for learn, callbacks in ((plain, []), (watched, [make(name)])):
        torch.manual_seed(1)
        learn.fit(0.02, 3, callbacks=callbacks, accumulate=accumulate)
    assert trained(watched) == trained(plain)
    assert bits(watched.recorder.losses) == bits(plain.recorder.losses)


# ---- going on where a fit was killed


class Late(Callback):
    """Stands for a callback of a run that was killed: silent until batch `at`, where `wake(state)` makes it hear."""

    def __init__(self, inner, at, wake):
        self.inner, self.at, self.wake, self.count, self.awake = inner, at, wake, 0, False
        self.order, self.owns = inner.order, inner.owns

    def evaluating(self, model):
        return self.inner.evaluating(model) if self.awake else super().evaluating(model)


def _late(event):
    def hear(self, state):
        if self.awake:
            getattr(self.inner, event)(state)

    return hear


for _event in EVENTS:
    setattr(Late, _event, _late(_event))


class Alarm(Callback):
    """Hears everything last; wakes `late` after batch `at`."""

    order = Order.RECORD + 1000

    def __init__(self, late):
        self.late, self.count = late, 0

    def after_batch(self, state):
        self.count += 1
        if self.count == self.late.at:
            self.late.wake(state)
            self.late.awake = True


def through_a_file(tree):
    """A plain tree as a checkpoint would give it back; anything else is an error here."""
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def timeless(tree):
    """A plain tree without the times of epoch rows."""
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items() if key != "time"}
    return [timeless(value) for value in tree] if isinstance(tree, list) else tree


def load_in_place(opt, saved):
    """Load an optimizer's state in the middle of a fit, which holds on to its param_groups."""
    groups = list(opt.param_groups)
    opt.load_state_dict(saved)
    for group, loaded in zip(groups, opt.param_groups, strict=True):
        group.update(loaded)
    opt.param_groups[:] = groups


KILLED = [(name, at) for name in MAKE for at in (2, 4, 6, 9)
          if name not in ("TimeLimit", "Checkpoint")  # by the clock: no equal bits; and it is what saves
          and (name, at) != ("EarlyStopping", 9)]  # it has ended the fit by then  # fmt: skip


@pytest.mark.table
@pytest.mark.parametrize(("name", "at"), KILLED)
def test_what_it_saves_is_all_that_it_needs(make, name, at):
    """A fit that is killed after batch `at` and goes on with a new callback equals one that was not."""
    learn, callback, saved = learner(), make(name), {}

    def save(state):
        saved.update(model=state.model.state_dict(), opt=state.opt.state_dict(), callback=callback.state_dict(),
                     step=state.step, lr_scale=state.lr_scale)  # fmt: skip
        saved.update(through_a_file(saved))
        saved["restore_rng"] = snapshot.rng()

    torch.manual_seed(1)
    learn.fit(0.02, 3, callbacks=[callback, LastAt(at, save)])

    other, fresh = learner(), make(name)

    def wake(state):
        state.model.load_state_dict(saved["model"])
        load_in_place(state.opt, saved["opt"])
        state.step, state.lr_scale = saved["step"], saved["lr_scale"]
        fresh.before_fit(state)
        fresh.load_state_dict(saved["callback"])
        for norm in state.norms_in_eval:  # the loop does so when it enters an epoch
            norm.eval()
        saved["restore_rng"]()

    late, kept = Late(fresh, at, wake), bits(saved["callback"])
    torch.manual_seed(1)
    other.fit(0.02, 3, callbacks=[late, Alarm(late)])
    assert bits(saved["callback"]) == kept, "what was loaded was changed afterwards"
    assert trained(other) == trained(learn)
    assert rows(other, saved["step"]) == rows(learn, saved["step"])
    assert bits(timeless(fresh.state_dict())) == bits(timeless(callback.state_dict()))


class LastAt(Callback):
    """Calls `action(state)` after the n-th batch (from 1), when all others have heard of it."""

    order = Order.RECORD + 1000

    def __init__(self, n, action):
        self.n, self.action, self.count = n, action, 0

    def after_batch(self, state):
        self.count += 1
        if self.count == self.n:
            self.action(state)


@pytest.mark.table
@pytest.mark.parametrize("name", MAKE)
def test_the_state_is_a_copy_of_plain_values(make, name):
    learn, callback = learner(), make(name)
    kept = []
    learn.fit(0.01, 3, callbacks=[callback, LastAt(6, lambda state: kept.append(callback.state_dict()))])
    assert bits(through_a_file(kept[0])) == bits(kept[0])
    learn, callback, kept = learner(), make(name), []
    learn.fit(0.01, 3, callbacks=[callback, LastAt(6, lambda s: kept.extend([callback.state_dict()] * 2)),
                                  At("after_step", lambda s: kept and kept.append(bits(kept[0])))])  # fmt: skip
    assert all(later == kept[2] for later in kept[2:]), "a later step has changed what was saved"


# ---- in pairs

REFUSED = {}  # frozenset of two names -> words of the error


# Where most only set up and tidy: two that meet nowhere else hardly get into each other's way.
AROUND = {"before_fit", "after_fit", "before_epoch", "after_epoch"}


def meet(pair):
    """Whether both hear the same event inside an epoch, or own the same hyper-parameter."""
    kinds = [NAMES[name] for name in pair]
    heard = {event for event in EVENTS if all(getattr(kind, event) is not getattr(Callback, event) for kind in kinds)}
    return bool(heard - AROUND or set.intersection(*(set(kind.sets) for kind in kinds)))


PAIRS = list(itertools.combinations(MAKE, 2))


@pytest.mark.table
@pytest.mark.parametrize("pair", list(filter(meet, PAIRS)), ids="-".join)
def test_two_that_meet_train_or_are_refused(make, pair):
    train_or_refuse(make, pair)


@pytest.mark.table
@pytest.mark.nightly
@pytest.mark.parametrize("pair", list(itertools.filterfalse(meet, PAIRS)), ids="-".join)
def test_two_that_do_not_meet_train_or_are_refused(make, pair):
    train_or_refuse(make, pair)


def train_or_refuse(make, pair):
    learn = learner()
    callbacks = [make(name) for name in pair]
    if set(callbacks[0].owns) & set(callbacks[1].owns):
        with pytest.raises(ValueError, match=r"both .* and .* set '.*', one would overwrite"):
            learn.fit(0.01, callbacks=callbacks, steps_per_epoch=3)
    elif frozenset(pair) in REFUSED:
        before = everything(learn)
        with pytest.raises(ValueError, match=REFUSED[frozenset(pair)]):
            learn.fit(0.01, callbacks=callbacks, steps_per_epoch=3)
        assert everything(learn) == before
    else:
        learn.fit(0.01, callbacks=callbacks, steps_per_epoch=3)
        n = len(learn.recorder.lrs)
        assert n == 3 or ("MixedPrecision" in pair and n >= 1)  # an update that overflows is skipped
        assert all(torch.isfinite(p).all() for p in learn.model.parameters())


# ---- what no pair shows


class CancelsAtOnce(Callback):
    """Cancels one epoch before anyone else hears of it, or after all have."""

    def __init__(self, epoch, order):
        self.epoch, self.order = epoch, order

    def before_epoch(self, state):
        if state.epoch == self.epoch:
            raise CancelEpoch


@pytest.mark.table
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("order", [-100, 150, 10_000])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_that_is_cancelled_at_once(make, name, order, epoch):
    learn = learner()
    learn.fit(0.01, 3, callbacks=[CancelsAtOnce(epoch, order), make(name)])
    assert [row["epoch"] for row in learn.recorder.epochs][:2] == [0, 1]
    assert "train_loss" not in learn.recorder.epochs[epoch]


@pytest.mark.table
@pytest.mark.parametrize("name", MAKE)
def test_nothing_of_the_fit_is_held_afterwards(make, name):
    learn, refs = learner(), []
    callback = make(name)
    learn.fit(0.01, 1)  # imports, buffers: what is made once
    gc.collect()
    gc.disable()
    try:
        learn.fit(0.01, 1, callbacks=[callback, At("after_loss", lambda state: refs.append(weakref.ref(state.pred)))])
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()
