"""Batches of every shape, loaders of every kind, digits, and what is refused about data."""

import dataclasses
import time
from collections import OrderedDict, namedtuple
from functools import partial
from importlib import resources

import numpy as np
import pytest
import torch
from helpers import batches, bits, everything, learner, rngs
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from minifast import DataLoaders, Learner, OneCycle, TensorLoader, digits
from minifast.base.batch import n_samples
from minifast.base.nest import describe, to_device

XY = namedtuple("XY", "x y")
XXY = namedtuple("XXY", "a b y")


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class HFOutput:
    loss: torch.Tensor | None
    logits: torch.Tensor


class TwoInputs(nn.Linear):
    def forward(self, a, b):
        return super().forward(a + b)


class Keywords(nn.Linear):
    def forward(self, *, x, labels=None):
        return super().forward(x)


class HFModel(nn.Linear):
    """As the models of Hugging Face: with labels, the output has a loss."""

    output = HFOutput

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return self.output(loss=None if labels is None else nn.functional.mse_loss(logits, labels), logits=logits)


class HFDict(HFModel):
    output = dict


# ---- batches

SHAPES = {  # (x, y) -> batch, the model for it
    "tuple": (lambda x, y: (x, y), nn.Linear),
    "list": (lambda x, y: [x, y], nn.Linear),
    "several inputs": (lambda x, y: (0.25 * x, 0.75 * x, y), TwoInputs),
    "list of several": (lambda x, y: [0.25 * x, 0.75 * x, y], TwoInputs),
    "nested": (lambda x, y: ((0.25 * x, 0.75 * x), y), TwoInputs),
    "nested list": (lambda x, y: [[0.25 * x, 0.75 * x], y], TwoInputs),
    "keywords and target": (lambda x, y: ({"x": x}, y), Keywords),
    "dict": (lambda x, y: {"x": x, "labels": y}, Keywords),
    "ordered dict": (lambda x, y: OrderedDict(x=x, labels=y), Keywords),
    "namedtuple": (XY, nn.Linear),
    "namedtuple of several": (lambda x, y: XXY(0.25 * x, 0.75 * x, y), TwoInputs),
    "dataclass": (Sample, nn.Linear),
}


@pytest.mark.table
@pytest.mark.case("B6")
@pytest.mark.parametrize(("make", "model"), SHAPES.values(), ids=SHAPES)
def test_every_shape_of_batch_trains_as_the_plain_one(make, model):
    plain, data = batches(3), [make(x, y) for x, y in batches(3)]
    torch.manual_seed(0)
    learn = learner(data, data, model=model(3, 1))
    reference = learner(plain, plain)
    for each in (learn, reference):
        each.fit_one_cycle(2, 0.1, accumulate=2)
    assert learn.recorder.losses == pytest.approx(reference.recorder.losses, rel=1e-5)
    assert learn.validate() == pytest.approx(reference.validate(), rel=1e-5)
    preds, targets = learn.get_preds()
    assert preds.shape == (12, 1)
    assert bits(targets) == bits(reference.get_preds()[1])


@pytest.mark.parametrize("model", [HFModel, HFDict])
def test_an_output_that_carries_its_loss(model):
    data = [{"x": x, "labels": y} for x, y in batches(3)]
    torch.manual_seed(0)
    learn, reference = learner(data, data, model=model(3, 1), loss_func=None), learner(batches(3), batches(3))
    for each in (learn, reference):
        each.fit(0.1, 2)
    assert bits(learn.recorder.losses) == bits(reference.recorder.losses)
    assert learn.validate() == reference.validate()
    assert bits(learn.get_preds()[0]) == bits(reference.get_preds()[0])


@pytest.mark.parametrize(("model", "data", "given"), [
    (nn.Linear(3, 1), batches(), "Tensor"),
    (HFModel(3, 1), batches(), "HFOutput"),
    (HFDict(3, 1), [{"x": torch.ones(4, 3)}], "dict"),
])  # fmt: skip
def test_an_output_without_a_loss(model, data, given):
    message = rf"loss_func=None needs a model whose output has `.loss`, but it returned a {given}. Pass a loss_func"
    with pytest.raises(TypeError, match=message):
        learner(data, model=model, loss_func=None).fit(0.1)


