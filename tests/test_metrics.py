"""Metrics, the validation loss and the training loss of an epoch, against sums made by hand over all samples."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, everything, learner, throw, trained, twin
from torch import nn
from torch.nn import functional as F

from minifast import CancelBatch, CancelEpoch, Metrics, accuracy, error_rate, rmse, top_k_accuracy
from minifast.record.record import FitRecord
from minifast.standard.meters import metric_name
from minifast.standard.whole_set import FLUSH_BYTES, WholeSet

SIZES = [5, 1, 8]  # a mean of these batches' means would be far off


def mae(pred, target):
    return (pred - target).abs().mean()


class Counting:
    """A metric object: counts the calls of each of its methods; computes the mean absolute error of all samples."""

    def __init__(self, result=None):
        self.result, self.calls = result, []

    def reset(self):
        self.errors = []
        self.calls.append("reset")

    def update(self, pred, target):
        self.errors.append((pred - target).abs())
        self.calls.append("update")

    def compute(self):
        self.calls.append("compute")
        return torch.cat(self.errors).mean() if self.result is None else self.result


def by_hand(learn, data):
    """(predictions, targets) of all samples in float64, by the formula of a linear layer."""
    weight, bias = learn.model.weight.detach().double(), learn.model.bias.detach().double()
    x, y = (torch.cat(column).double() for column in zip(*data, strict=True))
    return x @ weight.T + bias, y


def classifier(metrics, n=(5, 2), classes=4, **options):
    generator = torch.Generator().manual_seed(3)
    valid = [(torch.randn(k, 3, generator=generator), torch.randint(classes, (k,), generator=generator)) for k in n]
    return learner(valid, valid, model=nn.Linear(3, classes), loss_func=nn.CrossEntropyLoss(), metrics=metrics,
                   **options)  # fmt: skip


# ---- over all samples


@pytest.mark.case("N8")
@pytest.mark.parametrize("valid", [batches(size=sizes) for sizes in (SIZES, [4, 4], [1], [64, 36])])
def test_validate_is_the_mean_over_all_samples(valid):
    learn = learner(valid=valid, metrics=[mae, rmse, Counting()])
    pred, target = by_hand(learn, valid)
    assert learn.validate() == pytest.approx({
        "valid_loss": F.mse_loss(pred, target).item(),
        "mae": mae(pred, target).item(),
        "rmse": F.mse_loss(pred, target).sqrt().item(),
        "counting": mae(pred, target).item(),
    }, rel=1e-5)  # fmt: skip


def test_float64_stays_float64():
    valid = batches(size=SIZES, dtype=torch.float64)
    learn = learner(valid=valid, model=nn.Linear(3, 1).double(),
                    metrics=[mae, lambda pred, target: 0.1, Counting(0.1)])  # fmt: skip
    pred, target = by_hand(learn, valid)
    row = learn.validate()
    assert row["mae"] == pytest.approx(mae(pred, target).item(), rel=1e-14)
    assert row["valid_loss"] == pytest.approx(F.mse_loss(pred, target).item(), rel=1e-14)
    assert row["<lambda>"] == pytest.approx(0.1, rel=1e-15), "a plain float is not rounded to float32"
    assert row["counting"] == 0.1


def test_rmse_alone_is_the_root_of_the_mean_square():
    pred, target = torch.tensor([[0.0], [0.0]]), torch.tensor([[3.0], [1.0]])
    assert rmse(pred, target) == pytest.approx(5**0.5)


def test_an_epoch_row_has_the_keys_and_values_of_validate():
    learn = learner(batches(3), batches(size=SIZES, seed=1), metrics=[mae, rmse, Counting({"low": 1, "high": 2})])
    learn.fit(0.1, 2)
    row = learn.recorder.epochs[-1]
    assert list(row) == ["epoch", "train_loss", "valid_loss", "mae", "rmse", "low", "high", "time"]
    validated = learn.validate()
    assert list(validated) == ["valid_loss", "mae", "rmse", "low", "high"]
    assert validated == {name: row[name] for name in validated}, "the weights did not move in between"
    assert all(type(value) is float for value in validated.values())


def test_validate_takes_other_data():
    learn, other = learner(valid=batches(2)), batches(size=SIZES, seed=5)
    pred, target = by_hand(learn, other)
    assert learn.validate(other) == pytest.approx({"valid_loss": F.mse_loss(pred, target).item()}, rel=1e-6)


def test_validate_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    learn = learner(valid=batches(), model=model, metrics=[mae])
    learn.fit(0.1)
    model[1].eval()  # a mode of its own
    before = everything(learn)
    first = learn.validate()
    assert everything(learn) == before
    assert learn.validate() == first, "no dropout, no running statistics"


@pytest.mark.case("N8")
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_train_loss_is_the_mean_over_all_training_samples(accumulate):
    train = batches(size=[5, 1, 8, 2])
    learn = learner(train, batches())
    losses = []

    def note(state):
        weight, bias = (p.detach().double() for p in state.model.parameters())
        x, y = (part.double() for part in state.batch)
        losses.extend((x @ weight.T + bias - y).square().flatten().tolist())

    learn.fit(0.1, 2, accumulate=accumulate, callbacks=[At("after_pred", note)])
    assert len(losses) == 2 * 16
    for row, mine in zip(learn.recorder.epochs, (losses[:16], losses[16:]), strict=True):
        assert row["train_loss"] == pytest.approx(sum(mine) / 16, rel=1e-6)


# ---- objects


def test_an_object_is_reset_updated_and_computed_once_an_epoch():
    metric = Counting()
    learner(valid=batches(2), metrics=[metric]).fit(0.1, 2)
    assert metric.calls == ["reset", "update", "update", "compute"] * 2


@pytest.mark.nightly  # their import
def test_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    collection = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()])
    learn = learner(valid=batches(size=SIZES), metrics=[torchmetrics.MeanSquaredError(squared=False), collection])
    pred, target = by_hand(learn, learn.dls.valid)
    expected = {"valid_loss": F.mse_loss(pred, target).item(),
                "mean_squared_error": F.mse_loss(pred, target).sqrt().item(),
                "MeanSquaredError": F.mse_loss(pred, target).item(),
                "MeanAbsoluteError": mae(pred, target).item()}  # fmt: skip
    for _ in range(2):  # reset in between
        assert learn.validate() == pytest.approx(expected, rel=1e-6)


@pytest.mark.case("N8")
@pytest.mark.nightly  # their import
def test_torchmetrics_agrees_on_uneven_batches():
    classification = pytest.importorskip("torchmetrics.classification")
    theirs = [classification.MulticlassAccuracy(4, average="micro"),
              classification.MulticlassAccuracy(4, top_k=2, average="micro")]  # fmt: skip
    theirs[1].__name__ = "top_2"
    row = classifier([accuracy, partial(top_k_accuracy, k=2), *theirs], n=(7, 2, 1)).validate()
    assert row["multiclass_accuracy"] == pytest.approx(row["accuracy"])
    assert row["top_2"] == pytest.approx(row["top_k_accuracy"])


# ---- names


def named(metric, name):
    metric.__name__ = name
    return metric


class MSEPerPixel(Counting):
    pass


class Callable:
    def __call__(self, pred, target):
        return 0.0


@pytest.mark.table
@pytest.mark.parametrize(("metric", "name"), [
    (accuracy, "accuracy"),
    (rmse, "rmse"),
    (nn.functional.l1_loss, "l1_loss"),
    (lambda pred, target: 0, "<lambda>"),
    (partial(top_k_accuracy, k=2), "top_k_accuracy"),
    (named(partial(top_k_accuracy, k=2), "top_2"), "top_2"),
    (nn.L1Loss(), "l1_loss"),
    (Counting(), "counting"),
    (MSEPerPixel(), "mse_per_pixel"),
    (named(Counting(), "mine"), "mine"),
    (Callable(), "callable"),
])  # fmt: skip
def test_the_name_of_a_metric(metric, name):
    assert metric_name(metric) == name
    if not isinstance(metric, Counting) and "top" not in name and name != "accuracy":
        assert name in learner(valid=batches(), metrics=[metric]).validate()


@pytest.mark.parametrize("metrics", [
    [accuracy, accuracy],
    [partial(top_k_accuracy, k=1), partial(top_k_accuracy, k=2)],
    [lambda pred, target: 0, lambda pred, target: 1],
    [Counting(), Counting()],
    *([named(lambda pred, target: 0, name)] for name in ("epoch", "train_loss", "valid_loss", "time")),
])  # fmt: skip
def test_two_columns_of_one_name_are_refused(metrics):
    name = metric_name(metrics[-1])
    with pytest.raises(ValueError, match=f"two columns of the epoch table would be called '{name}'. Give one"):
        learner(metrics=metrics)


def test_two_partials_get_names_as_the_message_says():
    top_1, top_2 = (named(partial(top_k_accuracy, k=k), f"top_{k}") for k in (1, 2))
    row = classifier([top_1, top_2, accuracy]).validate()
    assert row["top_1"] == row["accuracy"] <= row["top_2"]


@pytest.mark.parametrize("name", ["mae", "valid_loss", "train_loss", "time", "epoch"])
def test_a_dict_does_not_overwrite_another_column(name):
    learn = learner(valid=batches(), metrics=[mae, Counting({name: 7.0})])
    with pytest.raises(ValueError, match=f"two columns of the epoch table would be called {name}.") as caught:
        learn.validate()
    assert caught.value.__notes__[0] == "in the metric counting"


def test_another_metrics_callback_adds_its_columns():
    learn = learner(valid=batches(), metrics=[mae])
    learn.fit(0.1, callbacks=[Metrics([rmse])])
    assert {"mae", "rmse"} < set(learn.recorder.epochs[0])


# ---- errors


@pytest.mark.parametrize(("metric", "error", "message"), [
    (lambda pred, target: (pred - target).abs(), ValueError,
     r"<lambda> must return one number per batch, got shape \(4, 1\). Did you forget .mean\(\)\?"),
    (lambda pred, target: None, TypeError, "NoneType"),
    (lambda pred, target: pred[9], IndexError, "index 9"),
    (Counting(torch.ones(3)), ValueError, r"counting must give one number, got shape \(3,\). Let it average"),
    (named(partial(accuracy), "acc"), ValueError,
     r"scores of shape \(4, 1\) do not fit targets of shape \(4, 1\)"),
    (partial(rmse, target=torch.zeros(4)), TypeError, "multiple values"),
], ids=["shape", "None", "raises", "object", "accuracy", "call"])  # fmt: skip
def test_an_error_names_the_metric(metric, error, message):
    learn = learner(valid=batches(), metrics=[metric])
    with pytest.raises(error, match=message) as caught:
        learn.validate()
    assert caught.value.__notes__[0] == f"in the metric {metric_name(metric)}"
    learn.metrics = []
    learn.fit(0.1)


def test_rmse_does_not_broadcast():
    learn = learner(valid=[(torch.ones(4, 3), torch.ones(4))], loss_func=lambda pred, target: pred.mean(),
                    metrics=[rmse])  # fmt: skip
    with pytest.raises(ValueError, match=r"rmse needs .* of one shape, got \(4, 1\) and \(4,\)"):
        learn.validate()


# ---- accuracy

SCORES = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.3, 0.1, 0.6], [0.3, 0.5, 0.2]])
TARGET = torch.tensor([1, 2, 2, 0])


@pytest.mark.parametrize(("k", "expected"), [(1, 0.5), (2, 1.0), (3, 1.0)])
def test_top_k_accuracy(k, expected):
    assert top_k_accuracy(SCORES, TARGET, k=k).item() == expected
    if k == 1:
        assert accuracy(SCORES, TARGET).item() == 1 - error_rate(SCORES, TARGET).item() == expected


@pytest.mark.table
@pytest.mark.parametrize("metric", [accuracy, partial(top_k_accuracy, k=2)])
@pytest.mark.parametrize("layout", ["classes second", "classes last"])
@pytest.mark.parametrize("extra", [(), (7,), (7, 3)])  # nothing, a sequence, an image
def test_shapes_of_scores(metric, layout, extra):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, *extra, 4, generator=generator)
    target = torch.randint(4, (5, *extra), generator=generator)
    expected = metric(scores.reshape(-1, 4), target.reshape(-1))
    given = scores.movedim(-1, 1) if layout == "classes second" else scores
    assert metric(given, target) == expected


@pytest.mark.table
@pytest.mark.parametrize("metric", [accuracy, error_rate, top_k_accuracy])
@pytest.mark.parametrize(("scores", "target"), [((4, 3), (4, 1)), ((4, 3), (5,)), ((4,), (4,)), ((4, 1), (4, 1))])
def test_scores_and_targets_that_do_not_fit(metric, scores, target):
    message = rf"scores of shape \({scores[0]},.* do not fit targets of shape \({target[0]},.*\): wanted \(n, classes\)"
    with pytest.raises(ValueError, match=message):
        metric(torch.zeros(scores), torch.zeros(target))


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_at_most_the_classes(k):
    with pytest.raises(ValueError, match=f"k must be 1..3, the number of classes, got {k}"):
        top_k_accuracy(SCORES, TARGET, k=k)


@pytest.mark.parametrize("wrap", [lambda scores: SimpleNamespace(logits=scores), lambda scores: {"logits": scores}])
def test_metrics_see_the_logits_of_an_output(wrap):
    learn = classifier([accuracy])
    plain = learn.validate()
    learn.model = Wrapped(learn.model, wrap)
    learn.loss_func = lambda output, target: F.cross_entropy(wrapped_logits(output), target)
    assert learn.validate() == plain


class Wrapped(nn.Module):
    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x):
        return self.wrap(self.model(x))


def wrapped_logits(output):
    return output["logits"] if isinstance(output, dict) else output.logits


@pytest.mark.parametrize("metric", [accuracy, partial(top_k_accuracy, k=2)])
@pytest.mark.parametrize("extra", [(), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_may_be_probabilities(metric, extra, dtype):
    """As mixup makes them: the most probable class counts."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 4, *extra, generator=generator)
    target = torch.randint(4, (5, *extra), generator=generator)
    others = torch.rand(5, 4, *extra, generator=generator, dtype=dtype)
    soft = 0.6 * F.one_hot(target, 4).movedim(-1, 1).to(dtype) + 0.4 * others / others.sum(1, keepdim=True)
    assert metric(scores, soft) == metric(scores, target)


