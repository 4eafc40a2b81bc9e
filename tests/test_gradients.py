"""Clipping and recording of gradient norms: by hand on the big batch, whatever the micro-batches."""

import math

import numpy as np
import pytest
import torch
from helpers import At, Unwaiting, batches, bits, learner, throw, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minifast import CancelBatch, CancelFit, GradientClip, GradientNorm, NonFiniteGradient


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def by_hand(data, k, lr, clip):
    """(norms before clipping, weights) of SGD over the big batches that `k` batches each make."""
    model, norms = make_model(), []
    for i in range(0, len(data), k):
        x, y = map(torch.cat, zip(*data[i : i + k], strict=True))
        nn.functional.mse_loss(model(x), y).backward()
        grads = [p.grad for p in model.parameters()]
        norms.append(math.sqrt(sum(grad.square().sum().item() for grad in grads)))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * clip(p.grad, norms[-1])
                p.grad = None
    return norms, [p.detach() for p in model.parameters()]


CLIPS = {
    "norm": lambda bound: lambda grad, norm: grad * min(1.0, bound / (norm + 1e-6)),
    "value": lambda bound: lambda grad, norm: grad.sign() * grad.abs().where(grad.abs() < bound, bound),
}


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), k=st.integers(1, 4),
       kind=st.sampled_from(sorted(CLIPS)), bound=st.sampled_from([1e-3, 0.1, 0.7, 100.0]))  # fmt: skip
