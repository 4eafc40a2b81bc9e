"""Checks of what users pass in: each failure says what was given, what is expected and what to do."""
import numbers
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def check_int(name: str, value: Any, minimum: int = 1, example: str = "") -> int:
    """`value` as an int >= `minimum`.

    Raises ValueError for a bool, a float (even 2.0), text or a smaller number.

    >>> check_int("n_cycle", 3)
    3
    >>> check_int("n_cycle", 1.5, example="fit(0.1, 2)")
    Traceback (most recent call last):
    ValueError: n_cycle must be an int >= 1, got 1.5 (float). Pass e.g. fit(0.1, 2).
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= minimum:
        return int(value)
    raise ValueError(f"{name} must be an int >= {minimum}, got {shown(value)}.{_hint(example)}")


def check_number(name: str, value: Any, *, above: float | None = None, minimum: float | None = None,
                 maximum: float | None = None, below: float | None = None, example: str = "") -> float:
    """`value` as a finite float within the bounds; 0-dimensional arrays and tensors without gradient count as numbers.

    Raises ValueError otherwise.

    >>> check_number("lr", 1, above=0)
    1.0
    >>> check_number("lr", float("nan"), above=0, example="lr=1e-3")
    Traceback (most recent call last):
    ValueError: lr must be a finite number > 0, got nan (float). Pass e.g. lr=1e-3.
    """
    number = value
    if getattr(value, "ndim", None) == 0 and not getattr(value, "requires_grad", False) and hasattr(value, "item"):
        number = value.item()
    is_real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    ok = is_real and -sys.float_info.max <= number <= sys.float_info.max  # neither inf nor nan, nor an int beyond them
    if ok and (above is None or number > above) and (minimum is None or number >= minimum) \
            and (maximum is None or number <= maximum) and (below is None or number < below):
        return float(number)
    bounds = [f"{sign} {bound:g}" for sign, bound in ((">", above), (">=", minimum), ("<=", maximum), ("<", below))
              if bound is not None]
    wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()
    raise ValueError(f"{name} must be {wanted}, got {shown(value)}.{_hint(example)}")


def check_flag(name: str, value: Any) -> bool:
    """`value` if it is True or False; raises TypeError otherwise.

    >>> check_flag("stop_div", True)
    True
    """
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} must be True or False, got {shown(value)}.")


def check_same_names(what: str, saved: Sequence[str], own: Sequence[str]) -> None:
    """Raises ValueError if a saved record is of other layers than this fit's."""
    if list(saved) != list(own):
        raise ValueError(f"the saved record is of other {what} ({', '.join(saved)}) than this fit's "
                         f"({', '.join(own)}): resume with the same model and the same arguments.")


def shown(value: Any) -> str:
    """A value and its type, for messages."""
    return f"{value!r:.200} ({type(value).__name__})"


def _hint(example: str) -> str:
    return f" Pass e.g. {example}." if example else ""


@contextmanager
def torchvision_errors() -> Iterator[None]:
    """A block that imports torchvision: whatever stands in the way is an ImportError that says what to do."""
    try:
        yield
    except (ImportError, RuntimeError, AttributeError, OSError) as error:  # what it meets first where it does not fit
        try:
            found = version("torchvision")
        except PackageNotFoundError:
            raise ImportError("this takes torchvision, which is not installed: pip install torchvision") from error
        reason = str(error).partition("\n")[0]
        raise ImportError(f"torchvision {found} does not work with torch {version('torch')} ({reason:.100}): reinstall "
                          "both from one index") from error
