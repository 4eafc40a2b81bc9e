"""What only a CUDA device can show. Skipped where there is none."""
import math

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
    FiniteLoss,
    GradientClip,
    GradientStats,
    Learner,
    MixedPrecision,
    MixUp,
    NonFiniteGradient,
    NonFiniteLoss,
    TensorLoader,
    Unfreeze,
    accuracy,
)
from minifast.standard import finite

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
def test_nothing_in_the_hot_path_waits_for_the_device(callbacks, monkeypatch):
    monkeypatch.setattr(finite, "LOOK_EVERY", math.inf)  # or the first fit, in which kernels load, may take that long
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


@pytest.mark.parametrize("own", [None, "cpu"])
def test_the_order_is_the_same_on_both_devices(own):
    def order(device):
        torch.manual_seed(3)
        generator = None if own is None else torch.Generator(own).manual_seed(5)
        loader = TensorLoader(torch.arange(50), batch_size=8, shuffle=True, device=device, generator=generator)
        return [x.tolist() for (x,) in loader] + [x.tolist() for (x,) in loader]

    assert order("cuda") == order("cpu")


def test_a_generator_of_the_device_orders_data_on_either():
    def order(device, n_skipped=0):
        generator = torch.Generator("cuda").manual_seed(5)
        loader = TensorLoader(torch.arange(50), batch_size=8, shuffle=True, device=device, generator=generator)
        return [x.tolist() for (x,) in loader.iter_from(n_skipped)]

    assert order("cuda") == order("cpu")
    assert order("cuda", 2) == order("cuda")[2:]
    loader = TensorLoader(torch.arange(50), shuffle=True, generator=torch.Generator("cuda").manual_seed(5))
    shards = [loader.shard(rank, 2) for rank in range(2)]
    assert sorted(value for shard in shards for (x,) in shard for value in x.tolist()) == list(range(50))


def test_a_data_set_is_kept_on_the_device():
    data = [({"x": torch.full((3,), float(i))}, i) for i in range(20)]
    dls = DataLoaders.in_memory(data, data, device="cuda", batch_size=8, verbose=False)
    assert all(tensor.is_cuda for loader in (dls.train, dls.valid) for tensor in loader.tensors)
    assert [y.tolist() for _, y in dls.valid] == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
    with pytest.raises(MemoryError, match=r"MB in the memory of cuda:0, where"):
        DataLoaders.in_memory([torch.zeros(1).expand(10**12)], device="cuda", verbose=False)


# ---- what is not finite: late, but without an update


OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "momentum": lambda params, lr, fused: torch.optim.SGD(params, lr, momentum=0.9, weight_decay=0.1, fused=fused),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}


def values(learn):
    """Copies of the weights and of the optimizer's state, in one list; nothing is read."""
    states = [value for p in learn.model.parameters() for value in learn.opt.state.get(p, {}).values()]
    return [value.detach().clone() for value in (*learn.model.parameters(), *states)
            if isinstance(value, torch.Tensor)]


class Copies(Callback):
    """The `values` after each step."""

    order = 10_000

    def __init__(self, learn):
        self.learn, self.steps = learn, []

    def after_step(self, state):
        self.steps.append(values(self.learn))


def vector(opt_func, data, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return Learner(model, (data, None), nn.MSELoss(), opt_func=opt_func, device="cuda", verbose=False, **options)


def noise(n=8):
    return [(torch.randn(4, 3, device="cuda"), torch.randn(4, 1, device="cuda")) for _ in range(n)]


@pytest.mark.case("N1")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("opt_func", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_loss_that_is_not_finite_moves_nothing_and_nothing_waits(opt_func, value, monkeypatch):
    monkeypatch.setattr(finite, "LOOK_EVERY", math.inf)
    data = noise()
    data[3][1][0, 0] = value
    learn = vector(opt_func, data)
    copies = Copies(learn)
    with pytest.raises(NonFiniteLoss, match=rf"the loss is {value} at epoch 0, step 3 \(lr 0.1\). The weights are "
                                            r"those of the step before.*Found at step 8;"):
        learn.fit(0.1, callbacks=[copies, NoSyncInBatches()])
    assert len(copies.steps) == 8
    for later in (*copies.steps[3:], values(learn)):
        assert all(torch.equal(a, b) for a, b in zip(later, copies.steps[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(copies.steps[1], copies.steps[2], strict=True))
    assert "found_inf" not in vars(learn.opt)


@pytest.mark.case("N2")
@pytest.mark.parametrize("opt_func", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_gradient_that_is_not_finite_moves_nothing_and_nothing_waits(opt_func, monkeypatch):
    monkeypatch.setattr(finite, "LOOK_EVERY", math.inf)

    class Spoil(Callback):
        def after_backward(self, state):
            if state.step == 3:
                state.model[0].weight.grad[0, 0] = math.nan

    learn = vector(opt_func, noise())
    copies = Copies(learn)
    with pytest.raises(NonFiniteGradient, match=r"step 3 .*Found at step 8;"):
        learn.fit(0.1, callbacks=[Spoil(), GradientClip(norm=1.0), copies, NoSyncInBatches()])
    for later in copies.steps[3:]:
        assert all(torch.equal(a, b) for a, b in zip(later, copies.steps[2], strict=True))


class NoSyncInBatches(NoSync):
    """Without validation there is no `before_validate`: the host may look once the last batch is done."""

    def after_batch(self, state):
        if state.batch_index + 1 == state.n_batches:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.case("N1")
def test_strict_stops_at_once_on_a_device_too():
    data = noise()
    data[3][0][2, 1] = math.nan
    learn = vector(torch.optim.AdamW, data, callbacks=[FiniteLoss(strict=True)])
    copies = Copies(learn)
    with pytest.raises(NonFiniteLoss, match=r"step 3 \(lr 0.1\).* the first at \[2, 1\]"):
        learn.fit(0.1, callbacks=[copies])
    assert len(copies.steps) == 3
    assert all(torch.equal(a, b) for a, b in zip(values(learn), copies.steps[-1], strict=True))


@pytest.mark.case("N1", "N4")
def test_fp16_and_the_flag_keep_out_of_each_others_way():
    data = noise(50)
    data[1][1][0, 0] = math.nan  # is skipped
    learn = vector(torch.optim.AdamW, data)
    learn.fit(0.01, callbacks=[MixedPrecision("fp16"), GradientClip(norm=1.0)])
    assert len(learn.recorder.losses) < 50
    for _, y in data[3:]:
        y[0, 0] = math.nan
    copies = Copies(learn)
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at epoch 0, step \d "):
        learn.fit(0.01, callbacks=[MixedPrecision("fp16"), copies])
    assert all(torch.isfinite(value).all() for value in values(learn))
