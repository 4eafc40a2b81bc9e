"""lr_find several times over: other random numbers each time, one median, no trace."""
import numpy as np
import pytest
import torch
from helpers import At, batches, bits, learner, throw
from test_sandbox import LOADERS, WITHOUT_WORKERS, generators_of, noisy_learner, snapshot, worn
from torch import nn

from minifast import LRFind, Recorder, TensorLoader
from minifast.studies.lr_repeats import find_repeatedly, median_of
from minifast.suggest import suggestions


def curves(found):
    return bits([found.lrs, found.losses, found.smooth_losses, found.suggestions, found.stopped, found.reason])


@pytest.mark.table
@pytest.mark.parametrize("is_worn", [False, True], ids=["new", "worn"])
@pytest.mark.parametrize("loader", WITHOUT_WORKERS)
def test_no_trace_and_the_first_run_is_lr_finds(loader, is_worn):
    learn = noisy_learner(loader)
    learn = worn(learn) if is_worn else learn
    before, alone = snapshot(learn), learn.lr_find(1e-5, 1e2, 25)
    found = find_repeatedly(learn, 1e-5, 1e2, 25, repeats=3)
    assert snapshot(learn) == before
    assert learn.recorder.lr_find is found
    assert curves(found.runs[0]) == curves(alone)
    assert len({str(curves(run)) for run in found.runs}) == 3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("n", [3, 25, 40])
def test_no_trace_of_repeats_that_fail(n, error):
    learn = worn(noisy_learner())
    earlier = learn.lr_find(num_it=5)
    before, failing = snapshot(learn), At("after_loss", throw(error), n=n)
    failing.in_lr_find = True
    with pytest.raises(error):
        find_repeatedly(learn, 1e-6, 1e-3, 20, repeats=3, callbacks=[failing])
    assert failing.count == n + 1
    assert snapshot(learn) == before
    assert learn.recorder.lr_find is earlier


def test_more_repeats_begin_with_the_same_runs_and_a_seed_decides():
    runs = [find_repeatedly(noisy_learner(), num_it=12, repeats=k).runs for k in (2, 4, 4)]
    assert list(map(curves, runs[0])) == list(map(curves, runs[1][:2]))
    assert list(map(curves, runs[1])) == list(map(curves, runs[2]))


@pytest.mark.parametrize("loader", [name for name in LOADERS if "generator" in name and "workers" not in name])
def test_the_loaders_own_generators_differ_too(loader):
    """The order of the data alone, without dropout or noise."""
    learn = noisy_learner(loader, model=nn.Linear(3, 1))
    at = At("before_batch", lambda state: seen.append(bits(state.batch[0])))
    at.in_lr_find, seen = True, []
    find_repeatedly(learn, num_it=6, repeats=2, stop_div=False, callbacks=[at])
    assert len(seen) == 12
    assert seen[:6] != seen[6:]
    assert generators_of(learn)


def test_one_run_is_lr_find():
    learn = noisy_learner()
    found = find_repeatedly(learn, num_it=30, repeats=1)
    assert curves(found) == curves(learn.lr_find(num_it=30))
    assert (found.runs, found.band) == ((found,), None)
    assert found.spread == {rule: lr and (lr, lr) for rule, lr in found.suggestions.items()}


@pytest.mark.parametrize(("repeats", "given"), [(0, "0 (int)"), (2.0, "2.0 (float)"), (True, "True (bool)")])
def test_repeats_out_of_range(repeats, given):
    learn = learner()
    with pytest.raises(ValueError, match="repeats must be an int >= 1, got ") as caught:
        find_repeatedly(learn, repeats=repeats)
    assert given in str(caught.value)
    assert "lr_find(repeats=3)" in str(caught.value)
    assert learn.opt.seen == []


# ---- putting runs together


def run(losses, suggestion=1e-3, stopped="all were tried", **fields):
    losses = np.asarray(losses, dtype=float)
    lrs = np.geomspace(1e-7, 10, 100)[: len(losses)]
    found = dict.fromkeys(("valley", "steep", "minimum", "slide"), suggestion)
    return LRFind(lrs, losses, losses, found, suggestion, stopped, num_it=100, **fields)


def descent(n=100, height=0.0):
    lrs = np.geomspace(1e-7, 10, 100)
    return (2 + height - 1.5 / (1 + 3e-3 / lrs) + (lrs / 2) ** 2)[:n]


def test_median_and_band():
    found = median_of([run(descent(height=h)) for h in (0.3, 0.0, 0.1)])
    np.testing.assert_array_equal(found.smooth_losses, descent(height=0.1))
    np.testing.assert_array_equal(found.losses, descent(height=0.1))
    np.testing.assert_array_equal(found.band, [descent(), descent(height=0.3)])
    assert (found.verdict, found.reason, found.stopped) == ("ok", "", "all were tried")
    assert found.suggestions == suggestions(found.lrs, descent(height=0.1), 100)[0]
    assert found.suggestion == found.suggestions["valley"]


