"""What only a CUDA device can show. Skipped where there is none."""
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import Callback, DataLoaders, Learner, TensorLoader, accuracy

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


def test_nothing_in_the_hot_path_waits_for_the_device():
    """torch raises where a synchronizing call is made between the first step and the end of the epoch."""
    class NoSync(Callback):
        order = -1  # before the Recorder, which may read its losses once the epoch is trained

        def after_step(self, state):
            torch.cuda.set_sync_debug_mode("error")

        def before_validate(self, state):
            torch.cuda.set_sync_debug_mode("default")

        def after_fit(self, state):
            torch.cuda.set_sync_debug_mode("default")

    learn = make(callbacks=[NoSync()])
    x, y = torch.randn(320, 1, 8, 8, device="cuda"), torch.randint(0, 10, (320,), device="cuda")
    learn.dls = DataLoaders(TensorLoader(x, y, batch_size=32), [(x, y)])
    learn.fit_one_cycle(1, 0.02)


def test_a_tensor_loader_gathers_on_the_device():
    loader = TensorLoader(torch.arange(10.), batch_size=4, shuffle=True, device="cuda")
    assert sorted(value for (batch,) in loader for value in batch.tolist()) == list(range(10))
