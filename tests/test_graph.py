"""`graph=True` without a GPU: all of its logic, with a stand-in for the capture that replays operators (tape.py).

What the stand-in cannot show is in test_gpu_graph.py.
"""
import gc
import logging
import random
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import Unwaiting, bits, everything, rngs, throw, trained
from tape import Tape
from torch import nn

from minifast import (
    EMA,
    ActivationStats,
    AutoMicrobatch,
    Callback,
    CancelBatch,
    Checkpoint,
    DataLoaders,
    FiniteLoss,
    GradientClip,
    Learner,
    MixedPrecision,
    MixUp,
    TensorLoader,
    Unfreeze,
    accuracy,
    graph,
)

NEVER = {"run": 0, "watched": 0, "captured": 0, "replayed": 0}


@pytest.fixture
def tapes(monkeypatch):
    """The stand-ins of the fits so far."""
    made = []

    def capturing(device):
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(graph, "capturing", capturing)
    return made


def counts(tape):
    return {"run": tape.n_run, "watched": tape.n_watched, "captured": tape.n_captured, "replayed": tape.n_replayed}


def on(event, action, n=None):
    """A callback that hears one event only, and acts the n-th time (from 0) or always."""
    calls = []

    def hear(self, state):
        calls.append(event)
        if n in (None, len(calls) - 1):
            action(state)

    return type("On", (Callback,), {event: hear})()


def convnet():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(64, 10))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


def make(is_graph, model=convnet, n=100, train=None, **options):
    torch.manual_seed(0)
    x, y = torch.randn(n, 1, 8, 8), torch.randint(0, 10, (n,))
    dls = DataLoaders(train or TensorLoader(x, y, batch_size=16, shuffle=True), TensorLoader(x, y, batch_size=50))
    options = {"loss_func": nn.CrossEntropyLoss(), "metrics": [accuracy], "device": "cpu", "verbose": False} | options
    learn = Learner(model(), dls, graph=is_graph, **options)
    torch.manual_seed(1)
    return learn


def told(learn):
    rows = [{key: value for key, value in row.items() if key != "time"} for row in learn.recorder.epochs]
    return bits([learn.recorder.losses, learn.recorder.lrs, learn.recorder.moms, rows])


def same(fit, model=convnet, **options):
    """Both learners after `fit(learn)`; they have to agree in every bit: weights, optimizer, record, generators."""
    learners = []
    for is_graph in (False, True):
        made = {key: value() if key == "callbacks" else value for key, value in options.items()}
        random.seed(0)
        learn = make(is_graph, model, **made)
        fit(learn)
        learners.append((learn, rngs()))
    (eager, its_rngs), (graphed, own_rngs) = learners
    assert trained(graphed) == trained(eager)
    assert told(graphed) == told(eager)
    assert own_rngs == its_rngs
    assert all(p.grad is None for p in graphed.model.parameters())
    return eager, graphed


def cycle(learn):
    learn.fit_one_cycle(3, 0.02)


# ---- equal to the eager fit


def halved(pred, target):
    losses, weights = nn.functional.cross_entropy(pred, target, reduction="none"), (target > 2).float()
    return (losses * weights).sum() / 2, weights.sum()  # a count on the device, another in each batch


OPTIONS = {
    "convnet": {},
    "MLP": {"model": mlp},
    "SGD": {"opt_func": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)},
    "clip": {"callbacks": lambda: [GradientClip(norm=0.1)]},
    "EMA": {"callbacks": lambda: [EMA(0.9)]},
    "bf16": {"callbacks": lambda: [MixedPrecision("bf16")]},
    "fp16": {"callbacks": lambda: [MixedPrecision("fp16")]},
    "MixUp": {"callbacks": lambda: [MixUp(num_classes=10)]},
    "strict": {"callbacks": lambda: [FiniteLoss(strict=True)]},
    "train_metrics": {"train_metrics": True},
    "sum and count": {"loss_func": halved},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_same_training(options, tapes):
    same(cycle, **options)
    # 7 batches an epoch: 6 of 16 and one of 4, which has been seen 3 times when the fit ends
    assert counts(tapes[0]) == {"run": 4, "watched": 2, "captured": 1, "replayed": 15}


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = convnet()

    def forward(self, image, labels, scale):
        logits = self.net(image * scale)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def test_a_mapping_whose_output_carries_the_loss(tapes):
    data = [{"image": torch.randn(8, 1, 8, 8), "labels": torch.randint(0, 10, (8,)), "scale": 0.5} for _ in range(6)]
    learners = []
    for is_graph in (False, True):
        torch.manual_seed(0)
        learn = Learner(Keyed(), (data, None), device="cpu", verbose=False, graph=is_graph)
        learn.fit(0.01, 2)
        learners.append(learn)
    assert trained(learners[0]) == trained(learners[1])
    assert counts(tapes[0])["replayed"] == 9