def test_whole_numbers_of_the_scores_shape_are_no_probabilities():
    with pytest.raises(ValueError, match=r"of shape \(4, 3\) do not fit targets of shape \(4, 3\)"):
        accuracy(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64))


# ---- what the mean of the losses weighs


@pytest.mark.parametrize("on_device", [True, False], ids=["tensor", "number"])
def test_valid_loss_is_the_mean_over_what_the_loss_counts(on_device):
    """Every sample with y > 0 counts, so batches of one size weigh differently; the metric goes by samples."""
    def of_positive(pred, target):
        wanted = target > 0
        count = wanted.sum()
        return ((pred - target)[wanted] ** 2).sum(), count if on_device else int(count)

    valid = batches(size=SIZES, seed=2)
    learn = learner(valid=valid, loss_func=of_positive, metrics=[mae])
    pred, target = by_hand(learn, valid)
    counts = [int((y > 0).sum()) for _, y in valid]
    assert len({count / size for count, size in zip(counts, SIZES, strict=True)}) > 1
    row = learn.validate()
    assert row["valid_loss"] == pytest.approx(F.mse_loss(pred[target > 0], target[target > 0]).item(), rel=1e-6)
    assert row["mae"] == pytest.approx(mae(pred, target).item(), rel=1e-6)


