"""Data in memory: microseconds per batch of a TensorLoader and of a DataLoader, and an epoch of training from each.

60,000 x 28 x 28, shuffled. First it is checked that the same seed gives the same batches and the same weights.
"""
import copy
import itertools
from collections.abc import Iterator

import torch
from harness import Goal, Options, Table, interleave, seconds
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minifast

DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
SIDE, LR = 28, 1e-3
DATASET, TENSOR = "DataLoader, no workers", "TensorLoader"
HAND, LEARNER = f"by hand, AdamW, {DATASET}", f"Learner, {TENSOR}"


def data(n, dtype):
    """`n` images and their labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return x.to(dtype) / 255 if dtype.is_floating_point else x, torch.randint(0, 10, (n,), generator=generator)


def loaders(x, y, batch_size):
    """name -> loader."""
    def from_dataset(num_workers):
        return DataLoader(TensorDataset(x, y), batch_size, shuffle=True, num_workers=num_workers)

    return {DATASET: from_dataset(0), "DataLoader, 2 workers": from_dataset(2),
            TENSOR: minifast.TensorLoader(x, y, batch_size=batch_size, shuffle=True)}


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


def suite(options: Options) -> Iterator[Table]:
    n = 1000 if options.quick else 60_000
    check_same(n if options.quick else 2000)
    for dtype, batch_size in itertools.product(DTYPES, (64, 256)):
        found = loaders(*data(n, DTYPES[dtype]), batch_size)
        n_batches = len(found[TENSOR])
        rows = {name: lambda loader=loader, n=n_batches: 1e6 * seconds(lambda: batches(loader, n)) / n
                for name, loader in found.items()}
        yield Table(f"a batch of {batch_size} from {n:,} x {SIDE} x {SIDE}, {dtype}, shuffled", "us per batch",
                    interleave(rows, options), DATASET, [Goal(TENSOR, 1 / 6)] if batch_size == 64 else [])
    found, start = loaders(*data(n, torch.float32), 64), model()
    n_batches = len(found[TENSOR])
    runs = {HAND: (by_hand, DATASET), f"by hand, AdamW, {TENSOR}": (by_hand, TENSOR), LEARNER: (with_learner, TENSOR)}
    rows = {name: lambda train=train, loader=found[loader]:
            1e6 * seconds(lambda: train(copy.deepcopy(start), loader)) / n_batches
            for name, (train, loader) in runs.items()}
    yield Table(f"an epoch of an MLP {SIDE * SIDE}-32-10, batch 64", "us per step", interleave(rows, options), HAND,
                [Goal(LEARNER, 0.5)])
