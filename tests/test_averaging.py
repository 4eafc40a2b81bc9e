"""EMA and SWA: the averages are torch's, the raw weights always come back, and who looks at which weights."""
import copy
import io
from functools import partial

import pytest
import torch
from helpers import At, batches, bits, learner, spying, throw, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from minifast import Callback, CancelBatch, CancelEpoch, CancelFit
from minifast.callbacks import weights as weights_module
from minifast.callbacks.averaging import EMA, SWA

EXACT = {"rtol": 1e-12, "atol": 1e-14}


class Net(nn.Module):
    """BatchNorm, tied weights, a frozen parameter, a mask with -inf, a cache that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.full((3,), 0.7), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.cache += 1
        if self.training:
            self.seen = self.seen + len(x)  # another tensor each time
        return self.head(torch.relu(self.norm(self.second(self.first(x)))) * self.scale + (self.mask > 0))


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def data(n=5, seed=1, dtype=torch.float64, size=4):
    return batches(n, size, seed=seed, dtype=dtype)


def make(callbacks=(), n=5, seed=0, **options):
    options = {"model": net(seed=seed), "callbacks": callbacks} | options
    return learner(data(n), data(2, seed=9), **options)


def by_name(model, only_float=False):
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if name != "cache" and (tensor.is_floating_point() or not only_float)}


def close(ours, theirs):
    assert ours.keys() <= theirs.keys() | {"first.weight"}
    for name, tensor in theirs.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(ours[name], tensor, **EXACT)


class TorchAverage(Callback):
    """The independent observer: torch's own average of what the model holds when `event` happens from `start` on."""

    def __init__(self, event, start=0, **options):
        self.event, self.start, self.options, self.average = event, start, options, None

    def before_fit(self, state):
        self.average = AveragedModel(state.model, use_buffers=True, **self.options)
        for name, buffer in self.average.module.named_buffers():
            if name == "mask":
                buffer.zero_()  # torch's own average makes nan of -inf

    def hear(self, state, event):
        if event == self.event and state.step >= self.start:
            mask = state.model.mask.clone()
            state.model.mask.zero_()
            self.average.update_parameters(state.model)
            state.model.mask.copy_(mask)

    def after_step(self, state): self.hear(state, "after_step")
    def after_epoch(self, state): self.hear(state, "after_epoch")

    def values(self):
        values = by_name(self.average.module)
        values["mask"] = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
        return values


class Seen(Callback):
    """The weights that each event sees."""

    def __init__(self, *events):
        self.seen = []
        for event in events:
            setattr(self, event, self.note)

    def note(self, state):
        self.seen.append(by_name(state.model))


class Killed(Callback):
    """Runs `make()`, and replaces it after `step` steps by a new one that takes up its state through a file."""

    def __init__(self, make, event, n):
        self.make, self.event, self.n, self.inner, self.count = make, event, n, make(), 0
        self.order, self.owns = self.inner.order, self.inner.owns

    def hear(self, state, event):
        getattr(self.inner, event)(state)
        if event == self.event:
            self.count += 1
            if self.count == self.n:
                file = io.BytesIO()
                torch.save(self.inner.state_dict(), file)
                file.seek(0)
                self.inner = self.make()
                self.inner.before_fit(state)
                self.inner.load_state_dict(torch.load(file, weights_only=True))

    def before_fit(self, state): self.hear(state, "before_fit")
    def after_step(self, state): self.hear(state, "after_step")
    def after_batch(self, state): self.hear(state, "after_batch")
    def after_epoch(self, state): self.hear(state, "after_epoch")
    def after_fit(self, state): self.hear(state, "after_fit")
    def evaluating(self, model): return self.inner.evaluating(model)


# ---- the average is torch's


