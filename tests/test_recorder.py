"""What the Recorder writes down, and what its plots show."""
import csv
import io
import tracemalloc
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from helpers import At, batches, learner, spying, throw
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from minifast import Callback, CancelBatch, CancelEpoch, CosineAnnealing, OneCycle, PiecewiseLR, Recorder, digits
from minifast.record.record import FitRecord
from minifast.show import plots
from minifast.standard.finite import Unchecked
from minifast.standard.metrics import accuracy

GROUPS = {"body": "0.*", "neck": "1.*", "head": "2.*"}


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))


def error(pred, target):
    return (pred - target).abs().mean()


def three_groups(**options):
    return learner(batches(5), batches(2, seed=1), **{"model": stack(), "splitter": GROUPS, "metrics": [error],
                                                      "opt_func": spying(torch.optim.AdamW)} | options)


def with_losses(values):
    """A learner whose training loss takes these values, one after the other."""
    values = iter(values)
    return learner(batches(1), None, loss_func=lambda pred, target: (pred * 0).sum() + next(values),
                   callbacks=[Unchecked()])


# ---- columns and rows


def test_columns_have_a_row_per_step_and_are_what_the_optimizer_used():
    learn = three_groups()
    learn.fit_one_cycle(2, slice(1e-4, 1e-2))
    recorder, seen = learn.recorder, learn.opt.seen
    assert [(column.dtype, column.shape) for column in (recorder.lrs, recorder.moms, recorder.losses,
                                                         recorder.smooth_losses)] == [(np.float64, (10,))] * 4
    assert (recorder.lr_groups.dtype, recorder.lr_groups.shape) == (np.float64, (10, 3))
    assert recorder.lr_groups.tolist() == [note["lrs"][::2] for note in seen], "each group: weights, then biases"
    assert recorder.lrs.tolist() == [note["lrs"][-1] for note in seen]
    assert recorder.moms.tolist() == [note["betas"][0] for note in seen]
    assert learn.sched is recorder


def test_a_loss_is_the_one_before_its_update():
    learn = learner(batches(3))
    x, y = batches(3)[0]
    first = nn.functional.mse_loss(learn.model(x), y).item()
    learn.fit(0.1)
    assert learn.recorder.losses[0] == first
    assert len(learn.recorder.losses) == 3


@pytest.mark.parametrize("name", ["lrs", "lr_groups", "moms", "losses", "smooth_losses"])
def test_what_is_read_is_a_copy(name):
    learn = three_groups()
    learn.fit(0.01)
    before = getattr(learn.recorder, name).copy()
    getattr(learn.recorder, name)[:] = -1
    np.testing.assert_array_equal(getattr(learn.recorder, name), before)


def test_smooth_losses_are_a_corrected_moving_average_that_skips_what_is_not_finite():
    losses = [3.0, 1.0, float("nan"), 2.0, float("inf"), -5.0, 0.25]
    learn = with_losses(losses)
    learn.fit(0.1, len(losses))
    expected = []
    for t in range(len(losses)):
        finite = np.array([loss for loss in losses[:t + 1] if np.isfinite(loss)])
        weights = 0.98 ** np.arange(len(finite))[::-1]
        expected.append(np.average(finite, weights=weights))
    np.testing.assert_array_equal(learn.recorder.losses, losses)
    np.testing.assert_allclose(learn.recorder.smooth_losses, expected, rtol=1e-12)


def test_smooth_losses_begin_with_nan_until_there_is_a_number():
    learn = with_losses([float("nan"), float("inf"), 2.0])
    learn.fit(0.1, 3)
    np.testing.assert_array_equal(learn.recorder.smooth_losses, [np.nan, np.nan, 2.0])


def test_looking_in_between_changes_nothing():
    looks = []
    learn = three_groups(callbacks=[At("after_batch", lambda state: looks.append(state.record.smooth_loss()))])
    learn.fit(0.01, 2)
    assert looks == learn.recorder.smooth_losses.tolist()


def test_epoch_rows():
    learn = three_groups()
    learn.fit(0.01, 2)
    assert [list(row) for row in learn.recorder.epochs] == [["epoch", "train_loss", "valid_loss", "error", "time"]] * 2
    assert [row["epoch"] for row in learn.recorder.epochs] == [0, 1]
    assert all(type(value) is float for row in learn.recorder.epochs for name, value in row.items() if name != "epoch")
    assert all(0 < row["time"] < 60 for row in learn.recorder.epochs)


