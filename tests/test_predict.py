"""get_preds, predict, save and load."""

import dataclasses
import os
import pickle
import stat
from collections import OrderedDict, namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import batches, bits, everything, learner, rngs
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, TensorDataset

from minifast import TensorLoader

N = 11
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Output:
    first: torch.Tensor
    second: torch.Tensor


def samples(n=N):
    """x (n, 3) whose rows are their own numbers, y (n, 1) too: what is out of order shows."""
    rows = torch.arange(float(n)).unsqueeze(1)
    return rows.expand(n, 3).clone(), rows


def in_batches(*sizes):
    return list(zip(*(column.split(sizes) for column in samples(sum(sizes))), strict=True))


class Backwards(Sampler):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n - 1, -1, -1))

    def __len__(self):
        return self.n


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*samples(), strict=True)


def tensor_loader(**options):
    return TensorLoader(*samples(), batch_size=4, **options)


def data_loader(**options):
    return DataLoader(TensorDataset(*samples()), **{"batch_size": 4} | options)


class Wrapped(nn.Module):
    """A linear model whose output is `wrap(its scores)`."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(3, 1), wrap

    def forward(self, *x):
        return self.wrap(self.linear(sum(x)))


# ---- get_preds


@pytest.mark.table
@pytest.mark.parametrize("make", [
    tensor_loader,
    partial(tensor_loader, shuffle=True),
    partial(tensor_loader, drop_last=True),
    partial(tensor_loader, shuffle=True, drop_last=True, transform=lambda batch: batch),
    data_loader,
    partial(data_loader, shuffle=True),
    partial(data_loader, drop_last=True),
    partial(data_loader, shuffle=True, drop_last=True),
    partial(data_loader, sampler=range(N)),
    lambda: DataLoader(Stream(), 4),
    lambda: in_batches(4, 1, 6),
    lambda: iter(in_batches(4, 7)),
])  # fmt: skip
def test_predictions_in_the_order_of_the_data(make):
    learn, (x, y) = learner(), samples()
    preds, targets = learn.get_preds(make())
    assert torch.equal(targets, y)
    assert preds.shape == (N, 1)
    assert torch.allclose(preds, learn.predict(x), rtol=1e-6)
    assert not preds.requires_grad


@pytest.mark.slow
def test_predictions_in_the_order_of_the_data_with_workers():
    loader = data_loader(shuffle=True, drop_last=True, num_workers=2, multiprocessing_context="fork",
                         persistent_workers=True)  # fmt: skip
    next(iter(loader))  # its workers run
    workers = loader._iterator
    assert torch.equal(learner().get_preds(loader)[1], samples()[1])
    assert loader._iterator is workers


def test_collating_is_kept():
    def collate(rows):
        return torch.stack([x for x, _ in rows]), torch.ones(len(rows))

    _, targets = learner().get_preds(data_loader(shuffle=True, collate_fn=collate))
    assert torch.equal(targets, torch.ones(N))


@pytest.mark.parametrize("make", [
    partial(data_loader, sampler=Backwards(N)),
    lambda: DataLoader(TensorDataset(*samples()), batch_sampler=BatchSampler(Backwards(N), 4, False)),
])  # fmt: skip
def test_a_sampler_of_ones_own_is_kept(make):
    assert torch.equal(learner().get_preds(make())[1], samples()[1].flip(0))


def test_the_loader_itself_goes_on_shuffling():
    loader, other = (tensor_loader(shuffle=True, drop_last=True) for _ in range(2))
    learner().get_preds(loader)
    torch.manual_seed(0)
    orders = [y for _, y in loader]
    torch.manual_seed(0)
    assert bits(orders) == bits([y for _, y in other])
    assert len(orders) == 2


def test_the_validation_data_is_the_default():
    learn = learner(in_batches(2), in_batches(4, 7))
    assert torch.equal(learn.get_preds()[1], samples()[1])


@pytest.mark.case("I12")
@pytest.mark.parametrize("dl", [None, "shuffled"])
@pytest.mark.parametrize("fails", [False, True])
def test_looking_leaves_no_trace(dl, fails):
    def noisy(pred, target):
        torch.rand(1)
        if fails:
            raise ArithmeticError
        return (pred - target).abs().mean()

    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    learn = learner(in_batches(4, 4), in_batches(4, 7), model=model, loss_func=noisy)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones(1, 8)
    before, generator = everything(learn), torch.Generator().manual_seed(5)
    for look in (partial(learn.get_preds, with_loss=True), learn.validate):
        data = None if dl is None else TensorLoader(*samples(), batch_size=4, shuffle=True)
        if fails:
            with pytest.raises(ArithmeticError):
                look(data)
        else:
            look(data)
        assert everything(learn) == before
    learn.get_preds(tensor_loader(shuffle=True, generator=generator))
    learn.predict(samples()[0])
    assert everything(learn) == before
    assert generator.initial_seed() == 5
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


def test_dropout_is_off():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))
    learn = learner(model=model, loss_func=nn.L1Loss())
    x, _ = samples()
    expected = model[0](x).detach()
    assert torch.equal(learn.predict(x), expected)
    assert torch.equal(learn.get_preds([(x, x)])[0], expected)


@pytest.mark.parametrize("data", [[], TensorLoader(torch.ones(0, 3), torch.ones(0, 1)), iter(())])
def test_no_data_is_an_error(data):
    learn, before = learner(), rngs()
    with pytest.raises(ValueError, match="there is nothing to predict: the data yielded 0 batches"):
        learn.get_preds(data)
    assert rngs() == before
    assert learn.model.training


# ---- nests


def unwrapped(pred):
    """The tensors of one of the outputs below."""
    if isinstance(pred, Output):
        return [pred.first, pred.second]
    return list(pred.values() if isinstance(pred, dict) else pred)


NESTS = pytest.mark.parametrize("wrap", [
    lambda y: (y, 2 * y),
    lambda y: [y, 2 * y],
    lambda y: {"a": y, "b": 2 * y},
    lambda y: Pair(y, 2 * y),
    lambda y: Output(y, 2 * y),
], ids=["tuple", "list", "dict", "namedtuple", "dataclass"])  # fmt: skip


@NESTS
def test_nests_stay_nests(wrap):
    learn, (x, y) = learner(model=Wrapped(wrap), loss_func=lambda pred, target: pred), samples()
    data = [(x[:4], wrap(y[:4])), (x[4:], wrap(y[4:]))]
    preds, targets = learn.get_preds(data)
    assert type(preds) is type(targets) is type(wrap(y))
    assert [bits(t) for t in unwrapped(targets)] == [bits(y), bits(2 * y)]
    first, second = unwrapped(preds)
    assert torch.equal(second, 2 * first)
    assert first.shape == (N, 1)
    assert type(learn.predict(x)) is type(preds)


@pytest.mark.parametrize("wrap", [
    lambda y: SimpleNamespace(logits=y, loss=None),
    lambda y: {"logits": y, "hidden": y},
], ids=["attribute", "key"])  # fmt: skip
def test_of_an_output_with_logits_those(wrap):
    learn, (x, _) = learner(model=Wrapped(wrap)), samples()
    expected = learn.model.linear(x).detach()
    assert torch.equal(learn.predict(x), expected)
    assert torch.allclose(learn.get_preds(in_batches(4, 7))[0], expected, rtol=1e-6)


@pytest.mark.parametrize("of_ones_own", [dict, OrderedDict])
def test_batches_of_keywords(of_ones_own):
    class Keywords(nn.Linear):
        def forward(self, x, labels):
            return super().forward(x)

    x, y = samples()
    learn = learner(model=Keywords(3, 1), loss_func=F.mse_loss)
    data = [of_ones_own(x=x[rows], labels=y[rows]) for rows in (slice(4), slice(4, None))]
    preds, targets, losses = learn.get_preds(data, with_loss=True)
    assert torch.equal(targets, y)
    assert torch.allclose(preds, F.linear(x, learn.model.weight, learn.model.bias), rtol=1e-6)
    assert torch.allclose(losses, (preds - y).square().flatten())


def test_batches_of_different_widths_are_an_error():
    learn = learner()
    learn.model = nn.Identity()
    message = r"do not fit together: float32 \(2, 7\) and float32 \(2, 9\) differ beyond the first dimension. Pad all"
    with pytest.raises(ValueError, match=message):
        learn.get_preds([(torch.ones(2, width), torch.ones(2)) for width in (7, 7, 9)])


def test_several_inputs_and_no_target():
    learn, (x, _) = learner(model=Wrapped(lambda y: y), unpack=lambda batch: (batch, None)), samples()
    preds, targets = learn.get_preds([(x[:4], x[:4]), (x[4:], x[4:])])
    assert torch.equal(preds, learn.predict((x, x)))
    assert targets is None


def test_numbers_and_text_in_a_target():
    data = [(torch.ones(1, 3), (torch.tensor(number), text)) for number, text in ((3, "a"), (4, "b"))]
    _, (numbers, texts) = learner().get_preds(data)
    assert torch.equal(numbers, torch.tensor([3, 4]))
    assert texts == ["a", "b"]


# ---- the loss of each sample


def own_mse(pred, target):
    return (pred - target).square().mean()


@pytest.mark.parametrize(("loss_func", "scale"), [
    (nn.MSELoss(), 0.5),
    (nn.MSELoss(reduction="sum"), 1.0),
    (F.mse_loss, 0.5),
    (partial(F.mse_loss, reduction="sum"), 1.0),
    (own_mse, 0.5),
])  # fmt: skip
def test_the_loss_of_each_sample(loss_func, scale):
    x, y = torch.randn(2, N, 3), torch.randn(2, N, 2)
    learn = learner(model=nn.Linear(3, 2), loss_func=loss_func)
    preds, targets, losses = learn.get_preds([(x[0], y[0]), (x[1, :1], y[1, :1])], with_loss=True)
    assert losses.shape == (N + 1,)
    assert torch.allclose(losses, scale * (preds - targets).square().sum(1))
    assert loss_func(preds, targets).ndim == 0, "the loss itself goes on reducing"


@pytest.mark.parametrize("loss_func", [nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(reduction="sum"),
                                       partial(F.cross_entropy, label_smoothing=0.0)])  # fmt: skip
@pytest.mark.parametrize("extra", [(), (6,)])
def test_the_cross_entropy_of_each_sample(loss_func, extra):
    pred, target = torch.randn(N, 4, *extra), torch.randint(4, (N, *extra))
    learn = learner(loss_func=loss_func)
    learn.model = nn.Identity()
    losses = learn.get_preds([(pred, target)], with_loss=True)[2]
    one_by_one = [loss_func(pred[i : i + 1], target[i : i + 1]) for i in range(N)]
    assert torch.allclose(losses, torch.stack(one_by_one))


def test_the_batchmean_of_each_sample():
    pred, target = torch.randn(N, 4).log_softmax(1), torch.randn(N, 4).softmax(1)
    learn = learner(loss_func=nn.KLDivLoss(reduction="batchmean"))
    learn.model = nn.Identity()
    losses = learn.get_preds([(pred, target)], with_loss=True)[2]
    assert torch.allclose(losses, F.kl_div(pred, target, reduction="none").sum(1))


@NESTS
def test_a_loss_of_ones_own_gets_each_sample_of_a_nest(wrap):
    def total(pred, target):
        return sum((p - t).square().mean() for p, t in zip(unwrapped(pred), unwrapped(target), strict=True))

    x, y = samples()
    learn = learner(model=Wrapped(wrap), loss_func=total)
    preds, _, losses = learn.get_preds([(x[:4], wrap(y[:4])), (x[4:], wrap(y[4:]))], with_loss=True)
    first, second = unwrapped(preds)
    assert torch.allclose(losses, ((first - y).square() + (second - 2 * y).square()).flatten())


def test_losses_in_the_order_of_the_data():
    learn = learner(loss_func=F.l1_loss)
    learn.model = nn.Identity()
    x, y = samples()
    loader = TensorLoader(x[:, :1] + y, y, batch_size=4, shuffle=True)
    assert torch.equal(learn.get_preds(loader, with_loss=True)[2], y.flatten())


# ---- predict


@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: (x, x), lambda x: [x, x]])
def test_predict_calls_the_model_as_training_does(inputs):
    learn, (x, _) = learner(model=Wrapped(lambda y: y)), samples()
    given = inputs(x)
    expected = learn.model.linear(x if given is x else 2 * x)
    assert torch.equal(learn.predict(given), expected)
    assert not learn.predict(given).requires_grad


def test_predict_with_keywords():
    class Keywords(nn.Linear):
        def forward(self, *, x):
            return super().forward(x)

    learn, (x, _) = learner(model=Keywords(3, 1)), samples()
    assert torch.equal(learn.predict({"x": x}), F.linear(x, learn.model.weight, learn.model.bias))


# ---- save and load


class Evil:
    """Writes a sentinel file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def net(width=3):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


