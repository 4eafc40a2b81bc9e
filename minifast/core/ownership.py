"""Which callbacks a fit runs: checked, without duplicates, one owner for each hyper-parameter and each role."""
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from ..errors import check_items, quoted
from .callback import Callback
from .state import State

# Roles: of each, a fit has one callback that owns it.
CHECKPOINTS = "the checkpoints"  # keeps the fit over a kill
FINITE_CHECK = "the finite check"  # refuses updates that are not finite


class FiniteCheck(Protocol):
    """What others ask of the callback that refuses updates which are not finite: see `FiniteLoss`."""

    def check(self, state: State) -> None: ...
    def check_gradient(self, state: State, norm: Tensor) -> None: ...
    @property
    def to_zero(self) -> Tensor | None: ...


def check_callbacks(callbacks: Any, where: str) -> list[Callback]:
    """`callbacks` as a new list. Raises TypeError for what is no callback instance."""
    if isinstance(callbacks, Callback):
        return [callbacks]
    checked = check_items(where, callbacks, "a list of callbacks")
    for callback in checked:
        if isinstance(callback, type):
            raise TypeError(f"{where} must hold callbacks, but {callback.__name__} is a class: pass an instance, did "
                            f"you mean {callback.__name__}(...)?")
        if not isinstance(callback, Callback):
            raise TypeError(f"{where} must hold callbacks, got {quoted(callback)}. Subclass minifast.Callback.")
    return checked


def resolve(learners: Sequence[Callback], fits: Sequence[Callback]) -> list[Callback]:
    """The callbacks of one fit: the learner's, then the fit's own.

    A callback of the fit that owns a hyper-parameter takes the place of the learner's owner of it. Raises ValueError
    for the same instance twice, and for two owners of one hyper-parameter where neither takes the other's place.
    """
    taken = {hyper for callback in fits for hyper in callback.owns}
    callbacks = [callback for callback in learners if not taken & set(callback.owns)] + list(fits)
    owners: dict[str, Callback] = {}
    for i, callback in enumerate(callbacks):
        if any(callback is other for other in callbacks[:i]):
            raise ValueError(f"the same callback is given twice: {callback!r:.200}. Make a second one if you want two.")
        for hyper in callback.owns:
            if hyper in owners:
                raise ValueError(f"both {owners[hyper]!r:.200} and {callback!r:.200} set {hyper!r}, one would "
                                 "overwrite the other. Leave one of them out.")
            owners[hyper] = callback
    return callbacks


def owner_of(hyper: str, callbacks: Iterable[Callback]) -> Callback | None:
    """The callback that sets `hyper`, if any."""
    return next((callback for callback in callbacks if hyper in callback.owns), None)


def finite_check(callbacks: Iterable[Callback]) -> FiniteCheck | None:
    """The callback that refuses what is not finite; None in a fit that does without."""
    owner = owner_of(FINITE_CHECK, callbacks)
    return cast(FiniteCheck, owner) if hasattr(owner, "check_gradient") else None
