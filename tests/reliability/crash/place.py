"""Where a training process is, in memory that the process which kills it can read afterwards."""
import functools
import mmap
import struct

from minifast.core import loop
from minifast.resume.checkpoint import Checkpoint
from minifast.resume.folder import FitFolder

STARTING, TRAINING, WRITING, VALIDATING, FINAL, DONE = PHASES = (
    "before the first step", "training", "writing a checkpoint", "validation", "final save", "after the fit")
_FORM = struct.Struct("iiii")
_memory = mmap.mmap(-1, _FORM.size)  # shared with the processes that are forked later


def clear():
    _memory[:] = _FORM.pack(0, 0, 0, 0)


def note(phase=None, step=None, point=None, n_done=None):
    old = _FORM.unpack(_memory[:])
    phase = None if phase is None else PHASES.index(phase)
    new = [before if value is None else value for before, value in zip(old, (phase, step, point, n_done), strict=True)]
    _memory[:] = _FORM.pack(*new)


def read():
    """(phase, weight updates when the newest save began, newest I/O point, fits that have ended)"""
    phase, step, point, n_done = _FORM.unpack(_memory[:])
    return PHASES[phase], step, point, n_done


def _during(phase, function):
    """`function`, with the phase noted while it runs."""
    @functools.wraps(function)
    def run(*args, **options):
        before = read()[0]
        note(phase if before != FINAL else None)
        try:
            return function(*args, **options)
        finally:
            note(before)

    return run


def _noting_step(save):
    @functools.wraps(save)
    def run(folder, step, *args, **options):
        note(step=step)
        return save(folder, step, *args, **options)

    return run


def watch():
    """Note from now on, in this process and in what it forks, what is going on."""
    loop.train = _during(TRAINING, loop.train)
    loop.validate = _during(VALIDATING, loop.validate)
    FitFolder.save = _during(WRITING, _noting_step(FitFolder.save))
    Checkpoint.finish = _during(FINAL, Checkpoint.finish)


def renew():
    """Have memory of its own, in a process that starts some itself."""
    global _memory
    _memory = mmap.mmap(-1, _FORM.size)
