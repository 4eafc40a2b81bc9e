"""The direct weight update is `opt.step()` to the last bit; whatever it does not know is left to `opt.step()`."""
import copy
import functools
import gc
import inspect
import weakref

import pytest
import torch
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW

from minifast import Callback, DataLoaders, GradientClip, Learner
from minifast.optim import fused

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(3, 4), (4,), (), (2, 3, 1, 1), (0,), (5,)]


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))
            for shape in SHAPES]


def groups_of(params, n):
    return [{"params": params[i::n], "lr": 0.1 * (i + 1)} for i in range(n)]


def contents(opt):
    """All that an optimizer holds, in the order of its parameters."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return [(p.detach().clone(), {name: copy.deepcopy(value) for name, value in opt.state.get(p, {}).items()})
            for p in params]


def run(opt_func, options, n_groups, actions, step_with, device="cpu", dtype=torch.float32):
    """What an optimizer holds after each of some updates, between which `actions` happen."""
    params = parameters(device, dtype)
    opt = opt_func(groups_of(params, n_groups), fused=True, **options)
    fill(opt)
    update, log = step_with(opt), []
    generator = torch.Generator().manual_seed(1)
    for action in actions:
        for p in params:
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(device, dtype)
            p.grad = grad if p.requires_grad else None
        opt = act(action, opt, params)
        update()
        log.append(contents(opt))
    return bits(log)


def fill(opt):
    """As a fit does, see `making.fill_momentum`."""
    for group in opt.param_groups:
        for p in group["params"]:
            if group.get("momentum"):
                opt.state[p]["momentum_buffer"] = torch.zeros_like(p)


def act(action, opt, params):
    """What may happen to an optimizer in the middle of a fit."""
    group = opt.param_groups[-1]
    if action == "rates":
        for each in opt.param_groups:
            each["lr"], each["weight_decay"] = each["lr"] * 0.7, 0.03
    elif action == "momentum" and "betas" in group:
        group["betas"] = (0.8, 0.95)
    elif action == "momentum" and group["momentum"]:
        group["momentum"] = 0.5
    elif action == "freeze":
        params[0].requires_grad_(False)
        params[0].grad = None
    elif action == "thaw":
        params[0].requires_grad_(True)
    elif action == "no gradient":
        params[1].grad = None
    elif action == "forget one" and "betas" in group:
        opt.state.pop(params[-1], None)
    elif action == "forget all" and "betas" in group:
        opt.state.clear()
    elif action == "replace":
        for p in params:
            values = opt.state.get(p, {})
            for name in values:
                values[name] = values[name].clone().mul_(0.5 if name != "step" else 1)
    elif action == "load":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif action == "swap data":
        for p in params:
            p.data = p.data.clone()
    elif action == "int lr":
        group["lr"] = 1
    return opt


ACTIONS = ["", "rates", "momentum", "freeze", "thaw", "no gradient", "forget one", "forget all", "replace", "load",
           "swap data", "int lr"]
ADAM = st.fixed_dictionaries({"amsgrad": st.booleans(), "maximize": st.booleans(),
                              "weight_decay": st.sampled_from([0, 0.1]), "capturable": st.booleans(),
                              "betas": st.sampled_from([(0.9, 0.99), (0.0, 0.5)]),
                              "eps": st.sampled_from([1e-8, 1e-3])})
PLAIN_SGD = st.fixed_dictionaries({"momentum": st.just(0), "weight_decay": st.sampled_from([0, 0.1]),
                                   "maximize": st.booleans()})
MOMENTUM_SGD = st.fixed_dictionaries({"momentum": st.just(0.9), "weight_decay": st.sampled_from([0, 0.1]),
                                      "nesterov": st.booleans(), "maximize": st.booleans()})
OPTIMIZERS = st.one_of(st.tuples(st.sampled_from([Adam, AdamW]), ADAM), st.tuples(st.just(SGD), PLAIN_SGD),
                       st.tuples(st.just(SGD), MOMENTUM_SGD))


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=60)
@given(optimizer=OPTIMIZERS, n_groups=st.integers(1, 3),
       actions=st.lists(st.sampled_from(ACTIONS), min_size=2, max_size=6),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_it_is_opt_step_to_the_last_bit(device, optimizer, n_groups, actions, dtype):
    opt_func, options = optimizer
    if device == "cpu":
        options = options | ({"capturable": False} if "capturable" in options else {})
    args = (opt_func, options, n_groups, actions)
    ours = run(*args, fused.updater, device, dtype)
    assert ours == run(*args, lambda opt: opt.step, device, dtype)


def count_steps(monkeypatch):
    """Notes each time that torch's own update is called, at the kernels' wrappers, where both ways would differ."""
    calls = []
    for module, name in ((inspect.getmodule(Adam), "adam"), (inspect.getmodule(SGD), "sgd")):
        plain = getattr(module, name)

        def noted(*args, _plain=plain, **kwargs):
            calls.append(1)
            return _plain(*args, **kwargs)
        monkeypatch.setattr(module, name, noted)
    return calls


def make(opt_func=AdamW, **options):
    torch.manual_seed(0)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(5)]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return Learner(model, DataLoaders(data), nn.MSELoss(), opt_func=opt_func, device="cpu", verbose=False, **options)


MOMENTUM = functools.partial(SGD, momentum=0.9)


@pytest.mark.parametrize("opt_func", [AdamW, Adam, SGD, MOMENTUM])
@pytest.mark.parametrize("callbacks", [[], [GradientClip(norm=0.1)]], ids=["plain", "clip"])
def test_a_fit_takes_it_and_the_flag_turns_it_off(opt_func, callbacks, monkeypatch):
    calls, ends = count_steps(monkeypatch), []
    for direct in (True, False):
        monkeypatch.setattr(fused, "DIRECT", direct)
        learn = make(opt_func, splitter=lambda model: [model[0], model[2]])
        learn.fit_one_cycle(2, slice(0.001, 0.1), callbacks=callbacks)
        ends.append(bits([contents(learn.opt), learn.recorder.losses]))
        assert bool(calls) != direct
    assert ends[0] == ends[1]
    assert "fused: True" in repr(learn.opt)


@pytest.mark.parametrize("opt_func", [functools.partial(AdamW, fused=False), functools.partial(AdamW, foreach=True),
                                      torch.optim.NAdam, torch.optim.RMSprop,
                                      type("MyAdamW", (AdamW,), {}), functools.partial(SGD, fused=True, dampening=0.1,
                                                                                       momentum=0.9)])
def test_others_are_stepped_by_themselves(opt_func, monkeypatch):
    ends = []
    for direct in (True, False):
        monkeypatch.setattr(fused, "DIRECT", direct)
        learn = make(opt_func)
        learn.fit(0.01, 2)
        ends.append(bits([contents(learn.opt), learn.recorder.losses]))
    assert ends[0] == ends[1]


class Early(Callback):
    """Does something to the optimizer in the middle of a fit."""

    def __init__(self, action):
        self.action = action

    def after_step(self, state):
        if state.step == 1:
            self.action(state.opt)


def test_hooks_are_called(monkeypatch):
    calls = []
    learn = make()
    learn.opt.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre"))
    learn.opt.register_step_post_hook(lambda opt, args, kwargs: calls.append("post"))
    learn.fit(0.01)
    assert calls == ["pre", "post"] * 5
    calls.clear()
    late = make()
    late.fit(0.01, callbacks=[Early(lambda opt: opt.register_step_pre_hook(lambda *_: calls.append("late")))])
    make().fit(0.01, callbacks=[Early(lambda opt: opt.register_step_post_hook(lambda *_: calls.append("post")))])
    assert calls == ["late"] * 3 + ["post"] * 3


def test_global_hooks_are_called():
    from torch.optim.optimizer import register_optimizer_step_post_hook

    calls = []
    handle = register_optimizer_step_post_hook(lambda opt, args, kwargs: calls.append(1))
    try:
        make().fit(0.01)
    finally:
        handle.remove()
    assert len(calls) == 5
    make().fit(0.01)
    assert len(calls) == 5


def test_a_step_that_was_put_in_its_place_is_called():
    """As torch's schedulers, and whoever counts steps, do it."""
    calls = []

    def wrap(opt):
        plain = opt.step

        @functools.wraps(plain)
        def step(*args, **kwargs):
            calls.append(1)
            return plain(*args, **kwargs)
        opt.step = step
    learn = make()
    learn.fit(0.01, callbacks=[Early(wrap)])
    assert len(calls) == 3
    learn.fit(0.01)
    assert len(calls) == 8


