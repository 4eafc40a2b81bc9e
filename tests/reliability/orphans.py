"""A program: trainers forked from a warm process are killed while they start workers; prints which workers are left.

    orphans.py [alone] WHEN=TRIALS ...

WHEN the kill comes, counted from the start of the workers: "random" (uniform in 5..60 ms), or while a worker is held up
"early", before anything else in it, or "late", after minifast's share and before torch's watchdog begins. alone:
without minifast's share. Prints one line of JSON: of each WHEN the number of workers that live on after up to 8 s.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.utils.data._utils.worker
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import Callback, Learner
from minifast.machine import workers

HELD_UP = 1.0  # seconds
PATIENCE = 8.0  # seconds: torch's watchdog looks every 5


class Say(Callback):
    """Writes a byte when an epoch, and with it its workers, is about to start."""

    def __init__(self, pipe):
        self.pipe = pipe

    def before_epoch(self, state):
        os.write(self.pipe, b"x")


def learner(data, callbacks=()):
    return Learner(nn.Linear(3, 1), (data, None), nn.MSELoss(), verbose=False, callbacks=callbacks)


def train(pipe, when):
    """Train for a while; a byte in `pipe` says that it is time to kill."""

    def hold_up():
        os.write(pipe, b"x")
        time.sleep(HELD_UP)

    if when == "late":  # minifast hears of the fork first
        with workers.bound_to_this_process():
            pass
    if when != "random":
        os.register_at_fork(after_in_child=hold_up)
    data = TensorDataset(torch.randn(4000, 3), torch.randn(4000, 1))
    loader = DataLoader(data, 4, num_workers=2, multiprocessing_context="fork")
    learner(loader, [Say(pipe)] if when == "random" else []).fit(0.1, 100)


def trial(when, delay):
    """Fork a trainer and kill it; gives its pid, which is the session of all that it has started."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)  # what is left must not hold the caller's pipe open
            os.dup2(2, 1)
            train(writing, when)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it had ended by itself"
    os.close(reading)
    return pid


def alive(sessions):
    """The processes of these sessions that have not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) in sessions and fields[0] not in "ZX":
            yield int(path.parent.name)


def main(*arguments):
    torch.set_num_threads(1)
    listen, workers._listen = workers._listen, lambda: None  # the trainers begin as if they had never fitted
    learner([(torch.randn(4, 3), torch.randn(4, 1))]).fit(0.1)  # loads what a first fit imports
    if "alone" not in arguments:
        workers._listen = listen
    rng, sessions = random.Random(0), {}
    for when, trials in (argument.split("=") for argument in arguments if argument != "alone"):
        delays = [rng.uniform(0.005, 0.06) if when == "random" else 0 for _ in range(int(trials))]
        sessions[when] = {trial(when, delay) for delay in delays}
    every = set().union(*sessions.values())
    end = time.monotonic() + PATIENCE
    while any(alive(every)) and time.monotonic() < end:
        time.sleep(0.1)
    left = {when: list(alive(of_these)) for when, of_these in sessions.items()}
    print(json.dumps({when: len(pids) for when, pids in left.items()}))
    for pids in left.values():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


main(*sys.argv[1:])
