"""What happens in a few batches of a fit: who is called when, what it changes, and where the time goes."""
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from ..core.callback import Callback, Event
from ..core.emitter import Emitter
from ..core.ownership import check_callbacks
from ..core.state import State
from ..data.loader import n_batches
from ..data.waiting import SHARE, remedies
from ..errors import check_flag, check_int, check_text
from ..show.tables import shown, table
from ..training import fitting
from ..training.trainer import Trainer

WARM_UP = 3  # batches
# What the loop does before each event of a batch.
WORK = {"before_batch": "waiting for data", "after_pred": "forward", "after_loss": "loss", "after_backward": "backward",
        "after_step": "optimizer step", "before_valid_batch": "waiting for data (validation)",
        "after_valid_batch": "forward and loss (validation)"}


@dataclass(frozen=True)
class Moment:
    """One callback that was called, or one piece of work of the loop (`callback` is None)."""

    event: str  # the event, or what the loop did before it
    callback: str | None
    changed: str  # what the callback changed, in words
    seconds: float
    epoch: int
    step: int
    batch_index: int


class Trace(list[Moment]):
    """What happened in a few batches, in order; prints as a table."""

    def __repr__(self) -> str:
        rows = [[f"{moment.step}.{moment.batch_index}" if moment.batch_index >= 0 else "", moment.event,
                 moment.callback or "(the loop)", f"{moment.seconds * 1e6:,.0f}", moment.changed] for moment in self]
        return table(["step.batch", "event or work", "callback", "us", "changes"], rows) if rows else "(no event)"


@dataclass(frozen=True, repr=False)
class Profile:
    """Where the time of some batches went; prints as a table, the largest share first."""

    rows: list[dict[str, Any]]  # what, callback, calls, seconds, share (0..1 of the whole)
    seconds: float  # all of it
    n_batches: int  # training batches
    ops: str = ""  # torch.profiler's table of operators, if it was asked for
    advice: str = ""  # what to do if training waits for its data

    def share(self, what: str) -> float:
        """The share of the time, 0..1, that went into `what`: a piece of work or a callback's class name."""
        check_text("what", what)
        return float(sum(row["share"] for row in self.rows if what in (row["what"], row["callback"])))

    def __repr__(self) -> str:
        rows = [[row["callback"] or row["what"], "callback" if row["callback"] else "", row["calls"],
                 f"{row['seconds'] * 1e6 / row['calls']:,.0f}", f"{row['share']:.1%}"] for row in self.rows]
        head = (f"{self.n_batches} training batches in {self.seconds:.3g} s: "
                f"{self.seconds / max(1, self.n_batches) * 1e6:,.0f} us each, all included\n")
        texts = [head + table(["what", "", "calls", "us a call", "share"], rows), self.advice, self.ops]
        return "\n\n".join(filter(None, texts))


def trace(learn: Trainer, n: int = 2, *, callbacks: Iterable[Callback] = (), accumulate: int = 1) -> Trace:
    """See `Learner.trace`."""
    return Trace(_run(learn, check_int("n", n), callbacks, accumulate, _TracingEmitter))


def profile(learn: Trainer, n: int = 50, *, callbacks: Iterable[Callback] = (), accumulate: int = 1,
            ops: bool = False) -> Profile:
    """See `Learner.profile`."""
    n, profiler = check_int("n", n), None
    with ExitStack() as stack:
        if check_flag("ops", ops):
            profiler = stack.enter_context(torch.profiler.profile())
        moments = _run(learn, n, callbacks, accumulate, _TimingEmitter)
    last = max((moment.batch_index for moment in moments), default=-1)
    first = min(WARM_UP, max(0, last - WARM_UP))
    moments = [moment for moment in moments if moment.batch_index >= first]
    total, waiting = sum(moment.seconds for moment in moments), WORK["before_batch"]
    sums: dict[tuple[str, str | None], list[float]] = {(waiting, None): []}
    for moment in moments:
        sums.setdefault((moment.event if moment.callback is None else "", moment.callback), []).append(moment.seconds)
    rows = [{"what": what, "callback": name, "calls": len(seconds), "seconds": sum(seconds),
             "share": sum(seconds) / (total or 1.0)} for (what, name), seconds in sums.items() if seconds]
    share = sum(sums[waiting, None]) / (total or 1.0)
    remedy = remedies(learn.dls.train, learn.device) if share >= SHARE else ""
    # here the device is waited for after each piece of work; in a fit it may have some left while batches are made
    goes = "goes into" if learn.device.type == "cpu" else "would go into, if the device did nothing meanwhile,"
    return Profile(sorted(rows, key=lambda row: -float(row["share"])), total, len(sums[waiting, None]),
                   profiler.key_averages().table("self_cpu_time_total", row_limit=15) if profiler else "",
                   remedy and f"{100 * share:.0f} % of the time {goes} waiting for data: {remedy}")


