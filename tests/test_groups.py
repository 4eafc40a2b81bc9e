"""Layer groups: how a model is split, frozen and decayed, and what the table says."""
from functools import partial

import pytest
import torch
from torch import nn

from minifast import Callback, Learner

BATCHES = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(i)), torch.ones(8, 2)) for i in range(5)]
GLOBS = {"stem": "0.*", "body": ["1.*", "2.*"], "head": "4.*"}
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def make(model=None, **options):
    return Learner(model or net(), (BATCHES, None), nn.MSELoss(), **{"splitter": GLOBS, "verbose": False} | options)


def state(module):
    return [value.clone() for value in module.state_dict().values()]


def same(before, module):
    return all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True))


# ---- splitting

@pytest.mark.parametrize(("splitter", "names", "sizes"), [
    (None, ("model",), [146]),
    (GLOBS, ("stem", "body", "head"), [40, 88, 18]),
    (lambda model: [model[0], model[1:3], model[4]], ("group 0", "group 1", "group 2"), [40, 88, 18]),
    (lambda model: [[model[0], model[1]], [model[2].weight, model[2].bias], model[4]],
     ("group 0", "group 1", "group 2"), [56, 72, 18]),
    (lambda model: {"body": model[:3], "head": model[4].parameters()}, ("body", "head"), [128, 18]),
    ({"first": "0.*", "rest": "*"}, ("first", "rest"), [40, 106]),
], ids=["none", "globs", "modules", "lists", "dict", "overlapping globs"])
def test_every_way_to_split(splitter, names, sizes):
    learn = make(splitter=splitter)
    assert learn.groups.names == names
    assert [sum(p.numel() for p in group.params) for group in learn.groups] == sizes


def test_tied_weights_belong_to_the_first_group_that_claims_them():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    learn = make(model, splitter=lambda m: [m[0], m[2]])
    assert [len(group.params) for group in learn.groups] == [1, 2]
    assert len([p for group in learn.opt.param_groups for p in group["params"]]) == 3


@pytest.mark.parametrize(("splitter", "message"), [
    ({"head": "4.*"}, r"6 of 8 parameters are in no layer group: 0\.weight, 0\.bias, 1\.weight, 1\.bias, 2\.weight "
                      "and 1 more"),
    ({"body": "encoder.*", "rest": "*"}, r"layer group 'body': no parameter matches 'encoder\.\*'\. Parameters of this "
                                         r"model: 0\.weight, .* and 3 more"),
    ({"all": "*", "head": "4.*"}, "layer group 'head' has no parameters of its own"),
    (lambda model: [model, nn.Linear(2, 2)], "the splitter names 2 parameters that are not the model's"),
], ids=["left over", "no match", "empty", "foreign"])
def test_a_split_that_does_not_fit_is_refused(splitter, message):
    with pytest.raises(ValueError, match=message):
        make(splitter=splitter)


@pytest.mark.parametrize("splitter", [3, "0.*", lambda model: ["0.weight"]])
def test_what_is_no_splitter_is_refused(splitter):
    with pytest.raises(TypeError, match=r"splitter (must be|returns)"):
        make(splitter=splitter)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.LazyLinear(3)], ids=["no parameters", "lazy"])
def test_models_that_cannot_be_trained_yet_are_refused(model):
    with pytest.raises(ValueError, match=r"no parameters to train|lazy layers without a shape"):
        make(model, splitter=None)


def test_the_table():
    learn = make(lr=slice(1e-4, 1e-2), wd=0.05)
    learn.freeze_to(1)
    assert str(learn.groups).splitlines() == [
        "layer group  parameters  trainable         lr  weight decay",
        "stem                 40          0  1.000e-04        0.0500",
        "body                 88         88     0.0010        0.0500",
        "head                 18         18     0.0100        0.0500"]


# ---- weight decay

class RMSNormLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


RMSNormLike.__name__ = "LlamaRMSNorm"


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
        self.batch, self.layer, self.group, self.rms = (nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4),
                                                        RMSNormLike())
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.attention, self.lstm, self.embedding = nn.MultiheadAttention(4, 1), nn.LSTM(4, 4), nn.Embedding(3, 4)
        self.scale = nn.Parameter(torch.ones(1))


DECAYED = {"linear.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0",
           "lstm.weight_hh_l0", "embedding.weight", "scale"}


