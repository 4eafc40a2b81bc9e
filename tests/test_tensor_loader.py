"""TensorLoader: every sample once, the same order for the same seed, copies, passes that begin later, shards."""
import copy
import itertools
import re

import pytest
import torch
from helpers import bits, learner, rngs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import TensorLoader
from minifast.core.checks import n_items
from minifast.data.loader import in_order, smallest_batch


def order(loader):
    return [x.tolist() for (x,) in loader]


def test_tensor_loader_yields_in_order():
    loader = TensorLoader(torch.arange(7), batch_size=3)
    assert len(loader) == 3
    before = rngs()
    assert order(loader) == order(loader) == [[0, 1, 2], [3, 4, 5], [6]]
    assert rngs() == before, "no random number is drawn"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "size", "sizes"), [(7, 3, [3, 3]), (6, 3, [3, 3]), (2, 3, []), (0, 3, [])])
def test_drop_last(n, size, sizes, shuffle):
    for drop_last in (True, False):
        loader = TensorLoader(torch.arange(n), batch_size=size, shuffle=shuffle, drop_last=drop_last)
        expected = sizes if drop_last or n % size == 0 else [*sizes, n % size]
        assert [len(batch) for batch in order(loader)] == expected
        assert len(loader) == len(expected)


@pytest.mark.parametrize("own", [False, True])
def test_shuffling_is_a_function_of_the_generator(own):
    generator = torch.Generator() if own else None
    loader = TensorLoader(torch.arange(50), batch_size=8, shuffle=True, generator=generator)

    def epochs(seed):
        torch.manual_seed(99 if own else seed)
        if own:
            generator.manual_seed(seed)
        return order(loader), order(loader)

    first, second = epochs(1)
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(50))
    assert first != second, "each epoch has an order of its own"
    assert epochs(1) == (first, second)
    assert epochs(2)[0] not in (first, second)
    before = rngs()
    order(loader)
    assert (rngs() == before) is own, "the global generator is used if and only if there is no other"


def test_the_order_is_settled_when_the_epoch_starts():
    def draw(between):
        torch.manual_seed(0)
        seen = []
        for (x,) in TensorLoader(torch.arange(20), batch_size=4, shuffle=True):
            seen.append(x.tolist())
            between()
        return seen

    assert draw(lambda: None) == draw(lambda: torch.rand(3))


def test_rows_stay_together():
    loader = TensorLoader(torch.arange(20), torch.arange(20.0).reshape(20, 1, 1) * 10, batch_size=6, shuffle=True)
    for x, y in loader:
        assert y.shape[1:] == (1, 1)
        assert torch.equal(x * 10, y.flatten().long())


def test_transform_gets_the_tuple_of_a_batch():
    loader = TensorLoader(torch.arange(4), torch.ones(4), batch_size=3, transform=lambda batch: {"x": batch})
    assert [(type(batch["x"]), batch["x"][0].tolist()) for batch in loader] == [(tuple, [0, 1, 2]), (tuple, [3])]


@pytest.mark.table
@pytest.mark.parametrize(("tensors", "options", "error", "message"), [
    ((), {}, TypeError, "takes tensors of shape (n, ...), got none"),
    (([1, 2],), {}, TypeError, "takes tensors of shape (n, ...), got list"),
    ((torch.ones(3), torch.ones(4), torch.ones(3)), {}, ValueError, "tensors must have one length, got [3, 4, 3]"),
    ((torch.ones(3),), {"batch_size": 0}, ValueError, "batch_size must be an int >= 1, got 0 (int)"),
    ((torch.ones(3),), {"batch_size": 2.0}, ValueError, "batch_size must be an int >= 1, got 2.0 (float)"),
    ((torch.ones(3),), {"shuffle": None}, TypeError, "shuffle must be True or False, got None (NoneType)"),
    ((torch.ones(3).numpy(),), {}, TypeError, "got ndarray. Pass torch.from_numpy(array)."),
    ((torch.ones(3), torch.ones(3, requires_grad=True)), {}, ValueError, "number 1 requires grad"),
    ((torch.ones(3, 2).to_sparse(),), {}, ValueError, "number 0 is torch.sparse_coo. Pass tensor.to_dense()."),
    ((torch.ones(3), torch.ones(3, device="meta")), {}, ValueError, "on one device, got cpu, meta. Pass device="),
])  # fmt: skip
def test_what_tensor_loader_refuses(tensors, options, error, message):
    with pytest.raises(error) as caught:
        TensorLoader(*tensors, **options)
    assert message in str(caught.value)


