"""tta: predictions averaged over augmented passes."""

import random

import numpy as np
import pytest
import torch
from helpers import bits, everything, learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import TensorLoader
from minifast.inference.tta import tta

N = 11


def samples(n=N, dtype=torch.float64):
    """x (n, 3) whose rows are their own numbers, y (n, 1) too: what is out of order shows."""
    rows = torch.arange(float(n), dtype=dtype).unsqueeze(1)
    return rows.expand(n, 3).clone(), rows.clone()


def linear(**options):
    torch.manual_seed(0)
    return learner([samples()], model=nn.Linear(3, 2).double(), **options)


def noise(x):
    return x + torch.randn_like(x)


def identity(valid=None, **options):
    """A learner whose model gives its inputs."""
    learn = learner(valid=valid, **options)
    learn.model = nn.Identity()
    return learn


class Counter:
    """Adds 1, 2, 3, ... : the passes are told apart without a random number."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + self.calls


# ---- the formula


@pytest.mark.table
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("beta", [0, 0.25, 1.0])
@pytest.mark.parametrize("sizes", [(11,), (4, 4, 3), (1, 10)])
def test_the_mean_of_the_passes_blended_with_the_plain_one(n, beta, sizes):
    learn, (x, y) = linear(), samples()
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    preds, targets = tta(learn, data, transform=noise, n=n, beta=beta)
    assert torch.equal(torch.get_rng_state(), before)
    expected = []
    for batch, _ in data:
        passes = [learn.model(noise(batch)) for _ in range(n)]
        expected.append((1 - beta) * torch.stack(passes).mean(0) + beta * learn.model(batch))
    assert torch.allclose(preds, torch.cat(expected), rtol=1e-12)
    assert torch.equal(targets, y)
    assert not preds.requires_grad


def test_a_quarter_of_the_plain_pass_by_default():
    x, y = samples()
    preds, _ = tta(identity(), [(x, y)], transform=lambda x: x + 8)
    assert torch.allclose(preds, x + 6)


def test_four_passes_by_default_each_called_once():
    counter = Counter()
    x, y = samples()
    preds, _ = tta(identity(), [(x, y)], transform=counter)
    assert counter.calls == 4
    assert torch.allclose(preds, x + 0.75 * 2.5)


def test_the_largest_of_all_passes():
    x, y = samples()
    shifts = iter([-3.0, 2.0, 1.0])
    preds, _ = tta(identity(), [(x, y)], transform=lambda x: x + next(shifts), n=3, beta=1, use_max=True)
    assert torch.equal(preds, x + 2)
    assert torch.equal(tta(identity(), [(x, y)], transform=lambda x: x - 1, use_max=True)[0], x)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_masked_scores_stay_masked(beta):
    x = torch.tensor([[-torch.inf, 1.0]])
    preds, _ = tta(identity(), [(x, x)], transform=lambda x: x + 1, beta=beta)
    assert torch.equal(preds, torch.tensor([[-torch.inf, 2.0 - beta]]))
    preds, _ = tta(identity(), [(x, x)], transform=lambda x: x * 0 + 1, beta=0)
    assert preds[0, 1] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_single(dtype):
    x = torch.full((2, 1), 40_000.0, dtype=dtype)
    for use_max in (False, True):
        preds, _ = tta(identity(), [(x, x)], transform=lambda x: x, use_max=use_max)
        assert bits(preds) == bits(x)


# ---- data of any kind


@pytest.mark.parametrize("make", [
    lambda: TensorLoader(*samples(), batch_size=4),
    lambda: TensorLoader(*samples(), batch_size=4, shuffle=True, drop_last=True),
    lambda: DataLoader(TensorDataset(*samples()), 4, shuffle=True, drop_last=True),
    lambda: iter([samples()]),
])  # fmt: skip
def test_the_order_of_the_data(make):
    preds, targets = tta(identity(), make(), transform=lambda x: x + 4)
    x, y = samples()
    assert torch.equal(targets, y)
    assert torch.equal(preds, x + 3)


def test_the_validation_data_is_the_default():
    assert torch.equal(tta(identity([samples()]), transform=noise)[1], samples()[1])
    with pytest.raises(ValueError, match=r"there is no validation data\. Pass a loader"):
        tta(identity(), transform=noise)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(3, 2), function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def test_keywords_and_logits():
    x, y = samples()
    learn = learner(model=Model(lambda *, a, labels: {"logits": a, "loss": None}), loss_func=None)
    preds, targets = tta(learn, [{"a": x, "labels": y}], transform=lambda inputs: inputs | {"a": inputs["a"] + 4})
    assert torch.equal(preds, x + 3)
    assert torch.equal(targets, y)


def test_two_inputs_and_a_nest():
    x, y = samples()
    learn = learner(model=Model(lambda a, b: (a + b, {"b": b}, None, "text")))
    preds, _ = tta(learn, [(x, 2 * x, y)] * 2, transform=lambda inputs: (inputs[0] + 4, inputs[1]))
    assert torch.equal(preds[0], torch.cat([3 * x + 3] * 2))
    assert torch.equal(preds[1]["b"], torch.cat([2 * x] * 2))
    assert preds[2:] == (None, ["text", "text"])


def test_outputs_that_are_no_floats_are_refused():
    x, y = samples()
    learn = learner(model=Model(lambda x: x.argmax(1)))
    with pytest.raises(TypeError, match=r"tta averages outputs that are floats, got int64 \(11,\). Let the model give"):
        tta(learn, [(x, y)], transform=noise)


# ---- the training loader's own transform


def test_the_training_loaders_transform_is_the_default():
    def shift(batch):
        assert type(batch) is tuple
        return batch[0] + 8, batch[1] - 100

    learn = identity(TensorLoader(*samples(), batch_size=4))
    learn.dls.train = TensorLoader(*samples(), transform=shift)
    preds, targets = tta(learn)
    x, y = samples()
    assert torch.equal(preds, x + 6)
    assert torch.equal(targets, y)
    assert torch.equal(tta(learn, [samples()])[0], x + 6)


def test_it_takes_the_place_of_the_loaders_own():
    """Where both loaders normalise, an augmented pass is normalised once."""
    def normalise(batch):
        return batch[0] / 2, batch[1]

    valid = TensorLoader(*samples(), batch_size=4, transform=normalise)
    learn = identity(valid)
    learn.dls.train = TensorLoader(*samples(), batch_size=4, shuffle=True,
                                   transform=lambda batch: normalise((batch[0] + 8, batch[1])))  # fmt: skip
    x, y = samples()
    assert torch.equal(tta(learn)[0], 0.75 * (x + 8) / 2 + 0.25 * x / 2)
    preds, targets = tta(learn, learn.dls.train)
    assert torch.equal(preds, (x + 8) / 2)
    assert torch.equal(targets, y)
    assert valid.transform is normalise
    assert torch.equal(tta(learn, transform=lambda x: x + 8)[0], x / 2 + 6)


@pytest.mark.parametrize("train", [[samples()], TensorLoader(*samples()), DataLoader(TensorDataset(*samples()))])
def test_no_transform_is_an_error(train):
    message = rf"the training data \({type(train).__name__}\) is no TensorLoader with one .* tta\(transform=lambda x:"
    with pytest.raises(ValueError, match=message):
        tta(learner(train, [samples()]))


# ---- no trace


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(fails):
    class Transform:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(5)

        def __call__(self, x):
            if fails and random.random() < 1:
                raise ArithmeticError
            return x + random.random() + np.random.rand() + torch.rand(1, generator=self.generator) + torch.rand(1)

    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    learn = learner([samples(dtype=torch.float32)], model=model)
    model[1].eval()
    shuffle = torch.Generator().manual_seed(7)
    data = TensorLoader(*samples(dtype=torch.float32), batch_size=4, shuffle=True, generator=shuffle)
    transform = Transform()
    before = everything(learn, shuffle, transform.generator)
    if fails:
        with pytest.raises(ArithmeticError) as caught:
            tta(learn, data, transform=transform)
        assert caught.value.__notes__ == ["in the transform of tta, called with float32 (4, 3)"]
    else:
        first, second = (tta(learn, data, transform=transform)[0] for _ in range(2))
        assert bits(first) == bits(second)
    assert everything(learn, shuffle, transform.generator) == before


def test_every_pass_is_in_eval_mode():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).double()
    learn = learner(model=model)
    preds, _ = tta(learn, [samples()], transform=lambda x: x)
    assert torch.allclose(preds, learn.predict(samples()[0]))
    assert model.training


def test_another_seed_gives_another_result():
    learn = linear()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(bits(tta(learn, [samples()], transform=noise)[0]))
    assert results[0] == results[1] != results[2]


def test_a_transform_that_writes_in_place_reaches_no_other_pass_and_no_data():
    x, y = samples()
    loader = TensorLoader(x, y, batch_size=4)
    preds, _ = tta(identity(loader), transform=lambda x: x.add_(8))
    assert torch.equal(preds, samples()[0] + 6)
    learn = identity(TensorLoader(x, y, batch_size=4, transform=lambda batch: (batch[0].mul_(2), batch[1])))
    learn.dls.train = TensorLoader(x, y, transform=lambda batch: (batch[0].add_(8), batch[1]))
    assert torch.equal(tta(learn)[0], 0.75 * (samples()[0] + 8) + 0.25 * 2 * samples()[0])
    assert torch.equal(x, samples()[0])


def test_one_pass_over_the_data_however_many_augmented():
    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([samples(), samples()])

    loader = Loader()
    tta(linear(), loader, transform=noise, n=9)
    assert loader.passes == 1


# ---- arguments


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"n": 0}, ValueError, r"n must be an int >= 1, got 0 \(int\)"),
    ({"n": 2.0}, ValueError, "n must be an int >= 1, got 2.0"),
    ({"beta": 1.5}, ValueError, r"beta must be a finite number >= 0 and <= 1, got 1.5"),
    ({"beta": None}, ValueError, "beta must be a finite number >= 0 and <= 1, got None"),
    ({"use_max": 1}, TypeError, "use_max must be True or False, got 1"),
    ({"transform": 3}, TypeError, "transform must be a function of the inputs, got 3"),
    ({"dl": 3}, TypeError, "dl must be an iterable of batches, got 3"),
    ({"dl": []}, ValueError, "there is nothing to predict: the data yielded 0 batches"),
])  # fmt: skip
def test_arguments_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        tta(linear(), **{"dl": [samples()], "transform": noise} | options)
