"""Mixed precision: what runs in half, what stays in float32, the loss scale; and the channels-last memory format."""

import itertools
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from helpers import At, Unwaiting, batches, bits, learner, spying, trained
from torch import nn

from minifast import AutoMicrobatch, Callback, ChannelsLast, GradientClip, MixedPrecision, NonFiniteLoss, OneCycle
from minifast.standard.finite import Unchecked

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
precisions = pytest.mark.parametrize("precision", ["bf16", "fp16"])


class Probe(nn.Module):
    """A linear model that notes the dtype of its products, and multiplies its output by `factor` of the batch."""

    def __init__(self, wrap=lambda output: output):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.wrap, self.seen = nn.Linear(3, 4), nn.Linear(4, 1), wrap, []

    def forward(self, x):
        hidden = self.body(x)
        self.seen.append(hidden.dtype)
        return self.wrap(self.head(hidden.tanh()))


def small(n=4, scale=0.1):
    """Batches that overflow at no usual scale."""
    return [(scale * x, scale * y) for x, y in batches(n)]


def autocast_by_hand(data, precision, lr, scale=1.0):
    """Losses and weights of SGD on a Probe in plain torch."""
    model = Probe()
    losses = []
    for x, y in data:
        with torch.autocast("cpu", HALF[precision]):
            pred = model(x)
        loss = nn.functional.mse_loss(pred.float(), y)
        (loss * scale).backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad / scale
                p.grad = None
    return losses, [p.detach() for p in model.parameters()]


@precisions
def test_it_is_autocast_by_hand(precision):
    data = small()
    learn = learner(data, model=Probe())
    learn.fit(0.5, callbacks=[MixedPrecision(precision)])
    losses, weights = autocast_by_hand(data, precision, 0.5, {"bf16": 1.0, "fp16": 65536.0}[precision])
    assert learn.recorder.losses.tolist() == pytest.approx(losses, rel=1e-6), "recorded losses are unscaled"
    for ours, theirs in zip(learn.model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert set(learn.model.seen) == {HALF[precision]}
    plain = learner(data, model=Probe())
    plain.fit(0.5)
    assert plain.recorder.losses != pytest.approx(losses, rel=1e-6)
    assert plain.recorder.losses == pytest.approx(losses, rel=0.02)


@dataclass
class Output:
    logits: torch.Tensor
    name: str = "out"


@precisions
@pytest.mark.parametrize("wrap", [lambda out: out, lambda out: {"logits": out}, Output])
def test_everybody_gets_float32(precision, wrap):
    seen = []

    def metric(pred, target):
        seen.append((pred.dtype, torch.is_autocast_enabled("cpu")))
        return (pred - target).abs().mean()

    def loss_func(pred, target):
        pred = getattr(pred, "logits", pred) if not isinstance(pred, dict) else pred["logits"]
        seen.append((pred.dtype, torch.is_autocast_enabled("cpu")))
        return (pred - target).square().mean()

    learn = learner(small(), small(2), model=Probe(wrap), loss_func=loss_func, metrics=[metric],
                    callbacks=[MixedPrecision(precision)])  # fmt: skip
    learn.fit(0.1)
    row = learn.validate()
    preds = learn.get_preds()[0]
    assert set(seen) == {(torch.float32, False)}
    assert preds.dtype == learn.predict(small()[0][0]).dtype == torch.float32
    assert set(learn.model.seen) == {HALF[precision]}, "predictions too"
    assert len(learn.model.seen) == 4 + 2 + 2 + 2 + 1
    assert {key: learn.recorder.epochs[-1][key] for key in row} == row
    learn.model(torch.ones(1, 3))
    assert learn.model.seen[-1] is torch.float32
    assert not learn.model._forward_hooks
    assert not learn.model._forward_pre_hooks


@pytest.mark.case("I12")
def test_a_model_that_fails_leaves_no_autocast():
    learn = learner(small(), small(), callbacks=[MixedPrecision()])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        learn.predict(torch.ones(2, 7))
    assert not torch.is_autocast_enabled("cpu")
    assert not learn.model._forward_hooks


def test_predictions_inside_predictions_leave_no_autocast():
    learn = learner(small(), small(), callbacks=[MixedPrecision()], model=Probe())
    learn.metrics = [lambda pred, target: learn.predict(small()[0][0]).mean()]
    learn.validate()
    assert not torch.is_autocast_enabled("cpu")
    assert set(learn.model.seen) == {torch.bfloat16}


@precisions
def test_a_binary_loss_that_autocast_refuses_on_some_devices_works(precision):
    model = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    data = [(x, (y > 0).float()) for x, y in batches(3)]
    learn = learner(data, data, model=model, loss_func=nn.BCELoss(), callbacks=[MixedPrecision(precision)])
    learn.fit(0.1)
    assert np.isfinite(learn.recorder.losses).all()


def test_checks_of_the_loss_still_see_it():
    learn = learner([(torch.ones(4, 3), torch.ones(4))])
    with pytest.raises(ValueError, match="would be broadcast"):
        learn.fit(0.1, callbacks=[MixedPrecision()])


def test_a_loss_of_half_precision_is_scaled_in_float32():
    """10 * 65536 would be infinite in float16. Its own gradient overflows once, at 65536, and then no more."""
    learn = learner(small(), loss_func=lambda pred, target: (pred.half() - target.half()).square().mean() + 10)
    precision = MixedPrecision("fp16")
    learn.fit(0.1, callbacks=[precision])
    assert precision.scaler.get_scale() == 32768
    assert len(learn.recorder.losses) == 3
    assert learn.recorder.losses == pytest.approx(10, abs=0.2)
    learn.loss_func = lambda pred, target: (pred.half() - target.half()).square().mean() + 20_000
    learn.fit(0.1, accumulate=2, callbacks=[precision])
    assert learn.recorder.losses == pytest.approx(20_000, rel=1e-3), "8 samples of 20,000 are summed up in float32"


@precisions
def test_accumulation_counts_and_micro_batches_fit_together(precision):
    """All of it together equals the big batch, within what half precision rounds."""
    data = [(0.1 * x, 0.1 * y) for x, y in batches(size=[4, 2, 3, 5])]

    def summed(pred, target):
        return (pred - target).square().sum(), target.numel()

    learn = learner(data, model=Probe(), loss_func=summed)
    learn.fit(0.5, accumulate=2, callbacks=[MixedPrecision(precision), AutoMicrobatch(2), GradientClip(norm=0.01)])
    model, losses, norms = Probe(), [], []
    for pair in (data[:2], data[2:]):
        x, y = map(torch.cat, zip(*pair, strict=True))
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01).item())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
                p.grad = None
    assert learn.recorder.losses == pytest.approx(losses, rel=0.03)
    assert learn.recorder.column("grad_norm") == pytest.approx(norms, rel=0.03)
    assert min(norms) > 0.01, "clipping has something to do"
    for ours, theirs in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=5e-4)