def decays(learn):
    names = {id(p): name for name, p in learn.model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in learn.opt.param_groups for p in group["params"]}


def test_norms_and_biases_take_no_weight_decay():
    assert {name for name, wd in decays(make(Everything(), splitter=None)).items() if wd} == DECAYED


def test_wd_norm_bias_decays_everything():
    assert set(decays(make(Everything(), splitter=None, wd=0.3, wd_norm_bias=True)).values()) == {0.3}


def test_hidden_sub_groups_are_no_layer_groups():
    learn = make()
    assert len(learn.opt.param_groups) == 6
    assert [group["layer_group"] for group in learn.opt.param_groups] == [0, 0, 1, 1, 2, 2]
    learn.fit(slice(1e-3, 1e-1), 1)
    assert learn.recorder.lr_groups.shape == (5, 3)


@pytest.mark.parametrize(("opt_func", "default"), [(torch.optim.AdamW, 0.01), (torch.optim.SGD, 0), (SGD, 0.1)])
def test_wd_none_is_the_optimizers_default(opt_func, default):
    assert decays(make(opt_func=opt_func))["0.weight"] == default


def test_wd_of_a_fit_holds_for_that_fit():
    class Watch(Callback):
        def after_step(self, state):
            seen.append(decays(learn))

    seen = []
    learn = make(wd=0.2, callbacks=[Watch()])
    learn.fit(0.01, 1, wd=0.5)
    assert all(step["0.weight"] == 0.5 and step["0.bias"] == 0 for step in seen)
    assert decays(learn)["0.weight"] == 0.2


def test_wd_for_an_optimizer_without_one_is_refused():
    with pytest.raises(ValueError, match=r"wd=0\.1, but Rprop has no weight_decay"):
        make(opt_func=torch.optim.Rprop, wd=0.1)


# ---- freezing

@pytest.mark.parametrize("train_bn", [True, False])
@pytest.mark.parametrize("opt_func", [torch.optim.AdamW, SGD])
def test_frozen_weights_do_not_move_and_norms_do_as_train_bn_says(train_bn, opt_func):
    class Watch(Callback):
        def after_pred(self, state):
            modes.append([module.training for module in state.model])

    modes = []
    learn = make(opt_func=opt_func, train_bn=train_bn, callbacks=[Watch()])
    learn.fit(0.01, 1)  # so that there is optimizer state which could be applied by mistake
    model = learn.model
    stem, norm, middle, head = state(model[0]), state(model[1]), state(model[2]), state(model[4])
    modes.clear()
    learn.freeze()
    learn.fit(0.01, 1)
    assert same(stem, model[0])
    assert same(middle, model[2])
    assert not same(head, model[4])
    assert same(norm, model[1]) is not train_bn
    assert modes == [[True, train_bn, True, True, True]] * 5
    assert all(module.training for module in model)


def test_a_norm_layer_without_parameters_is_frozen_with_the_layer_before_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    learn = make(model, splitter={"body": "0.*", "head": "2.*"}, train_bn=False)
    learn.freeze()
    before = state(model[1])
    learn.fit(0.01, 1)
    assert same(before, model[1])


def test_frozen_parameters_lose_gradient_and_optimizer_state():
    learn = make(train_bn=False)
    learn.fit(0.01, 1)
    learn.freeze_to(2)
    assert [p.requires_grad for p in learn.model.parameters()] == [False] * 6 + [True] * 2
    assert set(learn.opt.state) == set(learn.model[4].parameters())
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())


