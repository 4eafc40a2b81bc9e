"""Killed at any moment, a run goes on to the same bits, and no file under a final name is ever half-written.

The kills come from a process of its own: what forks must have one thread. `make crash` does more of the same.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "crash_table.py"
FEW = {"points": 1, "kills": 10, "worker-kills": 4, "other-kills": 1, "lone-kills": 0, "damaged": 60,
       "damaged-resumed": 4, "variant-kills": 1}
MORE = {"points": 0, "kills": 100, "worker-kills": 30, "other-kills": 8, "lone-kills": 3, "damaged": 300,
        "damaged-resumed": 40, "variant-kills": 0}
few, more = pytest.param(FEW, id="few"), pytest.param(MORE, id="more", marks=pytest.mark.nightly)
amounts = pytest.mark.parametrize("part", [few, more], indirect=True, scope="module")
amounts_of_more = pytest.mark.parametrize("part", [more], indirect=True, scope="module")
amounts_of_few = pytest.mark.parametrize("part", [few], indirect=True, scope="module")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc")]


@pytest.fixture(scope="module")
def part(tmp_path_factory, request):
    """A function that gives the figures of one part of the table: all of it is made once, and here without failures.

    Its `amounts` are how many of each there were.
    """
    folder = tmp_path_factory.mktemp("crash")
    found = folder / "figures.json"
    command = [sys.executable, PROGRAM, "--json", found, *(f"--{name}={n}" for name, n in request.param.items())]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True)
    assert found.exists(), done.stdout + done.stderr
    figures = json.loads(found.read_text())
    assert done.returncode == any(row["failures"] for row in figures.values())
    left = [path.name for path in folder.glob("minifast-crash-*")]
    assert done.returncode or not left, f"left behind: {left}"

    def get(name):
        assert not figures[name]["failures"], "\n".join([*figures[name]["failures"], "", done.stdout, done.stderr])
        return figures[name]

    get.amounts = request.param
    return get


@pytest.mark.case("K1", "K9", "K10", "S3", "S4")
@amounts_of_few
def test_a_kill_at_every_call_that_changes_the_disk(part):
    """Each write, half-written too, fsync, rename, link, unlink of a whole run."""
    assert part("each I/O call: DataLoader, short")["points"] > 80  # 111 as it is: 7 saves with 14 or so each


@pytest.mark.case("K1", "S1", "S4", "S12", "S13")
@amounts
def test_kills_at_random(part):
    assert part("DataLoader")["kills"] == part.amounts["kills"]
    if part.amounts is MORE:  # ten draws may miss
        assert part("DataLoader")["in_a_write"] >= 0.2  # about a half; else the loop does not test what it is for


@pytest.mark.case("K1", "S1", "B9")
@amounts
def test_kills_at_random_with_worker_processes(part):
    assert part("DataLoader, 2 workers")["kills"] == part.amounts["worker-kills"]


@pytest.mark.case("K1", "L3", "S3", "S7")
@amounts
@pytest.mark.parametrize("script", ["TensorLoader", "lr_find first", "freeze, fit, unfreeze, fit", "fine_tune"])
def test_kills_in_other_scripts(part, script):
    """Of several fits, those that have ended are passed over; what lr_find does leaves no trace."""
    assert part(script)["kills"] == part.amounts["other-kills"]


@pytest.mark.case("B10", "R2")
@amounts_of_more
@pytest.mark.parametrize("target", ["main process alone is killed", "one worker is killed"])
def test_kills_of_single_processes(part, target):
    """Nobody outlives the main process, and the run goes on all the same."""
    assert part(target)["kills"] == part.amounts["lone-kills"]


@pytest.mark.case("K3", "K4", "K5", "X11")
@amounts
def test_a_newest_file_that_a_power_cut_has_damaged_is_skipped(part):
    assert part("damaged newest file")["files"] == part.amounts["damaged"]
    assert part("damaged newest file")["resumed"] == part.amounts["damaged-resumed"]


@pytest.mark.case("K1", "S1", "S13")
@amounts_of_few
def test_every_broken_version_is_seen(part):
    """A loop that sees no broken one has shown nothing: each is killed once, where its break must show."""
    assert part("broken versions, one kill each")["caught"] == 11
