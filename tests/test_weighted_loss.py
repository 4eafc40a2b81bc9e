"""Losses that are summed over tokens: (sum, count) is the mean over all of them, however they are spread."""

import math

import pytest
import torch
from helpers import At, Unwaiting, learner, throw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minifast import Callback, CancelBatch

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
COUNTS = {"int": lambda mask: int(mask.sum()), "float": lambda mask: float(mask.sum()),
          "tensor": lambda mask: mask.sum(), "float tensor": lambda mask: mask.sum().double()[None]}  # fmt: skip


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def sequences(lengths):
    """One batch: x (n, 4, 2), (y (n, 4, 1), mask (n, 4)) with `lengths` tokens that count in each sequence."""
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    x, y = (torch.randn(len(lengths), 4, d, generator=generator, dtype=torch.float64) for d in (2, 1))
    return x, (y, torch.arange(4) < torch.tensor(lengths)[:, None])


def token_loss(count):
    def loss_func(pred, target):
        y, mask = target
        return ((pred - y).square()[..., 0] * mask).sum(), count(mask)
    return loss_func


def by_hand(data, k, lr):
    """(token mean of each window, weights) of SGD over the big batches that `k` batches each make."""
    model, losses = make_model(), []
    for i in range(0, len(data), k):
        total, count = 0.0, 0
        for x, (y, mask) in data[i : i + k]:
            total = total + (model(x) - y)[mask].square().sum()
            count += int(mask.sum())
        (total / max(count, 1)).backward()
        losses.append((float(total.detach()) / max(count, 1), count))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
                p.grad = None
    return losses, model


def token_mean(model, data):
    with torch.no_grad():
        squares = torch.cat([(model(x) - y)[mask].square() for x, (y, mask) in data])
    return float(squares.mean()) if len(squares) else math.nan


lengths = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6)


@pytest.mark.filterwarnings("ignore:.*_loss is nan")  # of data without a token
@settings(max_examples=60)
@given(lengths=lengths, k=st.integers(1, 4), kind=st.sampled_from(sorted(COUNTS)))
def test_it_is_the_mean_over_all_tokens(lengths, k, kind):
    data = [sequences(batch) for batch in lengths]
    learn = learner(data, data, model=make_model(), loss_func=token_loss(COUNTS[kind]))
    learn.fit(0.3, accumulate=k)
    losses, model = by_hand(data, k, 0.3)
    for ours, theirs in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert learn.recorder.losses == pytest.approx([loss for loss, _ in losses], rel=1e-9)
    n_tokens = sum(count for _, count in losses)
    row = learn.recorder.epochs[-1]
    train_loss = sum(loss * count for loss, count in losses) / n_tokens if n_tokens else math.nan
    assert row["train_loss"] == pytest.approx(train_loss, rel=1e-9, nan_ok=True)
    assert row["valid_loss"] == pytest.approx(token_mean(model, data), rel=1e-9, nan_ok=True)
    assert learn.validate()["valid_loss"] == pytest.approx(token_mean(model, data), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("kind", sorted(COUNTS))
@pytest.mark.parametrize("k", [1, 2])
def test_a_window_without_a_token_moves_nothing(kind, k):
    data = [sequences(batch) for batch in ([0, 0], [0], [4, 1], [2])]
    learn = learner(data, model=make_model(), loss_func=token_loss(COUNTS[kind]))
    start = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(0.3, accumulate=k)
    held = [p for group in learn.opt.param_groups for p in group["params"]]
    first = {id(p): value for p, value in zip(held, learn.opt.seen[0]["weights"], strict=True)}
    for p, value in zip(learn.model.parameters(), start, strict=True):
        assert torch.equal(first[id(p)], value)
        assert torch.isfinite(p).all()
        assert not torch.equal(p, value), "the other windows have tokens"


@pytest.mark.parametrize("kind", sorted(COUNTS))
def test_a_cancelled_window_leaves_no_weight_behind(kind):
    data = [sequences(batch) for batch in ([4, 4], [3], [1], [2, 1])]
    learn = learner(data, model=make_model(), loss_func=token_loss(COUNTS[kind]))
    learn.fit(0.3, accumulate=2, callbacks=[At("after_backward", throw(CancelBatch), n=1)])
    losses, model = by_hand(data[2:], 2, 0.3)
    assert learn.recorder.losses == pytest.approx([loss for loss, _ in losses], rel=1e-9)
    for ours, theirs in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("k", [1, 2])
def test_a_count_on_the_device_stays_there(k):
    data = [sequences(batch) for batch in ([4, 0], [3], [1], [2, 1])]
    learn = learner(data, model=make_model(), loss_func=token_loss(COUNTS["tensor"]))
    learn.fit(0.3, accumulate=k, callbacks=[Unwaiting()])
    assert len(learn.recorder.losses) == 4 / k
    waiting = learner(data, model=make_model(), loss_func=token_loss(COUNTS["int"]))
    with pytest.raises(AssertionError, match="the host waits"):
        waiting.fit(0.3, accumulate=k, callbacks=[Unwaiting()])


class Scaled(Callback):
    """What fp16 does: backward begins with a scale, which is taken out again before the step."""

    def before_batch(self, state):
        state.window.loss_scale = torch.tensor(8.0, dtype=torch.float64)

    def before_step(self, state):
        for p in state.model.parameters():
            p.grad /= 8


@pytest.mark.table
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_scale_of_the_loss_reaches_every_micro_batch(count, k):
    data = [sequences(lengths) for lengths in ([4, 1], [2], [3, 3, 1], [1])]
    learn = learner(data, model=make_model(), loss_func=token_loss(COUNTS[count]))
    learn.fit(0.1, accumulate=k, callbacks=[Scaled()])
    losses, model = by_hand(data, k, 0.1)
    for ours, theirs in zip(learn.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert learn.recorder.losses == pytest.approx([loss for loss, _ in losses], rel=1e-9)


def test_numbers_and_tensors_in_one_window():
    """A loss_func may count with a number in one batch and with a tensor in the next."""
    data = [sequences(lengths) for lengths in ([4, 1], [2], [3, 3, 1], [1])]
    kinds = iter([int, torch.tensor] * 2)
    loss_func = token_loss(lambda mask: next(kinds)(int(mask.sum())))
    learn = learner(data, model=make_model(), loss_func=loss_func)
    learn.fit(0.1, accumulate=4)
    for ours, theirs in zip(learn.model.parameters(), by_hand(data, 4, 0.1)[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
