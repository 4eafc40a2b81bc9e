"""Whether the curve of a learning-rate finder is one to read a learning rate off."""
import numpy as np

from ..suggest import MIN_POINTS, Curve, largest_fall, needed_fall, suggestions, usable

OK, FLAT, NOISY, EDGE, SHORT = "ok", "flat", "too noisy", "at the edge of the range", "too few points"

# A descent has to exceed the scatter of the batch losses. Smoothed white noise of 100 points falls by 0.35 of its
# scatter (median of 400 draws of tests/benchmarks/finder.py; 99 %: 0.97). A convnet on digits falls by 6 to 12 before
# it is trained, by 0.1 to 1.0 afterwards.
MIN_FALL_OF_SCATTER = 1.0
# Where the fall is lost in the scatter: with less scatter than 10 % of the loss's level, a descent worth having would
# have shown, so the curve is flat; with more, nobody can tell. That convnet scatters by 3 to 8 % when new, later by 28
# to 76 %.
MAX_SCATTER_OF_FLAT = 0.1
# What counts as falling (or rising) at an end of the range: the means of two neighbouring tenths of the rates differ by
# more than 3 standard errors, by more than a descent needs, and by more than 5 % of the whole descent.
STANDARD_ERRORS, SHARE_OF_DESCENT = 3.0, 0.05


def judge(lrs: Curve, losses: Curve, smooth_losses: Curve, num_it: int, stopped: str,
          exploded: bool) -> tuple[str, str]:
    """The verdict on one curve, one of the five above, and what is wrong: a sentence, '' if nothing is.

    * "too few points": not enough for any rule, but no explosion is the cause.
    * "at the edge of the range": it exploded within the first few rates; it falls or rises from the first rate on; it
      still falls at the last one. The range of rates is to be moved.
    * "flat": the loss does not fall by more than 1 % of its level and by more than its noise.
    * "too noisy": it falls by no more than the losses of single batches scatter, and those scatter widely.

    lrs, losses, smooth_losses: shape (N,); the rates increase, the last loss may be nan or inf.
    num_it: learning rates that the finder was asked to try.
    stopped: why it ended, in words; exploded: whether that was the loss.

    >>> lrs = np.geomspace(1e-7, 10, 100)
    >>> losses = 2 - 1.5 / (1 + (0.003 / lrs)) + (lrs / 2) ** 2
    >>> judge(lrs, losses, losses, 100, "all were tried", False)
    ('ok', '')
    >>> judge(lrs[:50], losses[:50], losses[:50], 50, "all were tried", False)[0]
    'at the edge of the range'
    """
    lrs, losses, smooth_losses = (np.asarray(values, dtype=np.float64) for values in (lrs, losses, smooth_losses))
    n, reason = len(lrs), suggestions(lrs, smooth_losses, num_it)[1]
    with np.errstate(all="ignore"):  # losses just before an explosion may overflow here
        kept = usable(lrs, smooth_losses, num_it)[1]
        if len(kept) < MIN_POINTS:
            return _stump(lrs, losses, num_it, stopped, exploded, reason)
        scatter, fall, needed = _scatter(usable(lrs, losses, num_it)[1]), largest_fall(kept), needed_fall(kept)
        width = max(3, min(num_it // 10, n // 4))
        enough = max(needed, STANDARD_ERRORS * scatter * np.sqrt(2 / width), SHARE_OF_DESCENT * fall)
        first, hint = _fall(losses[: 2 * width]), f"try a smaller start_lr, e.g. {lrs[0] / 100:.1g}"
        if first > enough:
            return EDGE, f"the loss falls by {first:.3g} within the first {2 * width} learning rates already; {hint}"
        if reason and -first > enough:
            return EDGE, f"the loss rises from the first learning rates on, by {-first:.3g} within {2 * width}; {hint}"
        if reason:
            at = f"{stopped} at {lrs[-1]:.2g}, after {n} learning rates: " if exploded else ""
            return FLAT, at + reason
        last = 0.0 if exploded or n < num_it else _fall(losses[-2 * width :])
        if last > enough:
            return EDGE, (f"the loss is still falling at {lrs[-1]:.2g}, by {last:.3g} within the last {2 * width} "
                          f"learning rates; try a higher end_lr, e.g. {lrs[-1] * 100:.1g}")
        if fall <= MIN_FALL_OF_SCATTER * scatter:
            level = float(np.median(np.abs(kept)))
            if scatter <= MAX_SCATTER_OF_FLAT * level:
                return FLAT, (f"no descent: the largest fall of the loss is {fall:.3g}, and single batches scatter by "
                              f"{scatter:.3g} around {level:.3g}; try a higher end_lr")
            return NOISY, (f"the loss falls by {fall:.3g}, and single batches scatter by {scatter:.3g}: noise alone "
                           "can look like that; try repeats=5, larger batches or a higher end_lr")
    return OK, ""


def _stump(lrs: Curve, losses: Curve, num_it: int, stopped: str, exploded: bool, reason: str) -> tuple[str, str]:
    n, could_be_enough = len(lrs), num_it - num_it // 10 - 5 >= MIN_POINTS
    if n == 1 and exploded:  # before any update: no learning rate is to blame
        return EDGE, f"no usable descent: {stopped} at {lrs[-1]:.2g}, after 1 learning rates"
    if exploded and could_be_enough:
        return EDGE, (f"no usable descent: {stopped} at {lrs[-1]:.2g}, after {n} of {num_it} learning rates; try a "
                      f"smaller start_lr, e.g. {lrs[0] / 100:.1g}")
    return SHORT, f"{stopped} at {lrs[-1]:.2g}, after {n} learning rates: {reason}" if exploded else reason


def _scatter(losses: Curve) -> float:
    """The standard deviation of the batch losses around their course, from the differences of neighbours."""
    steps = np.abs(np.diff(losses[np.isfinite(losses)]))
    return float(np.median(steps) / (0.6745 * np.sqrt(2))) if len(steps) else 0.0


def _fall(losses: Curve) -> float:
    """How far the mean of the second half lies below that of the first."""
    half = len(losses) // 2
    return float(np.mean(losses[:half]) - np.mean(losses[half:]))
