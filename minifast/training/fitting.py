"""How one fit is made of its parts and run: `prepare`, which changes nothing, and `run`, which puts back what it sets.

The LR finder is a fit like any other, in a sandbox.
"""
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ..core import loop
from ..core.callback import Callback
from ..core.checks import check_loader, check_trainable, check_valid
from ..core.emitter import Emitter
from ..core.gradient import add_gradient
from ..core.ownership import CHECKPOINTS, FINITE_CHECK, check_callbacks, owner_of, resolve
from ..core.state import Source, State, log
from ..data.dataloaders import DataLoaders
from ..data.loader import count_steps, is_one_shot, micro_batches, valid_sets
from ..errors import check_flag, check_int, check_number, check_path, quoted
from ..finder.finder import LRFinder
from ..machine.signals import DeferredInterrupt
from ..machine.workers import explain
from ..optim.fused import updater
from ..optim.hypers import keep_hypers
from ..optim.making import fill_momentum, forget_unmade, label_groups, norms_in_eval, set_weight_decay
from ..optim.rates import spread_lrs
from ..record.record import FitRecord
from ..schedules.lr import ConstantLR
from ..schedules.scheduler import Scheduler
from ..schedules.time_limit import TICKS, TimeLimit
from ..show.screen import say
from ..standard.finite import FiniteLoss, Unchecked
from ..standard.metrics import Metrics
from ..standard.progress import Progress
from ..standard.recorder import Recorder
from .parts import Parts
from .sandbox import sandbox

if TYPE_CHECKING:
    from ..resume.session import Resume


class FitOptions(TypedDict, total=False):
    """What every `fit*` method takes, as described in `Learner.fit`."""

    wd: float | None
    callbacks: Iterable[Callback]
    steps_per_epoch: int | None
    accumulate: int
    effective_batch_size: int | None
    minutes: float | None
    resume: "Resume"
    verbose: bool | None


def prepare(parts: Parts, n_epochs: int, lr: Any, schedule: Scheduler | None, *, is_sized: bool = True,
            **options: Unpack[FitOptions]) -> State:
    """The state of a fit that could begin now. Raises whatever is wrong with it; changes nothing.

    n_epochs: passes over the training data; with `minutes` among the options as many as fit into the time.
    lr: the peak learning rate, in every form.
    schedule: None for the callback that owns the learning rate, else a constant rate.
    is_sized: whether the training data must know its length, or be told `steps_per_epoch`.
    """
    parts.check_assigned()
    _check(parts, options)
    lrs = spread_lrs(lr, parts.groups.names)
    minutes, steps_per_epoch = options.get("minutes"), options.get("steps_per_epoch")
    _check_data(parts, n_epochs, minutes, steps_per_epoch)
    added = [cb for cb in (schedule, TimeLimit(minutes) if minutes else None) if cb is not None]
    users = _owners(parts.callbacks, [*check_callbacks(options.get("callbacks", ()), "callbacks"), *added])
    is_verbose = _is_verbose(parts, options)
    accumulate = micro_batches(parts.dls.train, options.get("accumulate", 1), options.get("effective_batch_size"))
    per_epoch, batches, limit = count_steps(parts.dls.train, steps_per_epoch, accumulate, is_sized=is_sized)
    metrics = Metrics(parts.metrics, train=parts.train_metrics)
    _check_resume(parts, users, options.get("resume", False))
    n_steps = n_epochs * (per_epoch or 1) if minutes is None else TICKS
    return new_state(
        parts, lrs=lrs, n_epochs=n_epochs if minutes is None else None, steps_per_epoch=per_epoch, n_steps=n_steps,
        accumulate=accumulate, n_batches=batches, source=Source(limit),
        callbacks=[parts.recorder, metrics, *users, *([Progress()] if is_verbose else [])],
        say=say if is_verbose else log.info)


