"""What the verdicts of `lr_find` rest on: how far noise falls, how far a real curve does, how well repeats agree.

`python tests/benchmarks/finder.py [seeds]` prints the figures that minifast/verdict.py and lr_repeats.py name.
"""
import sys
import time

import numpy as np
import torch
from torch import nn

from minifast import Learner, digits
from minifast.finder.verdict import _scatter
from minifast.record.scalars import Ema
from minifast.suggest import largest_fall, usable

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9)}


def fall_and_scatter(lrs, losses, smooth, num_it):
    """The largest fall of the smoothed curve in units of the scatter, and the scatter in units of the level."""
    kept, raw = usable(lrs, smooth, num_it)[1], usable(lrs, losses, num_it)[1]
    return largest_fall(kept) / _scatter(raw), _scatter(raw) / np.median(np.abs(kept))


def of_noise(n, draws=400):
    generator, lrs, falls = np.random.default_rng(0), np.geomspace(1e-7, 10, n), []
    for _ in range(draws):
        ema, losses = Ema(), 3 + 0.3 * generator.standard_normal(n)
        falls.append(fall_and_scatter(lrs, losses, np.array([ema.add(loss) for loss in losses]), n)[0])
    return falls


def learner(seed, opt_func):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Flatten(), nn.Linear(256, 10))
    return Learner(model, digits(32), nn.CrossEntropyLoss(), opt_func=opt_func, device="cpu", verbose=False)


def shown(values):
    return f"{min(values):.2f} .. {np.median(values):.2f} .. {max(values):.2f}"


def main(seeds):
    torch.set_num_threads(1)
    began = time.perf_counter()
    for n in (40, 100):
        quantiles = ", ".join(f"{q:.2f}" for q in np.quantile(of_noise(n), [0.5, 0.95, 0.99]))
        print(f"noise alone, {n} points: fall / scatter, median, 95 %, 99 % of 400 draws: {quantiles}")
    print(f"\na convnet on the digits, {seeds} seeds, lowest .. median .. highest")
    for name, opt_func in OPTIMIZERS.items():
        spreads, curves = [], {"new": [], "trained": []}
        for seed in range(seeds):
            learn = learner(seed, opt_func)
            low, high = learn.lr_find(repeats=3).spread["valley"]
            spreads.append(high / low)
            for state, found in curves.items():
                run = learn.lr_find()
                found.append(fall_and_scatter(run.lrs, run.losses, run.smooth_losses, 100))
                if state == "new":
                    learn.fit_one_cycle(3, 1e-2)
        for state, found in curves.items():
            falls, scatters = zip(*found, strict=True)
            print(f"{name}, {state}: fall / scatter {shown(falls)}; scatter / level {shown(scatters)}")
        above = sum(spread > 10 for spread in spreads)
        print(f"{name}: highest / lowest suggestion of 3 runs {shown(spreads)}, above 10: {above}")
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
