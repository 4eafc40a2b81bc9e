"""Looking a Learner over before a long fit: what would go wrong, or is wrong without an error."""
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batch import call_model, n_samples, scores
from ..base.losses import is_cross_entropy, is_loss, mean_and_weight
from ..base.nest import describe, tensors
from ..core.callback import Callback, CancelFit, Order
from ..core.checks import check_loss, check_target, check_trainable
from ..core.state import State
from ..data.feed import first_batch
from ..data.loader import n_batches, plain, valid_sets
from ..optim.rates import as_written
from ..show.tables import listed
from ..training import fitting
from ..training.trainer import Trainer
from .leaks import find_leaks
from .overfit import overfit_batch
from .timeline import profile, trace

OVERFIT = 0.2  # a batch counts as overfitted when its loss falls below this share of the first
BUDGET = 4.0  # seconds, at most about that, for each of the attempts to overfit
LARGE = 50.0  # inputs beyond that are not normalised
ODD_START = 1.5  # a loss at the start this many times what guessing costs is worth a note


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. level: "ok", "note" (worth knowing), "problem"."""

    level: str
    what: str
    says: str


class Report(list[Finding]):
    """What `learn.check()` found; prints one line each, and is true if there is no problem."""

    @property
    def problems(self) -> list[Finding]:
        """The findings that should be dealt with."""
        return [finding for finding in self if finding.level == "problem"]

    @property
    def exit_code(self) -> int:
        """0 if there is no problem, else 1: `sys.exit(learn.check().exit_code)`."""
        return int(bool(self.problems))

    def __bool__(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        width = max((len(finding.what) for finding in self), default=0)
        lines = [f"{finding.level:7}  {finding.what:{width}}  {finding.says}" for finding in self]
        n = len(self.problems)
        return "\n".join([*lines, f"{n} problem{'s' * (n != 1)}" if n else "no problem"])


def check(learn: Trainer) -> Report:
    """See `Learner.check`."""
    report = Report()
    learn.check_assigned()
    with learn.sandbox(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is worth saying is in the report
        on = _Checks(learn, report)
        for step in (on.parts, on.data, on.output, on.loss, on.gradients, on.determinism, on.leaks, on.validation,
                     on.speed, on.capacity):
            try:
                step()
            except Exception as error:  # is a finding like any other
                notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
                report.append(Finding("problem", step.__name__, f"{type(error).__name__}: {error}{notes}"))
            if report.problems and step in (on.parts, on.data, on.output, on.loss, on.validation):
                break  # what comes after would fail of the same
    return report


class _Checks:
    """The single checks, in their order; each writes its findings and keeps what later ones need."""

    def __init__(self, learn: Trainer, report: Report) -> None:
        self.learn, self._report = learn, report

    def _say(self, level: str, what: str, says: str) -> None:
        self._report.append(Finding(level, what, says))

    def parts(self) -> None:
        """Whether a fit could begin: what it checks before any work."""
        steps = 1 if n_batches(self.learn.dls.train) is None else None
        fitting.prepare(self.learn, 1, self.learn.lr, None, steps_per_epoch=steps, verbose=False)
        check_trainable(self.learn.model, self.learn.groups.names)
        params = [p for p in self.learn.model.parameters() if p.requires_grad]
        self._say("ok", "parts", f"{sum(p.numel() for p in params):,} trainable parameters on {self.learn.device}")

    def data(self) -> None:
        """The first training batch, as the model gets it: callbacks may change it in `before_batch`."""
        self.began = time.perf_counter()
        peek = _Peek()
        trace(self.learn, 1, callbacks=[peek])
        self.batch = peek.batch
        self.inputs, self.target = self.learn.unpack(self.batch)
        self.n = n_samples(self.target, self.inputs)
        self.bad = [describe(tensor) for tensor in _floats(self.batch) if not torch.isfinite(tensor).all()]
        self._say("ok", "data", f"inputs {describe(self.inputs)}, target {describe(self.target)}")
        sizes = [(describe(tensor), float(tensor.abs().max())) for tensor in _floats(self.inputs) if tensor.numel()]
        if large := [f"{what}: {size:.3g}" for what, size in sizes if LARGE < size < math.inf]:
            self._say("note", "data", f"inputs are as large as {', '.join(large)}: normalise them to about 0 +- 1")

    def output(self) -> None:
        """The model on it, and the target against the output."""
        self.learn.model.train()
        self.pred = call_model(self.learn.forward, self.inputs)
        check_target(self.pred, self.target, self.learn.loss_func)
        pred, target = scores(self.pred), self.target
        self._say("ok", "output", f"{describe(pred)} for {describe(target)}")
        if isinstance(pred, Tensor) and isinstance(target, Tensor) and pred is self.pred \
                and pred.shape != target.shape and pred.numel() == target.numel() > 1 and self._is_broadcast():
            raise ValueError(f"the loss broadcasts the output {tuple(pred.shape)} and the target {tuple(target.shape)} "
                             "against each other. Give them one shape, e.g. by target.unsqueeze(1).")

    def _is_broadcast(self) -> bool:
        """Whether the loss, which gets an output and a target of as many numbers, mixes their samples."""
        try:
            given, same = (self._mean_loss(pred, self.target, self.n)
                           for pred in (self.pred, self.pred.reshape(self.target.shape)))
            return not torch.allclose(given, same, rtol=1e-3, equal_nan=True)
        except Exception:
            return False  # it counts on these shapes, or `loss` will say what is wrong

    def _mean_loss(self, pred: Any, target: Any, n: int) -> Tensor:
        loss: Tensor = mean_and_weight(self.learn.loss(pred, target), n)[0]
        return loss

    def loss(self) -> None:
        """The loss of the untrained model against what guessing costs."""
        self.first_loss = self._mean_loss(self.pred, self.target, self.n)
        check_loss(self.first_loss)
        value, bad = float(self.first_loss.detach()), f"NaN or infinite values in {', '.join(self.bad)}"
        if not math.isfinite(value):
            ranges = [f"{float(leaf.min()):.3g} .. {float(leaf.max()):.3g}" for leaf in tensors(scores(self.pred))
                      if leaf.numel()]
            raise ValueError(f"the first loss is {value}: " + (
                f"the first batch has {bad}. Clean the data." if self.bad else
                f"look at the model's output, {', '.join(ranges)}."))
        if self.bad:
            self._say("note", "data", f"{bad}; the loss is finite all the same")
        if value < 0 and is_loss(self.learn.loss_func, nn.NLLLoss, nn.functional.nll_loss):
            raise ValueError(f"the first loss is {value:.4g}, and that of log-probabilities is never below 0: NLLLoss "
                             "takes the output of log_softmax. Use nn.CrossEntropyLoss() for logits.")
        expected, why = _guessing(self.learn.loss_func, scores(self.pred), self.target)
        is_odd = expected is not None and value > ODD_START * expected + 0.1
        self._say("note" if is_odd else "ok", "loss", f"{value:.4g} on the first batch" + (
            "" if expected is None else f"; {why} costs {expected:.4g}") + is_odd * (
            ": is the last layer's initialisation or the inputs' scale right? (Fine for a model trained already.)"))

    def gradients(self) -> None:
        """Whether every trainable parameter gets a finite gradient."""
        self.learn.model.zero_grad()
        self.first_loss.backward()
        named = {name: p.grad for name, p in self.learn.model.named_parameters() if p.requires_grad}
        self.learn.model.zero_grad()
        dense = {name: grad for name, grad in named.items() if grad is not None and not grad.is_sparse}
        none = [name for name, grad in named.items() if grad is None]
        zero = [name for name, grad in dense.items() if not grad.any()]
        bad = [name for name, grad in dense.items() if not torch.isfinite(grad).all()]
        for level, names, are, why in (
                ("problem", bad, "are NaN or infinite", ""), ("note", zero, "are all zero on the first batch", ""),
                ("problem", none, "parameters get none", ": forward does not use them, or what uses them is detached")):
            if names:
                self._say(level, "gradients", f"{len(names)} of {len(named)} {are}: {listed(names)}{why}")
        if not (bad or none or zero):
            self._say("ok", "gradients", f"all {len(named)} trainable parameters get finite ones")

    @torch.no_grad()
    def determinism(self) -> None:
        """Whether the model in eval mode gives the same output twice."""
        self.learn.model.eval()
        self.outputs, again = ([*tensors(scores(call_model(self.learn.model, self.inputs)))] for _ in range(2))
        self.is_steady = all(torch.allclose(a, b, equal_nan=True) for a, b in zip(self.outputs, again, strict=True))
        level, output = ("ok", "the same output twice") if self.is_steady else (
            "problem", "another output each time: dropout by nn.functional without training=self.training?")
        self._say(level, "eval mode", f"gives {output}")

    @torch.no_grad()
    def leaks(self) -> None:
        """Whether the output of a sample depends on the others of its batch, in eval mode."""
        if self.n > 1 and not self.is_steady:
            return self._say("note", "leaks", "cannot be told, as the output is another one each time")
        self.learn.model.eval()
        may_be_second = getattr(self.learn.dls.train, "batch_size", None) != self.n
        level, says = find_leaks(self.learn.model, self.inputs, self.target, self.outputs, self.n, may_be_second)
        self._say(level, "leaks", says)

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
            loss = float(self._mean_loss(pred, target, n_samples(target, inputs)))
            for metric in self.learn.metrics:
                if not hasattr(metric, "update"):
                    metric(scores(pred), target)
            self._say("ok" if math.isfinite(loss) else "problem", what, f"loss {loss:.4g} on its first batch")

    def speed(self) -> None:
        """The time of a batch against that of the step on it."""
        seconds = max(1e-6, time.perf_counter() - self.began)  # more than a batch takes: of some checks on one
        profiled = profile(self.learn, max(5, min(30, int(2.0 / seconds))))
        waiting = profiled.share("waiting for data")
        self.seconds = profiled.seconds / max(1, profiled.n_batches)
        self._say("note" if waiting > 0.5 else "ok", "speed",
                  f"{self.seconds * 1e3:.3g} ms a batch, {waiting:.0%} of it waiting for the data"
                  + (waiting > 0.5) * ": more workers, or DataLoaders in memory, would help")

    def capacity(self) -> None:
        """Whether one batch can be learned by heart."""
        steps = max(20, min(100, int(BUDGET / max(1e-6, self.seconds) / 2)))
        said = []
        for factor in (1.0, 10.0, 100.0):
            lr = _times(self.learn.lr, factor)
            began = time.perf_counter()
            losses = overfit_batch(self.learn, self.batch, steps, lr)
            first, best = losses[0], min((loss for loss in losses[-5:] if math.isfinite(loss)), default=math.nan)
            said.append(f"{first:.4g} -> {best:.4g} in {steps} steps at lr {as_written(lr)}")
            if best < OVERFIT * abs(first):
                return self._say("ok", "overfitting", f"one batch can be learned by heart: {said[-1]}")
            if time.perf_counter() - began > BUDGET:
                break
        self._say("note", "overfitting", f"one batch was not learned by heart: {'; '.join(said)}. Too few steps, too "
                                         "small a model or rate, regularisation, or labels that do not fit")


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
    if is_cross_entropy(loss_func) or is_loss(loss_func, nn.NLLLoss, nn.functional.nll_loss):
        classes = pred.shape[1] if pred.ndim > 1 else pred.shape[0]
        return math.log(classes), f"guessing among {classes} classes"
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


def _floats(nest: Any) -> list[Tensor]:
    return [tensor for tensor in tensors(nest) if tensor.is_floating_point()]
