"""ActivationStats against outputs that the model itself was seen to give."""

import io

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, learner, noting, throw, trained
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from minifast import CancelBatch
from minifast.callbacks.activations import ActivationStats, histogram
from minifast.callbacks.gradients import FLUSH_EVERY
from minifast.standard import finite


class Observed(nn.Module):
    """Two layers; keeps what they put out, and for which batch, in training mode."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 1)
        self.seen = []

    def forward(self, x):
        hidden = self.first(x)
        kept = hidden.detach().clone()
        out = self.last(self.act(hidden))
        if self.training:
            self.seen.append((kept, kept.relu(), out.detach().clone()))
        return out


def observed(train=None, valid=None, *, seed=0, **options):
    torch.manual_seed(seed)
    return learner(batches(5, seed=seed) if train is None else train, valid, model=Observed(), **options)


def count_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def by_hand(tensor, edges):
    """(mean, std, near_zero, counts) by numpy in float64."""
    values = tensor.double().numpy().ravel()
    size = np.clip(np.abs(values), edges[0], edges[-1])
    return values.mean(), values.std(), (np.abs(values) < 0.05).mean(), np.histogram(size, edges)[0]


@pytest.mark.parametrize("bins", [2, 40])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_recorded_is_what_the_layers_put_out(seed, bins):
    stats = ActivationStats(["first", "act", "last"], bins=bins)
    learn = observed(seed=seed, callbacks=[stats])
    learn.fit(0.05, 2)
    assert stats.names == ("first", "act", "last")
    assert stats.steps.tolist() == list(range(10))
    assert stats.hists.shape == (10, 3, bins)
    assert stats.edges.shape == (bins + 1,)
    for row, outputs in enumerate(learn.model.seen):
        for layer, output in enumerate(outputs):
            mean, std, near_zero, counts = by_hand(output, stats.edges)
            found = [stats.stats[name][row, layer] for name in ("mean", "std", "near_zero")]
            np.testing.assert_allclose(found, [mean, std, near_zero], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(stats.hists[row, layer], counts)


def test_layers_none_are_the_leaves_with_parameters():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.attention = nn.MultiheadAttention(3, 1)
            self.body = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Sequential())

        def forward(self, x):
            return self.body(self.attention(x, x, x)[0]) * self.scale

    stats = ActivationStats()
    learner(model=Attention(), callbacks=[stats]).fit(0.01)
    assert stats.names == ("attention.out_proj", "body.0")
    assert np.isnan(stats.stats["mean"][:, 0]).all(), "torch's attention uses its weights without calling it"
    assert np.isnan(stats.hists[:, 0]).all()
    assert np.isfinite(stats.hists[:, 1]).all()
    assert [line.get_label() for line in stats.plot().get_lines()] == ["body.0"]


@pytest.mark.parametrize(("layers", "names"), [("*st", ("first", "last")), (("a?t", "first"), ("first", "act")),
                                              ("", None), ("first", ("first",))])  # fmt: skip
def test_layers_by_globs(layers, names):
    if names is None:
        with pytest.raises(ValueError, match="layers must be a glob"):
            ActivationStats(layers)
        return
    stats = ActivationStats(layers)
    observed(callbacks=[stats]).fit(0.01)
    assert stats.names == names


def test_a_row_is_every_third_update_of_the_fit():
    stats, every = ActivationStats(every=3), ActivationStats()
    observed(callbacks=[stats, every]).fit(0.05, 2)
    assert stats.steps.tolist() == [0, 3, 6, 9]
    np.testing.assert_array_equal(stats.hists, every.hists[::3])
    np.testing.assert_array_equal(stats.stats["std"], every.stats["std"][::3])


def test_of_accumulated_batches_the_first_is_looked_at():
    stats = ActivationStats("first")
    learn = observed(callbacks=[stats])
    learn.fit(0.05, 2, accumulate=2)
    assert stats.steps.tolist() == list(range(6))
    means = [learn.model.seen[i][0].mean() for i in (0, 2, 4, 5, 7, 9)]
    np.testing.assert_allclose(stats.stats["mean"][:, 0], means, rtol=1e-5)


def test_validation_and_looking_are_not_recorded():
    stats = ActivationStats()
    learn = observed(valid=batches(3), callbacks=[stats])
    learn.callbacks += [At("before_batch", lambda state: learn.predict(torch.full((2, 3), 99.0))),
                        At("after_pred", lambda state: state.model(torch.full((2, 3), 99.0))),
                        At("after_step", lambda state: learn.validate())]  # fmt: skip
    learn.fit(0.01, 2)
    learn.validate()
    assert stats.steps.tolist() == list(range(10))
    fits = [outputs for outputs in learn.model.seen if outputs[0].abs().max() < 30]
    np.testing.assert_allclose(stats.stats["mean"][:, 0], [outputs[0].mean() for outputs in fits], rtol=1e-4)


def test_a_layer_that_runs_only_outside_the_forward_pass_is_nan():
    stats = ActivationStats(["first", "extra"])
    learn = observed(callbacks=[stats])
    learn.model.extra = nn.Tanh()
    learn.callbacks += [At(event, lambda state: state.model.extra(torch.ones(3)))
                        for event in ("before_batch", "after_loss", "before_step", "after_step", "after_batch")]
    learn.fit(0.01)
    assert np.isnan(stats.stats["mean"][:, 1]).all()
    assert np.isfinite(stats.stats["mean"][:, 0]).all()


def test_a_dropped_batch_has_no_row():
    stats = ActivationStats("first")
    drops = [At("after_loss", throw(CancelBatch), 1), At("before_batch", throw(CancelBatch), 3)]
    learn = observed(callbacks=[stats, *drops])
    learn.fit(0.01)
    assert stats.steps.tolist() == [0, 1, 2]
    kept = [learn.model.seen[i][0].mean() for i in (0, 2, 3)]  # 1 was dropped after its forward pass, 3 before it
    np.testing.assert_allclose(stats.stats["mean"][:, 0], kept, rtol=1e-5)


def test_a_layer_that_runs_twice_is_seen_the_first_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 3), []

        def forward(self, x):
            self.seen.append(self.layer(x))
            return self.layer(self.seen[-1]).sum(1, keepdim=True)

    stats, model = ActivationStats(), Twice()
    learner(model=model, callbacks=[stats]).fit(0.01)
    np.testing.assert_allclose(stats.stats["mean"][:, 0], [out.mean().item() for out in model.seen], rtol=1e-5)


def test_of_several_outputs_the_first_floating_one_and_none_is_nan():
    class Pair(nn.Module):
        def forward(self, x):
            return {"number": torch.ones(2, dtype=torch.long), "value": x}

    class Whole(nn.Module):
        def forward(self, x):
            return torch.arange(3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.whole, self.layer = Pair(), Whole(), nn.Linear(3, 1)

        def forward(self, x):
            self.whole(x)
            return self.layer(self.pair(x)["value"])

    stats, data = ActivationStats(["pair", "whole"]), batches(2)
    learner(data, model=Model(), callbacks=[stats]).fit(0.01)
    np.testing.assert_allclose(stats.stats["mean"][:, 0], [x.mean() for x, _ in data], rtol=1e-5)
    assert np.isnan(stats.stats["mean"][:, 1]).all()


def test_watching_changes_nothing():
    plain, watched = observed(), observed(callbacks=[ActivationStats(["*"])])
    for learn in (plain, watched):
        learn.fit_one_cycle(2, 0.1)
    assert trained(plain) == trained(watched)


@pytest.mark.table
@pytest.mark.case("I12")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_step", "before_validate", "after_fit"])
def test_no_hook_is_left_however_the_fit_ends(event, error):
    stats = ActivationStats()
    learn = observed(valid=batches(1), callbacks=[stats, At(event, throw(error("x")))])
    with pytest.raises(error):
        learn.fit(0.01)
    assert count_hooks(learn.model) == 0
    learn.callbacks.pop()
    learn.fit(0.01)
    assert len(stats.steps) == 5
    assert count_hooks(learn.model) == 0


def test_hooks_hang_only_in_the_fit_and_not_in_the_finder():
    counts = []
    stats = ActivationStats()
    learn = observed(callbacks=[stats])
    learn.fit(0.01, callbacks=[At("before_epoch", lambda state: counts.append(count_hooks(state.model)))])
    assert counts == [2]
    steps = stats.steps
    learn.loss_func = lambda pred, target: (counts.append(count_hooks(learn.model)), (pred - target).square().mean())[1]
    learn.lr_find(num_it=5)
    assert set(counts[1:]) == {0}
    np.testing.assert_array_equal(stats.steps, steps)


def test_a_glob_without_a_module_is_refused_before_anything_hangs():
    stats = ActivationStats(["first", "conv*"])
    learn = observed(callbacks=[stats])
    with pytest.raises(ValueError, match=r"layers='conv\*' matches no module\. Those of .* first, act, last\."):
        learn.fit(0.01)
    assert count_hooks(learn.model) == 0


def test_a_model_whose_layers_do_not_run_is_an_error_that_says_so():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)

    learn = learner(model=Functional(), callbacks=[ActivationStats()])
    with pytest.raises(RuntimeError, match=r"none of the watched layers ran: layer\. .* train with compile=False"):
        learn.fit(0.01)
    assert count_hooks(learn.model) == 0


def test_a_model_without_such_layers_asks_which():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.ones(3, 1)), nn.Identity()

        def forward(self, x):
            return self.act(x @ self.weight)

    learn = learner(model=Bare(), callbacks=[ActivationStats()])
    with pytest.raises(ValueError, match=r"\(Bare\) has no module that holds parameters and no children: say which"):
        learn.fit(0.01)


def test_no_number_is_read_while_it_trains(monkeypatch):
    stats, read, at = ActivationStats(["*"]), [], []
    monkeypatch.setattr(finite, "reads_at_once", lambda device: False)  # as on an accelerator
    learn = observed(batches(FLUSH_EVERY + 20), callbacks=[stats])
    for name in ("item", "cpu", "tolist", "__float__", "__bool__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name), read))
    del learn.model.seen
    learn.model.forward = lambda x: learn.model.last(learn.model.act(learn.model.first(x)))
    first, last = (At(event, lambda state: at.append(len(read))) for event in ("before_batch", "after_step"))
    last.order = 999
    learn.callbacks += [first, last]
    learn.fit(0.01)
    before, after = np.array(at).reshape(-1, 2).T
    waits = np.flatnonzero(after - before)
    # the loop looks at the first batch of an epoch; then one copy of many rows
    assert [i for i in waits if i] == [FLUSH_EVERY - 1]
    assert (after - before)[FLUSH_EVERY - 1] == 1


def test_no_more_than_so_many_rows_wait_on_the_device():
    stats, waiting = ActivationStats("first", bins=3), []
    look = At("after_batch", lambda state: waiting.append(len(stats._waiting)))
    observed(batches(3 * FLUSH_EVERY + 5, size=1), callbacks=[stats, look]).fit(1e-3)
    assert max(waiting) == FLUSH_EVERY - 1
    assert stats.hists.shape == (3 * FLUSH_EVERY + 5, 1, 3)
    assert (stats.hists.sum(-1) == 6).all()


# ---- the histogram


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_whatever_the_scale_every_value_is_counted(scale):
    values = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)) * scale
    counts = histogram(values, 40)
    assert counts.sum() == 120
    np.testing.assert_array_equal(counts, by_hand(values, np.logspace(-4, 4, 41))[3])


def test_zeros_infinities_and_nan():
    assert histogram(torch.zeros(7), 4).tolist() == [7, 0, 0, 0]
    assert histogram(torch.tensor([float("inf"), -float("inf"), float("nan")]), 4).tolist() == [0, 0, 0, 2]


def test_of_very_many_values_every_kth_is_counted(monkeypatch):
    monkeypatch.setattr("minifast.callbacks.activations.MOST_COUNTED", 100)
    columns = torch.tensor([1e-3, 1e-1, 1e1, 1e3]).repeat(100)  # an even stride would see only some columns
    counts = histogram(columns, 4)
    assert counts.sum() == 80  # of 400, each 5th
    assert counts.tolist() == [20, 20, 20, 20]
    assert histogram(columns[:100], 4).sum() == 100


def test_half_precision_is_looked_at_in_float32():
    stats = ActivationStats("first")
    torch.manual_seed(0)
    model = nn.Sequential()
    model.first, model.last = nn.Linear(3, 6), nn.Linear(6, 1)
    learner(batches(2, dtype=torch.bfloat16), model=model.bfloat16(), callbacks=[stats]).fit(1e-4)
    assert stats.hists.sum() == 2 * 4 * 6
    assert np.isfinite(stats.stats["std"]).all()


# ---- keeping it


def test_what_is_saved_is_plain_and_goes_on():
    whole, half, rest, saved = ActivationStats(), ActivationStats(), ActivationStats(), []
    observed(callbacks=[whole]).fit(0.05, 2)
    observed(callbacks=[half, At("after_batch", lambda state: saved.append(half.state_dict()), 4)]).fit(0.05, 2)
    buffer = io.BytesIO()
    torch.save(saved[0], buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)

    def resume(state):
        rest.load_state_dict(loaded)
        state.step = 5

    observed(callbacks=[rest, At("before_epoch", resume, 0)]).fit(0.05)
    assert rest.steps.tolist() == list(range(10)) == whole.steps.tolist()
    np.testing.assert_array_equal(rest.hists[:5], whole.hists[:5])
    np.testing.assert_array_equal(rest.stats["mean"][:5], whole.stats["mean"][:5])
    assert bits(loaded) == bits(saved[0]), "what was loaded is not written to"


def test_a_record_of_other_layers_is_refused():
    stats, other = ActivationStats("first"), ActivationStats("last")
    observed(callbacks=[stats, other]).fit(0.01)
    with pytest.raises(ValueError, match=r"of other layers \(first\) than this fit's \(last\): resume with the same"):
        other.load_state_dict(stats.state_dict())


def test_a_second_fit_begins_anew():
    stats = ActivationStats()
    learn = observed(callbacks=[stats])
    learn.fit(0.01, 2)
    learn.fit(0.01, 1)
    assert stats.steps.tolist() == list(range(5))


@pytest.mark.parametrize(("options", "message"), [
    ({"layers": 3}, "layers must be a glob over module names, several of them, or None, got 3"),
    ({"layers": []}, r"or None, got \[\]"), ({"layers": ["a", 2]}, r"got \['a', 2\]\. Pass e\.g\. '\*\.conv1'"),
    ({"every": 0}, r"every must be an int >= 1, got 0 \(int\)"), ({"every": 2.0}, r"every .* got 2.0 \(float\)"),
    ({"bins": 1}, r"bins must be an int >= 2, got 1 \(int\)")])  # fmt: skip
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationStats(**options)


def test_repr_rebuilds_it():
    for stats in (ActivationStats(), ActivationStats(["a", "*.b"], every=3, bins=8)):
        assert repr(eval(repr(stats))) == repr(stats)


# ---- plots


@pytest.fixture(scope="module")
def fitted():
    stats = ActivationStats(["first", "act", "last"], every=2)
    observed(callbacks=[stats]).fit(0.05, 4)
    return stats


@pytest.mark.parametrize("stat", ["mean", "std", "near_zero"])
def test_plot_of_a_statistic(fitted, stat):
    ax = fitted.plot(stat)
    assert isinstance(ax, Axes)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["first", "act", "last"]
    for line, column in zip(ax.get_lines(), fitted.stats[stat].T, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([fitted.steps, column]))
    assert ax.get_ylabel() == {"near_zero": "share of |activation| < 0.05"}.get(stat, f"{stat} of the activations")
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("layer", "name"), [(-1, "last"), (0, "first"), ("act", "act"), (-3, "first")])
def test_colour_plot(fitted, layer, name):
    ax = fitted.plot_hist(layer)
    [image] = ax.get_images()
    counts = fitted.hists[:, fitted.names.index(name)]
    assert (counts.sum(1) == (4 if name == "last" else 24)).all()
    np.testing.assert_allclose(image.get_array(), np.log1p(1000 * counts.T / counts.sum(1)), rtol=1e-6)
    assert image.get_extent() == [-1, 19, -4, 4]
    assert ax.get_title() == f"{name}: log(1 + 1000 * share of the outputs)"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step (weight updates)", "|activation|")
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()  # no further than there is something to see
    centres = (np.log10(fitted.edges)[1:] + np.log10(fitted.edges)[:-1]) / 2
    assert counts[:, (centres < low) | (centres > high)].sum() == 0
    assert counts[:, centres > low][:, 0].any()
    assert counts[:, centres < high][:, -1].any()
    labels = {tick: label.get_text() for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    assert labels[-4] == "$10^{-4}$"
    assert labels[0] == "$10^{0}$"


@pytest.mark.parametrize("draw", ["plot", "plot_hist"])
def test_plots_take_axes(fitted, draw):
    left, right = Figure().subplots(1, 2)
    assert getattr(fitted, draw)(ax=right) is right
    assert right.has_data()
    assert not left.has_data()


def test_a_smaller_batch_is_no_dark_column_and_nan_no_warning():
    stats = ActivationStats("first")
    learn = observed(batches(size=[64, 64, 4]), callbacks=[stats])
    learn.fit(1e-6)
    image = stats.plot_hist().get_images()[0].get_array()
    np.testing.assert_allclose(np.expm1(image).sum(0), [1000] * 3, rtol=1e-5)
    learn.model.first.weight.data.fill_(float("nan"))
    learn.loss_func = lambda pred, target: pred.nan_to_num().square().mean()
    learn.fit(1e-6)
    assert stats.hists.sum() == 0
    stats.plot_hist().figure.canvas.draw()


def test_plots_of_what_is_not_there(fitted):
    with pytest.raises(ValueError, match=r"stat must be one of 'mean', 'std', 'near_zero', got 'median'"):
        fitted.plot("median")
    for layer in ("conv", 3, -4, None):
        with pytest.raises(ValueError, match=rf"a watched one \(first, act, last\) or its number, got {layer!r}"):
            fitted.plot_hist(layer)
    for draw in (ActivationStats().plot, ActivationStats().plot_hist):
        with pytest.raises(RuntimeError, match="no step was recorded"):
            draw()
