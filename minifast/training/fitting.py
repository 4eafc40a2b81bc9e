"""How a Learner makes one fit: its arguments checked, its `State` made, what it sets put back."""
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ..base.batch import output_loss
from ..core import loop
from ..core.callback import Callback
from ..core.checks import check_loader, check_optimizer, check_trainable, check_valid
from ..core.ownership import CHECKPOINTS, check_callbacks, owner_of, resolve
from ..core.state import State
from ..data.dataloaders import as_dataloaders
from ..data.loader import count_steps, is_one_shot, micro_batches, n_batches, valid_sets
from ..errors import check_flag, check_int, check_number, check_path, quoted
from ..finder.finder import LRFinder
from ..machine.signals import DeferredInterrupt
from ..machine.workers import explain
from ..optim.fused import updater
from ..optim.hypers import keep_hypers
from ..optim.making import fill_momentum, forget_unmade, label_groups, norms_in_eval, set_weight_decay
from ..optim.rates import spread_lrs
from ..schedules.lr import ConstantLR
from ..schedules.scheduler import Scheduler
from ..schedules.time_limit import TICKS, TimeLimit
from ..show.screen import say
from ..standard.finite import FiniteLoss
from ..standard.metrics import Metrics
from ..standard.progress import Progress
from ..standard.recorder import Recorder

if TYPE_CHECKING:
    from ..resume.where import Resume
    from .trainer import Trainer


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


def fit(learn: "Trainer", n_epochs: int, lr: Any, schedule: Scheduler | None, **options: Unpack[FitOptions]) -> None:
    """Train for `n_epochs` with peaks `lr` by `schedule` (None: the callback that owns lr, else a constant rate)."""
    unknown = options.keys() - FitOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no argument {', '.join(sorted(unknown))}. Those of every fit are "
                        f"{', '.join(FitOptions.__annotations__)}.")
    check_assigned(learn)
    options["callbacks"] = given = check_callbacks(options.get("callbacks", ()), "callbacks")
    finder = next((cb for cb in (*given, *learn.callbacks) if isinstance(cb, LRFinder)), None)
    if finder is not None:
        _check_options(learn, lr, **options)
        if options.get("resume"):  # else nothing is looked for: the finder saves nothing
            _check_resume(learn, [*given, *learn.callbacks], options["resume"])
        return find(learn, finder, [callback for callback in given if callback is not finder], **options)
    state = prepare(learn, n_epochs, lr, schedule, **options)
    check_trainable(learn.model, state.group_names)
    resume = options.get("resume", False)
    # signals are held but in the loop, which has a block of its own: what surrounds it is done whole, or not at all
    with DeferredInterrupt(is_held=True), fitting(learn, state, options.get("wd")):
        if _is_kept(state.callbacks, resume):
            from ..resume.session import run  # not before it is used: so `import minifast` takes no longer for it
            learn.fits_ended = run(state, learn.fits_ended, resume)
        else:
            loop.run(state)


def prepare(learn: "Trainer", n_epochs: int, lr: Any, schedule: Scheduler | None,
            **options: Unpack[FitOptions]) -> State:
    """The state of a fit that could begin now. Raises whatever is wrong with it; changes nothing."""
    _check_idle(learn)
    lrs, given = _check_options(learn, lr, **options), check_callbacks(options.get("callbacks", ()), "callbacks")
    steps_per_epoch, minutes = options.get("steps_per_epoch"), options.get("minutes")
    still = norms_in_eval(learn.groups, learn.train_bn)
    trained = [module for module in learn.model.modules() if module not in still]
    if minutes is not None and is_one_shot(learn.dls.train):
        raise ValueError(f"minutes={minutes:g} takes as many passes over the training data as fit into the time, but "
                         f"it is an iterator ({type(learn.dls.train).__name__}), good for one. Pass a DataLoader, a "
                         "list, or an object whose __iter__ starts a new pass.")
    check_loader(learn.dls.train, n_epochs if minutes is None else 1, trained, steps_per_epoch)
    sets = valid_sets(learn.dls.valid)
    for _, loader in sets:
        check_valid(loader)
    users = _callbacks(learn, [*given, *([schedule] if schedule else []), *([TimeLimit(minutes)] if minutes else [])])
    if owner_of("lr", users) is None:
        users.append(ConstantLR())
    if owner_of("the finite check", users) is None:
        users.append(FiniteLoss())
    shown = [Progress()] if _is_verbose(learn, options.get("verbose")) else []
    accumulate = micro_batches(learn.dls.train, options.get("accumulate", 1), options.get("effective_batch_size"))
    per_epoch, batches, limit = count_steps(learn.dls.train, steps_per_epoch, accumulate)
    metrics = Metrics(learn.metrics, train=learn.train_metrics)
    if "resume" in options:
        _check_resume(learn, users, options["resume"])
    return new_state(
        learn, lrs=lrs, n_epochs=n_epochs if minutes is None else None, steps_per_epoch=per_epoch,
        n_steps=n_epochs * per_epoch if minutes is None else TICKS, accumulate=accumulate, n_batches=batches,
        max_batches=limit, metric_names=metrics.names([name for name, _ in sets]),
        callbacks=[learn.recorder, metrics, *users, *shown])