@settings(max_examples=25)
@given(decay=st.floats(0, 0.9999), seed=st.integers(0, 99), accumulate=st.integers(1, 3))
def test_ema_is_torchs(decay, seed, accumulate):
    ema, theirs = EMA(decay), TorchAverage("after_step", multi_avg_fn=get_ema_multi_avg_fn(decay))
    learn = make([theirs, ema], seed=seed)
    learn.fit(0.1, 2, accumulate=accumulate)
    close(ema.averages, theirs.values())
    assert ema.n_averaged == int(theirs.average.n_averaged) == 2 * -(-5 // accumulate)
    assert torch.equal(ema.averages["norm.num_batches_tracked"], learn.model.norm.num_batches_tracked)


@settings(max_examples=25)
@given(start=st.sampled_from([0, 0.3, 0.5, 0.75, 1]), seed=st.integers(0, 99))
def test_swa_is_torchs(start, seed):
    swa, theirs = SWA(start, apply=False), TorchAverage("after_epoch", start * 20)
    learn = make([theirs, swa], seed=seed)
    learn.fit(0.1, 4)
    close(swa.averages, theirs.values())
    assert swa.n_averaged == int(theirs.average.n_averaged) == {0: 4, 0.3: 3, 0.5: 3, 0.75: 2, 1: 1}[start]


def test_swa_every_few_steps():
    swa, seen = SWA(0.5, every=3, apply=False), Seen("after_step")
    make([seen, swa]).fit(0.1, 4)
    expected = [seen.seen[step - 1]["head.weight"] for step in (12, 15, 18)]
    torch.testing.assert_close(swa.averages["head.weight"], sum(expected) / 3, **EXACT)
    assert swa.n_averaged == 3


def test_half_life():
    assert EMA(half_life=7).rate ** 7 == pytest.approx(0.5)
    ema, learn = EMA(half_life=2), make(n=3)
    before = {}

    def freeze(state):  # the weights of step 0 stay: the average is half of the way there two steps later
        before.update({name: t.clone() for name, t in ema.averages.items()})
        with torch.no_grad():
            state.model.head.weight += 1
        for p in state.model.parameters():
            p.requires_grad_(False)
        state.model.head.bias.requires_grad_(True)

    learn.fit(0.1, callbacks=[ema, At("after_batch", freeze, 0)])
    torch.testing.assert_close(ema.averages["head.weight"], before["head.weight"] + 0.5, **EXACT)


def test_it_begins_with_the_weights_after_the_first_step_and_each_fit_anew():
    ema, seen = EMA(0.9), Seen("after_step")
    learn = make([seen, ema], n=1)
    for _ in range(2):
        learn.fit(0.1)
        assert ema.n_averaged == 1
        assert torch.equal(ema.averages["head.weight"], seen.seen[-1]["head.weight"])


def test_dropped_steps_do_not_count():
    ema, seen = EMA(0.5), Seen("after_step")
    make([ema, seen, At("before_step", throw(CancelBatch), 2),
          At("before_step", throw(CancelBatch), 3)]).fit(0.1)  # batches 2 and 4: it does not hear of batch 2
    a, b, c = (weights["head.weight"] for weights in seen.seen)
    assert ema.n_averaged == 3
    torch.testing.assert_close(ema.averages["head.weight"], a / 4 + b / 4 + c / 2, **EXACT)


def test_what_is_kept():
    ema = EMA(0.9)
    learn = make([ema])
    learn.fit(0.1)
    assert ema.averages.keys() == learn.model.state_dict().keys() - {"second.weight"}  # tied: once
    assert ema.averages["mask"].tolist() == [0, 0, -torch.inf]
    assert ema.averages["scale"].tolist() == learn.model.scale.tolist()  # frozen
    assert torch.equal(ema.averages["norm.num_batches_tracked"], torch.tensor(5))
    assert 4 < ema.averages["seen"] < 20  # its newest value is followed, though it is a new tensor each time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype):
    ema = EMA(0.999)
    model = nn.Linear(3, 1).to(dtype)
    learn = learner(batches(200, dtype=dtype), batches(1, dtype=dtype), model=model, callbacks=[ema])
    seen = Seen("after_step")
    learn.fit(0.003, callbacks=[seen])
    weight, expected = ema.averages["weight"], seen.seen[0]["weight"].double()
    for weights in seen.seen[1:]:
        expected = 0.999 * expected + 0.001 * weights["weight"].double()
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-5)
    assert (weight - seen.seen[0]["weight"]).abs().max() > 3e-3  # in half precision none of these steps would count
    with ema.swapped(learn.model):
        assert torch.equal(learn.model.weight, weight.to(dtype))


