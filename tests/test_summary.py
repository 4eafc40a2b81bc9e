"""learn.summary(): what it counts, and that it leaves everything alone."""

import copy

import numpy as np
import pytest
import torch
from helpers import At, batches, everything, learner, spying
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import TensorLoader
from minifast.studies.summary import MOST_LINES, state_bytes, summary


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                         nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 10, bias=False)))  # fmt: skip


def images(n=32, size=16):
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return TensorLoader(x, torch.zeros(n, dtype=torch.long), batch_size=size, shuffle=True)


def fit_convnet(**options):
    return learner(images(), model=convnet(), loss_func=nn.CrossEntropyLoss(), **options)


def test_rows_and_totals_of_a_convnet_counted_by_hand():
    found = summary(fit_convnet())
    rows = [tuple(row.values()) for row in found.rows]
    assert rows == [("0", "Conv2d", "(16, 4, 8, 8)", 40, 40), ("1", "BatchNorm2d", "(16, 4, 8, 8)", 8, 8),
                    ("2", "ReLU", "(16, 4, 8, 8)", 0, 0), ("3.0", "Flatten", "(16, 256)", 0, 0),
                    ("3.1", "Linear", "(16, 10)", 2560, 2560)]  # fmt: skip
    assert (found.n_parameters, found.n_trainable) == (2608, 2608)
    assert (found.parameter_bytes, found.gradient_bytes) == (2608 * 4, 2608 * 4)
    assert found.buffer_bytes == 2 * 4 * 4 + 8  # running mean and variance; num_batches_tracked is int64
    # the in-place ReLU and Flatten, a view, take no memory of their own
    assert found.activation_bytes == 4 * (2 * 16 * 4 * 8 * 8 + 16 * 10)
    assert found.optimizer_bytes == 0  # SGD without momentum


def test_it_prints_as_a_table():
    lines = str(summary(fit_convnet())).splitlines()
    assert lines[0] == "Sequential, inputs float32 (16, 1, 8, 8)"
    assert lines[1].split() == ["layer", "type", "output", "parameters", "trainable"]
    assert lines[6].split() == ["3.1", "Linear", "(16,", "10)", "2,560", "2,560"]
    assert [line.split() for line in lines[7:]] == [
        ["parameters", "2,608", "10.4", "kB"], ["trainable,", "and", "their", "gradients", "2,608", "10.4", "kB"],
        ["buffers", "0.0", "kB"], ["outputs", "of", "all", "modules,", "one", "batch", "33.4", "kB"],
        ["optimizer", "state", "after", "a", "step", "0.0", "kB"]]  # fmt: skip
    assert repr(summary(fit_convnet())).splitlines() == lines


def test_frozen_layers_are_not_trainable():
    learn = fit_convnet(splitter={"body": ["0.*", "1.*"], "head": "3.*"}, opt_func=torch.optim.Adam, train_bn=False)
    learn.freeze()
    found = summary(learn)
    assert [row["trainable"] for row in found.rows] == [0, 0, 0, 0, 2560]
    assert (found.n_parameters, found.n_trainable, found.gradient_bytes) == (2608, 2560, 2560 * 4)
    assert found.optimizer_bytes == 2 * 2560 * 4 + 4


def test_nothing_is_left_changed():
    learn = fit_convnet(opt_func=spying(torch.optim.AdamW))
    learn.fit(0.01)
    learn.model[1].eval()  # a mode that is not that of the whole
    before = everything(learn)
    summary(learn)
    assert everything(learn) == before
    assert not any(module._forward_hooks for module in learn.model.modules())


@pytest.mark.parametrize("kind", ["TensorLoader", "DataLoader"])
def test_the_generator_of_a_loader_does_not_move(kind):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(8, 3), torch.rand(8, 1)
    data = (TensorLoader(x, y, batch_size=4, shuffle=True, generator=generator) if kind == "TensorLoader"
            else DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=generator))  # fmt: skip
    learn = learner(data)
    before = everything(learn, generator)
    summary(learn)
    assert everything(learn, generator) == before


