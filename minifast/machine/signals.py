"""Ctrl-C and SIGTERM that wait for the end of the batch."""
import logging
import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType

log = logging.getLogger("minifast")


class DeferredInterrupt:
    """While entered, the first SIGINT or SIGTERM is only noted in `pending`; a SIGINT after that is handled at once.

    The loop calls `check()` between batches. It raises KeyboardInterrupt after SIGINT and SystemExit(143) after
    SIGTERM; after both the latter, because a program that goes on after Ctrl-C must not go on after SIGTERM. Whatever
    is still pending when the block ends is raised there, or by the block around this one. More SIGTERMs are noted only:
    who sends them has SIGKILL. `is_held` is for a quick piece of work that nothing may stop half way: while it is True,
    given or set, every signal waits, but those that come in a block inside this one that is not held itself.

    A handler of the host program's own hears of each. A KeyboardInterrupt or SystemExit that it raises waits too, and
    is then what is raised; at a SIGINT that is not the first it does not wait. Each signal is left as it is where the
    host program ignores it, and SIGINT where it ends the process by default; in a thread other than the main one
    nothing is installed. A process that was forked meanwhile, as the workers of a DataLoader are, ignores SIGINT (a
    terminal sends it to them too, and this process ends them if need be) and ends at SIGTERM.

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
        self._outer: DeferredInterrupt | None = None  # the block around this one that hears of the signals too
        self._is_overdue = False  # one that is handled at once came while `is_held`
        self._raised: dict[int, BaseException] = {}  # of each signal, by the handler that was there before
        self._previous: dict[int, signal._HANDLER] = {}
        self._of_children: signal._HANDLER = None
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise `exception()` if a signal came since the block began."""
        if self.pending:  # and it stays so: one more Ctrl-C, in a cleanup that hangs, is a second one
            self.was_raised = True
            raise self.exception()

    def exception(self) -> BaseException:
        """What the signal that came is raised as: KeyboardInterrupt, SystemExit(143), or what the host program raised.
        """
        if self._outer is not None and self._outer.pending:
            return self._outer.exception()
        if self.signal in self._raised:
            return self._raised[self.signal]
        return SystemExit(128 + signal.SIGTERM) if self.signal == signal.SIGTERM else KeyboardInterrupt()

    def __enter__(self) -> "DeferredInterrupt":
        if threading.current_thread() is not threading.main_thread():
            log.debug("not in the main thread: SIGINT and SIGTERM do what they did before")
            return self
        is_held, self.is_held = self.is_held, True  # until every handler is in its place
        try:
            self._install(signal.SIGINT)  # the first: by default it raises
            self._install(signal.SIGTERM)
        except BaseException:
            self._put_back()
            raise
        self.is_held = is_held
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.is_held = True
        try:
            self._put_back()
            if error is None and (self._outer is None or self._is_overdue):
                self.check()
        finally:
            self._outer = None
            self._raised.clear()  # the traceback of what is raised holds this object: a cycle

    def _install(self, number: signal.Signals) -> None:
        previous = signal.getsignal(number)
        if not callable(previous) and not (number == signal.SIGTERM and previous is signal.SIG_DFL):
            return
        outer = getattr(previous, "__self__", None)
        if isinstance(outer, DeferredInterrupt):
            self._outer = outer
            if outer.pending:
                self.pending, self.signal = True, outer.signal
        self._previous[number] = previous
        signal.signal(number, self._note)

    def _put_back(self) -> None:
        """Restore every handler, even if one that is restored already raises."""
        try:
            if self._of_children is not None and signal.getsignal(signal.SIGCHLD) == self._note_child:
                signal.signal(signal.SIGCHLD, self._of_children)
            self._of_children = None
            for number in (signal.SIGTERM, signal.SIGINT):
                if number in self._previous:
                    signal.signal(number, self._previous[number])
                    del self._previous[number]
        except BaseException:
            self._put_back()
            raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        is_at_once = self.pending and number == signal.SIGINT
        self.pending = True
        if self.signal != signal.SIGTERM:
            self.signal = signal.Signals(number)
        is_ended = self._tell_previous(number, frame, is_at_once)
        must_raise = is_at_once and (is_ended or (self._outer is not None and self._outer._is_overdue))
        self._watch_children()
        if must_raise and not self.is_held:
            raise self.exception()
        self._is_overdue = self._is_overdue or must_raise

    def _tell_previous(self, number: int, frame: FrameType | None, is_at_once: bool) -> bool:
        """Whether the handler that was there before, the host program's or an outer block's, wants to end this."""
        previous = self._previous.get(number)
        if not callable(previous) or (previous is signal.default_int_handler and not is_at_once):
            return False
        try:
            previous(number, frame)
        except (KeyboardInterrupt, SystemExit) as error:
            self._raised[number] = error.with_traceback(None)  # it holds frames, and with them worker processes
            return True
        return False

    def _watch_children(self) -> None:
        """From now on no worker that dies, of a SIGTERM to the whole process group, makes torch raise in mid-batch."""
        if self._of_children is None and hasattr(signal, "SIGCHLD") and callable(signal.getsignal(signal.SIGCHLD)):
            self._of_children = signal.signal(signal.SIGCHLD, self._note_child)

    def _note_child(self, number: int, frame: FrameType | None) -> None:
        if callable(self._of_children):
            with suppress(RuntimeError):  # the loader looks after its workers by itself too
                self._of_children(number, frame)
