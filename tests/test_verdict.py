"""Whether the curve of a finder can be trusted: synthetic curves, and those that were recorded."""
import numpy as np
import pytest
from golden_data import floats, load

from minifast.finder.verdict import judge
from minifast.record.scalars import Ema

LRS = np.geomspace(1e-7, 10, 100)


def smoothed(losses):
    ema = Ema()
    return np.array([ema.add(loss) for loss in losses])


def judged(losses, num_it=100, exploded=False, lrs=LRS):
    losses = np.asarray(losses, dtype=float)
    return judge(lrs[: len(losses)], losses, smoothed(losses), num_it,
                 "the loss diverged" if exploded else "all were tried", exploded)


def textbook(begins=3e-3, explodes=0.3):
    return 2.3 - 2 / (1 + begins / LRS) + np.minimum((LRS / explodes) ** 2, 9)


def noise(scatter, seed=0):
    return scatter * np.random.default_rng(seed).standard_normal(100)


@pytest.mark.table
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scatter", [0, 0.01, 0.1, 0.3])
def test_a_textbook_curve_is_ok(scatter, seed):
    assert judged(textbook() + noise(scatter, seed)) == ("ok", "")


@pytest.mark.table
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("level", "scatter", "verdict"), [
    (2.3, 0, "flat"), (2.3, 0.02, "flat"), (2.3, 0.1, "flat"), (0.05, 0.03, "too noisy"), (1, 0.5, "too noisy"),
    (0, 1, "too noisy"), (-2, 0.01, "flat"),
])  # fmt: skip
def test_noise_around_a_level_is_flat_or_too_noisy(level, scatter, verdict, seed):
    found, reason = judged(level + noise(scatter, seed))
    assert found == verdict
    assert reason.startswith("no descent: the largest fall of the loss is " if verdict == "flat" else "the loss falls")


def test_how_often_noise_passes_for_a_descent():
    verdicts = [judged(1 + noise(0.3, seed))[0] for seed in range(200)]
    assert verdicts.count("ok") <= 4


@pytest.mark.table
@pytest.mark.parametrize("unit", [1e-6, 1e6])
@pytest.mark.parametrize("losses", [textbook(), textbook() + noise(0.1), 1 + noise(0.5), 1 + noise(0.01),
                                    textbook(1e-1, 1e9), textbook(1e-8)])  # fmt: skip
def test_the_unit_of_the_loss_does_not_matter(losses, unit):
    assert judged(losses * unit)[0] == judged(losses)[0]


@pytest.mark.parametrize("scatter", [0, 0.1])
def test_still_falling_at_the_end(scatter):
    verdict, reason = judged(textbook(begins=1.0, explodes=1e9) + noise(scatter))
    assert verdict == "at the edge of the range"
    assert reason.startswith("the loss is still falling at 10, by ")
    assert reason.endswith(" within the last 20 learning rates; try a higher end_lr, e.g. 1e+03")


def test_a_loss_that_has_come_to_rest_at_the_end_is_no_edge():
    assert judged(textbook(begins=1e-4, explodes=1e9)) == ("ok", "")


@pytest.mark.parametrize("scatter", [0, 0.1])
def test_falling_from_the_start(scatter):
    verdict, reason = judged(textbook(begins=2e-7) + noise(scatter))
    assert verdict == "at the edge of the range"
    assert reason.startswith("the loss falls by ")
    assert reason.endswith(" within the first 20 learning rates already; try a smaller start_lr, e.g. 1e-09")


def test_rising_from_the_start():
    verdict, reason = judged(1 + np.linspace(0, 2, 100))
    assert verdict == "at the edge of the range"
    assert reason == ("the loss rises from the first learning rates on, by 0.202 within 20; try a smaller start_lr, "
                      "e.g. 1e-09")  # fmt: skip


def test_level_and_then_an_explosion_is_flat():
    losses = np.append(np.ones(60), 1.5 ** np.arange(20))
    verdict, reason = judged(losses, exploded=True)
    assert verdict == "flat"
    assert reason.startswith("the loss diverged at 0.24, after 80 learning rates: no descent: ")


@pytest.mark.parametrize("n", [2, 11, 24])
def test_an_explosion_within_the_first_few(n):
    verdict, reason = judged(np.append(np.ones(n - 1), 1e9), exploded=True)
    assert verdict == "at the edge of the range"
    assert reason == (f"no usable descent: the loss diverged at {LRS[n - 1]:.2g}, after {n} of 100 learning rates; "
                      "try a smaller start_lr, e.g. 1e-09")  # fmt: skip


def test_few_points():
    verdict, reason = judged(np.ones(12), num_it=12)
    assert (verdict, reason) == (
        "too few points",
        "6 usable points of 12 recorded, at least 10 needed: raise num_it or lower end_lr",
    )
    verdict, reason = judged([1, 2, 9], num_it=12, exploded=True)
    assert verdict == "too few points"
    assert reason.startswith("the loss diverged at 1.5e-07, after 3 learning rates: 0 usable points of 3 recorded")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_last_loss_that_is_not_finite_spoils_nothing(bad):
    losses = textbook()
    losses[90] = bad
    assert judged(losses[:91], exploded=True) == ("ok", "")


EXPECTED = {"flat": "flat", "flat_noise": "flat", "monotone_up": "at the edge of the range", "typical_u": "ok",
            "noisy_u": "ok", "fine_200": "ok", "negative_losses": "ok", "nan_tail": "ok",
            "diverging_early_60_of_100": "ok"}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_recorded_curves(name):
    recording = load("suggest")[f"suggest_{name}"]
    lrs, losses, num_it = floats(recording["lrs"]), floats(recording["losses"]), recording["config"]["num_it"]
    assert judged(losses, num_it, len(losses) < num_it, lrs)[0] == EXPECTED[name]
