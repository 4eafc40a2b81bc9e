"""`learn.check()` finds what is wrong, finds nothing where nothing is, and leaves nothing behind; `learn.overfit()`."""
import time

import pytest
import torch
from helpers import batches, everything, learner
from torch import nn

from minifast import Callback, CSVLogger, Learner, RunLog, SaveBest, accuracy, digits


def levels(report):
    return {finding.what: finding.level for finding in report}


def says(report, what):
    return next(finding.says for finding in report if finding.what == what)


def classifier(model=None, n=32, classes=3, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    y = (x.sum(1) > 0).long()
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, classes))
    data = options.pop("data", ([(x, y)], [(x, y)]))
    return Learner(model, data, options.pop("loss_func", nn.CrossEntropyLoss()), lr=0.03, verbose=False, device="cpu",
                   **options)  # fmt: skip


def test_a_sound_learner_passes():
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), digits(),
                    nn.CrossEntropyLoss(), metrics=[accuracy], lr=0.01, verbose=False)  # fmt: skip
    report = learn.check()
    assert set(levels(report).values()) == {"ok"}
    assert bool(report) is True
    assert report.exit_code == 0
    assert report.problems == []
    assert str(report).endswith("no problem")
    assert "guessing among 10 classes costs 2.303" in says(report, "loss")


def test_nothing_is_left_of_it():
    learn = classifier(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))
    learn.fit(0.01)
    before = everything(learn)
    learn.check()
    learn.overfit(3)
    assert everything(learn) == before


class Net(nn.Module):
    """A classifier with one of the usual faults."""

    def __init__(self, fault=""):
        super().__init__()
        self.fault, self.body, self.head, self.unused = fault, nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(2, 2)

    def forward(self, x):
        x = self.body(x).relu()
        if self.fault == "mean over the batch":
            x = x - x.mean(0)
        if self.fault == "softmax over the batch":
            x = x.softmax(0)
        if self.fault == "dropout":
            x = nn.functional.dropout(x)
        return self.head(x)


def test_parameters_without_a_gradient_are_named():
    report = classifier(Net()).check()
    assert levels(report)["gradients"] == "problem"
    assert "2 of 6 parameters get none: unused.weight, unused.bias" in says(report, "gradients")
    assert report.exit_code == 1
    assert not report
    assert str(report).endswith("1 problem")


@pytest.mark.parametrize("fault", ["mean over the batch", "softmax over the batch"])
def test_a_leak_between_samples_is_found(fault):
    assert levels(classifier(Net(fault)).check())["leaks"] == "problem"


def test_batchnorm_and_attention_over_positions_are_no_leak():
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Unflatten(1, (2, 4)), attention,
                          nn.Flatten(), nn.Linear(8, 3))  # fmt: skip
    assert levels(classifier(model).check())["leaks"] == "ok"


def test_dropout_in_eval_mode_is_found():
    found = levels(classifier(Net("dropout")).check())
    assert (found["eval mode"], found["leaks"]) == ("problem", "note")


def test_labels_out_of_range():
    x = torch.randn(8, 4)
    report = classifier(data=([(x, torch.full((8,), 3))], None)).check()
    assert "labels must be 0..2 for the model's 3 outputs, got 3..3" in report.problems[0].says


@pytest.mark.parametrize("loss_func", [nn.MSELoss(), nn.functional.l1_loss, lambda p, t: (p - t).square().mean()])
def test_the_silent_broadcast(loss_func):
    x = torch.randn(8, 4)
    report = classifier(nn.Linear(4, 1), data=([(x, torch.randn(8))], None), loss_func=loss_func).check()
    assert "broadcast" in report.problems[0].says
    assert "(8, 1)" in report.problems[0].says
    assert "(8,)" in report.problems[0].says


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad):
    x = torch.randn(8, 4)
    x[3, 1] = bad
    report = classifier(data=([(x, torch.zeros(8, dtype=torch.long))], None)).check()
    assert "the first batch has NaN or infinite values in float32 (8, 4)" in report.problems[0].says


def test_a_loss_far_above_guessing():
    model = nn.Linear(4, 3)
    nn.init.constant_(model.bias, 0.0)
    with torch.no_grad():
        model.weight.mul_(100)
    report = classifier(model).check()
    assert levels(report)["loss"] == "note"
    assert "guessing among 3 classes costs 1.099" in says(report, "loss")
    assert report.exit_code == 0


def test_large_inputs_are_worth_a_note():
    x = torch.full((8, 4), 255.0)
    report = classifier(data=([(x, torch.zeros(8, dtype=torch.long))], None)).check()
    assert "inputs are as large as float32 (8, 4): 255" in says([f for f in report if f.level == "note"], "data")


