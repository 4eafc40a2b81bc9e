"""The schedules: frozen dataclasses that write learning rate and momentum before every batch.

All of them can be looked at without a learner, a model or training: `OneCycle(0.1).plot(1000)`.
"""
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ..errors import MOST, check_int, check_number, quoted
from ..optim.rates import check_lr
from . import shapes
from .scheduler import Scheduler, own_momentum
from .shapes import n_units

Moms = Sequence[float] | None
MOST_TIMES = 1e8  # the peak that a schedule may go to: with the largest peak that is what a float32 holds


@dataclass(frozen=True)
class ConstantLR(Scheduler):
    """The same learning rate throughout: what `fit(lr, n)` uses.

    >>> ConstantLR().values(3, peak=0.1)
    {'lr': [0.1, 0.1, 0.1]}
    """

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        return shapes.constant(step, n_steps)


@dataclass(frozen=True)
class LinearLR(Scheduler):
    """A straight line between two fractions of the peak; as a piece of `PiecewiseLR`, a warm-up.

    start, end: fractions of the peak, finite and >= 0. Raises ValueError otherwise.

    >>> LinearLR(0.1, 1.0).values(3)
    {'lr': [0.1, 0.4, 0.7]}
    """

    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("start", self.start, minimum=0)
        _check_fraction("end", self.end, minimum=0)

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        return shapes.linear(step, n_steps, self.start, self.end)


@dataclass(frozen=True)
class ExponentialLR(Scheduler):
    """A constant ratio per step, from `start` to `end`: fractions of the peak, both > 0.

    >>> [round(lr, 6) for lr in ExponentialLR(end=0.01).values(2)["lr"]]
    [1.0, 0.1]
    """

    start: float = 1.0
    end: float = 0.01

    def __post_init__(self) -> None:
        _check_fraction("start", self.start, above=0)
        _check_fraction("end", self.end, above=0)

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        return shapes.exponential(step, n_steps, self.start, self.end)


@dataclass(frozen=True)
class PolynomialLR(Scheduler):
    """`end + (start - end) * (1 - progress) ** power`; fractions of the peak >= 0, power > 0.

    >>> PolynomialLR(power=2).values(2)
    {'lr': [1.0, 0.25]}
    """

    start: float = 1.0
    end: float = 0.0
    power: float = 2.0

    def __post_init__(self) -> None:
        _check_fraction("start", self.start, minimum=0)
        _check_fraction("end", self.end, minimum=0)
        check_number("power", self.power, above=0)

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        return shapes.polynomial(step, n_steps, self.start, self.end, self.power)


@dataclass(frozen=True)
class CircularLR(Scheduler):
    """Each cycle rises from peak/div to the peak in 1/cut_div of its steps, and falls back; linear both ways.

    div: the peak divided by the lowest rate, > 0. cut_div: the cycle's length divided by the rise's, >= 1. n_cycles,
    cycle_mult: ints >= 1; cycle c is cycle_mult**c times as long as the first. moms: (high, low) momentum, cycled the
    other way round, each in [0, 1); None leaves it alone. A cycle shorter than cut_div steps rises for one step, with
    a warning. Raises ValueError for values out of range. Source: fastai 0.7's `use_clr`; Smith 2015 (arXiv 1506.01186).

    >>> [round(lr, 3) for lr in CircularLR(32, 5).values(15)["lr"]][::3]
    [0.031, 1.0, 0.758, 0.516, 0.273]
    """

    div: float = 10.0
    cut_div: float = 10.0
    _: KW_ONLY
    n_cycles: int = 1
    cycle_mult: int = 1
    moms: Moms = None

    def __post_init__(self) -> None:
        check_div("div", self.div)
        check_number("cut_div", self.cut_div, minimum=1)
        check_cycles(self.n_cycles, self.cycle_mult)
        own_momentum(self, self.moms)

    def check_steps(self, n_steps: int) -> None:
        _, shortest = shapes.cycle_at(0, n_steps, self.n_cycles, self.cycle_mult)
        if shortest < self.cut_div:
            warnings.warn(f"a cycle of {shortest} steps is shorter than cut_div={self.cut_div:g}: its rise takes one "
                          "step instead of none. Lower cut_div or train longer cycles.", stacklevel=2)

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        at, length = shapes.cycle_at(step, n_steps, self.n_cycles, self.cycle_mult)
        if hyper == "lr":
            return shapes.circular(at, length, self.div, self.cut_div)
        return shapes.circular_momentum(at, length, self.cut_div, *(self.moms or ()))


@dataclass(frozen=True)
class CircularLRBeta(Scheduler):
    """fastai 0.7's first 1cycle: a symmetric triangle from peak/div, then a linear tail down to peak/(100*div).

    div: > 0. pct: the tail's share of the cycle in percent, 0..100. n_cycles, cycle_mult, moms: as in `CircularLR`.
    Raises ValueError for values out of range. Source: fastai 0.7's `use_clr_beta`; Smith 2018 (arXiv 1803.09820).

    >>> [round(lr, 3) for lr in CircularLRBeta(10, 10).values(20)["lr"]][::9]
    [0.1, 1.0, 0.1]
    """

    div: float = 10.0
    pct: float = 10.0
    _: KW_ONLY
    n_cycles: int = 1
    cycle_mult: int = 1
    moms: Moms = None

    def __post_init__(self) -> None:
        check_div("div", self.div)
        check_number("pct", self.pct, minimum=0, maximum=100)
        check_cycles(self.n_cycles, self.cycle_mult)
        own_momentum(self, self.moms)

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        at, length = shapes.cycle_at(step, n_steps, self.n_cycles, self.cycle_mult)
        if hyper == "lr":
            return shapes.circular_beta(at, length, self.div, self.pct)
        return shapes.circular_beta_momentum(at, length, self.pct, *(self.moms or ()))