def find(learn: "Trainer", finder: LRFinder, given: list[Callback], *, wd: float | None = None, accumulate: int = 1,
         effective_batch_size: int | None = None, verbose: bool | None = None, **_: Any) -> None:
    """Run the finder in a sandbox; its result is all that stays. It takes as many passes as it needs."""
    _check_idle(learn)
    finder.ramps(learn.groups.names)  # bad ones are refused here, before anything begins
    label_groups(learn.opt, len(learn.groups))
    _check_parts(learn)
    check_trainable(learn.model, learn.groups.names)
    check_loader(learn.dls.train, 1, learn.model.modules())
    accumulate = micro_batches(learn.dls.train, accumulate, effective_batch_size)
    batches, recorder = n_batches(learn.dls.train), Recorder()
    running = [cb for cb in _callbacks(learn, [finder, *given]) if cb.in_lr_find or cb is finder]
    shown = [Progress("lr_find")] if _is_verbose(learn, verbose) else []
    with DeferredInterrupt(is_held=True), learn.sandbox([cb for cb in running if cb is not finder]):
        state = new_state(
            learn, n_epochs=finder.num_it, n_steps=finder.num_it, accumulate=accumulate, n_batches=batches,
            steps_per_epoch=None if batches is None else math.ceil(batches / accumulate), valid_sets=(),
            recorder=recorder, callbacks=[recorder, *running, *shown])
        with fitting(learn, state, wd):
            loop.run(state)
    learn.recorder.lr_find = finder.result()
    if shown:
        say(str(learn.recorder.lr_find))


def new_state(learn: "Trainer", **fields: Any) -> State:
    """A State of this learner's parts, with `fields` in place of those of a fit that does nothing."""
    defaults: dict[str, Any] = {
        "model": learn.model, "forward": learn.forward, "loss_func": loss_func(learn),
        "gradient": loop.gradient, "opt": learn.opt, "update": updater(learn.opt),
        "device": learn.device, "unpack": learn.unpack,
        "group_names": learn.groups.names, "lrs": (), "n_epochs": 1, "steps_per_epoch": None, "n_steps": 1,
        "train_dl": learn.dls.train, "valid_sets": valid_sets(learn.dls.valid), "callbacks": (),
        "recorder": learn.recorder, "norms_in_eval": norms_in_eval(learn.groups, learn.train_bn)}
    return State(**defaults | fields)


def loss_func(learn: "Trainer") -> Callable[[Any, Any], Any]:
    """(output, target) -> loss: the learner's, or what the output carries."""
    return learn.loss_func or output_loss


def check_assigned(learn: "Trainer") -> None:
    """Bring what may be assigned between fits into its form. Raises TypeError or ValueError for what cannot be."""
    learn.dls = as_dataloaders(learn.model, learn.dls)
    if (learn.loss_func is not None and not callable(learn.loss_func)) or isinstance(learn.loss_func, type):
        raise TypeError(f"loss_func must be a function (output, target) -> loss, got {learn.loss_func!r:.80}. "
                        "Pass e.g. nn.CrossEntropyLoss().")
    callbacks = check_callbacks(learn.callbacks, "callbacks")
    if not isinstance(learn.callbacks, list):
        learn.callbacks = callbacks
    if not isinstance(learn.metrics, list):
        learn.metrics = list(learn.metrics) if isinstance(learn.metrics, tuple) else [learn.metrics]
    Metrics(learn.metrics)  # refuses what is no metric, and two of one name


