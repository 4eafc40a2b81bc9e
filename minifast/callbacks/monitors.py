"""Callbacks that watch one column of the epoch table: stop early, keep the best weights, lower the learning rate."""
import logging
import math
import os
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..base.snapshot import clone
from ..core.callback import Callback
from ..core.emitter import evaluating
from ..core.state import State
from ..errors import check_flag, check_int, check_number, check_path, quoted
from ..files.weights import load_weights, save_weights
from ..record.record import Best
from ..show.tables import shown
from ..standard.meters import snake_case
from .weights import FINAL_WEIGHTS

log = logging.getLogger("minifast")

# Words in the names of columns. Those of the first line win: a "dice_loss" is better when it is smaller.
LOWER = {"loss", "error", "err", "mae", "mse", "rmse", "mape", "rmsle", "perplexity", "ppl", "nll", "bce", "ece", "wer",
         "cer", "brier"}
HIGHER = {"accuracy", "acc", "top", "auc", "auroc", "roc", "f1", "fbeta", "precision", "recall", "sensitivity",
          "specificity", "r2", "iou", "jaccard", "dice", "kappa", "mcc", "ndcg", "map", "bleu", "rouge", "psnr", "ssim",
          "pearson", "spearman", "correlation"}


@dataclass(eq=False)
class Monitor(Callback):
    """What callbacks that watch a column have in common: whether an epoch was better than all before it.

    A value that is not finite is never better; a cancelled epoch does not count.
    """

    monitor: str = "valid_loss"
    _: KW_ONLY
    mode: str | None = None
    min_delta: float = 0.0

    saves: ClassVar[tuple[str, ...]] = ("best", "best_epoch")

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str):
            raise TypeError("monitor must be the name of a column of the epoch table, e.g. \"valid_loss\", got "
                            f"{quoted(self.monitor)}.")
        if not (self.mode is None or (isinstance(self.mode, str) and self.mode in ("min", "max"))):
            raise ValueError(f"mode must be \"min\", \"max\" or None, got {self.mode!r}.")
        self.min_delta = check_number("min_delta", self.min_delta, minimum=0)
        self._forget()

    def _forget(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None

    def before_fit(self, state: State) -> None:
        self._check_name(state)
        self._sign = 1 if (self.mode or self._mode_by_name(state)) == "max" else -1
        self._forget()

    def after_epoch(self, state: State) -> None:
        value = state.metrics.get(self.monitor)
        if value is not None:
            self.judge(state, value, self._improves(value))
            return
        is_complete = any(name.endswith("valid_loss") for name in state.metrics)
        if is_complete and not self.monitor.startswith("train_"):
            raise ValueError(f"there is no {self.monitor!r} in the epoch row: {', '.join(state.metrics)}. A metric "
                             "object that computes a dict tells its keys by an attribute `names`.")

    def judge(self, state: State, value: float, is_better: bool) -> None:
        """An epoch has ended with `value`: to call `keep_best` if it is better is part of it."""
        raise NotImplementedError(f"{type(self).__name__} is to define judge(state, value, is_better).")

    def keep_best(self, state: State, value: float) -> None:
        self.best, self.best_epoch = value, state.epoch

    def _improves(self, value: float) -> bool:
        return math.isfinite(value) and (self.best is None or self._sign * (value - self.best) > self.min_delta)

    def _check_name(self, state: State) -> None:
        names = [name for name in state.record.row_names if name != "epoch"]
        if self.monitor in names:
            return
        if state.valid_sets:
            why = "which is not in the epoch table"
            near = get_close_matches(self.monitor, names, 1) or [name for name in names if name.endswith(self.monitor)]
            hint = f" Did you mean {near[0]!r}?" if near else ""
        else:
            why = "but there is no validation data"
            hint = " Make the Learner with DataLoaders(train, valid), or pass monitor=\"train_loss\"."
        raise ValueError(f"{type(self).__name__} watches {self.monitor!r}, {why}: the columns of this fit are "
                         f"{', '.join(names)}.{hint}")

    def _mode_by_name(self, state: State) -> str:
        prefixes = [*(f"{valid_set}_" for valid_set, _ in state.valid_sets if valid_set), "train_"]
        prefix = next((prefix for prefix in prefixes if self.monitor.startswith(prefix)), "")
        words = set(snake_case(self.monitor.removeprefix(prefix)).split("_"))
        if words & (LOWER | HIGHER):
            return "min" if words & LOWER else "max"
        raise ValueError(f"it cannot be told by the name whether a smaller or a larger {self.monitor!r} is better: "
                         f"pass {type(self).__name__}(..., mode=\"min\") or mode=\"max\".")


@dataclass(eq=False)
class EarlyStopping(Monitor):
    """Ends the fit after `patience` epochs in a row that were no better than the best one before them.

    monitor, mode, min_delta: as in `SaveBest`. patience: an int >= 1. The epoch ends as always; the weights are the
    newest ones: see `SaveBest(restore=True)` for the best. `stopped_epoch`: the epoch (0-based) after which it ended
    the fit; `reason`: why, in a sentence, which is also printed where the fit is verbose; both None if it did not.

    >>> EarlyStopping("accuracy", patience=5)
    EarlyStopping(monitor='accuracy', mode=None, min_delta=0.0, patience=5)
    """

    patience: int = 3

    saves: ClassVar[tuple[str, ...]] = ("best", "best_epoch", "stopped_epoch", "reason", "_waited")

    def __post_init__(self) -> None:
        self.patience = check_int("patience", self.patience)
        super().__post_init__()

    def _forget(self) -> None:
        super()._forget()
        self._waited = 0
        self.stopped_epoch: int | None = None
        self.reason: str | None = None

    def judge(self, state: State, value: float, is_better: bool) -> None:
        self._waited = 0 if is_better else self._waited + 1
        if is_better:
            self.keep_best(state, value)
        is_over = state.is_ending or state.epoch + 1 == state.n_epochs
        if self._waited >= self.patience and not is_over:
            self.stopped_epoch, self.reason = state.epoch, self._why(state.epoch)
            state.is_ending = True

    def after_fit(self, state: State) -> None:
        if self.reason is not None:
            state.say(self.reason)

    def _why(self, epoch: int) -> str:
        begins = f"stopped early after epoch {epoch}: for {self._waited} epoch{'s' * (self._waited > 1)} {self.monitor}"
        if self.best is None:
            return f"{begins} was no finite number"
        by = f", by more than {self.min_delta:g}" if self.min_delta else ""
        side = "above" if self._sign > 0 else "below"
        return f"{begins} was not {side} {shown(self.best)}, its value in epoch {self.best_epoch}{by}"


@dataclass(eq=False)
class SaveBest(Monitor):
    """Keeps the weights of the best epoch, in memory or in a file.

    monitor: a key of the epoch row: "valid_loss", "accuracy", "noisy_accuracy" (of the validation set "noisy"), ...
    path: the file, written as by `learn.save` and read by `learn.load`, replaced at each better epoch; None: a copy in
        host memory, `weights`.
    mode: "min" or "max", whether smaller or larger is better; None: by the name (loss, error, rmse, perplexity, ...:
        "min"; accuracy, auc, f1, iou, ...: "max").
    min_delta: by how much a value must be better, >= 0; less is no improvement.
    restore: load the best weights into the model when the fit ends, however it ends, but no state of the optimizer.

    `best`, `best_epoch`: the value and its epoch (0-based); each fit begins anew, and its first epoch replaces the
    file of an earlier fit. The weights are those that were validated: where an `EMA` or `SWA` is swapped in for
    validation, its average (for a column of the training data, the model's own). If the file cannot be written, the
    older one and `best` stay as they are, a warning is logged, and training goes on. Raises ValueError or TypeError for
    values out of range and, when the fit begins, a column that is not in the epoch table; OSError for no such folder.

    >>> SaveBest("accuracy", "best.pt", restore=True)
    SaveBest(monitor='accuracy', mode=None, min_delta=0.0, path='best.pt', restore=True)
    """

    path: str | os.PathLike[str] | None = None
    _: KW_ONLY
    restore: bool = False

    saves: ClassVar[tuple[str, ...]] = ("best", "best_epoch", "weights")

    def __post_init__(self) -> None:
        check_flag("restore", self.restore)
        if self.path is not None:
            self.path = check_path("path", self.path)
        self.in_sandbox = self.path is None
        self.owns = (FINAL_WEIGHTS,) if self.restore else ()
        super().__post_init__()

    def _forget(self) -> None:
        super()._forget()
        self.weights: dict[str, Any] | None = None

    def before_fit(self, state: State) -> None:
        super().before_fit(state)
        path = None if self.path is None else Path(self.path)
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"cannot save to {path}: it is a folder. Pass the name of a file in it.")
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"cannot save to {path}: there is no folder {path.parent}. Make it first.")

    def judge(self, state: State, value: float, is_better: bool) -> None:
        if not is_better:
            return
        is_of_training = self.monitor.startswith("train_")  # else the weights that were validated: maybe an average
        with nullcontext() if is_of_training else evaluating(state.callbacks, state.model):
            self._keep(state, value)

    def _keep(self, state: State, value: float) -> None:
        if self.path is None:
            self.weights = {name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else clone(value)
                            for name, value in state.model.state_dict().items()}
        else:
            try:
                save_weights(state.model, self.path)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                log.warning("SaveBest, after epoch %d: %s Training goes on.", state.epoch,
                            getattr(error, "strerror", None) or f"cannot save to {self.path}: {error}.")
                return
        self.keep_best(state, value)
        if self is next((cb for cb in state.callbacks if isinstance(cb, SaveBest)), self):  # of several the first
            state.record.best = Best(self.monitor, value, state.epoch)

    def after_fit(self, state: State) -> None:
        if self.restore and self.weights is not None:
            state.model.load_state_dict(self.weights)
        elif self.restore and self.path is not None and self.best_epoch is not None:
            load_weights(state.model, self.path)


