"""The training loop, on one screen.

Deliberately absent, because it would cost every batch: reading a number from the device (`.item()`, `.cpu()`,
`float(loss)`), looking up who listens (bound once per fit), a progress bar and schedules (both are callbacks).
"""
from contextlib import closing, suppress

import torch

from . import snapshot
from .batches import call_model, describe, n_samples
from .callback import Callback, CancelBatch, CancelEpoch, CancelFit, Emitter
from .checks import check_loss, check_passes, check_target
from .data import feed
from .state import State
from .window import Window


def run(state: State) -> None:
    """Train and validate for `state.n_epochs`, emitting every event of `Callback` in its order."""
    emit = Emitter(state.callbacks, state)
    restore_modes = snapshot.modes(state.model)
    with state.interrupt:
        try:
            with suppress(CancelFit), emit.fit():  # before_fit ... after_fit
                for epoch in range(state.n_epochs):
                    state.interrupt.check()
                    state.epoch = epoch
                    with suppress(CancelEpoch):
                        emit(Callback.before_epoch)
                        train(state, emit)
                        if state.valid_dl is not None:
                            validate(state, emit)
                    emit(Callback.after_epoch)
        finally:
            state.opt.zero_grad()
            restore_modes()


def train(state: State, emit: Emitter) -> None:
    """One pass over the training data: a weight update for every `state.accumulate` batches."""
    state.model.train()
    for norm in state.norms_in_eval:
        norm.eval()
    state.batch_index = -1
    window = Window(state.opt, state.accumulate, state.n_batches)
    batches = feed(state.train_dl, state.device, state.max_batches, state.interrupt,
                   f"epoch {state.epoch}, training data")
    with closing(batches):
        for index, batch in enumerate(batches):
            state.batch_index, state.batch = index, batch
            try:
                if not window.admits(state.batch_index):
                    raise CancelBatch
                emit(Callback.before_batch)
                forward(state)
                emit(Callback.after_pred)
                compute_loss(state)
                emit(Callback.after_loss)
                window.backward(state.loss, state.n_samples)
                emit(Callback.after_backward)
                if window.is_full:
                    step(state, emit, window)
            except CancelBatch:
                window.drop()
            emit(Callback.after_batch)
            state.interrupt.check()
    if window.is_open:  # the loader ended before it said it would
        with suppress(CancelBatch):
            step(state, emit, window)
    check_passes("training", state.batch_index + 1, state.n_batches)


def forward(state: State) -> None:
    """The model's output for `state.batch`."""
    inputs, state.target = state.unpack(state.batch)
    state.n_samples = n_samples(state.target, inputs)
    try:
        state.pred = call_model(state.model, inputs)
    except Exception as error:
        error.add_note(f"in the model: epoch {state.epoch}, step {state.step}, inputs {describe(inputs)}")
        raise


def compute_loss(state: State) -> None:
    """The loss of `state.pred`; the first one of an epoch is looked at before it is trusted."""
    is_first = state.batch_index == 0
    if is_first:
        check_target(state.pred, state.target, state.loss_func)
    try:
        state.loss = state.loss_func(state.pred, state.target)
    except Exception as error:
        error.add_note(f"in the loss: epoch {state.epoch}, step {state.step}, output {describe(state.pred)}, "
                       f"target {describe(state.target)}")
        raise
    if is_first:
        check_loss(state.loss)


def step(state: State, emit: Emitter, window: Window) -> None:
    """One weight update."""
    state.step_loss, state.step_samples = window.close(), window.n_samples
    emit(Callback.before_step)
    state.opt.step()
    try:
        emit(Callback.after_step)
    finally:  # the weights have moved, even if a callback ends the epoch here
        window.end()
        state.step += 1


@torch.no_grad()
def validate(state: State, emit: Emitter) -> None:
    """One pass over the validation data, in eval mode, without gradients."""
    assert state.valid_dl is not None
    state.model.eval()
    state.batch_index = -1
    emit(Callback.before_validate)
    batches = feed(state.valid_dl, state.device, None, state.interrupt, f"epoch {state.epoch}, validation data")
    with closing(batches):
        for index, batch in enumerate(batches):
            state.batch_index, state.batch = index, batch
            emit(Callback.before_valid_batch)
            forward(state)
            if index == 0:
                check_target(state.pred, state.target, state.loss_func)
            state.loss = state.loss_func(state.pred, state.target)
            emit(Callback.after_valid_batch)
            state.interrupt.check()
    check_passes("validation", state.batch_index + 1)
    emit(Callback.after_validate)
