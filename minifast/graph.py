"""`Learner(..., graph=True)`: the forward and backward pass of a training batch as one CUDA graph.

With a small model the host, which launches some hundred kernels a step, is slower than the device that runs them. A
graph is launched as one. The loop knows nothing of it: `GraphedGradient` takes the place of `State.gradient`.

* A graph holds the model, `after_pred`, the loss, `after_loss` and backward. Outside, as ever, are the data,
  `before_batch`, `unpack`, `after_backward`, clipping, and the optimizer, which is two launches per group: so
  hyper-parameters stay plain numbers, all of them can be scheduled, and no callback behind backward is in the way.
  Torch's fused kernels (2.14) take the learning rate as a tensor, but momentum, betas and weight decay as numbers,
  which would be captured: `fit_one_cycle`, which moves the momentum, could not use a graph that holds the step.
* There is one graph for each form of a batch (nest, shapes, dtypes, plain values). The first `WARM_UP` batches of a
  form are eager training steps of the fit like any other, so nothing is trained twice or rehearsed. The last of them is
  watched: what waits for the device or draws on the host could not be captured. Then each batch is copied into the
  graph's own input, and the graph launched.
* What a batch leaves behind is copied out (`pred`, `loss`, `loss_weight`), since the next replay overwrites it. The
  gradients are not: they are read by the step, and then forgotten.
* A graph holds addresses and numbers. So if parameters, buffers, `requires_grad`, modes, hooks or numbers (a dropout's
  `p`) of modules have changed, all begins anew; tensors that modules hold are kept for as long as a graph reads them.
* Random numbers on the device are drawn in the order of an eager fit: torch moves its generator on at each replay.

Whatever does not fit is run eagerly, with one line that says why. What the model or the loss compute on the host, from
numbers that are no attributes of a module, is captured as it was; nobody can see that from here.
"""
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .batches import call_model, describe, map_tensors, n_samples, tensors
from .callback import Callback, Emitter
from .checks import check_target
from .cuda_graph import CudaCapture, Work
from .graph_forms import ModelForm, Unfit, signature, unfit_output
from .losses import Weight, mean_and_weight
from .progress import Progress
from .state import State
from .window import Window

WARM_UP = 3  # eager batches of a form before it is captured: torch asks for some
MAX_GRAPHS = 4  # forms that are captured, each with memory of its own; others are run eagerly
MAX_FORMS = 32  # beyond, shapes change all the time
MAX_CHANGES = 100  # of the model, in a fit
CAPTURED = (Callback.after_pred, Callback.after_loss)
log = logging.getLogger("minifast")

Gradient = Callable[[State, Emitter, Window], None]


@contextmanager
def graphed(state: State) -> Iterator[None]:
    """A block in which batches of a fit are run as CUDA graphs where that is possible; their memory is then freed."""
    bar = next((callback for callback in state.callbacks if isinstance(callback, Progress)), None)
    state.gradient = gradient = GraphedGradient(state.gradient, log.info if bar is None else bar.say)
    try:
        yield
    finally:
        gradient.close()


def capturing(device: torch.device) -> CudaCapture | None:
    """What captures on `device`; None where nothing can."""
    return CudaCapture(device) if device.type == "cuda" else None


@dataclass
class Form:
    """Batches of one form, and the graph that runs them once it is captured."""

    n_seen: int = 0
    pred: Any = None  # the model's output: its shapes, and once there is a graph, where each replay leaves it
    replay: Work | None = None
    inputs: list[Tensor] = field(default_factory=list)  # where a replay reads the batch
    loss: Tensor = field(init=False)
    weight: Weight = 0
    grads: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)  # what modules keep and the graph may read