def test_one_batch_an_epoch(tapes):
    same(lambda learn: learn.fit(0.01, 8), n=16)
    assert counts(tapes[0]) == {"run": 2, "watched": 1, "captured": 1, "replayed": 5}


def test_two_fits_and_one_without(tapes):
    def train(learn):
        learn.fit(0.01, 2)
        learn.graph = learn.graph and len(tapes) > 5
        learn.fit(0.01, 1)
        learn.graph = bool(tapes)
        learn.fit_one_cycle(2, 0.1)

    same(train)
    assert [tape.n_captured for tape in tapes] == [1, 1]


def test_no_batch_waits_for_the_device(tapes):
    same(cycle, callbacks=lambda: [Unwaiting()])
    assert tapes[0].n_replayed == 15


def test_what_a_batch_leaves_behind_is_its_own(tapes):
    """Outputs and losses of a graph lie in memory that the next replay overwrites: nobody sees that."""
    kept = []

    class Keep(Callback):
        def after_backward(self, state):
            kept[-1].append((state.batch, state.target, state.n_samples, state.pred, state.loss, state.batch_index))
            assert state.model[0].weight.grad is not None

        def after_batch(self, state):
            kept[-1].append((state.pred, state.loss, state.loss_weight, state.step_loss))

    def train(learn):
        kept.append([])
        learn.fit(0.01, 2)

    same(train, callbacks=lambda: [Keep()])
    assert tapes[0].n_replayed > 5
    assert bits(kept[0]) == bits(kept[1])


def test_gradients_may_be_changed_behind_backward(tapes):
    def double(state):
        state.model[0].weight.grad.mul_(2)
        state.model[0].bias.grad = torch.ones_like(state.model[0].bias)

    same(cycle, callbacks=lambda: [on("after_backward", double)])
    assert tapes[0].n_replayed == 15


def test_batches_may_be_cancelled(tapes):
    same(cycle, callbacks=lambda: [on("after_backward", throw(CancelBatch), 9),
                                   on("before_step", throw(CancelBatch), 12),
                                   on("before_batch", throw(CancelBatch), 14)])
    assert tapes[0].n_captured == 1


def test_unpack_is_called_once_for_each_batch(tapes):
    seen = []

    def noisy(batch):
        seen.append(1)
        return batch[0] + torch.randn_like(batch[0]), batch[1]

    same(cycle, unpack=noisy)
    assert len(seen) == 2 * 3 * (7 + 2), "7 for training and 2 for validation"


def test_labels_are_looked_at_in_each_epoch(tapes):
    learn = make(True, n=16)
    loader = learn.dls.train

    def spoil(state):
        loader.tensors[1][3] = 10

    with pytest.raises(ValueError, match=re.escape("labels must be 0..9 for the model's 10 outputs, got ")):
        learn.fit(0.01, 8, callbacks=[on("after_epoch", spoil, 5)])
    assert tapes[0].n_replayed == 3


# ---- what changes on the way


def test_layers_that_are_thawed_are_captured_anew(tapes):
    same(cycle, callbacks=lambda: [Unfreeze({"0": 0.4, "1": 0.7}, train_bn=False)])
    assert tapes[0].n_captured == 3


def change(do):
    return lambda: [on("before_batch", do, 10)]


def other_memory(state):
    state.model[0].weight.data = state.model[0].weight.data.clone()


def other_buffer(state):
    state.model[1].running_mean = torch.ones(4)


def other_number(state):
    state.model[3].p = 0.7


def eval_mode(state):
    state.model[1].eval()


def other_smoothing(state):
    state.loss_func.label_smoothing = 0.3


def other_loss(state):
    state.loss_func = nn.CrossEntropyLoss(label_smoothing=0.2)


@pytest.mark.parametrize("do", [other_memory, other_buffer, other_number, eval_mode, other_smoothing, other_loss])
def test_what_a_graph_takes_for_granted_has_changed(do, tapes):
    def train(learn):
        learn.loss_func = nn.CrossEntropyLoss()
        learn.fit(0.01, 3)

    same(train, callbacks=change(do))
    assert tapes[0].n_captured >= 2
    assert tapes[0].n_replayed > 5


