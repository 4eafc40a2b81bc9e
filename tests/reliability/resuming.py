"""What the tests of resuming share: a run that can be killed, and everything that it leaves, as bits."""
import random

import numpy as np
import torch
from helpers import bits, rngs, spying, trained
from torch import nn
from torch.utils.data import Dataset

from minifast import Callback, Checkpoint, DataLoaders, Learner, Order, TensorLoader, accuracy

PER_EPOCH = 6  # batches of `data`


class Killed(Exception):
    """Stands for kill -9: nothing that the fit does afterwards reaches a checkpoint."""


class Kill(Callback):
    """Raises `Killed` in `event`, the n-th time (from 1) that it happens."""

    order = Order.RECORD  # before Checkpoint

    def __init__(self, event, n):
        self.event, self.n = event, n


def _hear(event):
    def hear(self, state):
        if event == self.event:
            self.n -= 1
            if self.n == 0:
                raise Killed

    return hear


for _event in ("before_fit", "before_epoch", "before_batch", "after_pred", "after_loss", "after_backward",
               "before_step", "after_step", "after_batch", "before_validate", "before_valid_batch",
               "after_valid_batch", "after_validate", "after_epoch", "after_fit"):  # fmt: skip
    setattr(Kill, _event, _hear(_event))


def noise(batch):
    """A random transform: torch's, numpy's and Python's numbers."""
    x, y = batch
    return x + 0.1 * torch.randn_like(x) + float(np.random.rand()) * 0.1 + random.random() * 0.1, y


def tensors(n, seed=0):
    """`n` images (1, 6, 6) with 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def data(**options):
    """6 shuffled, augmented batches of 4, and 2 of validation."""
    return DataLoaders(TensorLoader(*tensors(24), **{"batch_size": 4, "shuffle": True, "transform": noise} | options),
                       TensorLoader(*tensors(8, 1), batch_size=4))  # fmt: skip


class Images(Dataset):
    """`n` images with random augmentation of every kind."""

    def __init__(self, n=24, is_random=True):
        self.x, self.y = tensors(n)
        self.is_random = is_random

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        x, y = self.x[i], self.y[i]
        return noise((x, y)) if self.is_random else (x, y)


def model():
    """Batch norm, dropout, and a buffer that is not in the state dict and counts the batches."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                        nn.Dropout(0.2), nn.Linear(16, 3))  # fmt: skip
    net.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
    net.register_forward_hook(lambda module, args, out: module.seen.add_(1 if module.training else 0) and None)
    return net


def learner(dls=None, callbacks=(), **options):
    """The same learner each time: as a script that is run again would make it."""
    torch.manual_seed(0)
    net = options.pop("model", None) or model()
    return Learner(net, data() if dls is None else dls, nn.CrossEntropyLoss(),
                   **{"metrics": [accuracy], "lr": 0.01, "splitter": {"body": ["0.*", "1.*"], "head": "6.*"},
                      "opt_func": spying(torch.optim.AdamW), "callbacks": callbacks, "device": "cpu",
                      "verbose": False, "seed": 1} | options)  # fmt: skip


def rows(recorder):
    """All that is recorded, but for the times."""
    return bits([[record.lr_groups, record.moms, record.losses, record.smooth_losses, record.epoch_ends,
                  {name: record.column(name) for name in record.columns},
                  [{key: value for key, value in row.items() if key != "time"} for row in record.epochs]]
                 for record in (*recorder.fits, recorder.newest)])  # fmt: skip


def outcome(learn):
    """The bits of all that a fit leaves."""
    return trained(learn) | rngs() | {
        "recorder": rows(learn.recorder), "trains": [p.requires_grad for p in learn.model.parameters()],
        "modes": [module.training for module in learn.model.modules()],
        "grads": [p.grad is None for p in learn.model.parameters()]}  # fmt: skip


def seen(learn):
    """What the optimizer saw at each step: hyper-parameters, gradients and weights."""
    return bits([{key: value for key, value in note.items() if key != "params"} for note in learn.opt.seen])


def every_step(path, **options):
    """A Checkpoint after every update that keeps all."""
    return Checkpoint(path, **{"every_steps": 1, "every_seconds": None, "keep": 1000} | options)


def kill(fit, learn, path, event, n, **options):
    """Run `fit(learn, callbacks, resume)` until it is killed in `event`; gives the learner."""
    try:
        fit(learn, [every_step(path, **options), Kill(event, n)], "auto")
    except Killed:
        return learn
    raise AssertionError(f"{event} did not happen {n} times")


def same(learn, reference):
    """Assert that two learners have come to the same end, the newer optimizer having seen the end of the other's."""
    assert outcome(learn) == outcome_of(reference)
    news, olds = seen(learn), reference["seen"]
    assert news == olds[len(olds) - len(news):]
    return len(news)


def outcome_of(reference):
    return reference["outcome"]


def uninterrupted(fit, learn):
    """What a run that nobody kills leaves, without any Checkpoint."""
    fit(learn, [], False)
    return {"outcome": outcome(learn), "seen": seen(learn)}
