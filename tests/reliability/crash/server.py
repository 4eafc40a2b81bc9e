"""Processes that are forked from one that has imported and warmed up everything, killed, and reaped.

This process must have one thread, or what is forked from it can hang.
"""
import contextlib
import ctypes
import faulthandler
import gc
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import disk, place
from .scripts import SCRIPTS, digest

LONGEST = 60  # seconds that a process may take: then it hangs, dumps its stacks and ends


@dataclass
class Outcome:
    """How one process ended."""

    status: int  # its exit code; minus the signal that ended it
    digest: dict | None  # of the script, if it came to its end
    log: str
    phase: str
    step: int
    point: int
    session: int  # the id of its session, which is that of the process

    @property
    def was_killed(self):
        return self.status == -signal.SIGKILL

    @property
    def where(self):
        return f"{self.phase} (newest save: after update {self.step}; I/O call {self.point})"


class Bench:
    """A folder for one run of a script that is killed and resumed; removed at the end of its block if all went well."""

    def __init__(self, script, mutate=None):
        self.script, self.mutate = script, mutate
        self.root = Path(tempfile.mkdtemp(prefix="minifast-crash-"))
        self.folder = self.root / "run"
        self.is_kept = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.is_kept:
            shutil.rmtree(self.root, ignore_errors=True)

    def start(self, before=None, keeps=True):
        """Fork a process that runs the script; gives its id. before: called in it first."""
        place.clear()
        result, log = self.root / "result", self.root / "log"
        result.unlink(missing_ok=True)
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for target in (1, 2):
                os.dup2(handle, target)
            faulthandler.dump_traceback_later(LONGEST, exit=True, file=handle)
            logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
            warnings.simplefilter("error" if self.mutate is None else "ignore")
            if self.mutate is not None:
                self.mutate()
            if before is not None:
                before()
            folder = self.folder if keeps else None
            learn, callbacks = self.script.run(folder)
            place.note(place.DONE)
            result.write_text(json.dumps(digest(learn, callbacks, folder)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def outcome(self, pid):
        """Wait for the process `pid`."""
        _, status = os.waitpid(pid, 0)
        phase, step, point, _ = place.read()
        result, log = self.root / "result", self.root / "log"
        code = os.waitstatus_to_exitcode(status)
        return Outcome(code, json.loads(result.read_text()) if code == 0 else None,
                       log.read_text(errors="replace") if log.exists() else "", phase, step, point, pid)

    def finish(self, before=None, keeps=True):
        """Run the script to its end."""
        outcome = self.outcome(self.start(before, keeps))
        if outcome.status:
            _reap(outcome.session)
        return outcome

    def kill(self, delay, target="group"):
        """Run the script and kill it after `delay` seconds. target: "group", "main" (alone) or "worker" (one)."""
        pid = self.start()
        end = time.monotonic() + delay
        time.sleep(max(0.0, delay))
        while target == "worker" and not (workers := children(pid)) and time.monotonic() < end + 0.2:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            if target == "group":
                _kill_group(pid)
            else:
                os.kill(pid if target == "main" else (workers[0] if workers else pid), signal.SIGKILL)
        outcome = self.outcome(pid)
        if target != "main":
            _reap(pid)
        return outcome

    def invalid(self):
        return disk.invalid(self.folder)

    def keep(self):
        """Leave the folder behind, for whoever looks into a failure; gives its path. Broken versions have to fail."""
        self.is_kept = self.mutate is None
        return self.root if self.is_kept else "not kept"


def _kill_group(pid):
    """SIGKILL for all of its session. It may not have made one yet."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def _reap(session):
    """Have nobody of a killed session left: as a subreaper, this process gets its orphans."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)
    reap()


def reap():
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _processes():
    """(pid, parent, session) of each process that is not a zombie."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    yield int(entry), int(fields[1]), int(fields[3])


def children(pid):
    return [child for child, parent, _ in _processes() if parent == pid]


def survivors(sessions, seconds):
    """The processes of `sessions` that are still there after `seconds`; they are ended."""
    end = time.monotonic() + seconds
    while True:
        reap()
        left = [(pid, session) for pid, _, session in _processes() if session in sessions]
        if not left or time.monotonic() > end:
            break
        time.sleep(0.1)
    for pid, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.05 * bool(left))
    reap()
    return left


def adopt_orphans():
    """Have the processes whose parent was killed come to this one, to be reaped."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def warm_up(scripts):
    """Make this process one to fork from: everything that training imports is imported, and there is one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    adopt_orphans()
    place.watch()
    with tempfile.TemporaryDirectory(prefix="minifast-crash-") as folder:
        for i, script in enumerate([script for script in scripts if script.kind != 2] or [SCRIPTS["DataLoader"]]):
            for _ in range(2):  # once to its end, once passed over; no worker processes here
                digest(*script.run(Path(folder, str(i))), Path(folder, str(i)))
    gc.freeze()  # else the collector of each fork copies all of this process's memory
    assert len(os.listdir("/proc/self/task")) == 1, "a process to fork from has one thread"