def test_a_mask_that_the_model_replaces_is_kept_as_long_as_a_graph_reads_it(tapes):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.mask = mlp(), None

        def forward(self, x):
            if self.mask is None or len(self.mask) < len(x):
                self.mask = torch.full((len(x), 1), 0.5)
            return self.net(x) * self.mask[:len(x)]

    seen = []

    class Look(Callback):
        def after_step(self, state):
            if state.step == 4:
                seen.append(weakref.ref(state.model.mask))
                state.model.mask = None  # as a longer batch would have it

        def after_batch(self, state):
            if state.step == 6:
                gc.collect()
                seen.append(seen[0]() is not None)

        def after_fit(self, state):
            state.model.mask = None

    make(True, Masked).fit(0.01, 2, callbacks=[Look()])
    gc.collect()
    assert seen[1]
    assert seen[0]() is None
    assert tapes[0].n_captured == 1


def ragged(sizes):
    return [(torch.randn(size, 1, 8, 8), torch.randint(0, 10, (size,))) for size in sizes]


def test_a_few_shapes_have_a_graph_each_and_the_rest_none(tapes):
    sizes = [2, 3, 4, 5, 6, 7] * 6
    same(lambda learn: learn.fit(0.01), train=ragged(sizes))
    assert counts(tapes[0]) == {"run": 6 * 2 + 2 * 3, "watched": 6, "captured": 4, "replayed": 4 * 3}


def test_shapes_that_change_all_the_time(tapes, caplog):
    caplog.set_level(logging.INFO, "minifast")
    same(lambda learn: learn.fit(0.01), train=ragged([2, 2, 2, 2, *range(2, 36)]))
    assert caplog.messages == [
        "CUDA graph: captured for (float32 (2, 1, 8, 8), int64 (2,))",
        "CUDA graph: not used, batches have more than 32 different shapes or values."]


def test_plain_values_in_a_batch_are_constants(tapes):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, name):
            return self.net(x) * len(name)

    data = [(x, name, y) for (x, y), name in zip(ragged([4] * 12), ["a", "bb"] * 6, strict=True)]
    for learn in (learners := [make(is_graph, Named, train=data) for is_graph in (False, True)]):
        learn.dls.valid = None
        learn.fit(0.01)
    assert trained(learners[0]) == trained(learners[1])
    assert tapes[0].n_captured == 2


# ---- what is run eagerly, and why


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x) * (2 if x.mean().item() > 0 else 1)


class Drawing(Reading):
    def forward(self, x):
        return self.net(x) * (2 if random.random() > 0.5 else 1)


class Odd(Reading):
    def forward(self, x):
        logits = self.net(x)
        return SimpleNamespace(logits=logits)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.net = nn.Embedding(2, 64, sparse=True), mlp()

    def forward(self, x):
        return self.net(self.table((x.flatten(1)[:, 0] > 0).long()))


class Listener(Callback):
    def after_loss(self, state):
        state.loss = state.loss * 2


def hooked():
    model = convnet()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


def gradient_hooked():
    model = convnet()
    model[0].weight.register_hook(lambda grad: grad * 2)
    return model


def precompiled():
    model = convnet()
    model.compile(backend="eager")
    return model


