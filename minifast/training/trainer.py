"""The Trainer: owns the parts of its fits, trains, validates and predicts, and can undo all of that."""
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch

from ..base import snapshot
from ..base.batch import Batch, call_model, scores
from ..base.nest import describe, to_device
from ..core import loop
from ..core.callback import Callback
from ..core.emitter import Emitter, evaluating
from ..core.ownership import check_callbacks
from ..data.dataloaders import eval_data
from ..data.feed import feed
from ..data.loader import count_steps, generators, in_order, valid_sets
from ..errors import check_flag, check_int, check_number, check_path
from ..machine.signals import DeferredInterrupt
from ..optim.rates import LR, check_rate, spread_lrs
from ..schedules.cycles import epochs_and_schedule, epochs_of_cycles
from ..schedules.lr import ConstantLR, CosineAnnealing, FlatCos, OneCycle, check_div
from ..schedules.scheduler import Plan, Scheduler, plan_of
from ..show.screen import say
from ..show.tables import shown
from ..standard.metrics import Metrics
from . import fitting
from .fitting import FitOptions
from .parts import Parts
from .predict import predict_all
from .sandbox import sandbox

if TYPE_CHECKING:
    from ..resume.session import Resume


class Trainer(Parts):
    """Trains `model` on `dls` and remembers how it went. `Learner` describes the arguments."""

    def fit(self, lr: LR, n_cycle: int = 1, *, cycle_len: int | None = None, cycle_mult: int = 1,
            use_clr: Sequence[float] | None = None, use_clr_beta: Sequence[float] | None = None,
            wd: float | None = None, callbacks: Iterable[Callback] = (), steps_per_epoch: int | None = None,
            accumulate: int = 1, effective_batch_size: int | None = None, minutes: float | None = None,
            resume: "Resume" = False, verbose: bool | None = None) -> None:
        """Train for `n_cycle` cycles with peak learning rate `lr`.

        lr: float, slice(hi), slice(lo, hi) or one value per layer group.
        n_cycle: without `cycle_len` a cycle is an epoch, and the learning rate is constant unless a callback owns it.
        cycle_len: epochs in the first cycle. Each cycle anneals by a cosine, unless `use_clr` or `use_clr_beta`.
        cycle_mult: cycle c is cycle_mult**c times as long as the first.
        use_clr: (div, cut_div[, mom_max, mom_min]): each cycle is a `CircularLR`.
        use_clr_beta: (div, pct[, mom_max, mom_min]): each cycle is a `CircularLRBeta`.

        These are the options of every `fit*`:
        wd: weight decay of this fit.
        callbacks: of this fit; one that owns a hyper-parameter replaces the learner's.
        steps_per_epoch: weight updates per epoch, for a loader without len() or to shorten epochs.
        accumulate: batches per weight update.
        effective_batch_size: samples per weight update instead, a multiple of the loader's batch size.
        minutes: how long to train, instead of how many epochs: the schedule is stretched over it, see `TimeLimit`.
        resume: whether to go on where this fit was killed, from what a `Checkpoint` among the callbacks has kept.
            "auto": from the newest checkpoint if there is one; True: there has to be one; a path: from that file, or
            the newest one in that folder; False: start afresh, and refuse to overwrite a run. A fit that had ended
            restores its final state and returns. The fits of a script are told apart by their number: the same
            script, run again, passes over those that had ended.
        verbose: print and show progress; None: as the learner.

        Raises ValueError or TypeError before anything is changed; ValueError for a checkpoint of another fit, with
        what is different; FileNotFoundError or FileExistsError as `resume` says.
        """
        if isinstance(lr, int) and isinstance(n_cycle, float) and 0 < n_cycle < 1 <= lr:  # another library's order
            raise ValueError(f"fit(lr, n_cycle) takes the learning rate first, got lr={lr}, n_cycle={n_cycle:g}. "
                             f"Did you mean fit({n_cycle:g}, {lr})?")
        n_epochs, schedule = epochs_and_schedule(n_cycle, cycle_len, cycle_mult, use_clr, use_clr_beta)
        fitting.fit(self, n_epochs, lr, schedule, wd=wd, callbacks=callbacks, steps_per_epoch=steps_per_epoch,
                    accumulate=accumulate, effective_batch_size=effective_batch_size, minutes=minutes, resume=resume,
                    verbose=verbose)

    def fit_one_cycle(self, cycle_len: int | None = None, max_lr: LR | None = None, *, div_factor: float = 25.0,
                      pct_start: float = 0.3, final_div: float | None = None,
                      moms: Sequence[float] | None = (0.95, 0.85), cyc_len: int | None = None,
                      lr_max: LR | None = None, **options: Unpack[FitOptions]) -> None:
        """Train for `cycle_len` epochs by one cycle of `OneCycle`, whose arguments these are.

        cycle_len: epochs; with `minutes` it may be left out.
        max_lr: the peak, None for the learner's `lr`.
        cyc_len, lr_max: fastai's names of the first two. options: as in `fit`.
        """
        n_epochs = _epochs(*_one_of("cycle_len", cycle_len, "cyc_len", cyc_len), options, "fit_one_cycle(3, 0.1)")
        peak = self._peak(*_one_of("max_lr", max_lr, "lr_max", lr_max))
        schedule = OneCycle(None, div_factor, pct_start, final_div=final_div, moms=moms)
        fitting.fit(self, n_epochs, peak, schedule, **options)

    def fit_flat_cos(self, n_epoch: int | None = None, lr: LR | None = None, *, pct_start: float = 0.75,
                     div_final: float = 1e5, **options: Unpack[FitOptions]) -> None:
        """Train for `n_epoch` epochs by `FlatCos`; options: as in `fit`; with `minutes`, `n_epoch` may be left out."""
        n_epochs = _epochs("n_epoch", n_epoch, options, "fit_flat_cos(3, 0.01)")
        fitting.fit(self, n_epochs, self._peak("lr", lr), FlatCos(pct_start, div_final), **options)

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
        and div_factor=`div`. options: as in `fit`; minutes are shared like the epochs. Source: fastai 2's fine_tune.
        """
        epochs, freeze_epochs = check_int("epochs", epochs), check_int("freeze_epochs", freeze_epochs)
        base_lr = check_rate("base_lr", base_lr, example="fine_tune(3, 2e-3)")
        lr_mult = check_number("lr_mult", lr_mult, minimum=1)
        check_div("div", div)
        options["callbacks"] = check_callbacks(options.get("callbacks", ()), "callbacks")
        first, second = OneCycle(pct_start=0.99), OneCycle(None, div, pct_start)
        minutes, head, rest = options.get("minutes"), options.copy(), options.copy()
        if minutes is not None:
            both, minutes = freeze_epochs + epochs, check_number("minutes", minutes, above=0)
            head["minutes"], rest["minutes"] = minutes * freeze_epochs / both, minutes * epochs / both
        fitting.prepare(self, freeze_epochs, base_lr, first, **head)  # what is wrong is said before anything is frozen
        rest["resume"] = fitting.resume_of_next(self, options)
        self.freeze()
        fitting.fit(self, freeze_epochs, slice(base_lr), first, **head)
        self.unfreeze()
        fitting.fit(self, epochs, slice(base_lr / 2 / lr_mult, base_lr / 2), second, **rest)

    def plan(self, n_epochs: int, schedule: Scheduler | None = None, *, lr: LR | None = None,
             steps_per_epoch: int | None = None, accumulate: int = 1) -> Plan:
        """What a fit of `n_epochs` with `schedule` would do to each layer group, without doing it.

        lr: the peak where the schedule has none, None for the learner's. Prints as a table, `.plot()` draws it.

        >>> learn = Trainer(torch.nn.Linear(1, 1), ([(torch.ones(2, 1), torch.ones(2, 1))] * 50, None))
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
        return plan_of(schedule, n_epochs, per_epoch or 1, self._groups.names, self._peak("lr", lr))

    @contextmanager
    def sandbox(self, callbacks: Iterable[Callback] = ()) -> Iterator[Self]:
        """A block that leaves no trace: whatever happens inside is undone, however it ends.

        Restored bit for bit: parameters, buffers, gradients, requires_grad, modes; optimizer state and
        hyper-parameters; all global random generators and those of the loaders; the Recorder; the learner's own
        attributes; and what the learner's callbacks, and `callbacks`, keep by their `state_dict`. What a fit inside it
        writes to files and services stays written. Inside, workers of a DataLoader are new ones. Costs a copy of model
        and optimizer state in memory. Raises ValueError for one-pass data.

        >>> learn = Trainer(torch.nn.Linear(1, 1), ([(torch.ones(2, 1), torch.ones(2, 1))], None),
        ...                 torch.nn.MSELoss(), verbose=False)
        >>> before = learn.model.weight.item()
        >>> with learn.sandbox():
        ...     learn.fit(1.0, 5)
        >>> learn.model.weight.item() == before
        True
        """
        with sandbox(self, callbacks):
            yield self

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
        if check_flag("with_loss", with_loss) and self.loss_func is None:
            raise ValueError("with_loss=True needs a loss_func on the Learner.")
        data = self.eval_data(dl)
        if isinstance(data, Mapping):
            raise ValueError(f"there are several validation sets: pass one, e.g. get_preds({next(iter(data))!r}).")
        with self.eval_mode(data):
            batches = feed(in_order(data), self.device, None, DeferredInterrupt())
            return predict_all(self.model, batches, self.unpack, self.loss_func if with_loss else None)

    @torch.no_grad()
    def predict(self, x: Any) -> Any:
        """The model's output for one batch of inputs `x` (without targets), in eval mode, on the CPU."""
        with self.eval_mode():
            try:
                return to_device(scores(call_model(self.model, to_device(x, self.device))), "cpu")
            except Exception as error:
                error.add_note(f"in the model, called by predict(x) with {describe(x)}")
                raise

    @contextmanager
    def eval_mode(self, data: Any = None) -> Iterator[None]:
        """A block in eval mode, as the callbacks want it. Restores modes and random generators, those of `data` too."""
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
        """The data that `validate(dl)` reads. Raises ValueError or TypeError if there is none."""
        self.check_assigned()
        return eval_data(self.dls, dl)  # type: ignore[no-any-return]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights to `path` (*.safetensors: for other programs too) and give it. Its folder has to exist."""
        from ..files.weights import save_weights
        return save_weights(self.model, check_path("path", path))

    def load(self, path: str | os.PathLike[str]) -> Self:
        """Load weights that `save` wrote, those in a checkpoint, or those of other programs in a .safetensors.

        Raises ValueError that names what does not fit, and then changes nothing.
        """
        from ..files.weights import load_weights
        load_weights(self.model, check_path("path", path))
        return self

    def load_best(self, path: str | os.PathLike[str]) -> Self:
        """Load the weights of the best epoch of a run, as `SaveBest` and `Checkpoint(path)` have kept them.

        path: the folder of the run (then it is its last fit's), of a fit, or a best.ckpt. The weights are those that
        were validated: of an `EMA`, the average. Raises FileNotFoundError if there is none, ValueError for one that is
        damaged or does not fit; then nothing changes.
        """
        from ..resume.folder import load_best
        best = load_best(self.model, check_path("path", path))
        if self.verbose:
            say(f"loaded the weights of epoch {best['epoch']}: {best['monitor']} {shown(best['value'])}")
        return self

    def _peak(self, name: str, lr: Any) -> Any:
        """The peak `lr` of a fit, checked under the `name` that was typed; None: the learner's."""
        return self.lr if lr is None else spread_lrs(lr, self._groups.names, name)


def _one_of(name: str, value: Any, alias: str, aliased: Any) -> tuple[str, Any]:
    """Whichever of two names of one argument was given, and its value."""
    if value is not None and aliased is not None:
        raise ValueError(f"{name}={value!r} and {alias}={aliased!r} are the same argument: pass one of them.")
    return (name, value) if aliased is None else (alias, aliased)


def _epochs(name: str, n_epochs: Any, options: FitOptions, example: str) -> int:
    """How many epochs a schedule is made for; 1 if none are given but `minutes`, which say how long it takes."""
    is_timed = n_epochs is None and options.get("minutes") is not None
    return 1 if is_timed else check_int(name, n_epochs, example=example)
