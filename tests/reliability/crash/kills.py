"""SIGKILL at random moments of a run, several times, until it comes to its end."""
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from . import place, scripts
from .server import Bench, survivors
from .shares import in_shares

MOST = 4  # kills of one run
WORKERS_GO = 20  # seconds in which workers have to notice that their parent is gone: torch looks every 5


@dataclass
class Tally:
    """What a kill loop has seen."""

    kills: int = 0
    runs: int = 0
    diverged: list = field(default_factory=list)  # a line each
    invalid: list = field(default_factory=list)
    places: Counter = field(default_factory=Counter)
    resumed: int = 0  # times that a run went on from a checkpoint
    inside: int = 0  # of these, in the middle of an epoch
    survivors: int = 0  # processes that outlived their killed parent
    seconds: float = 0.0

    @property
    def in_a_write(self):
        """The share of kills that came while a checkpoint was written."""
        return (self.places[place.WRITING] + self.places[place.FINAL]) / max(1, self.kills)

    @property
    def failures(self):
        alive = [f"{self.survivors} worker processes outlived their parent"] if self.survivors else []
        return self.invalid + self.diverged + alive

    def add(self, other):
        for name in ("kills", "runs", "diverged", "invalid", "places", "resumed", "inside", "survivors"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def histogram(self):
        """Where the kills came, and where the runs went on."""
        shares = ", ".join(f"{phase} {self.places[phase] / max(1, self.kills):.0%}" for phase in place.PHASES
                           if self.places[phase])
        return f"{shares}; resumed {self.resumed}, inside an epoch {self.inside}"

    def look(self, outcome):
        """Count where a run went on."""
        self.inside += "resumed in epoch" in outcome.log
        self.resumed += ": resumed " in outcome.log


def reference(script):
    """The digest of an uninterrupted run. Raises AssertionError unless it is the same again, and without Checkpoint."""
    found = []
    for keeps in (True, True, False):
        with Bench(script) as bench:
            outcome = bench.finish(keeps=keeps)
            assert outcome.status == 0, f"{script.name}: an uninterrupted run has failed\n{outcome.log}"
            assert not bench.invalid(), bench.invalid()
            found.append(outcome.digest)
    again, without = (scripts.differences(other, found[0]) for other in found[1:])
    assert not again, f"{script.name}: two uninterrupted runs differ in {again}"
    of_files = [name for name in found[0] if name == "files" or name.endswith(", best")]
    assert without == sorted(of_files), f"{script.name}: Checkpoint has changed {without}"
    return found[0]


def loop(script, n_kills, seed, expected, *, jobs=1, mutate=None, target="group"):
    """Kill until `n_kills` have hit; every run is resumed to its end and compared with the digest `expected`."""
    start, total = time.monotonic(), Tally()
    for tally in in_shares(lambda share: [_share(script, len(share), f"{seed}/{share[0]}", expected, mutate, target)],
                           n_kills, jobs):
        total.add(tally)
    total.seconds = time.monotonic() - start
    return total


def _share(script, n_kills, seed, expected, mutate, target):
    tally, sessions, n_tries = Tally(), set(), 0
    longest = _duration(script)
    while tally.kills < n_kills and n_tries < 3 * n_kills + 20:
        n_tries += 1
        label = f"{script.name}, seed {seed}, run {tally.runs}"
        with Bench(script, mutate) as bench:
            _one_run(bench, label, random.Random(label), longest, n_kills, tally, expected, target, sessions)
        tally.runs += 1
    if target == "main":
        tally.survivors = len(survivors(sessions, WORKERS_GO))
    return tally


def _one_run(bench, label, numbers, longest, n_kills, tally, expected, target, sessions):
    story, outcome = [], None
    for _ in range(MOST):
        if tally.kills == n_kills:
            break
        outcome = bench.kill(numbers.uniform(0, 0.8) * longest, target)
        tally.look(outcome)
        if outcome.status == 0:
            break
        if not outcome.was_killed and target != "worker":
            tally.diverged.append(f"{label}: {'; '.join(story)}; then it failed: {_tail(outcome)} [{bench.keep()}]")
            return
        tally.kills += 1
        tally.places[outcome.phase] += 1
        story.append(f"killed at {outcome.where}")
        sessions.add(outcome.session)
        tally.invalid += [f"{label}: {'; '.join(story)}: {line}" for line in bench.invalid()]
    if outcome is None or outcome.status:
        outcome = bench.finish()
        tally.look(outcome)
    wrong = [f"it failed: {_tail(outcome)}"] if outcome.status else scripts.differences(outcome.digest, expected)
    if wrong:
        tally.diverged.append(f"{label}: {'; '.join(story)}; then other: {', '.join(wrong)} [{bench.keep()}]")


def _tail(outcome):
    return f"exit code {outcome.status}: {outcome.log[-1500:]}"


def _duration(script):
    """Seconds that an uninterrupted run takes now."""
    seconds = []
    for _ in range(2):
        with Bench(script) as bench:
            start = time.monotonic()
            bench.finish()
            seconds.append(time.monotonic() - start)
    return min(seconds)
