"""Loggers for TensorBoard and Weights & Biases: extras, imported when a fit begins."""
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.state import State
from ..errors import check_number, check_path
from ..record.runs import PathLike, scalar, to_json
from .base import Logger, load, opening, settings


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
