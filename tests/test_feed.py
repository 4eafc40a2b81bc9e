"""How batches are handed out: when they are drawn, where they are copied, how long they were waited for."""
import re
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from helpers import batches, learner
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from minifast import TensorLoader
from minifast.data import feed as module
from minifast.data.feed import feed
from minifast.data.waiting import SECONDS, Waiting, notice, remedies
from minifast.machine.signals import DeferredInterrupt

CPU, META = torch.device("cpu"), torch.device("meta")


def fed(loader, device=CPU, limit=None, **options):
    return closing(feed(loader, device, limit, DeferredInterrupt(), **options))


# ---- when a batch is drawn


@pytest.mark.table
@pytest.mark.parametrize("device", [CPU, META, torch.device("cuda")])
@pytest.mark.parametrize("limit", [None, 2])
def test_a_batch_is_drawn_when_it_is_asked_for_and_none_behind_the_limit(monkeypatch, device, limit):
    monkeypatch.setattr(module, "SideStream", Side)
    log = []

    def drawn():
        for i in range(3):
            log.append(f"drawn {i}")
            yield torch.tensor(i)

    loader = drawn()
    with fed(loader, device, limit) as it:
        for i, _ in enumerate(it):
            log.append(f"used {i}")
    n = limit or 3
    assert log == [f"{what} {i}" for i in range(n) for what in ("drawn", "used")]
    assert len(list(loader)) == 3 - n


def test_behind_the_limit_no_pass_is_begun():
    class Loader:
        def __iter__(self):
            raise AssertionError

    with fed(Loader(), limit=2, first=2) as it:
        assert list(it) == []


class Side:
    """In place of a `SideStream`: batches stay where they are, and the device is as busy as `is_busy` says."""

    is_busy, error = False, None

    def __init__(self, device):
        pass

    def __call__(self, batch):
        if self.error:
            raise self.error
        return batch

    def has_work(self):
        return self.is_busy


def test_an_error_of_the_copy_is_its_own_and_ends_the_pass(monkeypatch):
    monkeypatch.setattr(module, "SideStream", Side)
    monkeypatch.setattr(Side, "error", RuntimeError("no memory"))
    ended = []

    class Loader:
        def __iter__(self):
            it = SimpleNamespace(_shutdown_workers=lambda: ended.append(True))
            return type("It", (), {"__iter__": lambda _: _, "__next__": lambda _: torch.ones(1),
                                   "_shutdown_workers": lambda _: it._shutdown_workers()})()

    with fed(Loader(), torch.device("cuda")) as it, pytest.raises(RuntimeError, match="no memory") as caught:
        next(it)
    assert ended == [True]
    assert not hasattr(caught.value, "__notes__")


# ---- where it is copied: the calls, in their order, with the CPU in a GPU's place


@pytest.fixture
def calls(monkeypatch):
    """What a SideStream asks of torch.cuda."""
    log, now = [], ["current"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            now.append(self.name)

        def __exit__(self, *error):
            now.pop()

        def wait_event(self, event):
            log.append(f"{self.name} waits")

    to = torch.Tensor.to

    def noting_to(tensor, *args, **options):
        if "non_blocking" in options:
            log.append(f"{tuple(tensor.shape)} on {now[-1]}")
        return to(tensor, *args, **options)

    current = Stream("current")
    cuda = SimpleNamespace(
        Stream=lambda device: Stream("side"), stream=lambda stream: stream, current_stream=lambda device: current,
        Event=lambda: SimpleNamespace(record=lambda stream: log.append(f"{stream.name} recorded")))
    monkeypatch.setattr(module.torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "to", noting_to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"used on {stream.name}"))
    monkeypatch.setattr(module, "WORTH", 100)
    module._side.cache_clear()
    yield log
    module._side.cache_clear()


def test_large_tensors_go_beside_and_are_waited_for_once(calls):
    big, small = torch.ones(5, 5), torch.ones(4)
    moved = module.SideStream(CPU)({"x": (big, [big.T]), "y": small})
    assert torch.equal(moved["x"][1][0], big)
    one = ["(5, 5) on side", "used on current"]
    assert calls == [*one, *one, "(4,) on current", "side recorded", "current waits"]


def test_what_is_small_or_not_one_piece_of_memory_goes_the_usual_way(calls, monkeypatch):
    side, packed = module.SideStream(CPU), pack_sequence([torch.ones(50)])
    x = torch.ones(5, 5)
    side((x.to_sparse(), nn.Parameter(x), packed, "text"))
    monkeypatch.setattr(module, "WORTH", 101)
    side((x, [x]))
    assert not any("side" in call or "waits" in call for call in calls)


