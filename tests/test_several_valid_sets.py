"""Several validation sets by name: each has columns of its own, everywhere a person looks."""

import math

import pytest
import torch
from helpers import At, batches, bits, learner, throw, trained, twin
from torch import nn
from torch.nn import functional as F

from minifast import CancelEpoch, DataLoaders, Metrics, rmse
from minifast.standard.whole_set import WholeSet

CLEAN, NOISY = batches(size=[5, 1, 8], seed=1), batches(size=[2, 7], seed=2)


def mae(pred, target):
    return (pred - target).abs().mean()


def worst(true, pred):
    return abs(true - pred).max()


class Counting:
    """A metric object that notes its calls; computes how many samples it saw since its reset."""

    def __init__(self, named=None):
        self.calls, self.named = [], named

    def reset(self):
        self.n = 0
        self.calls.append("reset")

    def update(self, pred, target):
        self.n += len(target)
        self.calls.append("update")

    def compute(self):
        self.calls.append("compute")
        return self.n if self.named is None else {name: self.n for name in self.named}


def two(**options):
    return learner(batches(3), {"clean": CLEAN, "noisy": NOISY}, **options)


def by_hand(learn, data):
    """(valid_loss, mae, rmse, worst) of all samples in float64."""
    weight, bias = learn.model.weight.detach().double(), learn.model.bias.detach().double()
    x, y = (torch.cat(column).double() for column in zip(*data, strict=True))
    error = x @ weight.T + bias - y
    return [value.item() for value in (error.square().mean(), error.abs().mean(), error.square().mean().sqrt(),
                                       error.abs().max())]  # fmt: skip


NAMES = ["valid_loss", "mae", "rmse", "worst"]


@pytest.mark.parametrize("sets", [{"clean": CLEAN, "noisy": NOISY}, {"noisy": NOISY, "clean": CLEAN}, {"one": NOISY},
                                  {"a": CLEAN, "b": NOISY, "c": CLEAN}])  # fmt: skip
def test_each_set_has_columns_of_its_own(sets):
    learn = learner(batches(3), sets, metrics=[mae, rmse, WholeSet(worst)])
    expected = {f"{name}_{key}": value for name, data in sets.items()
                for key, value in zip(NAMES, by_hand(learn, data), strict=True)}  # fmt: skip
    row = learn.validate()
    assert list(row) == list(expected)
    assert row == pytest.approx(expected, rel=1e-5)


def test_an_epoch_row_has_the_keys_and_values_of_validate():
    learn = two(metrics=[mae, WholeSet(worst)], train_metrics=True)
    learn.fit(0.1, 2)
    row, validated = learn.recorder.epochs[-1], learn.validate()
    assert list(row) == ["epoch", "train_loss", "train_mae", "train_worst", *validated, "time"]
    assert {name: row[name] for name in validated} == validated


def test_one_loader_gives_the_plain_names():
    learn = two(metrics=[mae])
    alone = learn.validate(learn.dls.valid["noisy"])
    assert list(alone) == ["valid_loss", "mae"]
    assert list(alone.values()) == [learn.validate()[f"noisy_{name}"] for name in alone]


def test_they_train_as_one_set_does():
    learn = two()
    other = twin(learn)
    other.dls = DataLoaders(learn.dls.train, CLEAN)
    for each in (learn, other):
        each.fit(0.1, 3)
    assert trained(learn) == trained(other)
    for row, of_other in zip(learn.recorder.epochs, other.recorder.epochs, strict=True):
        assert row["clean_valid_loss"] == of_other["valid_loss"]


def test_an_object_is_reset_and_computed_for_each_set():
    metric = Counting()
    learn = two(metrics=[metric])
    assert learn.validate()["clean_counting"] == 14
    assert learn.validate()["noisy_counting"] == 9
    assert metric.calls == ["reset", *["update"] * 3, "compute", "reset", *["update"] * 2, "compute"] * 2


def test_the_loss_of_each_weighs_by_its_own_count():
    def of_positive(pred, target):
        wanted = target > 0
        return ((pred - target)[wanted] ** 2).sum(), wanted.sum()

    learn = two(loss_func=of_positive)
    row = learn.validate()
    for name, data in (("clean", CLEAN), ("noisy", NOISY)):
        x, y = (torch.cat(column) for column in zip(*data, strict=True))
        pred = learn.model(x)
        assert row[f"{name}_valid_loss"] == pytest.approx(F.mse_loss(pred[y > 0], y[y > 0]).item(), rel=1e-5)


def test_the_names_are_known_before_the_fit():
    named = Counting(["low", "high"])
    named.names = ("low", "high")
    seen = []
    learn = two(metrics=[mae, named, Counting()], train_metrics=True)
    learn.fit(0.1, callbacks=[Metrics([rmse]), At("before_fit", lambda state: seen.append(state.record.row_names))])
    assert sorted(seen[0]) == sorted(learn.recorder.epochs[0])
    assert seen[0][-1] == "time"
    assert list(learn.recorder.epochs[0])[-1] == "time"


@pytest.mark.nightly  # their import
def test_the_names_of_a_collection_are_known_before_the_fit():
    torchmetrics = pytest.importorskip("torchmetrics")
    collection = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()],
                                               prefix="my_")  # fmt: skip
    seen = []
    learn = two(metrics=[collection, torchmetrics.MeanSquaredError()], train_metrics=True)
    learn.fit(0.1, 2, callbacks=[At("before_fit", lambda state: seen.append(state.record.row_names))])
    row = learn.recorder.epochs[-1]
    assert list(seen[0]) == list(row)
    assert row["noisy_my_MeanSquaredError"] == row["noisy_mean_squared_error"]
    assert row["noisy_my_MeanSquaredError"] == pytest.approx(by_hand(learn, NOISY)[0], rel=1e-5)
    assert row["clean_my_MeanAbsoluteError"] == pytest.approx(by_hand(learn, CLEAN)[1], rel=1e-5)