def test_frozen_and_empty_are_problems():
    learn = classifier()
    for p in learn.model.parameters():
        p.requires_grad_(False)
    assert "there is no trainable parameter" in learn.check().problems[0].says
    assert "0 batches" in classifier(data=([], None)).check().problems[0].says


def test_bad_validation_data():
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    report = classifier(data=([(x, y)], {"good": [(x, y)], "odd": [(x, y + 5)]})).check()
    assert levels(report)["validation good"] == "ok"
    assert "labels must be 0..2" in report.problems[0].says


def test_labels_that_cannot_be_learned():
    """The same input with different labels."""
    x, y = torch.ones(30, 4), torch.arange(30) % 3
    report = classifier(data=([(x, y)], None)).check()
    assert levels(report)["overfitting"] == "note"


def test_a_model_that_fails_is_a_finding_with_its_words():
    report = classifier(nn.Linear(5, 3)).check()
    assert "mat1 and mat2 shapes cannot be multiplied (32x4 and 5x3)" in report.problems[0].says


def test_overfit_gives_the_loss_of_each_step():
    learn = classifier()
    losses = learn.overfit(40)
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]


def test_overfit_trains_on_the_first_batch_alone():
    seen = []

    class Net(nn.Linear):
        def forward(self, x):
            seen.append(x.sum().item())
            return super().forward(x)

    learn = learner(batches(3), batches(1), model=Net(3, 1))
    learn.overfit(5, lr=0.01)
    assert seen == [batches(3)[0][0].sum().item()] * 5


def test_bad_arguments_and_data():
    learn = learner()
    with pytest.raises(ValueError, match=r"steps must be an int >= 1, got 0 \(int\)"):
        learn.overfit(0)
    with pytest.raises(ValueError, match=r"lr must be a finite number > 0, got -1 \(int\)"):
        learn.overfit(lr=-1)
    for call in (learner(iter(batches(2))).check, learner(iter(batches(2))).overfit):
        with pytest.raises(ValueError, match="the data is an iterator"):
            call()


# ---- sound learners: no problem


class Tokens(nn.Module):
    """A small transformer over (tokens, mask): padded places are masked, by -inf that is added or by True."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, tokens, mask):
        kind = "mask" if mask.shape[0] == tokens.shape[1] else "src_key_padding_mask"
        return self.head(self.encoder(self.embed(tokens), **{kind: mask}).mean(1))


def tokens(mask):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 20, (12, 6), generator=generator)
    return [(x, mask, (x[:, 0] > 9).long())]


PADDING = torch.zeros(12, 6, dtype=torch.bool)
PADDING[:, 5] = True
CAUSAL = torch.full((6, 6), float("-inf")).triu(1)


class Rows(nn.Module):
    """A recurrent net over (time, samples, features)."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.LSTM(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.net(x)[0])


class Graph(nn.Module):
    """One step of messages over the whole graph: it cannot run on a part of its nodes."""

    def __init__(self):
        super().__init__()
        self.edges, self.head = torch.eye(8) + torch.eye(8).roll(1, 0), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.edges @ x)


class Unsized:
    def __iter__(self):
        yield from batches(7)


def squeezed(pred, target):
    return nn.functional.mse_loss(pred.squeeze(1), target)


def where_known(pred, target):
    return (pred - target)[~target.isnan()].square().mean()


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
UNKNOWN = X[:, :1].clone()
UNKNOWN[3] = float("nan")
SOUND = {
    "a loss that squeezes": lambda: (nn.Linear(4, 1), ([(X, X[:, 0])], None), squeezed),
    "targets that are masked": lambda: (nn.Linear(4, 1), ([(X, UNKNOWN)], None), where_known),
    "padding": lambda: (Tokens(), (tokens(PADDING), None), nn.CrossEntropyLoss()),
    "padding by -inf": lambda: (Tokens(), (tokens(torch.zeros(12, 6).masked_fill(PADDING, float("-inf"))), None),
                                nn.CrossEntropyLoss()),
    "a mask for all": lambda: (Tokens(), (tokens(CAUSAL), None), nn.CrossEntropyLoss()),
    "time first": lambda: (Rows(), ([(torch.randn(6, 5, 3), torch.randn(6, 5, 2))], None), nn.MSELoss()),
    "a graph": lambda: (Graph(), ([(X, torch.arange(8) % 3)], None), nn.CrossEntropyLoss()),
    "no len()": lambda: (nn.Linear(3, 1), (Unsized(), None), nn.MSELoss()),
}  # fmt: skip