@pytest.mark.case("B6")
@pytest.mark.parametrize(("batch", "what"), [
    (torch.ones(4, 3), r"one bare tensor of shape \(4, 3\)"),
    ((torch.ones(4, 3),), r"a tuple of 1 element\(s\)"),
    ([], r"a list of 0 element\(s\)"),
    (None, "a NoneType"),
    ("text", "a str"),
], ids=["tensor", "tuple", "list", "None", "str"])  # fmt: skip
def test_a_batch_without_a_target_is_an_error_that_names_unpack(batch, what):
    learn = learner(Passes([batch]), Passes([batch]))
    message = rf"must hold inputs and a target, got {what}. Yield \(inputs, target\), or pass Learner\(..., unpack="
    for call in (partial(learn.fit, 0.1, steps_per_epoch=1), learn.validate, learn.get_preds):
        with pytest.raises(TypeError, match=message):
            call()


def test_unpack():
    data = [torch.cat([x, y], 1) for x, y in batches(3)]
    learn = learner(data, data, unpack=lambda batch: (batch[:, :3], batch[:, 3:]))
    reference = learner(batches(3), batches(3))
    for each in (learn, reference):
        each.fit(0.1, 2)
    assert learn.recorder.losses == pytest.approx(reference.recorder.losses, rel=1e-6)
    assert bits(learn.get_preds()[1]) == bits(reference.get_preds()[1])


@pytest.mark.table
@pytest.mark.parametrize("make", [make for make, _ in SHAPES.values()], ids=SHAPES)
def test_a_batch_is_moved_whole_and_keeps_its_type(make):
    batch = make(torch.ones(4, 3), torch.ones(4, 1))
    moved = to_device({"nested": [batch, "text", 3]}, "meta")
    inner, *rest = moved["nested"]
    assert type(inner) is type(batch)
    assert rest == ["text", 3]
    assert describe(inner) == describe(batch)
    assert {t.device.type for t in leaves(inner)} == {"meta"}
    assert {t.device.type for t in leaves(batch)} == {"cpu"}


def leaves(nest):
    if isinstance(nest, torch.Tensor):
        return [nest]
    parts = nest.values() if isinstance(nest, dict) else vars(nest).values() if isinstance(nest, Sample) else nest
    return [leaf for part in parts for leaf in leaves(part)]


@pytest.mark.parametrize(("target", "inputs", "n"), [
    (torch.ones(5), torch.ones(3), 5),
    (torch.tensor(1.0), None, 1),
    ({"boxes": torch.ones(2, 4)}, torch.ones(3), 2),
    (None, {"x": torch.ones(3)}, 3),
    (None, Sample(torch.tensor(1), torch.ones(6)), 6),
    (["a", "b"], None, 1),
])  # fmt: skip
def test_how_many_samples(target, inputs, n):
    assert n_samples(target, inputs) == n


# ---- loaders


