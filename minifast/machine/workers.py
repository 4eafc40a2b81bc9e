"""Worker processes of a loader: none outlives the process that trains, and of those that die it is said why."""
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
DIED = ("Often memory has run out (each worker holds a copy of what it reads, and prefetch_factor batches), or "
        "/dev/shm is full: pass fewer workers. With num_workers=0 an error of the data set shows where it happens.")
PICKLED = ("where workers are started by spawn or forkserver, the data set, collate_fn and worker_init_fn go there by "
           "pickle: define what is named above at the top level of a module, without lambda, or pass num_workers=0")
_prctl: Any = None  # the C function, once it was looked up
_starting: tuple[int, int] | None = None  # (process, thread) that starts workers at this moment


@contextmanager
def bound_to_this_process() -> Iterator[None]:
    """Processes that this thread forks in the block die with this process, even if it dies of kill -9.

    torch leaves some behind for ever: a worker notes its parent some milliseconds after it was forked, and if that has
    died by then, it notes the wrong one. So the kernel is asked, first thing in the worker, to kill it when its parent
    dies. That cannot be on other systems than Linux; for workers that are started by spawn or forkserver; and outside
    the main thread (the kernel takes the end of the thread that forked for the parent's death).
    """
    global _starting
    if not sys.platform.startswith("linux") or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listen()
    outer, _starting = _starting, (os.getpid(), threading.get_ident())
    try:
        yield
    finally:
        _starting = outer


def _listen() -> None:
    global _prctl
    if _prctl is None:
        _prctl = ctypes.CDLL(None).prctl  # looked up here: a child of a fork should do as little as it can
        os.register_at_fork(after_in_child=_bind)  # once: Python has no way to take it back


def _bind() -> None:
    """In a child, right after the fork."""
    global _starting
    forked_by, _starting = _starting, None  # what the child forks itself is its own affair
    if forked_by is None or forked_by[1] != threading.get_ident():
        return
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() not in (forked_by[0], 0):  # it died before the kernel knew (0: it is in another pid namespace)
        os._exit(1)


def is_of_death(error: BaseException) -> bool:
    """Whether torch says that a worker has died. Its handler of SIGCHLD raises that anywhere in the main thread."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def explain(error: BaseException, iterator: Any = None) -> None:
    """Add a note to an error that comes of worker processes; iterator: of the loader, if it had begun to load."""
    died = ["a worker process of the loader died"] if is_of_death(error) else []
    # a worker that dies while it hands over a batch leaves a broken connection; "Caught " is the data set's own error
    if isinstance(error, (OSError, EOFError)) and not str(error).startswith("Caught "):
        died = _deaths(getattr(iterator, "_workers", ()))
    if died and not any(DIED in note for note in getattr(error, "__notes__", ())):
        error.add_note(f"{', '.join(died)}. {DIED}")
    may_be_of_pickle = isinstance(error, (AttributeError, TypeError)) or type(error).__name__ == "PicklingError"
    if iterator is None and may_be_of_pickle and "pickle" in str(error):
        error.add_note(PICKLED)


def _deaths(workers: Any) -> list[str]:
    """Which of them have died of themselves, or do so within a second: "worker process 4711 died of SIGKILL"."""
    end = time.monotonic() + 1
    with suppress(RuntimeError):  # torch's handler may say the same in the middle of this
        while workers and not any(worker.exitcode for worker in workers) and time.monotonic() < end:
            time.sleep(0.01)
    codes = {worker.pid: worker.exitcode for worker in workers if worker.exitcode}
    return [f"worker process {pid} died of {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
            for pid, code in codes.items()]


@contextmanager
def deaths_ignored() -> Iterator[None]:
    """While workers are ended nothing is expected of them: one that dies of itself is no error, and hides none."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_death(error):
            raise
