"""Gradient accumulation: a window of micro-batches is the big batch, whatever their sizes and wherever it ends."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, learner, spying, throw, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minifast import CancelBatch, CancelEpoch, CancelFit, OneCycle

OPTIMIZERS = {"SGD": (torch.optim.SGD, {"momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"weight_decay": 0.0})}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64; AdamW divides by what may be small


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def windows_of(data, k):
    """The big batches that `k` batches each make; the last one may be short."""
    return [tuple(map(torch.cat, zip(*data[i : i + k], strict=True))) for i in range(0, len(data), k)]


def by_hand(epochs, lrs, optimizer="SGD"):
    """A loop over big batches, `epochs` of lists of them, one rate for each update: what each update saw and made."""
    model = make_model()
    opt_func, options = OPTIMIZERS[optimizer]
    opt = opt_func(model.parameters(), lr=1.0, **options)
    seen = []
    for (x, y), lr in zip([window for epoch in epochs for window in epoch], lrs, strict=True):
        opt.param_groups[0]["lr"] = lr
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        opt.step()
        seen.append({"loss": loss.item(), "grads": grads, "weights": [p.detach().clone() for p in model.parameters()]})
    return seen


def accumulating(data, optimizer="SGD", **options):
    opt_func, opt_options = OPTIMIZERS[optimizer]
    options = {"opt_func": partial(spying(opt_func), **opt_options), "wd": 0.0, "model": make_model()} | options
    return learner(data, **options)


def in_model_order(learn, tensors):
    """What the optimizer noted (weights first, then biases: two param_groups), in the order of the model."""
    held = [id(p) for group in learn.opt.param_groups for p in group["params"]]
    return [tensors[held.index(id(p))] for p in learn.model.parameters()]


def assert_same_updates(learn, expected):
    assert len(learn.opt.seen) == len(expected)
    for note, wanted in zip(learn.opt.seen, expected, strict=True):
        for name in ("grads", "weights"):
            for ours, theirs in zip(in_model_order(learn, note[name]), wanted[name], strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)
    assert learn.recorder.losses == pytest.approx([wanted["loss"] for wanted in expected], rel=1e-9)


def lrs_of(n_steps, done=None):
    return OneCycle(0.05, moms=None).values(n_steps)["lr"][:done]


def fit(learn, n_epochs, k, **options):
    learn.fit_one_cycle(n_epochs, 0.05, moms=None, accumulate=k, **options)


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=8)
windows = st.integers(1, 10)


@settings(max_examples=60)
@given(sizes=sizes, k=windows, n_epochs=st.integers(1, 3), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
def test_it_is_the_big_batch(sizes, k, n_epochs, optimizer):
    data = batches(size=sizes, dtype=torch.float64)
    learn = accumulating(data, optimizer)
    fit(learn, n_epochs, k)
    big = windows_of(data, k)
    lrs = lrs_of(n_epochs * len(big))
    assert_same_updates(learn, by_hand([big] * n_epochs, lrs, optimizer))
    assert learn.recorder.lrs.tolist() == [note["lr"] for note in learn.opt.seen] == lrs
    mean = sum(loss * len(x) for loss, (x, _) in zip(learn.recorder.losses[-len(big) :], big, strict=True)) / sum(sizes)
    assert learn.recorder.epochs[-1]["train_loss"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.case("I9")
@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=3, max_size=8),
    k=st.integers(1, 4),
    event=st.sampled_from(["before_batch", "after_pred", "after_loss", "after_backward"]),
    cancelled=st.sets(st.integers(0, 15), min_size=1, max_size=4),
)
def test_a_cancelled_batch_drops_its_window(sizes, k, event, cancelled):
    """`cancelled`: how many times `event` has happened before; dropped batches do not hear it."""
    data, n = batches(size=sizes, dtype=torch.float64), len(sizes)
    kept, heard = [[], []], 0
    for epoch in range(2):
        for i, window in enumerate(windows_of(data, k)):
            is_kept = True
            for _ in range(i * k, min(i * k + k, n)):
                is_kept = is_kept and heard not in cancelled
                heard += 1
                if not is_kept:
                    break
            if is_kept:
                kept[epoch].append(window)
    learn, counter = accumulating(data), iter(range(1000))

    def cancel(state):
        if next(counter) in cancelled:
            raise CancelBatch

    fit(learn, 2, k, callbacks=[At(event, cancel)])
    steps = len(kept[0]) + len(kept[1])
    assert_same_updates(learn, by_hand(kept, lrs_of(2 * len(windows_of(data, k)), steps)))


def test_a_window_may_be_dropped_before_its_step():
    data = batches(5, dtype=torch.float64)
    learn = accumulating(data)
    fit(learn, 1, 2, callbacks=[At("before_step", throw(CancelBatch), n=1)])
    big = windows_of(data, 2)
    assert_same_updates(learn, by_hand([[big[0], big[2]]], lrs_of(3, 2)))


@pytest.mark.parametrize(("cancel", "n_updates"), [(CancelEpoch, 5), (CancelFit, 1)])
def test_an_epoch_that_ends_inside_a_window_leaks_nothing_into_the_next(cancel, n_updates):
    data = batches(6, dtype=torch.float64)
    learn = accumulating(data)
    fit(learn, 3, 3, callbacks=[At("after_backward", throw(cancel), n=4)])
    big = windows_of(data, 3)
    assert_same_updates(learn, by_hand([big[:1], big, big], lrs_of(6, 5))[:n_updates])
    assert [p.grad for p in learn.model.parameters()] == [None] * 4


@pytest.mark.case("I10")
def test_an_error_inside_a_window_leaks_nothing_into_the_next_fit():
    data = batches(4, dtype=torch.float64)
    learn = accumulating(data)
    with pytest.raises(ZeroDivisionError):
        fit(learn, 1, 4, callbacks=[At("after_backward", throw(ZeroDivisionError), n=1)])
    assert [p.grad for p in learn.model.parameters()] == [None] * 4
    fit(learn, 1, 4)
    assert_same_updates(learn, by_hand([windows_of(data, 4)], lrs_of(1)))


class Loader:
    """Any batches, with or without a length that may be wrong."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Announcing(Loader):
    def __init__(self, batches, announced):
        super().__init__(batches)
        self.announced = announced

    def __len__(self):
        return self.announced


