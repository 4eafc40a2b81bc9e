"""The finder's rules against the numbers that fastai 2.8 gave for the same curves, and where they do not apply."""

import numpy as np
import pytest
from golden_data import floats, load, params
from hypothesis import given
from hypothesis import strategies as st

from minifast.suggest import RULES, minimum, slide, steep, suggestions, usable, valley

CURVES = load("suggest")

# fastai computes in float32. Where points of a curve tie or all lie on a line, rounding decides which of them it names,
# and the same curve in float64 has another first one. (rule, curve): why
TIES = {
    ("steep", "diverging_early_60_of_100"): "falls by 0.002 per step from end to end: every slope is the same",
    ("steep", "monotone_up"): "rises by 0.02 per step from end to end: every slope is the same",
    ("steep", "flat_ema98"): "1.0 everywhere but for the last bit of the moving average",
    ("minimum", "flat_ema98"): "1.0 everywhere but for the last bit of the moving average",
    ("valley", "flat_ema98"): "1.0 everywhere but for the last bit of the moving average",
    ("valley", "step_drop_ema98"): "the plateau before the step is level but for the last bits of the moving average",
}
NO_DESCENT = {"flat", "flat_ema98", "flat_noise", "flat_noise_ema98", "monotone_up", "monotone_up_ema98"}


def curve(name):
    recording = CURVES[f"suggest_{name}"]
    return floats(recording["lrs"]), floats(recording["losses"]), recording["config"]["num_it"]


NAMES = [key.removeprefix("suggest_") for key in CURVES]
ANSWERS = [
    (name, part, rule, answer)
    for name in NAMES
    for part in ("trimmed", "untrimmed")
    for rule, answer in CURVES[f"suggest_{name}"].get(part, {}).items()
    if answer is not None and (rule, name) not in TIES
]


@pytest.mark.table
@pytest.mark.parametrize(("name", "part", "rule", "answer"), ANSWERS)
def test_rule_gives_the_recorded_learning_rate(name, part, rule, answer):
    lrs, losses, num_it = curve(name)
    if part == "trimmed":
        lrs, losses = usable(lrs, losses, num_it)
    assert RULES[rule](lrs, losses) == pytest.approx(answer, rel=1e-6)


def test_tie_table_names_recorded_curves_only():
    assert {name for _, name in TIES} <= set(NAMES)
    assert len(ANSWERS) == 155


@pytest.mark.table
@pytest.mark.parametrize("name", NAMES)
def test_usable_keeps_as_many_points_as_recorded(name):
    lrs, losses = usable(*curve(name))
    assert len(lrs) == len(losses) == CURVES[f"suggest_{name}"]["trimmed_len"]
    assert np.isfinite(losses).all()


@pytest.mark.table
@pytest.mark.parametrize(
    ("key", "options"), [("slide_thresh_0.05", {"thresh": 0.05}), ("slide_adjust_0.5", {"adjust_value": 0.5})]
)
@pytest.mark.parametrize("name", NAMES)
def test_slide_options_as_recorded(name, key, options):
    lrs, losses = usable(*curve(name))
    answer = CURVES[f"suggest_{name}"][key]
    if answer is None:
        with pytest.raises(ValueError, match=r"^14 points, at least 16 needed by slide \(lr_diff=15\): raise num_it$"):
            slide(lrs, losses, **options)
    else:
        assert slide(lrs, losses, **options) == pytest.approx(answer, rel=1e-6)


@pytest.mark.parametrize("recording", [p for p in params("lr_find") if "suggestions" in p.values[0]])
def test_rules_on_a_whole_recorded_finder_run(recording):
    lrs, losses = floats(recording["lr"])[:, -1], floats(recording["recorder_losses"])
    trimmed = usable(lrs, losses, recording["config"]["num_it"])
    assert {name: rule(*trimmed) for name, rule in RULES.items()} == pytest.approx(recording["suggestions"], rel=1e-6)


def test_rules_are_in_the_order_in_which_they_are_shown():
    assert list(RULES) == ["valley", "steep", "minimum", "slide"]


def test_steep_is_the_slope_in_log_lr_and_slide_the_slope_per_point():
    lrs = np.array([1e-4, 1e-3, 2e-3, 3e-3, 1.0])
    losses = np.array([5.0, 4.0, 3.5, 3.2, 3.0])  # the largest fall per point is the first, per log(lr) the third
    assert steep(lrs, losses) == 2e-3
    assert slide(lrs, losses[::-1], lr_diff=1, thresh=0.2) == lrs[2]


@pytest.mark.parametrize(
    ("rule", "losses", "index"),
    [
        (minimum, [3, 1, 2, 1, 1, 3], 1),
        (steep, [4, 4, 4, 4, 4, 4], 0),
        (valley, [5, 5, 4, 3, 6, 5, 4], 1),  # 5 4 3 ends at 3, and again at 6: the first one counts
        (valley, [1, 1, 1, 1, 1, 1], 0),
        (valley, [1, 2, 3, 4, 5, 6], 0),
        (valley, [2, 1, 0, 3, 4, 5], 0),
        (valley, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 3),
        (valley, [9, 9, 9, 9, 8, 7, 6, 5, 4, 3], 5),
        (valley, [9, 20, 8, 7, 21, 6, 5, 4, 3, 2], 4),  # 20 and 21 do not interrupt the descent
    ],
)
def test_first_of_equals_and_counted_points(rule, losses, index):
    lrs = 10.0 ** np.arange(-9, -9 + len(losses))
    assert rule(lrs, np.array(losses, dtype=float)) == pytest.approx(lrs[index] / (10 if rule is minimum else 1))


