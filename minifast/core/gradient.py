"""What is computed of one batch: the output, the loss, the gradient."""
from collections.abc import Mapping

from ..base.batch import call_model, n_samples
from ..base.losses import mean_and_weight
from ..base.nest import describe
from .callback import Callback
from .checks import check_loss, check_target
from .emitter import Emitter
from .state import State
from .window import Window


def add_gradient(state: State, emit: Emitter, window: Window) -> None:
    """Add the gradient of `state.batch` to the window: what `State.gradient` is unless a callback wraps it."""
    forward(state)
    emit(Callback.after_pred)
    compute_loss(state)
    if state.batch_index == 0:
        check_loss(state.loss)
    emit(Callback.after_loss)
    window.backward(state.loss, state.loss_weight)
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
    """The loss of `state.pred`; the first target of an epoch is checked before it is trusted."""
    if state.batch_index == 0:
        check_target(state.pred, state.target, state.loss_func)
    try:
        loss = state.loss_func(state.pred, state.target)
        state.loss, state.loss_weight = mean_and_weight(loss, state.n_samples)
    except Exception as error:
        error.add_note(f"in the loss: epoch {state.epoch}, step {state.step}, output {describe(state.pred)}, "
                       f"target {describe(state.target)}")
        raise