def test_parameters_that_are_frozen_and_unfrozen_in_a_fit():
    ema, seen = EMA(0.5), Seen("after_step")
    learn = make([ema, seen], n=4)

    def freeze(state): state.model.head.requires_grad_(False)
    def unfreeze(state): state.model.head.requires_grad_(True)

    learn.fit(0.1, callbacks=[At("before_batch", freeze, 1), At("before_batch", unfreeze, 3)])
    a, b, c, d = (weights["head.weight"] for weights in seen.seen)
    assert torch.equal(a, c) and not torch.equal(c, d)  # noqa: PT018
    torch.testing.assert_close(ema.averages["head.weight"], a / 8 + b / 8 + c / 4 + d / 2, **EXACT)


# ---- who sees which weights


@pytest.mark.parametrize("make_average", [partial(EMA, 0.5), partial(SWA, 0, apply=False)])
def test_validation_sees_the_average_and_training_does_not(make_average):
    average, looked, after = make_average(), Seen("after_valid_batch"), Seen("after_validate", "after_epoch")
    steps = Seen("after_step")
    learn, plain = make([average, looked, after, steps], n=3), make(n=3)
    kept = []
    learn.fit(0.1, 2, callbacks=[At("after_epoch", lambda state: kept.append(copy.deepcopy(average.averages)))])
    plain.fit(0.1, 2)
    for epoch, averages in enumerate(kept):
        for seen in looked.seen[2 * epoch: 2 * epoch + 2]:
            assert bits({name: seen[name] for name in averages}) == bits(averages)
        for seen in after.seen[2 * epoch: 2 * epoch + 2]:
            assert bits(seen) == bits(steps.seen[3 * epoch + 2])
    assert bits(kept[1]) != bits({name: steps.seen[-1][name] for name in kept[1]})
    assert trained(learn) == trained(plain)  # and training is bit for bit the same
    assert [row["train_loss"] for row in learn.recorder.epochs] == [row["train_loss"] for row in plain.recorder.epochs]
    assert learn.recorder.epochs[1]["valid_loss"] != plain.recorder.epochs[1]["valid_loss"]


def test_the_first_average_of_swa_is_validated_in_its_own_epoch():
    swa, looked, steps = SWA(0.75, apply=False), Seen("after_valid_batch"), Seen("after_step")
    make([swa, looked, steps], n=1).fit(0.1, 4)
    weights = [seen["head.weight"] for seen in steps.seen]
    for epoch, seen in enumerate(looked.seen[::2]):
        wanted = (weights[2] + weights[3]) / 2 if epoch == 3 else weights[epoch]
        torch.testing.assert_close(seen["head.weight"], wanted, **EXACT)


def test_nothing_is_swapped_before_the_first_step():
    ema, looked = EMA(0.5), Seen("after_valid_batch")
    learn = make([ema, looked])
    before = by_name(learn.model)
    learn.fit(0.1, callbacks=[At("before_step", throw(CancelBatch))])
    assert ema.averages == {}
    assert torch.equal(looked.seen[0]["head.weight"], before["head.weight"])
    learn.validate()
    with pytest.raises(RuntimeError, match=r"EMA\(decay=0.5.* has no averaged weights: fit with it first"):
        ema.swapped(learn.model)
    with pytest.raises(RuntimeError, match="has no averaged weights"):
        ema.copy_to(learn.model)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, CancelEpoch, CancelFit])
@pytest.mark.parametrize("event", ["before_validate", "after_valid_batch"])
def test_the_raw_weights_come_back_whatever_happens_in_validation(error, event):
    ema, steps = EMA(0.5), Seen("after_step")
    learn = make([ema, steps])
    try:
        learn.fit(0.1, callbacks=[At(event, throw(error))])
    except (ZeroDivisionError, KeyboardInterrupt) as raised:
        assert type(raised) is error  # noqa: PT017
    assert ema.n_averaged == 5
    assert bits(by_name(learn.model)) == bits(steps.seen[-1])


def look(learn):
    """What validate, get_preds and predict say, and what they would say with the averaged weights of the callback."""
    (x, _), *_ = learn.dls.valid
    return bits([learn.validate(), learn.get_preds()[0], learn.predict(x)])


