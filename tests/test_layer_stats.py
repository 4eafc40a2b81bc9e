"""GradientStats against gradients and weights that the optimizer itself was seen to use."""

import io

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, learner, noting, spying, throw, trained
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from minifast import CancelBatch, CancelEpoch, Learner
from minifast.callbacks.gradients import GradientStats

GROUPS = {"body": "0.*", "neck": "1.*", "head": "2.*"}


def three_groups(train=None, *, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 1)).to(dtype)
    data = batches(5, dtype=dtype, seed=seed) if train is None else train
    return learner(data, model=model, splitter=GROUPS, **options)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def whole(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


def expected(learn, first):
    """(norms, ratios) from what the spying optimizer saw; `first`: the weights it began with."""
    params = [p for group in learn.opt.param_groups for p in group["params"]]
    group_of = [group["layer_group"] for group in learn.opt.param_groups for _ in group["params"]]
    names = {id(p): i for i, p in enumerate(learn.model.parameters())}
    before = [first[names[id(p)]] for p in params]
    norms, ratios = [], []
    for note in learn.opt.seen:
        rows = [[k for k, g in enumerate(group_of) if g == i and note["grads"][k] is not None] for i in range(3)]
        norms.append([whole([note["grads"][k] for k in row]) if row else np.nan for row in rows])
        ratios.append([whole([note["weights"][k] - before[k] for k in row]) / whole([before[k] for k in row])
                       if row else np.nan for row in rows])  # fmt: skip
        before = note["weights"]
    return np.array(norms), np.array(ratios)


@pytest.mark.table
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("seed", range(3))
def test_norms_and_ratios_are_those_of_the_optimizer(seed, base, accumulate):
    stats = GradientStats()
    learn = three_groups(seed=seed, opt_func=spying(base), callbacks=[stats])
    first = weights_of(learn.model)
    learn.fit(slice(1e-3, 1e-1), 2, wd=0.1, accumulate=accumulate)
    norms, ratios = expected(learn, first)
    np.testing.assert_allclose(stats.grad_norms, norms, rtol=1e-12)
    np.testing.assert_allclose(stats.update_ratios, ratios, rtol=1e-9)
    assert stats.steps.tolist() == list(range({1: 10, 2: 6}[accumulate]))
    assert stats.group_names == ("body", "neck", "head")


def test_plain_sgd_moves_by_rate_times_gradient():
    stats = GradientStats()
    learn = three_groups(callbacks=[stats])
    norm = whole(weights_of(learn.model)[:2])
    learn.fit(0.5, 1)
    assert stats.update_ratios[0, 0] == pytest.approx(0.5 * stats.grad_norms[0, 0] / norm)


def test_every_third_update():
    every, third = GradientStats(), GradientStats(every=3)
    three_groups(callbacks=[every, third]).fit(0.01, 2)
    assert third.steps.tolist() == [0, 3, 6, 9]
    for name in ("grad_norms", "update_ratios"):
        np.testing.assert_array_equal(getattr(third, name), getattr(every, name)[::3])


def test_watching_changes_nothing():
    plain, watched = three_groups(), three_groups(callbacks=[GradientStats(every=2)])
    for learn in (plain, watched):
        learn.fit_one_cycle(2, 0.1)
    assert trained(plain) == trained(watched)


def test_frozen_groups_are_nan():
    stats = GradientStats()
    learn = three_groups(callbacks=[stats])
    learn.freeze()
    learn.fit(0.01)
    for values in (stats.grad_norms, stats.update_ratios):
        assert np.isnan(values[:, :2]).all()
        assert (values[:, 2] > 0).all()


def test_weights_that_are_all_zero_have_an_infinite_ratio():
    stats = GradientStats()
    learn = three_groups(callbacks=[stats])
    for p in learn.model[2].parameters():
        p.data.zero_()
    learn.fit(0.01)
    assert np.isinf(stats.update_ratios[0, 2])
    assert np.isfinite(stats.update_ratios[1:, 2]).all()


def test_clipped_gradients_are_seen_clipped():
    stats = GradientStats()
    clip = At("before_step", lambda state: nn.utils.clip_grad_norm_(state.model.parameters(), 1e-3))
    three_groups(callbacks=[stats, clip]).fit(0.01)
    np.testing.assert_allclose(np.linalg.norm(stats.grad_norms, axis=1), 1e-3, rtol=1e-2)


def test_a_dropped_update_has_no_row():
    stats = GradientStats()
    drop = At("before_step", throw(CancelBatch), 1)
    drop.order = 999  # after the gradients were looked at
    learn = three_groups(callbacks=[stats, drop, At("before_batch", throw(CancelEpoch), 7)])
    learn.fit(0.01, 2)
    assert stats.steps.tolist() == list(range(4 + 2))
    assert len(learn.opt.seen) == 6
    np.testing.assert_allclose(stats.grad_norms, expected(learn, weights_of(three_groups().model))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    stats, loud = GradientStats(), 300.0
    learn = three_groups(dtype=dtype, callbacks=[stats, At("before_step", lambda state: [
        p.grad.fill_(loud) for p in state.model.parameters()])])  # fmt: skip
    learn.fit(1e-6)
    n = [sum(p.numel() for p in layer.parameters()) for layer in learn.model]
    np.testing.assert_allclose(stats.grad_norms[0], loud * np.sqrt(n), rtol=1e-6)  # 300**2 is beyond float16


def test_sparse_gradients():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4, sparse=True)

        def forward(self, x):
            return self.embed(x).sum((1, 2))

    stats, seen = GradientStats(), []
    norm = At("before_step", lambda state: seen.append(state.model.embed.weight.grad.to_dense().norm().item()))
    data = [(torch.tensor([[1, 2, 2], [3, 1, 1]]), torch.ones(2))] * 3
    Learner(Embedded(), (data, None), nn.MSELoss(), opt_func=torch.optim.SGD, device="cpu", verbose=False,
            callbacks=[stats, norm]).fit(0.1)  # fmt: skip
    np.testing.assert_allclose(stats.grad_norms[:, 0], seen, rtol=1e-6)


def test_the_newest_fit_is_kept_and_lr_find_is_not_recorded():
    stats = GradientStats()
    learn = three_groups(callbacks=[stats])
    learn.fit(0.01, 2)
    learn.fit(0.01, 1)
    rows = stats.grad_norms
    assert rows.shape == (5, 3)
    learn.lr_find(num_it=10)
    learn.validate(batches(1, dtype=torch.float64))
    np.testing.assert_array_equal(stats.grad_norms, rows)
    assert vars(stats)["_params"] == [], "no parameter is held on to"


def test_no_number_is_read_while_it_trains(monkeypatch):
    stats = GradientStats()
    learn = three_groups(batches(20, dtype=torch.float64), callbacks=[stats])
    read = []
    for name in ("item", "cpu", "tolist", "__float__", "__bool__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name), read))
    at = []
    learn.callbacks += [At("before_step", lambda state: at.append(len(read))), Last(at, read)]
    learn.fit(0.01)
    before, after = np.array(at).reshape(-1, 2).T
    assert len(before) == 20
    np.testing.assert_array_equal(before, after)


class Last(At):
    """Notes what was read by then, after all others."""

    order = 999

    def __init__(self, at, read):
        super().__init__("after_step", lambda state: at.append(len(read)))


def test_what_is_saved_is_plain_and_goes_on():
    whole_run, half, rest = GradientStats(2), GradientStats(2), GradientStats(2)
    three_groups(callbacks=[whole_run]).fit(0.01, 2)
    saved = []
    learn = three_groups(callbacks=[half, At("after_batch", lambda state: saved.append(half.state_dict()), 4)])
    learn.fit(0.01, 2)
    buffer = io.BytesIO()
    torch.save(saved[0], buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded["steps"] == [0, 2, 4]

    def resume(state):
        rest.load_state_dict(loaded)
        state.step = 5

    again = At("before_epoch", resume, 0)
    second = three_groups(callbacks=[rest, again])
    second.fit(0.01, 1)
    assert rest.steps.tolist() == [0, 2, 4, 6, 8] == whole_run.steps[:5].tolist()
    np.testing.assert_array_equal(rest.grad_norms[:3], whole_run.grad_norms[:3])
    np.testing.assert_array_equal(rest.update_ratios[:3], whole_run.update_ratios[:3])
    assert bits(loaded) == bits(saved[0]), "what was loaded is not written to"


def test_a_record_of_other_groups_is_refused():
    stats = GradientStats()
    three_groups(callbacks=[stats]).fit(0.01)
    other = GradientStats()
    learner(callbacks=[other]).fit(0.01)
    with pytest.raises(ValueError, match=r"other layer groups \(body, neck, head\) than this fit's \(model\)"):
        other.load_state_dict(stats.state_dict())


def test_before_any_training():
    stats = GradientStats()
    assert stats.steps.shape == (0,)
    for draw in (stats.plot_grad_norms, stats.plot_update_ratios):
        with pytest.raises(RuntimeError, match=r"no step was recorded\. Train first, .*callbacks=\[stats\]"):
            draw()
    fresh = GradientStats()
    fresh.load_state_dict(stats.state_dict())
    assert fresh.grad_norms.size == 0


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_checked(every):
    with pytest.raises(ValueError, match="every must be an int >= 1, got"):
        GradientStats(every=every)


def test_repr_rebuilds_it():
    assert repr(eval(repr(GradientStats(every=7)))) == "GradientStats(every=7)"


# ---- plots


@pytest.mark.parametrize("draw", ["plot_grad_norms", "plot_update_ratios"])
def test_plots(draw):
    stats = GradientStats(every=2)
    three_groups(callbacks=[stats]).fit(0.01, 3)
    left, right = Figure().subplots(1, 2)
    assert getattr(stats, draw)(ax=right) is right
    assert not left.has_data()
    ax = getattr(stats, draw)()
    assert isinstance(ax, Axes)
    values = stats.grad_norms if draw == "plot_grad_norms" else stats.update_ratios
    for line, column in zip(ax.get_lines(), values.T, strict=False):
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([stats.steps, column]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["body", "neck", "head"]
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "step (weight updates)"
    ax.figure.canvas.draw()


def test_a_frozen_group_is_not_drawn_and_a_single_step_is_a_dot():
    stats = GradientStats()
    learn = three_groups(batches(1, dtype=torch.float64), callbacks=[stats])
    learn.freeze()
    learn.fit(0.01)
    ax = stats.plot_grad_norms()
    assert [line.get_label() for line in ax.get_lines()] == ["head"]
    assert ax.get_lines()[0].get_marker() == "o"
    assert ax.get_legend() is None


def test_of_many_groups_the_first_and_the_last_are_named():
    stats = GradientStats()
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(11)), nn.Linear(3, 1))
    learner(model=model, splitter={f"block {i}": f"{i}.*" for i in range(12)}, callbacks=[stats]).fit(0.01, 3)
    ax = stats.plot_grad_norms()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["block 0", "block 11"]
    assert len({line.get_color() for line in ax.get_lines()}) == 12
