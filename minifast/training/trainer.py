"""The Trainer: owns model, data and optimizer, and makes the `State` of each fit."""
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ..base import snapshot
from ..base.batch import Batch, UnpackBatch, call_model, scores, split_batch
from ..base.nest import describe, to_device
from ..core import loop
from ..core.callback import Callback
from ..core.emitter import Emitter, evaluating
from ..core.ownership import check_callbacks
from ..core.predict import predict_all
from ..data.dataloaders import DataLoaders, as_dataloaders
from ..data.feed import feed
from ..data.loader import count_steps, generators, in_order, second_copy, valid_sets
from ..errors import check_flag, check_int, check_number, check_path, quoted
from ..machine.signals import DeferredInterrupt
from ..optim.groups import LayerGroups, Splitter, split
from ..optim.hypers import group_lrs
from ..optim.making import as_device, freeze, label_groups, make_optimizer
from ..optim.rates import LR, check_lr, check_rate, spread_lrs
from ..schedules.cycles import check_not_swapped, epochs_and_schedule, epochs_of_cycles
from ..schedules.lr import ConstantLR, CosineAnnealing, FlatCos, OneCycle, check_div
from ..schedules.plan import Plan
from ..schedules.scheduler import Scheduler
from ..show.tables import listed
from ..standard.metrics import Metrics
from ..standard.recorder import Recorder
from . import fitting
from .fitting import FitOptions

if TYPE_CHECKING:

    from ..resume.where import Resume

Data = DataLoaders | tuple[Iterable[Batch], Iterable[Batch] | Mapping[str, Iterable[Batch]] | None]