def fit(parts: Parts, n_epochs: int, lr: Any, schedule: Scheduler | None, **options: Unpack[FitOptions]) -> None:
    """Train for `n_epochs` with peaks `lr` by `schedule`: see `prepare`."""
    parts.check_assigned()
    given = options["callbacks"] = check_callbacks(options.get("callbacks", ()), "callbacks")
    finder = next((cb for cb in (*given, *parts.callbacks) if isinstance(cb, LRFinder)), None)
    if finder is not None:
        return _find(parts, finder, lr, given, options)
    state = prepare(parts, n_epochs, lr, schedule, **options)
    check_trainable(parts.model, state.group_names)
    run(parts, state, options.get("wd"), options.get("resume", False))


def _find(parts: Parts, finder: LRFinder, lr: Any, given: list[Callback], options: FitOptions) -> None:
    """Run the finder as a fit in a sandbox: its result is all that stays. It takes as many passes as it needs."""
    _check(parts, options)
    if options.get("resume"):  # otherwise nothing is looked for: the finder saves nothing
        _check_resume(parts, [*given, *parts.callbacks], options["resume"])
    running = [finder, *(cb for cb in given if cb.in_lr_find)]
    is_verbose, wd = _is_verbose(parts, options), options.get("wd")
    with DeferredInterrupt(is_held=True), sandbox(parts, running[1:]):
        parts.recorder, parts.metrics, parts.dls = Recorder(), [], DataLoaders(parts.dls.train)
        parts.callbacks = [cb for cb in parts.callbacks if cb.in_lr_find]
        if owner_of(FINITE_CHECK, [*running, *parts.callbacks]) is None:
            running.append(Unchecked())
        running += [Progress("lr_find")] if is_verbose else []
        state = prepare(parts, finder.num_it, lr, None, is_sized=False, callbacks=running, verbose=False, wd=wd,
                        accumulate=options.get("accumulate", 1),
                        effective_batch_size=options.get("effective_batch_size"))
        check_trainable(parts.model, state.group_names)
        run(parts, state, wd)
    parts.recorder.lr_find = finder.result()
    if is_verbose:
        say(str(parts.recorder.lr_find))


def run(parts: Parts, state: State, wd: float | None = None, resume: "Resume" = False,
        emitter: Callable[[Sequence[Callback], State], Emitter] = Emitter) -> None:
    """Run the fit that `prepare` has made. Signals end it between two batches, and nothing around the loop."""
    with DeferredInterrupt(is_held=True), _prepared(parts, state, wd):
        if is_kept(state.callbacks, resume):
            from ..resume.session import run as run_kept  # here, so that `import minifast` takes no longer for it
            parts.fits_ended = run_kept(state, parts.fits_ended, resume)
        else:
            loop.run(state, emitter)


def new_state(parts: Parts, **fields: Any) -> State:
    """A State of these parts, with `fields` in place of those of a fit that does nothing."""
    defaults: dict[str, Any] = {
        "model": parts.model, "forward": parts.forward, "loss_func": parts.loss, "gradient": add_gradient,
        "opt": parts.opt, "update": updater(parts.opt), "device": parts.device, "unpack": parts.unpack,
        "group_names": parts.groups.names, "lrs": (), "n_epochs": 1, "steps_per_epoch": None, "n_steps": 1,
        "train_dl": parts.dls.train, "valid_sets": valid_sets(parts.dls.valid), "callbacks": (),
        "record": FitRecord(parts.groups.names), "norms_in_eval": norms_in_eval(parts.groups, parts.train_bn)}
    return State(**defaults | fields)


def is_kept(callbacks: Iterable[Callback], resume: "Resume") -> bool:
    """Whether a fit is saved or resumed."""
    return resume is not False or owner_of(CHECKPOINTS, callbacks) is not None


def resume_of_next(parts: Parts, options: FitOptions) -> "Resume":
    """What `resume` is for the fit behind one with `options`: a checkpoint that was demanded is one of the first."""
    resume = options.get("resume", False)
    if resume is False or (not isinstance(resume, bool) and os.path.isdir(resume)):
        return resume
    return "auto" if owner_of(CHECKPOINTS, [*parts.callbacks, *options.get("callbacks", ())]) else False


