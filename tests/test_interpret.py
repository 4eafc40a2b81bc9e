"""What a classifier gets wrong, compared with what is worked out here by other means."""
import gc
from functools import partial
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from helpers import everything, rngs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.pyplot import close, get_fignums
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from minifast import EMA, DataLoaders, Learner, TensorLoader, digits
from minifast.interpret import ClassificationInterpretation, Interpretation, confusion

NAMES = ["ant", "bee", "cat"]


class Scores(nn.Module):
    """Gives its inputs as they are, through `wrap`: the tests choose the output of the model."""

    def __init__(self, wrap=lambda x: x):
        super().__init__()
        self.one, self.wrap = nn.Parameter(torch.ones(())), wrap

    def forward(self, x=None, **more):
        return self.wrap(x * self.one)


def learner(x, y, loss_func=None, *, size=3, wrap=lambda x: x, **options):
    """A learner whose model gives `x` for the targets `y`, in batches of `size`."""
    data = DataLoaders([(x, y)], list(zip(x.split(size), y.split(size), strict=True)), options.pop("classes", None))
    return Learner(Scores(wrap), data, loss_func, verbose=False, device="cpu", **options)


def some(n=20, k=3, seed=0):
    """Scores (n, k) and class indices (n,)."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, k, generator=generator), torch.randint(k, (n,), generator=generator)


def interpretation(x, y, loss_func=None, *, keep=64, names=None, **options):
    return Interpretation.from_learner(learner(x, y, loss_func or nn.CrossEntropyLoss(), **options), keep=keep,
                                       classes=names)


def on_pictures(channels=1, n=12, side=6, **options):
    """A learner that classifies noise by a linear layer."""
    torch.manual_seed(0)
    x, y = torch.rand(n, channels, side, side), torch.arange(n) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 3))
    data = DataLoaders(TensorLoader(x, y, batch_size=4, shuffle=True), TensorLoader(x, y, batch_size=5), NAMES)
    return Learner(model, data, nn.CrossEntropyLoss(), verbose=False, device="cpu", **options), x, y


# ---- the columns


def test_one_row_for_each_sample():
    x, y = some()
    found = interpretation(x, y)
    assert found.index.tolist() == list(range(20))
    assert found.actual.tolist() == y.tolist()
    assert found.predicted.tolist() == x.argmax(1).tolist()
    np.testing.assert_allclose(found.probability, x.softmax(1).amax(1), rtol=1e-6)
    np.testing.assert_allclose(found.loss, F.cross_entropy(x, y, reduction="none"), rtol=1e-6)
    assert found.accuracy == pytest.approx((x.argmax(1) == y).float().mean().item())
    assert {column.dtype for column in (found.index, found.actual, found.predicted)} == {np.dtype("int64")}


@pytest.mark.parametrize("make", [
    partial(TensorLoader, batch_size=4, shuffle=True, drop_last=True),
    lambda *data: DataLoader(TensorDataset(*data), 4, shuffle=True),
    lambda *data: iter([data]),
])  # fmt: skip
def test_index_is_the_place_in_the_data_set(make):
    x, y = some()
    found = Interpretation.from_learner(learner(x, y, nn.CrossEntropyLoss()), make(x, y))
    assert found.actual.tolist() == y.tolist()
    assert [row["index"] for row in found.top_losses(3)] == F.cross_entropy(x, y, reduction="none").topk(3)[1].tolist()


def test_by_hand():
    """Everything that is said of seven samples, counted on paper."""
    actual, predicted = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 0, 0, 0])
    found = interpretation(5.0 * F.one_hot(predicted, 3), actual, names=NAMES)
    assert found.confusion_matrix().tolist() == [[2, 1, 0], [1, 1, 0], [2, 0, 0]]
    assert found.confusion_matrix().dtype == np.int64
    assert found.most_confused() == [("cat", "ant", 2), ("ant", "bee", 1), ("bee", "ant", 1)]
    assert found.most_confused(2) == [("cat", "ant", 2)]
    assert found.most_confused()[0].count == 2
    assert str(found.most_confused()) == ("actual  predicted  count\n"
                                          "cat     ant            2\n"
                                          "ant     bee            1\n"
                                          "bee     ant            1")
    assert str(found.most_confused(3)) == "(none)"
    ant, bee, cat, accuracy, macro = found.report()
    assert (ant["class"], ant["support"]) == ("ant", 3)
    assert [ant[key] for key in ("precision", "recall", "f1")] == pytest.approx([2 / 5, 2 / 3, 1 / 2])
    assert [bee[key] for key in ("precision", "recall", "f1")] == pytest.approx([1 / 2, 1 / 2, 1 / 2])
    assert [cat[key] for key in ("precision", "recall", "f1")] == [0, 0, 0]
    assert (accuracy["class"], accuracy["f1"], accuracy["support"]) == ("accuracy", pytest.approx(3 / 7), 7)
    assert [macro[key] for key in ("precision", "recall", "f1")] == pytest.approx([0.9 / 3, (7 / 6) / 3, 1 / 3])
    assert repr(found) == ("Interpretation: 7 samples, 3 classes, accuracy 0.4286; most confused: cat as ant (2), "
                           "ant as bee (1), bee as ant (1)")


def test_tables_stay_aligned_whatever_the_names():
    found = interpretation(torch.eye(3)[[0, 1, 0]], torch.tensor([0, 1, 2]), names=["\u732b", "new\nline", "dog"])
    assert str(found.report()).splitlines()[:4] == [
        "class      precision  recall      f1  support",
        "\u732b            0.5000  1.0000  0.6667        1",  # takes two columns
        "new line      1.0000  1.0000  1.0000        1",
        "dog           0.0000  0.0000  0.0000        1"]
    assert str(found.most_confused()).splitlines()[1] == "dog     \u732b             1"


def test_report_against_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    x, y = some(200, 5)
    report = interpretation(x, y).report()
    for key, name in (("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")):
        metric = getattr(torchmetrics, f"multiclass_{name}")
        assert [row[key] for row in report[:5]] == pytest.approx(metric(x, y, 5, average="none").tolist())
        assert report[-1][key] == pytest.approx(metric(x, y, 5, average="macro").item())


def test_a_class_without_samples():
    found = interpretation(5.0 * torch.eye(3), torch.tensor([0, 1, 1]), names=NAMES)
    assert found.confusion_matrix().tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    *_, cat, _, macro = found.report()
    assert cat == {"class": "cat", "precision": 0, "recall": None, "f1": None, "support": 0}
    assert macro["recall"] == pytest.approx((1 + 1 / 2) / 2), "the mean over the classes that there are"
    assert "cat           0.0000                        0" in str(found.report())
    found.plot_confusion_matrix().figure.savefig("/dev/null", format="png")


def test_nothing_confused():
    assert repr(interpretation(9 * torch.eye(2), torch.tensor([0, 1]))) == (
        "Interpretation: 2 samples, 2 classes, accuracy 1.0000; nothing confused")


def test_top_losses():
    x, y = some(30)
    found, losses = interpretation(x, y, names=NAMES, keep=2), F.cross_entropy(x, y, reduction="none")
    rows = found.top_losses(4)
    assert [row["loss"] for row in rows] == pytest.approx(losses.topk(4)[0].tolist())
    assert [(row["actual"], row["predicted"]) for row in rows] == [
        (NAMES[y[row["index"]]], NAMES[x[row["index"]].argmax()]) for row in rows]
    assert str(rows).splitlines()[0].split() == ["index", "actual", "predicted", "probability", "loss"]
    assert len(found.top_losses(99)) == 30


def test_a_loss_that_is_nan_is_the_largest():
    x = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [3.0, 0.0]])
    assert [row["index"] for row in interpretation(x, torch.tensor([0, 0, 1])).top_losses()] == [1, 2, 0]


# ---- all kinds of classifiers


@pytest.mark.parametrize("column", [False, True], ids=["(n,)", "(n, 1)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_two_classes_by_one_number(column, dtype):
    x, y = torch.tensor([-2.0, 0.5, 3.0, -0.1]), torch.tensor([0, 1, 0, 1])
    shape = (4, 1) if column else (4,)
    loss = lambda pred, target: F.binary_cross_entropy_with_logits(pred, target.float())  # noqa: E731
    found = interpretation(x.reshape(shape), y.to(dtype).reshape(shape),
                           nn.BCEWithLogitsLoss() if dtype.is_floating_point else loss)
    assert found.predicted.tolist() == [0, 1, 1, 0]
    assert found.confusion_matrix().tolist() == [[1, 1], [1, 1]]
    np.testing.assert_allclose(found.probability, torch.maximum(x.sigmoid(), (-x).sigmoid()), rtol=1e-6)
    np.testing.assert_allclose(
        found.loss, F.binary_cross_entropy_with_logits(x, y.float(), reduction="none"), rtol=1e-6)


def test_two_classes_by_one_probability():
    x, y = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0.0, 1.0, 1.0])
    found = interpretation(x, y, nn.BCELoss())
    assert found.predicted.tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.probability, [0.8, 0.6, 0.9], rtol=1e-6)


def test_smoothed_targets_of_a_binary_loss():
    assert interpretation(torch.ones(2), torch.tensor([0.95, 0.05]), nn.BCEWithLogitsLoss()).actual.tolist() == [1, 0]


@pytest.mark.parametrize("loss_func", [
    nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), F.cross_entropy, nn.BCEWithLogitsLoss(),
    nn.MSELoss()])  # fmt: skip
def test_targets_as_shares(loss_func):
    x, y = some()
    shares = F.one_hot(y, 3) * 0.8 + 0.2 / 3
    found = interpretation(x, shares, loss_func)
    assert found.actual.tolist() == y.tolist()
    whole = interpretation(x, F.one_hot(y, 3).float(), loss_func)
    assert whole.actual.tolist() == y.tolist()
    with_loss = learner(x, shares, loss_func).get_preds(with_loss=True)[2]
    np.testing.assert_allclose(found.loss, with_loss, rtol=1e-6)


@pytest.mark.parametrize(("wrap", "loss_func", "shown"), [
    (lambda x: x.log_softmax(1), nn.NLLLoss(), lambda x: x.softmax(1)),
    (lambda x: x.softmax(1), nn.CrossEntropyLoss(), lambda x: x.softmax(1)),
    (lambda x: x, nn.CrossEntropyLoss(), lambda x: x.softmax(1)),
    (lambda x: x.softmax(1), lambda pred, target: F.nll_loss(pred.log(), target), lambda x: x.softmax(1)),
    (lambda x: x.half(), lambda pred, target: F.cross_entropy(pred.float(), target), lambda x: x.half().softmax(1)),
])  # fmt: skip
def test_what_the_probability_is(wrap, loss_func, shown):
    x, y = some()
    np.testing.assert_allclose(interpretation(x, y, loss_func, wrap=wrap).probability, shown(x).amax(1), atol=1e-3)


def test_the_sigmoid_of_a_binary_loss_over_several_classes():
    x, y = some()
    found = interpretation(x, F.one_hot(y, 3).float(), nn.BCEWithLogitsLoss())
    np.testing.assert_allclose(found.probability, x.sigmoid().amax(1), rtol=1e-6)


@pytest.mark.parametrize("loss_func", [nn.CrossEntropyLoss(ignore_index=1), partial(F.cross_entropy, ignore_index=1)])
def test_what_the_loss_ignores_is_left_out(loss_func):
    x, y = some()
    found = interpretation(x, y, loss_func, size=1)
    kept = torch.nonzero(y != 1).flatten()
    assert found.index.tolist() == kept.tolist()
    assert found.actual.tolist() == y[kept].tolist()
    assert [row["index"] for row in found.top_losses(2)] == kept[
        F.cross_entropy(x, y, reduction="none")[kept].topk(2)[1]].tolist()


class Hugging(nn.Module):
    """A model as Hugging Face has them: keywords in, an output with a loss and logits out."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values.flatten(1))
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


