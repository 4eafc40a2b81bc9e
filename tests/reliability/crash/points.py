"""SIGKILL at every call that changes the disk: each in turn, so that no window is too narrow to be hit."""
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from minifast.files import writing as files

from . import disk, place, scripts
from .server import Bench
from .shares import in_shares

CALLS = ("fsync", "replace", "unlink", "link", "mkdir", "ftruncate", "pwrite")  # of os, which change the disk
NEEDED = {"write", "fsync", "replace", "unlink", "link", "open"}  # a save without one of them is not what was meant


@dataclass
class Points:
    """Counts the calls that change the disk, and ends this process at number `at` (from 1; None: never).

    buffer: bytes that are written at once. Each call gives two points, before and after it, a write one more in its
    middle, with half of its bytes on the disk.
    """

    at: int | None = None
    buffer: int | None = None
    names: list = field(default_factory=list)

    def install(self):
        if self.buffer is not None:
            files.BUFFER = self.buffer
        for name in CALLS:
            setattr(os, name, self._around(name, getattr(os, name)))
        create, write = os.open, files.write

        def opened(path, flags, *args, **options):
            if not flags & os.O_CREAT:
                return create(path, flags, *args, **options)
            self._hit("before open")
            handle = create(path, flags, *args, **options)
            self._hit("after open")
            return handle

        def written(handle, data):
            self._hit("before write")
            half = len(data) // 2
            n = write(handle, data[:half])
            self._hit("in write")
            n += write(handle, data[n:])
            self._hit("after write")
            return n

        os.open, files.write = opened, written

    def _around(self, name, function):
        def call(*args, **options):
            self._hit(f"before {name}")
            result = function(*args, **options)
            self._hit(f"after {name}")
            return result

        return call

    def _hit(self, name):
        self.names.append(name)
        place.note(point=len(self.names))
        if len(self.names) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def die_in_write(step):
    """Have this process end in the first write of the checkpoint after update `step`, half of it on the disk."""
    write = files.write

    def written(handle, data):
        if place.read()[1] != step:
            return write(handle, data)
        write(handle, data[:len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    files.write = written


@dataclass
class Swept:
    """What became of the crash points."""

    names: list  # of all points of a run
    tried: int = 0
    failures: list = field(default_factory=list)
    places: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    def kinds(self):
        counts = Counter(name.split()[-1] for name in self.names)
        return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def count(script, buffer=None):
    """The names of all points of an uninterrupted run, in order."""
    with Bench(script) as bench:
        points = Points(buffer=buffer)
        path = bench.root / "names"

        def install():
            points.install()
            os_exit = os._exit

            def leave(code):
                path.write_text("\n".join(points.names))
                os_exit(code)

            os._exit = leave

        outcome = bench.finish(before=install)
        assert outcome.status == 0, outcome.log
        names = path.read_text().splitlines()
    missing = NEEDED - {name.split()[-1] for name in names}
    assert not missing, f"no such call was seen: {missing}. Does minifast/files/writing.py still go through os?"
    assert not unsynced(names), f"a file has its name before it is on the disk: points {unsynced(names)}"
    return names


def unsynced(names):
    """The renames before which something was written that is not flushed to the disk: no kill can show that.

    >>> unsynced(["after write", "after fsync", "before replace", "after write", "before replace"])
    [5]
    """
    found, is_dirty = [], False
    for i, name in enumerate(names, 1):
        if name == "before replace" and is_dirty:
            found.append(i)
        is_dirty = name == "after write" or (is_dirty and name != "after fsync")
    return found


def sweep(script, expected, *, jobs=1, buffer=None, again=False, seed=0):
    """Kill at every point, resume to the end, and compare. again: kill the resumed run at a random point, too."""
    start, names = time.monotonic(), count(script, buffer)
    swept = Swept(names)

    def work(share):
        for index in share:
            yield _one(script, expected, names, index + 1, buffer, random.Random(f"{seed}/{index}") if again else None)

    for failures, phase in in_shares(work, len(names), jobs):
        swept.tried += 1
        swept.failures += failures
        swept.places[phase] += 1
    swept.seconds = time.monotonic() - start
    return swept


def _one(script, expected, names, at, buffer, numbers):
    with Bench(script) as bench:
        label = f"{script.name}, point {at} of {len(names)} ({names[at - 1]})"
        killed = bench.finish(before=Points(at, buffer).install)
        if not killed.was_killed:
            return [f"{label}: not killed, exit code {killed.status}: {killed.log[-1500:]}"], killed.phase
        failures = [f"{label}: {line}" for line in bench.invalid()]
        if numbers is not None:
            second = numbers.randint(1, len(names) - at + 10)
            label += f", then point {second}"
            bench.finish(before=Points(second, buffer).install)
            failures += [f"{label}: {line}" for line in bench.invalid()]
        ended = bench.finish()
        if ended.status:
            failures.append(f"{label}: exit code {ended.status}: {ended.log[-1500:]}")
        else:
            wrong = scripts.differences(ended.digest, expected)
            failures += [f"{label}: other {', '.join(wrong)}"] if wrong else []
        left = disk.orphans(bench.folder)
        failures += [f"{label}: left over {', '.join(left)}"] if left else []
        if failures:
            failures[-1] += f" [{bench.keep()}]"
        return failures, killed.phase
