"""A fit with every common callback, beside the loop that does these same things as torch's documentation shows it.

Both record loss, learning rate, momentum and gradient norm of every step, clip the gradient, average the weights,
look at a validation set with the average after every epoch (loss and accuracy), write a line of a CSV file per epoch,
and at the same steps write all of it to a file from which training could go on: beside its place, flushed to the disk,
named in one move, the newest two kept. It is checked that weights, averages, CSV files and checkpoints are the same.
"""
import copy
import csv
import os
import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import Goal, Options, Table, interleave, seconds
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from workloads import CONVNET, MAX_LR, MLP, check_agree, in_double, set_hypers, without_direct_kernels

from minifast import EMA, Checkpoint, CSVLogger, GradientClip, OneCycle, accuracy

EPOCHS, DECAY, NORM, SAVES = 3, 0.99, 1.0, 3  # SAVES: checkpoints per epoch
REFERENCE = "by hand: the same things"
LEARNER, INDIRECT = "Learner, all callbacks", "Learner, all callbacks, opt.step()"
COLUMNS = ("epoch", "train_loss", "valid_loss", "accuracy", "time")


def save(path, content):
    """Write `content` so that there is always a whole file, which outlives a power cut, as a Checkpoint does."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # it holds the name
    os.close(folder)


def by_hand(task, model, train, valid, device, folder, every, plan=None):
    """plan: the learning rates and momentums of every step, None for OneCycleLR; gives the averaged model."""
    loss_func, opt = nn.CrossEntropyLoss(), task.optimizer(model)
    n_steps = EPOCHS * len(train)
    sched = None if plan else torch.optim.lr_scheduler.OneCycleLR(opt, MAX_LR, total_steps=n_steps)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    lrs, moms, losses, norms, rows, saved, step = [], [], [], [], [], [], 0
    folder.mkdir(parents=True)

    def checkpoint(epoch):
        path = folder / f"step-{step}.pt"
        save(path, {"model": model.state_dict(), "opt": opt.state_dict(), "ema": ema.state_dict(),
                    "sched": sched and sched.state_dict(), "epoch": epoch, "step": step, "lrs": lrs, "moms": moms,
                    "losses": torch.stack(losses), "norms": torch.stack(norms), "rows": rows,
                    "rng": (torch.get_rng_state(), np.random.get_state(), random.getstate())})
        if path not in saved:  # the last one is written again, with the last epoch's row
            saved.append(path)
        if len(saved) > 2:
            saved.pop(0).unlink()

    for epoch in range(EPOCHS):
        began = time.perf_counter()
        model.train()
        for x, y in train:
            if plan:
                set_hypers(opt, plan["lr"][step], plan["momentum"][step])
            group = opt.param_groups[0]
            lrs.append(group["lr"])
            moms.append(group["betas"][0] if "betas" in group else group["momentum"])
            loss = loss_func(model(x), y)
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), NORM))
            opt.step()
            opt.zero_grad()
            if sched:
                sched.step()
            ema.update_parameters(model)
            losses.append(loss.detach())
            step += 1
            if step % every == 0:
                checkpoint(epoch)
        ema.eval()
        total, right, count = 0.0, 0.0, 0
        with torch.no_grad():
            for x, y in valid:
                pred = ema(x)
                total = total + loss_func(pred, y) * len(y)
                right = right + (pred.argmax(1) == y).sum()
                count += len(y)
        mean = torch.stack(losses[-len(train):]).mean()
        rows.append(dict(zip(COLUMNS, (epoch, float(mean), float(total / count), float(right / count),
                                       time.perf_counter() - began), strict=True)))
        with open(folder / "epochs.csv", "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if epoch == 0:
                writer.writeheader()
            writer.writerow(rows[-1])
    checkpoint(EPOCHS)
    return ema.module


def with_learner(task, model, train, valid, device, folder, every, **options):
    """Gives the averaged model."""
    learn = task.learner(model, train, device, dls=(train, valid), metrics=[accuracy], verbose=False, **options)
    ema = EMA(decay=DECAY)
    learn.fit_one_cycle(EPOCHS, MAX_LR, callbacks=[
        ema, GradientClip(norm=NORM), CSVLogger(folder / "epochs.csv"),
        Checkpoint(folder / "run", every_steps=every, every_seconds=None)])
    average = copy.deepcopy(model)
    ema.copy_to(average)
    return average


def data(task, n, device):
    return task.batches(n, device), task.batches(max(1, n // 10), device)


def check(task, n, device):
    """Raise AssertionError unless both end with the same weights and averages, and have written the same."""
    train, valid = data(task, n, device)
    (mine, theirs), train = in_double(task, train, device, 2)
    valid = [(x.double(), y) for x, y in valid]
    every = max(1, n // SAVES)
    with tempfile.TemporaryDirectory() as folder:
        own, other = Path(folder, "mine"), Path(folder, "theirs")
        average = with_learner(task, mine, train, valid, device, own, every, wd_norm_bias=True)
        plan = OneCycle(MAX_LR).values(EPOCHS * n)
        reference = by_hand(task, theirs, train, valid, device, other, every, plan)
        check_agree(mine, theirs, "weights", rtol=1e-6, atol=1e-8)
        check_agree(average, reference, "averages", rtol=1e-6, atol=1e-8)
        written = [list(csv.DictReader((path / "epochs.csv").read_text(encoding="utf-8").splitlines()))
                   for path in (own, other)]
        for rows in zip(*written, strict=True):
            values = [[float(row[name]) for name in COLUMNS[:-1]] for row in rows]
            torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-5, atol=1e-6)
        steps = [sorted(int(path.stem.removeprefix("step-")) for path in files)
                 for files in ((own / "run").glob("fit-1/step-*.ckpt"), other.glob("step-*.pt"))]
        if steps[0] != steps[1]:
            raise AssertionError(f"the Learner has kept checkpoints of steps {steps[0]}, the loop of {steps[1]}")


def measure(task, options: Options) -> Table:
    """Microseconds per step, all else included."""
    n = max(SAVES, task.steps(options.steps) // EPOCHS)
    check(task, min(n, 40), options.device)
    (train, valid), start = data(task, n, options.device), task.make_model().to(options.device)
    every = max(1, n // SAVES)

    def run(row):
        model = copy.deepcopy(start)
        with tempfile.TemporaryDirectory() as folder:
            took = seconds(lambda: row(task, model, train, valid, options.device, Path(folder, "run"), every),
                           options.device)
        return 1e6 * took / (EPOCHS * n)

    rows = {REFERENCE: by_hand, LEARNER: with_learner, INDIRECT: partial(without_direct_kernels, with_learner)}
    found = interleave({name: partial(run, row) for name, row in rows.items()}, options)
    title = f"all at once: {task.title}; {EPOCHS} epochs of {n} steps, {SAVES} checkpoints in each"
    return Table(title, "us per step", found, REFERENCE, [Goal(LEARNER, 1.05)])


def suite(options: Options) -> Iterator[Table]:
    yield measure(MLP, options)
    yield measure(CONVNET, options)