def test_a_loss_that_counted_nothing_is_nan():
    learn = learner(valid=batches(2), loss_func=lambda pred, target: (pred.sum() * 0, torch.tensor(0)))
    assert math.isnan(learn.validate()["valid_loss"])


# ---- on the training data


def observed(learn, n_epochs=2, **options):
    """What the model put out in each epoch of a fit, and its targets: [(pred, target), ...] in float64."""
    seen = []

    def note(state):
        seen[-1].append((state.pred.detach().clone(), state.target))

    learn.fit(0.1, n_epochs, callbacks=[At("before_epoch", lambda state: seen.append([])), At("after_pred", note)],
              **options)  # fmt: skip
    return [tuple(torch.cat(column).double() for column in zip(*epoch, strict=True)) for epoch in seen]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("valid", [batches(2, seed=1), None])
def test_train_metrics_are_those_of_the_outputs_as_they_passed(accumulate, valid):
    learn = learner(batches(size=[5, 1, 8, 2]), valid, metrics=[mae, rmse, Counting()], train_metrics=True)
    epochs = observed(learn, accumulate=accumulate)
    names = ["train_mae", "train_rmse", "train_counting"]
    of_valid = ["valid_loss", "mae", "rmse", "counting"] if valid else []
    for row, (pred, target) in zip(learn.recorder.epochs, epochs, strict=True):
        assert list(row) == ["epoch", "train_loss", *names, *of_valid, "time"]
        error = mae(pred, target).item()
        assert [row[name] for name in names] == pytest.approx([error, F.mse_loss(pred, target).sqrt().item(), error])
    if valid:
        assert list(learn.validate()) == of_valid
        assert learn.validate() == {name: row[name] for name in of_valid}


