"""CUDA graphs on a CUDA device; skipped where there is none. Their logic is tested on the CPU, in test_graph.py."""
import logging
import math
import random

import pytest
import torch
from test_gpu import NoSync
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import (
    EMA,
    Callback,
    DataLoaders,
    GradientClip,
    Learner,
    MixedPrecision,
    MixUp,
    TensorLoader,
    Unfreeze,
    accuracy,
    finite,
    graph,
)

pytestmark = pytest.mark.gpu


class Replays(Callback):
    """How many batches were replayed, and what has become of the graphs."""

    n = 0

    def before_fit(self, state):
        self.n, self.forms = 0, []
        gradient, run = state.gradient, type(state.gradient)._replay

        def counted(*args):
            self.n += 1
            return run(gradient, *args)

        gradient._replay = counted

    def after_batch(self, state):
        self.is_off = getattr(state.gradient, "is_off", None)

    def after_fit(self, state):
        vars(state.gradient).pop("_replay", None)


def make(is_graph, dropout=0.2, n=320, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                   nn.Dropout(dropout), nn.Flatten(), nn.Linear(128, 10))
    x, y = torch.randn(n, 1, 8, 8, device="cuda"), torch.randint(0, 10, (n,), device="cuda")
    dls = DataLoaders(TensorLoader(x, y, batch_size=32, shuffle=True), [(x, y)])
    options = {"metrics": [accuracy]} | options
    learn = Learner(model, dls, nn.CrossEntropyLoss(), device="cuda", verbose=False, graph=is_graph, **options)
    torch.manual_seed(1)
    return learn


def close(a, b, rtol=1e-2, atol=1e-3):
    """The same within rounding, which grows over tens of steps."""
    for (name, ours), theirs in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(torch.tensor(a.recorder.losses), torch.tensor(b.recorder.losses), rtol=rtol, atol=atol)


def cycle(learn):
    learn.fit_one_cycle(3, 0.02)


FITS = {
    "one cycle": (cycle, lambda: [], {}),
    "constant": (lambda learn: learn.fit(0.01, 3), lambda: [], {}),
    "SGD": (cycle, lambda: [], {"opt_func": lambda params, lr, fused: torch.optim.SGD(params, lr, momentum=0.9,
                                                                                     fused=fused)}),
    "SGD without momentum": (cycle, lambda: [], {"opt_func": torch.optim.SGD}),
    "foreach": (cycle, lambda: [], {"opt_func": torch.optim.RMSprop}),
    "clip": (cycle, lambda: [GradientClip(norm=0.1)], {}),
    "EMA": (cycle, lambda: [EMA(0.9)], {}),
    "bf16": (cycle, lambda: [MixedPrecision("bf16")], {}),
    "fp16": (cycle, lambda: [MixedPrecision("fp16")], {}),
    "MixUp": (cycle, lambda: [MixUp(num_classes=10)], {}),
    "train metrics": (cycle, lambda: [], {"train_metrics": True}),
    "last batch smaller": (cycle, lambda: [], {"n": 300}),
    "Unfreeze": (cycle, lambda: [Unfreeze({"0": 0.5})], {}),
}


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_it_is_the_same_training_within_rounding(fit):
    train, callbacks, options = fit
    replays, learners = Replays(), []
    for is_graph in (False, True):
        learn = make(is_graph, callbacks=[*callbacks(), *([replays] if is_graph else [])], **options)
        train(learn)
        learners.append(learn)
    eager, graphed = learners
    close(graphed, eager)
    assert replays.n > 15
    assert graphed.recorder.lrs.tolist() == eager.recorder.lrs.tolist()
    assert graphed.recorder.moms.tolist() == pytest.approx(eager.recorder.moms.tolist(), nan_ok=True)
    assert graphed.recorder.epochs[-1]["valid_loss"] == pytest.approx(eager.recorder.epochs[-1]["valid_loss"], rel=0.02)


