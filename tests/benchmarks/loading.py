"""What handing out a batch costs: `feed`, through which every fit reads its data, against a loop over the loader.

On a GPU (`--device cuda`) also milliseconds per batch of copying and computing, one after the other and at once.
"""
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from harness import Options, Table, interleave, seconds
from torch.utils.data import DataLoader, TensorDataset

from minifast import TensorLoader
from minifast.data import feed as module
from minifast.data.feed import feed
from minifast.machine.signals import DeferredInterrupt

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
    """A pass by a plain loop."""
    for _ in loader:
        pass


def by_feed(loader):
    """The same pass by `feed`."""
    with closing(feed(loader, CPU, None, DeferredInterrupt())) as batches:
        for _ in batches:
            pass


@contextmanager
def no_overlap():
    """Copies on the stream that computes, as torch does them by itself."""
    worth, module.WORTH = module.WORTH, float("inf")
    try:
        yield
    finally:
        module.WORTH = worth


def pass_on_device(batches, device, weight, n_products):
    """A pass in which each batch is multiplied `n_products` times by `weight`."""
    with closing(feed(batches, device, None, DeferredInterrupt())) as fed:
        for (x,) in fed:
            for _ in range(n_products):
                x = x @ weight


def one_after_the_other(*args):
    with no_overlap():
        pass_on_device(*args)


def on_device(options, n=100, size=1024, width=4096, n_products=4):
    """Tables of batches of size x width float32."""
    device, weight = options.device, torch.randn(width, width, device=options.device) / width**0.5
    for memory in ("unpinned", "pinned"):
        x = torch.randn(size, width)
        args = [(x.pin_memory() if memory == "pinned" else x,)] * n, device, weight, n_products
        rows = {"copy, then compute": lambda args=args: 1e3 * seconds(lambda: one_after_the_other(*args), device) / n,
                "at the same time": lambda args=args: 1e3 * seconds(lambda: pass_on_device(*args), device) / n}
        yield Table(f"a batch of {size} x {width} float32, {memory}, and {n_products} products", "ms per batch",
                    interleave(rows, options), "copy, then compute")


def suite(options: Options) -> Iterator[Table]:
    n = 20 if options.quick else 300
    for name, loader in loaders(n).items():
        rows = {"loop by hand": lambda loader=loader: 1e6 * seconds(lambda: by_hand(loader)) / n,
                "feed": lambda loader=loader: 1e6 * seconds(lambda: by_feed(loader)) / n}
        yield Table(f"a batch of 64 x 16 on the CPU, {name}", "us per batch", interleave(rows, options), "loop by hand")
    if options.device.type == "cuda":
        yield from on_device(options)
