"""How many CPUs there are, and how much memory is free: of the machine, of this process's control group, of a GPU."""
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def available(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can still be taken of the memory of `device`; None where nobody says.

    Of a CPU it is what Linux calls available (free, or a cache that can be given up), or less where a control group
    (a container's limit) leaves less. root: where /proc and /sys are.

    >>> free = available(torch.device("cpu"))
    >>> free is None or free > 0
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [*_of_machine(root), *_of_groups(root)]
    return max(0, min(found)) if found else None


def _of_machine(root: Path) -> list[int]:
    lines = (line.split() for line in _text(root / "proc/meminfo").splitlines())
    return [int(words[1]) * 1024 for words in lines if words[:1] == ["MemAvailable:"]]


def _of_groups(root: Path) -> Iterator[int]:
    """What the control group of this process leaves, and each group that it is in: version 2 and version 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else (
            "memory.max", "memory.current")
        for name in ("", *filter(None, path.split("/"))):
            folder = folder / name
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():  # "max": no limit
                counts = dict(line.split() for line in _text(folder / "memory.stat").splitlines()
                              if len(line.split()) == 2)
                cache = counts.get("total_inactive_file", counts.get("inactive_file", "0"))  # can be read again
                yield int(most) - int(used) + int(cache)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


MOST_WORKERS = 8  # each holds a copy of what it reads


def n_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
