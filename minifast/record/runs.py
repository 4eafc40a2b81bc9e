"""Run records: what `RunLog` writes, read back and drawn over one another. No model, no fit, no pickle is needed.

The file is JSON lines, one record a line, each with its "kind" and the id of its "fit":

    fit    the settings; again, with the "step" it went on from, each time the fit is resumed
    steps  "first": number of the first step, "columns": name -> one value per step
    epoch  "step": updates done when it ended, "row": the epoch row
    end    "ended": finished, stopped or interrupted; a fit without it was killed, or still runs

JSON has no nan and no inf: in columns and rows they are the strings "NaN", "Infinity" and "-Infinity". Where a step or
an epoch is there more than once, because a fit was resumed from an earlier state, the newest counts.
"""
import glob
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import check_items, check_path, check_text
from ..show import plots, tables
from .scalars import Ema

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Column = NDArray[np.float64]
PathLike = str | os.PathLike[str]
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(eq=False, repr=False)
class LoggedFit:
    """One fit of a run."""

    starts: list[dict[str, Any]] = field(default_factory=list)  # its settings, then again each time it was resumed
    steps: dict[str, Column] = field(default_factory=dict)  # step, lr, momentum, loss, ...: each (steps,)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None  # None: it was killed, or still runs


@dataclass(eq=False, repr=False)
class Run:
    """A run read from `path`: its fits, oldest first. `skipped`: how many lines were no whole record."""

    path: Path
    fits: list[LoggedFit]
    skipped: int = 0

    @property
    def name(self) -> str:
        """Of its folder, or of its file if that is not called run.jsonl."""
        return self.path.resolve().parent.name if self.path.name == "run.jsonl" else self.path.stem

    @property
    def settings(self) -> dict[str, Any]:
        """What the newest fit began with: versions, device, model, optimizer, schedule, callbacks, ..."""
        return next(iter(self.fits[-1].starts), {}) if self.fits else {}

    @property
    def steps(self) -> dict[str, Column]:
        """The columns of all fits end to end, each (steps,), nan where a fit has none; "step" counts on over them."""
        blocks, first = [], 0
        for number, fit in enumerate(self.fits):
            if n := len(fit.steps.get("step", ())):
                blocks.append({**fit.steps, "step": fit.steps["step"] + first, "fit": np.full(n, float(number))})
                first += int(fit.steps["step"][-1]) + 1
        return _end_to_end(blocks)

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The epoch rows of all fits end to end; "epoch" counts on over them, "fit" is their number."""
        rows, first = [], 0
        for number, fit in enumerate(self.fits):
            rows += [{**row, "epoch": row["epoch"] + first, "fit": number} for row in fit.epochs]
            first += fit.epochs[-1]["epoch"] + 1 if fit.epochs else 0
        return rows

    def __repr__(self) -> str:
        n_steps = sum(len(fit.steps.get("step", ())) for fit in self.fits)
        return f"Run({str(self.path)!r}: {len(self.fits)} fits, {n_steps} steps, {len(self.epochs)} epochs)"


def read_run(path: PathLike) -> Run:
    """The run in a folder's run.jsonl, or in the file `path`. Lines that are no whole record are skipped and counted.

    Raises FileNotFoundError if there is no such file, ValueError if no line is a record.
    """
    file = record_file(check_path("path", path))
    if not file.is_file():
        raise FileNotFoundError(f"no run found at {os.fspath(path)!r}: there is no file {file}. Record one with "
                                "callbacks=[RunLog(path)].")
    run = _read(file)
    if not run.fits:
        raise ValueError(f"{file} is no run record: none of its {run.skipped} lines can be read. Pass one of RunLog.")
    return run


def plot_runs(runs: PathLike | Iterable[PathLike] = "runs/*", metric: str | None = None, *,
              ax: "Axes | None" = None) -> "Axes":
    """Draw one column of several runs over one another, named after their folders.

    runs: a glob pattern, a folder, a file, or several of them; what a pattern finds besides runs is left out.
    metric: a column of the epochs (train_loss, a metric) or of the steps (loss, lr, ...), drawn against them; "loss" is
        drawn pale with its smoothed form on top. None: valid_loss, or train_loss if no run has one.
    Raises FileNotFoundError if no run is found, ValueError with the columns there are if no run has `metric`.
    """
    if metric is not None:
        check_text("metric", metric)
    found = _find(runs)
    steps, rows = [run.steps for run in found], [run.epochs for run in found]
    of_steps, of_epochs = tables.columns(steps), tables.columns(row for of_run in rows for row in of_run)
    if metric is None:
        metric = "valid_loss" if "valid_loss" in of_epochs else "train_loss"
    in_steps = metric in of_steps
    if not in_steps and metric not in of_epochs:
        raise ValueError(f"no run has a column {metric!r}. Columns of the steps: {', '.join(of_steps) or 'none'}; of "
                         f"the epochs: {', '.join(of_epochs) or 'none'}.")
    is_loss = in_steps and metric == "loss"
    ax, names, n_points = plots.axes(ax), [run.name for run in found], 0
    from matplotlib import colormaps
    for i, (run, name) in enumerate(zip(found, names, strict=True)):
        color = f"C{i}" if len(found) <= 10 else colormaps["viridis"](i / (len(found) - 1))
        name = name if names.count(name) == 1 else str(run.path)
        if in_steps:
            x, y = (steps[i]["step"], steps[i][metric]) if metric in steps[i] else np.empty((2, 0))
        else:
            x, y = np.array([(row["epoch"], row[metric]) for row in rows[i] if metric in row], float).reshape(-1, 2).T
        n_points += len(x)
        if is_loss:
            ax.plot(x, y, color=color, alpha=0.3, linewidth=1)
            ema = Ema()
            y = np.array([ema.add(value) for value in y])
        ax.plot(x, y, color=color, label=name if len(x) else f"{name}: no {metric}",
                marker="o" if len(x) == 1 or (not in_steps and len(x) <= 50) else None, markersize=4)
    plots.count_on_x(ax, plots.STEPS if in_steps else "epoch")
    ax.set_ylabel("loss (pale: each step, line: smoothed)" if is_loss else plots.LABELS.get(metric, metric))
    ax.legend(loc="best" if n_points < 10_000 else "upper right", fontsize="small", ncols=1 if len(found) <= 12 else 2)
    return ax


def record_file(path: PathLike) -> Path:
    """The file of the run at `path`: itself if it is one or is called *.jsonl, else run.jsonl in that folder.

    >>> record_file("runs/a").as_posix(), record_file("runs/a.jsonl").as_posix()
    ('runs/a/run.jsonl', 'runs/a.jsonl')
    """
    path = Path(path)
    return path if path.suffix == ".jsonl" or path.is_file() else path / "run.jsonl"


def to_line(record: Mapping[str, Any]) -> bytes:
    r"""`record` as one line of JSON.

    >>> to_line({"loss": [0.5, math.inf]})
    b'{"loss":[0.5,"Infinity"]}\n'
    """
    return json.dumps(to_json(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def to_json(value: Any) -> Any:
    """`value` as JSON has it: what JSON does not know becomes its nearest, a number, a list, or its repr."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else "NaN" if value != value else f"{'-' * (value < 0)}Infinity"
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(inner) for inner in value]
    number = scalar(value)
    return f"{value!r:.500}" if number is value else to_json(number)