def test_a_step_that_was_put_into_the_class_is_called(monkeypatch):
    learn, calls = make(), []
    plain = AdamW.step

    @functools.wraps(plain)
    def step(self, closure=None):
        calls.append(1)
        return plain(self, closure)
    monkeypatch.setattr(AdamW, "step", step)
    learn.fit(0.01)
    assert len(calls) == 5


def test_a_learning_rate_in_a_tensor_is_left_to_torch():
    learn = make()
    learn.fit(0.01, callbacks=[Early(lambda opt: opt.param_groups[0].update(fused=False, foreach=False))])
    plain = make(functools.partial(AdamW, fused=True))
    fused_step = fused.updater(plain.opt)
    for p in plain.model.parameters():
        p.grad = torch.ones_like(p)
    plain.opt.param_groups[0]["lr"] = torch.tensor(0.01)
    fused_step()
    assert all(plain.opt.state[p]["step"] == 1 for p in plain.model.parameters())


@pytest.mark.filterwarnings("ignore:.*acc_events")  # of torch 2.10
def test_a_profiler_sees_the_optimizer_by_name():
    learn = make()
    with torch.profiler.profile() as profiler:
        learn.fit(0.01)
    assert any(event.key == "Optimizer.step#AdamW.step" for event in profiler.key_averages())