def _is_verbose(parts: Parts, options: FitOptions) -> bool:
    verbose = options.get("verbose")
    return parts.verbose if verbose is None else verbose


def _check_resume(parts: Parts, callbacks: Sequence[Callback], resume: "Resume") -> None:
    """Raise what a fit with `resume` would raise, as far as the names of files tell."""
    if is_kept(callbacks, resume):
        from ..resume.session import Where  # here, so that `import minifast` takes no longer for it
        Where(callbacks, parts.fits_ended, resume).candidates()


_CHECKS: dict[str, Callable[[str, Any], Any]] = {  # of an option that is not None
    "wd": partial(check_number, minimum=0), "steps_per_epoch": check_int, "verbose": check_flag,
    "minutes": partial(check_number, above=0, example="fit(1e-3, minutes=10)")}


def _check(parts: Parts, options: FitOptions) -> None:
    """Raise for an option out of range, parts that do not belong together, or a fit that is under way."""
    if parts.is_fitting:
        raise RuntimeError("this Learner is already fitting: a callback, or another thread, called it again.")
    unknown = options.keys() - FitOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no argument {', '.join(sorted(unknown))}. Those of every fit are "
                        f"{', '.join(FitOptions.__annotations__)}.")
    resume = options.get("resume", False)
    if not isinstance(resume, (bool, str, os.PathLike)):
        raise TypeError(f'resume must be "auto", True, False, or the path of a checkpoint, got {quoted(resume)}.')
    if not isinstance(resume, bool):
        check_path("resume", resume)
    for name, value in options.items():
        if name in _CHECKS and value is not None:
            _CHECKS[name](name, value)
    label_groups(parts.opt, len(parts.groups))
    parts.check_together()


def _check_data(parts: Parts, n_epochs: int, minutes: float | None, steps_per_epoch: int | None) -> None:
    """Raise for loaders that cannot feed such a fit."""
    train, still = parts.dls.train, norms_in_eval(parts.groups, parts.train_bn)
    if minutes is not None and is_one_shot(train):
        raise ValueError(f"minutes={minutes:g} takes as many passes over the training data as fit into the time, but "
                         f"it is an iterator ({type(train).__name__}), good for one. Pass a DataLoader or a list.")
    check_loader(train, n_epochs if minutes is None else 1, (m for m in parts.model.modules() if m not in still),
                 steps_per_epoch)
    for _, loader in valid_sets(parts.dls.valid):
        check_valid(loader)


def _owners(learners: Sequence[Callback], given: list[Callback]) -> list[Callback]:
    """The callbacks of a fit but for those that show and record: one owner for each hyper-parameter and each role."""
    callbacks = resolve(check_callbacks(learners, "learn.callbacks"), given)
    if any(isinstance(callback, Recorder) for callback in callbacks):
        raise ValueError("a Learner has its own Recorder: read learn.recorder instead of passing another one.")
    for role, usual in (("lr", ConstantLR), (FINITE_CHECK, FiniteLoss)):
        if owner_of(role, callbacks) is None:
            callbacks.append(usual())
    return callbacks


@contextmanager
def _prepared(parts: Parts, state: State, wd: float | None) -> Iterator[None]:
    """One fit at a time, with weight decay `wd`; what it sets, but the learning rate, is put back afterwards."""
    parts.is_fitting = True
    scheduled = {hyper for callback in state.callbacks for hyper in callback.owns}
    restore = keep_hypers(parts.opt, {*scheduled, "weight_decay"} - {"lr"})
    fill_momentum(parts.opt, "momentum" in scheduled)
    try:
        if wd is not None:
            set_weight_decay(parts.opt, parts.groups, wd, parts.wd_norm_bias)
        state.weight_decays = tuple(group.get("weight_decay", 0.0) for group in parts.opt.param_groups)
        yield
    except BaseException as error:
        forget_unmade(parts.opt)
        if isinstance(error, RuntimeError):
            explain(error)
        raise
    finally:
        parts.is_fitting = False
        restore()