class Trainer:
    """Trains `model` on `dls` and remembers how it went.

    model: any `nn.Module`; moved to `device`. dls: `DataLoaders(train, valid)` or a tuple (train, valid) of iterables
    of batches; valid may be a dict of them by name. loss_func: (output, target) -> the mean loss (), or (sum, count)
    of a loss that is summed over tokens or the like; None: the output carries `.loss`. opt_func: a torch optimizer
    class or partial, called once with all parameters in their layer groups; its state persists across fits. lr: the
    default peak, in every form: float, slice(hi), slice(lo, hi), one value per layer group. splitter: None for one
    layer group, a callable model -> list of modules or parameter lists, or a dict of name -> glob over parameter names.
    wd: weight decay, None for the optimizer's own default; norms and biases have none unless `wd_norm_bias`. train_bn:
    whether norm layers of frozen groups go on training. metrics: functions (pred, target) or objects with update,
    compute and reset. train_metrics: compute them over the training data too, as `train_<name>`. callbacks: run in
    every fit. device: None for the accelerator, if there is one. seed: seeds Python, numpy and torch now; None: nothing
    is seeded. compile: whether fits call the model through `torch.compile`; a dict holds its
    options: {'mode': 'reduce-overhead'} has torch run small models as CUDA graphs. unpack: batch -> (inputs, target).
    verbose: print and show progress.

    `model, dls, loss_func, metrics, callbacks, opt, recorder` may be read, and assigned between fits.

    Raises ValueError or TypeError for what cannot work, before anything is changed.

    >>> learn = Trainer(nn.Linear(4, 1), ([(torch.ones(8, 4), torch.ones(8, 1))], None), nn.MSELoss(), verbose=False)
    >>> learn.fit(0.1, 3)
    >>> learn.recorder.lrs
    array([0.1, 0.1, 0.1])
    """

    def __init__(self, model: nn.Module, dls: Data, loss_func: Callable[[Any, Any], Any] | None = None, *,
                 opt_func: Callable[..., Optimizer] = torch.optim.AdamW, lr: LR = 1e-3, splitter: Splitter = None,
                 wd: float | None = None, wd_norm_bias: bool = False, train_bn: bool = True,
                 metrics: Iterable[Any] = (), train_metrics: bool = False, callbacks: Iterable[Callback] = (),
                 device: torch.device | str | None = None, seed: int | None = None,
                 compile: bool | Mapping[str, Any] = False, unpack: UnpackBatch = split_batch,
                 verbose: bool = True) -> None:
        self.model, self.loss_func, self.dls = model, loss_func, as_dataloaders(model, dls)
        self.metrics: list[Any] = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
        self.callbacks = check_callbacks(callbacks, "callbacks")
        fitting.check_assigned(self)
        self.train_bn, self.wd_norm_bias = check_flag("train_bn", train_bn), check_flag("wd_norm_bias", wd_norm_bias)
        self.train_metrics = check_flag("train_metrics", train_metrics)
        self.verbose = check_flag("verbose", verbose)
        if not callable(unpack):
            raise TypeError(f"unpack must be a function batch -> (inputs, target), got {unpack!r:.80}.")
        wd = None if wd is None else check_number("wd", wd, minimum=0)
        device = as_device(device, model)
        groups = split(model, splitter)
        lrs = spread_lrs(lr, groups.names)
        self.model, self.device, self.unpack = model.to(device), device, unpack
        self.lr = check_lr("lr", lr)
        self.opt = make_optimizer(opt_func, self.model, groups, lrs, wd, self.wd_norm_bias)
        self.recorder = Recorder()
        self._groups = groups
        if not isinstance(compile, (bool, Mapping)) or (isinstance(compile, Mapping) and not all(
                isinstance(option, str) for option in compile)):
            raise TypeError(f"compile must be True, False or a dict of options of torch.compile, got {compile!r:.80}. "
                            "Pass e.g. {'mode': 'reduce-overhead'}.")
        is_compiled = isinstance(compile, Mapping) or compile
        self._compile_options: dict[str, Any] = dict(compile) if isinstance(compile, Mapping) else {}
        self._compiled: Any = torch.compile(self.model, **self._compile_options) if is_compiled else None
        self.is_fitting = False
        self.fits_ended: dict[str, int] = {}  # of each run's folder: how many fits were saved in it
        if seed is not None:
            snapshot.seed_all(seed)

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.model.parameters())
        return (f"{type(self).__name__}: {type(self.model).__name__}, {n:,} parameters in {len(self._groups)} layer "
                f"group{'s' * (len(self._groups) != 1)} ({listed(self._groups.names)}), on {self.device}")

    @property
    def groups(self) -> LayerGroups:
        """The layer groups, first layers first; printed, a table of what they hold and how they are trained."""
        label_groups(self.opt, len(self._groups))
        self._groups.lrs = group_lrs(self.opt, len(self._groups))
        decays = [[group.get("weight_decay") for group in self.opt.param_groups if group["layer_group"] == i]
                  for i in range(len(self._groups))]
        self._groups.wds = [max((wd for wd in of_group if wd is not None), default=None) for of_group in decays]
        return self._groups

    @property
    def forward(self) -> Callable[..., Any]:
        """What a fit calls with the inputs: the model, or with `compile` its compiled form, which shares its weights.
        """
        if self._compiled is None:
            return self.model
        if self._compiled._orig_mod is not self.model:  # learn.model was assigned
            self._compiled = torch.compile(self.model, **self._compile_options)
        compiled: Callable[..., Any] = self._compiled
        return compiled

    @property
    def sched(self) -> Recorder:
        """fastai 0.7's name of `recorder`."""
        return self.recorder

    # ---- training

    def fit(self, lr: LR, n_cycle: int = 1, *, cycle_len: int | None = None, cycle_mult: int = 1,
            use_clr: Sequence[float] | None = None, use_clr_beta: Sequence[float] | None = None,
            wd: float | None = None, callbacks: Iterable[Callback] = (), steps_per_epoch: int | None = None,
            accumulate: int = 1, effective_batch_size: int | None = None, minutes: float | None = None,
            resume: "Resume" = False, verbose: bool | None = None) -> None:
        """Train for `n_cycle` cycles with peak learning rate `lr`.

        lr: float, slice(hi), slice(lo, hi) or one value per layer group. Without `cycle_len` a cycle is an epoch and
        the learning rate is constant, unless a callback owns it. cycle_len: epochs in the first cycle, each of which
        anneals by a cosine, or with use_clr=(div, cut_div[, mom_max, mom_min]) is a `CircularLR`, or with
        use_clr_beta=(div, pct[, mom_max, mom_min]) a `CircularLRBeta`; cycle c is cycle_mult**c times as long.

        wd: weight decay of this fit. callbacks: of this fit; one that owns a hyper-parameter replaces the learner's.
        steps_per_epoch: weight updates per epoch, for a loader without len() or to shorten epochs. accumulate:
        batches per weight update; or effective_batch_size: samples per weight update, a multiple of the loader's.
        minutes: how long to train, instead of how many epochs: the cycles are stretched over that time, see
        `TimeLimit`. verbose: None for the learner's.

        resume: whether to go on where this fit was killed, from what a `Checkpoint` among the callbacks has kept.
        "auto": from the newest checkpoint if there is one; True: there has to be one; a path: from that file, or the
        newest one in that folder; False: start afresh, and refuse to overwrite a run. A fit that had ended restores
        its final state and returns. The fits of a script are told apart by their number: the same script, run again,
        passes over those that had ended.

        Raises ValueError or TypeError before anything is changed; ValueError for a checkpoint of another fit, with
        what is different; FileNotFoundError or FileExistsError as `resume` says.
        """
        check_not_swapped(lr, n_cycle)
        n_epochs, schedule = epochs_and_schedule(n_cycle, cycle_len, cycle_mult, use_clr, use_clr_beta)
        fitting.fit(self, n_epochs, lr, schedule, wd=wd, callbacks=callbacks, steps_per_epoch=steps_per_epoch,
                    accumulate=accumulate, effective_batch_size=effective_batch_size, minutes=minutes, resume=resume,
                    verbose=verbose)

    def fit_one_cycle(self, cycle_len: int | None = None, max_lr: LR | None = None, *, div_factor: float = 25.0,
                      pct_start: float = 0.3, final_div: float | None = None,
                      moms: Sequence[float] | None = (0.95, 0.85), cyc_len: int | None = None,
                      lr_max: LR | None = None, **options: Unpack[FitOptions]) -> None:
        """Train for `cycle_len` epochs by one cycle of `OneCycle`, whose arguments these are.

        max_lr: the peak, None for the learner's `lr`. cyc_len, lr_max: fastai's names of the first two. options: wd,
        callbacks, steps_per_epoch, accumulate, effective_batch_size, minutes, resume, verbose, as in `fit`. With
        minutes, `cycle_len` may be left out.
        """
        name, cycle_len = _one_of("cycle_len", cycle_len, "cyc_len", cyc_len)
        if cycle_len is None and options.get("minutes") is not None:
            cycle_len = 1  # the time says how long
        n_epochs = check_int(name, cycle_len, example="fit_one_cycle(3, 0.1)")
        name, max_lr = _one_of("max_lr", max_lr, "lr_max", lr_max)
        schedule = OneCycle(None, div_factor, pct_start, final_div=final_div, moms=moms)
        fitting.fit(self, n_epochs, self._peak(name, max_lr), schedule, **options)

    def fit_flat_cos(self, n_epoch: int | None = None, lr: LR | None = None, *, pct_start: float = 0.75,
                     div_final: float = 1e5, **options: Unpack[FitOptions]) -> None:
        """Train for `n_epoch` epochs by `FlatCos`: constant, then a half-cosine down. options: as in `fit`.

        With minutes, `n_epoch` may be left out.
        """
        if n_epoch is None and options.get("minutes") is not None:
            n_epoch = 1  # the time says how long
        n_epochs = check_int("n_epoch", n_epoch, example="fit_flat_cos(3, 0.01)")
        fitting.fit(self, n_epochs, self.lr if lr is None else lr, FlatCos(pct_start, div_final), **options)

    def fit_sgdr(self, n_cycles: int, cycle_len: int, lr_max: LR | None = None, *, cycle_mult: int = 2,
                 **options: Unpack[FitOptions]) -> None:
        """Train for `n_cycles` cosine cycles, cycle c `cycle_len * cycle_mult**c` epochs long. options: as in `fit`.

        Source: SGDR (arXiv 1608.03983); no warm-up, as in fastai 2.
        """
        n_cycles, cycle_len = check_int("n_cycles", n_cycles), check_int("cycle_len", cycle_len)
        schedule = CosineAnnealing(n_cycles, cycle_mult, warmup_frac=0.0)
        n_epochs = epochs_of_cycles(cycle_len, n_cycles, cycle_mult)
        fitting.fit(self, n_epochs, self._peak("lr_max", lr_max), schedule, **options)

    def fine_tune(self, epochs: int, base_lr: float = 2e-3, *, freeze_epochs: int = 1, lr_mult: float = 100,
                  pct_start: float = 0.3, div: float = 5.0, **options: Unpack[FitOptions]) -> None:
        """Train the last layer group for `freeze_epochs`, then all of them for `epochs`, both by one cycle.

        First with peak base_lr (frozen, pct_start 0.99), then with slice(base_lr/2/lr_mult, base_lr/2), `pct_start`
        and div_factor=`div`. options: as in `fit`, for both; minutes are for both together, shared like the epochs.
        Source: fastai 2's fine_tune.
        """
        epochs, freeze_epochs = check_int("epochs", epochs), check_int("freeze_epochs", freeze_epochs)
        base_lr = check_rate("base_lr", base_lr, example="fine_tune(3, 2e-3)")
        lr_mult = check_number("lr_mult", lr_mult, minimum=1)
        check_div("div", div)
        options["callbacks"] = check_callbacks(options.get("callbacks", ()), "callbacks")
        options.setdefault("resume", False)
        first, second = OneCycle(pct_start=0.99), OneCycle(None, div, pct_start)
        both, minutes = freeze_epochs + epochs, options.pop("minutes", None)
        head, rest = options.copy(), options.copy()
        if minutes is not None:
            minutes = check_number("minutes", minutes, above=0)
            head["minutes"], rest["minutes"] = minutes * freeze_epochs / both, minutes * epochs / both
        fitting.prepare(self, freeze_epochs, base_lr, first, **head)  # what is wrong is said before anything is frozen
        rest["resume"] = fitting.resume_of_next(self, options)
        self.freeze()
        fitting.fit(self, freeze_epochs, slice(base_lr), first, **head)
        self.unfreeze()
        fitting.fit(self, epochs, slice(base_lr / 2 / lr_mult, base_lr / 2), second, **rest)

    @contextmanager
    def sandbox(self, callbacks: Iterable[Callback] = ()) -> Iterator["Trainer"]:
        """A block that leaves no trace: whatever happens inside is undone, however it ends.

        Restored bit for bit: parameters, buffers, gradients, requires_grad, modes; optimizer state and
        hyper-parameters; all global random generators and those of the loaders; the Recorder; the learner's own
        attributes; and what the learner's callbacks, and `callbacks`, keep by their `state_dict`. What a fit inside it
        writes to files and services stays written. Inside, workers of a DataLoader are new ones. Costs a copy of model
        and optimizer state in memory and no file. Raises ValueError for one-pass data.

        >>> learn = Trainer(nn.Linear(1, 1), ([(torch.ones(2, 1), torch.ones(2, 1))], None), nn.MSELoss(),
        ...                 verbose=False)
        >>> before = learn.model.weight.item()
        >>> with learn.sandbox():
        ...     learn.fit(1.0, 5)
        >>> learn.model.weight.item() == before
        True
        """
        train, valid = self.dls.train, self.dls.valid
        copies = {name: second_copy(loader) for name, loader in valid_sets(valid)}
        twins = copy.copy(self.dls)  # whatever else it holds, such as the classes
        twins.train, twins.valid = second_copy(train), copies if isinstance(valid, Mapping) else copies.get("")
        callbacks = check_callbacks(callbacks, "callbacks")
        watched = [(cb, cb.state_dict()) for cb in (*self.callbacks, *callbacks)]
        attributes = dict(vars(self))
        lists = [(value, list(value)) for value in attributes.values() if isinstance(value, list)]
        restore_recorder = self.recorder.keep()
        restore = snapshot.capture(self.model, self.opt, [generator for loader in (train, *copies.values())
                                                         for generator in generators(loader)])
        self.dls = twins
        try:
            yield self
        finally:
            with DeferredInterrupt(is_held=True):  # Ctrl-C must not stop this half way
                vars(self).clear()
                vars(self).update(attributes)
                for value, items in lists:
                    value[:] = items
                for cb, saved in watched:
                    cb.load_state_dict(saved)
                restore_recorder()
                restore()

    # ---- layer groups

    def freeze(self) -> None:
        """Train the last layer group only (and, with `train_bn`, all norm layers)."""
        self.freeze_to(-1)

    def freeze_to(self, n: int) -> None:
        """Freeze layer groups [:n] and train [n:]; -g <= n < g for g groups.

        A frozen parameter has requires_grad False and no gradient, is not decayed, and loses its optimizer state.
        Raises ValueError for another n.
        """
        g = len(self._groups)
        if isinstance(n, bool) or not isinstance(n, int) or not -g <= n < g:
            raise ValueError(f"freeze_to(n) needs an int {-g} <= n < {g} for {g} layer group{'s' * (g > 1)} "
                             f"({', '.join(self._groups.names)}), got {quoted(n)}.")
        freeze(self._groups, n % g, self.opt, self.train_bn)

    def unfreeze(self) -> None:
        """Train all layer groups."""
        self.freeze_to(0)

    # ---- looking ahead and looking back

    def plan(self, n_epochs: int, schedule: Scheduler | None = None, *, lr: LR | None = None,
             steps_per_epoch: int | None = None, accumulate: int = 1) -> Plan:
        """What a fit of `n_epochs` with `schedule` would do to each layer group, without doing it.

        lr: the peak where the schedule has none, None for the learner's. Prints as a table, `.plot()` draws it.

        >>> learn = Trainer(nn.Linear(1, 1), ([(torch.ones(2, 1), torch.ones(2, 1))] * 50, None), nn.MSELoss())
        >>> learn.plan(2, OneCycle(0.1)).table()
        epoch  step         lr  momentum
            0     0     0.0040    0.9500
            1    50     0.0812    0.8688
            1    99  5.075e-05    0.9499
        """
        schedule = ConstantLR() if schedule is None else schedule
        if not isinstance(schedule, Scheduler):
            raise TypeError(f"schedule must be a schedule such as OneCycle(0.1), got {schedule!r:.80}.")
        n_epochs = check_int("n_epochs", n_epochs, example="plan(3, OneCycle(0.1))")
        per_epoch, _, _ = count_steps(self.dls.train, steps_per_epoch, accumulate)
        peak = self.lr if lr is None else lr
        lrs = np.array(spread_lrs(peak if schedule.max_lr is None else schedule.max_lr, self._groups.names))
        values = {hyper: np.array(column) for hyper, column in schedule.values(n_epochs * per_epoch, 1.0).items()}
        if "lr" in values:
            values["lr"] = values["lr"][:, None] * lrs
        return Plan(n_epochs, per_epoch, self._groups.names, values, repr(schedule))

    def validate(self, dl: Iterable[Batch] | str | None = None) -> dict[str, float]:
        """The validation loss and the metrics over `dl`, None for the validation data: keys as in an epoch row.

        Of several validation sets each has keys of its own, like noisy_valid_loss; `dl` may be the name of one.

        Random generators are left as they were. Raises ValueError if there is no data.
        """
        data = self.eval_data(dl)
        with self.eval_mode(data):
            state = fitting.new_state(self, valid_sets=valid_sets(data))
            state.metrics = {}
            loop.validate(state, Emitter([Metrics(self.metrics)], state))
        return state.metrics

    def get_preds(self, dl: Iterable[Batch] | str | None = None, *, with_loss: bool = False) -> tuple[Any, ...]:
        """(predictions, targets), or (predictions, targets, losses), over `dl`, None for the validation data.

        Raw outputs (the `.logits` of one that has them) of all samples, in the order of the data set even if `dl`
        shuffles, on the CPU; nests of tensors stay nests. losses: one per sample, (n,), over what the loss does not
        ignore. Random generators are left as they were.
        """
        loss_func = self.loss_func
        if check_flag("with_loss", with_loss) and loss_func is None:
            raise ValueError("with_loss=True needs a loss_func on the Learner.")
        data = self.eval_data(dl)
        if isinstance(data, Mapping):
            raise ValueError(f"there are several validation sets: pass one of them, e.g. "
                             f"get_preds({next(iter(data))!r}).")
        with self.eval_mode(data):
            batches = feed(in_order(data), self.device, None, DeferredInterrupt())
            return predict_all(self.model, batches, self.unpack, loss_func if with_loss else None)

    @torch.no_grad()
    def predict(self, x: Any) -> Any:
        """The model's output for one batch of inputs `x` (without targets), in eval mode, on the CPU."""
        with self.eval_mode():
            try:
                return to_device(scores(call_model(self.model, to_device(x, self.device))), "cpu")
            except Exception as error:
                error.add_note(f"in the model, called by predict(x) with {describe(x)}")
                raise

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights, plain tensors, to `path`; gives the path. Raises FileNotFoundError without the folder."""
        from ..files.weights import save_weights
        return save_weights(self.model, check_path("path", path))

    def load(self, path: str | os.PathLike[str]) -> "Trainer":
        """Load weights that `save` wrote, or those in a checkpoint.

        Raises ValueError that names what does not fit, and then changes nothing.
        """
        from ..files.weights import load_weights
        load_weights(self.model, check_path("path", path))
        return self

    # ---- inside

    def _peak(self, name: str, lr: Any) -> Any:
        """The peak `lr` of a fit, checked under the `name` that was typed; None: the learner's."""
        if lr is None:
            return self.lr
        spread_lrs(lr, self._groups.names, name)
        return check_lr(name, lr)

    @contextmanager
    def eval_mode(self, data: Any = None) -> Iterator[None]:
        """Eval mode, as the callbacks want it; modes and random generators, those of `data` too, are put back."""
        restore_modes = snapshot.modes(self.model)
        restore_rng = snapshot.rng(generator for _, loader in valid_sets(data) for generator in generators(loader))
        self.model.eval()
        try:
            with evaluating(self.callbacks, self.model):
                yield
        finally:
            restore_modes()
            restore_rng()

    def eval_data(self, dl: Iterable[Batch] | str | None) -> Iterable[Batch]:
        fitting.check_assigned(self)
        data = self.dls.valid if dl is None else dl
        if isinstance(data, str):  # the name of a validation set
            sets = self.dls.valid if isinstance(self.dls.valid, Mapping) else {}
            if data not in sets:
                raise ValueError(f"there is no validation set {data!r}: " +
                                 (f"the names are {', '.join(sets)}. Pass one of them, or a loader." if sets else
                                  "there are no names. Pass a loader, or no dl for the validation data."))
            data = sets[data]
        if data is None:
            raise ValueError("there is no validation data. Pass a loader, or make the Learner with "
                             "DataLoaders(train, valid).")
        if isinstance(data, Mapping) and not data:
            raise ValueError("dl must hold at least one validation set, got none.")
        if isinstance(data, DataLoaders):
            raise TypeError(f"dl must be one loader, got a {type(data).__name__} with two. Pass dl.valid or dl.train.")
        if not isinstance(data, Iterable):
            raise TypeError(f"dl must be an iterable of batches, got {dl!r:.80}.")
        return data


def _one_of(name: str, value: Any, alias: str, aliased: Any) -> tuple[str, Any]:
    """Whichever of two names of one argument was given, and its value."""
    if value is not None and aliased is not None:
        raise ValueError(f"{name}={value!r} and {alias}={aliased!r} are the same argument: pass one of them.")
    return (name, value) if aliased is None else (alias, aliased)