def test_it_clips_the_gradient_of_the_whole_window(sizes, k, kind, bound):
    data = batches(size=sizes, dtype=torch.float64)
    learn = learner(data, model=make_model())
    learn.fit(0.3, accumulate=k, callbacks=[GradientClip(**{kind: bound})])
    norms, weights = by_hand(data, k, 0.3, CLIPS[kind](bound))
    assert learn.recorder.column("grad_norm") == pytest.approx(norms, rel=1e-9)
    for ours, theirs in zip(learn.model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_bound_that_is_never_reached_changes_no_bit():
    plain, wide, watched = (learner(batches(5)) for _ in range(3))
    plain.fit(0.1)
    wide.fit(0.1, callbacks=[GradientClip(norm=1e9)])
    watched.fit(0.1, callbacks=[GradientNorm()])
    assert trained(plain) == trained(wide) == trained(watched)
    assert bits(wide.recorder.column("grad_norm")) == bits(watched.recorder.column("grad_norm"))
    norms = [torch.cat([grad.flatten() for grad in note["grads"]]).norm().item() for note in plain.opt.seen]
    assert watched.recorder.column("grad_norm") == pytest.approx(norms, rel=1e-6)


def test_the_norm_is_logged_for_every_step_that_is_made():
    learn = learner(batches(5))
    learn.fit(0.1, callbacks=[GradientNorm(), At("before_step", throw(CancelBatch), n=1)])
    assert len(learn.recorder.column("grad_norm")) == len(learn.recorder.losses) == 4
    assert np.isfinite(learn.recorder.column("grad_norm")).all()


def test_frozen_layers_have_no_part_in_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    learn = learner(model=model, splitter=lambda model: [model[0], model[1]])
    learn.freeze()
    learn.fit(0.1, callbacks=[GradientClip(norm=1e-3)])
    for note in learn.opt.seen:
        norm = torch.cat([grad.flatten() for grad in note["grads"] if grad is not None]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-2)


def test_sparse_gradients_are_clipped_too():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))

    data = [(torch.tensor([[0, 1], [1, 1], [4, 2]]), y[:3]) for _, y in batches(3)]
    learn = learner(data, model=make(), opt_func=torch.optim.SGD)
    learn.fit(0.1, callbacks=[GradientClip(norm=0.5)])
    dense = make()
    dense[0].sparse = False
    other = learner(data, model=dense, opt_func=torch.optim.SGD)
    other.fit(0.1, callbacks=[GradientClip(norm=0.5)])
    assert learn.recorder.column("grad_norm") == pytest.approx(other.recorder.column("grad_norm"), rel=1e-5)
    for ours, theirs in zip(learn.model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_never_waits_for_the_device():
    learn = learner(batches(4))
    learn.fit(0.1, callbacks=[GradientClip(norm=0.1), Unwaiting()])
    learn.fit(0.1, callbacks=[GradientClip(value=0.1), Unwaiting()])
    assert len(learn.recorder.losses) == 4
    with pytest.raises(AssertionError, match="the host waits"):
        learn.fit(0.1, callbacks=[At("before_step", lambda state: float(state.step_loss)), Unwaiting()])


# ---- gradients that are not finite


def spoiled(value, at=1):
    """An action that writes `value` into one gradient element of update `at`."""
    def spoil(state):
        if state.step == at:
            state.model.weight.grad[0, 1] = value
    return At("after_backward", spoil)


@pytest.mark.parametrize("clip", [GradientClip(norm=1.0), GradientClip(value=0.5)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_gradient_that_is_not_finite_is_refused(clip, value):
    """How, and what is left then: tests/reliability/test_numerics.py."""
    learn = learner(batches(4))
    with pytest.raises(NonFiniteGradient, match=r"at epoch 0, step 1 \(lr 0.1\)"):
        learn.fit(0.1, callbacks=[spoiled(value), clip])
    assert len(learn.opt.seen) == len(learn.recorder.losses) == 1
    assert bits(list(map(torch.Tensor.detach, learn.model.parameters()))) == bits(learn.opt.seen[0]["weights"])


def test_the_finder_goes_up_to_the_explosion_and_no_further():
    learn = learner(batches(20), callbacks=[GradientClip(value=1e38)])
    found = learn.lr_find(1e-3, 1e30, num_it=60)
    assert 0 < len(found.lrs) < 60


def test_the_finder_clips():
    """With a tiny bound nothing explodes; without it, it does."""
    clipped, plain = learner(batches(20), callbacks=[GradientClip(norm=1e-6)]), learner(batches(20))
    assert len(clipped.lr_find(1e-3, 100, num_it=60).lrs) == 60
    assert len(plain.lr_find(1e-3, 100, num_it=60).lrs) < 60


def test_it_serves_several_fits_and_keeps_nothing():
    clip, learn = GradientClip(norm=0.1), learner(batches(3))
    for _ in range(2):
        learn.fit(0.1, callbacks=[clip])
        assert len(learn.recorder.column("grad_norm")) == 3
    learn.fit(0.1, callbacks=[clip, At("after_batch", throw(CancelFit), n=0)])
    assert clip._params == []
    assert eval(repr(clip)).norm == 0.1
    assert repr(GradientNorm()) == "GradientNorm()"


@pytest.mark.case("A13")
@pytest.mark.parametrize(("options", "message"), [
    ({}, r"either a norm or a value, got norm=None and value=None. Pass e.g. GradientClip\(norm=1.0\)"),
    ({"norm": 1, "value": 2}, "got norm=1 and value=2"),
    ({"norm": 0}, "norm must be a finite number > 0, got 0"),
    ({"norm": -1}, "norm must be a finite number > 0, got -1"),
    ({"norm": math.nan}, "norm must be a finite number > 0, got nan"),
    ({"norm": math.inf}, "norm must be a finite number > 0, got inf"),
    ({"value": -1}, "value must be a finite number > 0, got -1"),
    ({"value": "x"}, "value must be a finite number > 0, got 'x'"),
])  # fmt: skip
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        GradientClip(**options)


def test_one_writer_of_the_column():
    with pytest.raises(ValueError, match="set 'grad_norm'"):
        learner().fit(0.1, callbacks=[GradientClip(norm=1.0), GradientNorm()])
    learn = learner(callbacks=[GradientNorm()])
    learn.fit(0.1, callbacks=[GradientClip(norm=1e-3)])  # takes the place of the learner's
    norms = [torch.cat([grad.flatten() for grad in note["grads"]]).norm().item() for note in learn.opt.seen]
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)
