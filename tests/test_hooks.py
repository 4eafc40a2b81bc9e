"""Hooks as context managers."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from minifast.base.hooks import Hook, Hooks, hook_outputs


def shape(module, inputs, output):
    return tuple(output.shape)


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_it_stores_what_the_function_returns_of_the_newest_run(model):
    with hook_outputs(model.children(), shape) as hooks:
        assert hooks.stored == [None] * 3
        model(torch.zeros(5, 3))
        model(torch.zeros(7, 3))
    assert hooks.stored == [(7, 4), (7, 4), (7, 2)]
    assert [hook.module for hook in hooks] == list(model)
    assert len(hooks) == 3


def test_the_function_gets_module_inputs_and_output(model):
    seen, x = [], torch.ones(1, 3)
    with Hook(model[0], lambda *args: seen.append(args)):
        y = model[0](x)
    [(module, inputs, output)] = seen
    assert module is model[0]
    assert inputs[0] is x
    assert output is y


def test_what_it_returns_never_replaces_the_output(model):
    x = torch.ones(2, 3)
    plain = model(x)
    with hook_outputs(model.children(), lambda *_: torch.full((2, 4), 9.0)):
        assert torch.equal(model(x), plain)


def test_without_a_function_the_output_is_stored_without_its_graph(model):
    with hook_outputs([model[2]]) as hooks:
        y = model(torch.ones(2, 3))
    assert torch.equal(hooks.stored[0], y)
    assert y.requires_grad
    assert not hooks.stored[0].requires_grad


def test_nested_outputs_stay_nested():
    Out = namedtuple("Out", "a b")

    class Nested(nn.Module):
        def forward(self, x):
            return {"pair": (x * 2, [x * 3]), "named": Out(x * 4, None)}

    x, model = torch.ones(1, requires_grad=True), Nested()
    with hook_outputs([model]) as hooks:
        model(x)
    out = hooks.stored[0]
    assert out == {"pair": (2, [3]), "named": Out(4, None)}
    assert type(out["named"]) is Out
    assert not any(t.requires_grad for t in (out["pair"][0], out["pair"][1][0], out["named"].a))


@pytest.mark.parametrize("seed", range(3))
def test_backward_hooks_see_the_gradients(model, seed):
    torch.manual_seed(seed)
    model, x = model.double(), torch.randn(4, 3, dtype=torch.float64)
    hidden = model[:2](x).detach().requires_grad_()
    model[2](hidden).square().sum().backward()
    with Hooks([model[2]], lambda module, grad_in, grad_out: (grad_in[0], grad_out[0]), backward=True) as hooks:
        y = model(x)
        y.square().sum().backward()
    grad_in, grad_out = hooks.stored[0]
    torch.testing.assert_close(grad_out, 2 * y.detach())
    torch.testing.assert_close(grad_in, hidden.grad)


@pytest.mark.case("I12")
@pytest.mark.parametrize("backward", [False, True])
def test_none_is_left_over_however_the_block_ends(model, backward):
    for error in (None, ValueError, KeyboardInterrupt):
        try:
            with Hooks(model.children(), lambda *_: None, backward=backward):
                assert count_hooks(model) == 3
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
        assert count_hooks(model) == 0


def test_hooks_hang_only_inside_the_block(model):
    hooks = Hooks([model[0]], shape)
    assert count_hooks(model) == 0
    for rows in (1, 2):  # and may hang again
        with hooks:
            model(torch.zeros(rows, 3))
        model(torch.zeros(9, 3))
        assert hooks.stored == [(rows, 4)]


def test_one_that_torch_refuses_takes_the_others_with_it(model):
    model[2]._is_full_backward_hook = False  # as after torch's old register_backward_hook
    with pytest.raises(RuntimeError, match="both regular backward hooks and full backward hooks"), \
            Hooks(model.children(), shape, backward=True):  # fmt: skip
        pass
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hook_outputs(nn.Sequential(nn.ReLU())), TypeError, r"iterable of modules, got a Sequential\. Pass"),
        (lambda: hook_outputs(3), TypeError, r"iterable of modules, got 3 \(int\)"),
        (lambda: hook_outputs([]), ValueError, "at least one module, got none"),
        (lambda: hook_outputs([nn.ReLU(), "0.conv"]), TypeError, r"must be an nn.Module, got '0.conv' \(str\)"),
        (lambda: hook_outputs([nn.ReLU()], 5), TypeError, r"function \(module, inputs, output\) -> anything, got 5"),
        (lambda: Hook(nn.ReLU(), nn.ReLU()), TypeError, r"got ReLU\(\)"),
        (lambda: Hook(nn.ReLU(), print, backward=1), TypeError, r"backward must be True or False, got 1 \(int\)"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