@dataclass(frozen=True)
class OneCycle(Scheduler):
    """One half-cosine up from peak/div_factor to the peak, one down to peak/final_div; the momentum the other way.

    max_lr: the peak, in every form of a learning rate; None: the fit's. div_factor, final_div: > 0; final_div None is
    div_factor * 1e4. pct_start: the rise's share of the steps, 0..1. moms: (start, peak), (start, peak, end) or one
    number, each in [0, 1); None leaves the momentum alone. The peak is hit exactly, at step
    max(1, floor(n_steps * pct_start)); the end is approached and not reached. Raises ValueError for values out of
    range. Source: Smith 2018 (arXiv 1803.09820) in fastai 1's form.

    >>> [round(lr, 6) for lr in OneCycle(0.1).values(10)["lr"]][::3]
    [0.004, 0.1, 0.061126, 0.004952]
    """

    max_lr: Any = None
    div_factor: float = 25.0
    pct_start: float = 0.3
    _: KW_ONLY
    final_div: float | None = None
    moms: Moms = (0.95, 0.85)

    def __post_init__(self) -> None:
        if self.max_lr is not None:
            object.__setattr__(self, "max_lr", check_lr("max_lr", self.max_lr))
        check_div("div_factor", self.div_factor)
        check_number("pct_start", self.pct_start, minimum=0, maximum=1)
        if self.final_div is not None:
            check_div("final_div", self.final_div)
        own_momentum(self, self.moms, counts=(2, 3))

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        if hyper == "lr":
            return shapes.one_cycle(step, n_steps, self.div_factor, self.pct_start, self.final_div)
        return shapes.one_cycle_momentum(step, n_steps, self.pct_start, self.moms or ())


@dataclass(frozen=True)
class CosineAnnealing(Scheduler):
    """Cosine annealing with warm restarts: each cycle falls from the peak towards 0.

    n_cycles, cycle_mult: ints >= 1; cycle c is cycle_mult**c times as long as the first. warmup_frac: the share of
    the first cycle that runs at peak/100, 0..1 (at least one step unless 0). Raises ValueError for values out of
    range. Source: SGDR (arXiv 1608.03983) as in fastai 0.7.

    >>> [round(lr, 3) for lr in CosineAnnealing(n_cycles=2, warmup_frac=0).values(8)["lr"]]
    [1.0, 0.854, 0.5, 0.146, 1.0, 0.854, 0.5, 0.146]
    """

    n_cycles: int = 1
    cycle_mult: int = 1
    warmup_frac: float = 0.05

    def __post_init__(self) -> None:
        check_cycles(self.n_cycles, self.cycle_mult)
        check_number("warmup_frac", self.warmup_frac, minimum=0, maximum=1)

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        return shapes.cosine_restarts(step, n_steps, self.n_cycles, self.cycle_mult, self.warmup_frac)


@dataclass(frozen=True)
class FlatCos(Scheduler):
    """The peak for `pct_start` of the steps (0..1), then a half-cosine towards peak/div_final (> 0).

    Raises ValueError for values out of range. Source: fastai 2's fit_flat_cos.

    >>> [round(lr, 3) for lr in FlatCos().values(8)["lr"]][5:]
    [1.0, 1.0, 0.5]
    """

    pct_start: float = 0.75
    div_final: float = 1e5

    def __post_init__(self) -> None:
        check_number("pct_start", self.pct_start, minimum=0, maximum=1)
        check_div("div_final", self.div_final)

    def value(self, hyper: str, step: int, n_steps: int) -> float:
        return shapes.flat_cosine(step, n_steps, self.pct_start, self.div_final)


def check_cycles(n_cycles: int, cycle_mult: int) -> None:
    """Raise ValueError for numbers of cycles that are no ints >= 1, or for more than can be counted."""
    n_cycles, cycle_mult = check_int("n_cycles", n_cycles), check_int("cycle_mult", cycle_mult)
    if cycle_mult > 1 and (n_cycles > MOST.bit_length() or n_units(n_cycles, cycle_mult) > MOST):
        raise ValueError(f"n_cycles={n_cycles} cycles, each cycle_mult={cycle_mult} times as long as the one before, "
                         "are more than can be counted.")


def check_div(name: str, value: Any) -> None:
    """Raise ValueError unless the peak can be divided by `value`."""
    if check_number(name, value, above=0) * MOST_TIMES < 1:
        raise ValueError(f"{name} must be at least {1 / MOST_TIMES:g}, got {quoted(value)}.")


def _check_fraction(name: str, value: Any, **least: Any) -> None:
    if check_number(name, value, **least) > MOST_TIMES:
        raise ValueError(f"{name} must be at most {MOST_TIMES:g} times the peak, got {quoted(value)}.")