def test_bf16_never_waits_for_the_device():
    learn = learner(small())
    learn.fit(0.1, callbacks=[MixedPrecision("bf16"), GradientClip(norm=0.1), AutoMicrobatch(2), Unwaiting()])
    with pytest.raises(AssertionError, match="the host waits"):
        learn.fit(0.1, callbacks=[At("before_step", lambda state: state.step_loss.item()), Unwaiting()])


# ---- the loss scale


class ScaledBy(nn.Linear):
    """A linear model whose gradient is multiplied by the next of `factors`, its output is not."""

    def __init__(self, factors):
        super().__init__(3, 1)
        self.factors = iter(factors)

    def forward(self, x):
        out = super().forward(x)
        if out.requires_grad:
            factor = next(self.factors)
            out.register_hook(lambda grad: grad * factor)
        return out


def test_an_overflow_skips_the_update_and_lowers_the_scale():
    torch.manual_seed(0)
    learn = learner(small(5), model=ScaledBy([1, 1e9, 1, 1e9, 1]))
    heard, precision = [], MixedPrecision("fp16")
    schedule = OneCycle(0.1, moms=None)
    learn.fit(0.1, callbacks=[precision, schedule, At("after_step", lambda state: heard.append(state.batch_index)),
                              At("after_batch", lambda state: heard.append(float(precision.scaler.get_scale())))])
    assert heard == [0, 65536.0, 32768.0, 2, 32768.0, 16384.0, 4, 16384.0]
    assert len(learn.opt.seen) == len(learn.recorder.losses) == 3
    assert learn.recorder.lrs.tolist() == schedule.values(5)["lr"][:3], "the schedule stands still"
    assert all(torch.isfinite(grad).all() for note in learn.opt.seen for grad in note["grads"])