def test_sparse_gradients_are_refused_in_torchs_words():
    weight = nn.Parameter(torch.ones(3, 2))
    opt = AdamW([weight], fused=True)
    with torch.sparse.check_sparse_tensor_invariants():
        weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2))
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        fused.updater(opt)()
    assert torch.equal(weight, torch.ones(3, 2))


def test_an_update_that_is_refused_does_not_count():
    """`found_inf` is what a scaler, and on an accelerator FiniteLoss, tells the kernels."""
    ends = []
    for direct in (True, False):
        weight = nn.Parameter(torch.ones(3))
        opt = AdamW([weight], lr=0.1, fused=True)
        update = fused.updater(opt) if direct else opt.step
        for found in (0.0, 1.0, 0.0):
            weight.grad, opt.found_inf = torch.full((3,), 2.0), torch.tensor(found)
            update()
        assert opt.state[weight]["step"] == 2
        ends.append(bits(contents(opt)))
    assert ends[0] == ends[1]


def test_mixed_dtypes_and_devices_in_a_group_are_left_to_torch():
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    opt, twin = AdamW(params, lr=0.1, fused=True), copy.deepcopy(params)
    for p in params:
        p.grad = torch.ones_like(p)
    fused.updater(opt)()
    other = AdamW(twin, lr=0.1, fused=True)
    for p in twin:
        p.grad = torch.ones_like(p)
    other.step()
    assert bits(contents(opt)) == bits(contents(other))


def test_an_unknown_version_of_torch_is_left_alone(monkeypatch):
    calls = count_steps(monkeypatch)
    monkeypatch.setattr(fused, "_INIT_GROUP", "self group and something new")
    make().fit(0.01)
    assert len(calls) == 5 * 2, "torch's own update, of two groups: weights, and biases without weight decay"
    monkeypatch.undo()
    monkeypatch.setitem(fused._KERNELS, "_fused_sgd_", "self other")
    calls = count_steps(monkeypatch)
    make(MOMENTUM).fit(0.01)
    assert len(calls) == 10


def test_gradients_are_on_again_after_an_error(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch, "_fused_adamw_", broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        make().fit(0.01)
    assert torch.is_grad_enabled()


def test_it_keeps_no_learner_alive():
    learn = make()
    learn.fit(0.01)
    gone = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert gone() is None


# ---- the backward pass


def test_the_backward_pass_is_the_same(monkeypatch):
    ends = []
    for engine in (fused._engine(), None):
        monkeypatch.setattr(fused, "_engine", lambda engine=engine: engine)
        learn = make()
        learn.fit_one_cycle(2, 0.1, accumulate=2)
        ends.append(bits([contents(learn.opt), learn.recorder.losses]))
    assert ends[0] == ends[1]
    assert fused._engine.__name__ == "<lambda>"


def test_an_engine_that_is_called_otherwise_is_not_used(monkeypatch):
    fused._engine.cache_clear()
    assert fused._engine() is not None
    for other in (lambda tensors: None, lambda *args, **kwargs: None, None):
        fused._engine.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd.graph, "_engine_run_backward", other)
            assert fused._engine() is None
    fused._engine.cache_clear()


def test_the_one_that_backward_begins_with_is_nobodys_gradient():
    """A loss that is a parameter: its gradient must not be the tensor that the next batch begins with."""

    class Itself(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.weight

    class Double(Callback):
        def before_step(self, state):
            state.model.weight.grad.mul_(2)

    learn = Learner(Itself(), DataLoaders([(torch.ones(1), torch.ones(1))] * 4), lambda pred, target: pred,
                    opt_func=SGD, device="cpu", verbose=False)
    learn.fit(0.1, callbacks=[Double()])
    assert learn.model.weight.item() == pytest.approx(1 - 4 * 0.2)


@pytest.mark.parametrize("loss_func", [lambda pred, target: (pred - target).double().square().mean(),
                                       lambda pred, target: (pred - target).bfloat16().square().mean()])
def test_losses_of_other_dtypes(loss_func):
    learn, losses = make(SGD), []
    learn.loss_func = loss_func

    class Watch(Callback):
        def before_step(self, state):
            losses.append([p.grad.clone() for p in state.model.parameters()])

    twin = copy.deepcopy(learn.model)
    learn.fit(0.1, callbacks=[Watch()])
    x, y = learn.dls.train[0]
    loss_func(twin(x), y).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(losses[0], twin.parameters(), strict=True))
