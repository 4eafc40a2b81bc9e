"""The training loop, on one screen.

Deliberately absent, because every batch would pay for it:
- reading a number from the device (`.item()`, `.cpu()`, `float(loss)`): losses stay there until someone looks
- looking up who listens: bound once per fit, so an event that nobody hears costs one call
- schedules, records, the bar: callbacks. A schedule is a few float operations, the bar looks at the clock
- `opt.step()`, `opt.zero_grad()`, `loss.backward()`: around their kernels they do more than the kernels (fused.py), so
  `state.update` and `Window` go past that where it makes no difference
- context managers, copies of the state, questions about types that were answered for the first batch
"""
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import count

import torch

from ..base import snapshot
from ..base.batch import Batch, call_model, n_samples
from ..base.losses import mean_and_weight
from ..base.nest import describe
from ..data.feed import feed
from ..data.loader import plain
from .callback import Callback, CancelBatch, CancelEpoch, CancelFit
from .checks import check_loss, check_passes, check_target
from .emitter import Emitter
from .state import Entry, State
from .window import Window


def run(state: State, emitter: Callable[[Sequence[Callback], State], Emitter] = Emitter) -> None:
    """Train and validate for `state.n_epochs`, emitting every event of `Callback` in its order."""
    emit = emitter(state.callbacks, state)
    restore_modes, has_gradients = snapshot.modes(state.model), torch.is_grad_enabled()
    with state.interrupt:
        try:
            with suppress(CancelFit), emit.fit():  # before_fit ... after_fit
                state.take_up(state)
                for epoch in count(state.epoch) if state.n_epochs is None else range(state.epoch, state.n_epochs):
                    state.interrupt.check()
                    state.epoch = epoch
                    with suppress(CancelEpoch):
                        if state.entry is None:  # else the fit was killed in this epoch, which has begun before
                            emit(Callback.before_epoch)
                        train(state, emit)
                        if state.valid_sets:
                            validate(state, emit)
                    emit(Callback.after_epoch)
                    if state.is_ending:
                        break
        finally:
            state.interrupt.is_held = True  # nothing stops this half way
            torch.set_grad_enabled(has_gradients)  # of a validation that was stopped at once
            state.opt.zero_grad()
            restore_modes()


def train(state: State, emit: Emitter) -> None:
    """One pass over the training data: a weight update for every `state.accumulate` batches."""
    state.model.train()
    for norm in state.norms_in_eval:
        norm.eval()
    entry, state.entry = state.entry or Entry(0, limit=state.max_batches), None
    state.batch_index = entry.n_done - 1
    window = state.window = Window(state.opt, state.accumulate, state.n_batches)
    if entry.window is not None:
        window.load_state_dict(entry.window)
    batches = feed(state.train_dl, state.device, entry.limit, state.interrupt,
                   f"epoch {state.epoch}, training data", entry.n_done, entry.iterator, state.waiting,
                   noted=partial(setattr, state, "loaded"))  # as it came: what a checkpoint compares
    with closing(batches):
        for index, batch in enumerate(batches, entry.n_done):
            state.batch_index, state.batch = index, batch
            try:
                if not window.admits(state.batch_index):
                    raise CancelBatch
                emit(Callback.before_batch)
                state.gradient(state, emit, window)
                if window.is_full:
                    step(state, emit, window)
            except CancelBatch:
                window.drop()
            emit(Callback.after_batch)
            state.interrupt.check()
            if state.is_ending:
                break
    if window.is_open:  # the epoch ended before its loader said it would
        with suppress(CancelBatch):
            step(state, emit, window)
    check_passes("training", state.batch_index + 1, None if state.is_ending or entry.is_cut else state.n_batches)


def gradient(state: State, emit: Emitter, window: Window) -> None:
    """Add the gradient of `state.batch` to the window: what `State.gradient` is unless a callback wraps it."""
    forward(state)
    emit(Callback.after_pred)
    compute_loss(state)
    if state.batch_index == 0:
        check_loss(state.loss)
    emit(Callback.after_loss)
    window.backward(state.loss, state.loss_weight, state.loss_scale)
    emit(Callback.after_backward)


def forward(state: State) -> None:
    """The model's output for `state.batch`."""
    inputs, state.target = state.unpack(state.batch)
    state.n_samples = n_samples(state.target, inputs)
    try:
        state.pred = call_model(state.forward, inputs)
    except Exception as error:
        error.add_note(f"in the model: epoch {state.epoch}, step {state.step}, inputs {describe(inputs)}")
        if isinstance(inputs, Mapping) and isinstance(error, TypeError):
            error.add_note("each key of a mapping goes to the model as a keyword: where that is not meant, pass "
                           "Learner(..., unpack=lambda batch: (inputs, target))")
        raise


def compute_loss(state: State) -> None:
    """The loss of `state.pred`; the first target of an epoch is looked at before it is trusted."""
    if state.batch_index == 0:
        check_target(state.pred, state.target, state.loss_func)
    try:
        loss = state.loss_func(state.pred, state.target)
        state.loss, state.loss_weight = mean_and_weight(loss, state.n_samples)
    except Exception as error:
        error.add_note(f"in the loss: epoch {state.epoch}, step {state.step}, output {describe(state.pred)}, "
                       f"target {describe(state.target)}")
        raise


def step(state: State, emit: Emitter, window: Window) -> None:
    """One weight update."""
    state.step_loss, state.step_weight = window.close(), window.weight
    emit(Callback.before_step)
    state.update()
    try:
        emit(Callback.after_step)
    finally:  # the weights have moved, even if a callback ends the epoch here
        window.end()
        state.step += 1


@torch.no_grad()
def validate(state: State, emit: Emitter) -> None:
    """One pass over every validation set, in eval mode, without gradients."""
    state.model.eval()
    with emit.evaluating():
        emit(Callback.before_validate)
        for name, loader in state.valid_sets:
            state.valid_set = name
            look(state, emit, loader)
    emit(Callback.after_validate)


def look(state: State, emit: Emitter, loader: Iterable[Batch]) -> None:
    """One pass over one validation set."""
    state.batch_index = -1
    what = f"{state.valid_set} validation data".lstrip()
    batches = feed(plain(loader), state.device, None, state.interrupt, f"epoch {state.epoch}, {what}")
    with closing(batches):
        for index, batch in enumerate(batches):
            state.batch_index, state.batch = index, batch
            emit(Callback.before_valid_batch)
            forward(state)
            compute_loss(state)
            emit(Callback.after_valid_batch)
            state.interrupt.check()
    check_passes(what.removesuffix(" data"), state.batch_index + 1)
