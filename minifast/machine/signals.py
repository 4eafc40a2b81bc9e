"""Ctrl-C and SIGTERM that wait for the end of the batch."""
import logging
import os
import signal
import threading
from types import FrameType, TracebackType

log = logging.getLogger("minifast")


class DeferredInterrupt:
    """While entered, the first SIGINT or SIGTERM is only noted in `pending`; a SIGINT after that is raised at once.

    The loop calls `check()` between batches. It raises KeyboardInterrupt after SIGINT and SystemExit(143) after
    SIGTERM; after both the latter, because a program that goes on after Ctrl-C must not go on after SIGTERM. Whatever
    is still pending when the block ends is raised there, or by the block around this one. More SIGTERMs are noted only.
    is_held: for a quick piece of work that nothing may stop half way: while it is True, given or set, every signal
    waits, but those that come in a block inside this one that is not held itself.

    A handler of the host program's own is not called meanwhile; a signal that it ignores is left alone, and so is
    SIGINT where it ends the process by default, and all in another thread than the main one. A process that was forked
    meanwhile, such as a worker, ignores SIGINT (a terminal sends it there too) and ends at SIGTERM.

    >>> with DeferredInterrupt() as interrupt:
    ...     interrupt.check()  # raises once a signal came
    >>> interrupt.pending
    False
    """

    def __init__(self, *, is_held: bool = False) -> None:
        self.pending = False  # a signal came
        self.signal: signal.Signals | None = None  # which one; SIGTERM, if both came
        self.was_raised = False  # by `check`: the block ended between two batches, rather than in one
        self.is_held = is_held
        self._outer: DeferredInterrupt | None = None  # the block around this one, which hears of the signals too
        self._is_overdue = False  # a second SIGINT came while `is_held`
        self._previous: dict[int, signal._HANDLER] = {}
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise `exception()` if a signal came since the block began."""
        if self.pending:  # and it stays so: one more Ctrl-C, in a cleanup that hangs, is a second one
            self.was_raised = True
            raise self.exception()

    def exception(self) -> BaseException:
        """What the signal that came is raised as: KeyboardInterrupt or SystemExit(143)."""
        return SystemExit(128 + signal.SIGTERM) if self.signal == signal.SIGTERM else KeyboardInterrupt()

    def __enter__(self) -> "DeferredInterrupt":
        if threading.current_thread() is not threading.main_thread():
            log.debug("not in the main thread: SIGINT and SIGTERM do what they did before")
            return self
        is_held, self.is_held = self.is_held, True  # until every handler is in its place
        try:
            for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT first: by default it raises
                self._install(number)
        except BaseException:
            self._put_back()
            raise
        self.is_held = is_held
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.is_held = True
        self._put_back()
        outer, self._outer = self._outer, None
        if error is None and (outer is None or self._is_overdue):
            self.check()

    def _install(self, number: signal.Signals) -> None:
        previous = signal.getsignal(number)
        if not callable(previous) and not (number == signal.SIGTERM and previous is signal.SIG_DFL):
            return
        outer = getattr(previous, "__self__", None)
        if isinstance(outer, DeferredInterrupt) and outer._pid == self._pid:
            self._outer, self.pending, self.signal = outer, outer.pending, outer.signal
        self._previous[number] = previous
        signal.signal(number, self._handle)

    def _put_back(self) -> None:
        """Restore every handler, even if one that is restored already raises."""
        try:
            while self._previous:
                number, previous = list(self._previous.items())[-1]
                signal.signal(number, previous)
                del self._previous[number]
        except BaseException:
            self._put_back()
            raise

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        is_second = self.pending and number == signal.SIGINT
        self._note(number)
        if is_second and not self.is_held:
            raise self.exception()
        self._is_overdue = self._is_overdue or is_second

    def _note(self, number: int) -> None:
        self.pending = True
        if self.signal != signal.SIGTERM:
            self.signal = signal.Signals(number)
        if self._outer is not None:
            self._outer._note(number)
        elif hasattr(signal, "SIGCHLD") and callable(signal.getsignal(signal.SIGCHLD)):
            # a SIGTERM to the process group ends the workers too, and torch's handler would raise that in mid-batch
            self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