def test_the_learners_own_is_used_for_validate_get_preds_and_predict():
    ema, fits_own = EMA(0.5), EMA(0.5)
    learn, other = make([ema]), make()
    learn.fit(0.1)
    other.fit(0.1, callbacks=[fits_own])
    raw = by_name(learn.model)
    assert look(learn) != look(other)
    with fits_own.swapped(other.model):
        assert look(learn) == look(other)
    assert bits(by_name(learn.model)) == bits(raw) == bits(by_name(other.model))
    assert learn.validate()["valid_loss"] == pytest.approx(learn.recorder.epochs[-1]["valid_loss"], abs=0)


def test_weights_that_the_average_does_not_belong_to_are_looked_at_as_they_are(tmp_path):
    ema = EMA(0.5)
    learn = make([ema])
    fresh = look(learn)
    path = learn.save(tmp_path / "fresh.pt")
    learn.fit(0.1)
    averaged = look(learn)
    learn.lr_find(num_it=3)
    with learn.sandbox():
        learn.fit(0.1)
        assert look(learn) != averaged
    assert look(learn) == averaged  # the same weights again
    learn.load(path)
    assert look(learn) == fresh
    ema.copy_to(learn.model)
    assert look(learn) == averaged
    learn.fit(0.1, callbacks=[SWA(0, apply=False)])  # takes the place of the learner's average
    raw = copy.deepcopy(learn.model).eval()
    (x, _), *_ = learn.dls.valid
    assert torch.equal(learn.predict(x), raw(x))


def test_learn_save_writes_the_raw_weights(tmp_path):
    ema, learn = EMA(0.5), None

    def save(state): learn.save(tmp_path / "weights.pt")

    for event in ("after_validate", "after_epoch", "after_fit"):
        learn, steps = make([ema]), Seen("after_step")
        learn.fit(0.1, callbacks=[At(event, save), steps])
        saved = torch.load(tmp_path / "weights.pt")
        assert bits({name: saved[name] for name in ema.averages}) == bits({name: steps.seen[-1][name]
                                                                          for name in ema.averages})
    save(None)
    assert torch.equal(torch.load(tmp_path / "weights.pt")["head.weight"], learn.model.head.weight)
    with ema.swapped(learn.model):
        save(None)
    assert torch.equal(torch.load(tmp_path / "weights.pt")["head.weight"], ema.averages["head.weight"])


def test_the_model_keeps_its_tensors():
    ema = EMA(0.5)
    learn = make([ema])
    del learn.model.seen
    learn.model.register_buffer("seen", torch.zeros(()))
    learn.fit(0.1)
    where = {name: (id(p), p.data_ptr()) for name, p in [*learn.model.named_parameters(), *learn.model.named_buffers()]}
    with ema.swapped(learn.model):
        inside = {name: p.data_ptr() for name, p in learn.model.named_parameters()}
        assert learn.model.first.weight is learn.model.second.weight
    ema.copy_to(learn.model)
    after = {name: (id(p), p.data_ptr()) for name, p in [*learn.model.named_parameters(), *learn.model.named_buffers()]}
    assert after == where
    assert inside == {name: p.data_ptr() for name, p in learn.model.named_parameters()}
    assert bits(ema.averages) == bits({name: by_name(learn.model)[name] for name in ema.averages})


def test_a_buffer_that_is_replaced_in_the_block_is_put_back():
    ema = EMA(0.5)
    learn = make([ema])
    learn.fit(0.1)
    before = learn.model.seen
    with ema.swapped(learn.model):
        learn.model.train()
        learn.model(torch.ones(4, 3, dtype=torch.float64))
        assert learn.model.seen is not before
    assert learn.model.seen is before


def test_a_parameter_that_is_replaced_in_the_block_has_its_own_values_again():  # as those of a sharded model are
    ema = EMA(0.5)
    learn = make([ema])
    learn.fit(0.1)
    raw = by_name(learn.model)
    with ema.swapped(learn.model):
        learn.model.head.weight = new = nn.Parameter(learn.model.head.weight.detach().clone())
    assert learn.model.head.weight is new
    assert bits(by_name(learn.model)) == bits(raw)


