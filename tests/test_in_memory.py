"""DataLoaders.in_memory: what is read is what the data set holds, and what cannot be kept is refused."""
import dataclasses
import itertools
import os
import random
import re
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers import bits, rngs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from minifast import DataLoaders, Learner, TensorLoader
from minifast.data import in_memory
from minifast.machine import limits as memory
from minifast.show import screen

XY = namedtuple("XY", "x y")


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


class Made(Dataset):
    """`n` samples, each made by `make(i)`; notes which ones were read, where it was made."""

    def __init__(self, n, make):
        self.n, self.make, self.read = n, make, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        self.read.append(i)
        return self.make(i)


def pixels(i, shape=(6, 5, 3)):
    return np.random.default_rng(i).integers(0, 256, shape).astype(np.uint8)


def picture(i):
    return Image.fromarray(pixels(i))


def kept(train, valid=None, **options):
    return DataLoaders.in_memory(train, valid, **{"verbose": False} | options)


def in_order(loader):
    """The one batch of all samples, in the order of the data set."""
    loader.shuffle, loader.batch_size = False, 1000
    (batch,) = loader
    return batch


# ---- what is read

SAMPLES = {
    "tuple": lambda i: (torch.tensor([i, 1.0]), i),
    "list": lambda i: [torch.tensor([i, 1.0]), i],
    "nested": lambda i: ((torch.tensor([1.0 * i]), np.float32(i)), i % 2 == 0),
    "dict": lambda i: {"x": np.arange(3) + i, "labels": i},
    "dict in a tuple": lambda i: ({"x": torch.ones(2, 2) * i, "more": (i, 0.5 * i)}, i),
    "namedtuple": lambda i: XY(torch.tensor([i]), 0.5),
    "bare tensor": lambda i: torch.tensor([i, 2]),
    "number": lambda i: i,
    "numpy numbers": lambda i: (np.float16(i), np.int8(i), np.bool_(i % 2)),
    "no dimensions": lambda i: (torch.tensor(i), torch.tensor(True)),
    "nothing in it": lambda i: (torch.zeros(0, 3), i),
}


def same_up_to_lists(mine, theirs):
    """torch makes lists of tuples: what counts are the tensors and the names."""
    if isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(same_up_to_lists(mine[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(same_up_to_lists, mine, theirs))
    return bits(mine) == bits(theirs)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SAMPLES)
def test_batches_are_those_of_a_dataloader_with_the_nest_of_the_samples(name, num_workers):
    data = Made(11, SAMPLES[name])
    batch = in_order(kept(data, num_workers=num_workers).train)
    assert same_up_to_lists(batch, default_collate([data[i] for i in range(11)]))
    assert type(batch) is (torch.Tensor if name in ("bare tensor", "number") else type(data[0]))


def test_a_dataclass_stays_one():
    data = Made(4, lambda i: Sample(torch.tensor([i]), torch.tensor(i)))
    batch = in_order(kept(data).train)
    assert type(batch) is Sample
    assert batch.x.tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize("make", [
    lambda: TensorDataset(torch.arange(6.0).reshape(3, 2), torch.arange(3)),
    lambda: Subset(TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10)), [0, 1, 2]),
    lambda: list(TensorDataset(torch.arange(6.0).reshape(3, 2), torch.arange(3)))],
    ids=["TensorDataset", "Subset", "list"])
def test_data_sets_of_every_kind(make):
    x, y = in_order(kept(make()).train)
    assert (x.tolist(), y.tolist()) == ([[0, 1], [2, 3], [4, 5]], [0, 1, 2])


@pytest.mark.parametrize(("mode", "channels", "dtype"), [
    ("RGB", 3, torch.uint8), ("L", 1, torch.uint8), ("RGBA", 4, torch.uint8), ("P", 3, torch.uint8),
    ("1", 1, torch.uint8), ("I", 1, torch.int32), ("F", 1, torch.float32)])
def test_pictures_become_channels_height_width(mode, channels, dtype):
    images = [picture(i).convert(mode) for i in range(3)]
    x, _ = in_order(kept(list(zip(images, range(3), strict=True))).train)
    assert (tuple(x.shape), x.dtype) == ((3, channels, 6, 5), dtype)
    plain = [image.convert({"P": "RGB", "1": "L"}.get(mode, mode)) for image in images]
    for i, (row, column) in itertools.product(range(3), itertools.product(range(6), range(5))):
        value = plain[i].getpixel((column, row))
        assert tuple(x[i, :, row, column].tolist()) == (value if isinstance(value, tuple) else (value,))