def test_train_bn_keeps_norms_of_frozen_groups_trainable():
    learn = make()
    learn.freeze()
    trained = {name for name, p in learn.model.named_parameters() if p.requires_grad}
    assert trained == {"1.weight", "1.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize(("n", "trained"), [(0, 3), (1, 2), (2, 1), (-1, 1), (-2, 2), (-3, 3)])
def test_freeze_to_counts_from_both_ends(n, trained):
    learn = make(train_bn=False)
    learn.freeze_to(n)
    assert [not group.is_frozen for group in learn.groups] == [False] * (3 - trained) + [True] * trained


@pytest.mark.parametrize("n", [3, -4, 1.0, True, "head", None])
def test_freeze_to_refuses_what_is_no_group(n):
    with pytest.raises(ValueError, match=r"an int -3 <= n < 3 for 3 layer groups \(stem, body, head\), got "):
        make().freeze_to(n)


def test_a_frozen_group_keeps_its_scheduled_rate():
    learn = make()
    learn.freeze()
    learn.fit(slice(1e-4, 1e-2), 1)
    assert learn.recorder.lr_groups[-1] == pytest.approx([1e-4, 1e-3, 1e-2])


# ---- the optimizer

def test_the_optimizer_is_fused_where_that_can_be():
    assert make().opt.defaults["fused"] is True
    assert make(opt_func=torch.optim.SGD).opt.defaults["fused"] is True
    assert "fused" not in make(opt_func=torch.optim.Adamax).opt.defaults


@pytest.mark.parametrize("choice", [{"fused": False}, {"foreach": True}, {"capturable": False}])
def test_the_users_choice_of_a_kernel_is_respected(choice):
    learn = make(opt_func=partial(torch.optim.AdamW, **choice))
    assert {name: learn.opt.defaults[name] for name in choice} == choice
    assert learn.opt.defaults["fused"] is not True


def test_a_model_of_complex_numbers_is_not_fused():
    assert not make(nn.Linear(4, 2, dtype=torch.complex64), splitter=None).opt.defaults["fused"]


def test_what_makes_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"opt_func must make a torch optimizer, got dict"):
        make(opt_func=lambda params, lr: {})


@pytest.mark.parametrize(("opt_func", "momentum"), [(SGD, 0.9), (torch.optim.AdamW, 0.9), (torch.optim.Adagrad, None),
                                                    (partial(torch.optim.RMSprop, momentum=0.5), 0.5)])
def test_momentum_is_sgds_or_adams_beta1(opt_func, momentum):
    learn = make(opt_func=opt_func)
    learn.fit(0.01, 1)
    assert learn.recorder.moms.tolist() == pytest.approx([momentum or float("nan")] * 5, nan_ok=True)
    if momentum is None:
        with pytest.raises(ValueError, match=r"schedules the momentum, but Adagrad has none\. Pass moms=None"):
            learn.fit_one_cycle(1, 0.01)
        learn.fit_one_cycle(1, 0.01, moms=None)
    else:
        learn.fit_one_cycle(1, 0.01, moms=(0.8, 0.7))
        assert learn.recorder.moms.min() == 0.7
        assert learn.recorder.moms.max() == 0.8
        assert learn.opt.param_groups[0].get("betas", [learn.opt.param_groups[0].get("momentum")])[0] == momentum


@pytest.mark.parametrize("opt_func", [SGD, torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9, dampening=0.5),
                                      torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam])
def test_thawed_layers_train_with_every_optimizer(opt_func):
    """Norm layers have a momentum by then, the layers beside them in the same param_group do not."""
    learn = make(opt_func=opt_func)
    moms = None if opt_func is torch.optim.Adagrad else (0.95, 0.85)
    learn.freeze()
    learn.fit_one_cycle(1, slice(1e-3), moms=moms)
    learn.unfreeze()
    before = state(learn.model[2])
    learn.fit_one_cycle(2, slice(1e-5, 1e-3), moms=moms)
    assert not same(before, learn.model[2])


def test_a_branch_that_is_taken_later_trains_with_sgd():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.calls = nn.Linear(4, 2), nn.Linear(4, 2), 0

        def forward(self, x):
            self.calls += 1
            return self.first(x) if self.calls < 3 else self.first(x) + self.second(x)

    learn = make(Late(), splitter=None, opt_func=SGD)
    before = state(learn.model.second)
    learn.fit(0.01, 1)
    assert not same(before, learn.model.second)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, at its first sparse tensor
@pytest.mark.parametrize("opt_func", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_train(opt_func):
    model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 2))
    data = [(torch.randint(0, 10, (8, 3)), torch.ones(8, 2))] * 2
    learn = Learner(model, (data, None), nn.MSELoss(), opt_func=opt_func, wd=0, verbose=False)
    before = state(model[0])
    learn.fit(0.1, 1)
    assert not same(before, model[0])


def test_a_new_model_needs_a_new_learner():
    learn = make()
    learn.model = net()
    learn.opt = torch.optim.SGD(learn.model.parameters(), 0.1)
    learn.opt.param_groups[0]["layer_group"] = 0
    with pytest.raises(ValueError, match=r"not the model that this Learner was made for.* Make a new Learner"):
        learn.fit(0.1)