def test_train_metrics_change_nothing_else():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    learn = learner(valid=batches(2), model=model, metrics=[mae, Counting()], train_metrics=True)
    other = twin(learn, metrics=[mae, Counting()])
    for each in (learn, other):
        torch.manual_seed(1)
        each.fit(0.1, 2)
    assert trained(learn) == trained(other)
    for row, of_other in zip(learn.recorder.epochs, other.recorder.epochs, strict=True):
        assert {name: row[name] for name in of_other if name != "time"} == {
            name: value for name, value in of_other.items() if name != "time"}  # fmt: skip


def test_the_metric_object_itself_sees_validation_only():
    metric = Counting()
    learn = learner(valid=batches(2), metrics=[metric], train_metrics=True)
    learn.fit(0.1)
    assert metric.calls == ["reset", "update", "update", "compute"]


def test_train_metrics_hold_no_graph():
    class Nested(Counting):
        def update(self, pred, target):
            assert not any(part.requires_grad for part in (pred["scores"], *pred["more"]))
            assert not torch.is_grad_enabled()
            super().update(pred["scores"], target)

    learn = learner(model=Wrapped(nn.Linear(3, 1), lambda scores: {"scores": scores, "more": [scores]}),
                    loss_func=lambda output, target: F.mse_loss(output["scores"], target), metrics=[Nested()],
                    train_metrics=True)  # fmt: skip
    learn.fit(0.1)
    assert learn.recorder.epochs[0]["train_nested"] > 0


