"""A race of learning rates: the same start, batches and random numbers for each, a winner or none, no trace."""
import numpy as np
import pytest
import torch
from helpers import At, Trace, batches, bits, learner, throw, trained
from test_sandbox import WITHOUT_WORKERS, Unsized, noisy_learner, snapshot, worn
from torch import nn
from torch.utils.data import DataLoader

from minifast import Callback, CosineAnnealing, DataLoaders, Learner, OneCycle, Schedule, TensorLoader
from minifast.studies.race import race


def solvable(n=256, noise=0.0, **options):
    """A linear problem that SGD solves well at 0.1, slowly at 0.001, and not at all at 10; with validation data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    y = x.sum(1, keepdim=True) + noise * torch.randn(n, 1, generator=generator)
    torch.manual_seed(0)
    return learner(TensorLoader(x, y, batch_size=16, shuffle=True), TensorLoader(x, y, batch_size=64), **options)


# ---- no trace


@pytest.mark.table
@pytest.mark.parametrize("is_worn", [False, True], ids=["new", "worn"])
@pytest.mark.parametrize("loader", WITHOUT_WORKERS)
def test_a_race_leaves_no_trace(loader, is_worn):
    learn = noisy_learner(loader)
    learn = worn(learn) if is_worn else learn
    before = snapshot(learn)
    race(learn, [1e-3, 1e-2, 1e5], steps=15)
    assert snapshot(learn) == before


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("n", [0, 5, 14, 30])
def test_a_race_that_fails_leaves_no_trace(n, error):
    learn = worn(noisy_learner())
    failing = At("after_loss", throw(error), n=n)
    failing.in_lr_find = True
    before = snapshot(learn)
    with pytest.raises(error):
        race(learn, [1e-3, 1e-2], steps=12, callbacks=[failing])
    assert snapshot(learn) == before


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_processes_end_with_the_race():
    import multiprocessing

    x = torch.randn(24, 3)
    data = torch.utils.data.TensorDataset(x, x[:, :1])
    loader = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context="fork")
    learn, before = learner(loader), len(multiprocessing.active_children())
    assert race(learn, [1e-3, 1e-2], steps=4).losses.shape == (2, 4)
    failing = At("after_loss", throw(ZeroDivisionError), n=3)
    failing.in_lr_find = True
    with pytest.raises(ZeroDivisionError) as caught:
        race(learn, [1e-3, 1e-2], steps=8, callbacks=[failing])
    assert caught.value.__traceback__  # which keeps the frames of the race alive
    assert len(multiprocessing.active_children()) == before


# ---- every candidate has the same start


@pytest.mark.table
@pytest.mark.parametrize("loader", WITHOUT_WORKERS)
def test_same_weights_batches_and_random_numbers(loader):
    learn = noisy_learner(loader)
    seen = []
    watch = At("after_pred", lambda state: seen.append(bits([state.batch, state.pred])))
    watch.in_lr_find = True
    race(learn, [1e-30, 2e-30], steps=13, callbacks=[watch])  # so slow that the weights stay where they are
    assert len(seen) == 10 + 13 + 13
    assert seen[10:23] == seen[23:]
    assert seen[:10] == seen[10:20]  # what the start is judged by


@pytest.mark.table
@pytest.mark.parametrize("lr", [0.01, slice(1e-3, 1e-2), [1e-3, 1e-2], slice(0.02)])
@pytest.mark.parametrize("schedule", [None, OneCycle(), CosineAnnealing(warmup_frac=0)])
def test_each_is_the_fit_that_one_would_make(lr, schedule):
    def make():
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        model.load_state_dict({k: torch.linspace(-1, 1, v.numel()).view_as(v) for k, v in model.state_dict().items()})
        return learner(batches(6), batches(2, seed=1), model=model, splitter=list,
                       opt_func=lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9))  # fmt: skip

    found, fitted = race(make(), [lr, 0.5], steps=6, schedule=schedule), make()
    fitted.fit(lr, 1, callbacks=[schedule] if schedule else [])
    np.testing.assert_array_equal(found.losses[0], fitted.recorder.losses)
    assert found.rows[0]["valid_loss"] == fitted.recorder.epochs[-1]["valid_loss"]
    assert found.rows[0]["train_loss"] == fitted.recorder.losses[-1:].mean()


@pytest.mark.table
@pytest.mark.parametrize("make", [lambda: batches(4), Unsized, lambda: DataLoader(Unsized(), batch_size=None)],
                         ids=["list", "unsized", "unsized DataLoader"])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8, 11])
def test_as_many_passes_as_the_steps_take(make, steps):
    learn, seen = learner(make()), []
    watch = At("before_batch", lambda state: seen.append(state.batch[0].sum().item()))
    watch.in_lr_find = True
    found = race(learn, [1e-3, 1e-2], steps=steps, callbacks=[watch])
    assert found.losses.shape == (2, steps)
    sums = [x.sum().item() for x, y in batches(4)] * 3
    assert seen == sums[: min(steps, 10)] + 2 * sums[:steps]
    assert len(learn.opt.seen) == min(steps, 10) + 2 * steps


def test_only_callbacks_for_the_finder_run():
    class Here(Trace):
        in_lr_find = True

    wanted, unwanted = [Here(), Here()], [Trace(), Trace(), OneCycle(5.0)]
    learn = learner(batches(3), batches(1), callbacks=[wanted[0], unwanted[0], unwanted[2]], metrics=[throw])
    race(learn, [1e-3, 1e-2], steps=2, callbacks=[wanted[1], unwanted[1]])
    assert [cb.log.count("before_fit") for cb in wanted] == [3, 3]
    assert [cb.log.count("after_validate") for cb in wanted] == [2, 2]
    assert [cb.log for cb in unwanted[:2]] == [[], []]
    assert {lr for note in learn.opt.seen for lr in note["lrs"]} == {1e-30, 1e-3, 1e-2}


# ---- who wins


def test_the_best_wins_and_the_wild_one_diverged():
    found = race(solvable(noise=0.1), [1e-3, 0.1, 10.0], steps=60)
    assert found.winner == 0.1
    assert found.lrs == (1e-3, 0.1, 10.0)
    assert [row["result"] for row in found.rows] == ["", "wins", "diverged"]
    assert [row["lr"] for row in found.rows] == ["0.001", "0.1", "10"]
    assert found.verdict.startswith("0.1 wins: the next, 0.001, is behind by ")
    means = found.losses[:, -15:].mean(axis=1)
    assert [row["train_loss"] for row in found.rows[:2]] == pytest.approx(means[:2])
    assert [row["behind"] for row in found.rows[:2]] == pytest.approx(means[:2] - means[1])
    assert found.rows[1]["noise"] == 0
    assert 0 < found.rows[0]["noise"] < found.rows[0]["behind"] / 2


def test_slices_and_lists_win_as_they_were_given():
    sharp = slice(0.05, 0.1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    found = race(solvable(model=model, splitter=list), [slice(1e-4), sharp, [1e-3, 1e-3]], steps=40)
    assert found.winner is sharp
    assert [row["lr"] for row in found.rows] == ["slice(0.0001)", "slice(0.05, 0.1)", "[0.001, 0.001]"]


@pytest.mark.parametrize(("lrs", "hint"), [
    ([1e-3, 0.1], "; it is the highest: a higher one may do better"),
    ([0.1, 10], "0.1 wins: the other diverged; it is the lowest: a lower one may do better"),
    ([0.1, 10, 100], "0.1 wins: all 2 others diverged; it is the lowest"),
])  # fmt: skip
def test_a_winner_at_the_edge_of_the_candidates_is_called_that(lrs, hint):
    found = race(solvable(noise=0.1), lrs, steps=40)
    assert found.winner == 0.1
    assert hint in found.verdict


def test_all_diverged():
    found = race(solvable(), [10, 20], steps=20)
    assert (found.winner, found.verdict) == (None, "no winner: all of them diverged; try smaller learning rates")
    assert [row["result"] for row in found.rows] == ["diverged"] * 2
    str(found)
    found.plot().figure.canvas.draw()


def test_a_loss_that_is_nan_from_the_start():
    learn = solvable(loss_func=lambda pred, target: pred.sum() * float("nan"))
    found = race(learn, [0.1, 0.2], steps=20)
    assert found.verdict == "no winner: the loss of the starting weights is nan; look at data, model and loss"
    assert found.winner is None
    found.plot().figure.canvas.draw()


def race_of(differences, valid=None):
    """A race of 0.1 and 0.2 whose losses are 1, and 1 plus these: the weights say which of the two it is."""
    steps = len(differences)
    calls = {0.1: iter(np.ones(steps)), 0.2: iter(1 + np.asarray(differences)), 1e-30: iter(np.ones(10))}
    passes = {0.1: iter(valid[0]), 0.2: iter(valid[1])} if valid else None

    def loss(pred, target):
        lr = learn.opt.param_groups[0]["lr"]
        return pred.sum() * 0 + float(next(calls[lr] if pred.requires_grad else passes[lr]))

    learn = learner(batches(5), batches(len(valid[0])) if valid else None, loss_func=loss)
    return race(learn, [0.1, 0.2], steps=steps)


@pytest.mark.table
@pytest.mark.parametrize("seed", range(10))
def test_noise_is_the_standard_error_of_the_paired_differences(seed):
    differences = 0.3 * np.random.default_rng(seed).standard_normal(160)
    found, tail = race_of(differences), differences[-40:]
    row = found.rows[int(tail.mean() > 0)]
    assert abs(tail.mean()) == pytest.approx(row["behind"], rel=1e-5)
    centred = tail - tail.mean()
    alike = max(0, (centred[1:] * centred[:-1]).sum() / (centred**2).sum())
    noise = tail.std(ddof=1) / np.sqrt(40) * np.sqrt((1 + alike) / (1 - alike))
    assert row["noise"] == pytest.approx(noise, rel=1e-5)
    assert (found.winner is None) == (abs(tail.mean()) <= 2 * noise)


def test_a_margin_below_the_noise_is_no_win():
    found = race_of([0.11, -0.09] * 20)
    assert found.winner is None
    assert found.verdict.startswith("no clear winner: 0.1 has the lowest training loss, but 0.2 is behind by only 0.01")
    assert race_of([0.03, 0.01] * 20).winner == 0.1
    assert race_of([-0.03, -0.01] * 20).winner == 0.2
    assert race_of([0.0] * 40).winner is None
    assert race_of([0.01] * 40).winner == 0.1


def test_differences_that_hang_together_count_less():
    alternating, slow = [0.5, -0.3] * 20, [0.5] * 35 + [-0.3] * 5  # in the last ten: 5 and 5
    assert race_of(alternating).rows[1]["noise"] < race_of(slow).rows[1]["noise"]


def test_only_the_last_quarter_counts():
    assert race_of([-0.5] * 30 + [0.1] * 10).winner == 0.1


@pytest.mark.parametrize(("theirs", "wins"), [([1.0, 1.1], True), ([0.5, 0.51], False), ([0.5, 1.4], True)])
def test_a_validation_loss_that_says_otherwise(theirs, wins):
    found = race_of([0.1] * 40, valid=([1.0, 1.0], theirs))
    assert found.winner == (0.1 if wins else None)
    if not wins:
        assert "but 0.2 a validation loss of 0.505 against 1; take more steps" in found.verdict
    assert found.rows[1]["valid_loss"] == pytest.approx(np.mean(theirs))


def test_of_several_validation_sets_the_first_counts():
    learn = solvable(noise=0.1)
    first, alone = learn.dls.valid, race(learn, [1e-3, 0.1], steps=40)
    learn.dls = DataLoaders(learn.dls.train, {"clean": first, "noisy": batches(2)})
    assert str(race(learn, [1e-3, 0.1], steps=40)) == str(alone)


class Counting(Callback):
    """Keeps a number over fits."""

    in_lr_find = True
    saves = ("count",)

    def __init__(self):
        self.count = 0

    def after_step(self, state):
        self.count += 1


def test_what_callbacks_keep_is_put_back_too():
    mine, given = Counting(), Counting()
    learn = solvable(callbacks=[mine])
    learn.fit(0.01)
    before = mine.count
    race(learn, [1e-3, 0.1], steps=4, callbacks=[given])
    assert (mine.count, given.count) == (before, 0)
    assert before > 0


def test_a_single_validation_batch_overrules_nobody():
    assert race_of([0.1] * 40, valid=([1.0], [0.1])).winner == 0.1


@pytest.mark.parametrize(("steps", "compared"), [(1, "1 step"), (8, "2 steps"), (19, "4 steps")])
def test_few_steps_cannot_tell(steps, compared):
    found = race(solvable(noise=0.1), [1e-3, 0.1], steps=steps)
    assert found.winner is None
    assert found.verdict == (f"no clear winner: {compared} in the last quarter cannot tell a margin from noise; "
                             "take steps=20 or more")  # fmt: skip


def test_a_spike_that_is_over_marks_a_diverged_one_too():
    found = race_of([0.0] * 5 + [1e6] + [0.0] * 30 + [-0.5] * 4)
    assert [row["result"] for row in found.rows] == ["wins", "diverged"]


# ---- what is shown


def test_it_prints_as_a_table():
    found = race(solvable(noise=0.1), [1e-3, 0.1], steps=40)
    lines = str(found).splitlines()
    assert lines[0] == "2 learning rates, 40 weight updates each from the same weights and batches"
    assert lines[1].split() == ["lr", "train_loss", "valid_loss", "behind", "noise", "result"]
    assert lines[3].split()[0] == "0.1"
    assert lines[3].endswith("wins")
    assert lines[4] == found.verdict
    assert repr(found) == str(found)
    assert "valid_loss" not in str(race(learner(batches(4)), [1e-3, 0.1], steps=4))


def test_the_plot_overlays_the_curves():
    found = race(solvable(noise=0.1), [1e-3, 0.1, 10.0], steps=60)
    ax = found.plot()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0.001", "0.1: wins", "10: diverged"]
    assert [len(line.get_xdata()) for line in ax.get_lines()] == [60] * 3
    first = ax.get_lines()[0].get_ydata()
    assert first[0] == found.losses[0, 0]
    assert found.losses[0].min() < first[-1] < first[0]
    assert ax.get_ylim()[1] < 5 * found.losses[0, 0]  # not where the third one goes
    assert found.plot(ax=ax) is ax


def test_it_is_silent_but_for_bars(capsys):
    race(solvable(verbose=True), [1e-3, 0.1], steps=4)
    assert capsys.readouterr().out == ""


# ---- what is refused


class Empty:
    def __iter__(self):
        return iter([])


REFUSED = [
    (lambda learn: race(learn, [0.1]), ValueError, "lrs must hold at least 2 learning rates, got 1. Pass e.g. race("),
    (lambda learn: race(learn, []), ValueError, "at least 2 learning rates, got 0"),
    (lambda learn: race(learn, 0.1), TypeError, "lrs must be a list of learning rates, got 0.1 (float)"),
    (lambda learn: race(learn, slice(0.1, 1)), TypeError, "a list of learning rates, got slice(0.1, 1, None)"),
    (lambda learn: race(learn, "0.1"), TypeError, "lrs must be a list of learning rates, got '0.1' (str)"),
    (lambda learn: race(learn, np.array(0.1)), TypeError, "lrs must be a list of learning rates, got array(0.1)"),
    (lambda learn: race(learn, [0.1, 0.2, 0.1]), ValueError, "lrs[0] and lrs[2] are the same learning rate, 0.1."),
    (lambda learn: race(learn, [0.1, slice(0.1)]), ValueError, "lrs[1] are the same learning rate, slice(0.1)"),
    (lambda learn: race(learn, [0.1, -1]), ValueError, "lrs[1] must be a finite number > 0, got -1 (int)"),
    (lambda learn: race(learn, [0.1, None]), ValueError, "lrs[1] must be a finite number > 0, got None (NoneType)"),
    (lambda learn: race(learn, [0.1, [1, 2]]), ValueError, "2 learning rates for 1 layer group"),
    (lambda learn: race(learn, [0.1, 1], steps=0), ValueError, "steps must be an int >= 1, got 0 (int)"),
    (lambda learn: race(learn, [0.1, 1], steps=2.0), ValueError, "steps must be an int >= 1, got 2.0 (float)"),
    (lambda learn: race(learn, [0.1, 1], schedule="one_cycle"), TypeError, "such as OneCycle(), got 'one_cycle'."),
    (lambda learn: race(learn, [0.1, 1], schedule=OneCycle(0.3)), ValueError, "sets its own peak: give one that takes"),
    (lambda learn: race(learn, [0.1, 1], schedule=Schedule("momentum", lambda step, n: 0.9)), ValueError, "sets no lr"),
    (lambda learn: race(learn, [0.1, 1], callbacks=[OneCycle]), TypeError, "OneCycle is a class"),
]


@pytest.mark.table
@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_what_is_wrong_is_refused_before_any_work(call, error, message):
    learn = learner()
    before = trained(learn)
    with pytest.raises(error) as caught:
        call(learn)
    assert message in str(caught.value)
    assert learn.opt.seen == []
    assert trained(learn) == before


@pytest.mark.parametrize(("data", "message"), [
    (lambda: iter(batches(3)), "good for one pass"), (list, "the training data yields 0 batches"),
    (Empty, "the training data yielded 0 batches"),
])  # fmt: skip
def test_data_that_cannot_be_raced_on(data, message):
    with pytest.raises(ValueError, match=message):
        race(learner(data()), [0.1, 0.2], steps=5)


def test_arrays_are_lists_of_learning_rates():
    assert race(solvable(noise=0.1), np.array([1e-3, 0.1]), steps=40).winner == 0.1
    assert race(solvable(noise=0.1), (lr for lr in (1e-3, 0.1)), steps=40).winner == 0.1


def test_a_loss_that_does_not_move_is_flat():
    learn = Learner(nn.Linear(3, 1), ([(torch.ones(4, 3), torch.ones(4, 1))] * 5, None),
                    lambda pred, target: (pred * 0).sum() + 2, verbose=False, device="cpu")  # fmt: skip
    result = race(learn, [1e-3, 1e-2], 40)
    assert result.winner is None
    assert "flat: the training loss is 2 with each of them" in result.verdict