def test_dict_batches_and_the_models_own_loss():
    x, y = torch.randn(7, 1, 2, 2), torch.tensor([0, 1, 2, 0, -100, 2, 1])
    data = [{"pixel_values": a, "labels": b} for a, b in zip(x.split(3), y.split(3), strict=True)]
    learn = Learner(Hugging(), (data, data), verbose=False, device="cpu")
    found = Interpretation.from_learner(learn)
    logits = learn.model.head(x.flatten(1)).detach()
    assert found.index.tolist() == [0, 1, 2, 3, 5, 6]
    np.testing.assert_allclose(found.loss, F.cross_entropy(logits, y, reduction="none")[found.index], rtol=1e-5)
    assert len(found.plot_top_losses(6).axes) == 6, "the image among the inputs"


def test_several_validation_sets_by_name():
    x, y = some()
    learn = learner(x, y, nn.CrossEntropyLoss())
    learn.dls = DataLoaders([(x, y)], {"clean": [(x, y)], "noisy": [(-x, y)]})
    assert Interpretation.from_learner(learn, "noisy").predicted.tolist() == x.argmin(1).tolist()
    with pytest.raises(ValueError, match=r"several validation sets: pass one of them, e.g. dl='clean'"):
        Interpretation.from_learner(learn)
    with pytest.raises(ValueError, match="there is no validation set 'other'"):
        Interpretation.from_learner(learn, "other")