# ---- copies


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("way", ["by hand", "in the transform"])
def test_who_writes_into_a_batch_changes_neither_the_data_nor_another_batch(shuffle, way):
    x = torch.randn(10, 3)
    before, transform = x.clone(), (lambda batch: (batch[0].zero_(),)) if way == "in the transform" else None
    loader = TensorLoader(x, batch_size=4, shuffle=shuffle, transform=transform)
    kept = []
    for (batch,) in loader:
        kept.append((batch, batch.clone()))
        if way == "by hand":
            batch.fill_(7)
            kept[-1] = (batch, torch.full_like(batch, 7))
    assert torch.equal(x, before)
    assert all(torch.equal(batch, seen) for batch, seen in kept)
    assert loader.tensors[0] is x, "the data itself is not copied"


def test_a_model_that_begins_in_place_does_not_change_the_data():
    x, y = torch.randn(12, 3), torch.randn(12, 1)
    before = x.clone()
    loader = TensorLoader(x, y, batch_size=4)
    learn = learner(loader, loader, model=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1)))
    learn.fit(0.1, 2)
    learn.get_preds()
    assert torch.equal(x, before)


@pytest.mark.table
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float16, torch.complex64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_has_the_dtype_of_the_data(dtype, shuffle):
    x = torch.arange(6).to(dtype)
    for (batch,) in TensorLoader(x, batch_size=4, shuffle=shuffle):
        assert batch.dtype is dtype


# ---- any data, any order

SIZES = {"n": st.integers(0, 40), "size": st.integers(1, 12), "shuffle": st.booleans(), "drop_last": st.booleans(),
         "seed": st.integers(0, 3)}  # fmt: skip


def make(n, size, shuffle, drop_last, seed, own=True):
    torch.manual_seed(seed)
    return TensorLoader(torch.arange(n), batch_size=size, shuffle=shuffle, drop_last=drop_last,
                        generator=torch.Generator().manual_seed(seed) if own else None)


@given(**SIZES, own=st.booleans())
def test_every_sample_comes_once(own, **sizes):
    loader = make(**sizes, own=own)
    n, size = sizes["n"], sizes["size"]
    for _ in range(2):
        found = order(loader)
        left_out = n % size if sizes["drop_last"] else 0
        samples = list(itertools.chain(*found))
        assert len(found) == len(loader)
        assert len(samples) == len(set(samples)) == n - left_out
        assert {*samples} <= {*range(n)}
        assert all(len(batch) == size for batch in found[:-1])
        if found:
            assert len(found[-1]) == smallest_batch(loader)


@given(**SIZES, own=st.booleans(), first=st.integers(0, 45))
def test_a_pass_that_begins_later_is_the_rest_of_it(own, first, **sizes):
    whole = order(make(**sizes, own=own))
    assert [x.tolist() for (x,) in make(**sizes, own=own).iter_from(first)] == whole[first:]


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_have_the_sizes_of_a_dataloader(drop_last):
    for n, size in itertools.product(range(1, 9), range(1, 5)):
        loader = DataLoader(TensorDataset(torch.arange(n)), size, shuffle=True, drop_last=drop_last)
        assert list(map(len, order(make(n, size, True, drop_last, 0)))) == [len(x) for (x,) in loader]


def test_random_numbers_of_the_transform_are_no_part_of_the_order():
    def orders(transform):
        torch.manual_seed(0)
        return order(TensorLoader(torch.arange(20), batch_size=4, shuffle=True, transform=transform))

    assert orders(None) == orders(lambda batch: (torch.rand(5), batch)[1])


# ---- shards

SHARDS = SIZES | {"world_size": st.integers(1, 6)}