@pytest.mark.parametrize(("n", "k", "steps"), [(6, 3, 2), (7, 3, 2), (7, 2, 3), (9, 4, 1)])
def test_an_unsized_loader_stops_after_its_steps(n, k, steps):
    data = batches(n, dtype=torch.float64)
    learn = accumulating(Loader(data))
    fit(learn, 2, k, steps_per_epoch=steps)
    assert_same_updates(learn, by_hand([windows_of(data, k)[:steps]] * 2, lrs_of(2 * steps)))


@pytest.mark.parametrize(("n", "k", "steps"), [(7, 3, 3), (7, 3, 1), (8, 2, 3)])
def test_steps_per_epoch_counts_updates(n, k, steps):
    data = batches(n, dtype=torch.float64)
    learn = accumulating(data)
    fit(learn, 2, k, steps_per_epoch=steps)
    assert_same_updates(learn, by_hand([windows_of(data, k)[:steps]] * 2, lrs_of(2 * steps)))


@pytest.mark.parametrize("n", [1, 3, 4, 5])
def test_a_loader_that_yields_less_than_it_said_still_steps_its_last_window(n):
    data = batches(n, dtype=torch.float64)
    learn = accumulating(Announcing(data, 6))
    with pytest.warns(UserWarning, match=f"yielded {n} batches, but 6 were announced"):
        fit(learn, 1, 3)
    big = windows_of(data, 3)
    assert_same_updates(learn, by_hand([big], lrs_of(2, len(big))))


def test_an_unsized_loader_that_ends_early_still_steps_its_last_window():
    data = batches(3, dtype=torch.float64)
    learn = accumulating(Loader(data))
    with pytest.warns(UserWarning, match="yielded 3 batches, but 8 were announced"):
        fit(learn, 1, 2, steps_per_epoch=4)
    assert_same_updates(learn, by_hand([windows_of(data, 2)], lrs_of(4, 2)))


def test_the_last_window_may_be_dropped_although_the_loader_left_it_open():
    data = batches(3, dtype=torch.float64)
    for event, n in (("after_loss", 2), ("before_step", 1)):
        learn = accumulating(Announcing(data, 4))
        with pytest.warns(UserWarning, match="yielded 3 batches, but 4 were announced"):
            fit(learn, 1, 2, callbacks=[At(event, throw(CancelBatch), n=n)])
        assert_same_updates(learn, by_hand([windows_of(data, 2)[:1]], lrs_of(2, 1)))


