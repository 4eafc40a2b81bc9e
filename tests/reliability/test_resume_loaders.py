"""The data goes on where it was: every kind of loader is exact, or says in one warning that it is not."""
import random
import warnings

import numpy as np
import pytest
import torch
from helpers import everything, tiers
from resuming import Images, data, every_step, learner, noise, outcome, same, tensors, uninterrupted
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from minifast import DataLoaders, TensorLoader

pytestmark = pytest.mark.usefixtures("quick_disk")

N, PER_EPOCH, EPOCHS = 24, 6, 3


def fit(learn, callbacks, resume, **options):
    learn.fit_one_cycle(EPOCHS, 0.01, callbacks=callbacks, resume=resume, **options)


def loader(dataset=None, **options):
    return DataLoader(Images(N) if dataset is None else dataset, **{"batch_size": 4} | options)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


class DrawsAtOnce(Sampler):
    """A sampler of the user's that makes its order when the pass begins."""

    def __iter__(self):
        return iter(torch.randperm(N).tolist())

    def __len__(self):
        return N


class DrawsLazily(DrawsAtOnce):
    """One that draws an index at a time from the global generator."""

    def __iter__(self):
        for _ in range(N):
            yield int(torch.randint(N, ()))


class CountsEpochs(DrawsAtOnce):
    """One whose order is a function of how often it was begun: it remembers what no one can ask for."""

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(N, generator=generator(self.epoch)).tolist())


class CountsEnds(CountsEpochs):
    """One that counts the passes that came to their end."""

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        yield from torch.randperm(N, generator=generator(self.epoch)).tolist()
        self.epoch += 1


class Stream(IterableDataset):
    """The same samples in each pass."""

    def __iter__(self):
        return iter(zip(*tensors(N), strict=True))

    def __len__(self):
        return N


class RandomStream(Stream):
    def __iter__(self):
        return map(noise, super().__iter__())


class Tape(IterableDataset):
    """A stream that goes on where the last pass ended: a hidden state."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        x, y = tensors(10 * N)
        for _ in range(N):
            self.at += 1
            yield x[self.at], y[self.at]

    def __len__(self):
        return N


class Own(DataLoader):
    """A subclass with an iteration of its own."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x * 2, y


class Stateful:
    """As torchdata's StatefulDataLoader: a state that is loaded is used by the next `iter()`, and by no other."""

    def __init__(self):
        self.x, self.y = tensors(N)
        self.epoch, self.n_given, self.is_over, self.next_state = 0, 0, False, None

    def __len__(self):
        return PER_EPOCH

    def __iter__(self):
        if self.next_state is not None and not self.next_state["is_over"]:
            self.epoch, self.n_given = self.next_state["epoch"], self.next_state["n_given"]
        elif self.next_state is not None:
            self.epoch, self.n_given = self.next_state["epoch"] + 1, 0
        else:
            self.epoch, self.n_given = self.epoch + 1, 0
        self.next_state, self.is_over = None, False
        return self._pass(self.epoch)

    def _pass(self, epoch):
        order = torch.randperm(N, generator=generator(epoch))
        while self.n_given < PER_EPOCH:
            rows = order[self.n_given * 4:self.n_given * 4 + 4]
            self.n_given += 1
            yield self.x[rows], self.y[rows]
        self.is_over = True

    def state_dict(self):
        return {"epoch": self.epoch, "n_given": self.n_given, "is_over": self.is_over}

    def load_state_dict(self, state):
        self.next_state = dict(state)


class Dicts(Images):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return {"input": x, "labels": y}


def dict_noise(batch):
    x, y = noise((batch["input"], batch["labels"]))
    return {"input": x, "labels": y}


class OwnNoise(Images):
    """Augmentation from generators of the data set's own."""

    def __init__(self):
        super().__init__(N, is_random=False)
        self.torch, self.numpy, self.python = generator(), np.random.default_rng(3), random.Random(4)

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn((), generator=self.torch) * 0.1 + self.numpy.random() * 0.1 + self.python.random(), y


class Jitter:
    """A transform with a generator of its own, as a data set holds one."""

    def __init__(self):
        self.numpy = np.random.default_rng(3)

    def __call__(self, batch):
        x, y = batch
        return x + self.numpy.random() * 0.1, y


class Transformed(Images):
    def __init__(self, transforms):
        super().__init__(N, is_random=False)
        self.transforms = transforms

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        for transform in self.transforms:
            sample = transform(sample)
        return sample


