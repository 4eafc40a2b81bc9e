"""Schedules as pure functions of (step, n_steps). Imports nothing but `math`.

A learning-rate shape gives a *fraction of the peak* at 0-based `step` of `n_steps` weight updates: multiply it by the
peak of each layer group. A momentum shape gives the momentum itself. Nothing here remembers anything, so a preview, a
resumed run and a plot are the code that runs. The end (progress 1) is approached by the last update and never reached.
"""
import math
from collections.abc import Callable, Sequence

Shape = Callable[[int, int], float]  # (step, n_steps) -> value


def constant(step: int, n_steps: int, value: float = 1.0) -> float:
    """The same `value` at every step.

    >>> constant(3, 10)
    1.0
    """
    return value


def linear(step: int, n_steps: int, start: float = 1.0, end: float = 0.0) -> float:
    """A straight line from `start` at step 0 towards `end` at step `n_steps`.

    >>> [linear(i, 4) for i in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    return _mix(start, end, step / n_steps)


def cosine(step: int, n_steps: int, start: float = 1.0, end: float = 0.0) -> float:
    """Half a cosine from `start` at step 0 towards `end` at step `n_steps`.

    >>> [round(cosine(i, 4), 4) for i in range(4)]
    [1.0, 0.8536, 0.5, 0.1464]
    """
    return _mix(start, end, (1 - math.cos(math.pi * step / n_steps)) / 2)


def exponential(step: int, n_steps: int, start: float = 1.0, end: float = 0.01) -> float:
    """A constant ratio per step, from `start` at step 0 towards `end` at step `n_steps`; both > 0.

    >>> [round(exponential(i, 2), 6) for i in range(2)]
    [1.0, 0.1]
    """
    return start * math.pow(end / start, step / n_steps)


def polynomial(step: int, n_steps: int, start: float = 1.0, end: float = 0.0, power: float = 2.0) -> float:
    """`end + (start - end) * (1 - progress) ** power`: from `start` at step 0 towards `end` at step `n_steps`.

    >>> [polynomial(i, 2) for i in range(2)]
    [1.0, 0.25]
    """
    return end + (start - end) * math.pow(1 - step / n_steps, power)


def circular(step: int, n_steps: int, div: float = 10.0, cut_div: float = 10.0) -> float:
    """One circular cycle: 1/div at step 0, up to 1 in 1/cut_div of the steps, and back down; linear both ways.

    The rise takes `n_steps // cut_div` steps, at least one. Source: fastai 0.7's CircularLR, the slanted triangle of
    Howard & Ruder 2018 (section 3.2), after Smith 2015 (arXiv 1506.01186).

    >>> [round(circular(i, 15, div=32, cut_div=5), 3) for i in (0, 3, 14)]
    [0.031, 1.0, 0.112]
    """
    return (1 + _circular_position(step, n_steps, cut_div) * (div - 1)) / div


def circular_momentum(step: int, n_steps: int, cut_div: float, high: float, low: float) -> float:
    """Momentum of `circular`: `high` where the LR is lowest, `low` where it peaks.

    >>> [round(circular_momentum(i, 15, 5, 0.95, 0.85), 4) for i in (0, 3, 14)]
    [0.95, 0.85, 0.9417]
    """
    return _mix(high, low, _circular_position(step, n_steps, cut_div))


def circular_beta(step: int, n_steps: int, div: float = 10.0, pct: float = 10.0) -> float:
    """fastai 0.7's first 1cycle: a symmetric triangle, then a linear tail from 1/div down to 1/(100*div).

    `pct`: the tail's share of the steps in percent, 0..100. Source: Smith 2018 (arXiv 1803.09820), fastai 0.7.

    >>> [round(circular_beta(i, 20), 4) for i in (0, 9, 18, 19)]
    [0.1, 1.0, 0.1, 0.0505]
    """
    half = _circular_beta_half(n_steps, pct)
    if step > 2 * half:
        return (1 - 0.99 * (step - 2 * half) / (n_steps - 2 * half)) / div
    return (1 + _triangle(step, half) * (div - 1)) / div


def circular_beta_momentum(step: int, n_steps: int, pct: float, high: float, low: float) -> float:
    """Momentum of `circular_beta`: `high` at its ends and in its tail, `low` where the LR peaks.

    >>> [circular_beta_momentum(i, 20, 10, 0.95, 0.85) for i in (0, 9, 19)]
    [0.95, 0.85, 0.95]
    """
    half = _circular_beta_half(n_steps, pct)
    return high if step > 2 * half else _mix(high, low, _triangle(step, half))


def one_cycle(step: int, n_steps: int, div_factor: float = 25.0, pct_start: float = 0.3,
              final_div: float | None = None) -> float:
    """Two half-cosines: 1/div_factor at step 0, up to 1 after `pct_start` of the steps, down towards 1/final_div.

    The peak is hit exactly, once, at step `max(1, floor(n_steps * pct_start))`. `final_div=None` is
    `div_factor * 1e4`. Source: Smith 2018 (arXiv 1803.09820) in fastai 1's form.

    >>> [round(one_cycle(i, 10), 4) for i in (0, 3, 9)]
    [0.04, 1.0, 0.0495]
    """
    rise, fall = _one_cycle_parts(n_steps, pct_start)
    if step <= rise:
        return cosine(step, rise, 1 / div_factor, 1.0)
    return cosine(step - rise, fall, 1.0, 1 / (div_factor * 1e4 if final_div is None else final_div))


def one_cycle_momentum(step: int, n_steps: int, pct_start: float = 0.3,
                       moms: Sequence[float] = (0.95, 0.85)) -> float:
    """Momentum of `one_cycle`: moms[0] at step 0, moms[1] where the LR peaks, then towards the last of `moms`.

    `moms`: (start, peak) returns to its start; (start, peak, end) has an end of its own.

    >>> [round(one_cycle_momentum(i, 10), 4) for i in (0, 3, 9)]
    [0.95, 0.85, 0.945]
    """
    rise, fall = _one_cycle_parts(n_steps, pct_start)
    if step <= rise:
        return cosine(step, rise, moms[0], moms[1])
    return cosine(step - rise, fall, moms[1], moms[2] if len(moms) == 3 else moms[0])


def cosine_restarts(step: int, n_steps: int, n_cycles: int = 1, cycle_mult: int = 1,
                    warmup_frac: float = 0.05) -> float:
    """Cosine annealing with warm restarts: each cycle falls from 1 towards 0, cycle c is `cycle_mult**c` long.

    The first `warmup_frac` of the first cycle (at least its first step, unless 0) runs at 1/100 while the cosine goes
    on underneath. Source: SGDR (arXiv 1608.03983) with fastai 0.7's warm-up.

    >>> [round(cosine_restarts(i, 12, n_cycles=2, cycle_mult=2), 3) for i in (0, 1, 4, 8)]
    [0.01, 0.854, 1.0, 0.5]
    """
    _, first = cycle_at(0, n_steps, n_cycles, cycle_mult)
    if step < warmup_frac * first:
        return 0.01
    return cosine(*cycle_at(step, n_steps, n_cycles, cycle_mult))


def flat_cosine(step: int, n_steps: int, pct_start: float = 0.75, div_final: float = 1e5) -> float:
    """1 for `pct_start` of the steps, then half a cosine towards 1/div_final. Source: fastai 2's fit_flat_cos.

    >>> [round(flat_cosine(i, 8), 3) for i in (0, 6, 7)]
    [1.0, 1.0, 0.5]
    """
    progress = step / n_steps
    if progress < pct_start:
        return 1.0
    return _mix(1.0, 1 / div_final, (1 - math.cos(math.pi * (progress - pct_start) / (1 - pct_start))) / 2)


def piecewise(step: int, n_steps: int, pieces: Sequence[tuple[float, Shape]]) -> float:
    """Shapes one after the other: each is given its share of the steps and counts them from 0.

    `pieces`: (share, shape) pairs; the shares add up to 1.

    >>> warm_up = lambda step, n_steps: linear(step, n_steps, 0.1, 1.0)
    >>> [round(piecewise(i, 10, [(0.2, warm_up), (0.8, linear)]), 3) for i in (0, 1, 2, 6)]
    [0.1, 0.55, 1.0, 0.5]
    """
    i, start, end = piece_at(step, n_steps, [share for share, _ in pieces])
    return pieces[i][1](step - start, end - start)


def cycle_at(step: int, n_steps: int, n_cycles: int = 1, cycle_mult: int = 1) -> tuple[int, int]:
    """Where `step` stands in its cycle: (0-based position, length of that cycle in steps).

    Cycle c begins at `n_steps * sum(mult**j, j < c) // sum(mult**j, j < n_cycles)`.

    >>> [cycle_at(i, 7, n_cycles=3, cycle_mult=2) for i in (0, 1, 6)]
    [(0, 1), (0, 2), (3, 4)]
    """
    if n_cycles == 1:
        return step, n_steps
    total = n_units(n_cycles, cycle_mult)
    cycle = 0
    if cycle_mult == 1:
        cycle = ((step + 1) * n_cycles - 1) // n_steps  # the last one that begins at or before `step`
    else:
        while n_steps * n_units(cycle + 1, cycle_mult) // total <= step and cycle < n_cycles - 1:
            cycle += 1
    start = n_steps * n_units(cycle, cycle_mult) // total
    return step - start, n_steps * n_units(cycle + 1, cycle_mult) // total - start


def cycle_ends(n_steps: int, n_cycles: int = 1, cycle_mult: int = 1) -> tuple[int, ...]:
    """The last step of each cycle, as `cycle_at` places them. Cycles for which there is no step are left out.

    >>> cycle_ends(7, n_cycles=3, cycle_mult=2)
    (0, 2, 6)
    """
    ends: list[int] = []
    step = 0
    while step < n_steps:
        position, length = cycle_at(step, n_steps, n_cycles, cycle_mult)
        step += length - position
        ends.append(step - 1)
    return tuple(ends)


def piece_at(step: int, n_steps: int, shares: Sequence[float]) -> tuple[int, int, int]:
    """Which piece `step` falls into: (its index, its first step, the step after its last).

    >>> piece_at(3, 10, [0.3, 0.7])
    (1, 3, 10)
    """
    # the small number keeps 0.1 + 0.2 of 10 steps at 3 steps; the last piece always ends at n_steps
    ends = [math.floor(n_steps * sum(shares[:i + 1]) + 1e-9) for i in range(len(shares) - 1)] + [n_steps]
    piece = next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)
    return piece, ends[piece - 1] if piece else 0, ends[piece]


def _mix(start: float, end: float, weight: float) -> float:
    """`start` at weight 0 and `end` at weight 1, both to the last bit; constant where they are equal."""
    return start + (end - start) * weight if weight < 0.5 else end - (end - start) * (1 - weight)


def _circular_position(step: int, n_steps: int, cut_div: float) -> float:
    rise = min(max(1, int(n_steps // cut_div)), n_steps)
    return step / rise if step <= rise else 1 - (step - rise) / (n_steps - rise)


def _triangle(step: int, half: int) -> float:
    return step / half if step <= half else 1 - (step - half) / half


def _circular_beta_half(n_steps: int, pct: float) -> int:
    return max(1, int(n_steps * (1 - pct / 100) / 2))


def _one_cycle_parts(n_steps: int, pct_start: float) -> tuple[int, int]:
    rise = math.floor(n_steps * pct_start + 1e-9)  # the small number: 100 * 0.29 is 28.999999999999996
    return max(1, rise), max(1, n_steps - rise)


def n_units(n: int, ratio: int) -> int:
    """How long `n` cycles are, in lengths of the first one: 1 + ratio + ratio**2 + ..., `n` terms."""
    return n if ratio == 1 else (ratio**n - 1) // (ratio - 1)
