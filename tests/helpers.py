"""What several test files share: tiny data, a learner on it, and observers that do not rely on the Recorder."""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minifast import Callback, Learner
from minifast.core.callback import EVENTS
from minifast.standard import finite


class Trace(Callback):
    """Writes every event it hears, with `prefix`, to `log`; `at` events on the way it calls `action(state)`."""

    def __init__(self, log=None, prefix="", **options):
        self.log, self.prefix = [] if log is None else log, prefix
        vars(self).update(options)


class At(Callback):
    """Calls `action(state)` in `event` the n-th time (from 0) that it happens; None: every time."""

    def __init__(self, event, action, n=None):
        self.event, self.action, self.n, self.count = event, action, n, 0


def _trace(event):
    return lambda self, state: self.log.append(self.prefix + event)


def _at(event):
    def hear(self, state):
        if event == self.event:
            self.count += 1
            if self.n in (None, self.count - 1):
                self.action(state)

    return hear


for _event in EVENTS:
    setattr(Trace, _event, _trace(_event))
    setattr(At, _event, _at(_event))


def throw(error):
    """An action for `At`: raises `error`, an exception or (then nobody keeps it) its class."""

    def action(state):
        raise error

    return action


def spying(base=torch.optim.SGD):
    """An optimizer class that notes in `.seen`, at each of its steps, its hyper-parameters, gradients and weights."""

    class Spy(base):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.seen = []

        def step(self, closure=None):
            params = [p for group in self.param_groups for p in group["params"]]
            note = {key: value for key, value in self.param_groups[-1].items() if key != "params"}
            note["lrs"] = [group["lr"] for group in self.param_groups]
            note["grads"] = [None if p.grad is None else p.grad.detach().clone() for p in params]
            result = super().step(closure)
            note["weights"] = [p.detach().clone() for p in params]
            self.seen.append(note)
            return result

    return Spy


class FakeRun:
    """As much of a run of W&B as is used: it notes what is logged."""

    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], 0

    def log(self, values, step):
        assert not self.logged or step >= self.logged[-1][0], "W&B drops what goes back in time"
        assert all(type(value) in (int, float) for value in values.values())
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def noting(method, read):
    """`method` of a tensor, noting each call in `read`."""
    def call(self, *args):
        read.append(method.__name__)
        return method(self, *args)

    return call


class NoWait(TorchDispatchMode):
    """Fails where the host reads a number from a tensor: on a device it would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host waits for the device")
        return func(*args, **(kwargs or {}))


class Unwaiting(Callback):
    """No batch but the first may wait for the device, from `before_batch` to `after_step`.

    The device is the CPU, from which the host may read at any time: in the fit it is taken for one that waits.
    """

    order, mode = -1000, None

    def before_fit(self, state):
        self.kept, finite.reads_at_once = finite.reads_at_once, lambda device: False

    def before_batch(self, state):
        if state.batch_index:
            self.mode = NoWait()
            self.mode.__enter__()

    def after_batch(self, state):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
        self.mode = None

    def after_fit(self, state):
        self.after_batch(state)
        finite.reads_at_once = self.kept


def tiers(rows, quick):
    """`rows` for `pytest.mark.parametrize`: those in `quick` run each time, the others at night."""
    import pytest

    assert set(quick) <= set(rows)
    return [row if row in quick else pytest.param(row, marks=pytest.mark.nightly) for row in rows]


def real_data(name):
    """The path of a file of real data in the folder that MINIFAST_DATA names; without it the test is skipped."""
    import pytest

    folder = os.environ.get("MINIFAST_DATA")
    if not folder:
        pytest.skip(f"MINIFAST_DATA is not set: it names a folder of real data, here for {name}")
    if not Path(folder, name).is_file():
        pytest.skip(f"there is no {name} in the folder that MINIFAST_DATA names")
    return Path(folder, name)


def batches(n=2, size=4, *, seed=0, dtype=torch.float32):
    """`n` batches (x (size, 3), y (size, 1)) of noise; `size` may be a list of sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * n if isinstance(size, int) else size
    return [tuple(torch.randn(k, d, generator=generator, dtype=dtype) for d in (3, 1)) for k in sizes]


def learner(train=None, valid=None, *, seed=0, model=None, **options):
    """A linear model on two noisy batches, silent, with SGD that spies on itself."""
    if model is None:
        torch.manual_seed(seed)
        model = nn.Linear(3, 1)
    data = (batches() if train is None else train, valid)
    return Learner(model, data, **{"loss_func": nn.MSELoss(), "opt_func": spying(), "device": "cpu", "verbose": False}
                   | options)  # fmt: skip


def bits(value):
    """`value` as something that is == exactly if all bits are the same: nan equals nan, 0.0 does not equal -0.0."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        return str(value.dtype), tuple(value.shape), _hash(value.flatten().view(torch.uint8).numpy())
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, _hash(value)
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(inner) for inner in value]
    return value.hex() if isinstance(value, float) else value


def _hash(array):
    return hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()


def trained(learn):
    """The bits of what training changes: parameters, buffers and optimizer."""
    names = {p: name for name, p in learn.model.named_parameters(remove_duplicate=False)}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in learn.opt.param_groups]
    return bits({
        **{f"param {name}": p for name, p in learn.model.named_parameters()},
        **{f"buffer {name}": buffer for name, buffer in learn.model.named_buffers()},
        **{f"state of {names[p]}": state for p, state in learn.opt.state.items()},
        **{f"hypers {i}": group for i, group in enumerate(groups)},
    })  # fmt: skip


def rngs():
    """The bits of the global random generators."""
    python, numpy = random.getstate(), np.random.get_state()
    return bits({"python": hash(python), "numpy": list(numpy), "torch": torch.get_rng_state()})


def everything(learn, *generators):
    """The bits of all that a sandbox promises to leave alone: a dict, so that a failure names what changed."""
    params, modules = learn.model.named_parameters(), learn.model.named_modules()
    recorder = learn.recorder
    return trained(learn) | rngs() | bits({
        **{f"{name}: grad, requires_grad": (p.grad, p.requires_grad) for name, p in params},
        **{f"mode of {name}": module.training for name, module in modules},
        **{f"identity of {name}": id(p) for name, p in learn.model.named_parameters()},
        **{f"identity of {name}": id(buffer) for name, buffer in learn.model.named_buffers()},
        **{f"generator {i}": state_of(generator) for i, generator in enumerate(generators)},
        "recorder": [(record.lrs, record.losses, record.epochs) for record in [*recorder.fits, recorder.newest]],
        "the learner's attributes": {name: id(value) for name, value in vars(learn).items()},
        "its lists": [list(map(id, values)) for values in (learn.callbacks, learn.metrics)],
    })  # fmt: skip


def state_of(generator):
    """The state of a torch, numpy or Python generator, for comparing."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)
    return str(generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate())


def twin(learn, **options):
    """A fresh learner with a copy of the model and of the optimizer's state of `learn`, on the same data."""
    import copy

    other = learner(learn.dls.train, learn.dls.valid, model=copy.deepcopy(learn.model), **options)
    other.opt.load_state_dict(copy.deepcopy(learn.opt.state_dict()))
    return other