@pytest.mark.case("I9")
def test_a_cancelled_batch_leaves_no_row_and_a_cancelled_epoch_keeps_its_own():
    learn = learner(batches(4), batches(1), callbacks=[At("after_loss", throw(CancelBatch), 1),
                                                       At("before_batch", throw(CancelEpoch), 6)])
    learn.fit(0.1, 3)
    assert len(learn.recorder.lrs) == 3 + 2 + 4
    assert [list(row) for row in learn.recorder.epochs] == [["epoch", "train_loss", "valid_loss", "time"],
                                                            ["epoch", "train_loss", "time"],
                                                            ["epoch", "train_loss", "valid_loss", "time"]]
    assert learn.recorder.epochs[1]["train_loss"] == pytest.approx(learn.recorder.losses[3:5].mean())


def test_an_epoch_without_a_step_has_no_training_loss():
    learn = learner(batches(2), None, callbacks=[At("before_batch", throw(CancelEpoch), 0)])
    learn.fit(0.1, 2)
    assert [list(row) for row in learn.recorder.epochs] == [["epoch", "time"], ["epoch", "train_loss", "time"]]


def test_no_momentum_is_nan():
    learn = learner(opt_func=torch.optim.Adagrad)
    learn.fit(0.1)
    assert np.isnan(learn.recorder.moms).all()


def test_earlier_fits_are_kept():
    learn = three_groups()
    assert learn.recorder.fits == []
    learn.fit(0.01, 2)
    first = learn.recorder.newest
    learn.fit(0.02, 1)
    learn.lr_find(num_it=12)
    learn.validate()
    assert learn.recorder.fits == [first]
    assert (first.lrs.tolist(), len(first.epochs)) == ([0.01] * 10, 2)
    assert (learn.recorder.lrs.tolist(), len(learn.recorder.epochs)) == ([0.02] * 5, 1)
    assert repr(learn.recorder) == "Recorder(5 steps, 1 epochs, 1 earlier fits)"


def test_a_sandbox_keeps_the_record():
    learn = three_groups()
    learn.fit(0.01)
    learn.fit(0.02)
    fits, newest = list(learn.recorder.fits), learn.recorder.newest
    with learn.sandbox():
        learn.fit(0.03)
        assert len(learn.recorder.fits) == 2
    assert (learn.recorder.fits, learn.recorder.newest) == (fits, newest)


def test_a_fit_that_fails_leaves_what_was_done():
    learn = three_groups(callbacks=[At("before_batch", throw(KeyError("x")), 7)])
    with pytest.raises(KeyError):
        learn.fit(0.01, 3)
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == 7
    assert len(learn.recorder.epochs) == 1


def test_a_fit_that_does_not_begin_leaves_the_record_alone():
    learn = learner(opt_func=torch.optim.Adagrad)
    learn.fit(0.1)
    newest = learn.recorder.newest
    with pytest.raises(ValueError, match="Adagrad has none"):
        learn.fit_one_cycle(1, 0.1)
    assert learn.recorder.newest is newest
    assert learn.recorder.fits == []


def test_memory_stays_flat():
    """20,000 steps: four columns of 8 bytes, and never more than 1,024 small tensors."""
    recorder, loss = Recorder(), torch.tensor(1.0)
    opt = torch.optim.SGD([nn.Parameter(loss)], lr=0.1)
    opt.param_groups[0]["layer_group"] = 0
    state = SimpleNamespace(opt=opt, group_names=("model",), record=FitRecord(), epoch=0, step_weight=4, step_loss=loss)
    recorder.before_fit(state)
    recorder.before_epoch(state)
    tracemalloc.start()
    try:
        for _ in range(20_000):
            state.step_loss = loss * 0.5
            recorder.after_step(state)
        assert tracemalloc.get_traced_memory()[0] < 1.0e6, "20,000 kept tensors alone would be 2 MB"
    finally:
        tracemalloc.stop()
    assert len(recorder.losses) == 20_000


# ---- CSV


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_steps_as_csv(tmp_path):
    learn = three_groups()
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))
    learn.recorder.to_csv(tmp_path / "steps.csv")
    header, *rows = read(tmp_path / "steps.csv")
    assert header == ["step", "lr_body", "lr_neck", "lr_head", "momentum", "loss", "smooth_loss"]
    values, recorder = np.array(rows, dtype=float), learn.recorder
    np.testing.assert_array_equal(values[:, 0], range(5))
    np.testing.assert_array_equal(values[:, 1:], np.column_stack([
        recorder.lr_groups, recorder.moms, recorder.losses, recorder.smooth_losses]))


