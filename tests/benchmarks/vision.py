"""Pictures: CIFAR-10 with a Learner and by a loop by hand, and what fine-tuning is worth with 500 pictures.

First the same small ResNet is trained twice from the same weights, on the same batches with the same augmentation and
schedule: by a `vision_learner`, and by a loop by hand. They take turns epoch by epoch in one process; before that it is
checked that they make the same updates.

Then a network is trained on five of the ten classes, and with 500 pictures of the other five it is either fine-tuned
(the head first, then all, early layers at lower rates), or trained with one learning rate for all layers, or one is
trained from scratch: each for as many epochs, with each of six peak learning rates, once for each seed.

The pictures are those of `cifar10_jpeg.npz`: CIFAR-10 as JPEGs, on which accuracies are a little below those on the
original pixels. Usage: `make bench-vision`, or `python tests/benchmarks/vision.py --help`.
"""
import argparse
import copy
import json
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from cifar10 import DEFAULT_DATA, FILE, MOST_DIFFERENT, flat, images_in, now
from results import machine, versions
from small_resnet import SIZES, small_resnet
from speedrun.data import load
from torch.nn import functional as F
from transfer import METHODS, RATES, shown_transfer, transfer

from minifast import Callback, ChannelsLast, OneCycle
from minifast.base import snapshot
from minifast.core.callback import Order
from minifast.show.tables import table
from minifast.vision import from_arrays, vision_learner

LEARNER, BY_HAND = "vision_learner", "loop by hand"
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


# ---- the same training twice


class Turns(Callback):
    """After each epoch of the Learner one of the loop by hand: accuracies 0..1 and seconds of both.

    Each draws its random numbers as if it were alone.
    """

    order = Order.RECORD  # last: what the other callbacks do at the end of an epoch belongs to it

    def __init__(self, script, device):
        self.script, self.device, self.put_back = script, device, snapshot.rng()
        self.seconds, self.accuracies = {LEARNER: [], BY_HAND: []}, {LEARNER: [], BY_HAND: []}

    def before_fit(self, state):
        self.began = now(self.device)

    def after_epoch(self, state):
        middle = now(self.device)
        put_back = snapshot.rng()
        self.put_back()
        self.accuracies[BY_HAND].append(next(self.script))
        self.put_back = snapshot.rng()
        put_back()
        self.accuracies[LEARNER].append(state.metrics["accuracy"])
        end = now(self.device)
        self.seconds[LEARNER].append(middle - self.began)
        self.seconds[BY_HAND].append(end - middle)
        self.began = now(self.device)


def by_hand(model, dls, data, size, device):
    """A generator that trains `model` and gives the accuracy on the test pictures, 0..1, after each epoch."""
    model.to(device, memory_format=torch.channels_last)
    opt = torch.optim.SGD(model.parameters(), lr=size.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    transform, generator, step = dls.train.batch_transform, torch.Generator(), 0
    x, y, test_x, test_y = (tensor.to(device) for tensor in (data.train_x, data.train_y, data.test_x, data.test_y))
    starts = range(0, len(x), size.batch_size)
    plan = OneCycle(size.lr).values(size.epochs * len(starts))
    for _ in range(size.epochs):
        model.train()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))  # as torch's RandomSampler does it
        order = torch.randperm(len(x), generator=generator).to(device)
        for start in starts:
            rows = order[start:start + size.batch_size]
            images, labels = transform((x[rows], y[rows]))
            for group in opt.param_groups:
                group["lr"], group["momentum"] = plan["lr"][step], plan["momentum"][step]
            F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            opt.step()
            opt.zero_grad()
            step += 1
        model.eval()
        right = 0
        with torch.no_grad():
            for images, labels in zip(test_x.split(size.batch_size), test_y.split(size.batch_size), strict=True):
                images, _ = transform.plain((images, labels))
                output = model(images.contiguous(memory_format=torch.channels_last))
                right = right + (output.argmax(1) == labels).sum()
        yield float(right) / len(test_x)


def twice(data, size, device, seed):
    """The finished `Turns`, and how far apart the two are as a share of how far the weights have moved."""
    dls = from_arrays(data.train_x, data.train_y, (data.test_x, data.test_y), batch_size=size.batch_size,
                      device=device)
    learn = vision_learner(dls, partial(small_resnet, size=size), seed=seed, device=device, verbose=False,
                           opt_func=partial(torch.optim.SGD, momentum=MOMENTUM), wd=WEIGHT_DECAY, wd_norm_bias=True,
                           callbacks=[ChannelsLast()])
    start, other = flat(learn.model), copy.deepcopy(learn.model)
    turns = Turns(by_hand(other, dls, data, size, device), device)
    learn.fit_one_cycle(size.epochs, size.lr, callbacks=[turns])
    mine, theirs = flat(learn.model), flat(other)
    return turns, float((mine - theirs).norm() / (theirs - start).norm())


