"""A program, so that memory and descriptors are its own: `soak.py "steps(30000, True)"` prints what it counted."""

import gc
import json
import os
import resource
import sys
import tempfile
import threading
import weakref
from multiprocessing import active_children
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from minifast import ActivationStats, Callback, CancelFit, Learner, OneCycle
from minifast.core import loop
from minifast.training import fitting

PER_EPOCH = 1000


def resident():
    """Bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mlp():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def samples(n):
    return [(torch.randn(8, 16), torch.randint(2, (8,))) for _ in range(n)]


def learner(data, **options):
    return Learner(mlp(), (data, None), nn.CrossEntropyLoss(), verbose=False, **options)


class Memory(Callback):
    """Notes the memory of the process after steps."""

    def __init__(self, *steps):
        self.steps, self.seen = steps, []

    def after_batch(self, state):
        if state.step in self.steps:
            self.seen.append(resident())


def steps(n, recorder, first=5000):
    """MB that a fit grows by in `n` steps, from its step `first` on."""
    memory, n_steps = Memory(first, first + n), first + n
    learn = learner(samples(PER_EPOCH))
    if recorder:
        learn.fit_one_cycle(n_steps // PER_EPOCH, 1e-3, callbacks=[memory])
        assert len(learn.recorder.losses) == n_steps
    else:
        state = fitting.new_state(learn, lrs=(1e-3,), n_epochs=n_steps // PER_EPOCH, steps_per_epoch=PER_EPOCH,
                                  n_steps=n_steps, n_batches=PER_EPOCH, callbacks=[OneCycle(), memory])
        loop.run(state)
        assert state.step == n_steps
    before, after = memory.seen
    return {"growth": (after - before) / 1e6}


def learners(n):
    """`n` learners, each made, trained and dropped: how many live on, MB that the process grows by after the first."""
    made, before = [], 0
    for i in range(n):
        if i == n // 10:
            before = resident()
        learn = learner(samples(4))
        learn.fit_one_cycle(1, 1e-3)
        made.append(weakref.ref(learn))
    del learn
    after = resident()
    return {"alive": sum(ref() is not None for ref in made), "growth": (after - before) / 1e6}


class Sometimes(Dataset):
    """64 samples; while `fails`, one of them is missing."""

    fails = False

    def __len__(self):
        return 64

    def __getitem__(self, i):
        if self.fails and i == 37:
            raise ZeroDivisionError
        return torch.randn(16), i % 2


class Fails(Callback):
    """Raises `error` in the third batch, if there is one; notes the worker processes."""

    def __init__(self):
        self.error, self.pids = None, set()

    def after_pred(self, state):
        self.pids |= {child.pid for child in active_children()}
        if self.error is not None and state.batch_index == 2:
            raise self.error


def held(model):
    """What a process can run out of, without what Python has yet to collect.

    (An error that comes out of a worker is part of a cycle that torch makes as it raises it, with the queues' pipes.)
    """
    gc.collect()
    return {"children": len(active_children()), "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")), "python threads": threading.active_count(),
            "hooks": sum(len(hooks) for module in model.modules() for name, hooks in vars(module).items()
                         if name.endswith("_hooks"))}


def failures(n):
    """`n` fits with two workers that fail in four ways: what is held before and afterwards."""
    data, fails, how = Sometimes(), Fails(), {"loss": False}

    def loss(output, target):
        if how["loss"]:
            raise OverflowError
        return nn.functional.cross_entropy(output, target)

    loader = DataLoader(data, 4, num_workers=2, multiprocessing_context="fork")
    learn = Learner(mlp(), (loader, loader), loss, verbose=False, callbacks=[fails, ActivationStats()])
    learn.fit(0.1)  # starts what stays for good, e.g. torch's own listener for handing over descriptors
    before, ends = held(learn.model), set()
    for i in range(n):
        data.fails, how["loss"] = i % 4 == 0, i % 4 == 3
        fails.error = {1: KeyError, 2: CancelFit}.get(i % 4)
        try:
            learn.fit(0.1)
        except Exception as error:
            ends.add(type(error).__name__)
        else:
            ends.add("cancelled")
    own = tuple(f"torch_{pid}_" for pid in (os.getpid(), *fails.pids))
    return {"before": before, "after": held(learn.model), "workers": len(fails.pids), "ends": sorted(ends),
            "shm": [name for name in os.listdir("/dev/shm") if name.startswith(own)]}


def files(n):
    """`n` times save and load where 64 files may be open: how many are open before and afterwards."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    learn = learner(samples(4))
    learn.fit_one_cycle(1, 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        before = None
        for _ in range(n):
            learn.save(path)
            learn.load(path)
            before = before or len(os.listdir("/proc/self/fd"))
        return {"before": before, "after": len(os.listdir("/proc/self/fd")), "left": os.listdir(folder)}


torch.manual_seed(0)
torch.set_num_threads(1)
print(json.dumps(eval(sys.argv[1])))
