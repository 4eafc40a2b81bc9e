"""What a fit grows by over 100,000 steps; counted by tests/reliability/soak.py, in a process of its own."""
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import Goal, Options, Row, Table

TESTS = Path(__file__).resolve().parent.parent


def growth(n, recorder, first):
    """Bytes per step."""
    call = f"steps({n}, {recorder}, first={first})"
    done = subprocess.run([sys.executable, TESTS / "reliability" / "soak.py", call], capture_output=True, text=True,
                          check=True, cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": str(TESTS.parent)})
    return json.loads(done.stdout)["growth"] * 1e6 / n


def suite(options: Options) -> Iterator[Table]:
    if not Path("/proc/self/statm").exists():
        yield Table("memory of a long fit", "bytes per step", [], notes=["not measured: there is no /proc here"])
        return
    n, first = (2000, 1000) if options.quick else (100_000, 5000)
    rows = {"with the Recorder": (True, 80.0), "without it": (False, 10.0)}
    if options.quick:
        rows.popitem()
    found = [Row(name, [growth(n, recorder, first)]) for name, (recorder, _) in rows.items()]
    # in few steps the chunks in which a process takes its memory are most of it
    goals = [] if options.quick else [Goal(name, most, "value") for name, (_, most) in rows.items()]
    yield Table(f"memory that a fit grows by in {n:,} steps", "bytes per step", found, goals=goals)
