"""What one fit did: a row per weight update, a row per epoch, and their plots."""
import csv
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import check_flag, check_int, check_path, check_text
from ..show import plots, tables
from .scalars import Ema, ScalarColumn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Column = NDArray[np.float64]
OWN_COLUMNS = ("fit", "step", "lr", "momentum", "loss", "smooth_loss")  # and lr_<layer group>: of a file with all steps


class Best(NamedTuple):
    """The epoch that a callback holds for the best one so far."""

    monitor: str  # the column of the epoch table
    value: float
    epoch: int  # 0-based


class FitRecord:
    """The columns and epoch rows of one fit. Steps are weight updates; arrays are float64 copies."""

    def __init__(self, group_names: Sequence[str] = ("model",)) -> None:
        self.group_names = tuple(group_names)
        self.row_names: tuple[str, ...] = ()  # what every complete epoch row has; written by Metrics
        self.best: Best | None = None  # written by SaveBest after its epoch, read by Checkpoint
        self.epochs: list[dict[str, Any]] = []  # epoch, train_loss, valid_loss, metrics, time in seconds
        self.epoch_ends: list[int] = []  # steps done when each epoch ended
        self.lr_columns = [array("d") for _ in self.group_names]
        self.mom_column = array("d")
        self.loss_column = ScalarColumn()
        self.weight_column = ScalarColumn()  # what each loss is the mean over
        self.columns: dict[str, ScalarColumn] = {}  # what callbacks have logged, nan where they have not
        self._smooth = array("d")
        self._ema = Ema()

    def __len__(self) -> int:
        return len(self.mom_column)

    @property
    def lrs(self) -> Column:
        """Learning rate of the last layer group at each step, (steps,)."""
        return np.array(self.lr_columns[-1])

    @property
    def lr_groups(self) -> Column:
        """Learning rate of every layer group at each step, (steps, layer groups)."""
        return np.array(self.lr_columns).reshape(len(self.lr_columns), -1).T

    @property
    def moms(self) -> Column:
        """Momentum (SGD) or beta1 (Adam) at each step, (steps,); nan where the optimizer has neither."""
        return np.array(self.mom_column)

    @property
    def losses(self) -> Column:
        """Training loss of each step, the mean over its samples, before its update, (steps,)."""
        return self.loss_column.read()

    @property
    def smooth_losses(self) -> Column:
        """`losses` as an exponential moving average (0.98, bias-corrected; non-finite values skipped), (steps,)."""
        self._catch_up()
        return np.array(self._smooth)

    def smooth_loss(self) -> float:
        """The newest smoothed loss; nan before the first step."""
        self._catch_up()
        return self._smooth[-1] if self._smooth else float("nan")

    def _catch_up(self) -> None:
        self._smooth.extend(self._ema.add(loss) for loss in self.loss_column.tail(len(self._smooth)))

    def mean_loss(self, start: int) -> float:
        """The mean loss over all samples of the steps from `start` on."""
        start = check_int("start", start, minimum=0)
        weights = np.array(self.weight_column.tail(start))
        return float(np.average(self.loss_column.tail(start), weights=weights)) if weights.any() else math.nan

    def log(self, name: str, value: Tensor | float) -> None:
        """Write `value`, a number or (), into the column `name` of the newest step: to be called in `after_step`.

        Raises ValueError for the name of a column that every record has.
        """
        column = self.columns.get(name)
        if column is None:
            if name in OWN_COLUMNS or name.startswith("lr_"):
                raise ValueError(f"{name!r} is a column that every record has. Log under another name.")
            column = self.columns[name] = ScalarColumn()
        for _ in range(len(column), len(self) - 1):
            column.append(math.nan)
        column.append(value)

    def column(self, name: str) -> Column:
        """What callbacks have logged under `name`, (steps,). Raises KeyError that lists the names there are."""
        if check_text("name", name) not in self.columns:
            raise KeyError(f"there is no column {name!r}; callbacks have logged: {', '.join(self.columns) or 'none'}")
        values = self.columns[name].read()
        return np.pad(values, (0, len(self) - len(values)), constant_values=np.nan)

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values: columns as float64 (steps,)."""
        return {"group_names": list(self.group_names), "epochs": [dict(row) for row in self.epochs],
                "epoch_ends": list(self.epoch_ends), "lrs": torch.from_numpy(self.lr_groups.T.copy()),
                "moms": torch.from_numpy(self.moms), "losses": torch.from_numpy(self.losses),
                "weights": torch.from_numpy(self.weight_column.read()),
                "columns": {name: torch.from_numpy(column.read()) for name, column in self.columns.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Become the record that `state_dict` was taken of. Raises ValueError for anything else."""
        record, n = FitRecord(saved["group_names"]), len(saved["moms"])
        columns = [*saved["lrs"], saved["moms"], saved["losses"], saved["weights"]]
        if (len(saved["lrs"]) != len(record.group_names) or any(column.shape != (n,) for column in columns)
                or any(column.ndim != 1 or len(column) > n for column in saved["columns"].values())
                or not all(isinstance(end, int) and 0 <= end <= n for end in saved["epoch_ends"])
                or len(saved["epoch_ends"]) != len(saved["epochs"])):
            raise ValueError("this is not the record of a fit: its columns do not belong together")
        record.epochs, record.epoch_ends = [dict(row) for row in saved["epochs"]], list(saved["epoch_ends"])
        record.lr_columns = [array("d", column.tolist()) for column in saved["lrs"]]
        record.mom_column = array("d", saved["moms"].tolist())
        record.loss_column = ScalarColumn(saved["losses"].tolist())
        record.weight_column = ScalarColumn(saved["weights"].tolist())
        record.columns = {name: ScalarColumn(column.tolist()) for name, column in saved["columns"].items()}
        vars(self).update(vars(record) | {"row_names": self.row_names, "best": self.best})

    def plot_lr(self, show_moms: bool = False, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the learning rate of every layer group at each step and, if asked, the momentum on a second axis."""
        self._check_any()
        columns = {"lr": self.lr_groups}
        if check_flag("show_moms", show_moms) and np.isfinite(self.moms).any():
            columns["momentum"] = self.moms
        return plots.plot_hypers(columns, self.group_names, ax=ax)

    def plot_losses(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the training loss of each step, raw and smoothed, and the validation losses where epochs ended.

        On a log scale where a few losses are so large that they would flatten all others.
        """
        self._check_any()
        ax = plots.axes(ax)
        losses = self.losses
        plots.line(ax, losses, color="C0", alpha=0.35, linewidth=1, label="training, each step")
        plots.line(ax, self.smooth_losses, color="C0", label="training, smoothed")
        for i, name in enumerate(name for name in tables.columns(self.epochs) if _is_valid_loss(name)):
            points = [(end - 1, row[name]) for end, row in zip(self.epoch_ends, self.epochs, strict=True)
                      if name in row]
            label = f"validation, {name}".removesuffix("valid_loss").rstrip("_, ")
            ax.plot(*zip(*points, strict=True), color=f"C{1 + i % 9}", marker="o", label=label)
        finite = losses[np.isfinite(losses)]
        if finite.size and finite.min() > 0 and finite.max() > 100 * np.median(finite):
            ax.set_yscale("log")
        plots.count_on_x(ax, plots.STEPS)
        ax.set_ylabel("loss")
        ax.legend(loc="best" if len(losses) < 10_000 else "upper right")  # the best place of many points takes seconds
        return ax

    def plot_metrics(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw every metric against the epoch, of the training data dashed. Raises RuntimeError if there is none."""
        names = [name for name in tables.columns(self.epochs)
                 if name not in ("epoch", "train_loss", "time") and not _is_valid_loss(name)]
        if not names:
            raise RuntimeError("no metric was recorded. Pass e.g. Learner(..., metrics=[accuracy]) and validation "
                               "data, then fit.")
        ax = plots.axes(ax)
        metrics = list(dict.fromkeys(name.removeprefix("train_") for name in names))
        for name in names:
            points = [(row["epoch"], row[name]) for row in self.epochs if name in row]
            ax.plot(*zip(*points, strict=True), color=f"C{metrics.index(name.removeprefix('train_')) % 10}", marker="o",
                    label=name, linestyle="--" if name.startswith("train_") else "-")
        plots.count_on_x(ax, "epoch")
        ax.set_ylabel(names[0] if len(names) == 1 else "metric")
        above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "frameon": False, "fontsize": "small"}
        ax.legend(**above if len(names) > 4 else {})  # above the axes: inside, so many would hide the curves
        return ax

    def _check_any(self) -> None:
        if not len(self):
            raise RuntimeError("no step was recorded, so there is nothing to plot. Train first, e.g. learn.fit(0.01); "
                               "what a fit will do is drawn by learn.plan(...).plot().")

    def to_csv(self, path: str | os.PathLike[str], *, epochs: bool = False) -> None:
        """Write one line per step (step, lr of each layer group, momentum, loss, ...), or per epoch."""
        path = check_path("path", path)
        if check_flag("epochs", epochs):
            names = tables.columns(self.epochs)
            rows = [[row.get(name, "") for name in names] for row in self.epochs]
        else:
            lrs = ["lr"] if len(self.group_names) == 1 else [f"lr_{name}" for name in self.group_names]
            names = ["step", *lrs, "momentum", "loss", "smooth_loss", *self.columns]
            columns = (range(len(self)), *self.lr_columns, self.mom_column, self.losses.tolist(),
                       self.smooth_losses.tolist(), *(self.column(name).tolist() for name in self.columns))
            rows = list(map(list, zip(*columns, strict=True)))
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([names, *rows])


def _is_valid_loss(name: str) -> bool:
    """Of one of several validation sets it is called e.g. noisy_valid_loss."""
    return name == "valid_loss" or name.endswith("_valid_loss")
