"""A power cut, as far as it can be modelled: the newest checkpoint is cut off, or has a page or a bit that is wrong."""
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from helpers import bits

from minifast.files.reading import load_tree
from minifast.resume.folder import FitFolder

from . import disk, scripts
from .server import Bench
from .shares import in_shares

LAST = 14  # the update after whose checkpoint the run is killed
PAGE = 4096
KINDS = ("cut off", "page of zeros", "flipped bit")


@dataclass
class Damaged:
    """What became of damaged files."""

    files: int = 0
    resumed: int = 0
    refused: Counter = field(default_factory=Counter)  # by kind; the others hold the same values as before
    tried: Counter = field(default_factory=Counter)
    failures: list = field(default_factory=list)
    seconds: float = 0.0


def damaged(content, kind, numbers):
    """`content`, bytes, with one damage."""
    if kind == "cut off":
        return content[:numbers.randrange(len(content))]
    found = bytearray(content)
    if kind == "flipped bit":
        found[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
    else:
        start = numbers.randrange(0, len(content), PAGE)
        found[start:start + PAGE] = bytes(len(found[start:start + PAGE]))
    return bytes(found)


def sweep(script, expected, n_files, n_resumed, *, jobs=1, seed=0):
    """Read `n_files` damaged files; with the first `n_resumed` of them as the newest, resume and compare."""
    start, total = time.monotonic(), Damaged()
    with Bench(script) as template:
        killed = template.finish(before=_die_after_last)
        assert killed.was_killed, killed.log
        newest = max(path for path in disk.finals(template.folder) if path.name.startswith("step-"))
        assert len(disk.finals(template.folder)) == 3
        assert newest.name == f"step-{LAST:08d}.ckpt"

        def work(share):
            for index in share:
                yield _one(script, expected, template.folder, newest, index, seed, index < n_resumed)

        for kind, is_refused, failures in in_shares(work, n_files, jobs):
            total.files += 1
            total.tried[kind] += 1
            total.refused[kind] += is_refused
            total.failures += failures
    total.resumed, total.seconds = min(n_files, n_resumed), time.monotonic() - start
    return total


def _die_after_last():
    save = FitFolder.save

    def last(folder, step, *args, **options):
        save(folder, step, *args, **options)
        if step == LAST:
            os.kill(os.getpid(), signal.SIGKILL)

    FitFolder.save = last


def _one(script, expected, folder, newest, index, seed, is_resumed):
    numbers, kind = random.Random(f"{seed}/{index}"), KINDS[index % len(KINDS)]
    label = f"damaged file {index}, seed {seed} ({kind})"
    whole = newest.read_bytes()
    content = damaged(whole, kind, numbers)
    with Bench(script) as bench:
        shutil.copytree(folder, bench.folder)  # copies: `best.ckpt` is no link to the damaged file
        path = bench.folder / newest.relative_to(folder)
        path.write_bytes(content)
        failures, refusal = [], None
        try:
            found = load_tree(path, checked=True)
        except ValueError as error:
            refusal = str(error)
        else:
            if bits(found) != bits(load_tree(newest)):
                failures.append(f"{label}: it was read with other values")
        if is_resumed:
            failures += [f"{label}: {line}" for line in _resume(bench, path, refusal, expected)]
        if failures:
            failures[-1] += f" [{bench.keep()}]"
        return kind, refusal is not None and content != whole, failures


def _resume(bench, path, refusal, expected):
    ended = bench.finish()
    if ended.status:
        return [f"exit code {ended.status}: {ended.log[-1500:]}"]
    lines = []
    wrong = scripts.differences(ended.digest, expected)
    if wrong:
        lines.append(f"other {', '.join(wrong)}")
    skipped = [line for line in ended.log.splitlines() if line.startswith("skipped: ")]
    if refusal is not None and not any(refusal in line for line in skipped):
        lines.append(f"the log does not say which file was skipped and why: {ended.log[-1500:]}")
    used = path.name if refusal is None else f"step-{LAST - 2:08d}.ckpt"
    if f"{used}: resumed " not in ended.log:
        lines.append(f"it has not gone on from {used}: {ended.log[-1500:]}")
    if bench.invalid():
        lines.append(f"left damaged: {bench.invalid()}")
    return lines