def test_a_loader_that_yields_more_than_it_said_steps_them_all():
    data = batches(5, dtype=torch.float64)
    learn = accumulating(Announcing(data, 4))
    with pytest.warns(UserWarning, match="yielded 5 batches, but 4 were announced"):
        fit(learn, 1, 2)
    lrs = lrs_of(2)
    assert_same_updates(learn, by_hand([windows_of(data, 2)], [*lrs, lrs[-1]]))  # past its end: the last rate


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_micro_batches_are_not_rounded(k):
    """Powers of two divide exactly: then the sum of the gradients over k is the same to the last bit."""
    data = batches(4)
    learn = learner(data)
    learn.fit(0.1, accumulate=k)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for i, (x, y) in enumerate(data):
        nn.functional.mse_loss(model(x), y).backward()
        if (i + 1) % k == 0:
            for p in model.parameters():
                p.grad /= k
            opt.step()
            opt.zero_grad()
    assert bits(list(learn.model.parameters())) == bits(list(model.parameters()))


def test_before_step_sees_the_mean_and_the_window():
    data = batches(size=[4, 2, 3, 1], dtype=torch.float64)
    seen, learn = [], accumulating(data)

    def look(state):
        seen.append((state.batch_index, state.step, state.step_weight, state.step_loss.item(),
                     [p.grad.clone() for p in state.model.parameters()]))  # fmt: skip

    fit(learn, 1, 3, callbacks=[At("before_step", look)])
    expected = by_hand([windows_of(data, 3)], lrs_of(2))
    assert [row[:3] for row in seen] == [(2, 0, 9), (3, 1, 1)]
    for row, wanted in zip(seen, expected, strict=True):
        assert row[3] == pytest.approx(wanted["loss"], rel=1e-12)
        for ours, theirs in zip(row[4], wanted["grads"], strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_clipping_in_before_step_clips_the_whole_window():
    norms = []

    def clip(state):
        norms.append(nn.utils.clip_grad_norm_(state.model.parameters(), 1e-3))

    learn = accumulating(batches(4, dtype=torch.float64))
    fit(learn, 1, 2, callbacks=[At("before_step", clip)])
    assert len(norms) == 2
    for note in learn.opt.seen:
        assert torch.cat([g.flatten() for g in note["grads"]]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_one_batch_per_window_is_the_plain_fit():
    learns = [learner(batches(5)) for _ in range(2)]
    learns[0].fit_one_cycle(2, 0.1)
    learns[1].fit_one_cycle(2, 0.1, accumulate=1)
    assert trained(learns[0]) == trained(learns[1])


def test_parameters_without_a_gradient_and_sparse_ones():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.unused = nn.Embedding(5, 1, sparse=True), nn.Linear(1, 1)

        def forward(self, x):
            return self.table(x).squeeze(1)

    data = [(torch.tensor([0, 1, 1]), torch.ones(3)), (torch.tensor([2]), torch.ones(1))]
    models = []
    for batches_, k in ((data, 2), (windows_of(data, 2), 1)):
        torch.manual_seed(0)
        models.append(Model().double())
        doubled = [(x, y.double()) for x, y in batches_]
        learner(doubled, model=models[-1], wd=0.0).fit(0.1, 2, accumulate=k)
    torch.testing.assert_close(models[0].table.weight, models[1].table.weight, **CLOSE)


def test_samples_are_counted_where_the_target_or_else_the_input_is():
    """Dict batches without a target: the loss comes from the model, the size from the input."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(3, 1).double()

        def forward(self, x):
            return {"loss": self.linear(x).square().mean()}

    data = [({"x": x}) for x, _ in batches(size=[4, 1, 2], dtype=torch.float64)]
    learns = [
        learner(d, model=Model(), loss_func=None, wd=0.0) for d in (data, [{"x": torch.cat([b["x"] for b in data])}])
    ]
    learns[0].fit(0.1, 3, accumulate=3)
    learns[1].fit(0.1, 3)
    for ours, theirs in zip(learns[0].model.parameters(), learns[1].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    np.testing.assert_allclose(learns[0].recorder.losses, learns[1].recorder.losses, rtol=1e-9)