PLAIN = TensorDataset(*tensors(N))
EXACT = {
    "tensors": lambda: data().train,
    "tensors in order": lambda: data(shuffle=False).train,
    "tensors, own generator": lambda: data(generator=generator()).train,
    "tensors, transform with a generator": lambda: data(transform=Jitter()).train,
    "tensors, a shard": lambda: TensorLoader(*tensors(48), batch_size=4, shuffle=True, transform=noise,
                                             generator=generator()).shard(1, 2),
    "data set in memory": lambda: DataLoaders.in_memory(Images(N, is_random=False), batch_size=4, transform=noise,
                                                        verbose=False).train,
    "data set in memory, of dicts": lambda: DataLoaders.in_memory(
        [{"input": x, "labels": y} for x, y in zip(*tensors(N), strict=True)], batch_size=4, verbose=False,
        transform=dict_noise, generator=generator()).train,
    "list": lambda: list(DataLoader(PLAIN, batch_size=4)),
    "tuple": lambda: tuple(DataLoader(PLAIN, batch_size=4)),
    "in the main process": lambda: loader(shuffle=True),
    "in the main process, own generator": lambda: loader(shuffle=True, generator=generator()),
    "data set with generators": lambda: loader(OwnNoise(), shuffle=True),
    "transforms with generators": lambda: loader(Transformed([Jitter()]), shuffle=True),
    "with replacement": lambda: loader(sampler=RandomSampler(PLAIN, replacement=True)),
    "with replacement, own generator": lambda: loader(sampler=RandomSampler(PLAIN, True, generator=generator())),
    "more than there are": lambda: loader(TensorDataset(*tensors(10)), sampler=RandomSampler(
        range(10), num_samples=N, generator=generator())),
    "weighted": lambda: loader(sampler=WeightedRandomSampler([1.0, 2.0] * 12, N)),
    "subset": lambda: loader(Images(30), sampler=SubsetRandomSampler(range(3, 27))),
    "subset, own generator": lambda: loader(Images(30), sampler=SubsetRandomSampler(range(3, 27), generator())),
    "sequential": lambda: loader(sampler=SequentialSampler(PLAIN)),
    "torch's batch sampler": lambda: loader(batch_size=1, batch_sampler=BatchSampler(RandomSampler(PLAIN), 4, False)),
    "own sampler at once": lambda: loader(PLAIN, sampler=DrawsAtOnce()),
    "own batch sampler": lambda: loader(PLAIN, batch_size=1, batch_sampler=Batches()),
    "stream": lambda: loader(Stream()),
    "subclass": lambda: Own(PLAIN, batch_size=4, shuffle=True),
    "drop last": lambda: loader(Images(26), shuffle=True, drop_last=True),
    "ragged": lambda: loader(Images(22), shuffle=True),
    "with a state": Stateful,
    "dicts": lambda: loader(Dicts(N), shuffle=True),
}  # fmt: skip


class Batches(BatchSampler):
    """A batch sampler of the user's."""

    def __init__(self):
        super().__init__(DrawsAtOnce(), 4, False)


# What draws from the global generators while the pass goes on, as dropout does, cannot be begun again and come to the
# same batches; behind the first one it may.
DOUBTFUL = {
    "own sampler, lazy": lambda: loader(PLAIN, sampler=DrawsLazily()),
    "own sampler, random data": lambda: loader(sampler=DrawsAtOnce()),
    "counts epochs": lambda: loader(PLAIN, sampler=CountsEpochs()),
    "counts ends": lambda: loader(PLAIN, sampler=CountsEnds()),
    "random stream": lambda: loader(RandomStream()),
    "tape": lambda: loader(Tape()),
}
WORKERS = {
    "two": lambda: loader(shuffle=True, num_workers=2),
    "two, own generator": lambda: loader(shuffle=True, num_workers=2, generator=generator()),
    "two, own sampler": lambda: loader(sampler=DrawsAtOnce(), num_workers=2),
    "two, stream": lambda: loader(RandomStream(), num_workers=1),
}


def make(train, **options):
    return learner(DataLoaders(train(), data().valid), unpack=unpack, **options)


def unpack(batch):
    return (batch["input"], batch["labels"]) if isinstance(batch, dict) else batch