sgd = {"opt_func": torch.optim.SGD}
REASONS = {
    "waits": ({"model": Reading}, "the model or the loss waits for the device, by .item(), a mask or the like"),
    "draws": ({"model": Drawing}, "the model or the loss draws random numbers on the host"),
    "odd output": ({"model": Odd, "loss_func": lambda pred, y: nn.functional.cross_entropy(pred.logits, y)},
                   "a batch, or the model's output, holds a SimpleNamespace, and nobody knows which tensors are in it"),
    "sparse": ({"model": Sparse, **sgd}, "there are sparse gradients"),
    "accumulate": ({"fit": {"accumulate": 2}}, "accumulate=2 adds up gradients over several batches"),
    "microbatch": ({"callbacks": lambda: [AutoMicrobatch(8)]}, "AutoMicrobatch runs batches in a way of its own"),
    "listener": ({"callbacks": lambda: [Listener()]}, "Listener listens to after_loss, and is not capturable"),
    "ActivationStats": ({"callbacks": lambda: [ActivationStats()]},
                        "ActivationStats listens to after_pred, and is not capturable"),
    "hook": ({"model": hooked}, "there is a hook on Conv2d, which would not be called"),
    "gradient hook": ({"model": gradient_hooked}, "there is a hook on a parameter, which would not be called"),
    "DataParallel": ({"model": lambda: nn.Sequential(nn.DataParallel(mlp()))}, "the model is in DataParallel"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS.values(), ids=REASONS)
def test_what_does_not_fit_is_run_eagerly_with_the_reason(case, tapes, caplog):
    options, reason = case
    options = dict(options)
    arguments = options.pop("fit", {})
    caplog.set_level(logging.INFO, "minifast")
    same(lambda learn: learn.fit(0.01, 3, **arguments), **options)
    assert caplog.messages == [f"CUDA graph: not used, {reason}."]
    assert tapes[0].n_captured == 0


@pytest.mark.slow
def test_a_compiled_model_is_run_eagerly(tapes, caplog):
    caplog.set_level(logging.INFO, "minifast")
    same(lambda learn: learn.fit(0.01, 1), model=precompiled)
    assert caplog.messages == ["CUDA graph: not used, the model is compiled."]


def test_an_autocast_block_around_the_fit(tapes, caplog):
    caplog.set_level(logging.INFO, "minifast")
    with torch.autocast("cpu", torch.bfloat16):
        make(True, mlp).fit(0.01, 1)
    assert caplog.messages == ["CUDA graph: not used, the fit runs in an autocast block, which keeps copies of "
                               "weights: use MixedPrecision instead."]


def test_a_hook_that_comes_late(tapes, caplog):
    caplog.set_level(logging.INFO, "minifast")
    same(cycle, callbacks=change(lambda state: state.model[5].register_forward_hook(lambda *args: args[2] * 2)))
    assert caplog.messages[1:] == ["CUDA graph: not used, there is a hook on Linear, which would not be called."]
    assert tapes[0].n_replayed == 6


@pytest.mark.parametrize("bad", ["sparse", "needs a gradient"])
def test_tensors_that_cannot_be_copied_into_a_graph(bad, tapes, caplog):
    caplog.set_level(logging.INFO, "minifast")

    def spoil(batch):
        x, y = batch
        return (x.flatten(1).to_sparse() if bad == "sparse" else x.requires_grad_()), y

    class Dense(Reading):
        def forward(self, x):
            return self.net(x.to_dense())

    same(lambda learn: learn.fit(0.01, 1), model=Dense, unpack=spoil)
    assert bad in caplog.text
    assert counts(tapes[0]) == NEVER


def test_without_a_cuda_device(caplog, capsys):
    """No stand-in: this is what happens on a CPU."""
    caplog.set_level(logging.INFO, "minifast")
    same(cycle)
    line = "CUDA graph: not used, it takes a CUDA device, and this fit is on cpu."
    assert caplog.messages == [line]
    make(True, verbose=True).fit(0.01, 1)
    assert capsys.readouterr().out.splitlines()[0] == line


def test_what_is_said(tapes, capsys):
    make(True, verbose=True).fit(0.01, 4)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "CUDA" in line] == [
        "CUDA graph: captured for (float32 (16, 1, 8, 8), int64 (16,))",
        "CUDA graph: captured for (float32 (4, 1, 8, 8), int64 (4,))"]


def test_trace_and_profile_see_each_part(tapes):
    learn = make(True)
    before = everything(learn)
    events = [moment.event for moment in learn.trace(6)]
    assert events.count("forward") == events.count("backward") == 6
    assert learn.profile(6).share("backward") > 0
    assert everything(learn) == before
    assert [counts(tape) for tape in tapes] == [NEVER, NEVER]


# ---- captures that fail


