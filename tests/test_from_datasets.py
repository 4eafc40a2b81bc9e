"""`DataLoaders.from_datasets`: torch's DataLoaders with settings that most data sets want."""
import pytest
import torch
from helpers import learner
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from minifast import DataLoaders
from minifast.data import torch_loaders as datasets

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Samples(Dataset):
    def __init__(self, n=70):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((3,), float(i)), torch.ones(1)


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Samples()[i] for i in range(6))


def tensors(n=70):
    return TensorDataset(torch.randn(n, 3), torch.randn(n, 1))


def test_training_is_shuffled_and_validation_is_not():
    dls = DataLoaders.from_datasets(tensors(), tensors(20), batch_size=16)
    assert (type(dls.train.sampler), type(dls.valid.sampler)) == (RandomSampler, SequentialSampler)
    assert (type(dls.train), dls.train.batch_size, dls.valid.batch_size) == (DataLoader, 16, 16)
    assert DataLoaders.from_datasets(tensors()).valid is None
    learn = learner()
    learn.dls = dls
    learn.fit(0.01)
    assert len(learn.recorder.losses) == 5


def test_an_empty_data_set_is_refused_by_name():
    with pytest.raises(ValueError, match="valid is empty"):
        DataLoaders.from_datasets(tensors(), Samples(0))


def test_several_validation_sets():
    dls = DataLoaders.from_datasets(tensors(), {"a": tensors(4), "b": Samples(5)}, num_workers=0)
    assert {name: len(loader.dataset) for name, loader in dls.valid.items()} == {"a": 4, "b": 5}


@pytest.mark.parametrize(("n", "size", "seen"), [(65, 64, 64), (64, 64, 64), (1, 64, 1), (3, 1, 3), (66, 64, 66)])
def test_a_last_batch_of_one_is_left_out_of_training_only(n, size, seen):
    dls = DataLoaders.from_datasets(tensors(n), tensors(n), batch_size=size)
    assert sum(len(y) for _, y in dls.train) == seen
    assert sum(len(y) for _, y in dls.valid) == n
    if n > size > 1:
        learn = learner(model=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        learn.dls = dls
        learn.fit(0.01)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # as this machine has fewer CPUs
@pytest.mark.parametrize(("dataset", "cpus", "method", "workers"), [
    (Samples(), 4, "fork", 3), (Samples(), 1, "fork", 0), (Samples(), 64, "fork", 8), (Samples(), 4, "spawn", 0),
    (tensors(), 4, "fork", 0), (Subset(tensors(), [1, 2]), 4, "fork", 0), ([Samples()[0]] * 3, 4, "fork", 0),
    (Subset(Samples(), [1, 2]), 4, "fork", 3), (Stream(), 4, "fork", 0)])
def test_how_many_workers_load_if_nobody_says(monkeypatch, dataset, cpus, method, workers):
    monkeypatch.setattr(datasets, "n_cpus", lambda: cpus)
    monkeypatch.setattr(datasets.multiprocessing, "get_start_method", lambda allow_none: None)
    monkeypatch.setattr(datasets.multiprocessing, "get_all_start_methods", lambda: [method, "spawn"])
    dls = DataLoaders.from_datasets(dataset, prefetch_factor=4)
    assert dls.train.num_workers == workers
    assert dls.train.prefetch_factor == (4 if workers else None)
    assert dls.train.persistent_workers is False
    assert dls.train.pin_memory is torch.cuda.is_available()


def test_what_is_said_is_done():
    dls = DataLoaders.from_datasets(
        Samples(), Samples(8), num_workers=2, shuffle=False, drop_last=True, pin_memory=False, persistent_workers=True,
        collate_fn=len, batch_size=4)
    for loader in (dls.train, dls.valid):
        assert (loader.num_workers, loader.persistent_workers, loader.collate_fn) == (2, True, len)
    assert (dls.train.drop_last, dls.valid.drop_last, type(dls.train.sampler)) == (True, False, SequentialSampler)
    sampler = SequentialSampler(range(5))
    assert DataLoaders.from_datasets(tensors(), tensors(), sampler=sampler).train.sampler is sampler


def test_workers_load():
    dls = DataLoaders.from_datasets(Samples(10), Samples(6), batch_size=4, num_workers=1,
                                    multiprocessing_context="fork")
    assert sorted(x[0].item() for xs, _ in dls.train for x in xs) == list(range(10))
    assert [x[0].item() for xs, _ in dls.valid for x in xs] == list(range(6))


def test_a_stream_is_read_once_and_in_its_order():
    dls = DataLoaders.from_datasets(Stream(), Stream(), batch_size=4)
    assert [x[0].item() for xs, _ in dls.train for x in xs] == list(range(6))


@pytest.mark.table
@pytest.mark.parametrize(("arguments", "options", "error", "said"), [
    ((DataLoader(tensors()),), {}, TypeError, r"train must be a data set, got a DataLoader, .* DataLoaders\(train, v"),
    ((tensors(), {"a": 3}), {}, TypeError, r"valid\['a'\] must be a map-style data set, .*IterableDataset, got 3"),
    ((tensors(), {"a": None}), {}, TypeError, r"valid\['a'\] must be a map-style data set"),
    ((None,), {}, TypeError, r"train must be a map-style data set, .* got None"),
    (("data",), {}, TypeError, r"train must be a map-style data set, .* got 'data'"),
    (((torch.ones(2), torch.ones(2)),), {}, TypeError, r"got a tuple of 2 arrays. Pass TensorDataset\(\*tensors\)"),
    ((tensors(),), {"batch_size": 0}, ValueError, r"batch_size must be an int >= 1, got 0"),
    ((tensors(),), {"num_workers": -1}, ValueError, r"num_workers must be an int >= 0, got -1"),
    ((tensors(),), {"shuffle": 1}, TypeError, r"shuffle must be True or False, got 1"),
    ((tensors(),), {"btach_size": 4}, TypeError, r"there is no argument btach_size. from_datasets takes batch_size"),
    ((tensors(),), {"batch_sampler": [[1]]}, ValueError, r"batch_sampler says what batch_size and shuffle say"),
])
def test_what_is_refused(arguments, options, error, said):
    with pytest.raises(error, match=said):
        DataLoaders.from_datasets(*arguments, **options)
