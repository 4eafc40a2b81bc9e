"""Loggers that write files: a CSV of the epochs, and the record of a whole run."""
import csv
import errno
import io
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..core.state import State
from ..errors import check_flag, check_number, check_path
from ..files.writing import replacing
from ..record.runs import PathLike, record_file, scalar, to_line
from ..show import tables
from .base import Logger, now, opening, settings


@dataclass(eq=False)
class CSVLogger(Logger):
    """Writes the epoch rows (epoch, train_loss, valid_loss, metrics, time in s) to a CSV file, as each epoch ends.

    path: the file; its folder is made. append: go on after the rows that it holds; else the first epoch that ends
    replaces them. A column that appears later is empty in earlier rows. A resumed fit goes on where its state was
    saved. The steps are written by `learn.recorder.to_csv`. Raises OSError in `before_fit` if the file cannot be
    written; an error later is logged once, and what is missing is written when that is possible again.

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
        self._columns: list[str] = []  # of the header; empty: the file is to be written anew
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
        columns, self._columns = self._columns, []  # if writing fails half way, all of it is written anew
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
    csv.writer(text, lineterminator="\n").writerows([row.get(name, "") for name in columns] for row in rows)
    return text.getvalue().encode()


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    return header, [dict(zip(header, row, strict=False)) for row in rows]