def _check_idle(learn: "Trainer") -> None:
    if learn.is_fitting:
        raise RuntimeError("this Learner is already fitting: a callback, or another thread, called it again.")


def _is_verbose(learn: "Trainer", verbose: bool | None) -> bool:
    return learn.verbose if verbose is None else check_flag("verbose", verbose)


def _check_options(learn: "Trainer", lr: Any, *, wd: float | None = None, callbacks: Iterable[Callback] = (),
                   steps_per_epoch: int | None = None, accumulate: int = 1, effective_batch_size: int | None = None,
                   minutes: float | None = None, resume: "Resume" = False, verbose: bool | None = None
                   ) -> tuple[float, ...]:
    """The peak of each layer group. Raises ValueError or TypeError for an argument of `fit` out of range."""
    if not isinstance(resume, (bool, str, os.PathLike)):
        raise TypeError(f'resume must be "auto", True, False, or the path of a checkpoint, got {quoted(resume)}.')
    if not isinstance(resume, bool):
        check_path("resume", resume)
    if wd is not None:
        check_number("wd", wd, minimum=0)
    if steps_per_epoch is not None:
        check_int("steps_per_epoch", steps_per_epoch)
    if minutes is not None:
        check_number("minutes", minutes, above=0, example="fit(1e-3, minutes=10)")
    check_int("accumulate", accumulate)
    _is_verbose(learn, verbose)
    label_groups(learn.opt, len(learn.groups))
    _check_parts(learn)
    return spread_lrs(lr, learn.groups.names)


def resume_of_next(learn: "Trainer", options: FitOptions) -> "Resume":
    """What `resume` is for the fit behind one with `options`: a checkpoint that was demanded is one of the first."""
    resume = options.get("resume", False)
    if resume is False or (not isinstance(resume, bool) and os.path.isdir(resume)):
        return resume
    return "auto" if owner_of(CHECKPOINTS, [*learn.callbacks, *options.get("callbacks", ())]) else False


def _is_kept(callbacks: Iterable[Callback], resume: "Resume") -> bool:
    """Whether a fit is saved or resumed."""
    return resume is not False or owner_of(CHECKPOINTS, callbacks) is not None


def _check_resume(learn: "Trainer", callbacks: Sequence[Callback], resume: "Resume") -> None:
    """Raise what a fit with `resume` would raise, as far as that can be told by the names of files."""
    if _is_kept(callbacks, resume):
        from ..resume.where import place
        place(callbacks, learn.fits_ended, resume).candidates()


def _check_parts(learn: "Trainer") -> None:
    """Raise ValueError if the model, its layer groups and the optimizer do not belong together."""
    check_optimizer(learn.model, learn.opt, (p for group in learn.groups for p in group.params))


def _callbacks(learn: "Trainer", given: list[Callback]) -> list[Callback]:
    """The learner's callbacks and those of one fit, one owner for each hyper-parameter."""
    callbacks = resolve(check_callbacks(learn.callbacks, "learn.callbacks"), given)
    if any(isinstance(callback, Recorder) for callback in callbacks):
        raise ValueError("a Learner has its own Recorder: read learn.recorder instead of passing another one.")
    return callbacks


@contextmanager
def fitting(learn: "Trainer", state: State, wd: float | None) -> Iterator[None]:
    """One fit at a time, with weight decay `wd`; what it sets, but the learning rate, is put back afterwards."""
    learn.is_fitting = True
    scheduled = {hyper for callback in state.callbacks for hyper in callback.owns}
    restore = keep_hypers(learn.opt, {*scheduled, "weight_decay"} - {"lr"})
    fill_momentum(learn.opt, "momentum" in scheduled)
    try:
        if wd is not None:
            set_weight_decay(learn.opt, learn.groups, wd, learn.wd_norm_bias)
        state.weight_decays = tuple(group.get("weight_decay", 0.0) for group in learn.opt.param_groups)
        yield
    except BaseException as error:
        forget_unmade(learn.opt)
        if isinstance(error, RuntimeError):
            explain(error)
        raise
    finally:
        learn.is_fitting = False
        restore()
