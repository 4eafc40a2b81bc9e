"""A CIFAR-10 speed run, written with the Learner and as a plain script: seconds per epoch and accuracy of both.

Both train the same net from the same weights on the same batches, with the same random crops, flips and squares and
the same schedule, and take turns epoch by epoch in one process, so that a machine that slows down slows both. Before
that it is checked that they make the same updates. The two are `speedrun/ours.py` and `speedrun/plain.py`; the recipe
and its sources are in `speedrun/recipe.py`. The images are those of `cifar10_jpeg.npz`: CIFAR-10 as JPEGs, on which
accuracies are a little below those on the original pixels. Usage: `make bench-cifar`, or
`python tests/benchmarks/cifar10.py --help`.
"""
import argparse
import copy
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from speedrun import ours, plain
from speedrun.data import SIDE, Normalize, load
from speedrun.model import make_model
from speedrun.recipe import SIZES

from minifast import Callback
from minifast.core.callback import Order
from minifast.show.tables import table

FILE = "cifar10_jpeg.npz"
DEFAULT_DATA = Path(os.environ.get("MINIFAST_DATA", "."))
MOST_DIFFERENT = 1e-3  # how far apart the two may be after the check, as a share of how far the weights have moved
LEARNER, PLAIN = "Learner", "plain script"


class Turns(Callback):
    """After each epoch of the Learner one of the plain script, and the time that each has taken."""

    order = Order.RECORD  # last: what the other callbacks do at the end of an epoch belongs to it

    def __init__(self, script, device):
        self.script, self.device, self.seconds = script, device, {LEARNER: [], PLAIN: []}

    def before_fit(self, state):
        self.began = now(self.device)

    def after_epoch(self, state):
        middle = now(self.device)
        next(self.script)
        end = now(self.device)
        self.seconds[LEARNER].append(middle - self.began)
        self.seconds[PLAIN].append(end - middle)
        self.began = now(self.device)


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def start_model(data, recipe, device, seed):
    torch.manual_seed(seed)
    inner = slice(recipe.padding, recipe.padding + SIDE)
    images, _ = Normalize(device)((data.train_x[:2000, :, inner, inner], None))
    return make_model(recipe, images.cpu()).to(device)


def check_same_updates(data, recipe, device, seed, steps=8):
    """How far apart the two are after `steps` updates, as a share of how far the weights have moved.

    Raises SystemExit where that is more than rounding. In float32 with deterministic kernels, neither compiled nor
    captured.
    """
    recipe = dataclasses.replace(recipe, epochs=1, n_train=steps * recipe.batch_size)
    data = data.first(recipe.n_train)
    start = start_model(data, recipe, device, seed)
    mine, theirs = copy.deepcopy(start), copy.deepcopy(start)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        learn, _ = ours.make_learner(mine, data, recipe, device, seed)
        ours.train(learn, recipe)
        for _ in plain.epochs(theirs, data, recipe, device, seed):
            pass
    before, a, b = (flat(model) for model in (start, mine, theirs))
    apart = float((a - b).norm() / (b - before).norm())
    if not apart <= MOST_DIFFERENT:
        raise SystemExit(f"the two versions do not make the same updates: after {steps} of them their weights are "
                         f"{apart:.2g} of the way apart that they have moved, {MOST_DIFFERENT:g} is allowed.")
    return apart


