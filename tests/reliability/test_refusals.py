"""A checkpoint of another fit, or a file that is none, is refused with the difference; nothing is changed by it."""
import warnings

import pytest
import torch
from helpers import everything
from resuming import Images, data, every_step, learner, model, tensors
from torch import nn
from torch.utils.data import DataLoader

from minifast import EMA, Callback, DataLoaders, EarlyStopping, SaveBest, TensorLoader

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint after 8 of the 12 updates of `learner().fit(0.01, 2)`."""
    folder = tmp_path_factory.mktemp("run")
    learner().fit(0.01, 2, callbacks=[every_step(folder)], resume="auto")
    return folder / "fit-1" / "step-00000008.ckpt"


def refused(learn, path, match, *, fit=lambda learn, **options: learn.fit(0.01, 2, **options), **options):
    """The fit is refused, nothing is changed, and the learner is as good as it was."""
    before, callbacks = everything(learn), list(learn.callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, TypeError, OSError), match=match) as info:
            fit(learn, resume=path, **options)
    assert everything(learn) == before
    assert learn.callbacks == callbacks
    learn.fit(0.01, 1)
    return str(info.value)


def batches_of(size, n=24):
    return DataLoaders(TensorLoader(*tensors(n), batch_size=size, shuffle=True), data().valid)


OTHER_PLANS = {
    "epochs": (lambda learn, **o: learn.fit(0.01, 3, **o), "plan: epochs 2 in the checkpoint, 3 in this fit"),
    "updates": (lambda learn, **o: learn.fit(0.01, 3, **o), "plan: updates 12 in the checkpoint, 18 in this fit"),
    "lr": (lambda learn, **o: learn.fit(0.02, 2, **o),
           r"plan: peak learning rates \[0.01, 0.01\] in the checkpoint, \[0.02, 0.02\] in this fit"),
    "lr of one group": (lambda learn, **o: learn.fit(slice(0.001, 0.01), 2, **o), r"\[0.01, 0.01\] .* \[0.001, 0.01\]"),
    "schedule": (lambda learn, **o: learn.fit_one_cycle(2, 0.01, **o),
                 r"schedules \['ConstantLR\(\)'\] in the checkpoint, \['OneCycle\(.*"),
    "wd": (lambda learn, **o: learn.fit(0.01, 2, wd=0.5, **o), r"plan: weight decay \[.*\[.*0.5"),
    "accumulate": (lambda learn, **o: learn.fit(0.01, 2, accumulate=2, **o),
                   "batches per update 1 in the checkpoint, 2 in this fit"),
    "shorter epochs": (lambda learn, **o: learn.fit(0.01, 2, steps_per_epoch=5, **o),
                       "updates per epoch 6 in the checkpoint, 5 in this fit"),
    "a limit in time": (lambda learn, **o: learn.fit(0.01, 2, minutes=1, **o), "plan: epochs 2 .* None in this fit"),
}  # fmt: skip


@pytest.mark.case("S2", "S9")
@pytest.mark.parametrize("name", OTHER_PLANS)
def test_another_plan(path, name):
    fit, match = OTHER_PLANS[name]
    said = refused(learner(), path, match, fit=fit)
    assert said.startswith(f"{path} was made by another fit:")
    assert "load them by learn.load(path)" in said
    assert "another folder" in said


@pytest.mark.case("S2")
def test_other_arguments_of_the_same_schedule(tmp_path):
    def fit(pct_start):
        return lambda learn, **o: learn.fit_one_cycle(2, 0.01, pct_start=pct_start, **o)

    fit(0.25)(learner(), callbacks=[every_step(tmp_path)], resume="auto")
    refused(learner(), tmp_path / "fit-1" / "step-00000004.ckpt", "pct_start=0.25.*pct_start=0.5", fit=fit(0.5))


@pytest.mark.case("S9")
@pytest.mark.parametrize(("dls", "match"), [
    (batches_of(6), "data: training data: batches 6 in the checkpoint, 4 in this fit\n"
     "  data: training data: batch_size 4 in the checkpoint, 6 in this fit"),
    (batches_of(4, 28), "data: training data: samples 24 in the checkpoint, 28 in this fit"),
    (batches_of(4, 23), "data: training data: samples 24 in the checkpoint, 23 in this fit"),
    (DataLoaders(data().train, TensorLoader(*tensors(9, 1), batch_size=4)),
     "data: validation data: samples 8 in the checkpoint, 9 in this fit"),
    (DataLoaders(data().train), "data: validation data .* None in this fit"),
    (DataLoaders(data().train, {"a": data().valid}), "data: validation data a None in the checkpoint"),
])  # fmt: skip
def test_other_data(path, dls, match):
    refused(learner(dls), path, match)


def test_a_data_set_that_grew(tmp_path):
    def dls(n):
        return DataLoaders(DataLoader(Images(n), batch_size=4, shuffle=True, drop_last=True))

    learner(dls(24)).fit(0.01, 2, callbacks=[every_step(tmp_path)], resume="auto")
    refused(learner(dls(25)), tmp_path, "data: training data: samples 24 in the checkpoint, 25 in this fit")


def changed(change):
    net = model()
    change(net)
    return net


OTHER_MODELS = {
    "an extra layer": (lambda: changed(lambda net: net.insert(6, nn.Linear(16, 16))),
                       r"missing in the checkpoint: .*7\.weight"),
    "a missing bias": (lambda: changed(lambda net: net[6].register_parameter("bias", None)),
                       r"only in the checkpoint: .*6\.bias"),
    "another shape": (lambda: changed(lambda net: net.__setitem__(0, nn.Conv2d(1, 4, 5, padding=1))),
                      r"0\.weight is float32 \(4, 1, 3, 3\) in the checkpoint, float32 \(4, 1, 5, 5\) in this fit"),
    "another dtype": (lambda: changed(lambda net: net[6].double()), r"6\.weight is float32 .* float64 \(3, 16\)"),
    "another buffer": (lambda: changed(lambda net: net.register_buffer("other", torch.zeros(1))),
                       "model: missing in the checkpoint: other"),
}  # fmt: skip


@pytest.mark.case("S5")
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_another_model(path, name):
    make, match = OTHER_MODELS[name]
    splitter = None if name == "an extra layer" else {"body": ["0.*", "1.*"], "head": "6.*"}
    learn = learner(model=make(), splitter=splitter)
    before = everything(learn)
    with pytest.raises(ValueError, match=match):
        learn.fit(0.01, 2, resume=path)
    assert everything(learn) == before


@pytest.mark.case("S6", "S7", "S8")
@pytest.mark.parametrize(("options", "match"), [
    ({"opt_func": torch.optim.SGD}, "optimizer: class 'Spy' in the checkpoint, 'SGD' in this fit"),
    ({"splitter": None}, r"layer groups \['body', 'head'\] in the checkpoint, \['model'\] in this fit"),
    ({"splitter": {"stem": ["0.*", "1.*"], "head": "6.*"}}, r"\['body', 'head'\] .* \['stem', 'head'\]"),
    ({"splitter": {"body": "0.*", "head": ["1.*", "6.*"]}}, "parameters in each"),
    ({"wd_norm_bias": True}, "optimizer|weight decay"),
])  # fmt: skip
def test_another_optimizer(path, options, match):
    refused(learner(**options), path, match)


@pytest.mark.case("S6")
@pytest.mark.parametrize("options", [{"betas": (0.8, 0.999)}, {"eps": 1e-3}, {"amsgrad": True}])
def test_other_settings_of_the_optimizer(tmp_path, options):
    def make(**settings):
        return learner(opt_func=lambda params, **given: torch.optim.AdamW(params, **given, **settings))

    make().fit(0.01, 2, callbacks=[every_step(tmp_path)], resume="auto")
    name = next(iter(options))
    refused(make(**options), tmp_path / "fit-1" / "step-00000008.ckpt", f"optimizer: .*{name}")


@pytest.mark.case("S7")
def test_other_frozen_groups(path):
    learn = learner()
    learn.freeze()
    refused(learn, path, r"parameters that are trained \[4, 2\] in the checkpoint, \[2, 2\] in this fit")
    learn = learner(train_bn=False)
    learn.freeze()
    refused(learn, path, r"frozen layer groups \[\] in the checkpoint, \['body'\] in this fit")


@pytest.mark.case("S6")
def test_parameters_in_another_order(tmp_path):
    def make(first, second):
        net = nn.Sequential()
        net.a, net.b = nn.Linear(36, 36), nn.Linear(36, 36)
        net.out = nn.Linear(36, 3)
        net.forward = lambda x: net.out(net.b(net.a(x.flatten(1))))
        return learner(model=net, splitter={"one": [f"{first}.*"], "two": [f"{second}.*", "out.*"]})

    make("a", "b").fit(0.01, 2, callbacks=[every_step(tmp_path)], resume="auto")
    refused(make("b", "a"), tmp_path / "fit-1" / "step-00000008.ckpt", "in other groups, or in another order")


@pytest.mark.case("S14")
def test_callbacks_that_come_and_go_are_a_warning(tmp_path):
    def fit(callbacks, resume):
        learn = learner()
        learn.fit(0.01, 3, callbacks=callbacks, resume=resume)
        return learn

    fit([every_step(tmp_path), EMA(decay=0.9), SaveBest("accuracy")], "auto")
    file = tmp_path / "fit-1" / "step-00000008.ckpt"
    with pytest.warns(UserWarning, match="there is no") as caught:
        fit([EMA(decay=0.9), EarlyStopping("accuracy", patience=5)], file)
    said = sorted(str(warning.message) for warning in caught)
    assert len(said) == 2
    assert "there is no EarlyStopping in the checkpoint: it begins in the middle of the fit" in said[0]
    assert "there is no SaveBest in this fit: what it has kept is left out" in said[1]
    ema = EMA(decay=0.9)
    with pytest.warns(UserWarning, match="no SaveBest in this fit"):
        fit([ema], file)


def test_a_callback_that_is_new_hears_of_the_epoch_it_comes_into(path):
    class Hears(Callback):
        def before_fit(self, state):
            self.heard = []

        def before_epoch(self, state):
            self.heard.append((state.epoch, state.step))

    hears = Hears()
    learner().fit(0.01, 2, callbacks=[hears], resume=path)
    assert hears.heard == [(1, 8)]


@pytest.mark.case("S10", "E2")
def test_another_thread_count_is_one_warning(path):
    torch.set_num_threads(torch.get_num_threads() + 1)
    learn = learner()
    with pytest.warns(UserWarning, match="was made elsewhere") as caught:
        learn.fit(0.01, 2, resume=path)
    assert len(caught) == 1
    n = torch.get_num_threads()
    assert f"threads {n - 1} then, {n} now" in str(caught[0].message)
    assert "maybe not with the same bits" in str(caught[0].message)


@pytest.mark.case("K18")
def test_a_newer_format(path, tmp_path):
    newer = write(tmp_path, torch.load(path, weights_only=True) | {"format": 7})
    refused(learner(), newer, r"has format 7, and this version of minifast reads up to \d+\. Upgrade minifast")


def write(folder, tree):
    torch.save(tree, folder / "step-00000008.ckpt")
    return folder / "step-00000008.ckpt"


def test_files_that_are_no_checkpoint(path, tmp_path):
    learn = learner()
    weights = learn.save(tmp_path / "weights.pt")
    said = refused(learn, weights, "is not a checkpoint of a fit. Weights are loaded by learn.load")
    assert str(weights) in said
    (tmp_path / "text.ckpt").write_text("hello")
    refused(learner(), tmp_path / "text.ckpt", "text.ckpt")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    refused(learner(), tmp_path / "empty.ckpt", "empty.ckpt")
    for tree in (None, [], 3, "text", {"format": "1"}, {"format": None}, {"format": 1}):
        refused(learner(), write(tmp_path, tree), "is not a checkpoint|made by another fit|not a checkpoint that")


def test_an_optimizer_state_of_another_shape(path, tmp_path):
    """A kernel would read and write behind its end."""
    tree = torch.load(path, weights_only=True)
    kept = next(iter(tree["optimizer"]["state"]["state"].values()))
    kept["exp_avg"] = kept["exp_avg"].flatten()[:1].clone()
    refused(learner(), write(tmp_path, tree), r"optimizer: the state exp_avg of .* has the shape \(1,\) for \(")


ODD = (None, 3, -1, 10**12, float("nan"), "text", [], {}, [1, 2], torch.zeros(2), {"a": 1})


def places(tree, at=()):
    """The keys on the way to each part of a tree, down to a depth."""
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict) and len(at) < 2:
            yield from places(value, (*at, key))


def with_part(tree, at, value):
    tree = dict(tree)
    if len(at) > 1:
        tree[at[0]] = with_part(tree[at[0]], at[1:], value)
    elif value is Ellipsis:
        del tree[at[0]]
    else:
        tree[at[0]] = value
    return tree


def outcome_of(learn, file):
    """The error of a fit that is resumed, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            learn.fit(0.01, 2, resume=file)
        except Exception as error:
            return error
    return None


@pytest.mark.table
@pytest.mark.nightly
@pytest.mark.case("X3", "X11")
@pytest.mark.parametrize("odd", [Ellipsis, *ODD], ids=lambda odd: "missing" if odd is Ellipsis else repr(odd)[:12])
def test_a_crafted_tree_is_refused_or_harmless(path, tmp_path, odd):
    """Every part of a checkpoint in turn is missing or odd: the fit works, or is refused and changes nothing."""
    tree = torch.load(path, weights_only=True)
    n_refused = 0
    learn = learner()
    before = everything(learn)
    for at in places(tree):
        file = write(tmp_path, with_part(tree, at, odd))
        error = outcome_of(learn, file)
        if error is None:
            learn = learner()
            before = everything(learn)
            continue
        n_refused += 1
        assert isinstance(error, (ValueError, TypeError, OSError)), f"{at}: {error!r}"
        assert "step-00000008.ckpt" in str(error), f"{at}: {error!r}"
        assert everything(learn) == before, at
    assert n_refused > 20
    learn.fit(0.01, 2, resume=path)