# ---- what is refused


@pytest.mark.table
@pytest.mark.parametrize(("x", "y", "loss_func", "message"), [
    (torch.ones(4, 1), torch.rand(4, 1), nn.MSELoss(), r"float32 \(3, 1\), with MSELoss is a regression"),
    (torch.ones(4), torch.rand(4), F.l1_loss, "with l1_loss is a regression"),
    (torch.ones(4), torch.rand(4), lambda pred, target: pred.mean(), r"classes 0 and 1 apart, got the target 0\.\d+"),
    (torch.ones(4), torch.tensor([0.0, 2, 1, 1]), nn.BCEWithLogitsLoss(), "got the target 2. Interpretation is for"),
    (torch.ones(4, 3), torch.rand(4, 3), nn.MSELoss(), r"shares of the classes that sum to 1, got a sum of \d"),
    (torch.ones(4, 3), torch.tensor([[1.0, 1, 0]] * 4), nn.BCEWithLogitsLoss(), "got a sum of 2.* several labels"),
    (torch.ones(4, 3), torch.rand(4), nn.MSELoss(), r"class indices are integers, got targets float32 \(3,\)"),
    (torch.ones(4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.int64), nn.CrossEntropyLoss(),
     r"scores \(n, classes\), one row for each sample, got float32 \(3, 3, 2, 2\): a class for each pixel"),
    (torch.ones(4, 1), torch.zeros(4, dtype=torch.int64), nn.CrossEntropyLoss(), "at least 2 classes with Cross"),
    (torch.ones(4, 3), torch.zeros(4, 2), nn.CrossEntropyLoss(), r"float32 \(3, 2\) and float32 \(3, 3\). Expected 3"),
    (torch.ones(4, 3), torch.tensor([0, 1, 2, 3]), nn.CrossEntropyLoss(),
     "the target of sample 3 is 3, and the model has 3 outputs: expected 0..2"),
    (torch.ones(4, 3), torch.tensor([0, -1, 2, 3]), nn.CrossEntropyLoss(), "the target of sample 1 is -1"),
    (torch.ones(4, 3), torch.full((4,), -100), nn.CrossEntropyLoss(), "the loss ignores the targets of all"),
])  # fmt: skip
def test_what_is_no_classifier(x, y, loss_func, message):
    with pytest.raises(ValueError, match=message):
        interpretation(x, y, loss_func)


