"""The words of `fit`: cycles, their lengths and `use_clr`, turned into epochs and a schedule."""
from collections.abc import Sequence

from ..errors import check_int, check_items
from . import shapes
from .lr import CircularLR, CircularLRBeta, CosineAnnealing, check_cycles
from .scheduler import Scheduler


def epochs_and_schedule(n_cycle: int, cycle_len: int | None, cycle_mult: int, use_clr: Sequence[float] | None,
                        use_clr_beta: Sequence[float] | None) -> tuple[int, Scheduler | None]:
    """How many epochs `fit` trains, and the schedule that its arguments ask for, if they do.

    Cycle c lasts `cycle_len * cycle_mult**c` epochs. Raises ValueError for numbers out of range and for arguments
    that need `cycle_len` and come without.

    >>> epochs_and_schedule(3, 1, 2, None, None)
    (7, CosineAnnealing(n_cycles=3, cycle_mult=2, warmup_frac=0.05))
    >>> epochs_and_schedule(1, 3, 1, (32, 5), None)[1]
    CircularLR(div=32, cut_div=5, n_cycles=1, cycle_mult=1, moms=None)
    """
    n_cycle = check_int("n_cycle", n_cycle, example="fit(0.01, 2)")
    cycle_mult = check_int("cycle_mult", cycle_mult)
    asked = [f"{name}={value!r}" for name, value in (("use_clr", use_clr), ("use_clr_beta", use_clr_beta))
             if value is not None]
    if len(asked) == 2:
        raise ValueError(f"{' and '.join(asked)} are two schedules for one fit: pass one of them.")
    if cycle_len is None:
        asked += [f"cycle_mult={cycle_mult}"] * (cycle_mult != 1)
        if asked:
            raise ValueError(f"{asked[0]} needs cycle_len, the number of epochs in the first cycle. "
                             f"Pass e.g. fit(lr, {n_cycle}, cycle_len=1, {asked[0]}).")
        return n_cycle, None
    cycle_len = check_int("cycle_len", cycle_len)
    n_epochs = epochs_of_cycles(cycle_len, n_cycle, cycle_mult)
    try:
        if use_clr is not None:
            div, cut_div, moms = _clr("use_clr", "(div, cut_div)", use_clr)
            return n_epochs, CircularLR(div, cut_div, n_cycles=n_cycle, cycle_mult=cycle_mult, moms=moms)
        if use_clr_beta is not None:
            div, pct, moms = _clr("use_clr_beta", "(div, pct)", use_clr_beta)
            return n_epochs, CircularLRBeta(div, pct, n_cycles=n_cycle, cycle_mult=cycle_mult, moms=moms)
    except ValueError as error:
        error.add_note(f"in {asked[0]:.200}")
        raise
    return n_epochs, CosineAnnealing(n_cycles=n_cycle, cycle_mult=cycle_mult)


def epochs_of_cycles(cycle_len: int, n_cycles: int, cycle_mult: int) -> int:
    """How many epochs `n_cycles` cycles take. Raises ValueError for more than can be counted.

    >>> epochs_of_cycles(2, 3, 2)
    14
    """
    check_cycles(n_cycles, cycle_mult)
    return check_int("cycle_len * the cycles of cycle_mult", cycle_len * shapes.n_units(n_cycles, cycle_mult))


def _clr(name: str, form: str, value: Sequence[float]) -> tuple[float, float, tuple[float, ...] | None]:
    form = f"2 numbers {form} or 4, with (mom_max, mom_min) behind"
    try:
        numbers = tuple(check_items(name, value, form))
    except TypeError:
        numbers = ()
    if len(numbers) not in (2, 4):
        raise ValueError(f"{name} takes {form}, got {value!r:.80}.")
    return numbers[0], numbers[1], numbers[2:] or None
