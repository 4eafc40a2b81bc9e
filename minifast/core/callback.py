"""The callback protocol: the events in their order, and how a callback ends things early.

`Callback` and `State` know each other, on purpose: the one circle between files of minifast (see state.py).
"""
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from enum import IntEnum
from typing import Any, ClassVar

from torch import nn

from ..base import snapshot
from .state import State


class Cancel(Exception):
    """A request, not an error: skip to the matching `after_` event."""


class CancelBatch(Cancel):
    """Drop this batch: no step, and its gradients reach no other. Inside an accumulation window: drop the window."""


class CancelEpoch(Cancel):
    """End this epoch: no more batches, no validation."""


class CancelFit(Cancel):
    """End the fit."""


class Order(IntEnum):
    """When a callback hears an event: lower first, list order within a band. `after_fit` runs in reverse."""

    SETUP = 0  # recording and metrics: what others read in the same event
    HYPER = 100  # schedules
    USER = 200  # the default
    RECORD = 300  # progress and loggers: what looks at the result


class _FormerName:
    """`sets`, as `owns` was called before: callbacks that were written with it work as they did."""

    def __get__(self, callback: "Callback | None", kind: "type[Callback]") -> tuple[str, ...]:
        return (kind if callback is None else callback).owns

    def __set__(self, callback: "Callback", value: tuple[str, ...]) -> None:
        object.__setattr__(callback, "owns", value)  # as frozen dataclasses allow it


class Callback:
    """Override any event; the others cost nothing. In the order they happen:

        before_fit
        | before_epoch
        | | before_batch   after_pred   after_loss   after_backward      of each training (micro-)batch
        | | before_step   after_step                                     of each weight update
        | | after_batch                                                  of each training batch, cancelled ones too
        | | before_validate
        | | | before_valid_batch   after_valid_batch
        | | after_validate
        | after_epoch
        after_fit                                                        always, last callback first

    A batch that was cancelled has left in the state what the one before it put there (`pred`, `loss`, ...).

    >>> class Stop(Callback):
    ...     def after_bacth(self, state): ...
    Traceback (most recent call last):
    TypeError: Stop.after_bacth is not an event: did you mean after_batch?
    """

    order: int = Order.USER
    owns: tuple[str, ...] = ()  # the hyper-parameters it writes ("lr", ...) and its roles: one owner each in a fit
    sets: Any = _FormerName()
    in_lr_find: ClassVar[bool] = False  # whether it also runs inside `lr_find`
    in_sandbox: bool = True  # False: it writes what a sandbox cannot undo, so `check`, `trace`, `profile` leave it out
    saves: ClassVar[tuple[str, ...]] = ()  # the attributes to keep over a kill

    def before_fit(self, state: State) -> None: """Check settings, take snapshots."""
    def before_epoch(self, state: State) -> None: """`state.epoch` is new."""
    def before_batch(self, state: State) -> None: """Write hyper-parameters; may replace `state.batch`."""
    def after_pred(self, state: State) -> None: """`state.pred` is new."""
    def after_loss(self, state: State) -> None: """`state.loss` is new and still has its graph."""
    def after_backward(self, state: State) -> None: """The gradients of this micro-batch were added."""
    def before_step(self, state: State) -> None: """Once per update, gradients averaged over its window: clip here."""
    def after_step(self, state: State) -> None: """Once per update: the weights have moved, `step_loss` is new."""
    def after_batch(self, state: State) -> None: """Every training batch, cancelled ones too."""
    def before_validate(self, state: State) -> None: """The model is in eval mode."""
    def before_valid_batch(self, state: State) -> None: """May replace `state.batch`."""
    def after_valid_batch(self, state: State) -> None: """`pred`, `target` and `loss` of one validation batch."""
    def after_validate(self, state: State) -> None: """`state.metrics` is complete."""
    def after_epoch(self, state: State) -> None: """Every epoch, cancelled ones too."""
    def after_fit(self, state: State) -> None: """However the fit ended, last callback first: undo `before_fit`."""

    def evaluating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Entered around every validation, with its `before_validate`, and every prediction if it is the Learner's."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Copies of the attributes named in `saves`: tensors, numbers, text, None, and lists and dicts of them.

        To go on where a fit was killed, a callback that is made with the same arguments hears `before_fit`, with
        `state.step` and `state.epoch` where the fit goes on, and then `load_state_dict`.
        """
        return {name: snapshot.clone(getattr(self, name)) for name in self.saves if hasattr(self, name)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; an attribute that did not exist then is gone again."""
        if saved and self.saves and saved.keys().isdisjoint(self.saves):
            raise ValueError(f"this is not the state of {self!r:.200}: it holds {', '.join(map(repr, saved))}, "
                             f"expected {', '.join(map(repr, self.saves))}.")
        for name in self.saves:
            vars(self).pop(name, None)
            if name in saved:
                setattr(self, name, snapshot.clone(saved[name]))

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("owns", "sets", "saves"):
            if isinstance(given := vars(cls).get(name), str):
                raise TypeError(f"{cls.__name__}.{name} must be a tuple of names, got {given!r}: write ({given!r},) "
                                "with a comma.")
        if "sets" in vars(cls):
            cls.owns = vars(cls)["sets"]
            del cls.sets
        for name, member in vars(cls).items():
            if callable(member):
                _check_event(cls.__name__, name, member)


Event = Callable[[Callback, State], None]
EVENTS: dict[str, Event] = {name: f for name, f in vars(Callback).items() if name.startswith(("before_", "after_"))}


def _check_event(owner: str, name: str, member: Any) -> None:
    if name in EVENTS:
        try:
            inspect.signature(member).bind("self", "state")
        except TypeError:
            raise TypeError(f"{owner}.{name}{inspect.signature(member)} must take (self, state).") from None
        if inspect.iscoroutinefunction(member) or inspect.isgeneratorfunction(member):
            raise TypeError(f"{owner}.{name} must be a plain function: a coroutine or generator would never run.")
    elif name.startswith(("before_", "after_")) or (name[0] != "_" and get_close_matches(name, EVENTS, 1, cutoff=0.9)):
        near = get_close_matches(name, EVENTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the events are {', '.join(EVENTS)}."
        raise TypeError(f"{owner}.{name} is not an event: {hint}")