def test_another_model_of_the_same_shape():
    ema = EMA(0.5)
    learn = make([ema])
    learn.fit(0.1)
    twin = net(torch.float32, seed=5)
    raw = by_name(twin)
    with ema.swapped(twin):
        assert torch.equal(twin.head.weight, ema.averages["head.weight"].float())
    assert bits(by_name(twin)) == bits(raw)
    for model, message in ((nn.Linear(3, 1), "no values for weight, bias; no place for scale, mask, seen, first"),
                           (nn.Linear(3, 2), r"these weights are not those of this model \(Linear\): no values")):
        before = bits(by_name(model))
        with pytest.raises(ValueError, match=message), ema.swapped(model):
            pass
        assert bits(by_name(model)) == before
    other = net()
    other.head = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"another shape of head.weight \(1, 3\) for \(2, 3\), head.bias \(1,\) for"):
        ema.copy_to(other)


def test_one_average_in_validation():
    with pytest.raises(ValueError, match=r"both EMA\(decay=0.5.* and SWA\(.*set 'the weights that are validated'"):
        make([EMA(0.5), SWA()]).fit(0.1)
    fast, slow, swa = EMA(0.1), EMA(0.9, in_validation=False), SWA(0, apply=False, in_validation=False)
    looked = Seen("after_valid_batch")
    make([slow, fast, swa, looked]).fit(0.1, 2)
    assert torch.equal(looked.seen[-1]["head.weight"], fast.averages["head.weight"])
    assert len({bits(cb.averages["head.weight"]) for cb in (fast, slow, swa)}) == 3


def test_it_keeps_no_model_alive_and_one_copy():
    ema = EMA(0.5)
    learn = make([ema])
    learn.fit(0.1)
    assert not any(isinstance(value, nn.Module) for value in vars(ema).values())
    assert (ema._slots, ema._pairs) == ({}, [])
    assert sum(t.nbytes for t in ema.averages.values()) == sum(t.nbytes for t in by_name(learn.model).values())


# ---- over a kill


AVERAGES = [partial(EMA, 0.8), partial(EMA, half_life=3), partial(SWA, 0.3, apply=False), partial(SWA, 0.3),
            partial(SWA, 0.2, every=2)]


@pytest.mark.table
@pytest.mark.parametrize("make_average", AVERAGES)
@pytest.mark.parametrize(("event", "n"), [("after_step", 1), ("after_step", 8), ("after_step", 10),
                                          ("after_batch", 10), ("after_epoch", 2), ("after_step", 14)])
def test_goes_on_where_it_was_killed(make_average, event, n):
    whole, killed = make_average(), Killed(make_average, event, n)
    learn, other = make([whole]), make([killed])
    for each in (learn, other):
        each.fit(0.1, 3)
    assert trained(learn) == trained(other)
    assert bits(whole.state_dict()) == bits(killed.inner.state_dict())
    columns = [[{**row, "time": 0} for row in each.recorder.epochs] for each in (learn, other)]
    assert columns[0] == columns[1]


def test_taking_up_its_own_state_in_a_fit_changes_nothing():
    def take_up(state): ema.load_state_dict(ema.state_dict())

    averages = []
    for callbacks in ([], [At("after_step", take_up, 2)]):
        ema = EMA(0.5)
        make([ema]).fit(0.1, 2, callbacks=callbacks)
        averages.append(bits(ema.averages))
    assert averages[0] == averages[1]


def test_the_state_is_a_copy():
    ema = EMA(0.5)
    learn = make([ema])
    learn.fit(0.1)
    saved = ema.state_dict()
    before = bits(saved)
    learn.fit(0.1)
    assert bits(saved) == before != bits(ema.state_dict())


def test_the_sandbox_puts_it_back():
    ema = EMA(0.5)
    learn = make([ema])
    learn.fit(0.1)
    before = bits(ema.state_dict())
    with learn.sandbox():
        learn.fit(0.1)
        assert bits(ema.state_dict()) != before
    assert bits(ema.state_dict()) == before


# ---- SWA at the end of its fit