def test_an_overflow_drops_its_whole_window_and_leaks_nothing():
    data = small(6)
    torch.manual_seed(0)
    learn = learner(data, model=ScaledBy([1, 1, 1, 1e9, 1, 1]))
    start = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(0.5, accumulate=2, callbacks=[MixedPrecision("fp16")])
    other = ScaledBy([1] * 4)
    for p, value in zip(other.parameters(), start, strict=True):
        p.data.copy_(value)
    twin = learner(data[:2] + data[4:], model=other)
    twin.fit(0.5, accumulate=2, callbacks=[MixedPrecision("fp16")])
    assert len(learn.opt.seen) == 2
    for ours, theirs in zip(learn.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_finite_at_no_scale_do_not_stall_the_fit():
    """The finder hears of a loss that exploded, and ends; it does not go round for ever on skipped updates."""
    learn = learner(small(100))
    precision = MixedPrecision("fp16")
    heard = []
    learn.fit(0.1, callbacks=[precision, At("before_batch", lambda state: state.model.weight.data.fill_(torch.nan), 2),
                              Unchecked(), At("after_step", lambda state: heard.append(state.batch_index))])
    assert heard[:3] == [0, 1, 2 + 32], "from 2**16, 32 halvings lead to 2**-16"
    assert heard[3:] == list(range(35, 100))


@precisions
def test_the_finder_survives_an_explosion(precision):
    learn = learner(small(20), callbacks=[MixedPrecision(precision), GradientClip(norm=1e30)])
    found = learn.lr_find(1e-3, 1e30, num_it=60)
    assert len(found.lrs) < 60
    assert learn.callbacks[0].scaler is None, "it leaves no trace"
    learn.fit(0.1)
    kept = learn.callbacks[0].state_dict()
    learn.lr_find(1e-3, 1e30, num_it=60)
    assert learn.callbacks[0].state_dict() == kept


def test_the_scale_is_kept_across_fits():
    precision = MixedPrecision("fp16")
    learn = learner(small(2), model=ScaledBy([1e9, 1, 1, 1]), callbacks=[precision])
    learn.fit(0.1)
    scaler = precision.scaler
    assert scaler.get_scale() == 32768
    learn.fit(0.1)
    assert precision.scaler is scaler
    assert scaler.get_scale() == 32768
    assert precision.state_dict()["scaler"]["_growth_tracker"] == 3


def test_it_goes_on_where_it_was_killed():
    """As a checkpoint does it: before_fit, then load_state_dict, in the middle of an epoch."""
    first, second, scales = MixedPrecision("fp16"), MixedPrecision("fp16"), []
    learner(small(2), model=ScaledBy([1e9, 1])).fit(0.1, callbacks=[first])
    saved = first.state_dict()
    assert saved["scaler"]["scale"] == 32768
    learner(small(2), model=ScaledBy([1, 1])).fit(0.1, callbacks=[
        At("before_epoch", lambda state: second.load_state_dict(saved)), second,
        At("after_pred", lambda state: scales.append(state.window.loss_scale.item()))])  # fmt: skip
    assert scales == [32768, 32768]
    assert second.scaler.get_scale() == 32768
    third = MixedPrecision("fp16")  # and before the first fit
    third.load_state_dict(saved)
    assert third.state_dict() == saved
    learner(small(1), model=ScaledBy([1])).fit(0.1, callbacks=[third])
    assert third.scaler.get_scale() == 32768


def test_the_loss_scale_is_a_tensor_that_no_other_precision_has():
    seen = []
    for callbacks in ([MixedPrecision("fp16")], [MixedPrecision("bf16")], []):
        note = At("after_pred", lambda state: seen.append(state.window.loss_scale))
        learner(small(1)).fit(0.1, callbacks=[*callbacks, note])
    assert (seen[0].shape, seen[0].dtype, seen[0].item()) == ((), torch.float32, 65536)
    assert seen[1:] == [None, None]


# ---- what it refuses


@pytest.mark.parametrize("wrong", ["fp8", None, 16, True, ["bf16"]])
def test_another_precision(wrong):
    with pytest.raises(ValueError, match=r'precision must be "bf16" or "fp16", got '):
        MixedPrecision(wrong)


def test_a_device_without_autocast(monkeypatch):
    monkeypatch.setattr(torch.amp.autocast_mode, "is_autocast_available", lambda device: False)
    with pytest.raises(ValueError, match=r'MixedPrecision\("bf16"\) does not work on the device .cpu.: .*autocast'):
        learner().fit(0.1, callbacks=[MixedPrecision()])


def test_a_device_without_the_precision(monkeypatch):
    def autocast(device, dtype):
        warnings.warn(f"{device} autocast only supports nothing", stacklevel=1)

    monkeypatch.setattr(torch, "autocast", autocast)
    with pytest.raises(ValueError, match="'cpu': cpu autocast only supports nothing"):
        learner().fit(0.1, callbacks=[MixedPrecision()])


def test_weights_in_float16():
    learn = learner(model=nn.Linear(3, 1).half())
    with pytest.raises(ValueError, match='MixedPrecision\\("fp16"\\) needs weights in float32, but weight is float16'):
        learn.fit(0.1, callbacks=[MixedPrecision("fp16")])


def test_two_of_them():
    with pytest.raises(ValueError, match="set 'the precision'"):
        learner().fit(0.1, callbacks=[MixedPrecision(), MixedPrecision("fp16")])


# ---- channels last


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1),
                         nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 2))  # fmt: skip


def images(n=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 1, 0])) for _ in range(n)]


