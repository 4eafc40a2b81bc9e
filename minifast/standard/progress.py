"""What a person sees while training: a bar where there is a screen, and one line per epoch everywhere."""
import time
from typing import Any

from ..core.callback import Callback, Order
from ..core.state import State
from ..data.waiting import notice
from ..errors import check_text
from ..show.screen import BAR, BAR_OF_TIME, REFRESH, screen
from ..show.tables import shown

CELL = 10  # characters of a number in the table


class Progress(Callback):
    """One bar for the whole fit and a table of its epochs.

    A terminal gets a bar that vanishes at the end, a notebook the same as text in one cell output, a pipe or file one
    plain line per epoch. Output that cannot be written (a closed pipe) is given up with one log message; training goes
    on. Where training waits for its data for a fifth of the time or more, the bar shows how long, and a line, once in a
    fit, says what to do. `title`: in front of the bar instead of the epoch.
    """

    order = Order.RECORD
    in_lr_find = True

    def __init__(self, title: str = "") -> None:
        self.title = check_text("title", title)

    def __repr__(self) -> str:
        return f"Progress(title={self.title!r})" if self.title else "Progress()"

    def before_fit(self, state: State) -> None:
        self._columns: list[str] = []
        self._say_outside, state.say = state.say, self.say  # lines go above the bar
        self._screen = screen(state.n_steps, BAR if state.n_epochs is not None else BAR_OF_TIME)
        self._next_look, self._is_told = 0.0, bool(self.title)
        self._look(state)

    def after_batch(self, state: State) -> None:
        if time.perf_counter() >= self._next_look:
            self._look(state)

    def after_valid_batch(self, state: State) -> None:
        if time.perf_counter() >= self._next_look:
            self._look(state, f"validation batch {state.batch_index + 1}")

    def after_epoch(self, state: State) -> None:
        if self.title:
            return
        lines, names = [], list(state.metrics)
        if not set(names) <= set(self._columns):  # the first row, or one with a metric that is new
            self._columns, header = names, _header(names, self._screen.width())
            self._widths = [max(map(len, parts)) for parts in zip(*header, strict=True)]
            lines += [self._line(parts) for parts in header]
        lines.append(self._line([_cell(name, state.metrics.get(name)) for name in self._columns]))
        self._screen.line("\n".join(lines))

    def after_fit(self, state: State) -> None:
        state.say = self._say_outside
        self._screen.close()

    def say(self, text: str) -> None:
        """A line of text above the bar, during a fit."""
        self._screen.line(text)

    def _line(self, cells: list[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)).rstrip()

    def _look(self, state: State, doing: str = "") -> None:
        waiting = state.source.waiting
        if not self._is_told:
            said = notice(waiting, state.train_dl, state.device)
            if said:
                self._screen.line(said)
                self._is_told = True
        if self._screen.has_bar:
            loss, lr = state.record.smooth_loss(), float(state.opt.param_groups[-1]["lr"])
            # the rate gives way: a line of 80 columns has no room for both
            last = f"{waiting.share:.0%} waiting for data" if waiting.is_long else f"lr {lr:.2e}"
            note = doing or (f"loss {shown(loss)}, {last}" if state.step else "")
            n_epochs = "" if state.n_epochs is None else f"/{state.n_epochs}"
            at = state.elapsed or 0  # what a limit in time says
            done = max(at, state.step) if state.n_epochs is not None else at
            self._screen.bar(done, self.title or f"epoch {state.epoch + 1}{n_epochs}", note)
        self._next_look = time.perf_counter() + REFRESH


def _header(names: list[str], width: int) -> list[list[str]]:
    """The header's lines, cells as wide as their columns; names are broken into several if one line is too long.

    >>> _header(["epoch", "noisy_valid_loss"], 80)
    [['epoch', 'noisy_valid_loss']]
    >>> _header(["epoch", "noisy_valid_loss"], 20)
    [['     ', '     noisy'], ['epoch', 'valid_loss']]
    """
    parts = [[name] for name in names]
    if sum(max(_least(name), len(name)) + 2 for name in names) - 2 > width:
        parts = [_broken(name) for name in names]
    height = max(map(len, parts))
    widths = [max(_least(name), *map(len, column)) for name, column in zip(names, parts, strict=True)]
    columns = [[part.rjust(width) for part in [""] * (height - len(column)) + column]
               for column, width in zip(parts, widths, strict=True)]
    return [list(line) for line in zip(*columns, strict=True)]


def _broken(name: str) -> list[str]:
    """A name in several lines of words, the lower ones as long as fits in a column."""
    lines: list[str] = []
    for word in reversed(name.split("_")):
        if lines and len(word) + 1 + len(lines[0]) <= CELL:
            lines[0] = f"{word}_{lines[0]}"
        else:
            lines.insert(0, word)
    return lines


def _least(name: str) -> int:
    """The width that the values of a column need."""
    return len(name) if name == "epoch" else CELL


def _cell(name: str, value: Any) -> str:
    return _duration(value) if name == "time" and value is not None else shown(value)


def _duration(seconds: float) -> str:
    """
    >>> _duration(7.126), _duration(75), _duration(3675)
    ('7.13s', '1:15', '1:01:15')
    """
    if seconds < 59.995:
        return f"{seconds:.2f}s"
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes}:{whole:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{whole:02}"
