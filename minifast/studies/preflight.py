"""Looking a Learner over before a long fit: what would go wrong, or is wrong without an error."""
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import fitting
from ..batches import call_model, describe, n_samples, scores, tensors, to_device
from ..checks import check_loss, check_target
from ..data import DataLoaders, n_batches, valid_sets
from ..errors import check_int
from ..hypers import check_lr
from ..inference.predict import sample_of
from ..losses import mean_and_weight
from ..tables import listed

if TYPE_CHECKING:
    from ..learner import Learner

OVERFIT = 0.2  # a batch counts as overfitted when its loss falls below this share of the first
BUDGET = 4.0  # seconds, at most about that, for each of the attempts to overfit
ODD_START = 1.5  # a loss at the start this many times what guessing costs is worth a look


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. level: "ok", "note" (worth knowing), "problem"."""

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

    __str__ = __repr__


def check(learn: "Learner") -> Report:
    """Try out data, model and loss, and undo it; see `Learner.check`."""
    report = Report()
    fitting.check_assigned(learn)
    with learn.sandbox():
        look = _Look(learn, report)
        for step in (look.parts, look.data, look.batch, look.loss, look.gradients, look.determinism, look.leaks,
                     look.validation, look.speed, look.capacity):
            with _caught(report, step.__name__):
                step()
            if report.problems and step in (look.parts, look.data, look.batch, look.loss):
                break  # what comes after would fail of the same
    return report


def overfit(learn: "Learner", steps: int = 100, lr: Any = None) -> list[float]:
    """Train on one batch for `steps` weight updates and undo it; gives the loss of each; see `Learner.overfit`."""
    steps = check_int("steps", steps, example="overfit(100)")
    lr = learn.lr if lr is None else check_lr("lr", lr)
    fitting.check_assigned(learn)
    with learn.sandbox():
        return _overfit(learn, next(iter(learn.dls.train)), steps, lr)


def _overfit(learn: "Learner", batch: Any, steps: int, lr: Any) -> list[float]:
    with learn.sandbox():
        learn.dls = DataLoaders([batch] * steps)
        learn.callbacks = [cb for cb in learn.callbacks if cb.in_lr_find]
        learn.fit(lr, verbose=False)
        return [float(loss) for loss in learn.recorder.losses]


@contextmanager
def _caught(report: Report, what: str) -> Iterator[None]:
    """An error is a finding."""
    try:
        yield
    except Exception as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        report.append(Finding("problem", what, f"{type(error).__name__}: {error}{notes}"))


class _Look:
    """The single looks, in their order; each writes its findings."""

    def __init__(self, learn: "Learner", report: Report) -> None:
        self.learn, self._report = learn, report

    def _say(self, level: str, what: str, says: str) -> None:
        self._report.append(Finding(level, what, says))

    def parts(self) -> None:
        """Whether a fit could begin: what it checks before any work."""
        steps = 1 if n_batches(self.learn.dls.train) is None else None
        fitting.prepare(self.learn, 1, self.learn.lr, None, steps_per_epoch=steps, verbose=False)
        params = [p for p in self.learn.model.parameters() if p.requires_grad]
        if not params:
            raise ValueError("there is no trainable parameter: everything is frozen. Call unfreeze().")
        self._say("ok", "parts", f"{sum(p.numel() for p in params):,} trainable parameters on {self.learn.device}")

    def data(self) -> None:
        """The first batch of the training data."""
        batch = next(iter(self.learn.dls.train), None)
        if batch is None:
            raise ValueError("the training data yields 0 batches.")
        self.batch_on_device = to_device(batch, self.learn.device)
        self.inputs, self.target = self.learn.unpack(self.batch_on_device)
        self.n = n_samples(self.target, self.inputs)
        bad = [describe(tensor) for tensor in tensors(self.batch_on_device)
               if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
        if bad:
            raise ValueError(f"the first batch has NaN or infinite values in {', '.join(bad)}. Clean the data.")
        self._say("ok", "data", f"inputs {describe(self.inputs)}, target {describe(self.target)}")
        images = [tensor for tensor in tensors(self.inputs) if tensor.is_floating_point()]
        large = [f"{describe(tensor)}: {float(tensor.abs().max()):.3g}" for tensor in images
                 if float(tensor.abs().max()) > 50]
        if large:
            self._say("note", "data", f"inputs are as large as {', '.join(large)}: normalise them to about 0 +- 1")

    def batch(self) -> None:
        """The model on it, and the target against the output."""
        self.learn.model.train()
        self.pred = call_model(self.learn.forward, self.inputs)
        check_target(self.pred, self.target, self.learn.loss_func)
        pred, target = scores(self.pred), self.target
        self._say("ok", "output", f"{describe(pred)} for {describe(target)}")
        if not isinstance(self.learn.loss_func, nn.CrossEntropyLoss) and isinstance(pred, Tensor) \
                and isinstance(target, Tensor) and {tuple(pred.shape), tuple(target.shape)} == {(self.n,), (self.n, 1)}:
            raise ValueError(f"the output {tuple(pred.shape)} and the target {tuple(target.shape)} are broadcast to "
                             f"({self.n}, {self.n}) by most losses. Give both one shape, e.g. by target.unsqueeze(1).")

    def loss(self) -> None:
        """The loss of the untrained model against what guessing costs."""
        loss, _ = mean_and_weight(fitting.loss_func(self.learn)(self.pred, self.target), self.n)
        check_loss(loss)
        self.loss_tensor, value = loss, float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"the first loss is {value}. Look at the model's output: "
                             f"{_range(scores(self.pred))}.")
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
                                              "training=self.training?")

    @torch.no_grad()
    def leaks(self) -> None:
        """Whether the output of a sample depends on the others of its batch, in eval mode."""
        if self.n < 2:
            return self._say("note", "leaks", "a batch of one sample shows none")
        if not self.is_steady:
            return self._say("note", "leaks", "cannot be told, as the output is another one each time")
        self.learn.model.eval()
        alone = list(tensors(scores(call_model(self.learn.model, sample_of(self.inputs, 0)))))
        together = [tensor[:1] for tensor in self.outputs if tensor.ndim]
        pairs = [(a, b) for a, b in zip(alone, together, strict=False) if a.shape == b.shape]
        if not pairs:
            return self._say("note", "leaks", "the output has no dimension of samples to compare")
        gap = max(float((a.double() - b.double()).abs().max()) / (float(b.double().abs().max()) or 1.0)
                  for a, b in pairs)
        if gap > 1e-2:
            self._say("problem", "leaks", f"in eval mode the output of a sample alone differs by {gap:.1%} from its "
                                          "output within the batch: the model mixes samples (a wrong dimension in a "
                                          "softmax, norm, reshape or attention?)")
        else:
            self._say("ok", "leaks", "the output of a sample does not depend on the others")

    @torch.no_grad()
    def validation(self) -> None:
        """The first batch of each validation set."""
        sets = valid_sets(self.learn.dls.valid)
        if not sets:
            return self._say("note", "validation", "there is no validation data")
        self.learn.model.eval()
        for name, loader in sets:
            what = f"validation {name}".rstrip()
            batch = next(iter(loader), None)
            if batch is None:
                raise ValueError(f"the {what} data yields 0 batches.")
            inputs, target = self.learn.unpack(to_device(batch, self.learn.device))
            pred = call_model(self.learn.model, inputs)
            check_target(pred, target, self.learn.loss_func)
            loss, _ = mean_and_weight(fitting.loss_func(self.learn)(pred, target), n_samples(target, inputs))
            for metric in self.learn.metrics:
                if not hasattr(metric, "update"):
                    metric(scores(pred), target)
            self._say("ok" if math.isfinite(float(loss)) else "problem", what, f"loss {float(loss):.4g} on its first "
                                                                               "batch")

    def speed(self) -> None:
        """The time of a batch against that of the step on it."""
        profile = self.learn.profile(30)
        waiting = profile.share("waiting for data")
        each = profile.seconds / max(1, profile.n_batches)
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
        for factor in (1.0, 10.0):
            lr = _times(self.learn.lr, factor)
            began = time.perf_counter()
            losses = _overfit(self.learn, self.batch_on_device, steps, lr)
            first, best = losses[0], min((loss for loss in losses[-5:] if math.isfinite(loss)), default=math.nan)
            said.append(f"{first:.4g} -> {best:.4g} in {steps} steps at lr {_shown_lr(lr)}")
            if best < OVERFIT * abs(first):
                return self._say("ok", "overfitting", f"one batch can be learned by heart: {said[-1]}")
            if time.perf_counter() - began > BUDGET:
                break
        self._say("note", "overfitting", f"one batch was not learned by heart: {'; '.join(said)}. Too few steps, too "
                                         "small a model or rate, strong regularisation, or labels that do not fit")


def _guessing(loss_func: Any, pred: Any, target: Any) -> tuple[float | None, str]:
    """The loss of an output that knows nothing, for torch's common losses, and what that is in words."""
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        return None, ""
    if isinstance(loss_func, nn.CrossEntropyLoss) or loss_func is nn.functional.cross_entropy:
        classes = pred.shape[1] if pred.ndim > 1 else pred.shape[0]
        return math.log(classes), f"guessing among {classes} classes"
    if isinstance(loss_func, nn.BCEWithLogitsLoss) or loss_func is nn.functional.binary_cross_entropy_with_logits:
        return math.log(2), "guessing yes or no"
    if isinstance(loss_func, nn.MSELoss) or loss_func is nn.functional.mse_loss:
        return float(target.double().square().mean()), "an output of 0"
    if isinstance(loss_func, nn.L1Loss) or loss_func is nn.functional.l1_loss:
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