def scalar(value: Any) -> Any:
    """`value`, of numpy's and torch's scalars the plain number."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _read(file: Path) -> Run:
    records: dict[str, list[dict[str, Any]]] = {}  # by fit, as the file has them
    skipped = 0
    for line in filter(bytes.strip, file.read_bytes().split(b"\n")):
        try:
            record = _parsed(json.loads(line))
            records.setdefault(record["fit"], []).append(record)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            skipped += 1
    return Run(file, [_fit(of_one) for of_one in records.values()], skipped)


def _parsed(record: dict[str, Any]) -> dict[str, Any]:
    """With columns and rows of numbers; an error of whatever kind if it is no record."""
    kind = record["kind"]
    if kind == "steps":
        table = np.array([[float(value) for value in values] for values in record["columns"].values()])  # of one length
        steps = np.arange(len(record["columns"]["loss"]), dtype=np.float64) + float(record["first"])
        return {**record, "columns": {"step": steps, **dict(zip(record["columns"], table, strict=True))}}
    if kind == "epoch":
        row = {name: NON_FINITE.get(value, value) if isinstance(value, str) else value
               for name, value in record["row"].items()}
        return {**record, "row": row, "epoch": int(row["epoch"])}
    if kind not in ("fit", "end"):
        raise ValueError("not a kind of record")
    return record


def _fit(records: list[dict[str, Any]]) -> LoggedFit:
    """The newest of each step and each epoch."""
    def of_kind(*kinds: str) -> list[dict[str, Any]]:
        return [record for record in records if record["kind"] in kinds]
    columns = _end_to_end([record["columns"] for record in of_kind("steps")])
    if columns:
        newest = len(columns["step"]) - 1 - np.unique(columns["step"][::-1], return_index=True)[1]
        columns = {name: column[newest] for name, column in columns.items()}
    rows = {record["epoch"]: record["row"] for record in of_kind("epoch")}
    last = of_kind("fit", "end")[-1:]
    end = last[0] if last and last[0]["kind"] == "end" else None  # none after the last start: it still runs
    return LoggedFit(of_kind("fit"), columns, [rows[epoch] for epoch in sorted(rows)], end)


def _end_to_end(blocks: list[dict[str, Column]]) -> dict[str, Column]:
    return {name: np.concatenate([block.get(name, np.full(len(block["step"]), np.nan)) for block in blocks])
            for name in tables.columns(blocks)}


def _find(runs: PathLike | Iterable[PathLike]) -> list[Run]:
    given = [runs] if isinstance(runs, (str, os.PathLike)) else check_items("runs", runs, "paths")
    found: dict[Path, Run] = {}
    for path in given:
        matching = {file: run for file in _files(check_path("runs", path)) if (run := _read(file)).fits}
        if not matching:
            raise FileNotFoundError(f"no run found for {os.fspath(path)!r}, seen from {os.getcwd()!r}. A run is a "
                                    "folder with a run.jsonl, or a file *.jsonl: record one with "
                                    "callbacks=[RunLog('runs/first')].")
        found |= matching
    if not found:
        raise ValueError("no run to draw: the list is empty. Pass e.g. plot_runs('runs/*').")
    return list(found.values())


def _files(path: str) -> Iterator[Path]:
    """The record files that `path`, as it is or as a pattern, stands for."""
    if os.path.isdir(path) and not record_file(path).is_file():
        path = os.path.join(glob.escape(path), "*")  # a folder of runs
    paths = [path] if os.path.exists(path) else [found for found in sorted(glob.glob(path, recursive=True))
                                                 if os.path.isdir(found) or found.endswith(".jsonl")]
    return (file for file in map(record_file, paths) if file.is_file())
