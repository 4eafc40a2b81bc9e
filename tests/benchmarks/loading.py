"""What handing out a batch costs: `feed`, through which every fit reads its data, against a loop over the loader.

Usage: `make bench`, or `python tests/benchmarks/loading.py --help`. On a GPU (`--device cuda`): milliseconds per batch
of copying and computing, one after the other and at the same time.
"""
import argparse
import statistics
import time
from contextlib import closing, contextmanager

import torch
from torch.utils.data import DataLoader, TensorDataset

from minifast import TensorLoader, overlap, tables
from minifast.feed import feed
from minifast.signals import DeferredInterrupt

CPU = torch.device("cpu")


def loaders(n, size=64, width=16):
    """name -> loader of `n` batches."""
    x, y = torch.randn(n * size, width), torch.randint(0, 2, (n * size,))
    data = TensorDataset(x, y)
    return {
        "list of batches": list(zip(x.split(size), y.split(size), strict=True)),
        "TensorLoader": TensorLoader(x, y, batch_size=size, shuffle=True),
        "DataLoader, 0 workers": DataLoader(data, size, shuffle=True),
        "DataLoader, 2 workers": DataLoader(data, size, shuffle=True, num_workers=2, persistent_workers=True),
    }


def by_hand(loader):
    """Seconds of a pass by a plain loop."""
    began = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - began


def by_feed(loader):
    """Seconds of the same pass by `feed`."""
    began = time.perf_counter()
    with closing(feed(loader, CPU, None, DeferredInterrupt())) as batches:
        for _ in batches:
            pass
    return time.perf_counter() - began


def overhead(loader, n, rounds, functions=(by_hand, by_feed)):
    """Microseconds per batch of each of `functions`, a list of `rounds` pairs; one round more warms up."""
    pairs = [[function(loader) / n * 1e6 for function in functions] for _ in range(rounds + 1)]
    return pairs[1:]


def rows(rounds=11, n=300):
    """[loader, us a batch by hand, us by feed, paired difference, its spread] of each kind of loader."""
    table = []
    for name, loader in loaders(n).items():
        pairs = overhead(loader, n, rounds)
        hand, fed = (statistics.median(column) for column in zip(*pairs, strict=True))
        over = [b - a for a, b in pairs]
        table.append([name, hand, fed, statistics.median(over), min(over), max(over)])
    return table


@contextmanager
def no_overlap():
    """Copies on the stream that computes, as torch does them by itself."""
    worth, overlap.WORTH = overlap.WORTH, float("inf")
    try:
        yield
    finally:
        overlap.WORTH = worth


def pass_on_device(batches, device, weight, n_products):
    """Seconds of a pass in which each batch is multiplied `n_products` times by `weight`, until the device is done."""
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    with closing(feed(batches, device, None, DeferredInterrupt())) as fed:
        for (x,) in fed:
            for _ in range(n_products):
                x = x @ weight
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def rows_on_device(device, rounds=11, n=100, size=1024, width=4096, n_products=4):
    """[memory, ms a batch without overlap, with it, ratio] for batches of size x width float32."""
    table, weight = [], torch.randn(width, width, device=device) / width**0.5
    for name in ("unpinned", "pinned"):
        x = torch.randn(size, width)
        batches = [(x.pin_memory() if name == "pinned" else x,)] * n
        pairs = []
        for _ in range(rounds + 1):
            with no_overlap():
                without = pass_on_device(batches, device, weight, n_products)
            pairs.append((without / n * 1e3, pass_on_device(batches, device, weight, n_products) / n * 1e3))
        without, beside = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        table.append([name, without, beside, statistics.median(b / a for a, b in pairs[1:])])
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=300, help="batches in a pass")
    parser.add_argument("--device", default="cpu", help="cuda: also what overlap saves there")
    args, _ = parser.parse_known_args()  # those of the other benchmarks
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"A batch (64 x 16, and 64 labels) on the CPU, microseconds, median of {args.rounds} paired rounds")
    header = ["loader", "loop by hand", "feed", "difference", "from", "to"]
    print(tables.table(header, [[name, *(f"{value:.2f}" for value in values)]
                                for name, *values in rows(args.rounds, args.batches)]))
    if torch.device(args.device).type == "cuda":
        print("A batch of 1024 x 4096 float32 (16.8 MB) and 4 products with a 4096 x 4096 matrix, milliseconds")
        print(tables.table(["memory", "copy, then compute", "at the same time", "ratio"],
                           [[name, *(f"{value:.2f}" for value in values)]
                            for name, *values in rows_on_device(torch.device(args.device), args.rounds)]))


if __name__ == "__main__":
    main()