def test_slide_on_level_ground_stays_where_it_begins_and_on_a_bent_curve_goes_to_the_left_end():
    lrs = np.geomspace(1e-6, 1.0, 20)
    assert slide(lrs, np.ones(20)) == lrs[4]
    assert slide(lrs, np.linspace(4, 0, 20) ** 2) == lrs[0]


def test_slide_stops_at_equal_to_thresh():
    lrs = np.geomspace(1e-4, 1.0, 5)
    bent = np.array([0.0, 0.0, 0.0, 0.0, 1.0])  # gradients 0 0 0 0.5 1
    assert slide(lrs, bent, lr_diff=1, thresh=0.5) == lrs[3]
    assert slide(lrs, bent, lr_diff=1, thresh=0.49) == lrs[2]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_leave_their_input_alone_and_give_a_python_float(rule):
    lrs, losses = usable(*curve("typical_u"))
    before = lrs.copy(), losses.copy()
    assert type(rule(lrs, losses)) is float
    assert (lrs == before[0]).all()
    assert (losses == before[1]).all()


RAMP = np.geomspace(1e-6, 1.0, 20)


@pytest.mark.table
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steep(RAMP, np.ones(19)), r"lrs have shape (20,), losses (19,): give two arrays of one shape (N,)"),
        (lambda: usable(RAMP, np.ones((20, 1)), 20), r"lrs have shape (20,), losses (20, 1): give two arrays"),
        (lambda: minimum(RAMP.reshape(4, 5), np.ones((4, 5))), "lrs have shape (4, 5), losses (4, 5): give two arrays"),
        (lambda: minimum(RAMP[:1], np.ones(1)), "1 points, at least 2 needed: raise num_it"),
        (lambda: valley(RAMP[:0], np.ones(0)), "0 points, at least 2 needed: raise num_it"),
        (lambda: slide(RAMP[:15], np.ones(15)), "15 points, at least 16 needed by slide (lr_diff=15): raise num_it"),
        (lambda: slide(RAMP[:4], np.ones(4), 4), "4 points, at least 5 needed by slide (lr_diff=4): raise num_it"),
        (lambda: slide(RAMP, np.ones(20), lr_diff=0), "lr_diff must be an int >= 1, got 0 (int)"),
        (
            lambda: valley(RAMP[:4], np.array([2.0, 1.0, 3.0, 4.0])),
            "longest descent of 4 points is the first 2, at least 3",
        ),
        (
            lambda: minimum(RAMP[:3], np.array([2.0, np.nan, 1.0])),
            "losses[1] of 3 is nan: cut the curve there, as usable()",
        ),
        (lambda: steep(np.array([1e-3, np.inf]), np.ones(2)), "lrs[1] of 2 is inf: cut the curve there"),
        (lambda: steep(np.array([0.0, 1e-3]), np.ones(2)), "lrs[0] is 0: learning rates must be positive"),
        (
            lambda: steep(np.array([1e-3, 2e-3, 2e-3]), np.ones(3)),
            "lrs[1] is 0.002 and lrs[2] is 0.002: learning rates must",
        ),
        (lambda: usable(RAMP, np.ones(20), 0), "num_it must be an int >= 1, got 0 (int)"),
    ],
)
def test_error_says_what_was_given_and_what_is_needed(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the text is compared below, without escapes)
        call()
    assert message in str(caught.value)


def test_sixteen_points_are_enough_for_slide():
    assert slide(RAMP[:16], np.linspace(2, 1, 16)) == RAMP[0]


def test_usable_trims_before_it_cuts():
    losses = np.linspace(3, 1, 20)
    losses[9] = np.inf
    lrs, kept = usable(RAMP, losses, num_it=20)
    assert (lrs == RAMP[2:9]).all()
    assert (kept == losses[2:9]).all()
    losses[1] = np.nan  # outside what is kept: no reason to cut
    assert len(usable(RAMP, losses, num_it=20)[0]) == 7
    assert len(usable(RAMP, losses, num_it=100)[0]) == 5
    assert len(usable(RAMP[:3], losses[:3], num_it=3)[0]) == 0


@pytest.mark.table
@pytest.mark.parametrize("name", NAMES)
def test_suggestions_for_every_recorded_curve(name):
    found, reason = suggestions(*curve(name))
    assert list(found) == list(RULES)
    if name in NO_DESCENT:
        assert set(found.values()) == {None}
        assert reason.startswith("no descent: the largest fall of the loss is ")
    else:
        assert reason == ""
        assert {rule for rule, lr in found.items() if lr is None} == ({"slide"} if name == "short_21" else set())