@pytest.mark.parametrize(("wrap", "message"), [
    (lambda x: (x, x), r"must be a tensor \(n, classes\) of scores, got \(float32 \(3, 3\), float32 \(3, 3\)\)"),
    (lambda x: x.argmax(1), r"of scores, got int64 \(3,\)"),
])  # fmt: skip
def test_outputs_that_are_no_scores(wrap, message):
    with pytest.raises(ValueError, match=message):
        interpretation(*some(), wrap=wrap)


def test_other_refusals():
    x, y = some()
    learn = learner(x, y, nn.CrossEntropyLoss(), classes=["a", "b"])
    with pytest.raises(ValueError, match=r"dls.classes has 2 names for 3 classes, .* Pass classes= with 3 names"):
        Interpretation.from_learner(learn)
    with pytest.raises(ValueError, match="classes has 4 names for 3 classes"):
        Interpretation.from_learner(learn, classes=list("abcd"))
    with pytest.raises(TypeError, match=r"classes must be a list of names, got 'abc' \(str\)"):
        Interpretation.from_learner(learn, classes="abc")
    with pytest.raises(ValueError, match="keep must be an int >= 1, got 0"):
        Interpretation.from_learner(learn, keep=0)
    with pytest.raises(TypeError, match=r"learn must be the Learner, got a Scores: pass learn, not learn.model"):
        Interpretation.from_learner(learn.model)
    with pytest.raises(ValueError, match="nothing to interpret: the data yielded 0 samples"):
        Interpretation.from_learner(learn, [])
    learn.dls = DataLoaders([(x, y)])
    with pytest.raises(ValueError, match="there is no validation data"):
        Interpretation.from_learner(learn)
    learn.unpack = lambda batch: (batch[0], None)
    with pytest.raises(ValueError, match="the target of a batch must be a tensor, got NoneType"):
        Interpretation.from_learner(learn, [(x, y)])
    found = interpretation(x, y)
    for call in (found.top_losses, found.plot_top_losses, found.show_results, found.most_confused):
        with pytest.raises(ValueError, match="must be an int >= 1, got 0"):
            call(0)
    with pytest.raises(TypeError, match="normalize must be True or False, got 1"):
        found.plot_confusion_matrix(normalize=1)
    with pytest.raises(TypeError, match="ax must be axes"):
        found.plot_confusion_matrix(ax=3)


