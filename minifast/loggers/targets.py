"""Loggers by what they write to: a CSV of the epochs, the record of a run, TensorBoard, Weights & Biases."""
import csv
import errno
import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..core.state import State
from ..errors import check_flag, check_number, check_path
from ..files.writing import replacing
from ..record.runs import PathLike, record_file, scalar, to_json, to_line
from ..show import tables
from .base import Logger, load, now, opening, settings


@dataclass(eq=False)
class CSVLogger(Logger):
    """Writes the epoch rows (epoch, train_loss, valid_loss, metrics, time in s) to a CSV file, as each epoch ends.

    path: the file; its folder is made.
    append: go on after the rows that it holds, as in the second of two fits; else the first epoch replaces them.

    A column that appears later is added to the header: the file is then written anew, in one move, and earlier rows
    have an empty cell there. A resumed fit goes on where its state was saved. `learn.recorder.to_csv` writes steps.
    Raises OSError in `before_fit` if the file cannot be written; an error later is logged once, and training goes on.

    >>> CSVLogger("epochs.csv")
    CSVLogger(path='epochs.csv', append=False)
    """

    path: PathLike
    append: bool = False
    saves: ClassVar[tuple[str, ...]] = (*Logger.saves, "_rows")

    def __post_init__(self) -> None:
        self.path = check_path("path", self.path)
        check_flag("append", self.append)

    def open(self, state: State) -> None:
        self.target = os.fspath(self.path)
        self._columns: list[str] = []  # of the header; none: the file is not what it should be, and is written anew
        self._rows: list[dict[str, Any]] = []  # all that the file should hold
        with opening(self):
            _make_writable(Path(self.path))
            if self.append:
                self._columns, self._rows = _read_csv(Path(self.path))

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self._columns = []

    def write_epoch(self, step: int, row: dict[str, Any]) -> None:
        cells = {name: "" if value is None else str(scalar(value)) for name, value in row.items()}
        columns, self._columns = self._columns, []  # should this fail half way, all of it is written anew
        if columns and cells.keys() <= set(columns):
            _append(Path(self.path), _csv_lines(columns, [cells]))
        else:
            columns = list(dict.fromkeys([*columns, *tables.columns([*self._rows, cells])]))
            with replacing(Path(self.path).resolve()) as file:  # a link stays a link
                file.write(_csv_lines(columns, [dict(zip(columns, columns, strict=True)), *self._rows, cells]))
        self._columns = columns
        self._rows.append(cells)


@dataclass(eq=False)
class RunLog(Logger):
    """Records a run as it goes, in a file that is only ever appended to: settings, steps, epochs, and how it ended.

    path: a folder, in which it writes run.jsonl, or a file *.jsonl; folders are made. every_seconds: how often the
    steps are written, >= 0, besides the ends of epochs and the fit. A kill loses at most the steps since then. More
    fits append to the same file, and a resumed one continues its own record. `read_run` reads it, `plot_runs` draws
    several; minifast/record/runs.py describes the format. Errors are those of `CSVLogger`.

    >>> RunLog("runs/first")
    RunLog(path='runs/first', every_seconds=5.0)
    """

    path: PathLike
    every_seconds: float = 5.0
    saves: ClassVar[tuple[str, ...]] = (*Logger.saves, "_id")

    def __post_init__(self) -> None:
        self.path = check_path("path", self.path)
        self.every_seconds = check_number("every_seconds", self.every_seconds, minimum=0)

    def open(self, state: State) -> None:
        self._id = uuid.uuid4().hex[:12]  # made by the system: no generator that is seeded moves
        self._file = record_file(self.path)
        self.target, self._settings = str(self._file), settings(state)
        with opening(self):
            _make_writable(self._file)

    def write_settings(self, settings: dict[str, Any]) -> None:
        self._add("fit", {"step": self._n_steps, **settings})

    def write_steps(self, first: int, columns: dict[str, list[float]]) -> None:
        self._add("steps", {"first": first, "columns": columns})

    def write_epoch(self, step: int, row: dict[str, Any]) -> None:
        self._add("epoch", {"step": step, "row": row})

    def close(self, state: State) -> None:
        if self._has_begun and self._settings is None:
            n_epochs = len(state.record.epochs)
            is_whole = n_epochs == state.n_epochs or (state.n_epochs is None and state.is_ending)
            cut = "interrupted" if state.interrupt.pending else "stopped"  # an error and a CancelFit look the same
            ended = "finished" if is_whole else cut
            self._add("end", {"time": now(), "ended": ended, "step": state.step, "epochs": n_epochs})

    def _add(self, kind: str, content: dict[str, Any]) -> None:
        _append(self._file, to_line({"kind": kind, "fit": self._id, **content}))


