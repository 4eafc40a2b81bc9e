"""Parts of tests that run in a process of their own, so that a crash, a hang or a full memory is an outcome."""

import json
import os
import resource
import signal
import traceback
import warnings
from dataclasses import dataclass, field


@dataclass
class Outcome:
    signal: int  # that ended it, 0 for none
    lines: list = field(default_factory=list)  # what it told, in order
    error: str = ""  # its traceback


def in_fork(function, *, memory=None, seconds=120):
    """Call `function(tell)` in a forked process; what it tells (JSON) is there even if it is killed.

    memory: bytes that the process may map beyond what it has when it starts. seconds: SIGALRM ends it then.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads of torch, which do nothing here
        pid = os.fork()
    if pid == 0:
        os.close(reading)

        def send(kind, value):
            os.write(writing, json.dumps([kind, value]).encode() + b"\n")

        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            if memory is not None:
                limit = virtual_size() + memory
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            function(lambda value: send("told", value))
        except BaseException:
            send("error", traceback.format_exc()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        lines = [json.loads(line) for line in pipe.read().splitlines()]
    _, status = os.waitpid(pid, 0)
    return Outcome(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                   [value for kind, value in lines if kind == "told"],
                   "".join(value for kind, value in lines if kind == "error"))


def told(function, **options):
    """What `function` told in a fork that ended well."""
    outcome = in_fork(function, **options)
    assert (outcome.signal, outcome.error) == (0, ""), (outcome.signal, outcome.error, outcome.lines[-1:])
    return outcome.lines


def virtual_size(key="VmSize"):
    """Bytes that this process has mapped, now or (VmPeak) at most."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))