# ---- leaving things alone


def test_a_look_leaves_no_trace():
    learn, x, y = on_pictures()
    learn.model.insert(0, nn.Dropout(0.5))
    learn.dls.valid = TensorLoader(x, y, batch_size=5, transform=lambda batch: (batch[0] + torch.rand(1), batch[1]))
    learn.model.train()
    before, random = everything(learn), rngs()
    first = Interpretation.from_learner(learn)
    learn.show_results(3)
    assert everything(learn) == before
    assert rngs() == random
    assert learn.model.training
    assert np.array_equal(first.loss, Interpretation.from_learner(learn).loss), "eval mode, the same random numbers"
    assert np.array_equal(first.loss, learn.get_preds(with_loss=True)[2])


def test_averaged_weights_are_looked_at():
    learn, *_ = on_pictures(callbacks=[EMA(decay=0.5)])
    learn.fit(0.5, 2)
    averaged = Interpretation.from_learner(learn)
    assert np.array_equal(averaged.loss, learn.get_preds(with_loss=True)[2])
    learn.callbacks = []
    assert not np.array_equal(averaged.loss, Interpretation.from_learner(learn).loss)


def alive():
    """Bytes of all tensors of Python, each storage once; those of other tests that wait for the collector are no more.
    """
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)
             and thing.is_cpu and thing.layout is torch.strided]  # sparse ones have no storage
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def test_memory_does_not_grow_with_the_data():
    """100 MB of inputs in batches of 1 MB: of them only the one under way and those that are kept are there."""
    seen = []

    class Stream:
        def __iter__(self):
            for i in range(100):
                if i % 25 == 24:
                    seen.append(alive())
                yield torch.rand(8, 32_768), torch.arange(8) % 3

    learn = Learner(nn.Linear(32_768, 3), ([(torch.zeros(2, 32_768), torch.zeros(2, dtype=torch.int64))], None),
                    nn.CrossEntropyLoss(), verbose=False, device="cpu")
    before = alive()
    found = Interpretation.from_learner(learn, Stream(), keep=4)
    assert len(found.loss) == 800
    assert max(seen) - before < 3.5e6, "two batches, and twice 4 inputs of 131 kB"
    assert alive() - before < 1.2e6


# ---- plots


