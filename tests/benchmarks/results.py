"""Results as JSON, what got slower since, and the table for the README."""
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from harness import Goal, Row, Table, number, spread

import minifast

KEPT = Path(__file__).with_name("results.json")  # those of the last full run
FORMAT = 1
LEAST = 0.03  # a smaller change is no news on a shared machine, however well the rounds agree


def machine(device: torch.device) -> dict[str, Any]:
    """Where it ran; nothing that tells one machine of a kind from another."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system(),
             "device": str(device)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Of Python, torch, minifast and `packages`, as far as they are installed."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "minifast": minifast.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def record(tables: list[Table], command: str, device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What is known of one run of a suite."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "machine": machine(device),
            "versions": versions(packages), "tables": [dataclasses.asdict(table) for table in tables]}


def write(path: Path, suites: Mapping[str, Any]) -> None:
    """Write runs by the names of their suites; those of other suites that are in the file stay."""
    suites = (read(path) if path.exists() else {}) | dict(suites)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps({"format": FORMAT, "suites": _rounded(suites)}, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _rounded(value: Any) -> Any:
    """Numbers with five digits: more is noise, and makes every line of the file longer."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def read(path: Path) -> dict[str, Any]:
    """Runs by the names of their suites. Raises ValueError for a file that is something else."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} holds no results of format {FORMAT}. Write it with run.py --json.")
    return content["suites"]


def tables(run: Mapping[str, Any]) -> list[Table]:
    """The tables of one run."""
    return [Table(**{**table, "rows": [Row(**row) for row in table["rows"]],
                     "goals": [Goal(**goal) for goal in table["goals"]]}) for table in run["tables"]]


# ---- slower than before


def slower(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """A line for each row of one run that got slower than in an earlier run of that suite by more than the noise.

    Ratios to the reference are compared where there is one; else the values themselves, if the machine is of the same
    kind. Slower is: the median by more than 3 %, and above the earlier quartiles with its own quartiles too. Rows that
    were never measured before are no news.
    """
    earlier = {table.title: table for table in tables(before)}
    lines = []
    for table in tables(now):
        old = earlier.get(table.title)
        if old is None or old.reference != table.reference:
            continue
        if table.reference is None and now["machine"] != before["machine"]:
            continue
        known = {row.name for row in old.rows}
        for row in table.rows:
            if row.name not in known or row.name == table.reference:
                continue
            new, was = ((t.ratios(row.name) if t.reference else t.row(row.name).values) for t in (table, old))
            (_, first, median, _, _), (_, _, middle, third, _) = spread(new), spread(was)
            if median > middle + LEAST * abs(middle) and first > third:
                unit = "x" if table.reference else f" {table.unit}"
                lines.append(f"{table.title}: {row.name}: {number(median)}{unit}, was {number(middle)}{unit}")
    return lines


# ---- for the README


def markdown(suites: Mapping[str, Any]) -> str:
    """One table per suite: medians, and the median ratio with its quartiles; with machine, versions and date."""
    parts = []
    for name, run in suites.items():
        lines = ["| what | row | median | ratio (quartiles) |", "|---|---|---|---|"]
        for table in tables(run):
            for i, row in enumerate(table.rows):
                median = f"{number(spread(row.values)[2])} {table.unit}"
                ratio = ""
                if table.reference and row.name != table.reference:
                    _, first, middle, third, _ = spread(table.ratios(row.name))
                    ratio = f"{middle:.2f} ({first:.2f}-{third:.2f})"
                lines.append(f"| {'' if i else table.title} | {row.name} | {median} | {ratio} |")
        about = ", ".join([f"{key} {value}" for key, value in run["versions"].items()])
        place = run["machine"]
        lines += ["", f"{run['date'][:10]}, {place['cpu']}, {place['cores']} cores, {place['threads']} threads, "
                      f"{place['device']}; {about}; `{run['command']}`"]
        parts.append(f"**{name}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def command(arguments: Iterable[str]) -> str:
    """What was typed, without where files went: that is nobody else's path."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(("--json", "--plot", "--against", "--keep")):
            kept.append(argument)
        skip = not skip and argument in ("--json", "--plot", "--against")
    return " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *kept])