def test_random_numbers_are_drawn_as_in_an_eager_fit():
    """Dropout masks and the generator's state; an eager batch after the graph draws on from there."""
    states = []
    for is_graph in (False, True):
        learn = make(is_graph, dropout=0.5)
        learn.fit(0.01, 2)
        states.append((torch.cuda.get_rng_state(), torch.rand(3, device="cuda")))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_the_masks_of_dropout_differ_from_batch_to_batch():
    """The same batch each time, and nothing moves: what differs is the mask."""
    seen = []

    class Keep(Callback):
        def after_batch(self, state):
            seen.append(state.pred.clone())

    torch.manual_seed(0)
    x = torch.ones(16, 64, device="cuda")
    learn = Learner(nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 4)), ([(x, torch.zeros(16, 4, device="cuda"))] * 12,
                    None), nn.MSELoss(), opt_func=torch.optim.SGD, device="cuda", verbose=False, graph=True)
    replays = Replays()
    learn.fit(1e-30, callbacks=[Keep(), replays])
    assert replays.n == 9
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("callbacks", [lambda: [], lambda: [MixedPrecision("bf16"), GradientClip(norm=0.1), EMA(0.9)]],
                         ids=["none", "several"])
def test_nothing_in_the_hot_path_waits_for_the_device(callbacks, monkeypatch):
    monkeypatch.setattr(finite, "LOOK_EVERY", math.inf)
    replays = Replays()
    learn = make(True, callbacks=[NoSync(), *callbacks(), replays], train_metrics=True)
    learn.fit_one_cycle(1, 0.02)
    assert replays.n == 7
    assert replays.is_off is False


def test_a_loader_with_workers_that_pin_memory():
    data = TensorDataset(torch.randn(320, 1, 8, 8), torch.randint(0, 10, (320,)))
    learners, replays = [], Replays()
    for is_graph in (False, True):
        learn = make(is_graph, callbacks=[replays] if is_graph else [])
        learn.dls = DataLoaders(DataLoader(data, 32, num_workers=2, pin_memory=True))
        learn.fit(0.01, 3)
        learners.append(learn)
    assert replays.n == 27
    close(*learners)


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x) * (2 if x.mean().item() > 0 else 1)


class ReadingUnseen(Reading):
    """It waits for the device in a capture only: what watching does not see."""

    def forward(self, x):
        logits = self.net(x)
        return logits + logits.sum().item() if torch.cuda.is_current_stream_capturing() else logits


class Drawing(Reading):
    def forward(self, x):
        return self.net(x) * (2 if random.random() > 0.5 else 1)


UNFIT = {
    "waits": (Reading, {}, "the model or the loss waits for the device"),
    "waits in the capture": (ReadingUnseen, {}, "the capture failed: "),
    "draws on the host": (Drawing, {}, "draws random numbers on the host"),
    "accumulate": (nn.Identity, {"accumulate": 2}, "accumulate=2"),
}


@pytest.mark.parametrize("case", UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_captured_is_run_eagerly(case, caplog):
    """Nothing is trained twice or lost, random numbers go on, and another fit can be captured afterwards."""
    model, arguments, reason = case
    caplog.set_level(logging.INFO, "minifast")
    learners, states = [], []
    for is_graph in (False, True):
        random.seed(0)
        torch.manual_seed(0)
        made = None if model is nn.Identity else model()
        learn = make(is_graph, model=made)
        learn.fit(0.01, 2, **arguments)
        learners.append(learn)
        states.append(torch.cuda.get_rng_state())
    close(*learners)
    assert torch.equal(*states)
    assert reason in caplog.text
    assert len(caplog.messages) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    replays = Replays()
    make(True, callbacks=[replays]).fit(0.01, 2)
    assert replays.n == 17


def test_memory_is_given_back():
    """Of graphs that hold more than 50 MB each."""
    def train():
        wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 2**17), nn.ReLU(), nn.Linear(2**17, 10))
        learn = make(True, model=wide, opt_func=torch.optim.SGD)
        learn.fit(0.01, 1)

    train()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        train()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**24


def test_lr_find_leaves_no_trace():
    learn, plain = make(True), make(True)
    learn.lr_find(num_it=20)
    for each in (learn, plain):
        torch.manual_seed(1)
        each.fit(0.01, 1)
    for ours, theirs in zip(learn.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fits_eager_and_captured_may_alternate():
    """Gradients stay tied to no stream: torch would warn."""
    learn = make(True)
    for is_graph in (True, False, True):
        learn.graph = is_graph
        learn.fit(0.01, 1)
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()


def test_the_stand_in_is_not_needed_here():
    assert graph.capturing(torch.device("cuda", 0)) is not None