def title(ax):
    return ax.get_title().split("\n")


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_the_largest_losses(channels):
    learn, x, _ = on_pictures(channels)
    found = Interpretation.from_learner(learn, keep=5)
    figure = found.plot_top_losses(5)
    for ax, row in zip(figure.axes, found.top_losses(5), strict=True):
        assert title(ax)[:2] == [f"predicted {row['predicted']}", f"actual {row['actual']}"]
        assert (ax.title.get_color() == "red") == (row["predicted"] != row["actual"])
        picture = (x[row["index"]].permute(1, 2, 0) * 255).round().numpy()
        assert np.array_equal(ax.images[0].get_array(), picture.squeeze() if channels == 1 else picture)
    with pytest.raises(ValueError, match=r"k=6 is more than the 5 inputs that were kept.*keep=6"):
        found.plot_top_losses(6)
    assert len(Interpretation.from_learner(learn, keep=50).plot_top_losses(40).axes) == 12, "as many as there are"
    assert get_fignums() == []


def test_pictures_beside_samples_that_do_not_count():
    """The inputs that are kept are those of the row: where the loss ignores some, and where one is NaN."""
    learn, x, y = on_pictures()
    learn.loss_func = nn.CrossEntropyLoss(ignore_index=0)
    x = x.clone()
    x[7, 0, 0, 0] = torch.nan
    found = Interpretation.from_learner(learn, [(x[:5], y[:5]), (x[5:], y[5:])], keep=3)
    assert found.top_losses(1)[0]["index"] == 7
    for ax, row in zip(found.plot_top_losses(3).axes, found.top_losses(3), strict=True):
        picture = (x[row["index"], 0].nan_to_num() * 255).round().numpy()
        assert np.array_equal(ax.images[0].get_array(), picture)


def test_show_results():
    learn, x, _ = on_pictures(n=40)
    found = Interpretation.from_learner(learn)
    figure = found.show_results(9)
    names = {name.removeprefix("actual ") for ax in figure.axes for name in title(ax)[1:2]}
    assert names == set(NAMES), "drawn from all of the data"
    again = learn.show_results(9)
    assert [title(ax) for ax in figure.axes] == [title(ax) for ax in again.axes], "the same ones each time"
    assert len(learn.show_results(2, [(x[:5], torch.zeros(5, dtype=torch.int64))]).axes) == 2
    given = Figure()
    assert learn.show_results(2, figure=given) is given
    with pytest.raises(ValueError, match="n=41 is more than the 3 inputs that were kept"):
        Interpretation.from_learner(learn, keep=3).show_results(41)


def test_normalised_pictures_are_shown_as_they_were():
    learn, x, _ = on_pictures(3)
    learn.dls.form = SimpleNamespace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    normal = (x - torch.tensor([0.5, 0.4, 0.3]).reshape(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).reshape(3, 1, 1)
    found = Interpretation.from_learner(learn, [(normal, torch.arange(12) % 3)])
    ax, row = found.plot_top_losses(1).axes[0], found.top_losses(1)[0]
    assert np.array_equal(ax.images[0].get_array(), (x[row["index"]].permute(1, 2, 0) * 255).round())


def test_inputs_that_are_no_pictures():
    found = interpretation(*some())
    for call, instead in ((found.plot_top_losses, r"top_losses\(\)"), (found.show_results, r"top_losses\(\)")):
        with pytest.raises(ValueError, match=rf"inputs of a sample are float32 \(1, 3\).*{instead}"):
            call()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "QtAgg"])
def test_where_pyplot_shows_figures_each_is_shown_once(backend, monkeypatch):
    learn, *_ = on_pictures()
    found = Interpretation.from_learner(learn)
    monkeypatch.setattr(matplotlib, "get_backend", lambda: backend)
    for draw in (found.plot_confusion_matrix, found.plot_top_losses, found.show_results):
        drawn = draw()
        figure = getattr(drawn, "figure", drawn)
        assert get_fignums() == [figure.number]
        close(figure)


def matrix(k, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 3, (k, k)) * (rng.random((k, k)) < 0.2) + np.diag(rng.integers(0, 200, k))


def overlapping(texts, figure):
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in texts if text.get_text()]
    return [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes[:i])
            if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5]