@pytest.mark.table
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("name", ["noisy_u", "diverging_early_60_of_100_ema98", "flat_noise", "flat_noise_ema98"])
def test_descent_does_not_depend_on_the_unit_of_the_loss(name, factor):
    lrs, losses, num_it = curve(name)
    assert (suggestions(lrs, losses * factor, num_it)[1] == "") is (name not in NO_DESCENT)


def test_negative_losses_and_losses_that_cross_zero_descend_too():
    lrs, losses, num_it = curve("typical_u")
    expected = suggestions(lrs, losses, num_it)[0]
    for offset in (-1.0, -5.0):
        found, reason = suggestions(lrs, losses + offset, num_it)
        assert (found, reason) == (pytest.approx(expected), "")


@pytest.mark.parametrize("losses", [curve("flat_noise_ema98")[1] - 2.0, np.zeros(100), np.full(100, -3.0)])
def test_flat_curves_at_and_below_zero_are_flat_too(losses):
    found, reason = suggestions(curve("typical_u")[0], losses, 100)
    assert set(found.values()) == {None}
    assert reason.startswith("no descent")


@pytest.mark.case("L5")
def test_reason_names_the_fall_and_what_was_needed():
    _, reason = suggestions(*curve("flat_noise_ema98"))
    assert reason == (
        "no descent: the largest fall of the loss is 0.00355, more than 0.01 is needed; "
        "try a higher end_lr or a smaller start_lr"
    )


@pytest.mark.case("L5")
def test_reason_names_the_points():
    lrs, losses, _ = curve("typical_u")
    found, reason = suggestions(lrs[:24], losses[:24], 100)
    assert reason == "9 usable points of 24 recorded, at least 10 needed: raise num_it or lower end_lr"
    assert set(found.values()) == {None}
    losses[50:] = np.nan
    assert suggestions(lrs, losses, 100)[1] == ""
    losses[19:] = np.nan
    assert suggestions(lrs, losses, 100)[1].startswith("9 usable points of 100 recorded, at least 10 needed")


def test_reason_says_what_is_wrong_with_the_arrays():
    lrs, losses, _ = curve("typical_u")
    assert suggestions(lrs[::-1], losses, 100)[1].endswith("and lrs[1] is 1.09648: learning rates must increase")
    assert suggestions(lrs, losses[:-1], 100)[1].startswith("lrs have shape (100,), losses (99,)")
    assert suggestions(lrs, losses, 0)[1].startswith("num_it must be an int >= 1, got 0")


def test_ten_points_are_enough_for_suggestions():
    found, reason = suggestions(RAMP[:16], np.linspace(2, 1, 16), num_it=10)
    assert reason == ""
    assert {rule for rule, lr in found.items() if lr is None} == {"slide"}
    assert suggestions(RAMP[:15], np.linspace(2, 1, 15), num_it=10)[1].startswith("9 usable points of 15")


ANY_LOSS = st.floats() | st.sampled_from([0.0, 1.0, np.nan, np.inf, 1e308, -1e308, 5e-324])


@pytest.mark.case("L5")
@given(
    losses=st.lists(ANY_LOSS, max_size=40) | st.builds(lambda n, v: [v] * n, st.integers(0, 40), ANY_LOSS),
    num_it=st.integers(-1, 100),
)
def test_suggestions_never_raise(losses, num_it):
    lrs = np.geomspace(1e-7, 10.0, len(losses))
    found, reason = suggestions(lrs, np.array(losses, dtype=np.float64), num_it)
    assert list(found) == list(RULES)
    given_lrs = [lr for lr in found.values() if lr is not None]
    assert all(1e-8 <= lr <= 10.0 for lr in given_lrs)
    if reason:
        assert not given_lrs


def test_losses_whose_differences_overflow_are_no_exception():
    losses = np.where(np.arange(40) % 2, 1e308, -1e308)
    suggestions(np.geomspace(1e-7, 10.0, 40), losses, 40)


@given(lrs=st.lists(st.floats(), max_size=40), data=st.data())
def test_suggestions_never_raise_whatever_the_lrs(lrs, data):
    losses = data.draw(st.lists(st.floats(-10, 10), min_size=len(lrs), max_size=len(lrs)))
    found, reason = suggestions(np.array(lrs, dtype=np.float64), np.array(losses), 10)
    assert not reason or set(found.values()) == {None}


@given(st.lists(st.integers(-50, 50), min_size=16, max_size=40))
def test_valley_is_the_longest_decreasing_subsequence(values):
    lengths = []
    for k, value in enumerate(values):
        lengths.append(1 + max((lengths[j] for j in range(k) if values[j] > value), default=0))
    points, end = max(lengths), lengths.index(max(lengths))
    lrs = np.geomspace(1e-7, 10.0, len(values))
    index = 0 if points == 1 else end - points + int(points / 3) + int(points / 3 / 2)
    if index < 0:
        with pytest.raises(ValueError, match="the first 2"):
            valley(lrs, np.array(values, dtype=float))
    else:
        assert valley(lrs, np.array(values, dtype=float)) == lrs[index]