def test_a_run_that_stopped_counts_as_above_the_others():
    found = median_of([run(descent(60, 0.2), stopped="the loss diverged"), run(descent(height=0.1)), run(descent())])
    np.testing.assert_array_equal(found.smooth_losses, descent(height=0.1))
    assert found.band[1][59] == descent(height=0.2)[59]
    assert found.band[1][60] == descent(height=0.1)[60]
    assert found.stopped == "the loss diverged (1 of 3 runs), all were tried (2 of 3 runs)"


@pytest.mark.parametrize(("lengths", "n"), [((50, 60, 70), 60), ((50, 60), 50), ((50, 60, 70, 80), 60)])
def test_the_curve_ends_where_half_of_the_runs_have_stopped(lengths, n):
    found = median_of([run(descent(k), stopped="the loss diverged") for k in lengths])
    assert len(found.lrs) == len(found.losses) == len(found.smooth_losses) == len(found.band[0]) == n
    np.testing.assert_array_equal(found.smooth_losses, descent(n))
    assert found.stopped == "the loss diverged"


def test_runs_that_disagree_by_more_than_a_decade():
    found = median_of([run(descent(), lr) for lr in (1e-4, 9.9e-4, 5e-4)])
    assert found.verdict == "ok"
    assert found.spread["valley"] == (1e-4, 9.9e-4)
    found = median_of([run(descent(), lr) for lr in (1e-4, 1.2e-3, 5e-4)])
    assert found.verdict == "too noisy"
    assert found.reason.startswith("the runs suggest 1.0e-04 to 1.2e-03, a factor of 12, more than 10; try ")
    assert found.suggestion is not None


def test_runs_without_an_answer():
    found = median_of([run(descent()), run(descent(), None, reason="no descent: none"), run(descent())])
    assert (found.verdict, found.reason) == ("too noisy", "1 of 3 runs give no learning rate: no descent: none")


def test_the_verdict_on_the_median_comes_first():
    found = median_of([run(np.ones(100), None) for _ in range(3)])
    assert found.verdict == "flat"
    assert set(found.suggestions.values()) == {None}
    assert set(found.spread.values()) == {None}


def test_what_it_says():
    found = median_of([run(descent(height=h), lr) for h, lr in ((0, 1e-3), (0.1, 2e-3))])
    first, second = str(found).splitlines()
    assert first == "median of 2 runs, 100 learning rates; training loss; stopped at 10 because all were tried"
    assert second.startswith("suggestions: valley ")
    assert second.count(" (1.0e-03 to 2.0e-03)") == 4
    assert second.endswith("; verdict: ok")
    assert repr(found).endswith(", ok, 2 runs, 100 learning rates, all were tried)")


def test_runs_that_cannot_differ_are_named():
    found = find_repeatedly(learner(batches(3)), num_it=20, repeats=2)
    assert "all runs are the same, for neither data order nor model is random" in str(found)
    assert "all runs are the same" not in str(find_repeatedly(noisy_learner(), num_it=20, repeats=2))
    assert "all runs are the same" not in str(learner(batches(3)).lr_find(num_it=20))


def test_the_verdict_on_a_real_run():
    x = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    data = TensorLoader(x, x.sum(1, keepdim=True), batch_size=32, shuffle=True)
    torch.manual_seed(0)
    learn = learner(data)
    assert learn.lr_find().verdict == "ok"
    assert str(learn.recorder.lr_find).endswith("; verdict: ok")
    assert find_repeatedly(learn).verdict == "ok"
    flat = learn.lr_find(end_lr=1e-6)
    assert flat.verdict in ("flat", "too noisy")
    assert f"verdict: {flat.verdict} ({flat.reason})" in str(flat)
    assert learn.lr_find(1e2, 1e6).verdict == "at the edge of the range"
    assert learn.lr_find(end_lr=0.3).verdict == "at the edge of the range"


# ---- what is shown


def test_the_plot_draws_the_band():
    found = median_of([run(descent(height=h)) for h in (0, 0.1, 0.3)])
    recorder = Recorder()
    recorder.lr_find = found
    ax = recorder.plot()
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), found.smooth_losses[10:-5])
    outline = ax.collections[0].get_paths()[0].vertices
    assert {(found.lrs[10], found.band[0][10]), (found.lrs[94], found.band[1][94])} <= set(map(tuple, outline))
    assert ax.get_legend().get_texts()[0].get_text() == "3 runs"
    assert ax.get_title() == ""
    assert len(median_of([run(descent())]).plot().collections) == 0


def test_an_explosion_of_one_run_does_not_flatten_the_plot():
    wild = descent()
    wild[80:] = 1e9
    ax = median_of([run(descent()), run(descent()), run(wild)]).plot()
    assert ax.get_ylim()[1] < 20


def test_the_plot_says_a_verdict_that_is_not_ok():
    assert median_of([run(np.ones(100), None)] * 2).plot().get_title() == "verdict: flat"


def test_it_reports_once(capsys):
    learn = learner(batches(3), verbose=True)
    found = find_repeatedly(learn, num_it=20, repeats=3)
    assert capsys.readouterr().out == f"{found}\n"
    assert learn.verbose is True
    learn.verbose = False
    find_repeatedly(learn, num_it=20, repeats=3)
    assert capsys.readouterr().out == ""