def state(learn):
    return bits(dict(learn.model.state_dict()))


def test_a_round_trip(tmp_path):
    first, second = learner(model=net()), learner(model=net())
    first.fit(0.1, 2)
    path = tmp_path / "weights.pth"
    before = everything(first)
    assert first.save(str(path)) == path
    assert everything(first) == before
    assert state(first) != state(second)
    identities = [id(p) for p in second.model.parameters()]
    assert second.load(path) is second
    assert state(first) == state(second)
    assert [id(p) for p in second.model.parameters()] == identities, "in place: the optimizer still holds them"
    second.fit(0.1)


def test_plain_torch_reads_it(tmp_path):
    learn = learner(model=net())
    loaded = torch.load(learn.save(tmp_path / "weights.pth"), weights_only=True)
    assert type(loaded) is dict
    assert bits(loaded) == state(learn)
    assert {type(value) for value in loaded.values()} == {torch.Tensor}
    assert {value.device.type for value in loaded.values()} == {"cpu"}
    assert not any(value.requires_grad for value in loaded.values())


def test_what_torch_saved_is_loaded(tmp_path):
    first, second = learner(model=net()), learner(model=net())
    torch.save(first.model.state_dict(), tmp_path / "weights.pth")
    assert state(second.load(tmp_path / "weights.pth")) == state(first)