def test_training_data_is_shuffled_and_validation_data_is_not():
    dls = kept(Made(20, lambda i: (i, i)), Made(9, lambda i: (i, i)), batch_size=4, drop_last=True)
    assert [type(loader) for loader in (dls.train, dls.valid)] == [TensorLoader] * 2
    assert [x.tolist() for x, _ in dls.valid] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    first, second = ([x.tolist() for x, _ in dls.train] for _ in range(2))
    assert first != second
    assert sorted(itertools.chain(*first)) == list(range(20))
    assert (dls.train.drop_last, dls.valid.drop_last) == (True, False)


def test_several_validation_sets():
    dls = kept(Made(4, SAMPLES["tuple"]), {"a": Made(3, SAMPLES["tuple"]), "b": Made(2, SAMPLES["dict"])})
    assert list(dls.valid) == ["a", "b"]
    assert [len(loader.tensors[0]) for loader in dls.valid.values()] == [3, 2]


def test_transforms_get_the_nest_and_each_its_own_set():
    def double(batch):
        return {"x": batch["x"] * 2, "labels": batch["labels"]}

    dls = kept(Made(4, SAMPLES["dict"]), Made(4, SAMPLES["dict"]), transform=double)
    plain = kept(Made(4, SAMPLES["dict"]), Made(4, SAMPLES["dict"]), valid_transform=double)
    assert torch.equal(in_order(dls.train)["x"], 2 * in_order(dls.valid)["x"])
    assert torch.equal(2 * in_order(plain.train)["x"], in_order(plain.valid)["x"])


def test_a_learner_trains_on_it_and_augments_for_tta():
    data = Made(24, lambda i: ({"input": torch.randn(3, generator=torch.Generator().manual_seed(i))}, i % 3))

    def noise(batch):
        return {"input": batch[0]["input"] + torch.randn(3)}, batch[1]

    learn = Learner(nn.Linear(3, 3), kept(data, data, batch_size=8, transform=noise), nn.CrossEntropyLoss(),
                    device="cpu", verbose=False)
    learn.fit(0.1, 2)
    assert len(learn.recorder.lrs) == 6
    preds, targets = learn.tta()
    assert preds.shape == (24, 3)
    assert targets.tolist() == [i % 3 for i in range(24)]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_training_on_it_equals_training_on_its_tensors(n, size, seed):
    x, y = torch.arange(2.0 * n).reshape(n, 2), torch.arange(n)
    torch.manual_seed(seed)
    mine = bits(list(kept(TensorDataset(x, y), batch_size=size).train))
    torch.manual_seed(seed)
    assert mine == bits(list(TensorLoader(x, y, batch_size=size, shuffle=True)))


# ---- reading

@pytest.mark.parametrize("num_workers", [None, 0, pytest.param(2, marks=pytest.mark.slow)])
def test_reading_advances_no_generator(num_workers):
    class Own(Made):
        generator = None

    data = Own(9, SAMPLES["tuple"])
    data.generator = torch.Generator().manual_seed(3)
    random.seed(1)
    before, own = rngs(), data.generator.get_state()
    kept(data, Made(3, lambda i: (torch.rand(2), random.random(), np.random.rand())), num_workers=num_workers)
    assert rngs() == before
    assert torch.equal(data.generator.get_state(), own)