def test_swa_ends_with_the_average_in_the_model_and_new_statistics():
    apply, kept = SWA(0.5), SWA(0.5, apply=False)
    learn, other = make([apply]), make([kept])
    generator = torch.get_rng_state()
    learn.fit(0.1, 4)
    assert torch.equal(torch.get_rng_state(), generator)
    other.fit(0.1, 4)
    modes = [module.training for module in other.model.modules()]
    assert [module.training for module in learn.model.modules()] == modes
    assert learn.model.norm.momentum == 0.1
    assert apply.averages == {}
    assert apply.n_averaged == 3
    kept.copy_to(other.model)
    raw_mean = other.model.norm.running_mean.clone()
    update_bn(data(5), other.model)
    assert not torch.equal(other.model.norm.running_mean, raw_mean)
    other.model.seen.copy_(learn.model.seen)  # it counts the passes of update_bn too
    close(by_name(learn.model), by_name(other.model))
    assert learn.model.norm.num_batches_tracked == 5
    assert learn.validate()["valid_loss"] == pytest.approx(other.validate()["valid_loss"])
    learn.fit(0.1)  # and it can be trained on


def test_the_pass_for_the_statistics_leaves_random_generators_alone():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    after = []
    for swa in (SWA(0), SWA(0, apply=False)):
        learn = learner(model=model(), callbacks=[swa])
        torch.manual_seed(3)
        learn.fit(0.1, 2)
        after.append(bits(torch.get_rng_state()))
    assert after[0] == after[1]


def test_the_pass_for_the_statistics_is_as_long_as_an_epoch_and_leaves_frozen_norms_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.3), nn.Linear(3, 1))
    learn = learner(batches(6), model=model, splitter=lambda m: [m[:2], m[2:]], train_bn=False)
    learn.freeze()
    model[0].running_mean.fill_(0.3)
    frozen = bits(model[0].state_dict())
    learn.fit(0.1, 2, steps_per_epoch=4, callbacks=[SWA(0)])
    assert bits(model[0].state_dict()) == frozen
    outputs = [model[1](model[0].eval()(x)) for x, _ in batches(6)[:4]]
    torch.testing.assert_close(model[2].running_mean, torch.stack([x.mean(0) for x in outputs]).mean(0))
    assert model[2].num_batches_tracked == 4
    assert model[2].momentum == 0.3


@pytest.mark.parametrize(("event", "error"), [("after_loss", ZeroDivisionError), ("after_loss", KeyboardInterrupt),
                                              ("after_batch", CancelFit), ("after_epoch", ZeroDivisionError)])
def test_a_fit_that_is_cut_short_keeps_its_raw_weights(event, error):
    swa, steps = SWA(0), Seen("after_step")
    learn = make([swa, steps])
    n = 2 if event == "after_epoch" else 12
    try:
        learn.fit(0.1, 3, callbacks=[At(event, throw(error), n)])
    except (ZeroDivisionError, KeyboardInterrupt) as raised:
        assert type(raised) is error  # noqa: PT017
    assert bits({"w": learn.model.head.weight}) == bits({"w": steps.seen[-1]["head.weight"]})
    assert swa.n_averaged == (3 if event == "after_epoch" else 2)
    with swa.swapped(learn.model):
        assert not torch.equal(learn.model.head.weight, steps.seen[-1]["head.weight"])


def test_a_fit_that_ends_early_as_it_should_is_complete():
    def end(state): state.is_ending = True

    for event, n in (("after_batch", 7), ("after_epoch", 1)):
        swa, steps = SWA(0), Seen("after_step")
        learn = make([swa, steps])
        learn.fit(0.1, 9, callbacks=[At(event, end, n)])
        ends = [steps.seen[4]["head.weight"], steps.seen[-1]["head.weight"]]
        assert swa.n_averaged == 2
        torch.testing.assert_close(learn.model.head.weight.detach(), sum(ends) / 2, **EXACT)


def test_a_fit_that_ends_before_the_start_keeps_its_weights():
    def end(state): state.is_ending = True

    swa, steps = SWA(0.75), Seen("after_step")
    learn = make([swa, steps])
    learn.fit(0.1, 4, callbacks=[At("after_epoch", end, 0)])
    assert torch.equal(learn.model.head.weight, steps.seen[-1]["head.weight"])
    assert swa.n_averaged == 0


