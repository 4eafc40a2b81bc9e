"""Data of every kind, in fits that are killed and go on: what is exact, and what is said where it is not."""
import itertools
import logging
import warnings

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, learner, rngs, throw, trained
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from minifast import Checkpoint, OneCycle


def fit(learn, run, *callbacks, n_epochs=2, **options):
    saver = Checkpoint(run, every_steps=1, every_seconds=None)
    learn.fit_one_cycle(n_epochs, 0.05, callbacks=[saver, *callbacks], resume="auto", **options)


def seen(learn):
    """Every batch that the model is trained on from now on."""
    found = []
    learn.model.register_forward_pre_hook(
        lambda module, args: found.append(bits(args[0])) if module.training else None)
    return found


def killed_and_resumed(make, run, after, **options):
    """(batches, result) of a fit that fails after so many batches and goes on in a new learner; and of one that is not.
    """
    whole, first, second = make(), make(), make()
    drawn = [seen(learn) for learn in (whole, first, second)]
    seed()
    fit(whole, run / "whole", **options)
    expected = drawn[0], trained(whole), rngs()
    seed()
    with pytest.raises(ZeroDivisionError):
        fit(first, run / "killed", At("before_batch", throw(ZeroDivisionError), after), **options)
    seed(1)
    fit(second, run / "killed", **options)
    return (drawn[1] + drawn[2], trained(second), rngs()), expected


def seed(value=0):
    torch.manual_seed(value)
    np.random.seed(value)


# ---- lengths


class Shrinks(list):
    """A list that holds fewer batches from the second pass on, and says so or not."""

    def __init__(self, data, length):
        super().__init__(data)
        self.length, self.passes = length, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        self.passes += 1
        return itertools.islice(super().__iter__(), None if self.passes == 1 else 3)


@pytest.mark.case("B7")
def test_a_data_set_that_shrinks_while_it_trains_is_told_at_the_end_of_the_epoch():
    learn = learner(Shrinks(batches(5), 5))
    with pytest.warns(UserWarning, match="yielded 3 batches, but 5 were announced") as caught:
        learn.fit_one_cycle(2, 0.1)
    assert len(caught) == 1
    assert learn.recorder.lrs.tolist() == OneCycle(0.1).values(10)["lr"][:8]


@pytest.mark.case("B7")
@pytest.mark.parametrize("n", [4, 6])
def test_a_data_set_of_another_length_is_not_gone_on_with(tmp_path, n):
    with pytest.raises(ZeroDivisionError):
        fit(learner(batches(5)), tmp_path, At("before_batch", throw(ZeroDivisionError), 7))
    learn = learner(batches(n))
    before = trained(learn)
    says = rf"was made by another fit:\n(.*\n)*  data: .*batches 5 in the checkpoint, {n}"
    with pytest.raises(ValueError, match=says):
        fit(learn, tmp_path)
    assert trained(learn) == before


class Generated:
    """Says that it has five batches; a pass has as many as `n`."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return 5

    def __iter__(self):
        yield from batches(self.n)


@pytest.mark.case("B7")
def test_a_pass_that_has_become_too_short_to_go_on_is_told(tmp_path):
    """The fit was killed after four batches of an epoch; now there are two."""
    with pytest.raises(ZeroDivisionError):
        fit(learner(Generated(5)), tmp_path, At("before_batch", throw(ZeroDivisionError), 4), n_epochs=3)
    learn = learner(Generated(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(learn, tmp_path, n_epochs=3)
    said = [str(warning.message) for warning in caught]
    assert "gives other batches when its pass is begun again, so the rest of epoch 0, behind batch 3, is" in said[0]
    assert "training goes on with the next epoch" in said[0]
    assert [("yielded 2 batches, but 5 were announced" in text) for text in said[1:]] == [True, True]


class Endless(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        while True:
            x = torch.randn(3, generator=generator)
            yield x, x.sum().unsqueeze(0)


ENDLESS = {"generator": lambda: itertools.cycle(batches(3)), "DataLoader": lambda: DataLoader(Endless(), 4)}


@pytest.mark.case("B8")
@pytest.mark.parametrize("kind", ENDLESS)
def test_data_without_an_end_is_trained_on_as_long_as_it_is_told(kind):
    learn = learner(ENDLESS[kind]())
    with pytest.raises(ValueError, match=r"has no len\(\), and a schedule has to know how long it is. Pass steps_per"):
        learn.fit_one_cycle(1, 0.05)
    assert learn.opt.seen == []
    n_epochs = 1 if kind == "generator" else 2  # an iterator is good for one pass
    learn.fit_one_cycle(n_epochs, 0.05, steps_per_epoch=6)
    assert learn.recorder.lrs.tolist() == OneCycle(0.05).values(6 * n_epochs)["lr"]


@pytest.mark.case("B8")
def test_data_without_an_end_goes_on_where_it_was_killed(tmp_path):
    resumed, expected = killed_and_resumed(lambda: learner(DataLoader(Endless(), 4)), tmp_path, 8, steps_per_epoch=6)
    assert resumed == expected


# ---- worker processes


class Augmented(Dataset):
    """Noise by numpy's global generator, as many write it."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return torch.tensor(np.random.rand(3) + i, dtype=torch.float32), torch.ones(1)