def test_one_group_is_just_lr(tmp_path):
    learn = with_losses([1.0, float("nan")])
    learn.fit(0.1, 2)
    learn.recorder.to_csv(tmp_path / "steps.csv")
    assert read(tmp_path / "steps.csv") == [["step", "lr", "momentum", "loss", "smooth_loss"],
                                            ["0", "0.1", "0.0", "1.0", "1.0"], ["1", "0.1", "0.0", "nan", "1.0"]]


def test_epochs_as_csv(tmp_path):
    learn = learner(batches(2), batches(1), callbacks=[At("before_batch", throw(CancelEpoch), 1)])
    learn.fit(0.1, 2)
    learn.recorder.to_csv(str(tmp_path / "epochs.csv"), epochs=True)
    header, first, second = read(tmp_path / "epochs.csv")
    assert header == ["epoch", "train_loss", "time", "valid_loss"]
    assert first[3] == ""
    assert [float(value) for value in second] == [learn.recorder.epochs[1][name] for name in header]


# ---- plots


@pytest.fixture(scope="module")
def fitted():
    """Digits, after a real run of the finder and two epochs of one cycle with three layer groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    learn = learner(digits().train, digits().valid, model=model, loss_func=nn.CrossEntropyLoss(), metrics=[accuracy],
                    splitter={"body": "1.*", "neck": "3.*", "head": "5.*"}, opt_func=torch.optim.AdamW)
    learn.lr_find()
    learn.fit_one_cycle(2, slice(1e-4, 1e-2))
    return learn


PLOTS = {"plot": lambda learn, **kw: learn.recorder.plot(**kw),
         "plot_lr": lambda learn, **kw: learn.recorder.plot_lr(**kw),
         "plot_lr with momentum": lambda learn, **kw: learn.recorder.plot_lr(show_moms=True, **kw),
         "plot_losses": lambda learn, **kw: learn.recorder.plot_losses(**kw),
         "plot_metrics": lambda learn, **kw: learn.recorder.plot_metrics(**kw),
         "schedule.plot": lambda learn, **kw: OneCycle(0.1).plot(50, **kw),
         "plan.plot": lambda learn, **kw: learn.plan(2, OneCycle(slice(1e-4, 1e-2))).plot(**kw)}
every_plot = pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)


def fignums():
    import matplotlib.pyplot as plt
    return plt.get_fignums()


@every_plot
def test_a_plot_gives_axes_and_leaves_nothing_open(fitted, draw):
    for _ in range(3):
        ax = draw(fitted)
    assert isinstance(ax, Axes)
    assert fignums() == []
    file = io.BytesIO()
    ax.figure.savefig(file, format="png")
    assert len(file.getvalue()) > 5000


@every_plot
def test_a_plot_is_drawn_on_the_axes_given(fitted, draw):
    left, right = Figure().subplots(1, 2)
    assert draw(fitted, ax=right) is right
    assert right.has_data()
    assert not left.has_data()
    assert fignums() == []


@pytest.mark.table
@every_plot
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "inline", "QtAgg", "nbAgg"])
def test_where_pyplot_shows_figures_it_is_asked_once(fitted, draw, backend, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.setattr(matplotlib, "get_backend", lambda: backend)
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show() is the user's"))
    ax = draw(fitted)
    assert [plt.figure(number) for number in fignums()] == [ax.figure]
    plt.close(ax.figure)


@every_plot
def test_every_axis_says_what_it_shows(fitted, draw):
    ax = draw(fitted)
    labels = {axes.get_ylabel() for axes in ax.figure.axes}
    assert labels <= {"learning rate", "momentum", "loss", "training loss (smoothed)", "accuracy"}
    assert ax.get_xlabel() in ("step (weight updates)", "learning rate", "epoch")
    assert len(labels) == len(ax.figure.axes)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def curves(ax):
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


def test_plot_lr_shows_every_group_by_name(fitted):
    ax = fitted.recorder.plot_lr()
    assert legend(ax) == ["learning rate, body", "learning rate, neck", "learning rate, head"]
    for line, column in zip(ax.get_lines(), fitted.recorder.lr_groups.T, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), column)
    assert ax.get_yscale() == "log", "1e-4 and 1e-2 on one linear axis: the first would look like 0"
    assert len(ax.figure.axes) == 1


def test_plot_lr_with_momentum(fitted):
    ax = fitted.recorder.plot_lr(show_moms=True)
    assert legend(ax)[-1] == "momentum"
    np.testing.assert_array_equal(ax.figure.axes[1].get_lines()[0].get_ydata(), fitted.recorder.moms)
    assert ax.figure.axes[1].get_ylabel() == "momentum"


def test_no_axis_for_a_momentum_that_is_not_there():
    learn = learner(opt_func=torch.optim.Adagrad)
    learn.fit(0.1)
    ax = learn.recorder.plot_lr(show_moms=True)
    assert len(ax.figure.axes) == 1
    assert ax.get_legend() is None, "one curve is named by its axis"
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim()[0] == 0, "a constant rate is a flat line and not noise"


def test_the_legend_lies_over_no_curve(fitted):
    ax = fitted.recorder.plot_lr(show_moms=True)
    ax.figure.canvas.draw()
    box, inside = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert box.y0 >= inside.y1 - 1
    assert box.y1 <= ax.figure.bbox.y1, "nor is it cut off"
    assert box.x1 <= ax.figure.bbox.x1


@pytest.mark.parametrize("schedule", [CosineAnnealing(), OneCycle(slice(1e-5, 1e-3)), PiecewiseLR(
    [(0.25, OneCycle()), (0.5, OneCycle()), (0.25, OneCycle())])], ids=["short", "long", "very long"])
def test_a_title_is_not_cut_off(fitted, schedule):
    ax = fitted.plan(2, schedule).plot()
    ax.figure.canvas.draw()
    title, whole = ax.title.get_window_extent(), ax.figure.bbox
    assert ax.get_title().replace("\n", " ") == repr(schedule)
    assert title.x0 >= whole.x0
    assert title.x1 <= whole.x1
    assert title.y1 <= whole.y1
    assert title.y0 >= ax.get_legend().get_window_extent().y1 - 2, "above the legend"


def test_of_many_groups_the_legend_names_the_first_and_the_last():
    rates = np.linspace(1, 2, 5)[:, None] * np.geomspace(1e-5, 1e-3, 12)
    ax = plots.plot_hypers({"lr": rates}, [f"block {i}" for i in range(12)])
    assert len(ax.get_lines()) == 12
    assert legend(ax) == ["learning rate, block 0", "learning rate, block 11"]
    assert len({line.get_color() for line in ax.get_lines()}) == 12


def test_plot_losses(fitted):
    ax = fitted.recorder.plot_losses()
    assert legend(ax) == ["training, each step", "training, smoothed", "validation"]
    drawn, recorder = curves(ax), fitted.recorder
    np.testing.assert_array_equal(drawn["training, each step"][:, 1], recorder.losses)
    np.testing.assert_array_equal(drawn["training, smoothed"][:, 1], recorder.smooth_losses)
    np.testing.assert_array_equal(drawn["validation"], [(22, recorder.epochs[0]["valid_loss"]),
                                                        (45, recorder.epochs[1]["valid_loss"])])
    assert ax.get_yscale() == "linear"


@pytest.mark.parametrize(("losses", "scale"), [([2.0, 1.5, 1.0, 0.5], "linear"), ([2.0, 1e6, 1.0, 0.5], "log"),
                                               ([2.0, float("nan"), float("inf"), 1.0], "linear"),
                                               ([-2.0, 1e6, -1.0, -3.0], "linear"), ([float("nan")] * 4, "linear")])
def test_an_exploding_loss_does_not_flatten_the_others(losses, scale):
    learn = with_losses(losses)
    learn.fit(0.1, 4)
    ax = learn.recorder.plot_losses()
    assert ax.get_yscale() == scale
    ax.figure.canvas.draw()


def test_a_single_step_is_a_dot():
    learn = with_losses([1.0])
    learn.fit(0.1)
    for ax in (learn.recorder.plot_losses(), learn.recorder.plot_lr(), OneCycle().plot(1)):
        assert {line.get_marker() for line in ax.get_lines()} == {"o"}
        assert [tick for tick in ax.get_xticks() if tick % 1] == [], "there is no half step"


def test_plot_metrics(fitted):
    ax = fitted.recorder.plot_metrics()
    np.testing.assert_array_equal(curves(ax)["accuracy"], [(row["epoch"], row["accuracy"])
                                                           for row in fitted.recorder.epochs])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "accuracy")


def test_plot_metrics_of_an_epoch_that_has_none():
    learn = three_groups(metrics=[error, nn.L1Loss()], callbacks=[At("before_batch", throw(CancelEpoch), 6)])
    learn.fit(0.01, 3)
    ax = learn.recorder.plot_metrics()
    assert legend(ax) == ["error", "l1_loss"]
    assert ax.get_ylabel() == "metric"
    assert curves(ax)["error"][:, 0].tolist() == [0, 2]


@pytest.mark.parametrize("draw", ["plot_lr", "plot_losses"])
def test_before_any_training_there_is_nothing_to_plot(draw):
    with pytest.raises(RuntimeError, match=r"no step was recorded, .* learn\.fit"):
        getattr(learner().recorder, draw)()


# ---- the plot of the finder


def test_plot_draws_the_smoothed_loss_over_log_lr_with_the_suggestions(fitted):
    found = fitted.recorder.lr_find
    ax = fitted.recorder.plot()
    curve, *marks = ax.get_lines()
    np.testing.assert_array_equal(curve.get_xydata(), np.column_stack([found.lrs, found.smooth_losses])[10:-5])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    marked = {rule: lr for rule, lr in found.suggestions.items() if lr is not None}
    assert len(marked) >= 3
    assert legend(ax) == [f"{rule}: {lr:.2e}" for rule, lr in marked.items()]
    for mark, lr in zip(marks, marked.values(), strict=True):
        x, y = mark.get_xydata()[0]
        assert x == lr
        assert found.smooth_losses.min() <= y <= found.smooth_losses.max()
    assert len({mark.get_color() for mark in marks}) == len(marks)


def test_plot_skips_what_it_is_told_to(fitted):
    found = fitted.recorder.lr_find
    ax = fitted.recorder.plot(skip_start=0, skip_end=0, suggestions=False)
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), found.lrs)
    assert len(ax.get_lines()) == 1
    assert ax.get_legend() is None


@pytest.mark.table
@pytest.mark.case("L5")
@pytest.mark.parametrize("num_it", [2, 3, 8, 16])
@pytest.mark.parametrize("skips", [(10, 5), (0, 1000), (1000, 0)])
def test_few_points_make_no_empty_plot(num_it, skips):
    learn = learner(batches(3))
    learn.lr_find(num_it=num_it)
    ax = learn.recorder.plot(*skips)
    assert len(ax.get_lines()[0].get_xdata()) >= num_it / 2
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("learning rate", "training loss (smoothed)")
    ax.figure.canvas.draw()


@pytest.mark.case("L5")
def test_plot_of_a_run_that_is_nan_from_the_start():
    learn = with_losses([float("nan")] * 20)
    learn.lr_find(num_it=20)
    learn.recorder.plot().figure.canvas.draw()


def test_plot_is_of_the_newest_run_and_survives_fits():
    learn = learner(batches(3))
    learn.lr_find(num_it=8)
    learn.lr_find(1e-3, 1.0, num_it=20, stop_div=False)
    learn.fit(0.1)
    assert learn.recorder.plot(0, 0).get_lines()[0].get_xdata()[0] == 1e-3


# ---- columns that callbacks log


class Logs(Callback):
    """Logs the step times ten in every second step, from the second on."""

    def __init__(self, name="tenfold", make=float):
        self.name, self.make = name, make

    def after_step(self, state):
        if state.step % 2:
            state.record.log(self.name, self.make(10.0 * state.step))


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_what_callbacks_log_stands_beside_its_step(make, tmp_path):
    learn = three_groups()
    learn.fit(0.01, 2, callbacks=[Logs(make=make)])
    n = len(learn.recorder.lrs)
    expected = [10.0 * step if step % 2 else np.nan for step in range(n)]
    np.testing.assert_array_equal(learn.recorder.column("tenfold"), expected)
    learn.recorder.to_csv(tmp_path / "steps.csv")
    header, *rows = read(tmp_path / "steps.csv")
    assert header[-1] == "tenfold"
    assert [float(row[-1]) for row in rows[:4]] == pytest.approx(expected[:4], nan_ok=True)
    learn.fit(0.01, 1)
    with pytest.raises(KeyError, match="there is no column 'tenfold'; callbacks have logged: none"):
        learn.recorder.column("tenfold")


@pytest.mark.parametrize("name", ["loss", "lr", "lr_head", "step"])
def test_the_columns_of_every_record_are_not_for_logging(name):
    with pytest.raises(ValueError, match=f"'{name}' is a column that every record has"):
        three_groups().fit(0.01, callbacks=[Logs(name)])