@pytest.mark.parametrize(("k", "length"), [(2, 3), (2, 60), (10, 60), (30, 25), (100, 20)])
def test_the_matrix_can_be_read(k, length):
    names = [f"{i}$_$".ljust(length, "n") for i in range(k)]  # would fail if it was read as mathematics
    ax = confusion.plot(matrix(k), names, normalize=k == 10)
    ax.figure.canvas.draw()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "actual")
    for texts in (ax.get_xticklabels(), ax.get_yticklabels(), ax.texts):
        assert overlapping(texts, ax.figure) == []
        assert all(text.get_fontsize() >= 5 for text in texts)
    assert max(ax.figure.get_size_inches()) < 14
    assert (len(ax.texts) > 0) == (k < 100), "numbers where there is room"
    assert len(ax.figure.axes) == 1 + (k == 100), "else a colour bar"


def test_of_many_names_in_a_small_place_some_are_left_out():
    figure = Figure(figsize=(4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = confusion.plot(matrix(60), [f"class {i}" for i in range(60)], ax=figure.subplots())
    figure.canvas.draw()
    assert overlapping(ax.get_yticklabels(), figure) == []
    assert ax.get_yticklabels()[1].get_text() == f"class {ax.get_yticks()[1]}" != "class 1"


def test_cells_show_counts_or_shares():
    x, y = some(50)
    found = interpretation(x, y, names=NAMES)
    counts = found.confusion_matrix()
    written = {(text.get_position()[1], text.get_position()[0]): text.get_text()
               for text in found.plot_confusion_matrix().texts}
    assert written == {(i, j): str(counts[i, j]) for i in range(3) for j in range(3) if counts[i, j]}
    shares = {text.get_text() for text in found.plot_confusion_matrix(normalize=True).texts}
    assert shares == {f"{share:.2f}" for share in (counts / counts.sum(1, keepdims=True)).flatten() if share}
    left, right = Figure().subplots(1, 2)
    assert found.plot_confusion_matrix(ax=right) is right
    assert not left.has_data()


# ---- names


def test_names_of_the_classes():
    assert Interpretation.from_learner(on_pictures()[0]).classes == NAMES
    assert Interpretation.from_learner(on_pictures()[0], classes=("x", "y", "z")).classes == ["x", "y", "z"]
    assert interpretation(*some()).classes == ["0", "1", "2"]
    assert digits().classes == list("0123456789")
    assert ClassificationInterpretation is Interpretation, "fastai's name of it"


def test_the_sandbox_keeps_what_the_data_know():
    learn, *_ = on_pictures()
    with learn.sandbox():
        assert learn.dls.classes == NAMES
        assert Interpretation.from_learner(learn).classes == NAMES


class Named(TensorDataset):
    def __init__(self, classes, target_transform=None):
        super().__init__(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
        self.classes, self.target_transform = classes, target_transform


@pytest.mark.parametrize("make", [DataLoaders.from_datasets, partial(DataLoaders.in_memory, verbose=False)])
def test_names_come_from_the_data_set(make):
    train = Named(NAMES)
    assert make(train).classes == NAMES
    assert make(Subset(Subset(train, [0, 1, 2]), [0, 1]), Named(NAMES[:2])).classes == NAMES
    assert make(TensorDataset(torch.zeros(4)), train).classes is None
    for other in ([1, 2], "abc", ["a", "a"], None, 3, {"a": 0}):
        assert make(Named(other)).classes is None
    assert make(Named(NAMES, target_transform=int)).classes is None, "the targets may be others"
    with pytest.raises(ValueError, match="class 1 is 'bee' in train and 'cat' in valid: the same number means another"):
        make(train, Named(["ant", "cat"]))
    with pytest.raises(ValueError, match="class 0 is 'ant' in train and 'x' in noisy"):
        make(train, {"clean": train, "noisy": Subset(Named(["x"]), [0])})


@pytest.mark.parametrize(("classes", "kind", "message"), [
    ("abc", TypeError, r"classes must be a list of names, got 'abc' \(str\)"),
    ({"a", "b"}, TypeError, "classes must be a list of names"), ([1, 2], TypeError, r"got \[1, 2\] \(list\)"),
    ([], ValueError, r"classes must name at least one class, got \[\]"),
    (["a", "b", "a"], ValueError, "with 'a' more than once"),
])  # fmt: skip
def test_names_that_cannot_be(classes, kind, message):
    with pytest.raises(kind, match=message):
        DataLoaders([1], classes=classes)
