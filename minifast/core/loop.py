"""The training loop, on one screen.

Deliberately absent, because every batch would pay for it:
- reading a number from the device (`.item()`, `.cpu()`, `float(loss)`): losses stay there until someone looks
- looking up who listens: the Emitter binds that once per fit, so an event that nobody hears costs one call
- schedules, records, the bar: callbacks. A schedule is a few float operations, the bar looks at the clock
- context managers, copies of the state, questions about types that were answered for the first batch
"""
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import torch

from ..base.batch import Batch
from .callback import Callback, CancelBatch, CancelEpoch, CancelFit
from .emitter import Emitter
from .gradient import compute_loss, forward
from .guard import guarded
from .passes import training_pass, validation_pass
from .state import State


def run(state: State, emitter: Callable[[Sequence[Callback], State], Emitter] = Emitter) -> None:
    """Train and validate for all epochs of the fit, emitting every event of `Callback` in its order."""
    emit = emitter(state.callbacks, state)
    with guarded(state), suppress(CancelFit), emit.fit():  # before_fit ... after_fit
        for state.epoch in state.epochs():
            with suppress(CancelEpoch):
                emit(Callback.before_epoch)
                train(state, emit)
                if state.valid_sets:
                    validate(state, emit)
            emit(Callback.after_epoch)


def train(state: State, emit: Emitter) -> None:
    """One pass over the training data: a weight update for every `state.accumulate` batches."""
    with training_pass(state) as batches:  # in training mode, with a new window
        for state.batch_index, state.batch in batches:
            try:
                if not state.window.admits(state.batch_index):
                    raise CancelBatch
                emit(Callback.before_batch)
                state.gradient(state, emit, state.window)  # `add_gradient` of gradient.py, unless a callback wraps it
                if state.window.is_full:
                    step(state, emit)
            except CancelBatch:
                state.window.drop()
            emit(Callback.after_batch)
            if state.ends():
                break
        if state.window.is_open:  # the epoch ended before its loader said it would
            with suppress(CancelBatch):
                step(state, emit)


def step(state: State, emit: Emitter) -> None:
    """One weight update."""
    state.step_loss, state.step_weight = state.window.close(), state.window.weight
    emit(Callback.before_step)
    state.update()  # does what `opt.step()` does: see optim/fused.py
    try:
        emit(Callback.after_step)
    finally:  # the weights have moved, even if a callback ends the epoch here
        state.window.end()
        state.step += 1


@torch.no_grad()
def validate(state: State, emit: Emitter) -> None:
    """One pass over every validation set, in eval mode, without gradients."""
    state.model.eval()
    with emit.evaluating():
        emit(Callback.before_validate)
        for state.valid_set, loader in state.valid_sets:
            validate_set(state, emit, loader)
    emit(Callback.after_validate)


def validate_set(state: State, emit: Emitter, loader: Iterable[Batch]) -> None:
    """One pass over one validation set."""
    with validation_pass(state, loader) as batches:
        for state.batch_index, state.batch in batches:
            emit(Callback.before_valid_batch)
            forward(state)
            compute_loss(state)
            emit(Callback.after_valid_batch)
            state.interrupt.check()
