"""What a person sees while training: a bar where there is a screen, and one line per epoch everywhere."""
import time
from itertools import zip_longest
from textwrap import wrap

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
    plain line per epoch. Output that cannot be written (a closed pipe) is given up with one log message. Where training
    waits for its data for a fifth of the time or more, the bar shows how long, and a line says once what to do.
    `title`: in front of the bar instead of the epoch.
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
        lines: list[list[str]] = []
        row = {name: shown(value) for name, value in state.metrics.items()}
        if not row.keys() <= set(self._columns):  # the first row, or one with a metric that is new
            self._columns = list(row)
            lines, self._widths = _header(self._columns, self._screen.width())
        row["time"] = _duration(state.metrics["time"])
        lines.append([row.get(name, "") for name in self._columns])
        self._screen.line("\n".join(map(self._line, lines)))

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
        if not self._is_told and (said := notice(waiting, state.train_dl, state.device)):
            self._screen.line(said)
            self._is_told = True
        if self._screen.has_bar:
            loss, lr = state.record.smooth_loss(), float(state.opt.param_groups[-1]["lr"])
            # the rate gives way: a line of 80 columns has no room for both
            last = f"{waiting.share:.0%} waiting for data" if waiting.is_long else f"lr {lr:.2e}"
            note = doing or (f"loss {shown(loss)}, {last}" if state.step else "")
            is_timed = state.n_epochs is None
            done = max(state.elapsed or 0, 0 if is_timed else state.step)
            title = f"epoch {state.epoch + 1}" + ("" if is_timed else f"/{state.n_epochs}")
            self._screen.bar(done, self.title or title, note)
        self._next_look = time.perf_counter() + REFRESH


def _header(names: list[str], width: int) -> tuple[list[list[str]], list[int]]:
    """The header's lines and the widths of its columns; names are broken into words if one line is too long.

    >>> _header(["epoch", "noisy_valid_loss"], 80)
    ([['epoch', 'noisy_valid_loss']], [5, 16])
    >>> _header(["epoch", "noisy_valid_loss"], 20)
    ([['', 'noisy'], ['epoch', 'valid_loss']], [5, 10])
    """
    for parts in ([[name] for name in names], [_broken(name) for name in names]):
        widths = [max(0 if words == ["epoch"] else CELL, *map(len, words)) for words in parts]
        if sum(widths) + 2 * len(widths) - 2 <= width:
            break
    return [list(line) for line in zip_longest(*map(reversed, parts), fillvalue="")][::-1], widths


def _broken(name: str) -> list[str]:
    lines = wrap(name.replace("_", " "), CELL, break_long_words=False, break_on_hyphens=False)
    return [line.replace(" ", "_") for line in lines] or [name]


def _duration(seconds: float) -> str:
    """
    >>> _duration(7.126), _duration(75), _duration(3675)
    ('7.13s', '1:15', '1:01:15')
    """
    if seconds < 59.995:
        return f"{seconds:.2f}s"
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes}:{whole:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{whole:02}"