def test_only_the_weights_are_written(tmp_path):
    """A parameter that is a view of something large costs its own size; tied weights are written once."""
    model = nn.Sequential(nn.Linear(3, 50), nn.Linear(3, 50))
    model[0].weight = model[1].weight
    model[0].bias = nn.Parameter(torch.zeros(1_000_000)[:50])
    learn = learner(model=model)
    path = learn.save(tmp_path / "weights.pth")
    assert path.stat().st_size < 10_000
    loaded = torch.load(path, weights_only=True)
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()


def test_a_file_is_replaced_whole(tmp_path):
    learn = learner(model=net())
    path = learn.save(tmp_path / "weights.pth")
    learn.fit(0.1)
    learn.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pth"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert state(learner(model=net()).load(path)) == state(learn)


@pytest.mark.parametrize("function", ["torch.save", "os.replace"])
def test_a_failed_save_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, function):
    learn = learner(model=net())
    path = learn.save(tmp_path / "weights.pth")
    before, save = path.read_bytes(), torch.save

    def fail(*args):
        if function == "torch.save":
            save(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"minifast.files.writing.{function}", fail)
    learn.fit(0.1)
    with pytest.raises(OSError, match="No space left"):
        learn.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pth"]
    assert path.read_bytes() == before


def test_a_missing_folder_is_named(tmp_path):
    message = r"cannot save to .*gone/weights.pth: there is no folder .*gone. Make it"
    with pytest.raises(FileNotFoundError, match=message):
        learner().save(tmp_path / "gone" / "weights.pth")
    assert not list(tmp_path.iterdir())


