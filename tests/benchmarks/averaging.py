"""What averages of the weights are worth: accuracy and loss on the embedded digits, by seed and schedule.

In each run all averages listen; they do not change it, so the rows of a table are about the same runs. Usage:
`python tests/benchmarks/averaging.py --help`.
"""
import argparse
import statistics
import time

import torch
from torch import nn

import minifast
from minifast.callbacks.averaging import EMA, SWA
from minifast.callbacks.ensemble import SnapshotEnsemble
from minifast.demo import convnet

STEPS = 45  # of 32 images an epoch


def fits(lr, cycles, cycle_len):
    """The schedules: name -> a function of the learner. All train for as many epochs."""
    epochs = cycles * cycle_len
    return {f"{cycles} circular cycles": lambda learn: learn.fit(lr, cycles, cycle_len=cycle_len, use_clr=(32, 5)),
            "a constant rate": lambda learn: learn.fit(lr, epochs),
            "one cycle": lambda learn: learn.fit_one_cycle(epochs, lr)}


def learner(seed, callbacks):
    torch.manual_seed(seed)
    return minifast.Learner(convnet((1, 8, 8), 10, width=16), minifast.digits(32), nn.CrossEntropyLoss(),
                            callbacks=callbacks, seed=seed, device="cpu", verbose=False)


def scores(preds, targets):
    """(accuracy in percent, loss)."""
    return 100 * float(minifast.accuracy(preds, targets)), float(nn.functional.cross_entropy(preds, targets))


def run(fit, seed, epochs):
    """The scores of one run, by row."""
    off = {"in_validation": False}
    emas = {f"EMA, half-life {share:g} of the fit": EMA(half_life=share * epochs * STEPS, **off)
            for share in (0.02, 0.1)}
    swa, ensemble = SWA(0.5, apply=False, **off), SnapshotEnsemble()
    learn = learner(seed, [*emas.values(), swa, ensemble])
    fit(learn)
    rows = {"raw": scores(*learn.get_preds())}
    for name, average in {**emas, "SWA(0.5), BatchNorm averaged": swa}.items():
        with average.swapped(learn.model):
            rows[name] = scores(*learn.get_preds())
    if len(ensemble.snapshots) > 1:
        rows[f"{len(ensemble.snapshots)} snapshots, mean probability"] = scores(*ensemble.get_preds(learn))
        with ensemble.averaged(learn):
            rows["their mean weights, BatchNorm anew"] = scores(*learn.get_preds())
    learn = learner(seed, [SWA(0.5)])
    fit(learn)
    rows["SWA(0.5), BatchNorm anew"] = scores(*learn.get_preds())
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--cycles", type=int, default=4)
    parser.add_argument("--cycle-len", type=int, default=1, help="epochs")
    options = parser.parse_args()
    began = time.perf_counter()
    epochs = options.cycles * options.cycle_len
    print(f"digits, 360 validation images; {epochs} epochs, peak {options.lr:g}; mean ± standard deviation over "
          f"{options.seeds} seeds")
    for schedule, fit in fits(options.lr, options.cycles, options.cycle_len).items():
        runs = [run(fit, seed, epochs) for seed in range(options.seeds)]
        print(f"\n{schedule:38}{'accuracy %':>14}{'minus raw':>16}{'loss':>10}")
        for name in runs[0]:
            columns = [[row[name][0] for row in runs], [row[name][0] - row["raw"][0] for row in runs]]
            (mean, sd), (gain, sd_gain) = ((statistics.mean(c), statistics.stdev(c) if c[1:] else 0) for c in columns)
            print(f"{name:38}{mean:8.2f} ±{sd:5.2f}{gain:+9.2f} ±{sd_gain:5.2f}"
                  f"{statistics.mean(row[name][1] for row in runs):10.4f}")
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
