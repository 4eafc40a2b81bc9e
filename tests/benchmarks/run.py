"""What minifast costs, and what it saves, beside the loop one would write by hand.

All rows of a table are measured in turn, round by round, in one process; ratios are paired. Without names every suite
runs; --list says what there is. Usage: `make bench ARGS="steps --rounds 5"`.
"""
import argparse
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import results
import torch
from drawing import draw
from harness import Options

# name -> module:function beside this file; the function takes Options and gives Tables
SUITES = {
    "steps": "steps:suite",
    "common": "common:suite",
    "optimizer": "optimizer:suite",
    "in_memory": "in_memory:suite",
    "loading": "loading:suite",
    "lr_find": "lr_finder:suite",
    "checkpoint": "checkpoint:suite",
    "startup": "startup:suite",
    "memory": "memory:suite",
}
ELSEWHERE = {"peers": "peers:suite"}  # needs an environment of its own: `make bench-peers`


def load(name):
    """The function of a suite, and the first line of what its module says. Raises ImportError if it is not there."""
    module, _, function = (SUITES | ELSEWHERE)[name].partition(":")
    found = import_module(module)
    try:
        return getattr(found, function), (found.__doc__ or "").strip().splitlines()[0]
    except AttributeError as error:
        raise ImportError(f"{module}.py has no function {function}(options) that gives tables") from error


def parse(arguments: Iterable[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"which to run: {', '.join(SUITES)}")
    parser.add_argument("--rounds", type=positive, default=11, help="how often each row is measured")
    parser.add_argument("--steps", type=positive, default=1000, help="of a run of the smallest model; others take less")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=positive, default=1, help="that torch uses on the CPU")
    parser.add_argument("--quick", action="store_true", help="one round of a few steps: it runs, figures say nothing")
    parser.add_argument("--json", type=Path, help="write the results; those of other suites in that file stay")
    parser.add_argument("--keep", action="store_true", help=f"write them to {results.KEPT.name}, which the next runs "
                        "are compared with")
    parser.add_argument("--against", type=Path, default=results.KEPT, help="results to compare with")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the tables")
    parser.add_argument("--readme", action="store_true", help="run nothing: print the kept results as Markdown")
    parser.add_argument("--list", action="store_true", help="run nothing: say what the suites are")
    args = parser.parse_args(arguments)
    unknown = set(args.suites) - (SUITES | ELSEWHERE).keys()
    if unknown:
        parser.error(f"there is no suite {', '.join(sorted(unknown))}: choose from {', '.join(SUITES | ELSEWHERE)}")
    if not args.against.exists() and (args.readme or args.against != results.KEPT):
        parser.error(f"there is no {args.against}: write results with --keep, or with --json")
    if args.keep and args.quick:
        parser.error("--keep keeps figures, and those of --quick say nothing: leave one of them out")
    return args


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def measure(name, options, command, before):
    """Run one suite and print it; gives (its tables, its record, whether nothing was missing)."""
    try:
        suite, said = load(name)
    except ImportError as error:
        print(f"== {name}: NOT MEASURED: {error}\n", flush=True)
        return [], None, False
    print(f"== {name}: {said}\n", flush=True)
    began, tables = time.perf_counter(), []
    for table in suite(options):
        tables.append(table)
        print(f"{table}\n", flush=True)
    packages = getattr(sys.modules[suite.__module__], "PACKAGES", ())
    record = results.record(tables, command, options.device, packages)
    if before is not None and not options.quick:
        for line in results.slower(record, before) or ["nothing got slower"]:
            print(f"since {before['date'][:10]}: {line}")
    print(f"({time.perf_counter() - began:.0f} s)\n", flush=True)
    return tables, record, True


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.list:
        for name in SUITES | ELSEWHERE:
            print(f"{name}: {about(name)}")
        return 0
    if args.readme:
        print(results.markdown(results.read(args.against)))
        return 0
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    options = Options(1, min(args.steps, 10), args.device, True) if args.quick else Options(
        args.rounds, args.steps, args.device)
    earlier = results.read(args.against) if args.against.exists() else {}
    place = results.machine(args.device)
    print(f"{', '.join(f'{key} {value}' for key, value in results.versions().items())}; {place['cpu']}, "
          f"{place['cores']} cores, {place['threads']} thread{'s' * (args.threads > 1)}, {place['device']}; medians of "
          f"{options.rounds} rounds\n")
    drawn, records, is_complete = [], {}, True
    for name in args.suites or SUITES:
        tables, record, was_there = measure(name, options, results.command(arguments), earlier.get(name))
        drawn += tables
        is_complete &= was_there
        if record is not None:
            records[name] = record
            for path in [*([args.json] if args.json else []), *([results.KEPT] if args.keep else [])]:
                results.write(path, records)  # after each suite: what was measured is not lost with the next one
    if args.plot:
        draw(drawn, args.plot)
    return 0 if is_complete else 1


def about(name):
    """What a suite measures, or why it cannot."""
    try:
        return load(name)[1]
    except ImportError as error:
        return f"NOT THERE: {error}"


if __name__ == "__main__":
    sys.exit(main())
