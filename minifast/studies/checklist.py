"""The single looks of `learn.check()`, each at one thing."""
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.batch import call_model, n_samples, scores
from ..base.losses import is_cross_entropy, is_loss, mean_and_weight
from ..base.nest import describe, map_tensors, tensors
from ..core.callback import Callback, CancelFit, Order
from ..core.checks import check_loss, check_target, check_trainable
from ..core.state import State
from ..data.feed import first_batch
from ..data.loader import n_batches, plain, valid_sets
from ..show.tables import listed
from ..training import fitting
from .overfit import overfit_batch
from .report import Finding, Report
from .timeline import profile

if TYPE_CHECKING:
    from ..training.trainer import Trainer

OVERFIT = 0.2  # a batch counts as overfitted when its loss falls below this share of the first
BUDGET = 4.0  # seconds, at most about that, for each of the attempts to overfit
LARGE = 50.0  # inputs beyond that are not normalised
LEAK = 1e-2  # a change of more than this share of the largest output is no rounding
ODD_START = 1.5  # a loss at the start this many times what guessing costs is worth a look


class Looks:
    """The single looks, in their order; each writes its findings."""

    def __init__(self, learn: "Trainer", report: Report) -> None:
        self.learn, self._report = learn, report

    def _say(self, level: str, what: str, says: str) -> None:
        self._report.append(Finding(level, what, says))

    def parts(self) -> None:
        """Whether a fit could begin: what it checks before any work."""
        self._one_epoch()
        check_trainable(self.learn.model, self.learn.groups.names)
        params = [p for p in self.learn.model.parameters() if p.requires_grad]
        self._say("ok", "parts", f"{sum(p.numel() for p in params):,} trainable parameters on {self.learn.device}")

    def _one_epoch(self, *callbacks: Callback) -> State:
        """The state of a fit that could begin now; raises what keeps it from that."""
        steps = 1 if n_batches(self.learn.dls.train) is None else None
        return fitting.prepare(self.learn, 1, self.learn.lr, None, callbacks=callbacks, steps_per_epoch=steps,
                               verbose=False)

    def data(self) -> None:
        """The first batch of the training data."""
        self.began = time.perf_counter()
        self.batch_on_device = self._first_batch()
        self.inputs, self.target = self.learn.unpack(self.batch_on_device)
        self.n = n_samples(self.target, self.inputs)
        self.bad = [describe(tensor) for tensor in tensors(self.batch_on_device)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
        self._say("ok", "data", f"inputs {describe(self.inputs)}, target {describe(self.target)}")
        floats = [tensor for tensor in tensors(self.inputs) if tensor.is_floating_point()]
        large = [f"{describe(tensor)}: {float(tensor.abs().max()):.3g}" for tensor in floats
                 if tensor.numel() and LARGE < float(tensor.abs().max()) < math.inf]
        if large:
            self._say("note", "data", f"inputs are as large as {', '.join(large)}: normalise them to about 0 +- 1")

    def _first_batch(self) -> Any:
        """The first training batch as the model gets it: callbacks may change it in `before_batch`."""
        peek = _Peek()
        with self.learn.sandbox():
            self.learn.callbacks = [cb for cb in self.learn.callbacks if cb.in_sandbox]
            state = self._one_epoch(peek)
            fitting.run(self.learn, state)
        return peek.batch

    def output(self) -> None:
        """The model on it, and the target against the output."""
        self.learn.model.train()
        self.pred = call_model(self.learn.forward, self.inputs)
        check_target(self.pred, self.target, self.learn.loss_func)
        pred, target = scores(self.pred), self.target
        self._say("ok", "output", f"{describe(pred)} for {describe(target)}")
        if isinstance(pred, Tensor) and isinstance(target, Tensor) and pred is self.pred \
                and pred.shape != target.shape and pred.numel() == target.numel() > 1 and self._is_broadcast():
            raise ValueError(f"the output {tuple(pred.shape)} and the target {tuple(target.shape)} are broadcast "
                             "against each other by the loss: it is another one when both have one shape. Give them "
                             "one, e.g. by target.unsqueeze(1) or output.squeeze(1).")

    def _is_broadcast(self) -> bool:
        """Whether the loss, which gets an output and a target of as many numbers, mixes their samples."""
        loss_func = self.learn.loss
        try:
            given = mean_and_weight(loss_func(self.pred, self.target), self.n)[0]
        except Exception:
            return False  # `loss` says what is wrong
        try:
            same = mean_and_weight(loss_func(self.pred.reshape(self.target.shape), self.target), self.n)[0]
        except Exception:
            return False  # it counts on these shapes
        return not torch.allclose(given, same, rtol=1e-3, equal_nan=True)

    def loss(self) -> None:
        """The loss of the untrained model against what guessing costs."""
        loss, _ = mean_and_weight(self.learn.loss(self.pred, self.target), self.n)
        check_loss(loss)
        self.loss_tensor, value = loss, float(loss.detach())
        if not math.isfinite(value) and self.bad:
            raise ValueError(f"the first loss is {value}: the first batch has NaN or infinite values in "
                             f"{', '.join(self.bad)}. Clean the data.")
        if self.bad:
            self._say("note", "data", f"NaN or infinite values in {', '.join(self.bad)}; the loss is finite all the "
                                      "same")
        if not math.isfinite(value):
            raise ValueError(f"the first loss is {value}. Look at the model's output: "
                             f"{_range(scores(self.pred))}.")
        if value < 0 and is_loss(self.learn.loss_func, nn.NLLLoss, nn.functional.nll_loss):
            raise ValueError(f"the first loss is {value:.4g}, and that of log-probabilities is never below 0: NLLLoss "
                             "takes the output of log_softmax. Use nn.CrossEntropyLoss() for logits.")
        expected, why = _guessing(self.learn.loss_func, scores(self.pred), self.target)
        if expected is None:
            self._say("ok", "loss", f"{value:.4g} on the first batch")
        elif value > ODD_START * expected + 0.1:
            self._say("note", "loss", f"{value:.4g} on the first batch, but {why} costs {expected:.4g}: is the last "
                                      "layer's initialisation or the inputs' scale right? (Fine for a model that is "
                                      "trained already on something else.)")
        else:
            self._say("ok", "loss", f"{value:.4g} on the first batch; {why} costs {expected:.4g}")

    def gradients(self) -> None:
        """Whether every trainable parameter gets a finite gradient."""
        named = [(name, p) for name, p in self.learn.model.named_parameters() if p.requires_grad]
        for _, p in named:
            p.grad = None
        self.loss_tensor.backward()
        none = [name for name, p in named if p.grad is None]
        zero = [name for name, p in named if p.grad is not None and not p.grad.is_sparse and not p.grad.any()]
        bad = [name for name, p in named if p.grad is not None and not p.grad.is_sparse
               and not torch.isfinite(p.grad).all()]
        for _, p in named:
            p.grad = None
        if bad:
            self._say("problem", "gradients", f"{len(bad)} of {len(named)} are NaN or infinite: {listed(bad)}")
        if none:
            self._say("problem", "gradients", f"{len(none)} of {len(named)} parameters get none: {listed(none)}. They "
                                              "are not used in forward, or what uses them is detached")
        if zero:
            self._say("note", "gradients", f"{len(zero)} of {len(named)} are all zero on the first batch: "
                                           f"{listed(zero)}")
        if not (bad or none or zero):
            self._say("ok", "gradients", f"all {len(named)} trainable parameters get finite ones")

    @torch.no_grad()
    def determinism(self) -> None:
        """Whether the model in eval mode gives the same output twice."""
        self.learn.model.eval()
        self.outputs = list(tensors(scores(call_model(self.learn.model, self.inputs))))
        again = list(tensors(scores(call_model(self.learn.model, self.inputs))))
        self.is_steady = all(torch.allclose(a, b, equal_nan=True) for a, b in zip(self.outputs, again, strict=True))
        if self.is_steady:
            self._say("ok", "eval mode", "gives the same output twice")
        else:
            self._say("problem", "eval mode", "gives another output each time: dropout by nn.functional without "
                                              "training=self.training? (Fine for a model that samples on purpose.)")

    @torch.no_grad()
    def leaks(self) -> None:
        """Whether the output of a sample depends on the others of its batch, in eval mode."""
        if self.n < 2:
            return self._say("note", "leaks", "a batch of one sample shows none")
        if not self.is_steady:
            return self._say("note", "leaks", "cannot be told, as the output is another one each time")
        self.learn.model.eval()
        try:
            gap = self._gap(0)
        except Exception as error:
            return self._say("note", "leaks", "cannot be told: the model does not take one sample alone "
                                              f"({type(error).__name__}: {error!s:.120})")
        if gap is None:
            return self._say("note", "leaks", "the output has no dimension of samples to compare")
        if gap > LEAK and self._may_be_second():
            with suppress(Exception):
                if (self._gap(1) or 0.0) <= LEAK:
                    return self._say("note", "leaks", "the model mixes rows (dimension 0) but not columns (dimension "
                                                      "1): fine if the batch is (time, samples, ...)")
        if gap > LEAK:
            self._say("problem", "leaks", f"in eval mode the output of a sample alone differs by {gap:.1%} from its "
                                          "output within the batch: the model mixes samples (a wrong dimension in a "
                                          "softmax, norm, reshape or attention?)")
        else:
            self._say("ok", "leaks", "the output of a sample does not depend on the others")

    def _gap(self, dim: int) -> float | None:
        """By how much of the largest output that of a sample changes when it is alone; None if that cannot be seen."""
        n, gaps = next((t.shape[dim] for t in self.outputs if t.ndim > dim), 0) if dim else self.n, []
        for i in sorted({0, n - 1}):  # the last one too: a recurrence over the batch leaves the first alone
            one = map_tensors(lambda leaf: leaf.narrow(dim, i, 1) if leaf.ndim > dim and leaf.shape[dim] == n  # noqa: B023
                              else leaf, self.inputs)  # a mask for all stays whole
            alone = list(tensors(scores(call_model(self.learn.model, one))))
            for a, b in zip(alone, self.outputs, strict=False):
                if b.ndim > dim and b.shape[dim] == n and b.numel() and a.shape == b.narrow(dim, i, 1).shape:
                    a, b = a.double(), b.narrow(dim, i, 1).double()
                    same = (a == b) | (a.isnan() & b.isnan())
                    change = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
                    gaps.append(float(change.max()) / (float(b.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) or 1.0))
        return max(gaps, default=None)

    def _may_be_second(self) -> bool:
        """Whether dimension 1 may be that of the samples."""
        leaves = [*tensors(self.inputs), *tensors(self.target), *self.outputs]
        return (getattr(self.learn.dls.train, "batch_size", None) != self.n
                and all(leaf.ndim > 1 for leaf in leaves) and len({leaf.shape[1] for leaf in leaves}) == 1)

    @torch.no_grad()
    def validation(self) -> None:
        """The first batch of each validation set."""
        sets = valid_sets(self.learn.dls.valid)
        if not sets:
            return self._say("note", "validation", "there is no validation data")
        self.learn.model.eval()
        for name, loader in sets:
            what = f"validation {name}".rstrip()
            batch = first_batch(plain(loader), self.learn.device)
            if batch is None:
                raise ValueError(f"the {what} data yields 0 batches.")
            inputs, target = self.learn.unpack(batch)
            pred = call_model(self.learn.model, inputs)
            check_target(pred, target, self.learn.loss_func)
            loss, _ = mean_and_weight(self.learn.loss(pred, target), n_samples(target, inputs))
            for metric in self.learn.metrics:
                if not hasattr(metric, "update"):
                    metric(scores(pred), target)
            self._say("ok" if math.isfinite(float(loss)) else "problem", what, f"loss {float(loss):.4g} on its first "
                                                                               "batch")

    def speed(self) -> None:
        """The time of a batch against that of the step on it."""
        self.seconds = max(1e-6, time.perf_counter() - self.began)  # more than a batch takes: some looks at one
        profiled = profile(self.learn, max(5, min(30, int(2.0 / self.seconds))))
        waiting = profiled.share("waiting for data")
        each = profiled.seconds / max(1, profiled.n_batches)
        says = f"{each * 1e3:.3g} ms a batch, {waiting:.0%} of it waiting for the data"
        if waiting > 0.5:
            self._say("note", "speed", says + ": more workers, or DataLoaders in memory, would help")
        else:
            self._say("ok", "speed", says)
        self.seconds = each

    def capacity(self) -> None:
        """Whether one batch can be learned by heart."""
        steps = max(20, min(100, int(BUDGET / max(1e-6, self.seconds) / 2)))
        said = []
        for factor in (1.0, 10.0, 100.0):
            lr = _times(self.learn.lr, factor)
            began = time.perf_counter()
            losses = overfit_batch(self.learn, self.batch_on_device, steps, lr)
            first, best = losses[0], min((loss for loss in losses[-5:] if math.isfinite(loss)), default=math.nan)
            said.append(f"{first:.4g} -> {best:.4g} in {steps} steps at lr {_shown_lr(lr)}")
            if best < OVERFIT * abs(first):
                return self._say("ok", "overfitting", f"one batch can be learned by heart: {said[-1]}")
            if time.perf_counter() - began > BUDGET:
                break
        self._say("note", "overfitting", f"one batch was not learned by heart: {'; '.join(said)}. Too few steps, too "
                                         "small a model or rate, strong regularisation, or labels that do not fit")


class _Peek(Callback):
    """Keeps the first batch, when all others have seen it, and ends the fit."""

    order = Order.RECORD + 1000

    def before_batch(self, state: State) -> None:
        self.batch = state.batch
        raise CancelFit


def _guessing(loss_func: Any, pred: Any, target: Any) -> tuple[float | None, str]:
    """The loss of an output that knows nothing, for torch's common losses, and what that is in words."""
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        return None, ""
    if is_cross_entropy(loss_func):
        classes = pred.shape[1] if pred.ndim > 1 else pred.shape[0]
        return math.log(classes), f"guessing among {classes} classes"
    if is_loss(loss_func, nn.NLLLoss, nn.functional.nll_loss):
        return math.log(pred.shape[1]), f"guessing among {pred.shape[1]} classes"
    if is_loss(loss_func, nn.BCEWithLogitsLoss, nn.functional.binary_cross_entropy_with_logits):
        return math.log(2), "guessing yes or no"
    if is_loss(loss_func, nn.MSELoss, nn.functional.mse_loss):
        return float(target.double().square().mean()), "an output of 0"
    if is_loss(loss_func, nn.L1Loss, nn.functional.l1_loss):
        return float(target.double().abs().mean()), "an output of 0"
    return None, ""


def _times(lr: Any, factor: float) -> Any:
    if isinstance(lr, slice):
        return slice(None if lr.start is None else lr.start * factor, lr.stop * factor)
    return tuple(value * factor for value in lr) if isinstance(lr, tuple) else lr * factor


def _shown_lr(lr: Any) -> str:
    return f"{lr:.2g}" if isinstance(lr, float) else str(lr)


def _range(pred: Any) -> str:
    return ", ".join(f"{float(tensor.detach().min()):.3g} .. {float(tensor.detach().max()):.3g}"
                     for tensor in tensors(pred) if tensor.numel())