def formats(learn):
    tensors = [*learn.model.parameters()] + [value for state in learn.opt.state.values() for value in state.values()]
    return [tensor.is_contiguous() for tensor in tensors if tensor.ndim == 4]


@pytest.mark.parametrize("opt_func", [
    torch.optim.AdamW, partial(torch.optim.AdamW, fused=True), partial(torch.optim.SGD, momentum=0.9),
    partial(torch.optim.SGD, momentum=0.9, fused=True), torch.optim.RMSprop], ids=str)  # fmt: skip
def test_channels_last_is_the_same_training(opt_func):
    make = partial(learner, images(), images(2), loss_func=nn.CrossEntropyLoss(), opt_func=opt_func)
    plain, other, seen = make(model=convnet()), make(model=convnet()), []

    def look(state):
        x = state.batch[0]
        seen.append((x.is_contiguous(memory_format=torch.channels_last), x.is_contiguous()))

    for epochs in (1, 2):  # the second fit begins with the optimizer's state of the first
        plain.fit(0.01, epochs)
        other.fit(0.01, epochs, callbacks=[ChannelsLast(), At("after_pred", look), At("after_valid_batch", look), At(
            "after_step", lambda state: seen.append((state.model[0].weight.is_contiguous(
                memory_format=torch.channels_last), state.model[0].weight.is_contiguous())))])  # fmt: skip
        assert all(formats(other)), "put back"
    assert set(seen) == {(True, False)}
    for ours, theirs in zip(other.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert other.recorder.losses == pytest.approx(plain.recorder.losses, rel=1e-4)
    plain.fit(0.01)
    other.fit(0.01)
    assert other.recorder.losses == pytest.approx(plain.recorder.losses, rel=1e-4)


def test_channels_last_changes_no_value():
    learn = learner(images(), model=convnet(), loss_func=nn.CrossEntropyLoss(), opt_func=torch.optim.AdamW)
    learn.fit(0.01)
    before, ids = trained(learn), [id(p) for p in learn.model.parameters()]
    seen = []

    class Stop(Callback):
        def before_epoch(self, state):
            seen.append(trained(learn))
            raise KeyError

    with pytest.raises(KeyError):
        learn.fit(0.01, callbacks=[ChannelsLast(), Stop()])
    without_lr = [{key: value for key, value in note.items() if not key.startswith("hypers")}
                  for note in (before, seen[0], trained(learn))]  # fmt: skip
    assert without_lr[0] == without_lr[1] == without_lr[2]
    assert ids == [id(p) for p in learn.model.parameters()]
    assert all(formats(learn))


def test_channels_last_leaves_the_users_data_alone():
    data = images()
    learn = learner(data, model=convnet(), loss_func=nn.CrossEntropyLoss(), opt_func=spying(torch.optim.SGD))
    kept = bits(data)
    learn.fit(0.01, callbacks=[ChannelsLast()])
    assert bits(data) == kept
    assert all(x.is_contiguous() for x, _ in data)
    learner().fit(0.01, callbacks=[ChannelsLast()])  # a model without images


def test_a_diverged_fit_does_not_spoil_the_scale_for_the_next():
    """The usual way back: load good weights, take a lower rate."""
    precision = MixedPrecision("fp16")
    learn = learner(batches(50), callbacks=[precision], opt_func=partial(torch.optim.SGD, momentum=0.0))
    good = {name: value.clone() for name, value in learn.model.state_dict().items()}
    with torch.no_grad():
        learn.model.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="The weights were not finite before that"):
        learn.fit(0.1, 2)
    assert precision.scaler.get_scale() > 0
    learn.model.load_state_dict(good)
    learn.fit(0.01, 1)
    assert precision.scaler.get_scale() >= 1.0
    losses = learn.recorder.losses
    assert np.isfinite(losses).all()
    assert losses[-10:].mean() < losses[:10].mean()


def test_fp16_waits_once_per_update(monkeypatch):
    reads, item = [], torch.Tensor.item

    def counting(tensor):
        reads.append(1)
        return item(tensor)

    learn = learner(batches(20), callbacks=[MixedPrecision("fp16")])
    learn.fit(0.01, 1)
    marks = []
    mark = At("after_batch", lambda state: marks.append(len(reads)))
    monkeypatch.setattr(torch.Tensor, "item", counting)
    learn.fit(0.01, 1, callbacks=[mark])
    assert {after - before for before, after in itertools.pairwise(marks)} == {1}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_warning_of_the_model_is_shown_as_often_as_without(precision):
    class Warns(nn.Linear):
        def forward(self, x):
            warnings.warn("once", stacklevel=1)
            return super().forward(x)

    counts = []
    for callbacks in ([], [MixedPrecision(precision)]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            learner(batches(6), batches(2), model=Warns(3, 1), callbacks=callbacks).fit(0.01, 2)
        counts.append(len(caught))
    assert counts[0] == counts[1]
