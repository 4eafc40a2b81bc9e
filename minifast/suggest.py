"""Learning rates read off the curve of a learning-rate finder: pure functions of two numpy arrays.

A *curve* is a pair of float64 arrays of one length N: `lrs`, the ramp (positive, increasing), and `losses`, the
smoothed training loss at each of them. Every rule is a function `(lrs, losses) -> lr`; ties go to the first index. The
rules are those of fastai 2.8 (`fastai.callback.schedule`), computed in float64 where fastai computes in float32.

`suggestions` trims a recorded curve, applies every rule of `RULES` and never raises. The rules by themselves do not
trim; they raise `ValueError` for a curve that is not as above or has too few points: 2, for `slide` `lr_diff` + 1.
"""
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import check_int, check_number, quoted

Curve = NDArray[np.float64]

MIN_POINTS = 10  # below it, where a finder stopped early, the rules answer from the shape of the noise

# "Descent" is the largest fall from any loss to a later one. It has to exceed two things:
# * 1 % of the loss's level (the median of |loss|). The smoothed loss of a model that learns nothing wanders by 0.35 %
#   when its batch losses scatter by 1 %; the shallowest real descent among the recorded curves is 1.8 %.
# * the noise, in units of sqrt(N) typical steps (the median of |loss[k+1] - loss[k]|), for losses not smoothed:
#   40 to 200 points of white noise fall by 0.4 to 0.75 such units, the noisiest recorded descent by 0.98.
# In doubt it gives numbers: a smoothed curve wanders by 1 to 3 units, and where the batch losses scatter by more than
# about 3 % of their mean, as they do once a model has been trained, that passes for a descent.
MIN_FALL_OF_LEVEL = 0.01
MIN_FALL_OF_NOISE = 0.75


def valley(lrs: Curve, losses: Curve) -> float:
    """The learning rate about halfway down the longest descent: the default suggestion.

    The descent is the longest strictly decreasing subsequence of the losses, d points long and ending at index e (the
    first such e). Its points are counted as if they were neighbours: it starts at s = e - d, and the answer is
    `lrs[s + d // 3 + d // 6]`. Losses that never fall give `lrs[0]`. O(N^2), meant for a few hundred points.

    Raises ValueError too where the longest descent is the first two points, for which fastai 2.8 gives the *largest*
    learning rate.

    Source: fastai 2.8, `valley`.

    >>> lrs = np.array([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    >>> valley(lrs, np.array([2.0, 2.0, 1.9, 1.6, 1.3, 1.1, 1.0, 3.0]))
    0.0001
    >>> valley(lrs, np.arange(8.0))
    1e-07
    """
    lrs, losses = _curve(lrs, losses)
    length = np.ones(len(losses), dtype=np.intp)  # of the longest decreasing subsequence that ends at k
    for k in range(1, len(losses)):
        length[k] = 1 + length[:k][losses[:k] > losses[k]].max(initial=0)
    end = int(length.argmax())
    if end == 0:
        return float(lrs[0])
    d = int(length[end])
    index = end - d + d // 3 + d // 6
    if index < 0:
        raise ValueError(f"the longest descent of {len(losses)} points is the first 2, at least 3 needed: give a "
                         "smaller start_lr")
    return float(lrs[index])


def steep(lrs: Curve, losses: Curve) -> float:
    """The learning rate where the loss falls fastest per step of log(lr).

    `lrs[k]` for the k with the smallest `(losses[k+1] - losses[k]) / (ln lrs[k+1] - ln lrs[k])`; of losses that never
    fall, where they rise least.

    Source: fastai 2.8, `steep`.

    >>> lrs = np.array([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    >>> steep(lrs, np.array([2.0, 1.9, 1.7, 1.0, 0.9, 4.0]))
    0.001
    """
    lrs, losses = _curve(lrs, losses)
    return float(lrs[np.argmin(np.diff(losses) / np.diff(np.log(lrs)))])