class Stubborn(nn.Module):
    """Counts its calls in buffers even in eval mode, one of them by replacing it, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean()
        np.random.rand()
        return self.layer(x + torch.randn(1))


def test_buffers_that_a_model_writes_in_eval_mode_are_put_back():
    learn = learner(model=Stubborn())
    before = everything(learn)
    summary(learn)
    assert everything(learn) == before


def test_a_model_that_fails_leaves_nothing_behind_and_says_on_what():
    learn = fit_convnet()
    learn.model[3] = nn.Linear(7, 2)
    before = everything(learn)
    with pytest.raises(RuntimeError) as caught:
        summary(learn)
    assert caught.value.__notes__[-1] == "in the model, for its summary: inputs float32 (16, 1, 8, 8)"
    assert everything(learn) == before
    assert not any(module._forward_hooks for module in learn.model.modules())


def test_an_iterator_is_refused_and_not_read():
    data = iter(batches(3))
    with pytest.raises(ValueError, match=r"an iterator \(list_iterator\), good for one pass: .* missing from training"):
        summary(learner(data))
    assert len(list(data)) == 3


def test_data_without_a_batch():
    class Empty:
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match=r"the training data \(Empty\) yielded 0 batches"):
        summary(learner(Empty()))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 5, batch_first=True)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, a, b):
        out, hidden = self.rnn(a + b)
        return {"logits": out[:, -1] * self.scale[0], "hidden": (hidden, out)}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_tuple_and_dict_inputs_and_nested_outputs(kind):
    a, b, y = torch.zeros(4, 6, 3), torch.zeros(4, 6, 3), torch.zeros(4)
    batch = (a, b, y) if kind == "tuple" else {"a": a, "b": b}
    found = summary(learner([batch], model=TwoInputs()))
    one = "float32 (4, 6, 3)"
    assert found.inputs == (f"({one}, {one})" if kind == "tuple" else f"{{a: {one}, b: {one}}}")
    assert {row["layer"]: row["output"] for row in found.rows} == {
        "(model)": "{logits: (4, 5), hidden: ((1, 4, 5), (4, 6, 5))}", "rnn": "((4, 6, 5), (1, 4, 5))",
        "unused": "not run"}  # fmt: skip
    assert found.rows[0]["parameters"] == 2, "the model's own, not its layers'"
    # what the GRU put out is counted once, though the model gives it out again; torch's GRU on the CPU makes its
    # hidden state from memory of its own
    assert found.activation_bytes == 4 * (4 * 6 * 5 + 4 * 5 + 4 * 5)


def test_shared_modules_and_tied_weights_are_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.act = self.again = nn.Tanh()
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.again(self.out(self.act(self.embed(x))))

    found = summary(learner([(torch.zeros(4, dtype=torch.long), torch.zeros(4))], model=Tied()))
    assert [(row["layer"], row["output"], row["parameters"]) for row in found.rows] == [
        ("embed", "(4, 3)", 21), ("out", "(4, 7)", 0), ("act", "(4, 3)", 0)]
    assert (found.n_parameters, found.parameter_bytes) == (21, 84)
    assert found.activation_bytes == 4 * (12 + 12 + 28 + 28), "both runs of the shared module put out something"


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.modes = nn.Linear(3, 3), []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return x + self.layer(x)


def test_outputs_of_containers_count_and_the_inputs_do_not():
    found = summary(learner(model=nn.Sequential(nn.Flatten(), Residual(), nn.Linear(3, 1))))
    assert found.activation_bytes == 4 * (2 * 4 * 3 + 4), "the layer, the sum and the head; Flatten gave its input"
    assert [row["layer"] for row in found.rows] == ["0", "1.layer", "2"]


def test_the_batch_runs_in_eval_mode_without_gradients():
    learn = learner(model=Residual())
    summary(learn)
    assert learn.model.modes == [(False, False)]
    assert learn.model.training


def test_a_bare_layer_is_called_model():
    assert summary(learner()).rows == [
        {"layer": "(model)", "type": "Linear", "output": "(4, 1)", "parameters": 4, "trainable": 4}]


def test_a_long_model_is_shown_by_its_outer_modules():
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model = nn.Sequential(*(copy.deepcopy(block) for _ in range(30)), nn.Linear(3, 1))
    found = summary(learner(model=model))
    lines = str(found).splitlines()
    assert len(found.rows) == 91 > MOST_LINES
    assert lines[2].split() == ["0", "Sequential", "(4,", "3)", "24", "24"]
    assert lines[32].split() == ["30", "Linear", "(4,", "1)", "4", "4"]
    assert lines[33] == "91 layers, shown to depth 1: `.rows` holds all"
    assert len(lines) == 1 + 1 + 31 + 1 + 5


def test_a_short_model_is_shown_whole():
    assert len(str(summary(fit_convnet())).splitlines()) == 1 + 1 + 5 + 5


OPTIMIZERS = [
    (torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"amsgrad": True}), (torch.optim.Adam, {"fused": True}), (torch.optim.Adagrad, {}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}), (torch.optim.Adadelta, {}), (torch.optim.NAdam, {}),
]  # fmt: skip


@pytest.mark.table
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_expected_state_is_what_a_step_makes(kind, options, dtype):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(dtype)
    model[0].bias.requires_grad_(False)
    opt = kind([{"params": list(model[0].parameters()), "lr": 0.1, "layer_group": 0},
                {"params": list(model[1].parameters()), "layer_group": 1}], lr=0.01, **options)  # fmt: skip
    expected, groups = state_bytes(opt), [dict(group) for group in opt.param_groups]
    assert not opt.state or kind is torch.optim.Adagrad, "nothing of the optimizer itself has moved"
    assert [dict(group) for group in opt.param_groups] == groups
    model(torch.ones(4, 3, dtype=dtype)).sum().backward()
    opt.step()
    made = [(p, value) for p, state in opt.state.items() for value in state.values() if isinstance(value, torch.Tensor)]
    assert expected == sum(v.numel() * v.element_size() for p, v in made if p.requires_grad)


def test_an_optimizer_that_cannot_be_told_is_unknown():
    class Strange(torch.optim.SGD):
        def __init__(self, params, lr, *, secret=None):
            super().__init__(params, lr=lr)
            if secret is None:
                raise RuntimeError("no twin of mine")

    found = summary(learner(opt_func=lambda params, lr: Strange(params, lr, secret=1)))
    assert found.optimizer_bytes is None
    assert str(found).splitlines()[-1].split() == ["optimizer", "state", "after", "a", "step", "unknown"]


def test_a_summary_in_the_middle_of_a_fit_changes_nothing_of_it():
    plain = fit_convnet()
    plain.fit(0.1, 2)
    looked = fit_convnet(callbacks=[At("after_batch", lambda state: summary(looked))])
    looked.fit(0.1, 2)
    for a, b in zip(plain.model.state_dict().values(), looked.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
