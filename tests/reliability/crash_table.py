"""Kill training at random and at every system call of a save, resume it, compare bits, and print what was seen.

    make crash                                      the full figures, about half an hour on two idle cores
    make crash ARGS="--kills 300 --worker-kills 60"

Seeds are fixed, moments are not: a failure says where the kills came, and keeps the folder of its run. Ends with 1 if
anything failed, or if a broken version was not seen.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]  # the package of this tree, whatever is installed

from crash import damage, kills, points, server  # noqa: E402
from crash.scripts import SCRIPTS  # noqa: E402
from crash.variants import VARIANTS, seen_once  # noqa: E402

SHORT, SEVERAL = SCRIPTS["DataLoader, short"], SCRIPTS["freeze, fit, unfreeze, fit"]
PLAIN, WORKERS = SCRIPTS["DataLoader"], SCRIPTS["DataLoader, 2 workers"]
OTHERS = [script for script in SCRIPTS.values() if script not in (PLAIN, WORKERS, SHORT)]


class Report:
    """Lines of a table, each with its verdict."""

    def __init__(self):
        self.failures, self.figures = [], {}

    def line(self, name, done, failures, seconds, figures=None):
        self.failures += failures
        self.figures[name] = {"failures": failures, "seconds": round(seconds, 1), **(figures or {})}
        verdict = "ok" if not failures else f"{len(failures)} FAILED"
        print(f"{name:<46} {done:<66} {verdict:<10} {seconds:7.1f} s", flush=True)
        for failure in failures[:5]:
            print(f"    {failure}", flush=True)

    def kills(self, name, tally):
        self.line(name, f"{tally.kills} kills, {tally.runs} runs; diverged {len(tally.diverged)}, "
                        f"bad files {len(tally.invalid)}", tally.failures, tally.seconds,
                  {"kills": tally.kills, "in_a_write": tally.in_a_write})
        print(f"{'':<46} {tally.histogram()}", flush=True)


def references(report, chosen):
    """The digests of uninterrupted runs."""
    start = time.monotonic()
    found = {script.name: kills.reference(script) for script in chosen}
    report.line("uninterrupted runs", f"{len(found)} scripts: each repeats itself, and is the same without Checkpoint",
                [], time.monotonic() - start)
    return found


def kill_lines(report, args, expected):
    plan = ((PLAIN, args.kills), (WORKERS, args.worker_kills), *((other, args.other_kills) for other in OTHERS))
    for script, n in plan:
        if n:
            report.kills(script.name, kills.loop(script, n, args.seed, expected[script.name], jobs=args.jobs))
    for target, name in (("main", "main process alone is killed"), ("worker", "one worker is killed")):
        if args.lone_kills:
            report.kills(name, kills.loop(WORKERS, args.lone_kills, args.seed, expected[WORKERS.name], jobs=args.jobs,
                                          target=target))


def point_lines(report, args, expected):
    plans = {0: (), 1: [(SHORT, None, False)], 2: [(script, buffer, again) for script in (PLAIN, SEVERAL)
                                                   for buffer, again in ((None, False), (4096, True))]}
    for script, buffer, again in plans[args.points]:
        swept = points.sweep(script, expected[script.name], jobs=args.jobs, buffer=buffer, again=again, seed=args.seed)
        name = f"each I/O call: {script.name}" if not again else "  in writes of 4 kB, the resumed run killed too"
        report.line(name, f"{swept.tried} points: {swept.kinds()}", swept.failures, swept.seconds,
                    {"points": swept.tried})


def damage_line(report, args, expected):
    if args.damaged:
        found = damage.sweep(PLAIN, expected[PLAIN.name], args.damaged, args.damaged_resumed, jobs=args.jobs,
                             seed=args.seed)
        seen = ", ".join(f"{kind} {found.refused[kind]}/{found.tried[kind]}" for kind in damage.KINDS)
        report.line("damaged newest file", f"{found.files} files, {found.resumed} resumed; refused: {seen}",
                    found.failures, found.seconds, {"files": found.files, "resumed": found.resumed})


def variant_lines(report, args, expected):
    if args.variant_kills == 1:
        return variants_seen_once(report, expected)
    for name, (mutate, shown_by) in VARIANTS.items() if args.variant_kills else ():
        script = SCRIPTS[shown_by]
        with server.Bench(script, mutate) as bench:  # what breaks resuming must not show where nothing is resumed
            alone = bench.finish()
        unfair = [] if alone.digest == expected[script.name] else ["it changes an uninterrupted run"]
        tally = kills.loop(script, args.variant_kills, args.seed, expected[script.name], jobs=args.jobs, mutate=mutate)
        missed = [] if tally.failures else ["the kill loop has not seen it"]
        report.line(f"broken: {name}", f"{tally.kills} kills, {tally.runs} runs; diverged {len(tally.diverged)}, bad "
                                       f"files {len(tally.invalid)}; caught: {'yes' if tally.failures else 'NO'}",
                    unfair + missed, tally.seconds, {"caught": bool(tally.failures)})


def variants_seen_once(report, expected):
    """Each broken version killed once, where its break always shows."""
    start, missed = time.monotonic(), []
    for name, (mutate, shown_by) in VARIANTS.items():
        if not seen_once(SCRIPTS[shown_by], mutate, expected[shown_by]):
            missed.append(f"{name}: it was not seen")
    caught = len(VARIANTS) - len(missed)
    report.line("broken versions, one kill each", f"{caught} of {len(VARIANTS)} caught", missed,
                time.monotonic() - start, {"caught": caught})


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default, text in (
            ("kills", 3000, "of the process, with a DataLoader without workers"),
            ("worker-kills", 500, "of the process group, with 2 workers"),
            ("other-kills", 100, "in each other script: TensorLoader, lr_find first, several fits"),
            ("lone-kills", 60, "of the main process alone, and as many of a worker alone"),
            ("points", 2, "0: no crash points; 1: those of a short script; 2: of two longer ones, and a second kill"),
            ("damaged", 2100, "files that are damaged and read"),
            ("damaged-resumed", 300, "of them from which a fit is resumed"),
            ("variant-kills", 40, "in each broken version; 1: in the middle of a save, where it always shows"),
            ("seed", 0, "of everything that is drawn"),
            ("jobs", min(8, os.cpu_count() or 1), "processes that kill at a time")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures, too")
    return parser.parse_args(argv)


def _chosen(args):
    """The scripts that are needed."""
    shown_by = {name for _, name in VARIANTS.values()} if args.variant_kills else set()
    wanted = {PLAIN.name: args.kills or args.damaged or args.points > 1, SHORT.name: args.points == 1,
              WORKERS.name: args.worker_kills or args.lone_kills, SEVERAL.name: args.points > 1,
              **dict.fromkeys([other.name for other in OTHERS if args.other_kills], True),
              **dict.fromkeys(shown_by, True)}
    return [script for name, script in SCRIPTS.items() if wanted.get(name)]


def main(argv=None):
    args, report, start = arguments(argv), Report(), time.monotonic()
    chosen = _chosen(args)
    server.warm_up(chosen)
    expected = references(report, chosen)
    for part in (point_lines, damage_line, kill_lines, variant_lines):
        part(report, args, expected)
    report.line("all", "", [], time.monotonic() - start)
    if args.json:
        args.json.write_text(json.dumps(report.figures))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