@dataclass(eq=False)
class ReduceLROnPlateau(Monitor):
    """Multiplies the learning rate by `factor` after `patience` epochs that were no better than the best before them.

    monitor, mode, min_delta: as in `SaveBest`. factor: 0 < factor < 1. patience: an int >= 1.
    min_scale: the product of its factors, `scale`, never falls below that, 0..1.
    cooldown: epochs after each reduction that do not count as waiting, an int >= 0.

    It scales whatever the schedule says, by `state.lr_scale`, for the rest of the fit; several of these multiply.

    >>> ReduceLROnPlateau("valid_loss", 0.5, patience=2)
    ReduceLROnPlateau(monitor='valid_loss', mode=None, min_delta=0.0,
                      factor=0.5, patience=2, min_scale=0.0001, cooldown=0)
    """

    factor: float = 0.1
    patience: int = 3
    min_scale: float = 1e-4
    cooldown: int = 0

    saves: ClassVar[tuple[str, ...]] = ("best", "best_epoch", "scale", "_waited", "_resting")

    def __post_init__(self) -> None:
        self.factor = check_number("factor", self.factor, above=0, below=1)
        self.patience = check_int("patience", self.patience)
        self.min_scale = check_number("min_scale", self.min_scale, minimum=0, maximum=1)
        self.cooldown = check_int("cooldown", self.cooldown, minimum=0)
        super().__post_init__()

    def _forget(self) -> None:
        super()._forget()
        self.scale = 1.0
        self._waited = self._resting = 0

    def judge(self, state: State, value: float, is_better: bool) -> None:
        if is_better:
            self.keep_best(state, value)
        if self._resting:
            self._resting -= 1
        else:
            self._waited = 0 if is_better else self._waited + 1
        if self._waited < self.patience:
            return
        self._waited, self._resting = 0, self.cooldown
        ratio = max(self.factor, self.min_scale / self.scale)
        if ratio < 1:
            self.scale *= ratio
            state.lr_scale *= ratio
            log.info("epoch %d: no better %s than %s, learning rate multiplied by %g",
                     state.epoch, self.monitor, self.best, ratio)