def test_no_accelerator_is_seeded(monkeypatch):
    """That of a GPU which is not in use yet could not be put back."""
    def fail(seed):
        raise AssertionError("seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    kept(Made(5, SAMPLES["tuple"]))


def test_what_is_read_is_read_once():
    data = Made(100, SAMPLES["tuple"])
    kept(data)
    once = [i for i in data.read if data.read.count(i) == 1]
    assert len(once) >= 95, "all but those that were looked at before"
    assert set(data.read) == set(range(100))


def test_it_says_what_it_did(capsys):
    kept(Made(1500, lambda i: torch.zeros(1000)), Made(2, lambda i: torch.zeros(1000)), verbose=True)
    assert re.fullmatch(r"in memory: 1,500 \+ 2 samples, 6\.0 MB on cpu, read in \d+\.\d s\n", capsys.readouterr().out)
    kept(Made(3, SAMPLES["tuple"]))
    assert capsys.readouterr() == ("", "")


def test_a_bar_where_there_is_a_screen(monkeypatch):
    drawn = []

    class Screen:
        has_bar = True

        def bar(self, step, title, note):
            drawn.append((step, title))

        def close(self):
            drawn.append("closed")

    monkeypatch.setattr(screen, "screen", lambda n_steps, form: Screen())
    monkeypatch.setattr(screen, "REFRESH", 0.0)
    monkeypatch.setattr(in_memory, "MOST_AT_ONCE", 4)
    kept(Made(10, SAMPLES["tuple"]), verbose=True)
    assert drawn == [(4, "reading train"), (8, "reading train"), (10, "reading train"), "closed"]


def test_workers_are_used_where_reading_is_slow(monkeypatch):
    asked = []

    class Spy(DataLoader):
        def __init__(self, *args, num_workers, **options):
            asked.append(num_workers)
            super().__init__(*args, num_workers=0, **options)

    monkeypatch.setattr(in_memory, "DataLoader", Spy)
    monkeypatch.setattr(in_memory, "SLOW", 1e-9)
    kept(Made(10, SAMPLES["tuple"]))
    monkeypatch.setattr(in_memory, "SLOW", 1e9)
    kept(Made(10, SAMPLES["tuple"]))
    assert 1 <= asked[0] <= 8
    assert asked[1] == 0


# ---- what is refused

@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "message"), [
    (lambda i: (torch.zeros(3 if i < 7 else i), i), "sample 7 is (float32 (7,), int64 ()), sample 0 is (float32 (3,),"),
    (lambda i: (picture(i).resize((5, 6 + (i == 8))), i), "sample 8 is (uint8 (3, 7, 5), int64 ()), sample 0 is"),
    (lambda i: (1.0 if i == 9 else 1, i), "sample 9 is (float64 (), int64 ()), sample 0 is (int64 (), int64 ())"),
    (lambda i: {"x": i} if i < 5 else {"y": i}, "sample 5 is {y: int64 ()}, sample 0 is {x: int64 ()}"),
    (lambda i: Sample(torch.zeros(1 + (i > 3)), torch.tensor(0)), "sample 4 is Sample(float32 (2,), int64 ())"),
])  # fmt: skip
def test_samples_that_differ(make, message, num_workers, monkeypatch):
    monkeypatch.setattr(in_memory, "MOST_AT_ONCE", 3)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        kept(Made(20, make), num_workers=num_workers)
    assert str(caught.value).startswith("all samples must have one shape and dtype to be kept in memory. train: sample")


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, np.random.rand, lambda: torch.rand(()) < 0.5],
                         ids=["torch", "random", "numpy", "half of the time"])
def test_random_augmentation_would_be_frozen(draw):
    before = rngs()
    data = Made(50, lambda i: (draw(), i))
    with pytest.raises(ValueError, match=r"train: sample 0 is another one each time .* Move it to transform="):
        kept(data)
    assert rngs() == before
    x, _ = in_order(kept([data[i] for i in range(50)], data).train)  # one version; a validation set may be frozen
    assert x.unique().numel() > 1