WIDE = net(width=4).state_dict()
NET = net().state_dict()


def without(*names):
    return {name: value for name, value in NET.items() if name not in names}


@pytest.mark.table
@pytest.mark.parametrize(("content", "message"), [
    (without("0.bias", "2.weight"), r"does not fit the model \(Sequential\): missing 0.bias, 2.weight. Nothing was"),
    (NET | {"3.weight": torch.ones(1)}, r"does not fit the model \(Sequential\): unexpected 3.weight. Nothing was"),
    (NET | {"0.bias": torch.ones(4)}, r"of another shape 0.bias \(4,\) for \(3,\). Nothing was loaded"),
    (NET | {"0.bias": 3.0}, r"of another shape 0.bias float for \(3,\)"),
    (without("0.bias") | {"bias": torch.ones(3)}, "missing 0.bias; unexpected bias. Nothing was loaded"),
    (WIDE, r"of another shape 0.weight \(4, 3\) for \(3, 3\), 0.bias \(4,\) for \(3,\), .* and 2 more. Nothing"),
    ({}, "missing 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean and 4 more"),
    ({3: torch.ones(1)} | NET, "unexpected 3. Nothing was loaded"),
    ({"model": NET}, "missing 0.weight, .* unexpected model"),
    ([1, 2], "holds a list, not the weights of a model"),
    (torch.ones(3), "holds a Tensor, not the weights of a model"),
])  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    learn = learner(model=net())
    before = everything(learn)
    with pytest.raises(ValueError, match=f"weights.pth .*{message}"):
        learn.load(tmp_path / "weights.pth")
    assert everything(learn) == before