def of_workers(persistent=False, data=None):
    return learner(DataLoader(data or Augmented(), 4, shuffle=data is None, num_workers=2,
                              multiprocessing_context="fork", persistent_workers=persistent))


def noise_of(learn, number=0):
    """What was added to the samples of two epochs, by batch."""
    seed(number)
    found = []
    learn.model.register_forward_pre_hook(lambda module, args: found.append((args[0] % 1).flatten().tolist()))
    learn.fit(0.01, 2)
    return found


@pytest.mark.slow
@pytest.mark.case("B9")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_numpy_noise_of_workers_differs_in_each_worker_and_epoch_and_not_between_runs(persistent):
    runs = [noise_of(of_workers(persistent)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 12
    numbers = [round(number, 5) for batch in runs[0] for number in batch]
    assert len(set(numbers)) > 0.97 * len(numbers), "no worker and no epoch repeats another's"
    assert noise_of(of_workers(persistent), 1) != runs[0]


@pytest.mark.slow
@pytest.mark.case("B9")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("after", [2, 6, 9])
def test_numpy_noise_of_workers_goes_on_as_it_would_have(tmp_path, after):
    resumed, expected = killed_and_resumed(of_workers, tmp_path, after)
    assert resumed == expected


class Plain(Augmented):
    """Without noise: nothing shows whether it would go on with other numbers."""

    def __getitem__(self, i):
        return torch.arange(3.0) + i, torch.ones(1)


@pytest.mark.slow
@pytest.mark.case("B13")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("after", "data", "told"), [
    (2, None, None),
    (9, None, "gives other batches when its pass is begun again"),
    (9, Plain, "its worker processes persist over epochs, and their random generators cannot be saved"),
])  # fmt: skip
def test_workers_that_persist_are_exact_in_their_first_pass_and_say_so_later(tmp_path, after, data, told):
    """The state of a worker that lives on cannot be saved: where its noise may differ, that is said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed, expected = killed_and_resumed(lambda: of_workers(True, data and data()), tmp_path, after)
    said = [str(warning.message) for warning in caught if "fork" not in str(warning.message)]
    assert len(said) == (told is not None)
    if told is None:
        assert resumed[0][:6] == expected[0][:6], "the epoch that was under way"
        return
    assert told in said[0]
    assert (resumed == expected) is (data is Plain)


# ---- samplers of one's own


class Backwards(Sampler):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        yield from reversed(range(self.n))


class Numpys(Backwards):
    """Another order in each pass, by numpy's global generator."""

    def __iter__(self):
        yield from np.random.permutation(self.n).tolist()


class Secret(Backwards):
    """Another order in each pass, by what nobody can see."""

    passes = 0

    def __iter__(self):
        Secret.passes += 1
        yield from np.random.default_rng(self.passes).permutation(self.n).tolist()


class Stateful(Backwards):
    """A loader that can say where it is."""

    batch_size, at = 4, 0

    def __init__(self, n):
        super().__init__(n)
        self.dataset = Augmented()

    def __len__(self):
        return self.n // 4

    def __iter__(self):
        begin, self.at = self.at, 0
        for i in range(begin, len(self)):
            self.at = i + 1
            yield torch.full((4, 3), float(i)), torch.ones(4, 1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


OWN = {
    "sampler": lambda: DataLoader(Augmented(), 4, sampler=Backwards(24)),
    "sampler, numpy": lambda: DataLoader(Augmented(), 4, sampler=Numpys(24)),
    "batch sampler": lambda: DataLoader(Augmented(), batch_sampler=[[*range(i, i + 4)] for i in range(0, 24, 4)]),
    "state_dict": lambda: Stateful(24),
}


@pytest.mark.case("B12")
@pytest.mark.parametrize("after", [2, 8])
@pytest.mark.parametrize("kind", OWN)
def test_a_sampler_of_ones_own_is_kept_and_goes_on_exactly(tmp_path, caplog, kind, after):
    caplog.set_level(logging.INFO, "minifast")
    loaders = []

    def make():
        loaders.append(OWN[kind]())
        return learner(loaders[-1])

    sampler = [getattr(OWN[kind](), "batch_sampler", None).__class__, getattr(OWN[kind](), "sampler", None).__class__]
    resumed, expected = killed_and_resumed(make, tmp_path, after)
    assert resumed == expected
    for loader in loaders:
        assert [getattr(loader, name, None).__class__ for name in ("batch_sampler", "sampler")] == sampler
    [said] = [record.getMessage() for record in caplog.records if "resumed" in record.getMessage()]
    assert ("these batches were drawn again and dropped" in said) == (kind != "state_dict")


@pytest.mark.case("B12")
def test_an_order_that_cannot_be_had_again_is_told_and_goes_on_with_the_next_epoch(tmp_path):
    Secret.passes = 0
    with pytest.warns(UserWarning, match="gives other batches when its pass is begun again") as caught:
        resumed, expected = killed_and_resumed(
            lambda: learner(DataLoader(Augmented(), 4, sampler=Secret(24))), tmp_path, 3)
    assert len(caught) == 1
    assert "training goes on with the next epoch. A loader with state_dict() and load_state_dict()" in \
        str(caught[0].message)
    assert len(resumed[0]) == 3 + 6
    assert len(expected[0]) == 12
