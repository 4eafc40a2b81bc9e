"""What `graph=True` and `compile=True` save: microseconds per step of small models on a GPU.

Rows: a Learner as it is, with graph=True, and with compile=True; the same updates on the same batches, which lie on
the device. Each Learner is warmed up by a fit, so that no compilation is counted; a capture belongs to its fit, and is
counted. First it is checked that losses agree. On a CPU there is nothing to measure.
"""
from collections.abc import Iterator

import torch
from harness import Options, Table, interleave, seconds
from torch import nn

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


def check_losses(learners):
    """The first 20 losses of all learners agree; later, rounding has grown."""
    reference = next(iter(learners.values())).recorder.losses[:20]
    for name, learn in learners.items():
        for ours, theirs in zip(learn.recorder.losses[:20], reference, strict=True):
            if abs(ours - theirs) > 0.02 * abs(theirs):
                raise AssertionError(f"{name} is not the same training: a loss of {ours:.6f} for {theirs:.6f}")


def suite(options: Options) -> Iterator[Table]:
    device, steps = options.device, options.steps
    for name, make_model in MODELS.items():
        title = f"{name}, batch 64, AdamW, one-cycle, batches on the device"
        if device.type != "cuda":
            yield Table(title, "us per step", [], notes=[
                f"{device}: nothing to measure without a CUDA device, where launching is what a step waits for"])
            continue
        learners = {row: make_learner(make_model, steps, device, **kind) for row, kind in ROWS.items()}
        for learn in learners.values():  # the first fit warms up
            learn.fit_one_cycle(1, MAX_LR)
        check_losses(learners)
        rows = {row: lambda learn=learn: 1e6 * seconds(lambda: learn.fit_one_cycle(1, MAX_LR), device) / steps
                for row, learn in learners.items()}
        yield Table(title, "us per step", interleave(rows, options), "eager")