def test_the_augmentation_of_a_generator_of_its_own_is_seen_too():
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="frozen"):
        kept(Made(5, lambda i: (generator.random(), i)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.table
@pytest.mark.parametrize(("train", "valid", "error", "message"), [
    (Stream(), None, TypeError, "train is an IterableDataset (Stream)"),
    (DataLoader([1]), None, TypeError, "train must be a data set, got a DataLoader, which is a loader"),
    ((torch.ones(2), torch.ones(2)), None, TypeError, "got a tuple of 2 arrays. Pass TensorDataset(*tensors), or"),
    ({"a": [1]}, None, TypeError, "train must be a map-style data set, with len() and [i], got {'a': [1]} (dict)"),
    (iter([1]), None, TypeError, "train must be a map-style data set"),
    (torch.tensor(1), None, TypeError, "train must be a map-style data set"),
    ([], None, ValueError, "train is empty: list with 0 samples"),
    ([1], [], ValueError, "valid is empty"),
    ([1], {"clean": [2], "noisy": Stream()}, TypeError, "valid['noisy'] is an IterableDataset (Stream)"),
    ([("a text", 1)], None, TypeError, "the sample holds 'a text' (str)"),
    ([(None, 1)], None, TypeError, "the sample holds None (NoneType)"),
    ([(np.array(["a"]), 1)], None, TypeError, "only tensors, numpy arrays, numbers and PIL images"),
    ([torch.eye(2).to_sparse()], None, TypeError, "a sparse Tensor (torch.sparse_coo)"),
    ([torch.ones(2, device="meta")], None, TypeError, "a Tensor without values (device meta)"),
    ([2**63], None, TypeError, "the sample holds 9223372036854775808 (int)"),
    ([{}], None, ValueError, "train: sample 0 holds nothing (dict)"),
], ids=lambda value: None)  # fmt: skip
def test_what_is_no_data_set_to_keep(train, valid, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kept(train, valid)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1, got 0"),
    ({"transform": 3}, TypeError, "transform must be a function of a batch, got 3"),
    ({"valid_transform": 3}, TypeError, "valid_transform must be a function of a batch, got 3"),
    ({"device": "nowhere"}, ValueError, "device='nowhere' cannot be used"),
    ({"num_workers": -1}, ValueError, "num_workers must be an int >= 0, got -1"),
    ({"drop_last": 1}, TypeError, "drop_last must be True or False"),
    ({"generator": 1}, TypeError, "generator must be a torch.Generator"),
    ({"verbose": None}, TypeError, "verbose must be True or False"),
])  # fmt: skip
def test_options_are_looked_at_before_anything_is_read(options, error, message):
    data = Made(3, SAMPLES["tuple"])
    with pytest.raises(error, match=re.escape(message)):
        kept(data, **options)
    assert data.read == []


def test_an_error_of_the_data_set_names_the_sample():
    def broken(i):
        return i if i != 5 else 1 // 0

    with pytest.raises(ZeroDivisionError) as caught:
        kept(Made(20, broken), num_workers=0)
    assert caught.value.__notes__ == ["in sample 5 of train"]


@pytest.mark.slow
def test_a_worker_that_dies_is_explained():
    here = os.getpid()

    def deadly(i):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    with pytest.raises((RuntimeError, OSError, EOFError)) as caught:
        kept(Made(2000, deadly), num_workers=1)
    assert "pass fewer workers" in "".join(caught.value.__notes__)


# ---- memory

def test_what_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    data = Made(10**9, lambda i: torch.zeros(1000))
    with pytest.raises(MemoryError, match=r"train would take 4,000,000 MB in the memory of cpu, where [\d,]+ MB are"):
        kept(data)
    assert len(data.read) <= 2
    monkeypatch.setattr(in_memory, "available", lambda device: 1000)
    kept(Made(9, lambda i: torch.zeros(25)))
    with pytest.raises(MemoryError, match=r"train and valid would take"):
        kept(Made(9, lambda i: torch.zeros(25)), Made(1, lambda i: torch.zeros(25)))
    monkeypatch.setattr(in_memory, "available", lambda device: None)
    kept(Made(9, lambda i: torch.zeros(25)))


MEMINFO = "MemTotal:       2000 kB\nMemFree:         500 kB\nMemAvailable:   1000 kB\n"


@pytest.mark.parametrize(("files", "expected"), [
    ({}, None),
    ({"proc/meminfo": MEMINFO}, 1024000),
    ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 1024000),
    ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5000\n",
      "sys/fs/cgroup/memory.current": "3000\n", "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 500\n"}, 2500),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "5000\n",
      "sys/fs/cgroup/a/b/memory.current": "1000\n", "sys/fs/cgroup/a/memory.max": "2000",
      "sys/fs/cgroup/a/memory.current": "1500"}, 500),
    ({"proc/self/cgroup": "5:cpu:/x\n4:memory:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "900",
      "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "1000"}, 0),
], ids=["nothing known", "machine", "no limit", "limit", "limit above", "version 1, full"])  # fmt: skip
def test_the_memory_that_is_free(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.available(torch.device("cpu"), tmp_path) == expected


def test_of_another_device_nobody_says():
    assert memory.available(torch.device("meta")) is None