def test_a_cancelled_batch_is_not_in_the_train_metrics():
    learn = learner(batches(size=[5, 1, 8]), metrics=[mae], train_metrics=True)
    seen = []
    learn.fit(0.1, callbacks=[At("after_pred", throw(CancelBatch), 1),
                                      At("after_backward", lambda state: seen.append((state.pred, state.target)))])
    pred, target = (torch.cat(column) for column in zip(*seen, strict=True))
    assert len(pred) == 13
    assert learn.recorder.epochs[0]["train_mae"] == pytest.approx(mae(pred, target).item())


def test_a_cancelled_epoch_has_the_metrics_of_what_was_trained():
    learn = learner(batches(4), batches(1), metrics=[mae], train_metrics=True)
    learn.fit(0.1, 3, callbacks=[At("before_batch", throw(CancelEpoch), 6), At("before_batch", throw(CancelEpoch), 6)])
    assert [list(row) for row in learn.recorder.epochs] == [
        ["epoch", "train_loss", "train_mae", "valid_loss", "mae", "time"],
        ["epoch", "train_loss", "train_mae", "time"],
        ["epoch", "time"],
    ]  # fmt: skip


@pytest.mark.parametrize(("metrics", "name"), [
    ([named(lambda pred, target: 0, "loss")], "train_loss"),
    ([mae, named(lambda pred, target: 0, "train_mae")], "train_mae"),
])  # fmt: skip
def test_train_columns_collide_with_no_other(metrics, name):
    learn = learner(valid=batches(1), metrics=metrics, train_metrics=True)
    with pytest.raises(ValueError, match=f"two columns of the epoch table would be called '{name}'"):
        learn.fit(0.1)