def test_metrics_of_a_cancelled_validation_are_left_out():
    learn = two(metrics=[mae])
    learn.fit(0.1, 2, callbacks=[At("before_valid_batch", throw(CancelEpoch), 4)])
    first, second = learn.recorder.epochs
    assert list(first) == ["epoch", "train_loss", "time"]
    assert second["clean_mae"] == pytest.approx(by_hand(learn, CLEAN)[1], rel=1e-5)


@pytest.mark.parametrize(("sets", "metrics", "train", "name"), [
    ({"train": CLEAN}, [mae], True, "train_mae"),
    ({"a": CLEAN, "a_b": NOISY}, [mae, lambda pred, target: 0], False, "a_b_mae"),
])  # fmt: skip
def test_columns_of_one_name_are_refused(sets, metrics, train, name):
    metrics[-1].__name__ = metrics[-1].__name__.replace("<lambda>", "b_mae")
    learn = learner(batches(2), sets, metrics=metrics, train_metrics=train)
    with pytest.raises(ValueError, match=f"would be called '{name}'. Give one metric another __name__, or one valid"):
        learn.fit(0.1)
    assert len(learn.recorder.lrs) == 0


def test_a_dict_that_was_not_told_may_not_take_a_column_of_another_set():
    learn = learner(batches(1), {"a": CLEAN, "a_b": NOISY}, metrics=[Counting(["b_valid_loss", "n"])])
    with pytest.raises(ValueError, match="two columns of the epoch table would be called a_b_valid_loss"):
        learn.validate()


def test_a_set_without_a_batch_is_named():
    with pytest.raises(ValueError, match="the noisy validation data yielded 0 batches"):
        learner(batches(1), {"clean": CLEAN, "noisy": (batch for batch in ())}).validate()


# ---- what a person sees


def test_the_table_of_many_columns(capsys):
    learn = learner(batches(3), {"clean_images": CLEAN, "noisy_images": NOISY}, metrics=[mae], train_metrics=True,
                    verbose=True)  # fmt: skip
    learn.fit(0.1, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "                                    clean                   noisy",
        "                                   images       clean      images       noisy",
        "epoch  train_loss   train_mae  valid_loss  images_mae  valid_loss  images_mae        time",
    ]
    assert [len(line) for line in lines[3:]] == [len(lines[2])] * 2
    assert lines[-1].split()[4] == f"{learn.recorder.epochs[-1]['clean_images_mae']:.4f}"


def lines_of(ax):
    return {line.get_label(): line.get_ydata().tolist() for line in ax.get_lines()}


def test_plot_losses_draws_the_validation_loss_of_each():
    learn = two(metrics=[mae])
    learn.fit(0.1, 3)
    rows, ax = learn.recorder.epochs, learn.recorder.plot_losses()
    drawn = lines_of(ax)
    assert list(drawn) == ["training, each step", "training, smoothed", "validation, clean", "validation, noisy"]
    for name in ("clean", "noisy"):
        assert drawn[f"validation, {name}"] == [row[f"{name}_valid_loss"] for row in rows]
    colors = [line.get_color() for line in ax.get_lines()]
    assert len(set(colors)) == 3, "both training losses share one"
    one = learner(batches(2), CLEAN)
    one.fit(0.1)
    assert list(lines_of(one.recorder.plot_losses()))[2:] == ["validation"]


def test_plot_metrics_draws_each_column():
    learn = two(metrics=[mae], train_metrics=True)
    learn.fit(0.1, 3)
    ax = learn.recorder.plot_metrics()
    assert lines_of(ax) == {name: [row[name] for row in learn.recorder.epochs]
                            for name in ("train_mae", "clean_mae", "noisy_mae")}  # fmt: skip
    assert [line.get_linestyle() for line in ax.get_lines()] == ["--", "-", "-"]
    one = learner(batches(2), CLEAN, metrics=[mae], train_metrics=True)
    one.fit(0.1)
    train, valid = one.recorder.plot_metrics().get_lines()
    assert train.get_color() == valid.get_color(), "one colour for a metric"
    none = two()
    none.fit(0.1)
    with pytest.raises(RuntimeError, match="no metric was recorded"):
        none.recorder.plot_metrics()


def test_to_csv_has_the_columns(tmp_path):
    learn = two(metrics=[mae])
    learn.fit(0.1)
    learn.recorder.to_csv(tmp_path / "epochs.csv", epochs=True)
    header, _ = (tmp_path / "epochs.csv").read_text().splitlines()
    assert header == "epoch,train_loss,clean_valid_loss,clean_mae,noisy_valid_loss,noisy_mae,time"


def test_validation_leaves_no_trace():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    learn = two(model=model, metrics=[mae])
    before = bits(dict(model.state_dict()))
    assert not any(math.isnan(value) for value in learn.validate().values())
    assert bits(dict(model.state_dict())) == before


def test_a_set_is_looked_at_by_its_name():
    clean, noisy = batches(2, seed=1), batches(2, seed=2)
    learn = learner(valid={"clean": clean, "noisy": noisy})
    assert learn.validate("noisy") == learn.validate(noisy)
    assert torch.equal(learn.get_preds("clean")[0], learn.get_preds(clean)[0])
    for call in (learn.validate, learn.get_preds):
        with pytest.raises(ValueError, match=r"there is no validation set 'x': the names are clean, noisy\."):
            call("x")
    with pytest.raises(ValueError, match="there are no names"):
        learner(valid=clean).validate("clean")
