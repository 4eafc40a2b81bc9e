"""Where lines and a bar are written: a terminal, a notebook, a pipe."""
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

REFRESH = 0.25  # seconds between two readings of the loss, which wait for the device
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits in 80 columns
BAR_OF_TIME = BAR.replace(" {n_fmt}/{total_fmt}", "")  # of a fit of which only the duration is known
WIDTH = 120  # characters in a line of the table, where there is no terminal to ask
log = logging.getLogger("minifast")


def say(text: str) -> None:
    """Print; if standard output is closed, log that and go on."""
    _Lines().line(text)


class _Lines:
    """A pipe, a file: lines only."""

    has_bar = is_broken = False

    def line(self, text: str) -> None:
        self._try(lambda: print(text, flush=True))

    def bar(self, step: int, title: str, note: str) -> None:
        """Show how far the fit has come."""

    def width(self) -> int:  # characters
        return WIDTH

    def close(self) -> None:
        """Take the bar away; the lines stay."""

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            if not self.is_broken:
                write()
        except (OSError, ValueError) as error:  # a closed pipe, a closed file
            self.is_broken = True
            log.warning("cannot write to standard output (%s): training goes on in silence", error)


class _Terminal(_Lines):
    """A terminal: tqdm's bar under the lines."""

    has_bar = True

    def __init__(self, n_steps: int, bar_format: str) -> None:
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no watching thread: we refresh by the clock ourselves

        self._bar = Bar(total=n_steps, file=sys.stdout, leave=False, dynamic_ncols=True, bar_format=bar_format,
                        delay=1e-9)  # which leaves the first drawing to us: with a title

    def width(self) -> int:
        try:
            return os.get_terminal_size(sys.stdout.fileno()).columns or WIDTH
        except (OSError, ValueError, AttributeError):  # it says to be a terminal, but is none
            return WIDTH

    def line(self, text: str) -> None:
        self._try(lambda: self._bar.write(text, file=sys.stdout))

    def bar(self, step: int, title: str, note: str) -> None:
        self._bar.n = step
        self._try(lambda: (self._bar.set_description_str(title, refresh=False),
                           self._bar.set_postfix_str(note, refresh=False), self._bar.refresh()))

    def close(self) -> None:
        self._try(self._bar.close)


class _Notebook(_Lines):
    """A notebook: the lines and tqdm's bar as text in one output, which ends as the lines alone."""

    has_bar = True

    def __init__(self, n_steps: int, bar_format: str) -> None:
        self._n_steps, self._bar_format, self._began = n_steps, bar_format, time.perf_counter()
        self._lines: list[str] = []
        self._output: Any = None

    def line(self, text: str) -> None:
        self._lines.append(text)
        self._show()

    def bar(self, step: int, title: str, note: str) -> None:
        from tqdm import tqdm
        self._show(tqdm.format_meter(step, self._n_steps, time.perf_counter() - self._began, ncols=100, prefix=title,
                                     postfix=note, bar_format=self._bar_format))

    def close(self) -> None:
        if self._lines:
            self._show()
        elif self._output is not None:
            self._output.update({}, raw=True)  # there was only a bar: an output without content shows nothing

    def _show(self, bar: str = "") -> None:
        from IPython.display import display
        text = {"text/plain": "\n".join([*self._lines, *([bar] if bar else [])])}
        if self._output is None:
            self._output = display(text, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._output.update(text, raw=True)


def screen(n_steps: int, bar_format: str) -> _Lines:
    """What there is to write on: a notebook, a terminal with a bar of `n_steps`, or something that takes lines."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        return _Notebook(n_steps, bar_format)
    try:
        in_terminal = sys.stdout.isatty()
    except (AttributeError, ValueError):  # no standard output, or a closed one
        in_terminal = False
    return _Terminal(n_steps, bar_format) if in_terminal else _Lines()