def ours():
    return [mae, rmse, Counting(), WholeSet(lambda true, pred: np.abs(true - pred).max(), name="worst")]


def theirs():
    torchmetrics = pytest.importorskip("torchmetrics")
    pair = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()])
    sharing = torchmetrics.MetricCollection({"mse": torchmetrics.MeanSquaredError(),  # one state for both
                                             "rmse": torchmetrics.MeanSquaredError(squared=False)})
    return [torchmetrics.SpearmanCorrCoef(), pair, sharing]


@pytest.mark.filterwarnings("ignore:Metric `Spearman")  # that it keeps all samples
@pytest.mark.parametrize("make", [ours, pytest.param(theirs, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("killed_after", range(1, 5))
def test_train_metrics_go_over_a_kill_in_the_middle_of_an_epoch(make, killed_after):
    """State of a callback: the first `killed_after` batches in one Metrics, the others in another."""
    data = batches(size=[5, 1, 8, 2], seed=3)

    def new():
        metrics = Metrics(make(), train=True)
        state = SimpleNamespace(device="cpu", record=FitRecord(), valid_sets=[("", None)], metrics={"time": 0.0})
        metrics.before_fit(state)
        return metrics, state

    def see(metrics, state, some):
        for x, y in some:
            state.pred, state.target, state.n_samples = x[:, :1].squeeze(1), y.squeeze(1), len(y)
            metrics.after_backward(state)
            metrics.after_batch(state)

    whole, state = new()
    see(whole, state, data)
    whole.after_epoch(state)
    first, of_first = new()
    see(first, of_first, data[:killed_after])
    saved = first.state_dict()
    assert_plain(saved)
    see(first, of_first, data[killed_after:])  # what was saved is a copy
    second, of_second = new()
    second.load_state_dict(saved)
    see(second, of_second, data[killed_after:])
    second.after_epoch(of_second)
    assert bits(of_second.metrics) == bits(state.metrics)
    assert len(state.metrics) >= 4


def assert_plain(value):
    assert isinstance(value, (torch.Tensor, int, float, str, bool, list, dict, type(None)))
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_plain(inner)


# ---- over the whole set at once


def f1(true, pred):
    hits = ((true == 1) & (pred == 1)).sum()
    return 2 * hits / ((true == 1).sum() + (pred == 1).sum())


def auc(true, score, *, scale=1):
    """The share of (positive, negative) pairs in which the positive one has the higher score; a tie is half."""
    difference = score[true == 1][:, None] - score[true == 0]
    return scale * ((difference > 0) + 0.5 * (difference == 0)).mean()


UNEVEN = [(2,), (1,), (7,), (3,), (20,)]


def two_classes(sizes=UNEVEN, classes=2):
    generator = torch.Generator().manual_seed(5)
    data = []
    for (n,) in sizes:
        x = torch.randn(n, 3, generator=generator)
        data.append((x, (x.sum(1) + torch.randn(n, generator=generator) > 0).long()))
    torch.manual_seed(0)
    return learner(data, data, model=nn.Linear(3, classes), loss_func=nn.CrossEntropyLoss())


def outputs(learn):
    """(outputs, targets) of all validation samples, from the formula of a linear layer."""
    pred, target = (torch.cat(column) for column in zip(*((x @ learn.model.weight.T + learn.model.bias, y)
                                                          for x, y in learn.dls.valid), strict=True))
    return pred.detach(), target.numpy()


@pytest.mark.case("N8")
def test_a_metric_of_the_whole_set_is_right_for_uneven_batches():
    learn = two_classes()
    learn.metrics = [WholeSet(f1, pred="labels"), WholeSet(auc, pred="probabilities"),
                     WholeSet(auc, pred="probabilities", name="twice", scale=2),
                     WholeSet(lambda true, pred: pred.shape == (33, 2) and (true >= 0).mean(), name="raw")]
    learn.train_metrics = True
    pred, target = outputs(learn)
    whole = auc(target, pred[:, 1].numpy() - pred[:, 0].numpy())
    row = learn.validate()
    assert row["f1"] == f1(target, pred.argmax(1).numpy())
    assert row["auc"] == pytest.approx(whole, rel=1e-12)
    assert row["twice"] == pytest.approx(2 * whole, rel=1e-12)
    assert row["raw"] == 1.0
    assert learn.validate() == row, "reset in between"
    learn.fit(0.1)
    assert {"f1", "train_f1", "train_auc"} < set(learn.recorder.epochs[0])
    of_batches = np.average([f1(y.numpy(), p.argmax(1).numpy()) for p, y in
                             zip(pred.split([n for (n,) in UNEVEN]), map(lambda b: b[1], learn.dls.valid), strict=True)
                             if (y == 1).any() or (p.argmax(1) == 1).any()])
    assert abs(of_batches - row["f1"]) > 0.01, "so the mean of the batches would have been wrong"


@pytest.mark.nightly  # their import
def test_it_agrees_with_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    learn = two_classes()
    with torch.no_grad():  # of a batch whose outputs all lie in 0..1 theirs take no softmax
        learn.model.bias -= 20

    def macro_f1(true, pred):
        return np.mean([f1(true == c, pred == c) for c in range(2)])

    learn.metrics = [WholeSet(macro_f1, pred="labels"), classification.MulticlassF1Score(2),
                     WholeSet(auc, pred="probabilities"), classification.MulticlassAUROC(2)]
    row = learn.validate()
    assert row["macro_f1"] == pytest.approx(row["multiclass_f1_score"], rel=1e-6)
    assert row["auc"] == pytest.approx(row["multiclass_auroc"], rel=1e-6)
    learn.train_metrics = True
    learn.fit(0.1)
    row = learn.recorder.epochs[0]
    assert row["train_macro_f1"] == pytest.approx(row["train_multiclass_f1_score"], rel=1e-6)
    assert row["train_auc"] == pytest.approx(row["train_multiclass_auroc"], rel=1e-6)


def given(pred, scores, target):
    """What the function of `WholeSet(pred=)` gets of two batches."""
    got = []
    metric = WholeSet(lambda true, pred: got.append((true, pred)) or 0.0, pred=pred)
    for part in (slice(0, 2), slice(2, None)):
        metric.update(scores[part], target[part])
    metric.compute()
    return got[0]


@pytest.mark.parametrize("extra", [(), (4, 2)])
@pytest.mark.parametrize("classes", [2, 3])
def test_what_the_function_gets(extra, classes):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, classes, *extra, generator=generator)
    target = torch.randint(classes, (5, *extra), generator=generator)
    for kind, expected in (("labels", scores.argmax(1).flatten()), ("scores", scores),
                           ("probabilities", scores.softmax(1).movedim(1, -1).reshape(-1, classes))):  # fmt: skip
        if kind == "probabilities" and classes == 2:
            expected = expected[:, 1]
        true, pred = given(kind, scores, target)
        assert isinstance(pred, np.ndarray)
        assert np.array_equal(pred, expected.numpy())
        assert np.array_equal(true, (target if kind == "scores" else target.flatten()).numpy())


@pytest.mark.parametrize(("shape", "expected"), [((5,), (5,)), ((5, 1), (5,)), ((5, 4), (5, 4))])
def test_one_output_per_target(shape, expected):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    target = (scores > 0.5).float()
    for kind, made in (("labels", (scores > 0).long()), ("probabilities", scores.sigmoid())):
        true, pred = given(kind, scores, target)
        assert pred.shape == true.shape == expected
        assert np.array_equal(pred, made.numpy().reshape(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numpy_gets_numbers_it_knows(dtype):
    scores = torch.randn(5, 2).to(dtype)
    for kind in ("scores", "probabilities"):
        assert given(kind, scores, torch.zeros(5, dtype=torch.int64))[1].dtype == np.float32


def test_memory_that_is_filled_again_does_not_matter():
    metric = WholeSet(lambda true, pred: (true + pred[:, 0]).sum(), name="total")
    pred, target = torch.empty(2, 1), torch.empty(2)
    for i in range(3):
        metric.update(pred.fill_(i), target.fill_(10 * i))
    assert metric.compute() == 66.0


def test_it_waits_for_the_device_seldom(monkeypatch):
    """Only every so many bytes, and at the end."""
    moved, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr("minifast.standard.whole_set.FLUSH_BYTES", 1000)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor.numel()) or cpu(tensor))
    metric = WholeSet(lambda true, pred: float(len(pred)), name="n")
    for _ in range(30):
        metric.update(torch.zeros(10, 2), torch.zeros(10))
    assert len(moved) == 2 * 27, "after 9 batches of 120 bytes: three times"
    assert metric.compute() == 300.0
    assert len(moved) == 2 * 30
    assert FLUSH_BYTES > 1e6


def test_of_nothing_it_is_nan():
    assert math.isnan(WholeSet(f1).compute())


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: WholeSet(f1, pred="logits"), ValueError, "pred must be one of 'scores', 'probabilities', 'labels', got"),
    (lambda: WholeSet(3), TypeError, r"function must be a function \(y_true, y_pred\) -> number, got 3"),
    (lambda: WholeSet(Counting), TypeError, "must be a function"),
    (lambda: WholeSet(f1).update([1], torch.zeros(1)), TypeError, "f1 needs the output .* got a list and a Tensor"),
    (lambda: WholeSet(f1, pred="labels").update(torch.zeros(4, 3), torch.zeros(5)), ValueError,
     r"outputs of shape \(4, 3\) do not fit targets of shape \(5,\): wanted"),
    (lambda: WholeSet(f1, pred="probabilities").update(torch.zeros(4), torch.zeros(5)), ValueError,
     r"outputs of shape \(4,\) do not fit targets of shape \(5,\): wanted"),
])  # fmt: skip
def test_what_whole_set_cannot_take(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_name_of_a_whole_set_metric():
    assert metric_name(WholeSet(f1)) == "f1"
    assert metric_name(WholeSet(partial(auc, scale=3), name="auc_3")) == "auc_3"
    assert repr(WholeSet(auc, pred="labels", scale=2)) == "WholeSet(auc, pred='labels', name='auc', scale=2)"


def test_an_error_of_its_function_names_it():
    learn = two_classes()
    learn.metrics = [WholeSet(lambda true, pred: np.ones(3), name="many")]
    with pytest.raises(TypeError) as caught:
        learn.validate()
    assert caught.value.__notes__[0] == "in the metric many"