class GraphedGradient:
    """What `State.gradient` is with `graph=True`: `eager` in another form. `tell` gets a line for the user."""

    def __init__(self, eager: Gradient, tell: Callable[[str], None]) -> None:
        self.eager, self.tell = eager, tell
        self.capture: CudaCapture | None = None
        self.forms: dict[Any, Form] = {}
        self.model: ModelForm | None = None
        self.is_off = self.has_to_forget = False
        self._print: list[Any] | None = None  # the model's, as it was for the batch before
        self._n_changes = 0

    def __call__(self, state: State, emit: Emitter, window: Window) -> None:
        if self.is_off:
            if self.has_to_forget:
                self.has_to_forget = False
                forget(state)
            self.eager(state, emit, window)
            return
        try:
            if self.model is None:
                self._begin(state, emit)
            pair = state.unpack(state.batch)
            form = self._form(state, (*pair, state.loss_scale))
        except Unfit as why:
            self._off(str(why))
            self(state, emit, window)
            return
        if form.n_seen < WARM_UP - 1 or (form.replay is None and self._n_graphs() >= MAX_GRAPHS):
            self._run_eagerly(state, emit, window, form, pair)
        else:
            self._run(state, emit, window, form, pair)

    def close(self) -> None:
        """Free the graphs and their memory."""
        self.forms.clear()
        self.is_off, self.model, self.capture, self._print = True, None, None, None

    # ---- is it possible?

    def _begin(self, state: State, emit: Emitter) -> None:
        """The first batch of a fit: all callbacks have set up by now. Raises Unfit."""
        self.capture = capturing(state.device)
        if self.capture is None:
            raise Unfit(f"it takes a CUDA device, and this fit is on {state.device.type}")
        if type(emit) is not Emitter:
            raise Unfit("trace() and profile() look at each part by itself")
        if state.gradient is not self:
            raise Unfit(f"{_owner(getattr(state.gradient, 'func', state.gradient))} runs batches in a way of its own")
        if state.accumulate > 1:
            raise Unfit(f"accumulate={state.accumulate} adds up gradients over several batches")
        for event in CAPTURED:
            for hook in emit.hooks[event]:
                if not getattr(getattr(hook, "__self__", None), "capturable", False):
                    raise Unfit(f"{_owner(hook)} listens to {event.__name__}, and is not capturable")
        if torch.is_autocast_enabled(state.device.type):
            raise Unfit("the fit runs in an autocast block, which keeps copies of weights: use MixedPrecision instead")
        self.model = ModelForm(state)

    def _form(self, state: State, batch: Any) -> Form:
        """The form of this batch, with the model as it is now. Raises Unfit."""
        assert self.model is not None
        now = self.model.fingerprint(state)
        if now != self._print:
            self.model.check()
            self.forms.clear()
            self._print, self._n_changes = now, self._n_changes + 1
            if self._n_changes > MAX_CHANGES:
                raise Unfit("parts of the model are frozen, thawed or replaced all the time")
        key = signature(batch, state.device.type)
        form = self.forms.get(key)
        if form is None:
            if len(self.forms) >= MAX_FORMS:
                raise Unfit(f"batches have more than {MAX_FORMS} different shapes or values")
            form = self.forms[key] = Form()
        return form

    def _n_graphs(self) -> int:
        return sum(form.replay is not None for form in self.forms.values())

    def _off(self, why: str) -> None:
        self.close()
        self.has_to_forget = True
        self.tell(f"CUDA graph: not used, {why}.")

    # ---- one batch

    def _run_eagerly(self, state: State, emit: Emitter, window: Window, form: Form, pair: tuple[Any, Any]) -> None:
        """As in any fit, but where it may be captured later. `unpack` was called: once is enough."""
        assert self.capture is not None
        unpack, state.unpack = state.unpack, lambda batch: pair
        try:
            self.capture.run(lambda: self.eager(state, emit, window))
        finally:
            state.unpack = unpack
        form.n_seen, form.pred = form.n_seen + 1, map_tensors(_shape_of, state.pred)

    def _run(self, state: State, emit: Emitter, window: Window, form: Form, pair: tuple[Any, Any]) -> None:
        """The last eager batch of a form, which is watched; then captured and replayed ones."""
        assert self.capture is not None
        inputs, target = pair
        if state.batch_index == 0:  # as in any epoch; the output's shape is known by now
            check_target(form.pred, target, state.loss_func)
        state.target, state.n_samples = target, n_samples(target, inputs)
        if form.n_seen < WARM_UP:
            forget(state)
            form.n_seen += 1
            why = self.capture.watch(lambda: backward_of(state, emit, inputs, target, state.loss_scale))
            why = why or unfit_output(state)
            window.take(state.loss.detach(), state.loss_weight)
            if why:
                self._off(why)
        else:
            if form.replay is None:
                try:
                    self._capture(state, emit, form, (inputs, target, state.loss_scale))
                except Exception as error:
                    self._off(f"the capture failed: {_first_line(error)}")
                    self(state, emit, window)
                    return
                self.tell(f"CUDA graph: captured for {describe(pair)}")
            self._replay(state, window, form, (inputs, target, state.loss_scale))
        emit(Callback.after_backward)

    def _capture(self, state: State, emit: Emitter, form: Form, batch: Any) -> None:
        """Capture `form` with inputs of its own. Nothing is trained by that, and nothing is changed if it fails."""
        assert self.capture is not None
        assert self.model is not None
        own = map_tensors(Tensor.clone, batch)
        whole, target = state.batch, state.target
        forget(state)
        del state.batch  # whoever reads it would be captured with this batch's values
        state.target = own[1]
        params = [p for group in state.opt.param_groups for p in group["params"]]
        try:
            form.replay = self.capture.capture(lambda: backward_of(state, emit, *own))
            form.inputs, form.held = list(tensors(own)), self.model.held()
            form.pred, form.loss = map_tensors(Tensor.detach, state.pred), state.loss.detach()
            form.weight = state.loss_weight
            form.grads = [(p, p.grad) for p in params if p.grad is not None]
        finally:
            for p in params:
                p.grad = None
            state.batch, state.target = whole, target
            forget(state)  # it holds autograd's graph

    def _replay(self, state: State, window: Window, form: Form, batch: Any) -> None:
        """Run the captured work on this batch, and leave in `state` and `window` what an eager batch does."""
        assert form.replay is not None
        if form.inputs:
            torch._foreach_copy_(form.inputs, list(tensors(batch)), non_blocking=True)
        form.replay()
        for p, grad in form.grads:
            p.grad = grad
        state.pred, state.loss = map_tensors(Tensor.clone, form.pred), form.loss.clone()
        state.loss_weight = form.weight.clone() if isinstance(form.weight, Tensor) else form.weight
        window.take(state.loss, state.loss_weight)


def backward_of(state: State, emit: Emitter, inputs: Any, target: Any, scale: Tensor | None) -> None:
    """What is captured: `loop.gradient` without its checks on the host, and without `after_backward`."""
    state.pred = call_model(state.forward, inputs)
    emit(Callback.after_pred)
    state.loss, state.loss_weight = mean_and_weight(state.loss_func(state.pred, target), state.n_samples)
    emit(Callback.after_loss)
    state.loss.backward(torch.ones_like(state.loss) if scale is None else scale)  # made here: it must be the graph's


def forget(state: State) -> None:
    """Let go of autograd's graph of the batch before: with it, gradients stay tied to the stream that it ran on."""
    for name in ("pred", "loss"):
        if hasattr(state, name):
            delattr(state, name)


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _owner(function: Any) -> str:
    """Whose method a function is, or its name."""
    owner = getattr(function, "__self__", None)
    return getattr(function, "__qualname__", repr(function)) if owner is None else type(owner).__name__


def _first_line(error: Exception) -> str:
    """The error in one line; of one that came up while the capture was ended, what had ended it."""
    cause = error.__context__ or error
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