class _Service(Logger):
    """Steps are counted on over the fits of one logger."""

    saves: ClassVar[tuple[str, ...]] = (*Logger.saves, "_earlier")
    _earlier = 0  # steps of earlier fits

    def close(self, state: State) -> None:
        self._earlier += self._n_steps

    def by_step(self, first: int, columns: dict[str, list[float]]) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, tag -> value) of each step; without what is nan because nobody logged it."""
        for step, values in enumerate(zip(*columns.values(), strict=True), self._earlier + first):
            yield step, {f"step/{name}": value for name, value in zip(columns, values, strict=True)
                         if value == value or name == "loss"}

    def of_epoch(self, step: int, row: dict[str, Any]) -> tuple[int, dict[str, float]]:
        """(step, tag -> value) of an epoch that ended after `step` updates: at the last of them."""
        values = {f"epoch/{name}": scalar(value) for name, value in row.items() if name != "epoch"}
        return self._earlier + max(step - 1, 0), {tag: float(value) for tag, value in values.items()
                                                  if isinstance(value, (int, float))}


@dataclass(eq=False)
class TensorBoardLogger(_Service):
    """Writes steps (`step/loss`, `step/lr`, ...) and epoch rows (`epoch/valid_loss`, ...) for TensorBoard.

    log_dir: a folder, which is made. every_seconds: how often, >= 0. All is drawn against the weight update, in
    float32; further fits with this logger continue the same curves, those of a new logger replace them, as do steps
    that a resumed fit repeats. Needs `pip install 'minifast[tensorboard]'`: ImportError in `before_fit` otherwise.
    Other errors are those of `CSVLogger`.

    >>> TensorBoardLogger("runs/first")
    TensorBoardLogger(log_dir='runs/first', every_seconds=5.0)
    """

    log_dir: PathLike
    every_seconds: float = 5.0

    def __post_init__(self) -> None:
        self.log_dir = check_path("log_dir", self.log_dir)
        self.every_seconds = check_number("every_seconds", self.every_seconds, minimum=0)

    def open(self, state: State) -> None:
        writer_class = load("torch.utils.tensorboard", "TensorBoardLogger", "tensorboard").SummaryWriter
        self.target = str(self.log_dir)
        with opening(self):
            self._writer = writer_class(self.target, max_queue=1000)
        self._settings = to_json(settings(state))

    def write_settings(self, settings: dict[str, Any]) -> None:
        events = load("tensorboard.compat.proto.event_pb2", "TensorBoardLogger", "tensorboard")
        step = self._earlier + self._n_steps
        start = events.SessionLog(status=events.SessionLog.START)  # who reads it drops what is at `step` or later
        self._writer.file_writer.add_event(events.Event(session_log=start), step)
        self._writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```", step)

    def write_steps(self, first: int, columns: dict[str, list[float]]) -> None:
        for step, values in self.by_step(first, columns):
            self._add(step, values)
        self._writer.flush()

    def write_epoch(self, step: int, row: dict[str, Any]) -> None:
        self._add(*self.of_epoch(step, row))
        self._writer.flush()

    def close(self, state: State) -> None:
        super().close(state)
        self._writer.close()

    def _add(self, step: int, values: dict[str, float]) -> None:
        """One event with all the values: a third of what add_scalar costs for each."""
        summary = load("tensorboard.compat.proto.summary_pb2", "TensorBoardLogger", "tensorboard").Summary
        points = [summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.file_writer.add_summary(summary(value=points), step)


@dataclass(eq=False)
class WandbLogger(_Service):
    """Sends steps (`step/loss`, `step/lr`, ...) and epoch rows (`epoch/valid_loss`, ...) to Weights & Biases.

    project, name, config: as in `wandb.init`; the fit's settings are added to `config`. id: of the W&B run, which is
    continued if it is there: pass one for a fit that may be resumed. every_seconds: how often, >= 0. A run that is
    active already (`wandb.run`) is used and left open; else each fit is a run, finished with it. Needs
    `pip install 'minifast[wandb]'`: ImportError in `before_fit` otherwise.

    >>> WandbLogger("digits", config={"augmented": True})
    WandbLogger(project='digits', name=None, config={'augmented': True}, id=None, every_seconds=5.0)
    """

    project: str | None = None
    name: str | None = None
    config: Mapping[str, Any] | None = None
    id: str | None = None
    every_seconds: float = 5.0

    target = "Weights & Biases"

    def __post_init__(self) -> None:
        for key in ("project", "name", "id"):
            if not isinstance(getattr(self, key), (str, type(None))):
                raise TypeError(f"{key} must be text or None, got {getattr(self, key)!r:.80}.")
        if not isinstance(self.config, (Mapping, type(None))):
            raise TypeError(f"config must be a dict or None, got {self.config!r:.80}. Pass e.g. config={{'size': 32}}.")
        self.every_seconds = check_number("every_seconds", self.every_seconds, minimum=0)

    def open(self, state: State) -> None:
        wandb = load("wandb", "WandbLogger", "wandb")
        self._is_own = wandb.run is None
        if self._is_own and self.id is None:
            self._earlier = 0  # a new run
        self._run = wandb.run if not self._is_own else wandb.init(
            project=self.project, name=self.name, id=self.id, resume=None if self.id is None else "allow",
            config={**to_json(settings(state)), **(self.config or {})})

    def write_steps(self, first: int, columns: dict[str, list[float]]) -> None:
        for step, values in self.by_step(first, columns):
            self._run.log(values, step=step)

    def write_epoch(self, step: int, row: dict[str, Any]) -> None:
        at, values = self.of_epoch(step, row)
        self._run.log({"epoch": row["epoch"], **values}, step=at)

    def close(self, state: State) -> None:
        super().close(state)
        run, self._run = self._run, None
        if self._is_own:
            run.finish()


def _make_writable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _append(path, b"")


def _append(path: Path, lines: bytes) -> None:
    """In one write, after a line break if the last line is torn."""
    with open(path, "a+b", buffering=0) as file:
        if lines and file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines = b"\n" + lines
        if file.write(lines) != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _csv_lines(columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    return header, [dict(zip(header, row, strict=False)) for row in rows]