@given(**SHARDS)
def test_shards_partition_an_epoch(world_size, **sizes):
    n, size = sizes["n"], sizes["size"]
    shards = [make(**sizes).shard(rank, world_size) for rank in range(world_size)]  # as in processes of their own
    for epoch in range(2):
        found = [order(shard) for shard in shards]
        assert [list(map(len, batches)) for batches in found] == [list(map(len, found[0]))] * world_size
        assert {len(shard) for shard in shards} == {len(found[0])}
        seen = list(itertools.chain(*itertools.chain(*found)))
        if sizes["drop_last"]:
            assert len(seen) == len(set(seen)) == n // world_size // size * size * world_size
        else:
            extra = -n % world_size
            assert set(seen) == {*range(n)}
            assert len(seen) == n + extra
            if n:
                whole = [list(itertools.chain(*order(loader))) for loader in [make(**sizes)] for _ in range(2)][epoch]
                again = list((whole * (1 + extra // n + 1))[:extra])
                assert sorted(seen) == sorted(whole + again), "the first of the order make the shares equal"
        assert all(n_items(shard) == shard.n_samples for shard in shards)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_the_batches_of_all_ranks_are_one_large_batch(world_size, size, n_batches, seed):
    n = world_size * size * n_batches
    large = order(make(n, size * world_size, True, False, seed))
    shards = [order(make(n, size, True, False, seed).shard(rank, world_size)) for rank in range(world_size)]
    assert [sorted(itertools.chain(*batches)) for batches in zip(*shards, strict=True)] == [sorted(x) for x in large]


@given(**SHARDS, first=st.integers(0, 45))
def test_a_shard_begins_later_too(world_size, first, **sizes):
    rank = world_size - 1
    whole = order(make(**sizes).shard(rank, world_size))
    rest = make(**sizes).shard(rank, world_size).iter_from(first)
    assert [x.tolist() for (x,) in rest] == whole[first:]


def test_shards_do_not_share_a_generator_and_read_no_other():
    loader = make(12, 2, True, False, 0)
    first, second = loader.shard(0, 2), loader.shard(1, 2)
    expected = order(first), order(first)
    before = rngs()
    torch.manual_seed(99)
    assert {*itertools.chain(*order(second))} == {*range(12)} - {*itertools.chain(*expected[0])}
    torch.manual_seed(98)
    assert {*itertools.chain(*order(second))} == {*range(12)} - {*itertools.chain(*expected[1])}
    assert rngs() != before, "the global one was seeded here, and had no part in it"


def test_all_of_a_shard_in_order():
    shard = make(7, 2, True, True, 0).shard(1, 2)
    assert order(in_order(shard)) == [[1, 3], [5, 0]]


@pytest.mark.parametrize(("arguments", "message"), [
    ((2, 2), "rank must be an int >= 0 and <= 1, got 2 (int)"),
    ((-1, 2), "rank must be an int >= 0 and <= 1, got -1 (int)"),
    ((0, 0), "world_size must be an int >= 1, got 0 (int)"),
])  # fmt: skip
def test_what_a_shard_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TensorLoader(torch.arange(4)).shard(*arguments)


def test_a_shard_needs_an_order_that_all_share():
    with pytest.raises(ValueError, match=r"need one order in all processes. Pass TensorLoader\(\.\.\., generator="):
        TensorLoader(torch.arange(4), shuffle=True).shard(0, 2)
    with pytest.raises(ValueError, match=r"the shard 1 of 2 already"):
        TensorLoader(torch.arange(4)).shard(1, 2).shard(0, 2)


# ---- what is asked of a loader


def test_it_has_a_data_set():
    x, y = torch.arange(5), torch.arange(5) * 2
    loader = TensorLoader(x, y, batch_size=2, shuffle=True, transform=lambda batch: None)
    assert len(loader.dataset) == 5
    assert [tuple(map(int, pair)) for pair in loader.dataset][3] == (3, 6)


def test_what_it_shows_of_itself():
    loader = TensorLoader(torch.zeros(5, 2, dtype=torch.uint8), torch.zeros(5), batch_size=2, drop_last=True)
    assert repr(loader) == "TensorLoader(uint8 (5, 2), float32 (5,), batch_size=2, shuffle=False, drop_last=True)"
    assert repr(loader.shard(1, 3)).endswith("drop_last=True).shard(1, 3)")
    assert "device='meta'" in repr(TensorLoader(torch.ones(3), device="meta"))


def test_a_copy_is_a_loader_of_the_same_tensors():
    loader = make(9, 2, True, False, 1)
    twin = copy.copy(loader)
    assert twin.tensors is loader.tensors
    assert bits(list(copy.deepcopy(loader))) == bits(list(loader))