def _run(learn: Trainer, n: int, callbacks: Iterable[Callback], accumulate: int,
         emitter: type["_TimingEmitter"]) -> list[Moment]:
    with learn.sandbox(callbacks := check_callbacks(callbacks, "callbacks")):
        learn.callbacks = [cb for cb in learn.callbacks if cb.in_sandbox]  # the others would write over their files
        callbacks = [cb for cb in callbacks if cb.in_sandbox]
        state = fitting.prepare(learn, 1, learn.lr, None, callbacks=callbacks, accumulate=accumulate, verbose=False,
                                steps_per_epoch=n if n_batches(learn.dls.train) is None else None)
        limit = n if state.source.limit is None else min(n, state.source.limit)
        state.source.limit, state.n_batches = limit, limit if state.n_batches is None else min(limit, state.n_batches)
        state.valid_sets = [(name, _First(loader, n)) for name, loader in state.valid_sets]
        moments: list[Moment] = []
        fitting.run(learn, state, emitter=partial(emitter, moments))
    return moments


class _First:
    """The first `n` batches of a loader."""

    def __init__(self, loader: Iterable[Any], n: int) -> None:
        self.loader, self.n = loader, n
        self.batch_transform = getattr(loader, "batch_transform", None)

    def __iter__(self) -> Iterator[Any]:
        for _, batch in zip(range(self.n), self.loader, strict=False):
            yield batch


class _TimingEmitter(Emitter):
    """Notes when each callback was called, and what the loop did in between."""

    def __init__(self, moments: list[Moment], callbacks: Iterable[Callback], state: State) -> None:
        super().__init__(callbacks, state)
        self.moments = moments
        self._left = time.perf_counter()

    def __call__(self, event: Event) -> None:
        if event.__name__ in WORK:
            self._note(WORK[event.__name__], None, "", self._now() - self._left)
        for cb in self.callbacks:
            self._call(event, cb)

    def _call(self, event: Event, cb: Callback) -> None:
        if getattr(cb, event.__name__) in self.hooks[event]:
            before, began = self._values(), self._now()
            try:
                super()._call(event, cb)
            finally:
                seconds = self._now() - began
                self._note(event.__name__, type(cb).__name__, _changes(before, self._values()), seconds)
        self._left = self._now()

    def _note(self, event: str, callback: str | None, changed: str, seconds: float) -> None:
        state = self.state
        self.moments.append(Moment(event, callback, changed, seconds, state.epoch, state.step,
                                   -1 if event in ("before_fit", "after_fit") else state.batch_index))

    def _now(self) -> float:
        if self.state.device.type != "cpu":
            torch.accelerator.synchronize(self.state.device)
        return time.perf_counter()

    def _values(self) -> dict[str, Any]:  # what a callback may change
        return {}


class _TracingEmitter(_TimingEmitter):
    """Notes what each callback changed, too."""

    def _values(self) -> dict[str, Any]:
        state = self.state
        fields = {name: getattr(state, name) for name in state.__dataclass_fields__ if hasattr(state, name)}
        fields["metrics"] = dict(fields.get("metrics", {}))
        params = [p for group in state.opt.param_groups for p in group["params"]]
        return fields | _hypers(state.opt) | {
            "weights": [p._version for p in params], "requires_grad": [p.requires_grad for p in params],
            "gradients": [None if p.grad is None else (id(p.grad), p.grad._version) for p in params],
            "modes": [module.training for module in state.model.modules()]}


def _hypers(opt: Optimizer) -> dict[str, Any]:
    names = dict.fromkeys(name for group in opt.param_groups for name in group if name not in ("params", "layer_group"))
    hypers = {name: tuple(group.get(name) for group in opt.param_groups) for name in names}
    if "betas" in hypers:
        hypers["momentum"] = tuple(betas and betas[0] for betas in hypers.pop("betas"))
    return hypers


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    return ", ".join(_change(name, before.get(name), value) for name, value in after.items()
                     if not _same(before.get(name), value))


def _same(before: Any, after: Any) -> bool:
    if isinstance(after, (int, float, str, dict, tuple, list)):
        with suppress(RuntimeError, ValueError):  # a batch of tensors, which have no truth value
            return bool(before == after)
    return before is after


def _change(name: str, before: Any, after: Any) -> str:
    """In words: with the numbers if it is one, or of several the last."""
    if name == "metrics":
        return "metrics: " + ", ".join(key for key in after if key not in before or after[key] != before[key])
    if isinstance(after, tuple) and after and all(isinstance(value, (int, float)) for value in after):
        before, after = before[-1] if before and isinstance(before, tuple) else before, after[-1]
    is_told = isinstance(after, (int, float)) and shown(before) != shown(after)
    return f"{name} {shown(before)} -> {shown(after)}" if is_told else name
