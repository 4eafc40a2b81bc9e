"""What checkpoints cost: the time to write one, as a share of the time between two; and what each step pays for it.

Usage: `make bench`, or `python tests/benchmarks/checkpoint.py --help`.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import minifast
from minifast import Callback, Checkpoint, DataLoaders, Learner


class Watch(Callback):
    """Seconds from the first batch to the last one: without what a fit does before and after."""

    order = 10**9

    def before_fit(self, state):
        self.times = []

    def after_batch(self, state):
        self.times.append(time.perf_counter())

    @property
    def seconds(self):
        return self.times[-1] - self.times[0]


def net(width, depth):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


def saves(width, depth, n, folder):
    """(parameters, bytes of a checkpoint, [seconds of each of `n` saves]) of an MLP with AdamW."""
    batches = [(torch.randn(2, width), torch.randn(2, width))] * n
    learn, took = Learner(net(width, depth), DataLoaders(batches), nn.MSELoss(), device="cpu", verbose=False), []
    saver = Checkpoint(folder, every_steps=1, every_seconds=None)
    write = saver._save
    saver._save = lambda *args, **options: took.append(timed(write, *args, **options))
    learn.fit(1e-4, 1, callbacks=[saver])
    return sum(p.numel() for p in learn.model.parameters()), newest(folder).stat().st_size, took


def timed(function, *args, **options):
    began = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - began


def newest(folder):
    return max(Path(folder).glob("fit-1/step-*.ckpt"))


def steps(n, rounds, folder):
    """Microseconds per step without and with a Checkpoint that is not due, one pair per round."""
    batches = [(torch.randn(64, 16), torch.randint(0, 2, (64,))) for _ in range(n)]
    pairs = []
    for i in range(rounds + 1):
        pair = []
        for callbacks in ([], [Checkpoint(f"{folder}/{i}", every_seconds=3600)]):
            model, watch = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)), Watch()
            learn = Learner(model, DataLoaders(batches), nn.CrossEntropyLoss(), device="cpu", verbose=False)
            learn.fit_one_cycle(1, 0.01, callbacks=[*callbacks, watch])
            pair.append(watch.seconds / (n - 1) * 1e6)
        pairs.append(pair)
    return pairs[1:]  # the first round warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--saves", type=int, default=7)
    args, _ = parser.parse_known_args()  # those of the other benchmark
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, width, depth in (("small", 32, 2), ("2 M", 1000, 2), ("25 M", 2500, 4)):
            n, size, took = saves(width, depth, args.saves, f"{folder}/{name}")
            seconds = statistics.median(took)
            wait = max(60, 100 * seconds)
            rows.append([name, n, f"{size / 1e6:.1f}", f"{seconds * 1e3:.1f}", f"{max(took) * 1e3:.1f}", f"{wait:.0f}",
                         f"{100 * seconds / wait:.2f} %"])  # fmt: skip
        print("Writing a checkpoint: model, AdamW, Recorder, random generators; on the disk before the fit goes on")
        header = ["model", "parameters", "MB", "ms, median", "ms, longest", "s between two", "share of the time"]
        print(minifast.tables.table(header, rows))
        pairs = steps(2000, args.rounds, folder)
    plain, watched = (statistics.median(column) for column in zip(*pairs, strict=True))
    over = [b - a for a, b in pairs]
    print(f"A step of a small MLP: {plain:.1f} us without, {watched:.1f} us with a Checkpoint that is not due; paired "
          f"difference {statistics.median(over):+.1f} us ({min(over):+.1f} to {max(over):+.1f} in {len(over)} rounds)")


if __name__ == "__main__":
    main()