def minimum(lrs: Curve, losses: Curve) -> float:
    """A tenth of the learning rate with the lowest loss.

    Source: fastai 2.8, `minimum`; the advice is that of fastai 0.7's course: well before the minimum, not at it.

    >>> lrs = np.array([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    >>> minimum(lrs, np.array([2.0, 1.9, 1.7, 1.0, 0.9, 4.0]))
    0.01
    """
    lrs, losses = _curve(lrs, losses)
    return float(lrs[losses.argmin()]) / 10


def slide(lrs: Curve, losses: Curve, lr_diff: int = 15, thresh: float = 0.005, adjust_value: float = 1.0) -> float:
    """The end of the long slide: the last learning rate before the loss stops falling and the curve starts to turn.

    An interval of `lr_diff` points slides down from the right end of the curve until the gradients at its two ends (per
    index, as `numpy.gradient`) differ by no more than `thresh`. The answer is its left end one point before that, times
    `adjust_value`; where they never differ by more, the left end it began with.

    lr_diff: points between the two ends of the interval, at least 1; the curve must have more.
    thresh: in units of the loss per index, so it depends on the loss's scale.
    adjust_value: factor on the answer.

    Source: fastai 2.8, `slide`.

    >>> lrs = np.array([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    >>> losses = np.array([2.0, 2.0, 1.9, 1.5, 1.1, 1.0, 1.0])
    >>> slide(lrs, losses, lr_diff=2, thresh=0.2)
    0.001
    """
    lr_diff, thresh = check_int("lr_diff", lr_diff), check_number("thresh", thresh)
    adjust_value = check_number("adjust_value", adjust_value)
    lrs, losses = _curve(lrs, losses, needed=lr_diff + 1, needed_by=f" by slide (lr_diff={lr_diff})")
    gradient = np.gradient(losses)
    left = best = len(lrs) - 1 - lr_diff
    while left >= 0 and abs(gradient[left + lr_diff] - gradient[left]) > thresh:
        best = left
        left -= 1
    return float(lrs[best]) * adjust_value


RULES: Mapping[str, Callable[[Curve, Curve], float]] = {
    "valley": valley, "steep": steep, "minimum": minimum, "slide": slide}
"""The rules by name, the default one first."""