def check_same_updates(data, size, device, seed, steps=4):
    """How far apart the two are after `steps` updates. Raises SystemExit where that is more than rounding."""
    size = replace(size, epochs=1, n_train=steps * size.batch_size)
    few = replace(data.first(size.n_train), test_x=data.test_x[:size.batch_size], test_y=data.test_y[:size.batch_size])
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        _, apart = twice(few, size, device, seed)
    if not apart <= MOST_DIFFERENT:
        raise SystemExit(f"the two do not make the same updates: after {steps} of them their weights are {apart:.2g} "
                         f"of the way apart that they have moved, {MOST_DIFFERENT:g} is allowed.")
    return apart


def shown_epochs(turns):
    """The table of epochs: accuracies, and the seconds from the start."""
    rows, total = [], dict.fromkeys((LEARNER, BY_HAND), 0.0)
    for epoch in range(len(turns.seconds[LEARNER])):
        row = [epoch + 1]
        for name in total:
            total[name] += turns.seconds[name][epoch]
            row += [f"{100 * turns.accuracies[name][epoch]:.2f}", f"{total[name]:.1f}"]
        rows.append(row)
    ratios = [a / b for a, b in zip(turns.seconds[LEARNER], turns.seconds[BY_HAND], strict=True)]
    header = ["epoch", *(f"{name}, {what}" for name in total for what in ("accuracy %", "s"))]
    return f"{table(header, rows)}\nan epoch of the {LEARNER} takes {statistics.median(ratios):.3f} times as long " \
           f"(median; {min(ratios):.3f} to {max(ratios):.3f})"


# ---- all of it


def draw(turns, runs, path):
    """Accuracy against seconds, and that of each seed with each method and rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, style in ((LEARNER, "-o"), (BY_HAND, "--x")):
        seconds = [sum(turns.seconds[name][:i + 1]) for i in range(len(turns.seconds[name]))]
        left.plot(seconds, [100 * value for value in turns.accuracies[name]], style, label=name)
    left.set(xlabel="seconds, one mark an epoch", ylabel="accuracy on the test pictures, %",
             title="CIFAR-10, the same training twice")
    left.legend()
    for i, name in enumerate(METHODS):
        for k, rate in enumerate(RATES):
            x = k + 0.25 * (i - 1)
            right.plot([x] * len(runs), [100 * run[name, rate] for run in runs], "o", color=f"C{i}", alpha=0.6,
                       label=name if k == 0 else None)
    right.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
    right.set(xlabel="peak learning rate, one dot a seed", ylabel="accuracy on five new classes, %")
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small", columnspacing=1,
                 handletextpad=0.2)  # above: inside, it would hide dots
    figure.savefig(path, dpi=110)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"the folder of {FILE} (%(default)s)")
    parser.add_argument("--device", type=torch.device, help="default: a GPU if there is one")
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, else small")
    parser.add_argument("--quick", action="store_true", help="only to see that it runs: figures say nothing")
    parser.add_argument("--seeds", type=int, default=5, help="of the second part (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them, and that of the first part")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw them")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1.")
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.size = "quick" if options.quick else options.size or ("full" if options.device.type == "cuda" else "small")
    return options


def main(arguments=None):
    options = parse(arguments)
    path, device, size = images_in(options.data), options.device, SIZES[options.size]
    data = load(path, size, torch.device("cpu"))
    apart = check_same_updates(data, size, device, options.seed)
    print(f"CIFAR-10 {options.size}: {size.n_train:,} pictures, batch {size.batch_size}, a ResNet with "
          f"{size.blocks} block(s) in each of 3 stages from {size.width} channels on, {device}\nafter 4 updates the "
          f"weights of the two are {apart:.1g} of the way apart that they have moved", flush=True)
    turns, _ = twice(data, size, device, options.seed)
    print(shown_epochs(turns), flush=True)
    known, runs = [], []
    for seed in range(options.seed, options.seed + options.seeds):
        for column, value in zip((known, runs), transfer(data, size, device, seed), strict=True):
            column.append(value)
        print(f"seed {seed}: done", file=sys.stderr, flush=True)
    print(f"\n{size.n_target} pictures of five new classes, {size.target_epochs} epochs, {len(runs)} seed(s): mean "
          f"(min-max); on the five that it knew the network has {100 * statistics.mean(known):.1f} %\n"
          f"{shown_transfer(runs)}")
    if options.plot:
        draw(turns, runs, options.plot)
    if options.json:
        about = {"size": options.size, "recipe": asdict(size), "machine": machine(device), "versions": versions(),
                 "seed": options.seed, "apart": apart, "seconds": turns.seconds, "accuracies": turns.accuracies,
                 "known": known,
                 "transfer": [[{"method": name, "rate": rate, "accuracy": value} for (name, rate), value in run.items()]
                              for run in runs]}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
