"""What checkpoints cost: the time to write one, and what each step pays for one that is not due."""
import contextlib
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from harness import Options, Row, Table, interleave
from torch import nn
from workloads import MLP, Screen

from minifast import Callback, Checkpoint, Learner

WITHOUT, WITH = "without a Checkpoint", "with one that is not due"


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
    """(parameters, bytes of a checkpoint, [ms of each of `n` saves]) of an MLP with AdamW."""
    batches = [(torch.randn(2, width), torch.randn(2, width))] * n
    learn, took = Learner(net(width, depth), (batches, None), nn.MSELoss(), device="cpu", verbose=False), []
    saver = Checkpoint(folder, every_steps=1, every_seconds=None)
    write = saver._save

    def timed(*args, **options):
        began = time.perf_counter()
        write(*args, **options)
        took.append(1e3 * (time.perf_counter() - began))

    saver._save = timed
    learn.fit(1e-4, 1, callbacks=[saver])
    newest = max(Path(folder).glob("fit-1/step-*.ckpt"))
    return sum(p.numel() for p in learn.model.parameters()), newest.stat().st_size, took


def writing(options: Options) -> Table:
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, width, depth in (("small", 32, 2), ("medium", 1000, 2), ("large", 2500, 4)):
            n, size, took = saves(width, depth, 1 if options.quick else 7, f"{folder}/{name}")
            rows.append(Row(f"{name}: {n:,} parameters, {size / 1e6:.1f} MB", took))
            median = statistics.median(took) / 1e3
            wait = max(60, 100 * median)  # what `every_seconds="auto"` waits
            notes.append(f"{name}: every {wait:.0f} s, {100 * median / wait:.2f} % of the time")
    return Table("writing a checkpoint: model, AdamW, Recorder, random generators; on the disk before the fit goes on",
                 "ms", rows, notes=notes)


def waiting(options: Options) -> Table:
    batches, start = MLP.batches(2 * options.steps, options.device), MLP.make_model().to(options.device)

    def run(has_one):
        watch, model = Watch(), copy.deepcopy(start)
        learn = MLP.learner(model, batches, options.device)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(Screen()):
            callbacks = [Checkpoint(folder, every_seconds=3600)] if has_one else []
            learn.fit_one_cycle(1, 0.01, callbacks=[*callbacks, watch])
        return 1e6 * watch.seconds / (len(batches) - 1)

    found = interleave({WITHOUT: partial(run, False), WITH: partial(run, True)}, options)
    return Table(f"a step of an {MLP.title}", "us per step", found, WITHOUT)


def suite(options: Options) -> Iterator[Table]:
    yield writing(options)
    yield waiting(options)