class Passes:
    """An iterable whose every pass yields the same batches, without len()."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


class Lying(Passes):
    def __init__(self, data, length):
        super().__init__(data)
        self.length = length

    def __len__(self):
        return self.length


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*columns(), strict=True)


def columns():
    """What `batches(3)` holds, in one piece."""
    return tuple(torch.cat(column) for column in zip(*batches(3), strict=True))


def of_workers(n, **options):
    return DataLoader(TensorDataset(*columns()), 4, num_workers=n, **options)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_persistent_workers_that_died_are_started_again():
    """As they do of Ctrl-C in a terminal, where they were not forked and so do not know to ignore it."""
    loader = of_workers(2, persistent_workers=True, **FORKED)
    learn = learner(loader)
    learn.fit(0.1)
    loader._iterator._workers[0].kill()
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* (is killed by signal|exited)"):
        time.sleep(5)  # torch raises it in whatever the main thread does when the signal comes
    learn.fit(0.1)
    assert len(learn.recorder.losses) == 3


BATCHES = [range(4), range(4, 8), range(8, 12)]
FORKED = {"multiprocessing_context": "fork"}
LOADERS = {  # a loader of batches(3), the steps_per_epoch that it needs
    "DataLoader": (partial(of_workers, 0), None),
    "workers": (partial(of_workers, 2, **FORKED), None),
    "persistent workers": (partial(of_workers, 2, persistent_workers=True, **FORKED), None),
    "batch_sampler": (lambda: DataLoader(TensorDataset(*columns()), batch_sampler=BATCHES), None),
    "TensorLoader": (lambda: TensorLoader(*columns(), batch_size=4), None),
    "list": (lambda: batches(3), None),
    "IterableDataset": (lambda: DataLoader(Stream(), 4), 3),
    "IterableDataset with workers": (lambda: DataLoader(Stream(), 4, num_workers=1, **FORKED), 3),
    "custom": (lambda: Passes(batches(3)), 3),
    "custom with len": (lambda: Lying(batches(3), 3), None),
}  # fmt: skip


@pytest.mark.table
@pytest.mark.case("B8")
@pytest.mark.parametrize(("make", "steps"), LOADERS.values(), ids=LOADERS)
def test_every_kind_of_loader_trains_as_a_list_does(make, steps):
    learn, reference = learner(make(), make()), learner(batches(3), batches(3))
    learn.fit_one_cycle(2, 0.1, steps_per_epoch=steps)
    reference.fit_one_cycle(2, 0.1)
    assert bits(learn.recorder.losses) == bits(reference.recorder.losses)
    assert bits(learn.recorder.lrs) == bits(reference.recorder.lrs)
    for mine, theirs in zip(learn.recorder.epochs, reference.recorder.epochs, strict=True):
        assert mine | {"time": 0} == theirs | {"time": 0}


@pytest.mark.case("B8")
@pytest.mark.parametrize("make", [lambda: Passes(batches(3)), lambda: iter(batches(3)),
                                  lambda: DataLoader(Stream(), 4)])  # fmt: skip
def test_without_a_length_steps_per_epoch_is_asked_for(make):
    learn = learner(make())
    before = everything(learn)
    with pytest.raises(ValueError, match=r"has no len\(\), .* Pass steps_per_epoch=, the weight updates per epoch"):
        learn.fit(0.1)
    assert everything(learn) == before


def test_a_generator_is_good_for_one_epoch():
    drawn = []
    data = (drawn.append(i) or batch for i, batch in enumerate(batches(10)))
    learn, reference = learner(data), learner(batches(10)[:3])
    with pytest.raises(ValueError, match=r"an iterator \(generator\), good for one pass, but 2 epochs are asked"):
        learn.fit(0.1, 2, steps_per_epoch=3)
    assert drawn == []
    learn.fit(0.1, steps_per_epoch=3)
    reference.fit(0.1)
    assert drawn == [0, 1, 2], "what is not trained on stays in the generator"
    assert bits(learn.recorder.losses) == bits(reference.recorder.losses)


def test_a_used_up_generator_is_an_error():
    learn = learner(iter(batches(3)))
    learn.fit(0.1, steps_per_epoch=3)
    with pytest.raises(ValueError, match=r"yielded 0 batches.* was its iterator used up before\?"):
        learn.fit(0.1, steps_per_epoch=3)


def test_a_generator_that_ends_early_is_warned_about():
    learn = learner(iter(batches(3)))
    with pytest.warns(UserWarning, match=r"yielded 3 batches, but 10 were announced \(len\(\) or steps_per_epoch\)"):
        learn.fit_one_cycle(1, 0.1, steps_per_epoch=5, accumulate=2)
    assert learn.recorder.lrs.tolist() == OneCycle(0.1).values(5)["lr"][:2]


@pytest.mark.parametrize("dls", [(batches(), None), DataLoaders(batches())])
def test_no_validation_data(dls):
    learn = learner(*dls) if isinstance(dls, tuple) else learner()
    learn.dls = DataLoaders(*dls) if isinstance(dls, tuple) else dls
    learn.fit(0.1, 2)
    assert [list(row) for row in learn.recorder.epochs] == [["epoch", "train_loss", "time"]] * 2
    for look in (learn.validate, learn.get_preds):
        with pytest.raises(ValueError, match=r"there is no validation data\. Pass a loader, or make the Learner"):
            look()


@pytest.mark.parametrize(("steps", "accumulate", "seen"), [
    (1, 1, [4]), (4, 1, [4] * 4), (1, 2, [8]), (2, 2, [8, 8]), (3, 2, [8, 8, 4]), (5, 1, [4] * 5)])  # fmt: skip
def test_steps_per_epoch_shortens_an_epoch(steps, accumulate, seen):
    learn = learner(batches(5))
    learn.fit_one_cycle(2, 0.1, steps_per_epoch=steps, accumulate=accumulate)
    assert list(learn.recorder.newest.weight_column.read()) == seen * 2
    assert learn.recorder.lrs.tolist() == OneCycle(0.1).values(2 * steps)["lr"]


@pytest.mark.parametrize(("steps", "accumulate", "updates"), [(6, 1, 5), (4, 2, 3)])
def test_steps_per_epoch_does_not_lengthen_an_epoch(steps, accumulate, updates):
    message = f"steps_per_epoch={steps} is more than the {updates} updates that one pass over 5 batches makes. Train"
    with pytest.raises(ValueError, match=message):
        learner(batches(5)).fit(0.1, steps_per_epoch=steps, accumulate=accumulate)


@pytest.mark.case("B7")
@pytest.mark.parametrize("said", [2, 7])
def test_a_length_that_lies(said):
    learn = learner(Lying(batches(5), said))
    with pytest.warns(UserWarning, match=f"yielded 5 batches, but {said} were announced") as caught:
        learn.fit_one_cycle(2, 0.1)
    assert len(caught) == 2
    planned = OneCycle(0.1).values(2 * said)["lr"]
    clamped = (planned + [planned[-1]] * 10)[:10]  # what lies behind its end stays at its end
    assert learn.recorder.lrs.tolist() == clamped
    reference = learner(batches(5))
    assert learn.recorder.losses[0] == reference.loss_func(reference.model(batches(5)[0][0]), batches(5)[0][1]).item()


@pytest.mark.case("B7")
@pytest.mark.parametrize("said", [2, 7])
def test_no_sample_is_lost_to_a_length_that_lies(said):
    learn = learner(Lying(batches(5), said))
    with pytest.warns(UserWarning, match="yielded 5 batches"):
        learn.fit(0.1, accumulate=2)
    assert sum(learn.recorder.newest.weight_column.read()) == 20


# ---- what goes wrong


class Broken(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        if i == 37:
            raise FileNotFoundError(f"no sample {i}")
        return torch.ones(3), torch.ones(1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_data_set_that_raises(workers, part):
    broken = DataLoader(Broken(), 8, num_workers=workers, multiprocessing_context="fork" if workers else None)
    learn = learner(*(broken, None) if part == "train" else (batches(), broken))
    with pytest.raises(FileNotFoundError, match="no sample 37") as caught:
        learn.fit(0.1)
    [note] = caught.value.__notes__
    assert note.startswith("while loading batch 4 of epoch 0, ")
    assert note.endswith(" data (DataLoader)")
    assert len(learn.recorder.losses) == (4 if part == "train" else 2)
    learn.dls = DataLoaders(batches())
    learn.fit(0.1)


@pytest.mark.case("B4")
@pytest.mark.parametrize("labels", [[0, 1, 3], [0, -1, 2], [-7, 1, 9]])
@pytest.mark.parametrize("loss_func", [nn.CrossEntropyLoss(), nn.functional.cross_entropy])
def test_labels_out_of_range(labels, loss_func):
    learn = learner([(torch.ones(3, 3), torch.tensor(labels))], model=nn.Linear(3, 3), loss_func=loss_func)
    before = bits(dict(learn.model.state_dict())), rngs()
    message = f"labels must be 0..2 for the model's 3 outputs, got {min(labels)}..{max(labels)}. Give the model"
    with pytest.raises(ValueError, match=message):
        learn.fit(0.1)
    assert (bits(dict(learn.model.state_dict())), rngs()) == before


@pytest.mark.parametrize("ignored", [-100, 255])
def test_labels_to_be_ignored_are_in_range(ignored):
    loss_func = nn.CrossEntropyLoss(ignore_index=ignored)
    target = torch.tensor([0, 2, ignored])
    learner([(torch.ones(3, 3), target)], model=nn.Linear(3, 3), loss_func=loss_func).fit(0.1)


def test_labels_may_be_probabilities():
    learner([(torch.ones(3, 3), torch.ones(3, 2) / 2)], model=nn.Linear(3, 2), loss_func=nn.CrossEntropyLoss()).fit(0.1)


@pytest.mark.table
@pytest.mark.case("B4")
@pytest.mark.parametrize("loss_func", [nn.MSELoss(), nn.functional.mse_loss, nn.L1Loss(), nn.functional.l1_loss,
                                       nn.SmoothL1Loss(), nn.HuberLoss(), nn.functional.huber_loss])  # fmt: skip
@pytest.mark.parametrize("shape", [(4,), (4, 4), ()])
def test_a_loss_does_not_broadcast(loss_func, shape):
    learn = learner([(torch.ones(4, 3), torch.ones(shape))], loss_func=loss_func)
    before = bits(dict(learn.model.state_dict())), rngs()
    message = rf"output \(4, 1\) and the target \({shape[0] if shape else ''}.*\) would be broadcast against each other"
    with pytest.raises(ValueError, match=message):
        learn.fit(0.1)
    assert (bits(dict(learn.model.state_dict())), rngs()) == before


# ---- a last batch of one sample


def normed():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def of_13(kind, **options):
    x, y = torch.randn(13, 3), torch.randn(13, 1)
    if kind == "TensorLoader":
        return TensorLoader(x, y, **{"batch_size": 4} | options)
    if kind == "DataLoader":
        return DataLoader(TensorDataset(x, y), **{"batch_size": 4} | options)
    return list(zip(x.split(4), y.split(4), strict=True))


KINDS = ["TensorLoader", "DataLoader", "list"]


@pytest.mark.case("B2")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["fit(0.1)", "fit_one_cycle(2, 0.1)", "lr_find()"])
def test_a_last_batch_of_one_sample_is_no_food_for_batchnorm(kind, call):
    learn = learner(of_13(kind), model=normed())
    before = everything(learn)
    with pytest.raises(ValueError, match=r"the last training batch has 1 sample.* BatchNorm") as caught:
        eval(f"learn.{call}", {"learn": learn})
    assert everything(learn) == before
    for part in ("Leave it out",) if kind == "list" else ("(13 samples, batch_size 4)", "drop_last=True"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("kind", "options", "model"), [
    *((kind, {"drop_last": True}, normed) for kind in KINDS[:2]),
    *((kind, {"batch_size": 5}, normed) for kind in KINDS[:2]),
    *((kind, {"batch_size": 13}, normed) for kind in KINDS[:2]),
    *((kind, {}, partial(nn.Linear, 3, 1)) for kind in KINDS),
])  # fmt: skip
def test_a_last_batch_that_can_be_trained_on(kind, options, model):
    learn = learner(of_13(kind, **options), model=model())
    learn.fit(0.1)
    assert sum(learn.recorder.newest.weight_column.read()) == 13 - options.get("drop_last", False)


def test_a_last_batch_of_one_sample_to_validate_on():
    learn = learner(of_13("list")[:3], of_13("list"), model=normed())
    learn.fit(0.1)
    assert learn.recorder.epochs[0]["valid_loss"] == learn.validate()["valid_loss"]


# ---- nothing in it


@pytest.mark.case("B1")
@pytest.mark.parametrize("make", [TensorLoader, lambda *data, **options: DataLoader(TensorDataset(*data), **options)])
def test_nothing_to_train_on(make):
    learn = learner(make(*(column[:3] for column in columns()), batch_size=4, drop_last=True))
    before = everything(learn)
    with pytest.raises(ValueError, match=r"yields 0 batches: 3 samples, batch_size 4, drop_last=True\. Lower"):
        learn.fit(0.1)
    assert everything(learn) == before


# ---- digits


def test_digits():
    dls = digits(batch_size=100)
    (x, y), (valid_x, valid_y) = dls.train.tensors, dls.valid.tensors
    assert [tuple(t.shape) for t in (x, y, valid_x, valid_y)] == [(1437, 1, 8, 8), (1437,), (360, 1, 8, 8), (360,)]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max(), valid_x.min(), valid_x.max()) == (0, 1, 0, 1)
    assert y.unique().tolist() == valid_y.unique().tolist() == list(range(10))
    assert y.bincount().min() > 100, "of every digit about as many"
    assert (dls.train.shuffle, dls.valid.shuffle) == (True, False)
    assert (len(dls.train), len(dls.valid)) == (15, 4)


def test_the_split_of_digits_is_fixed():
    torch.manual_seed(0)
    first = digits()
    torch.manual_seed(1)
    before = rngs()
    second = digits()
    assert rngs() == before
    for one, other in zip((first.train, first.valid), (second.train, second.valid), strict=True):
        assert bits(one.tensors) == bits(other.tensors)
    with np.load(resources.files("minifast.data") / "digits.npz") as file:
        assert np.array_equal(first.valid.tensors[0][:, 0] * 16, file["images"][::5])
        assert np.array_equal(first.valid.tensors[1], file["labels"][::5])


@pytest.mark.parametrize("call", ["validate", "get_preds"])
@pytest.mark.parametrize("make_loader", [
    lambda g: TensorLoader(torch.ones(9, 2), torch.ones(9, 1), batch_size=2, shuffle=True, generator=g),
    lambda g: DataLoader(TensorDataset(torch.ones(9, 2), torch.ones(9, 1)), 2, shuffle=True, generator=g)],
    ids=["TensorLoader", "DataLoader"])
def test_looking_at_data_leaves_its_own_generator_alone(make_loader, call):
    generator = torch.Generator().manual_seed(5)
    loader = make_loader(generator)
    learn = Learner(nn.Linear(2, 1), (loader, loader), nn.MSELoss(), verbose=False)
    before = generator.get_state()
    getattr(learn, call)(loader)
    assert torch.equal(before, generator.get_state())


def test_a_shortened_epoch_may_end_before_a_batch_of_one():
    data = TensorLoader(torch.randn(9, 2), torch.ones(9, 1), batch_size=2)
    learn = Learner(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)), (data, None), nn.MSELoss(),
                    verbose=False)
    learn.fit(0.1, 1, steps_per_epoch=3)
    assert len(learn.recorder.lrs) == 3


def test_validation_does_not_broadcast_either():
    learn = Learner(nn.Linear(2, 1), ([(torch.ones(4, 2), torch.ones(4, 1))], [(torch.ones(4, 2), torch.ones(4))]),
                    nn.MSELoss(), verbose=False)
    with pytest.raises(ValueError, match=r"output \(4, 1\) and the target \(4,\) would be broadcast"):
        learn.validate()


@pytest.mark.parametrize("kind", [list, tuple])
def test_loaders_in_a_list_are_told_from_batches(kind):
    with pytest.raises(TypeError, match=rf"valid must hold batches, got a {kind.__name__} of loaders.*a dict of them"):
        DataLoaders(batches(2), kind([TensorLoader(torch.ones(2)), TensorLoader(torch.ones(2))]))


def test_the_label_that_a_partial_ignores_is_no_class():
    x, y = torch.randn(4, 3), torch.tensor([0, 255, 2, 1])
    loss_func = partial(nn.functional.cross_entropy, ignore_index=255)
    learner([(x, y)], model=nn.Linear(3, 3), loss_func=loss_func).fit(0.1)
    with pytest.raises(ValueError, match=r"labels must be 0\.\.2 .* got 0\.\.255"):
        learner([(x, y)], model=nn.Linear(3, 3), loss_func=nn.functional.cross_entropy).fit(0.1)
