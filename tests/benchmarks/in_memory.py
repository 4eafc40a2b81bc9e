"""Data in memory: microseconds per batch of a TensorLoader and of a DataLoader, and an epoch of training from each.

60,000 x 28 x 28, shuffled. Rounds of all rows are interleaved in one process; figures are medians over the rounds,
ratios are paired round by round with the first row of each table. First it is checked that the same seed gives the
same batches and the same weights. Usage: `python tests/benchmarks/in_memory.py --help`.
"""
import argparse
import copy
import itertools
import platform
import statistics
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minifast

DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
SIDE, LR = 28, 1e-3


def data(n, dtype):
    """`n` images and their labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return x.to(dtype) / 255 if dtype.is_floating_point else x, torch.randint(0, 10, (n,), generator=generator)


def loaders(x, y, batch_size):
    """name -> loader; the first is what the others are compared with."""
    def from_dataset(num_workers):
        return DataLoader(TensorDataset(x, y), batch_size, shuffle=True, num_workers=num_workers)

    return {"DataLoader, no workers": from_dataset(0), "DataLoader, 2 workers": from_dataset(2),
            "TensorLoader": minifast.TensorLoader(x, y, batch_size=batch_size, shuffle=True)}


def batches(loader, n_batches):
    """Draw `n_batches` batches, from the start of a pass."""
    for _ in itertools.islice(loader, n_batches):
        pass


def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU(), nn.Linear(32, 10))


def by_hand(net, loader):
    """One epoch of torch's plain loop with AdamW as it comes."""
    loss_func, opt = nn.CrossEntropyLoss(), torch.optim.AdamW(net.parameters(), lr=LR)
    net.train()
    for x, y in loader:
        loss_func(net(x), y).backward()
        opt.step()
        opt.zero_grad()


def with_learner(net, loader):
    """One epoch of a Learner, silent, at the same constant rate."""
    minifast.Learner(net, minifast.DataLoaders(loader), nn.CrossEntropyLoss(), device="cpu", wd_norm_bias=True,
                     verbose=False).fit(LR, 1)


def check_same(n=2000, batch_size=64):
    """The same seed gives the same batches, and from the same batches Learner and plain loop come to the same weights.

    Fused and for-loop kernels round differently: weights agree to 1e-4, not to the last bit.
    """
    x, y = data(n, torch.float32)
    loader = minifast.TensorLoader(x, y, batch_size=batch_size, shuffle=True)
    orders, nets, start = [], [], model()
    for train in (by_hand, with_learner):
        torch.manual_seed(0)
        orders.append([(x, y) for x, y in loader])
        torch.manual_seed(0)
        nets.append(copy.deepcopy(start))
        train(nets[-1], loader)
    for one, other in zip(*orders, strict=True):
        assert torch.equal(one[0], other[0]), "the same seed gives other images"
        assert torch.equal(one[1], other[1]), "the same seed gives other labels"
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def interleaved(calls, rounds, n_batches):
    """[(name, microseconds per batch, ratios per round to the first of `calls`)]; a first round warms up."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - began)
    reference = next(iter(seconds.values()))
    return [(name, statistics.median(times) / n_batches * 1e6,
             [mine / theirs for mine, theirs in zip(times, reference, strict=True)]) for name, times in seconds.items()]


def batch_rows(dtype, batch_size, rounds, n=60_000):
    """Rows of a whole pass over the data, without training."""
    found = loaders(*data(n, DTYPES[dtype]), batch_size)
    n_batches = len(found["TensorLoader"])
    calls = {f"{name}, {dtype}, batch {batch_size}": (lambda loader=loader: batches(loader, n_batches))
             for name, loader in found.items()}
    return interleaved(calls, rounds, n_batches)


def epoch_rows(rounds, n=60_000, batch_size=64):
    """Rows of an epoch of training a small MLP: by hand from a DataLoader, and a Learner from a TensorLoader."""
    found, start = loaders(*data(n, torch.float32), batch_size), model()
    calls = {
        "epoch: by hand, AdamW, DataLoader": lambda: by_hand(copy.deepcopy(start), found["DataLoader, no workers"]),
        "epoch: by hand, AdamW, TensorLoader": lambda: by_hand(copy.deepcopy(start), found["TensorLoader"]),
        "epoch: Learner, TensorLoader": lambda: with_learner(copy.deepcopy(start), found["TensorLoader"])}
    return interleaved(calls, rounds, len(found["TensorLoader"]))


def table(rows):
    return minifast.tables.table(["", "us per batch", "ratio", "spread"], [
        [name, f"{micros:.1f}", f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}"]
        for name, micros, ratios in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=60_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check_same()
    print(f"{args.samples:,} x {SIDE} x {SIDE}, shuffled; medians of {args.rounds} rounds; torch {torch.__version__}, "
          f"cpu, one thread, Python {platform.python_version()}")
    for dtype, batch_size in itertools.product(DTYPES, (64, 256)):
        print(table(batch_rows(dtype, batch_size, args.rounds, args.samples)))
    print(table(epoch_rows(args.rounds, args.samples)))


if __name__ == "__main__":
    main()