def resumed(learn, file, **options):
    """Go on from `file`; gives the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(learn, [], file, **options)
    return [str(warning.message) for warning in caught]


def checkpoints(tmp_path, learn, **options):
    fit(learn, [every_step(tmp_path, **options)], "auto")
    return sorted((tmp_path / "fit-1").glob("step-*.ckpt"))


SOME = (1, 3, 5, 6, 7, 11, 12, 17)  # steps: early and late in an epoch, its last batch


@pytest.mark.parametrize("name", tiers(EXACT, quick=[
    "tensors, transform with a generator", "data set in memory, of dicts", "list", "in the main process, own generator",
    "data set with generators", "weighted", "own batch sampler", "stream", "ragged", "with a state"]))
def test_exact(tmp_path, name):
    reference = uninterrupted(fit, make(EXACT[name]))
    files = checkpoints(tmp_path, make(EXACT[name]))
    for n in SOME:
        learn = make(EXACT[name])
        assert resumed(learn, files[n - 1]) == []
        assert same(learn, reference) == EPOCHS * PER_EPOCH - n


@pytest.mark.parametrize("name", DOUBTFUL)
def test_exact_or_it_warns(tmp_path, name):
    reference = uninterrupted(fit, make(DOUBTFUL[name]))
    silent = []
    for n, file in enumerate(checkpoints(tmp_path, make(DOUBTFUL[name]))[:-1], 1):
        learn = make(DOUBTFUL[name])
        said = resumed(learn, file)
        assert len(said) <= 1
        if not said:
            same(learn, reference)
            silent.append(n)
    assert 1 in silent
    assert len(silent) < 3 * PER_EPOCH - 1, "and so it is exact"


@pytest.mark.nightly
@pytest.mark.parametrize("name", EXACT | DOUBTFUL)
@pytest.mark.case("S4")
def test_after_an_epoch(tmp_path, name):
    make_loader = (EXACT | DOUBTFUL)[name]
    reference = uninterrupted(fit, make(make_loader))
    files = checkpoints(tmp_path, make(make_loader), every_seconds=1e-9)
    for n in (6, 12):
        learn = make(make_loader)
        said = resumed(learn, files[n - 1])
        if name in ("counts epochs", "counts ends", "tape") and n == 12:
            assert len(said) == 1
            assert "gives other batches when its pass is begun again" in said[0]
        else:
            assert said == []
            same(learn, reference)


@pytest.mark.nightly
@pytest.mark.parametrize("name", WORKERS)
def test_exact_with_worker_processes(tmp_path, name):
    reference = uninterrupted(fit, make(WORKERS[name]))
    files = checkpoints(tmp_path, make(WORKERS[name]))
    for n in (1, 4, 6, 7, 11, 12):
        learn = make(WORKERS[name])
        assert resumed(learn, files[n - 1]) == []
        same(learn, reference)


@pytest.mark.nightly
@pytest.mark.parametrize("when", ["within epochs", "after epochs"])
def test_persistent_workers_are_exact_in_their_first_pass_and_warn_later(tmp_path, when):
    reference = uninterrupted(fit, make(persistent))
    options = {"every_seconds": 1e-9} if when == "after epochs" else {}
    files = checkpoints(tmp_path, make(persistent), **options)
    for n in (2, 5, 6, 8, 12):
        learn = make(persistent)
        said = resumed(learn, files[n - 1])
        if n <= PER_EPOCH:
            assert said == []
            same(learn, reference)
        else:
            assert len(said) == 1
            assert "persist" in said[0] or "other batches" in said[0]


@pytest.mark.nightly
def test_persistent_workers_are_exact_in_every_pass_where_the_data_is_not_random(tmp_path):
    def steady():
        return DataLoader(Images(24, is_random=False), 4, shuffle=True, num_workers=2, persistent_workers=True)

    reference = uninterrupted(fit, make(steady))
    files = checkpoints(tmp_path, make(steady))
    for n in (5, 8, 12):
        learn = make(steady)
        assert ["persist" in text for text in resumed(learn, files[n - 1])] == [True] * (n > PER_EPOCH)
        same(learn, reference)


@pytest.mark.nightly
def test_persistent_workers_of_the_validation_set_are_where_they_were(tmp_path):
    """Their first pass draws a number more than later ones, from the generator that shuffles the training data."""
    def both():
        valid = DataLoader(Images(8, is_random=False), 4, num_workers=1, persistent_workers=True)
        return DataLoaders(TensorLoader(*tensors(24), batch_size=4, shuffle=True), valid)

    reference = uninterrupted(fit, learner(both()))
    files = checkpoints(tmp_path, learner(both()))
    for n in (5, 8):
        learn = learner(both())
        assert resumed(learn, files[n - 1]) == []
        same(learn, reference)


def persistent():
    return loader(shuffle=True, num_workers=2, persistent_workers=True)


@pytest.mark.nightly
@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("workers", [(2, 0), (0, 2)])
def test_other_worker_processes_go_on_with_a_warning(tmp_path, is_random, workers):
    """Without random data the batches are the same ones, with random data augmented by other numbers."""
    then, now = ((lambda n=n: loader(Images(N, is_random), shuffle=True, num_workers=n)) for n in workers)
    reference = uninterrupted(fit, make(then))
    learn = make(now)
    said = resumed(learn, checkpoints(tmp_path, make(then))[7])
    assert f"worker processes {workers[0]} then, {workers[1]} now" in said[0]
    if not is_random:
        same(learn, reference)
    assert len(said) == 1 + (is_random and workers == (0, 2))


@pytest.mark.table
@pytest.mark.parametrize("name", ["with a state", "tensors", "own sampler at once", "stream", "tape",
                                  "in the main process, own generator"])
@pytest.mark.parametrize("every_seconds", [None, 1e-9])
def test_epochs_that_end_before_their_loader(tmp_path, name, every_seconds):
    make_loader = (EXACT | DOUBTFUL)[name]

    def fit_short(learn, callbacks, resume):
        fit(learn, callbacks, resume, steps_per_epoch=4)

    reference = uninterrupted(fit_short, make(make_loader))
    fit_short(make(make_loader), [every_step(tmp_path, every_seconds=every_seconds)], "auto")
    files = sorted((tmp_path / "fit-1").glob("step-*.ckpt"))
    for n in (2, 4, 5, 8):
        learn = make(make_loader)
        said = resumed(learn, files[n - 1], steps_per_epoch=4)
        if name == "tape" and n > 4:
            assert len(said) == 1
        else:
            assert said == []
            same(learn, reference)


def test_a_generator_of_batches_is_drawn_again(tmp_path):
    def one_pass():
        return iter([(x + 0.1 * torch.rand(()), y) for x, y in list(data(shuffle=False, transform=None).train)])

    def fit_once(learn, callbacks, resume):
        learn.fit(0.01, 1, callbacks=callbacks, resume=resume, steps_per_epoch=5)

    torch.manual_seed(3)
    reference = uninterrupted(fit_once, make(one_pass))
    torch.manual_seed(3)
    fit_once(make(one_pass), [every_step(tmp_path)], "auto")
    for file in sorted((tmp_path / "fit-1").glob("step-*.ckpt"))[:4]:
        torch.manual_seed(3)
        learn = make(one_pass)
        fit_once(learn, [], file)
        same(learn, reference)
    other = make(lambda: iter(list(data(shuffle=False).train)[::-1]))
    with pytest.warns(UserWarning, match="rest of this last epoch, behind batch 1, comes from a new pass"):
        fit_once(other, [], sorted((tmp_path / "fit-1").glob("step-*.ckpt"))[1])


@pytest.mark.parametrize("every_seconds", [None, 1e-9])
def test_validation_data_that_shuffles_and_several_of_them(tmp_path, every_seconds):
    def make_sets():
        x, y = tensors(8, 1)
        return learner(DataLoaders(data().train, {
            "own": TensorLoader(x, y, batch_size=4, shuffle=True, generator=generator()),
            "global": DataLoader(Images(8), batch_size=4, shuffle=True)}))  # fmt: skip

    reference = uninterrupted(fit, make_sets())
    fit(make_sets(), [every_step(tmp_path, every_seconds=every_seconds)], "auto")
    files = sorted((tmp_path / "fit-1").glob("step-*.ckpt"))
    for n in SOME:
        learn = make_sets()
        assert resumed(learn, files[n - 1]) == []
        same(learn, reference)


@pytest.mark.parametrize("name", ["tensors", "tape", "with a state", "in the main process, own generator"])
def test_the_fit_after_one_that_was_resumed_has_the_same_data(tmp_path, name):
    def fit_twice(learn, callbacks, resume):
        fit(learn, callbacks, resume)
        learn.fit(0.01, 1)

    make_loader = (EXACT | DOUBTFUL)[name]
    reference = uninterrupted(fit_twice, make(make_loader))
    files = checkpoints(tmp_path, make(make_loader))
    learn = make(make_loader)
    assert resumed(learn, files[4]) == []
    learn.fit(0.01, 1)
    assert outcome(learn) == reference["outcome"]


def test_pinned_memory(tmp_path):
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    reference = uninterrupted(fit, make(lambda: loader(shuffle=True, pin_memory=True)))
    files = checkpoints(tmp_path, make(lambda: loader(shuffle=True, pin_memory=True)))
    learn = make(lambda: loader(shuffle=True, pin_memory=True))
    fit(learn, [], files[8])
    same(learn, reference)


def test_a_loader_that_fails_on_the_way_says_so_and_changes_nothing(tmp_path):
    class Broken(DrawsAtOnce):
        def __iter__(self):
            yield 0
            yield 1
            raise OSError("the disk is gone")

    Broken.__name__ = "DrawsAtOnce"  # another sampler would be refused before
    files = checkpoints(tmp_path, make(lambda: loader(PLAIN, sampler=DrawsAtOnce())))
    learn = make(lambda: loader(PLAIN, sampler=Broken()))
    before = everything(learn)
    with pytest.raises(OSError, match="the disk is gone"):
        fit(learn, [], files[7])
    assert everything(learn) == before