def usable(lrs: Curve, losses: Curve, num_it: int) -> tuple[Curve, Curve]:
    """The part of a recorded curve for the rules: `[num_it // 10 : -5]` up to the first nan or inf; it can be empty.

    num_it: learning rates that the finder was asked to try, at least 1; it may have stopped before.

    Source: fastai 2.8, `Learner.lr_find`, which cuts at nan only.

    >>> lrs, losses = np.geomspace(1e-7, 1.0, 20), np.linspace(2.0, 1.0, 20)
    >>> losses[12:] = np.nan
    >>> [len(part) for part in usable(lrs, losses, num_it=20)]
    [10, 10]
    """
    num_it = check_int("num_it", num_it)
    lrs, losses = _same_shape(lrs, losses)
    lrs, losses = lrs[num_it // 10 : -5], losses[num_it // 10 : -5]
    end = int(np.append(~(np.isfinite(lrs) & np.isfinite(losses)), True).argmax())
    return lrs[:end], losses[:end]


def suggestions(lrs: Curve, losses: Curve, num_it: int) -> tuple[dict[str, float | None], str]:
    """What every rule says about a recorded curve, and why they say nothing if so; never an exception.

    The curve is trimmed by `usable`. With fewer than 10 points left, or where the loss never falls by more than 1 % of
    its level and by more than its noise, every value is None and the reason says so in one line. Otherwise the reason
    is '', and only a rule that does not apply is None: `slide` on fewer than 16 points (call it to be told why).

    losses: as recorded; may end in nan or inf.
    num_it: learning rates that the finder was asked to try.

    Gives learning rate or None by the name of the rule, in the order of `RULES`, and the reason.

    >>> lrs = np.geomspace(1e-7, 1.0, 29)
    >>> found, reason = suggestions(lrs, np.linspace(3.0, 1.0, 29), num_it=29)
    >>> {rule: f"{lr:.1e}" for rule, lr in found.items()}, reason
    ({'valley': '5.6e-05', 'steep': '3.2e-07', 'minimum': '5.6e-03', 'slide': '1.0e-05'}, '')
    >>> suggestions(lrs, np.ones(29), num_it=29)[1]
    'no descent: the largest fall of the loss is 0, more than 0.01 is needed; try a higher end_lr or a smaller start_lr'
    """
    nothing: dict[str, float | None] = dict.fromkeys(RULES)
    try:
        kept_lrs, kept_losses = usable(lrs, losses, num_it)
        if len(kept_losses) < MIN_POINTS:
            return nothing, (f"{len(kept_losses)} usable points of {len(losses)} recorded, at least {MIN_POINTS} "
                             "needed: raise num_it or lower end_lr")
        _curve(kept_lrs, kept_losses)
    except ValueError as problem:
        return nothing, str(problem)
    with np.errstate(all="ignore"):  # losses up to 1e308 are finite; their differences need not be
        fall, needed = largest_fall(kept_losses), needed_fall(kept_losses)
        if not fall > needed:
            return nothing, (f"no descent: the largest fall of the loss is {fall:.3g}, more than {needed:.3g} is "
                             "needed; try a higher end_lr or a smaller start_lr")
        found = dict(nothing)
        for name, rule in RULES.items():
            with suppress(ValueError):
                found[name] = rule(kept_lrs, kept_losses)
        return found, ""


def largest_fall(losses: Curve) -> float:
    """The largest fall from any loss to a later one, >= 0."""
    losses = _column("losses", losses).ravel()
    return float(np.max(np.maximum.accumulate(losses) - losses, initial=0.0))


def needed_fall(losses: Curve) -> float:
    """How far a curve has to fall for that to be a descent, in the unit of the loss."""
    losses = _column("losses", losses).ravel()
    if len(losses) < 2:
        return 0.0
    level = np.median(np.abs(losses))
    noise = np.median(np.abs(np.diff(losses))) * np.sqrt(len(losses))
    return float(max(MIN_FALL_OF_LEVEL * level, MIN_FALL_OF_NOISE * noise))


def _same_shape(lrs: Curve, losses: Curve) -> tuple[Curve, Curve]:
    lrs, losses = _column("lrs", lrs), _column("losses", losses)
    if lrs.ndim != 1 or lrs.shape != losses.shape:
        raise ValueError(f"lrs have shape {lrs.shape}, losses {losses.shape}: give two arrays of one shape (N,)")
    return lrs, losses


def _column(name: str, values: Any) -> Curve:
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if np.ndim(values):
            return np.asarray(values, dtype=np.float64)
    raise ValueError(f"{name} must be an array of numbers of shape (N,), got {quoted(values)}.")


def _curve(lrs: Curve, losses: Curve, needed: int = 2, needed_by: str = "") -> tuple[Curve, Curve]:
    lrs, losses = _same_shape(lrs, losses)
    if len(lrs) < needed:
        raise ValueError(f"{len(lrs)} points, at least {needed} needed{needed_by}: raise num_it")
    for name, values in (("lrs", lrs), ("losses", losses)):
        for k in np.flatnonzero(~np.isfinite(values))[:1]:
            raise ValueError(f"{name}[{k}] of {len(values)} is {values[k]}: cut the curve there, as usable() does")
    if lrs[0] <= 0:
        raise ValueError(f"lrs[0] is {lrs[0]:g}: learning rates must be positive")
    for k in np.flatnonzero(np.diff(lrs) <= 0)[:1]:
        raise ValueError(f"lrs[{k}] is {lrs[k]:g} and lrs[{k + 1}] is {lrs[k + 1]:g}: learning rates must increase")
    return lrs, losses