# ---- how long it was waited for


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(module, "perf_counter", lambda: self.now)

    def slow(self, seconds, first=0.0, n=5):
        """A loader that takes `seconds` for each batch, and `first` for the first one."""
        clock = self

        class Loader:
            def __len__(self):
                return n

            def __iter__(self):
                for i in range(n):
                    clock.now += seconds if i else first
                    yield batches(1)[0]

        return Loader()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def passes(clock, loader, work, n=1, device=CPU):
    waiting = Waiting()
    for _ in range(n):
        with fed(loader, device, waiting=waiting) as it:
            for _ in it:
                clock.now += work
    return waiting


def test_the_seconds_of_two_passes(clock):
    """5 batches each: 4 waits of 1 s, 5 s x 3 of work, and a beginning of 7 s that counts in the second pass only."""
    waiting = passes(clock, clock.slow(1.0, first=7.0), 3.0, n=2)
    assert (waiting.waited, waiting.worked, waiting.began, waiting.n_passes) == (8.0, 30.0, 7.0, 2)
    assert waiting.share == 8 / 38
    assert waiting.share_of_beginnings == 7 / 45


@pytest.mark.parametrize(("is_busy", "waited"), [(True, 0.0), (False, 4.0)])
def test_while_the_device_computes_nobody_waits(monkeypatch, clock, is_busy, waited):
    monkeypatch.setattr(module, "SideStream", Side)
    monkeypatch.setattr(Side, "is_busy", is_busy)
    waiting = passes(clock, clock.slow(1.0), 3.0, device=torch.device("cuda"))
    assert (waiting.waited, waiting.worked) == (waited, 15.0 + 4.0 - waited)


def test_nothing_was_waited_for():
    assert (Waiting().share, Waiting().share_of_beginnings, Waiting().is_long) == (0.0, 0.0, False)


@pytest.mark.parametrize(("waited", "worked", "told"), [
    (0.3, 0.7, False), (1.9, 8.1, False), (2.0, 8.0, True), (SECONDS, 0.0, True)])
def test_when_it_is_told(waited, worked, told):
    loader = DataLoader(TensorDataset(torch.ones(3, 1)))
    assert Waiting(waited, worked).is_long is told
    assert bool(notice(Waiting(waited, worked), loader, CPU)) is told


class Pictures(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return torch.ones(1)


@pytest.mark.table
@pytest.mark.parametrize(("loader", "device", "said"), [
    (DataLoader(TensorDataset(torch.ones(3))), CPU, r"^TensorLoader\(\*dataset.tensors\)"),
    (DataLoader(Pictures()), CPU, r"num_workers= has other processes make them; DataLoaders.in_memory\(dataset\)"),
    (DataLoader(Pictures(), num_workers=1), CPU, r"num_workers=1 may be too few for 2 CPUs.*batch_size"),
    (DataLoader(Pictures(), num_workers=2), CPU, r"^make its samples cheaper"),
    (DataLoader(Pictures()), torch.device("cuda"), r"pin_memory=True"),
    (TensorLoader(torch.ones(3)), torch.device("cuda"), r"TensorLoader\(\.\.\., device='cuda'\)"),
    (TensorLoader(torch.ones(3), transform=tuple), CPU, r"its transform"),
    (TensorLoader(torch.ones(3)), CPU, r"^$"),
    ([1], CPU, r"the loader \(list\) makes its batches in this process"),
])
def test_the_advice_fits_the_loader(monkeypatch, loader, device, said):
    monkeypatch.setattr("minifast.data.waiting.n_cpus", lambda: 2)
    assert re.search(said, remedies(loader, device))


@pytest.mark.parametrize(("options", "told"), [({"num_workers": 2}, True), ({}, False),
                                              ({"num_workers": 2, "persistent_workers": True}, False)])
def test_workers_that_start_again_and_again_are_told_of(options, told):
    text = notice(Waiting(0.1, 4.9, began=2.5, n_passes=3), DataLoader(Pictures(), **options), CPU)
    assert ("33 % of the time" in text) == ("persistent_workers=True" in text) == told


@pytest.mark.parametrize("work", [1.0, 10.0])
def test_a_fit_says_it_once(clock, capsys, monkeypatch, work):
    monkeypatch.setattr("minifast.standard.progress.REFRESH", 0.0)
    learn = learner(clock.slow(1.0), batches(1), verbose=True)

    def forward(x):
        clock.now += work
        return nn.functional.linear(x, learn.model.weight, learn.model.bias)

    monkeypatch.setattr(learn.model, "forward", forward)
    learn.fit(0.01, 3)
    lines = [line for line in capsys.readouterr().out.splitlines() if "waits for its data" in line]
    assert len(lines) == (work == 1.0)
    assert all("% of the time: the loader (Loader) makes" in line for line in lines)
    learn.fit(0.01, 3, verbose=False)
    assert capsys.readouterr().out == ""
