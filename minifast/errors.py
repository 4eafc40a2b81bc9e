"""Errors of their own kind, and checks of what users pass in: what was given, what is expected, what to do."""
import numbers
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

LARGEST = 3.4e38  # a float32 holds no more
MOST = sys.maxsize  # Python's len() and torch count no further


class NonFiniteLoss(ValueError):
    """The loss of an update is NaN or infinite; the update was not made. Raised by `FiniteLoss`."""


class NonFiniteGradient(ValueError):
    """A gradient that was to be clipped is NaN or infinite; the update was not made. Raised with `GradientClip`."""


def check_int(name: str, value: Any, minimum: int = 1, maximum: int = MOST, *, example: str = "") -> int:
    """`value` as an int within the bounds. Raises ValueError otherwise, for a bool and a float (even 2.0) too.

    >>> check_int("n_cycle", 1.5, example="fit(0.1, 2)")
    Traceback (most recent call last):
    ValueError: n_cycle must be an int >= 1, got 1.5 (float). Pass e.g. fit(0.1, 2).
    """
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if is_int and minimum <= int(value) <= maximum:
        return int(value)
    bounds = f">= {minimum}" + (f" and <= {maximum}" if maximum != MOST or (is_int and value > maximum) else "")
    raise ValueError(f"{name} must be an int {bounds}, got {quoted(value)}.{_hint(example)}")


def check_number(name: str, value: Any, *, above: float | None = None, minimum: float | None = None,
                 maximum: float | None = None, below: float | None = None, example: str = "") -> float:
    """`value` as a finite float within the bounds; 0-dimensional arrays and tensors without gradient count as numbers.

    >>> check_number("lr", 1, above=0)
    1.0
    >>> check_number("lr", float("nan"), above=0, example="lr=1e-3")
    Traceback (most recent call last):
    ValueError: lr must be a finite number > 0, got nan (float). Pass e.g. lr=1e-3.
    """
    number = value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not (
            isinstance(value, torch.Tensor) and (value.requires_grad or value.is_meta)):
        number = value.item()
    is_real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    is_finite = is_real and -LARGEST <= number <= LARGEST
    if is_finite and (above is None or number > above) and (minimum is None or number >= minimum) \
            and (maximum is None or number <= maximum) and (below is None or number < below):
        return float(number)
    bounds = [f"{sign} {bound:g}" for sign, bound in ((">", above), (">=", minimum), ("<=", maximum), ("<", below))
              if bound is not None]
    if is_real and LARGEST < abs(number) < float("inf"):
        bounds.append(f"of at most {LARGEST:g}")
    wanted = f" {' and '.join(bounds)}" if bounds else ""
    raise ValueError(f"{name} must be a finite number{wanted}, got {quoted(value)}.{_hint(example)}")


def check_flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} must be True or False, got {quoted(value)}.")


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> Any:
    """`value` if it is one of `choices`, texts or None; raises ValueError that lists them otherwise."""
    if (value is None or isinstance(value, str)) and value in choices:
        return value
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {quoted(value)}.")


def check_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"{name} must be text, got {quoted(value)}.")


def check_path(name: str, path: Any) -> str:
    """`path` as text: `open` would take True for the file number 1, the output of the program, and close it."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path, got {quoted(path)}.")
    if not text:
        raise ValueError(f"{name} must be a path, got an empty one.")
    return text


def check_callable(name: str, value: Any, form: str, example: str = "") -> Callable[..., Any]:
    """`value` if it can be called; `form`: what it is to be, for the TypeError."""
    if callable(value):
        return value  # type: ignore[no-any-return]
    raise TypeError(f"{name} must be {form}, got {quoted(value)}.{_hint(example)}")


def check_items(name: str, values: Any, form: str, example: str = "") -> list[Any]:
    """What `values` holds, as a new list. Raises TypeError for text and for what cannot be iterated."""
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, bytearray, type)):
        try:
            return list(values)
        except TypeError:  # tensors and arrays without dimensions call themselves iterable
            pass
    raise TypeError(f"{name} must be {form}, got {quoted(values)}.{_hint(example)}")


def check_device(device: Any) -> torch.device:
    """`device` as torch knows it, with its index. Raises ValueError for one that cannot be used here."""
    try:
        if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
            raise TypeError("it is no name, no number and no torch.device")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        given = repr(device) if isinstance(device, (str, torch.device)) else quoted(device)
        raise ValueError(f"device={given:.80} cannot be used: {error}. Pass e.g. 'cpu' or 'cuda'.") from error


def check_same_names(what: str, saved: Sequence[str], own: Sequence[str]) -> None:
    """Raises ValueError if a saved record is of other layers than this fit's."""
    if list(saved) != list(own):
        raise ValueError(f"the saved record is of other {what} ({', '.join(saved)}) than this fit's "
                         f"({', '.join(own)}): resume with the same model and the same arguments.")


def quoted(value: Any) -> str:
    """`value` and its type, for messages, on one line.

    >>> quoted(torch.zeros(2, 2))
    'tensor([[0., 0.], [0., 0.]]) (Tensor)'
    """
    text = re.sub(r"\n\s*", " ", repr(value))  # arrays break their lines
    return f"{text:.200} ({type(value).__name__})"


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
