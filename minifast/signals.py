"""Ctrl-C that waits for the end of the batch."""
import os
import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """While entered, the first SIGINT is only noted in `pending`; a second one is handled at once as before.

    The loop calls `check()` between batches. Whatever is still pending when the block ends is raised there. A handler
    of the host program's own hears of each; only a KeyboardInterrupt that it raises at the first one waits. In a
    thread other than the main one, or where the host program ignores SIGINT, nothing is installed and Ctrl-C does
    what it did before. A process that was forked meanwhile, as the workers of a DataLoader are, ignores SIGINT: a
    terminal sends it to them too, and this process ends them if need be.

    >>> with DeferredInterrupt() as interrupt:
    ...     interrupt.check()  # raises KeyboardInterrupt once Ctrl-C was pressed
    >>> interrupt.pending
    False
    """

    def __init__(self) -> None:
        self.pending = False
        self._previous: signal._HANDLER = None
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed since the block began."""
        if self.pending:  # and it stays so: one more Ctrl-C, in a cleanup that hangs, is a second one
            raise KeyboardInterrupt

    def __enter__(self) -> "DeferredInterrupt":
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and callable(signal.getsignal(signal.SIGINT)):
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
        if error is None:
            self.check()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        was_pending, self.pending = self.pending, True
        if not callable(self._previous) or (self._previous is signal.default_int_handler and not was_pending):
            return
        try:
            self._previous(signum, frame)  # of a fit around this one, or of the host program: they hear of it too
        except KeyboardInterrupt:
            if was_pending:
                raise