@pytest.mark.table
@pytest.mark.parametrize("write", [
    torch.save,
    partial(torch.save, _use_new_zipfile_serialization=False),
    lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
], ids=["torch", "old torch", "pickle"])  # fmt: skip
@pytest.mark.parametrize("nest", [lambda evil: evil, lambda evil: NET | {"0.bias": evil}], ids=["alone", "inside"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_file_that_asks_to_run_code_is_refused(tmp_path, monkeypatch, write, nest, forced):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sentinel, path = tmp_path / "sentinel", tmp_path / "weights.pth"
    write(nest(Evil(sentinel)), path)
    learn = learner(model=net())
    before = everything(learn)
    said = "was not loaded: it asks to run code" if write is torch.save else "is damaged, or holds more than"
    with pytest.raises(ValueError, match=rf"weights\.pth {said}"):
        learn.load(path)
    assert not sentinel.exists()
    assert everything(learn) == before


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 and no more", None])
def test_a_damaged_file_changes_nothing(tmp_path, content):
    learn = learner(model=net())
    path = learn.save(tmp_path / "weights.pth")
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    before = everything(learn)
    with pytest.raises(ValueError, match=r"weights\.pth is damaged, .* Nothing was loaded"):
        learn.load(path)
    assert everything(learn) == before


def test_a_trap_that_works_where_it_is_trusted(tmp_path):
    """The sentinel of the tests above does appear if the file is believed."""
    torch.save(Evil(tmp_path / "sentinel"), tmp_path / "weights.pth")
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("counted", [int, torch.tensor])
def test_a_loss_with_a_count_has_a_loss_for_each_sample(counted):
    def loss_func(pred, target):
        losses = nn.functional.mse_loss(pred, target, reduction="none")
        return losses.sum(), counted(losses.numel())

    plain, summed = learner(batches(3), batches(2)), learner(batches(3), batches(2), loss_func=loss_func)
    torch.testing.assert_close(summed.get_preds(with_loss=True)[2], plain.get_preds(with_loss=True)[2])


class Recurrent(nn.Module):
    """Gives what a GRU gives: all outputs (n, time, 4), and the last state (2, n, 4)."""

    def __init__(self):
        super().__init__()
        self.net = nn.GRU(3, 4, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 3)])
def test_samples_in_the_second_dimension(sizes):
    torch.manual_seed(0)
    data = [(torch.randn(n, 5, 3), torch.zeros(n)) for n in sizes]
    learn = learner(data, data, model=Recurrent(), loss_func=lambda pred, target: pred[0].mean())
    (outputs, state), targets = learn.get_preds()
    expected = learn.model(torch.cat([x for x, _ in data]))
    torch.testing.assert_close(outputs, expected[0].detach())
    torch.testing.assert_close(state, expected[1].detach())
    assert targets.shape == (sum(sizes),)


@pytest.mark.parametrize("loss_func", [nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(ignore_index=1)])
def test_what_a_loss_ignores_does_not_count_in_the_losses(loss_func):
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 5), torch.randint(0, 3, (4, 5))
    y[0, :3] = -100
    ignored = -100 if callable(loss_func) and not isinstance(loss_func, nn.Module) else loss_func.ignore_index
    y[y == -100] = ignored
    learn = learner([(x, y)], [(x, y)], model=nn.Linear(5, 5), loss_func=loss_func)
    _, _, losses = learn.get_preds(with_loss=True)
    pred = learn.model(x).detach()
    expected = torch.stack([F.cross_entropy(pred[i:i + 1], y[i:i + 1], ignore_index=ignored) for i in range(4)])
    torch.testing.assert_close(losses, expected.nan_to_num(0.0))

