"""What `graph=True` and `compile=True` save: microseconds per step of small models on a GPU.

Rows: a Learner as it is, with graph=True, and with compile=True; the same updates on the same batches, which lie on
the device; rounds of all rows are interleaved in one process, figures are medians, ratios are paired round by round.
Each Learner is warmed up by a fit, so that no compilation is counted; a capture belongs to its fit, and is counted.
First it is checked that losses agree. On a CPU there is nothing to measure.

Usage: `python tests/benchmarks/graph.py --help`.
"""
import argparse
import platform
import statistics
import time

import torch
from torch import nn

import minifast
from minifast import DataLoaders, Learner

MAX_LR = 0.01
ROWS = {"eager": {}, "graph=True": {"graph": True}, "compile=True": {"compile": True}}


def mlp():
    """An MLP 16-32-2, its batches (64, 16)."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)), (16,), 2


def convnet():
    """A small convnet of three blocks, its batches (64, 3, 32, 32)."""
    layers = []
    for n_in, n_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)), (3, 32, 32), 10


MODELS = {"MLP": mlp, "convnet": convnet}


def make_learner(make_model, steps, device, **options):
    """A Learner of a model whose weights are the same each time, on `steps` batches that lie on `device`."""
    torch.manual_seed(0)
    model, shape, n_classes = make_model()
    batches = [(torch.randn(64, *shape, device=device), torch.randint(0, n_classes, (64,), device=device))
               for _ in range(min(steps, 64))]
    epoch = [batches[i % len(batches)] for i in range(steps)]
    return Learner(model, DataLoaders(epoch), nn.CrossEntropyLoss(), device=device, verbose=False, **options)


def seconds_of_fit(learn, steps):
    """Seconds per step of one fit, until the device is done."""
    synchronize(learn.device)
    began = time.perf_counter()
    learn.fit_one_cycle(1, MAX_LR)
    synchronize(learn.device)
    return (time.perf_counter() - began) / steps


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(make_model, steps, rounds, device, rows):
    """Seconds per step of each of `rows`: {row: [one per round]}."""
    learners = {name: make_learner(make_model, steps, device, **ROWS[name]) for name in rows}
    for learn in learners.values():  # the first fit warms up
        learn.fit_one_cycle(1, MAX_LR)
    check_losses(learners)
    seconds = {name: [] for name in rows}
    for _ in range(rounds):
        for name, learn in learners.items():
            seconds[name].append(seconds_of_fit(learn, steps))
    return seconds


def check_losses(learners):
    """The first 20 losses of all learners agree; later, rounding has grown."""
    reference = next(iter(learners.values())).recorder.losses[:20]
    for name, learn in learners.items():
        for ours, theirs in zip(learn.recorder.losses[:20], reference, strict=True):
            if abs(ours - theirs) > 0.02 * abs(theirs):
                raise AssertionError(f"{name} is not the same training: a loss of {ours:.6f} for {theirs:.6f}")


def table(seconds):
    reference = seconds["eager"]
    rows = []
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, reference, strict=True)]
        rows.append([name, f"{statistics.median(times) * 1e6:.1f}", f"{statistics.median(ratios):.2f}",
                     f"{min(ratios):.2f}-{max(ratios):.2f}"])
    return minifast.tables.table(["", "us per step", "ratio", "spread"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="eager is always measured")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda":
        print(f"{device}: there is nothing to measure without a CUDA device, where launching is what a step waits for.")
        return
    rows = [name for name in ROWS if name == "eager" or name in args.rows]
    print(f"batch 64, AdamW, one-cycle; {args.steps} steps, medians of {args.rounds} rounds; torch "
          f"{torch.__version__}, {torch.cuda.get_device_name(device)}, Python {platform.python_version()}")
    for name, make_model in MODELS.items():
        print(f"\n{name}\n{table(measure(make_model, args.steps, args.rounds, device, rows))}")


if __name__ == "__main__":
    main()
