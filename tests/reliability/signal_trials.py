"""A program: children forked from a warm process get a signal at a uniform instant, and say what state they are in.

    signal_trials.py SIGINT|SIGTERM TRIALS SEED [BURST]

BURST: signals in a row, 1 without it. Prints one line of JSON: how often each phase was hit, the exit statuses, and all
that was wrong. The legal states are those that an uninterrupted run has between two batches.
"""

import collections
import hashlib
import json
import mmap
import os
import random
import signal
import sys
import time
from _signal import pthread_sigmask as block  # in C: a signal cannot come between the call and what it does

import numpy as np
import torch
from helpers import Trace, batches, everything
from torch import nn

from minifast import Callback, Learner, TensorLoader

PHASES = ("outside", "lr_find", "training", "validation")
CODES = {"SIGINT": 130, "SIGTERM": 143}
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
HANG = 60  # seconds after which a child is ended by its alarm
phase = mmap.mmap(-1, 1)  # shared: where the child is


class Phase(Callback):
    """Writes where the fit is, and the digest of each state between two batches if there is a list for them."""

    order, in_lr_find = 10_000, True

    def __init__(self, name, legal=None):
        self.name, self.legal, self.learn = name, legal, None

    def _enter(self, name):
        phase[0] = PHASES.index(name)
        if self.legal is not None:
            self.legal.append(digest(self.learn))

    def before_fit(self, state): self._enter(self.name)
    def before_epoch(self, state): self._enter(self.name)
    def after_batch(self, state): self._enter(self.name)
    def before_validate(self, state): self._enter("validation")
    def after_valid_batch(self, state): self._enter("validation")
    def after_validate(self, state): self._enter(self.name)
    def after_epoch(self, state): self._enter(self.name)
    def after_fit(self, state): self._enter("outside")


def make():
    """A learner with batch norm, dropout and momentum; its data is shuffled by the global generator."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
    x, y = batches(1, 160)[0]
    train, valid = TensorLoader(x, y, batch_size=8, shuffle=True), TensorLoader(x, y, batch_size=4)
    return Learner(model, (train, valid), nn.MSELoss(), device="cpu", verbose=False)


def work(learn, done, legal=None):
    """The finder and a fit with validation, 220 batches; `legal` receives the states between them, `done` what is over.
    """
    phases = [Phase("lr_find"), Phase("training", legal)]
    phases[1].learn = learn
    learn.lr_find(1e-6, 1e-2, 40, callbacks=[phases[0]])
    done.append("lr_find")
    learn.fit_one_cycle(3, 1e-2, callbacks=[phases[1]])
    if legal is not None:
        legal.append(digest(learn))


def digest(learn):
    """SHA-256 over parameters, buffers, optimizer state, the newest record and the global generators."""
    sha = hashlib.sha256()
    for name, tensor in learn.model.state_dict().items():
        sha.update(name.encode() + tensor.numpy().tobytes())
    for i, p in enumerate(learn.model.parameters()):
        for name, value in learn.opt.state[p].items() if p in learn.opt.state else ():
            sha.update(f"{i} {name}".encode() + value.numpy().tobytes())
    record = learn.recorder.newest
    sha.update(record.losses.tobytes() + record.lrs.tobytes())
    sha.update(torch.get_rng_state().numpy().tobytes() + repr(random.getstate()).encode())
    sha.update(repr(np.random.get_state()).encode())
    return sha.hexdigest()


def trial(legal, is_burst):
    """What is wrong with the learner after a signal, and the exit status that a program would end with."""
    problems, status, learn, done = [], 0, make(), []
    before = everything(learn)
    try:
        try:
            print("go", flush=True)
            work(learn, done)
        finally:
            block(signal.SIG_BLOCK, DEFAULTS)  # one that comes during the checks is not the matter
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        status = error.code
    left = {number: signal.getsignal(number) for number in DEFAULTS}
    if left != DEFAULTS:
        problems.append(f"the handlers are {left}")
    if not done:
        after = everything(learn)
        problems += [f"lr_find has left: {name}" for name in before | after if before.get(name) != after.get(name)]
    if not is_burst and digest(learn) not in legal:
        problems.append("the run has no such state")
    if not all(module.training for module in learn.model.modules()):
        problems.append("modules are in eval mode")
    if any(p.grad is not None for p in learn.model.parameters()):
        problems.append("gradients are left")
    log = []
    try:
        learn.fit(1e-3, 1, callbacks=[Trace(log)])
    except BaseException as error:
        problems.append(f"the next fit failed: {error!r}")
    if log.count("after_step") != 20:
        problems.append(f"the next fit made {log.count('after_step')} steps")
    return problems, status


def child(write, legal, is_burst):
    """In the fork: one trial; what is wrong is written, and the exit status is the one of a program."""
    signal.alarm(HANG)
    os.dup2(write, 1)
    try:
        problems, status = trial(legal, is_burst)
    except BaseException as error:
        problems, status = [f"after the run: {error!r}"], 1
    os.write(1, "".join(f"{problem}\n" for problem in problems).encode())
    os._exit(status)


def send(legal, number, delays):
    """One forked child that gets the signal after each of `delays` in a row: (phase, exit status, problems)."""
    phase[0] = 0
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(write, legal, len(delays) > 1)
    os.close(write)
    with os.fdopen(read) as lines:
        lines.readline()
        for delay in delays:
            time.sleep(delay)
            os.kill(pid, number)
        at = phase[0]
        problems = lines.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return PHASES[at], status, problems


def main(name, trials, seed, burst=1):
    """Print what came out of `trials` children."""
    number = signal.Signals[name]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    legal = [[], [], []]
    for i in range(3):
        begin = time.perf_counter()
        work(make(), [], legal[i] if i < 2 else None)
        seconds = time.perf_counter() - begin
    draw, hit, statuses, wrong = random.Random(seed), collections.Counter(), collections.Counter(), []
    if legal[0] != legal[1]:
        wrong.append("the uninterrupted run does not repeat itself")
    for i in range(trials):
        delays = [draw.uniform(0, seconds), *(draw.uniform(0, 0.003) for _ in range(burst - 1))]
        at, status, problems = send(legal[0], number, delays)
        hit[at] += 1
        statuses[status] += 1
        # what comes before, between or after the two is as anywhere else: SIGTERM ends the process
        if status != CODES[name] and not (at == "outside" and status in (0, -signal.SIGTERM)):
            problems.append(f"exit status {status}")
        wrong += [f"trial {i}, {at}: {problem}" for problem in problems]
    print(json.dumps({"phases": hit, "statuses": statuses, "states": len(set(legal[0])), "wrong": wrong,
                      "seconds": round(seconds, 3)}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