class FailsOnPass:
    """A loader whose n-th pass fails in its second batch, in one of several ways."""

    def __init__(self, n, error):
        self.n, self.error, self.passes = n, error, 0

    def __len__(self):
        return 5

    def __iter__(self):
        self.passes += 1
        for i, batch in enumerate(data(5)):
            if self.passes == self.n and i == 1:
                raise self.error
            yield batch


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_a_failure_in_the_pass_for_the_statistics_puts_the_raw_weights_back(error):
    swa, steps = SWA(0), Seen("after_step")
    learn = learner(FailsOnPass(4, error), model=net(), callbacks=[swa, steps])
    with pytest.raises(type(error)):
        learn.fit(0.1, 3)
    last = {name: steps.seen[-1][name] for name in swa.averages if name != "seen"}
    assert bits({name: by_name(learn.model)[name] for name in last}) == bits(last)
    assert swa.n_averaged == 3
    assert learn.model.norm.momentum == 0.1
    with swa.swapped(learn.model):
        pass


def test_a_pass_without_data_is_an_error():
    class Once:
        passes = 0

        def __len__(self):
            return 5

        def __iter__(self):
            self.passes += 1
            return iter(data(5) if self.passes == 1 else ())

    learn, steps = learner(Once(), model=net(), callbacks=[SWA(0)]), Seen("after_step")
    with pytest.raises(ValueError, match="the training data yielded 0 batches"):
        learn.fit(0.1, callbacks=[steps])
    assert torch.equal(learn.model.norm.running_mean, steps.seen[4]["norm.running_mean"])


def test_an_iterator_is_refused_where_a_second_pass_is_needed():
    def fit(swa, model):
        learner(iter(batches(3)), model=model).fit(0.1, steps_per_epoch=3, callbacks=[swa])

    with_norm = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"one more pass over the training data, but this is an iterator "
                                         r"\(list_iterator\), good for one. Pass SWA\(apply=False\)"):
        fit(SWA(), with_norm)
    fit(SWA(apply=False), with_norm)
    fit(SWA(), nn.Linear(3, 1))  # nothing to compute


def test_cancelled_epochs_have_an_end_too():
    swa, steps = SWA(0, apply=False), Seen("after_step")
    make([swa, steps]).fit(0.1, 2, callbacks=[At("after_batch", throw(CancelEpoch), 2)])
    torch.testing.assert_close(swa.averages["head.weight"],
                               (steps.seen[2]["head.weight"] + steps.seen[-1]["head.weight"]) / 2, **EXACT)


def test_an_epoch_without_a_step_adds_nothing():
    swa = SWA(0, apply=False)
    make([swa]).fit(0.1, 3, callbacks=[At("before_epoch", throw(CancelEpoch), 1)])
    assert swa.n_averaged == 2


def test_start_means_the_share_of_the_time_where_the_fit_is_limited_by_it(monkeypatch):
    from minifast.schedules import time_limit as budget

    now = iter(range(10**6))
    monkeypatch.setattr(budget.time, "monotonic", lambda: float(next(now)))  # one second per batch
    swa = SWA(0.5, apply=False)
    learn = make([swa])
    learn.fit(0.1, minutes=20 / 60)
    assert len(learn.recorder.epochs) == 5  # the 21st batch is the first after 20 seconds
    assert swa.n_averaged == 3  # at 14, 19 and 20 seconds; at 9 it was not yet half


# ---- settings


@pytest.mark.parametrize(("make_average", "message"), [
    (lambda: EMA(), r"EMA takes either decay or half_life, got neither. Pass e.g. EMA\(half_life=100\)"),
    (lambda: EMA(0.9, 10), "either decay or half_life, got decay=0.9 and half_life=10"),
    (lambda: EMA(1), r"decay must be a finite number >= 0 and < 1, got 1 \(int\). Pass e.g. EMA\(decay=0.999\)"),
    (lambda: EMA(-0.1), "decay must be a finite number >= 0 and < 1, got -0.1"),
    (lambda: EMA(half_life=0), r"half_life must be a finite number > 0, got 0 \(int\)"),
    (lambda: SWA(1.5), "start must be a finite number >= 0 and <= 1, got 1.5"),
    (lambda: SWA(every=0), "every must be an int >= 1, got 0"),
])  # fmt: skip
def test_settings_out_of_range(make_average, message):
    with pytest.raises(ValueError, match=message):
        make_average()