class Broken(Tape):
    """A capture that fails, at its beginning or when all is captured."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def capture(self, work):
        def fails():
            if self.at == "end":
                work()
            raise RuntimeError("operation not permitted\nwhile capturing")

        super().capture(fails)


@pytest.mark.parametrize("at", ["begin", "end"])
def test_a_capture_that_fails_trains_the_batch_eagerly_and_once(at, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "minifast")
    monkeypatch.setattr(graph, "capturing", lambda device: Broken(at))
    same(cycle)
    assert caplog.messages == ["CUDA graph: not used, the capture failed: RuntimeError: operation not permitted."]


def test_a_cause_is_named_rather_than_what_it_led_to(monkeypatch, caplog):
    class Twice(Tape):
        def capture(self, work):
            try:
                raise ValueError("the cause")
            finally:
                raise RuntimeError("the capture was invalidated")  # as torch does

    caplog.set_level(logging.INFO, "minifast")
    monkeypatch.setattr(graph, "capturing", lambda device: Twice())
    make(True).fit(0.01, 1)
    assert caplog.messages == ["CUDA graph: not used, the capture failed: ValueError: the cause."]


def test_ctrl_c_in_a_capture(monkeypatch):
    class Interrupted(Tape):
        def capture(self, work):
            raise KeyboardInterrupt

    monkeypatch.setattr(graph, "capturing", lambda device: Interrupted())
    learn = make(True)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(0.01, 1)
    monkeypatch.setattr(graph, "capturing", lambda device: Tape())
    assert len(learn.recorder.losses) == 3
    learn.fit(0.01, 1)


def test_an_error_of_the_model_is_raised_as_ever(tapes):
    class Fails(Reading):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 3:
                raise ValueError("my own")
            return self.net(x)

    learn = make(True, Fails)
    with pytest.raises(ValueError, match="my own") as caught:
        learn.fit(0.01, 1)
    assert "in the model: epoch 0, step 3, inputs float32 (16, 1, 8, 8)" in caught.value.__notes__


# ---- callbacks that may be captured


def test_capturable_hooks_are_captured(tapes):
    calls = []

    class Doubled(Callback):
        capturable = True

        def after_pred(self, state):
            calls.append(state.step)
            state.pred = state.pred * 2

        def after_loss(self, state):
            state.loss = state.loss + state.pred.square().mean() + state.target.float().mean()

    same(cycle, callbacks=lambda: [Doubled()])
    assert calls[21:] == [0, 1, 2, 3, 6, 13, 20], "three times for each form, and once captured"
    assert tapes[0].n_replayed == 15


def test_a_capturable_hook_may_not_read_the_batch(tapes, caplog):
    """It would be captured with the values of one batch."""
    class Greedy(Callback):
        capturable = True

        def after_loss(self, state):
            state.loss = state.loss * state.batch[0].mean()

    caplog.set_level(logging.INFO, "minifast")
    same(cycle, callbacks=lambda: [Greedy()])
    assert len(caplog.messages) == 1
    assert "the capture failed: AttributeError: " in caplog.messages[0]


# ---- around a fit


def test_everything_is_freed_with_the_fit(tapes):
    held = []

    class Look(Callback):
        def before_validate(self, state):
            self.state = state  # someone holds on to it
            held.extend(weakref.ref(tensor) for form in state.gradient.forms.values()
                        for tensor in (*form.inputs, *(grad for _, grad in form.grads)))

    learn = make(True)
    look = Look()
    learn.fit(0.01, 1, callbacks=[look])
    gc.collect()
    assert look.state.model is learn.model
    assert len(held) == 2 + 6
    assert [ref() for ref in held] == [None] * 8


def test_lr_find_is_captured_and_leaves_no_trace(tapes):
    eager, learn = make(False), make(True)
    before = everything(learn)
    found = learn.lr_find(num_it=20)
    assert everything(learn) == before | {"the learner's attributes": everything(learn)["the learner's attributes"]}
    assert tapes[0].n_replayed > 10
    torch.manual_seed(1)
    assert bits(found.losses) == bits(eager.lr_find(num_it=20).losses)


def test_a_fit_that_is_resumed_is_the_same(tapes, tmp_path, quick_disk):
    class Killed(BaseException):
        pass

    def train(is_graph, **options):
        learn = make(is_graph)
        learn.fit_one_cycle(3, 0.02, **options)
        return learn

    eager = train(False)
    for step in (4, 12):
        folder = tmp_path / str(step)
        with pytest.raises(Killed):
            train(True, callbacks=[Checkpoint(folder, every_steps=1), on("after_batch", throw(Killed), step)])
        resumed = train(True, callbacks=[Checkpoint(folder, every_steps=1)], resume=True)
        assert trained(resumed) == trained(eager)
        assert told(resumed) == told(eager)
    assert all(tape.n_captured for tape in tapes)


def test_compile_and_graph_exclude_each_other():
    with pytest.raises(ValueError, match=r"compile= and graph=True cannot be combined: pass one of them\."):
        make(True, compile=True)
