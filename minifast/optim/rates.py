"""Learning rates in every form: checked, and spread over the layer groups."""
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import check_number, quoted

LARGEST_LR = 1e30  # what a schedule multiplies it by is at most 1e8: a float32 holds that
LR = float | slice | Sequence[float]  # slices hold floats


def check_lr(name: str, lr: Any) -> Any:
    """`lr` in one of its forms, checked: a float, a slice, or a tuple of floats.

    Raises ValueError for anything that is not finite and > 0, and for a slice that falls.

    >>> check_lr("lr", [1, 2])
    (1.0, 2.0)
    """
    if isinstance(lr, slice):
        if lr.step is not None or lr.stop is None:
            raise ValueError(f"{name} must be slice(hi) or slice(lo, hi), got {lr!r}.")
        hi = check_rate(f"{name}=slice(...) end", lr.stop)
        lo = None if lr.start is None else check_rate(f"{name}=slice(...) start", lr.start)
        if lo is not None and lo > hi:
            raise ValueError(f"{name}=slice(lo, hi) must rise from the first layers to the last, got "
                             f"slice({lo:g}, {hi:g}). Swap the two.")
        return slice(lo, hi)
    if isinstance(lr, (list, tuple)) or (getattr(lr, "ndim", 0) == 1 and not isinstance(lr, type)):
        values = tuple(check_rate(f"{name}[{i}]", value) for i, value in enumerate(lr))
        if values:
            return values
        raise ValueError(f"{name} must hold at least one learning rate, got none.")
    return check_rate(name, lr, example=f"{name}=1e-3 or slice(1e-5, 1e-3)")


def check_rate(name: str, value: Any, example: str = "") -> float:
    """`value` as one learning rate: a finite float > 0 that is not absurd."""
    rate = check_number(name, value, above=0, example=example)
    if rate > LARGEST_LR:
        raise ValueError(f"{name} must be at most {LARGEST_LR:g}, got {quoted(value)}.")
    return rate


def spread_lrs(lr: Any, groups: int | Sequence[str], name: str = "lr") -> tuple[float, ...]:
    """One learning rate per layer group, first layers first.

    lr: a float for all groups; slice(hi): hi for the last, hi/10 for the others; slice(lo, hi): geometric from lo to
        hi; a sequence of one value per group.
    groups: their number or names.

    Raises ValueError as `check_lr` does, and for a sequence of another length.

    >>> [round(lr, 6) for lr in spread_lrs(slice(1e-4, 1e-2), 3)]
    [0.0001, 0.001, 0.01]
    """
    lr, n = check_lr(name, lr), groups if isinstance(groups, int) else len(groups)
    if isinstance(lr, slice):
        if lr.start is None:
            return (lr.stop / 10,) * (n - 1) + (lr.stop,)
        ratio = lr.stop / lr.start
        return (*(lr.start * ratio ** (k / (n - 1)) for k in range(n - 1)), lr.stop)
    lr = (lr,) if isinstance(lr, float) else lr
    if len(lr) not in (1, n):
        names = "" if isinstance(groups, int) else f" ({', '.join(groups)})"
        raise ValueError(f"{name} holds {len(lr)} learning rates for {n} layer group{'s' * (n > 1)}{names}: pass "
                         f"one float, slice(lo, hi) or {n} value{'s' * (n > 1)}.")
    return tuple(lr) if len(lr) == n else tuple(lr) * n


def as_written(lr: Any) -> str:
    """A learning rate in any form, as people write it: 0.003, slice(1e-05, 0.001), [0.001, 0.01]."""
    if isinstance(lr, slice):
        return f"slice({lr.stop:.4g})" if lr.start is None else f"slice({lr.start:.4g}, {lr.stop:.4g})"
    if isinstance(lr, Iterable) and getattr(lr, "ndim", 1) != 0:
        return f"[{', '.join(f'{value:.4g}' for value in lr)}]"
    return f"{lr:.4g}"