def test_flags_are_flags():
    with pytest.raises(TypeError, match="in_validation must be True or False, got 1"):
        EMA(0.9, in_validation=1)
    with pytest.raises(TypeError, match="apply must be True or False, got 'yes'"):
        SWA(apply="yes")


@pytest.mark.parametrize("average", [EMA(0.9), EMA(half_life=20), EMA(0.5, in_validation=False), SWA(),
                                     SWA(0.5, every=3, apply=False, in_validation=False)])
def test_repr_rebuilds_it(average):
    assert repr(eval(repr(average))) == repr(average)
    assert eval(repr(average)).owns == average.owns


def test_start_is_not_missed_by_rounding():
    swa = SWA(0.28, every=1, apply=False)  # 0.28 * 25 is 7.000000000000001
    make([swa]).fit(0.1, 5)
    assert swa.n_averaged == 19


@pytest.mark.slow
def test_a_compiled_model_sees_the_averages():
    ema = EMA(0.5)
    learn = learner(data(3), data(1), model=nn.Linear(3, 1).double(), callbacks=[ema], compile={"backend": "eager"})
    learn.fit(0.1, 2)
    with ema.swapped(learn.model):
        x = data(1)[0][0]
        torch.testing.assert_close(learn.forward(x), x @ ema.averages["weight"].T + ema.averages["bias"], **EXACT)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_the_averages_are_there():
    ema = EMA(0.5)
    learn = learner(batches(4), batches(1), device="cuda", callbacks=[ema])
    learn.fit(0.1)

    def strict(state): torch.cuda.set_sync_debug_mode("error")
    def lax(state): torch.cuda.set_sync_debug_mode("default")

    class First(At): order = ema.order - 1
    class Last(At): order = ema.order + 1

    try:
        learn.fit(0.1, callbacks=[First("after_step", strict, 1), Last("after_step", lax)])
    finally:
        lax(None)
    assert all(tensor.is_cuda for tensor in ema.averages.values())
    cpu = copy.deepcopy(learn.model).cpu()
    with ema.swapped(cpu):
        assert torch.equal(cpu.weight, ema.averages["weight"].cpu())


def test_moving_the_model_between_fits_is_no_matter():
    ema = EMA(0.5)
    learn = learner(batches(4), batches(1), callbacks=[ema], opt_func=spying())
    learn.fit(0.1)
    learn.model.double()
    learn.dls.train, learn.dls.valid = data(4), data(1)
    learn.fit(0.1)
    assert ema.averages["weight"].dtype == torch.float64


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_the_raw_weights_come_back_if_the_swap_is_cut_short(kind, monkeypatch):
    ema = EMA(0.5)
    learn = make([ema])
    learn.fit(0.1, 1)
    before = by_name(learn.model)
    put = weights_module.put

    def half(model, values):
        put(model, values)
        raise kind

    monkeypatch.setattr(weights_module, "put", half)
    with pytest.raises(kind):
        learn.validate()
    close(by_name(learn.model), before)
    assert bits(by_name(learn.model)) == bits(before)


@pytest.mark.parametrize("average", [lambda: EMA(0.5), lambda: SWA(0.0, every=1, apply=False)])
def test_a_fit_that_never_steps_loses_no_average(average):
    average = average()
    learn = make([average])
    learn.fit(0.1, 2)
    kept, looked = bits(average.averages), learn.validate()
    with pytest.raises(ZeroDivisionError):
        learn.fit(0.1, 1, callbacks=[At("before_batch", throw(ZeroDivisionError))])
    assert bits(average.averages) == kept
    assert learn.validate() == looked
    learn.fit(0.1, 1)
    assert bits(average.averages) != kept


def test_a_learner_is_no_model():
    ema = EMA(0.5)
    learn = make([ema])
    learn.fit(0.1)
    for call in (ema.swapped, ema.copy_to):
        with pytest.raises(TypeError, match=r"model must be a torch module, got a Learner\. Pass learn\.model"):
            call(learn)


def test_the_state_of_another_callback_is_refused():
    with pytest.raises(ValueError, match=r"this is not the state of EMA\(.*it holds 'best', .*expected 'averages'"):
        EMA(0.5).load_state_dict({"best": 1.0, "best_epoch": 3})
