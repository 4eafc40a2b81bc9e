"""Batches that are copied to a CUDA device beside its work are the same batches. Skipped where there is none."""
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from minifast import Callback, Learner, TensorLoader
from minifast.data import feed as module
from minifast.data.feed import feed
from minifast.machine.signals import DeferredInterrupt

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]
WIDTH = 256
OVERLAP = {"beside": 0, "large ones beside": module.WORTH, "in line": float("inf")}


class Samples(Dataset):
    """200 samples; those that are drawn in the process that trains draw from its random generator."""

    def __len__(self):
        return 200

    def __getitem__(self, i):
        return torch.full((WIDTH,), float(i)) + torch.randn(WIDTH), torch.tensor([float(i % 7)])


def with_random(**options):
    return DataLoader(Samples(), 20, shuffle=True, **options)


LOADERS = {
    "in this process": with_random,
    "in this process, pinned": lambda: with_random(pin_memory=True),
    "workers": lambda: with_random(num_workers=2),
    "workers, pinned": lambda: with_random(num_workers=2, pin_memory=True),
    "a list": lambda: list(DataLoader(Samples(), 20)),
    "pinned, one buffer after the other": lambda: (batch for batch in with_random(pin_memory=True)),
    "on the device": lambda: TensorLoader(*TensorDataset(torch.randn(200, WIDTH), torch.randn(200, 1)).tensors,
                                          batch_size=20, shuffle=True, device="cuda"),
}


class Busy(Callback):
    """Keeps the device busy between having a batch and using it, and frees and takes memory of a batch's size."""

    def before_batch(self, state):
        x = torch.randn(2048, 2048, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        for _ in range(20):
            x = x @ x / 2048
        state.batch = (state.batch[0] + 0 * x[0, 0], state.batch[1])


def trained(make, worth, monkeypatch, **options):
    """Weights, losses and the state of the random generator after a fit."""
    monkeypatch.setattr(module, "WORTH", worth)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
    learn = Learner(model, (make(), None), nn.MSELoss(), device="cuda", verbose=False, callbacks=[Busy()])
    learn.fit(1e-3, 1, **options)
    return [*(p.detach().cpu() for p in model.parameters()), torch.tensor(learn.recorder.losses.tolist()),
            torch.get_rng_state(), torch.cuda.get_rng_state()]


@pytest.mark.parametrize("options", [{}, {"steps_per_epoch": 4}, {"accumulate": 3}], ids=str)
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_a_fit_is_the_same_bit_for_bit(make, options, monkeypatch):
    if make is LOADERS["pinned, one buffer after the other"]:  # it has no length
        options = {"steps_per_epoch": 3} | options
    in_line = trained(make, OVERLAP["in line"], monkeypatch, **options)
    for name in ("beside", "large ones beside"):
        other = trained(make, OVERLAP[name], monkeypatch, **options)
        assert all(torch.equal(a, b) for a, b in zip(in_line, other, strict=True)), name


@dataclass
class Record:
    x: torch.Tensor
    y: list


def walk(nest):
    """Tensors of a nest, and those of what moves itself."""
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, dict):
        for value in nest.values():
            yield from walk(value)
    elif isinstance(nest, Record):
        yield from walk([nest.x, nest.y])
    elif isinstance(nest, (list, tuple)):
        for value in nest:
            yield from walk(value)


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("worth", OVERLAP.values(), ids=OVERLAP)
def test_nests_arrive_whole_however_long_the_device_is_busy(worth, is_pinned, monkeypatch):
    monkeypatch.setattr(module, "WORTH", worth)
    make = torch.Tensor.pin_memory if is_pinned else torch.Tensor.clone

    def nests():
        for i in range(30):
            x = make(torch.full((300, 300), float(i)))
            yield {"a": x, "b": [x.T, (x[::2], Record(x[:, ::3], ["text", x]))], "c": torch.tensor(i),
                   "on it": torch.full((5,), float(i), device="cuda"), "sparse": x.to_sparse(),
                   "packed": pack_sequence([torch.full((4, 3), float(i))])}

    sums, heat = [], torch.randn(2048, 2048, device="cuda") / 50
    with closing(feed(nests(), torch.device("cuda"), None, DeferredInterrupt())) as fed:
        for nest in fed:
            for _ in range(10):
                heat = heat @ heat / 50
            found = list(walk({k: v for k, v in nest.items() if k not in ("packed", "sparse")}))
            assert all(tensor.is_cuda for tensor in (*found, nest["packed"].data, nest["sparse"]))
            sums.append(torch.stack([tensor.double().mean() for tensor in (*found, nest["packed"].data)]))
            del nest, found  # their memory may serve the next copy, once the sums are done
    got = torch.stack(sums).cpu()
    assert torch.equal(got, torch.arange(30.0, dtype=torch.float64).unsqueeze(1).expand_as(got))


def test_the_current_stream_may_be_another_one(monkeypatch):
    monkeypatch.setattr(module, "WORTH", 0)
    stream, sums = torch.cuda.Stream(), []
    with torch.cuda.stream(stream), closing(feed((torch.full((1000, 1000), float(i)).pin_memory() for i in range(20)),
                                                 torch.device("cuda"), None, DeferredInterrupt())) as fed:
        for x in fed:
            assert torch.cuda.current_stream() == stream
            sums.append(x.mean())
    stream.synchronize()
    assert [value.item() for value in sums] == list(range(20))


def test_the_copies_do_not_queue_behind_the_computation(monkeypatch):
    """The copy of a pinned batch is done while the device still works on what was launched before it."""
    monkeypatch.setattr(module, "WORTH", 0)
    source = [torch.ones(1000, 1000).pin_memory() for _ in range(2)]
    side = module.SideStream(torch.device("cuda"))
    side(source[0])  # memory is taken, kernels are loaded
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    moved = side(source[1])
    side._stream.synchronize()
    assert side.has_work()
    torch.cuda.synchronize()
    assert not side.has_work()
    assert torch.equal(moved.cpu(), source[1])


@pytest.mark.parametrize("worth", OVERLAP.values(), ids=OVERLAP)
def test_an_error_of_the_loader_is_told_and_the_learner_goes_on(worth, monkeypatch):
    monkeypatch.setattr(module, "WORTH", worth)

    class Broken(Samples):
        def __getitem__(self, i):
            if i == 50:
                raise OSError("cannot be read")
            return super().__getitem__(i)

    loader = DataLoader(Broken(), 20, num_workers=2, pin_memory=True)
    learn = Learner(nn.Linear(WIDTH, 1), (loader, None), nn.MSELoss(), device="cuda", verbose=False)
    with pytest.raises(OSError, match="cannot be read") as caught:
        learn.fit(1e-4, 1)
    assert "while loading batch 2 of epoch 0, training data (DataLoader)" in caught.value.__notes__
    learn.dls = (with_random(pin_memory=True), None)
    learn.fit(1e-4, 1)
    assert len(learn.recorder.losses) == 10


def test_nothing_waits(monkeypatch):
    """torch raises at a call that waits for the device."""
    monkeypatch.setattr(module, "WORTH", 0)
    batches = [(torch.randn(64, WIDTH).pin_memory(), torch.randn(64, 1).pin_memory()) for _ in range(5)]
    with closing(feed(batches, torch.device("cuda"), None, DeferredInterrupt())) as fed:
        next(fed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x, y in fed:
                (x.mean() + y.mean()).exp_()
        finally:
            torch.cuda.set_sync_debug_mode("default")