@pytest.mark.parametrize("make", SOUND.values(), ids=SOUND)
def test_no_false_alarm(make):
    torch.manual_seed(0)
    model, data, loss_func = make()
    report = Learner(model, data, loss_func, verbose=False, device="cpu").check()
    assert report.problems == []


def test_a_callback_may_prepare_the_batch():
    class Scale(Callback):
        def before_batch(self, state):
            state.batch = (state.batch[0].float() / 255, state.batch[1])

    x = torch.randint(0, 255, (32, 4), dtype=torch.uint8)
    report = classifier(data=([(x, (x.sum(1) > 500).long())], None), callbacks=[Scale()]).check()
    assert "inputs float32 (32, 4)" in says(report, "data")
    assert report.problems == []


# ---- leaks that are seen in some samples only


class Leaky(nn.Module):
    def __init__(self, leak):
        super().__init__()
        self.leak, self.net, self.head = leak, nn.LSTM(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.leak(self, x))


LEAKS = {
    "batch_first forgotten": lambda model, x: model.net(x.unsqueeze(1))[0][:, -1],
    "sum of those before": lambda model, x: x.cumsum(0),
    "the first one": lambda model, x: x + x[:1],
    "the last one": lambda model, x: x + x[-1:],
    "spread over the batch": lambda model, x: x / x.std(0),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_leak_into_some_samples_is_found(leak):
    assert levels(classifier(Leaky(leak)).check())["leaks"] == "problem"


# ---- what it must not do


def test_files_are_left_alone(tmp_path):
    files = [CSVLogger(tmp_path / "a.csv"), RunLog(tmp_path / "run"), SaveBest("valid_loss", tmp_path / "best.pt")]
    learn = classifier(callbacks=files)
    learn.fit(0.01, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 3
    learn.check()
    learn.trace(callbacks=[CSVLogger(tmp_path / "b.csv")])
    learn.profile(3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_slow_data_is_not_waited_for_long():
    drawn = []

    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.5)
                drawn.append(1)
                yield batch

    data = Slow(batches(40))
    Learner(nn.Linear(3, 1), (data, None), nn.MSELoss(), verbose=False, device="cpu").check()
    assert len(drawn) <= 10


def test_one_fault_is_one_problem():
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    assert len(classifier(data=([(x, y)], [(x, y + 5)])).check().problems) == 1


def test_nll_loss_on_logits():
    model = nn.Linear(4, 3)
    nn.init.constant_(model.bias, 5.0)
    report = classifier(model, loss_func=nn.NLLLoss()).check()
    assert "the first loss is -" in report.problems[0].says
    assert "NLLLoss takes the output of log_softmax" in report.problems[0].says
    assert classifier(nn.Sequential(model, nn.LogSoftmax(1)), loss_func=nn.NLLLoss()).check().problems == []


class Root(nn.Module):
    """A gradient that is infinite where the output is 0, of a loss that is finite."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1))

    def forward(self, x):
        return (x @ self.weight).abs().sqrt()


def test_gradients_that_are_not_finite():
    x = torch.ones(8, 4)
    report = classifier(Root(), data=([(x, torch.zeros(8, 1))], None), loss_func=nn.L1Loss()).check()
    assert "1 of 1 are NaN or infinite: weight" in says(report.problems, "gradients")


def test_gradients_that_are_zero_are_worth_a_note():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(model[0].bias, -100.0)
    report = classifier(model).check()
    assert levels(report)["gradients"] == "note"
    assert "3 of 4 are all zero on the first batch: 0.weight, 0.bias, 2.weight" in says(report, "gradients")


def test_validation_that_is_not_finite_or_not_for_the_metrics():
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    bad = x.clone()
    bad[0] = float("inf")
    assert levels(classifier(data=([(x, y)], [(bad, y)])).check())["validation"] == "problem"

    def broken(pred, target):
        raise IndexError("of mine")

    assert "of mine" in classifier(metrics=[broken]).check().problems[0].says


def test_a_loader_that_is_slower_than_the_step_is_worth_a_note():
    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.01)
                yield batch

    learn = Learner(nn.Linear(3, 1), (Slow(batches(8)), None), nn.MSELoss(), verbose=False, device="cpu")
    report = learn.check()
    assert levels(report)["speed"] == "note"
    assert "waiting for the data" in says(report, "speed")


def test_overfit_runs_only_what_runs_in_lr_find():
    heard = []

    class Listens(Callback):
        def after_step(self, state):
            heard.append(type(self))

    class Takes(Listens):
        in_lr_find = True

    learner(callbacks=[Listens(), Takes()]).overfit(3)
    assert heard == [Takes] * 3
