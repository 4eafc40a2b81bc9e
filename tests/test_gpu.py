"""What only a CUDA device can show. Skipped where there is none."""
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import (
    EMA,
    SWA,
    ActivationStats,
    AutoMicrobatch,
    Callback,
    ChannelsLast,
    CutMix,
    DataLoaders,
    GradientClip,
    GradientStats,
    Learner,
    MixedPrecision,
    MixUp,
    TensorLoader,
    Unfreeze,
    accuracy,
)

pytestmark = pytest.mark.gpu


def make(device="cuda", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                          nn.Linear(128, 10))
    data = TensorDataset(torch.randn(200, 1, 8, 8), torch.randint(0, 10, (200,)))
    dls = DataLoaders(DataLoader(data, 32, shuffle=True), DataLoader(data, 64))
    return Learner(model, dls, nn.CrossEntropyLoss(), metrics=[accuracy], device=device, verbose=False, **options)


def test_the_accelerator_is_the_default_device():
    assert make(device=None).device.type == "cuda"


def test_a_fit_moves_model_and_batches():
    class Watch(Callback):
        def after_loss(self, state):
            assert state.loss.is_cuda
            assert state.target.is_cuda

    learn = make(callbacks=[Watch()])
    learn.fit_one_cycle(3, 0.02)
    assert learn.recorder.losses.shape == (21,)
    assert learn.recorder.epochs[-1]["train_loss"] < learn.recorder.epochs[0]["train_loss"]
    preds, targets = learn.get_preds()
    assert preds.device.type == targets.device.type == "cpu"


def test_the_optimizer_is_fused():
    assert make().opt.defaults["fused"] is True


def test_lr_find_leaves_no_trace_on_the_device():
    torch.use_deterministic_algorithms(False)
    learn = make()
    learn.fit(0.01, 1)
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    moments = [value.clone() for state in learn.opt.state.values() for value in state.values()]
    generator = torch.cuda.get_rng_state()
    learn.lr_find()
    assert all(torch.equal(before[name], value) for name, value in learn.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in
               zip(moments, (v for s in learn.opt.state.values() for v in s.values()), strict=True))
    assert torch.equal(generator, torch.cuda.get_rng_state())


class NoSync(Callback):
    """torch raises where a synchronizing call is made between the first step of an epoch and its end."""

    order = -1  # before the Recorder, which may read its losses once the epoch is trained

    def after_step(self, state):
        torch.cuda.set_sync_debug_mode("error")

    def before_validate(self, state):
        torch.cuda.set_sync_debug_mode("default")

    def after_fit(self, state):
        torch.cuda.set_sync_debug_mode("default")


UNWAITING = {
    "none": lambda: [],
    "bf16": lambda: [MixedPrecision("bf16")],
    "clip norm": lambda: [GradientClip(norm=0.1)],
    "clip value": lambda: [GradientClip(value=0.1)],
    "EMA": lambda: [EMA(0.9)],
    "SWA": lambda: [SWA(0.2, every=2)],
    "MixUp": lambda: [MixUp(num_classes=10)],
    "CutMix": lambda: [CutMix(num_classes=10)],
    "channels last": lambda: [ChannelsLast()],
    "Unfreeze": lambda: [Unfreeze({"0": 0.5})],
    "ActivationStats": lambda: [ActivationStats()],
    "GradientStats": lambda: [GradientStats()],
    "several": lambda: [MixedPrecision("bf16"), ChannelsLast(), GradientClip(norm=0.1), EMA(0.9)],
}


@pytest.mark.parametrize("callbacks", UNWAITING.values(), ids=UNWAITING)
def test_nothing_in_the_hot_path_waits_for_the_device(callbacks):
    learn = make(callbacks=[NoSync(), *callbacks()], train_metrics=True)
    x, y = torch.randn(320, 1, 8, 8, device="cuda"), torch.randint(0, 10, (320,), device="cuda")
    learn.dls = DataLoaders(TensorLoader(x, y, batch_size=32), [(x, y)])
    learn.fit_one_cycle(1, 0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_about_as_well(precision):
    plain, mixed = make(), make(callbacks=[MixedPrecision(precision)])
    for learn in (plain, mixed):
        learn.fit_one_cycle(4, 0.02)
    assert mixed.recorder.epochs[-1]["train_loss"] < 1.2 * plain.recorder.epochs[-1]["train_loss"]
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}


def test_a_batch_that_does_not_fit_is_halved():
    """Real memory: 4 GB of activations for the whole batch where 3 GB are allowed."""

    class Hungry(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x.expand(-1, 2**26).sigmoid() * self.weight).mean(1)

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        x = torch.linspace(0, 1, 8).unsqueeze(1)
        learn = Learner(Hungry(), ([(x, torch.zeros(8))], None), nn.MSELoss(), device="cuda", verbose=False)
        callback = AutoMicrobatch()
        learn.fit(0.1, callbacks=[callback])
        assert callback.current_size in (1, 2, 4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_tensor_loader_gathers_on_the_device():
    loader = TensorLoader(torch.arange(10.), batch_size=4, shuffle=True, device="cuda")
    assert sorted(value for (batch,) in loader for value in batch.tolist()) == list(range(10))