def flat(model):
    """All parameters of `model` in one vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def race(data, recipe, device, seed, **options):
    """One training of both: {version: {"epochs": seconds, "whole": seconds, "accuracy": 0..1, "flips": 0..1}}.

    "whole": from the weights at the start to the accuracy with flips.
    """
    half = options["half"]
    start = start_model(data, recipe, device, seed)
    mine, theirs = copy.deepcopy(start), copy.deepcopy(start)
    turns = Turns(plain.epochs(theirs, data, recipe, device, seed, **options), device)
    began = now(device)
    learn, test_dl = ours.make_learner(mine, data, recipe, device, seed, **options)
    ours.train(learn, recipe, [turns])
    flips = ours.evaluate(learn, test_dl)
    middle = now(device)
    results = {PLAIN: plain.evaluate(theirs, data, recipe, device, half)}
    script = sum(turns.seconds[PLAIN])
    whole = {LEARNER: middle - began - script, PLAIN: script + now(device) - middle}
    results[LEARNER] = learn.validate(test_dl)["accuracy"], flips
    return {name: {"epochs": turns.seconds[name], "whole": whole[name], "accuracy": accuracy, "flips": flips}
            for name, (accuracy, flips) in results.items()}


def report(runs):
    """The table of all runs."""
    pairs = [(a, b) for run in runs for a, b in zip(run[LEARNER]["epochs"], run[PLAIN]["epochs"], strict=True)]
    ratios = {LEARNER: [a / b for a, b in pairs], PLAIN: [1.0]}
    rows = []
    for name, of_name in ratios.items():
        seconds = [second for run in runs for second in run[name]["epochs"]]
        spread = f"{min(of_name):.3f}-{max(of_name):.3f}" if len(of_name) > 1 else ""
        rows.append([name, f"{statistics.median(seconds):.3f}", f"{statistics.median(of_name):.3f}", spread,
                     f"{statistics.median(run[name]['whole'] for run in runs):.2f}",
                     *(shown(run[name][key] for run in runs) for key in ("accuracy", "flips"))])
    return table(["", "s an epoch", "ratio", "spread", "s in all", "accuracy %", "with flips %"], rows)


def shown(shares):
    """Percent, with the standard deviation where there are several."""
    percent = [100 * share for share in shares]
    deviation = f" ± {statistics.stdev(percent):.2f}" if percent[1:] else ""
    return f"{statistics.mean(percent):.2f}{deviation}"


def images_in(folder):
    """The path of the images; without them the program ends and says so."""
    path = folder / FILE
    if not path.is_file():
        sys.exit(f"{FILE} is not in {folder}: pass --data or set MINIFAST_DATA, the folder that holds it.")
    return path


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"the folder of {FILE} (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, else small")
    parser.add_argument("--epochs", type=int, help="another number of epochs")
    parser.add_argument("--runs", type=int, default=1, help="whole trainings, each with a seed of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on a GPU)")
    parser.add_argument("--compile", action="store_true", help="both through torch.compile")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    on_gpu = options.device.type == "cuda"
    if (options.epochs is not None and options.epochs < 1) or options.runs < 1:
        parser.error("--epochs and --runs must be at least 1.")
    options.size = options.size or ("full" if on_gpu else "small")
    options.half = on_gpu if options.half is None else options.half
    return options


def main(arguments=None):
    options = parse(arguments)
    path, device, recipe = images_in(options.data), options.device, SIZES[options.size]
    if options.epochs:
        recipe = dataclasses.replace(recipe, epochs=options.epochs)
    torch.backends.cudnn.benchmark = True
    began = time.perf_counter()
    data = load(path, recipe, device)
    decoded = time.perf_counter() - began
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    flags = [name for name in ("half", "compile") if getattr(options, name)]
    print(f"CIFAR-10 {options.size}: {recipe.n_train:,} images, {recipe.epochs} epochs of "
          f"{recipe.n_steps // recipe.epochs} updates, batch {recipe.batch_size}, widths {recipe.widths}; "
          f"{', '.join(flags) or 'float32'}; {options.runs} run(s); torch {torch.__version__}, {device}, {where}, "
          f"Python {platform.python_version()}; {decoded:.1f} s to decode")
    apart = check_same_updates(data, recipe, device, options.seed)
    print(f"after 8 updates the weights of the two are {apart:.1g} of the way apart that they have moved")
    how = {"half": options.half, "compile": options.compile}
    if options.compile or device.type == "cuda":  # who comes first would pay for both: compiling, choosing kernels
        short = dataclasses.replace(recipe, epochs=1, n_train=2 * recipe.batch_size)
        race(data.first(short.n_train), short, device, options.seed, **how)
    runs = [race(data, recipe, device, options.seed + i, **how) for i in range(options.runs)]
    print(report(runs))
    if options.json:
        about = {"size": options.size, "recipe": dataclasses.asdict(recipe), "flags": flags, "device": str(device),
                 "where": where, "torch": torch.__version__, "python": platform.python_version(), "apart": apart,
                 "seed": options.seed, "runs": runs}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
