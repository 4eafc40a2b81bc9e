"""Who hears an event: found once per fit, called in order, errors told where they came from."""
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .callback import EVENTS, Callback, Cancel, CancelBatch, CancelEpoch, CancelFit, Event
from .state import State

# Where each cancel has a meaning: between the event that its scope begins with and the one that it ends with.
_BATCH = ("before_batch", "after_pred", "after_loss", "after_backward", "before_step")
_EPOCH = (*_BATCH, "before_epoch", "after_step", "after_batch", "before_validate", "before_valid_batch",
          "after_valid_batch", "after_validate")
_MEANT_FOR = {CancelBatch: _BATCH, CancelEpoch: _EPOCH, CancelFit: (*_EPOCH, "before_fit", "after_epoch")}


class Emitter:
    """`emit(Callback.after_loss)` calls the callbacks that override it: found once per fit, in their order."""

    def __init__(self, callbacks: Iterable[Callback], state: State) -> None:
        self.state, self.callbacks = state, sorted(callbacks, key=lambda cb: cb.order)
        self.hooks: dict[Event, tuple[Any, ...]] = {}
        for name, event in EVENTS.items():
            hooks = [getattr(cb, name) for cb in self.callbacks]
            self.hooks[event] = tuple(hook for hook in hooks if getattr(hook, "__func__", hook) is not event)

    def evaluating(self) -> ExitStack:
        """The block in which the model is looked at: what callbacks change for it is put back at its end."""
        return evaluating(self.callbacks, self.state.model)

    def __call__(self, event: Event) -> None:
        """Call every hook of `event`. An exception keeps its type and gains a note that says where it came from."""
        for hook in self.hooks[event]:
            try:
                hook(self.state)
            except Exception as error:
                self._explain(event, hook, error)
                raise

    @contextmanager
    def fit(self) -> Iterator[None]:
        """`before_fit` of all; at the end `after_fit`, last first, of all that came. Raises the first failure."""
        opened: list[Callback] = []
        failure: BaseException | None = None
        try:
            for cb in self.callbacks:
                self._call(Callback.before_fit, cb)
                opened.append(cb)
            yield
        except BaseException as error:
            failure = error
        for cb in reversed(opened):
            try:
                self._call(Callback.after_fit, cb)
            except BaseException as error:
                if failure is None or isinstance(failure, Cancel):
                    failure = error
                else:
                    failure.add_note(f"and then {type(cb).__name__}.after_fit failed: {error!r}")
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # its traceback holds this frame: a cycle, in which the state would live on

    def _call(self, event: Event, cb: Callback) -> None:
        hook = getattr(cb, event.__name__)
        try:
            hook(self.state)
        except Exception as error:
            self._explain(event, hook, error)
            raise

    def _explain(self, event: Event, hook: Any, error: Exception) -> None:
        owner = type(getattr(hook, "__self__", hook)).__name__
        where = f"in {owner}.{event.__name__}: epoch {self.state.epoch}, step {self.state.step}"
        if not isinstance(error, Cancel):
            return error.add_note(where)
        meant_for = next((names for kind, names in _MEANT_FOR.items() if isinstance(error, kind)), ())
        if event.__name__ not in meant_for:
            wrong = RuntimeError(f"{type(error).__name__} has no meaning in {event.__name__}: raise it in one of "
                                 f"{', '.join(name for name in EVENTS if name in meant_for)}.")
            wrong.add_note(where)
            raise wrong from error


def evaluating(callbacks: Iterable[Callback], model: nn.Module) -> ExitStack:
    """Enters `evaluating(model)` of all `callbacks`; a context manager that leaves them in reverse."""
    with ExitStack() as stack:
        for cb in callbacks:
            if type(cb).evaluating is not Callback.evaluating:
                stack.enter_context(_explained(cb, model))
        return stack.pop_all()


@contextmanager
def _explained(cb: Callback, model: nn.Module) -> Iterator[None]:
    """`cb.evaluating(model)`; an exception of its own gains a note, one from inside the block has its own."""
    where = f"in {type(cb).__name__}.evaluating"
    inside: BaseException | None = None
    try:
        with cb.evaluating(model):
            try:
                yield
            except BaseException as error:
                inside = error
                raise
    except Cancel as error:
        if error is inside:
            raise
        raise RuntimeError(f"{type(error).__name__} has no meaning {where}: raise it in an event.") from error
    except Exception as error:
        if error is not inside:
            error.add_note(where)
        raise
    finally:
        del inside  # its traceback holds this frame
