"""Metrics, the validation loss and the training loss of an epoch, against sums made by hand over all samples."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import At, batches, everything, learner
from torch import nn
from torch.nn import functional as F

from minifast import Metrics, accuracy, error_rate, rmse, top_k_accuracy
from minifast.metrics import metric_name

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


@pytest.mark.parametrize("valid", [batches(size=sizes) for sizes in (SIZES, [4, 4], [1])])
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


@pytest.mark.slow  # their import
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


@pytest.mark.slow  # their import
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
    (Counting(torch.ones(3)), Exception, "convert"),
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


@pytest.mark.parametrize("metric", [accuracy, error_rate, top_k_accuracy])
@pytest.mark.parametrize(("scores", "target"), [((4, 3), (4, 1)), ((4, 3), (5,)), ((4,), (4,)), ((4, 3), (4, 3))])
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
