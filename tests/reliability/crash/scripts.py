"""What is killed: training scripts as a user writes them, and what they have to show at their end."""
import hashlib
import random

import numpy as np
import torch
from helpers import bits, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset

from minifast import EMA, Checkpoint, DataLoaders, Learner, SaveBest, TensorLoader

from . import disk

BATCH_SIZE, N_VALID = 8, 24
N_TRAIN = {0: 44, 2: 116, "tensors": 44}  # 6 batches an epoch, 15 where workers have to start first; the last one of 4


def samples(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 1, 6, 6, generator=generator) + y[:, None, None, None] * 0.5, y


class Noisy(Dataset):
    """Images, changed by the random numbers of torch, of numpy and of Python."""

    def __init__(self, n):
        self.x, self.y = samples(n, seed=1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return noisy(self.x[index]), self.y[index]


def noisy(x):
    x = (x + 0.1 * torch.randn(x.shape)) * float(np.random.uniform(0.8, 1.2))
    return x.flip(-1) if random.random() < 0.5 else x


def noisy_batch(batch):
    return noisy(batch[0]), batch[1]


def learner(kind):
    """A Learner, its EMA and its random numbers as at the beginning of a script. kind: "tensors" or workers, 0 or 2."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)),
                          nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    if kind == "tensors":
        train = TensorLoader(*samples(N_TRAIN[kind], seed=1), batch_size=BATCH_SIZE, shuffle=True,
                             transform=noisy_batch)
    else:
        train = DataLoader(Noisy(N_TRAIN[kind]), batch_size=BATCH_SIZE, shuffle=True, num_workers=kind)
    valid = TensorLoader(*samples(N_VALID, seed=2), batch_size=16)
    ema = EMA(decay=0.8)
    return Learner(model, DataLoaders(train, valid), nn.CrossEntropyLoss(), opt_func=torch.optim.AdamW, splitter=list,
                   callbacks=[ema], device="cpu", verbose=False), ema


class Script:
    """A training script. `run(folder)` gives its learner and the callbacks that keep something, when it has ended.

    folder: of its checkpoints; None: it keeps none.
    """

    def __init__(self, name, train, kind=0, every_steps=2):
        self.name, self.train, self.kind, self.every_steps = name, train, kind, every_steps

    def run(self, folder):
        learn, ema = learner(self.kind)
        best = SaveBest("valid_loss")
        saver = [] if folder is None else [Checkpoint(folder, self.every_steps, every_seconds=None, keep=2)]
        self.train(learn, {"callbacks": [*saver, best], "resume": "auto" if saver else False})
        return learn, {"EMA": ema, "SaveBest": best}


def one_cycle(learn, options):
    learn.fit_one_cycle(3, 0.01, **options)


def restarts(learn, options):
    learn.fit(0.3, 3, cycle_len=1, **options)  # so much that the last epoch is not the best one


def two_epochs(learn, options):
    learn.fit_one_cycle(2, 0.01, **options)


def found_first(learn, options):
    learn.lr_find(num_it=12)
    learn.fit_one_cycle(3, 0.01, **options)


def two_fits(learn, options):
    learn.freeze()
    learn.fit_one_cycle(1, 0.01, **options)
    learn.unfreeze()
    learn.fit_one_cycle(2, slice(1e-3, 1e-2), **options)


def fine_tune(learn, options):
    learn.fine_tune(2, 0.01, **options)


SCRIPTS = {script.name: script for script in (
    Script("DataLoader", one_cycle), Script("DataLoader, 2 workers", two_epochs, 2),
    Script("DataLoader, short", two_epochs, every_steps=3), Script("TensorLoader", restarts, "tensors"),
    Script("lr_find first", found_first),
    Script("freeze, fit, unfreeze, fit", two_fits), Script("fine_tune", fine_tune, "tensors"))}


def digest(learn, callbacks, folder=None):
    """The bits of all that a fit leaves, but for times: a dict, so that a failure names what differs."""
    records = {}
    for i, record in enumerate([*learn.recorder.fits, learn.recorder.newest]):
        rows = [{key: value for key, value in row.items() if key != "time"} for row in record.epochs]
        records[f"record {i}"] = bits([record.lr_groups, record.moms, record.losses, record.smooth_losses, rows,
                                       record.epoch_ends, {name: record.column(name) for name in record.columns}])
    python, numpy = random.getstate(), np.random.get_state()
    parts = trained(learn) | records | {
        "trained parameters": [name for name, p in learn.model.named_parameters() if p.requires_grad],
        "random numbers of Python": bits(python), "random numbers of numpy": bits(list(numpy)),
        "random numbers of torch": bits(torch.get_rng_state()),
        **{f"state of {name}": bits(cb.state_dict()) for name, cb in callbacks.items()}}
    if folder is not None:
        parts["files"] = disk.names(folder)
        for path in disk.finals(folder):
            if path.name == "best.ckpt":
                tree = disk.load(path)
                parts[f"{path.parent.name}, best"] = bits([tree["model"], tree["best"], tree["position"]["step"]])
    return {name: hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest() for name, value in parts.items()}


def differences(digest, reference):
    """The names of what differs."""
    return sorted(name for name in digest.keys() | reference.keys() if digest.get(name) != reference.get(name))
