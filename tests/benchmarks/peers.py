"""What a step costs in other frameworks: the same updates of the same MLP, as a user gets them and at their leanest.

Each peer has a process of its own, in which the hand-written loop is measured beside it; the processes take turns, so
all rounds are interleaved. Final weights are compared with a plain loop's before anything is timed. A peer that is not
installed, fails or ends with other weights is named below the table. Usage: `make bench-peers`.
"""
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import Goal, Options, Row, Table
from peer_loops import PEERS

PACKAGES = [package for package, _ in PEERS.values() if package != "minifast"]  # their versions are part of the result
REFERENCE = "by hand: torch's defaults, CosineAnnealingLR"
ROWS = {"default": "as a user gets it", "leanest": "at its leanest"}


class Peer:
    """A process that trains with one framework, when it is asked to."""

    def __init__(self, name):
        self.name, self.failure, self.rounds = name, "", []
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, Path(__file__).with_name("peer_worker.py"), name], text=True,
                                         stdin=pipe, stdout=pipe, stderr=pipe)

    def ask(self, **request):
        """What it answers; None once it has failed, and `failure` then says why."""
        if self.failure:
            return None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = json.loads(self._process.stdout.readline() or '{"error": ""}')
        except (OSError, ValueError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        if "error" in reply:
            if not reply["error"]:  # it is gone
                said = self._process.communicate()[1].strip().splitlines()
                reply["error"] = said[-1] if said else "it ended without a word"
            self.failure = reply["error"].splitlines()[0]
            return None
        return reply

    def close(self):
        """End the process."""
        self._process.communicate()


def suite(options: Options) -> Iterator[Table]:
    peers, versions = [Peer(name) for name in PEERS], {}
    try:
        for peer in peers:
            found = peer.ask(do="check", steps=20 if options.quick else 200)
            versions[peer.name] = found and found["version"]
        for i in range(0 if options.quick else -1, options.rounds):
            for peer in peers[i % len(peers):] + peers[:i % len(peers)]:
                found = peer.ask(do="round", steps=options.steps)
                if found is not None and i >= 0:
                    peer.rounds.append(found)
    finally:
        for peer in peers:
            peer.close()
    yield table(peers, versions, options)


def table(peers, versions, options) -> Table:
    """Times scaled to one hand-written loop: each is its ratio to the loop beside it, times the median of all loops."""
    ran = [peer for peer in peers if not peer.failure]
    notes = [f"{peer.name}: NOT MEASURED: {peer.failure}" for peer in peers if peer.failure]
    if not ran:
        return Table(f"peers; {options.steps} steps", "us per step", [], notes=notes)
    loops = [sorted(peer.rounds[i]["by hand"] for peer in ran)[len(ran) // 2] for i in range(options.rounds)]
    rows = [Row(REFERENCE, loops)]
    for kind, words in ROWS.items():
        rows += [Row(f"{peer.name} {versions[peer.name]}, {words}",
                     [loop * found[kind] / found["by hand"] for loop, found in zip(loops, peer.rounds, strict=True)])
                 for peer in ran]
    goals = []
    for words in ROWS.values():  # minifast is to be faster than the fastest of the others
        mine, *others = [row for row in rows if row.name.endswith(words)]
        if others and mine.name.startswith("minifast"):
            goals.append(Goal(mine.name, 1.0, than=min(others, key=lambda row: np.median(row.values)).name))
    notes += ["weights after the check's steps agree with the plain loop's (rtol 1e-4) in all rows"]
    return Table(f"MLP 16-32-2, batch 64, AdamW, cosine; one pass of {options.steps} batches", "us per step", rows,
                 REFERENCE, goals, notes)
