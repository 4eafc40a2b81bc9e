"""Gradual unfreezing: what moved in which update, against an optimizer that takes notes and a loop written by hand."""

import copy
from functools import partial

import pytest
import torch
from helpers import At, batches, bits, learner, spying, throw, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minifast import CancelFit, OneCycle
from minifast.callbacks.unfreeze import Unfreeze
from minifast.schedules.time_limit import TimeLimit

GROUPS = {"body": "0.*", "neck": "1.*", "head": "2.*"}


def three_layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 1)).double()


def three_groups(train=None, *, seed=0, **options):
    data = batches(5, dtype=torch.float64, seed=seed) if train is None else train
    return learner(data, **{"model": three_layers(seed), "splitter": GROUPS} | options)


def moved(learn, first):
    """The names of the parameters that each update moved, and of those that had a gradient, as the optimizer saw it."""
    names = {id(p): name for name, p in learn.model.named_parameters()}
    held = [names[id(p)] for group in learn.opt.param_groups for p in group["params"]]
    before = [first[name] for name in held]
    rows = []
    for note in learn.opt.seen:
        pairs = zip(held, before, note["weights"], strict=True)
        rows.append({name for name, old, new in pairs if not torch.equal(old, new)})
        assert rows[-1] == {name for name, grad in zip(held, note["grads"], strict=True) if grad is not None}
        before = note["weights"]
    return rows


def copy_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def first_moves(learn, n_epochs=2, **options):
    """Parameter -> the first update that moved it; that all later ones did is checked."""
    first = copy_of(learn.model)
    learn.fit(0.05, n_epochs, **options)
    rows = moved(learn, first)
    found = {}
    for name in first:
        found[name] = next((step for step, row in enumerate(rows) if name in row), None)
        assert found[name] is None or all(name in row for row in rows[found[name] :])
    return found


def by_layer(found):
    assert all(found[f"{i}.weight"] == found[f"{i}.bias"] for i in range(3))
    return [found[f"{i}.weight"] for i in range(3)]


# ---- what is thawed when


tenth = st.integers(0, 10)


@settings(max_examples=50)
@given(tenths=st.tuples(tenth, tenth), n_batches=st.integers(1, 4), n_epochs=st.integers(1, 3),
       base=st.sampled_from([torch.optim.SGD, torch.optim.AdamW]))  # fmt: skip
def test_each_part_moves_from_exactly_its_share_on(tenths, n_batches, n_epochs, base):
    learn = three_groups(batches(n_batches, dtype=torch.float64), opt_func=spying(base), wd=0.1, callbacks=[
        Unfreeze({"body": tenths[0] / 10, "neck": tenths[1] / 10})])  # fmt: skip
    n_steps = n_batches * n_epochs
    wanted = [next((step for step in range(n_steps) if 10 * step >= tenth * n_steps), None) for tenth in tenths]
    assert by_layer(first_moves(learn, n_epochs)) == [*wanted, 0]


@given(share=st.floats(0, 1), n_steps=st.integers(1, 10**7))
def test_steps_are_the_first_at_or_above_the_share(share, n_steps):
    step = Unfreeze({"x": share}).steps(n_steps)["x"]
    assert step >= share * n_steps - 1e-6
    assert step == 0 or step - 1 < share * n_steps


@pytest.mark.parametrize("n_steps", [100, 1000, 10**6, 10**8])
def test_shares_that_floating_point_cannot_hold_are_exact(n_steps):
    for hundredth in range(101):
        assert Unfreeze({"x": hundredth / 100}).steps(n_steps) == {"x": hundredth * n_steps // 100}


@pytest.mark.parametrize("names", [("body", "neck"), ("0", "1"), ("0.*", "1.*"), ("0.[bw]*", "1.?*")])
def test_a_name_is_a_group_a_module_or_a_glob(names):
    found = by_layer(first_moves(three_groups(callbacks=[Unfreeze({names[0]: 0.7, names[1]: 0.31})])))
    assert found == [7, 4, 0]


def test_a_glob_may_mean_single_parameters():
    found = first_moves(three_groups(callbacks=[Unfreeze({"*.bias": 0.5, "2.weight": 0.2})]))
    assert found == {"0.weight": 0, "1.weight": 0, "2.weight": 2, "0.bias": 5, "1.bias": 5, "2.bias": 5}


def test_a_layer_group_goes_before_a_module_of_the_same_name():
    learn = three_groups(splitter={"2": "0.*", "rest": "[12].*"}, callbacks=[Unfreeze({"2": 0.5})])
    assert by_layer(first_moves(learn)) == [5, 0, 0]


def test_tied_weights_are_found_under_both_names():
    for name in ("0", "1"):
        model = three_layers()
        model[1] = nn.Linear(5, 3).double()
        model[2] = nn.Linear(3, 1).double()
        model.append(nn.Linear(1, 1).double())
        model[3].weight = model[2].weight
        model[3] = nn.Identity()
        tied = nn.Module()
        tied.inner = model
        tied.again = model[int(name)]
        tied.forward = model.forward
        learn = three_groups(model=tied, splitter=None, callbacks=[Unfreeze({"again": 0.5})])
        found = first_moves(learn)
        assert {key.split(".")[1] for key, step in found.items() if step == 5} == {name}


def test_a_module_does_not_mean_others_whose_names_begin_alike():
    model = nn.Sequential()
    for name, layer in zip(("layer1", "layer11", "layer"), three_layers(), strict=True):
        model.add_module(name, layer)
    found = first_moves(three_groups(model=model, splitter=None, callbacks=[Unfreeze({"layer1": 0.5, "layer": 0.2})]))
    assert [found[f"{name}.bias"] for name in ("layer1", "layer11", "layer")] == [5, 0, 2]


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("frozen_before", [False, True])
@pytest.mark.parametrize("one_group", [False, True])
def test_it_is_the_hand_written_loop(base, frozen_before, one_group):
    """With the optimizers that a Learner makes, fused ones; `frozen_before`: their momentum has no buffers yet."""
    opt_func = {"SGD": partial(torch.optim.SGD, momentum=0.9), "AdamW": torch.optim.AdamW}[base]
    data, model, other = batches(5, dtype=torch.float64), three_layers(), three_layers()
    for p in model[:2].parameters():
        p.requires_grad_(not frozen_before)
    learn = learner(data, model=model, opt_func=opt_func, wd=0.1, wd_norm_bias=True,
                    splitter=None if one_group else GROUPS, callbacks=[Unfreeze({"0": 0.7, "1": 0.3})])  # fmt: skip
    assert learn.opt.defaults["fused"]
    learn.fit(0.02, 2)
    own = {"momentum": 0.9} if base == "SGD" else {}
    opt = getattr(torch.optim, base)(other.parameters(), lr=0.02, weight_decay=0.1, foreach=False, fused=False, **own)
    for step, (x, y) in enumerate([*data, *data]):
        loss = ((other(x) - y) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        for layer, thawed in ((0, 7), (1, 3)):
            if step < thawed:
                other[layer].weight.grad = other[layer].bias.grad = None
        opt.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_a_scheduled_momentum_reaches_thawed_parts():
    """The fused SGD of a Learner against the plain one, which makes its buffers when it needs them."""
    weights = []
    for opt_func in (torch.optim.SGD, partial(torch.optim.SGD, foreach=False)):
        learn = three_groups(opt_func=opt_func, callbacks=[Unfreeze({"body": 0.7, "neck": 0.3})])
        learn.freeze()
        learn.fit_one_cycle(2, 0.05)
        weights.append(dict(learn.model.state_dict()))
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-13)


def test_a_frozen_part_is_not_decayed_and_has_no_optimizer_state():
    learn = three_groups(opt_func=spying(torch.optim.AdamW), callbacks=[Unfreeze({"body": 1.0})])
    before = bits(learn.model[0].state_dict())
    learn.fit(0.05, 2, wd=0.5)
    assert bits(learn.model[0].state_dict()) == before
    assert not any(p in learn.opt.state for p in learn.model[0].parameters())
    assert all(p in learn.opt.state for p in learn.model[1:].parameters())


def test_earlier_optimizer_state_is_left_alone_until_the_part_is_thawed():
    learn = three_groups(opt_func=torch.optim.AdamW)
    learn.fit(0.05)
    before = bits([learn.opt.state[p] for p in learn.model[0].parameters()])
    looks = []
    look = At("after_step", lambda state: looks.append(bits([state.opt.state[p] for p in learn.model[0].parameters()])))
    learn.fit(0.05, 2, callbacks=[Unfreeze({"body": 0.5}), look])
    assert [seen == before for seen in looks] == [True] * 5 + [False] * 5


def test_learning_rates_of_frozen_groups_are_scheduled_all_the_time():
    learn = three_groups(callbacks=[Unfreeze({"body": 0.5})])
    learn.fit_one_cycle(2, slice(1e-3, 1e-1))
    plain = three_groups()
    plain.fit_one_cycle(2, slice(1e-3, 1e-1))
    assert bits(learn.recorder.lr_groups) == bits(plain.recorder.lr_groups)
    assert learn.recorder.lr_groups[:, 2].tolist() == OneCycle(0.1).values(10)["lr"]


# ---- windows, time, resume


@pytest.mark.parametrize("k", [2, 3])
def test_accumulation_thaws_between_updates(k):
    learn = three_groups(batches(6, dtype=torch.float64), callbacks=[Unfreeze({"body": 0.5})])
    assert by_layer(first_moves(learn, 2, accumulate=k))[0] == 6 // k


def test_a_position_that_passes_within_a_window_thaws_with_the_next_one():
    """As under a time limit. Half a window's gradient would be a wrong one."""
    clock = At("before_batch", lambda state: setattr(state, "elapsed", state.batch_index))
    clock.order = TimeLimit.order
    learn = three_groups(batches(8, dtype=torch.float64), callbacks=[clock, Unfreeze({"body": 0.5})])
    counts = first_moves(learn, 1, accumulate=4)  # 2 updates; share 0.5 is position 1, the second batch
    assert by_layer(counts) == [1, 0, 0]


def test_a_fit_limited_in_time_thaws_by_the_clock():
    clock = At("before_batch", lambda state: setattr(state, "elapsed", 9 if state.step >= 2 else 0))
    clock.order = TimeLimit.order
    found = by_layer(first_moves(three_groups(callbacks=[clock, Unfreeze({"body": 0.9, "neck": 1.0})])))
    assert found == [2, None, 0]


@pytest.mark.table
@pytest.mark.parametrize("at", range(1, 10))
@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_fit_goes_on_as_if_nothing_had_happened(at, before):
    """A fresh learner takes up weights and optimizer after update `at`, `step` set before or after `before_fit`."""
    data = batches(10, dtype=torch.float64)
    make = partial(three_groups, opt_func=partial(torch.optim.SGD, momentum=0.9))
    parts, kept = {"body": 0.7, "neck": 0.3}, {}

    def keep(state):
        if state.step == at - 1:
            kept.update(copy.deepcopy({"model": state.model.state_dict(), "opt": state.opt.state_dict()}))

    whole = make(data, callbacks=[Unfreeze(parts), At("after_step", keep)])
    whole.fit(0.05, 1)

    def take_up(state):
        state.model.load_state_dict(kept["model"])
        state.opt.load_state_dict(kept["opt"])
        state.step = at

    cb, resume = Unfreeze(parts), At("before_fit", take_up)
    whole_length = At("before_fit", lambda state: setattr(state, "n_steps", 10))
    whole_length.order, resume.order = -1, -1 if before else 150  # of Unfreeze: 100
    rest = make(data[at:], callbacks=[cb, whole_length, resume])
    rest.fit(0.05, 1)
    assert bits(rest.model.state_dict()) == bits(whole.model.state_dict())
    assert cb.state_dict() == {}


# ---- what it leaves behind


def test_after_a_whole_fit_everything_is_trainable():
    learn = three_groups(callbacks=[Unfreeze({"body": 0.7, "neck": 0.3})])
    learn.freeze()
    assert trainable(learn.model) == {"2.weight", "2.bias"}
    learn.fit(0.05, 2)
    assert trainable(learn.model) == set(copy_of(learn.model))


@pytest.mark.parametrize(("error", "raised"), [(CancelFit, None), (KeyboardInterrupt, KeyboardInterrupt),
                                               (OSError("disk"), OSError)])  # fmt: skip
@pytest.mark.parametrize("frozen_before", [False, True])
def test_after_an_early_end_thawed_parts_stay_so_and_the_others_are_as_before(error, raised, frozen_before):
    learn = three_groups(callbacks=[Unfreeze({"body": 0.7, "neck": 0.3}), At("after_batch", throw(error), 4)])
    if frozen_before:
        learn.freeze()
    if raised is None:
        learn.fit(0.05, 2)
    else:
        with pytest.raises(raised):
            learn.fit(0.05, 2)
    thawed = {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert trainable(learn.model) == (thawed if frozen_before else set(copy_of(learn.model)))


def test_a_failure_of_another_callback_before_the_fit_leaves_nothing_frozen():
    learn = three_groups(callbacks=[Unfreeze({"body": 0.7}), At("before_fit", throw(OSError("disk")))])
    with pytest.raises(OSError, match="disk"):
        learn.fit(0.05)
    assert trainable(learn.model) == set(copy_of(learn.model))


def test_it_serves_two_fits_and_repr_rebuilds_it():
    cb = Unfreeze({"body": 0.5}, train_bn=False)
    assert repr(eval(repr(cb))) == repr(cb) == "Unfreeze(parts={'body': 0.5}, train_bn=False)"
    learn = three_groups(callbacks=[cb])
    assert by_layer(first_moves(learn)) == [5, 0, 0]
    learn.opt.seen.clear()
    assert by_layer(first_moves(learn, 4)) == [10, 0, 0]


def test_lr_find_trains_everything():
    learn = three_groups(batches(20, dtype=torch.float64), callbacks=[Unfreeze({"body": 0.5})])
    grads = []
    learn.model[0].weight.register_hook(lambda grad: grads.append(1))
    learn.lr_find(num_it=12)
    assert len(grads) == 12


def test_the_callers_dict_is_neither_kept_nor_changed():
    parts = {"body": 1}
    cb = Unfreeze(parts)
    parts["body"] = 0
    assert cb.parts == {"body": 1.0}


# ---- norm layers


def with_norms(affine=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5, affine=affine), nn.Linear(5, 1)).double()
    return learner(batches(5, dtype=torch.float64), model=model, splitter={"body": "[01].*", "head": "2.*"}, **options)


def modes_of(learn, n_epochs=2):
    """Whether the norm layer was training, and whether its weight was, in each batch."""
    rows = []
    norm = learn.model[1]
    norm.register_forward_pre_hook(
        lambda module, args: rows.append((module.training, module.affine and module.weight.requires_grad)))
    learn.fit(0.05, n_epochs)
    return rows


@pytest.mark.parametrize("name", ["body", "[01].*"])
@pytest.mark.parametrize("freeze", [False, True])
def test_norm_layers_of_frozen_parts_train_as_after_freeze(freeze, name):
    learn = with_norms(callbacks=[Unfreeze({name: 0.5})])
    if freeze:
        learn.freeze()
    first = copy_of(learn.model)
    assert modes_of(learn) == [(True, True)] * 10
    rows = moved(learn, first)
    norm, head = {"1.weight", "1.bias"}, {"2.weight", "2.bias"}
    assert rows == [norm | head] * 5 + [{"0.weight"} | norm | head] * 5


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])  # within an epoch, between two, within the second
def test_without_train_bn_norm_layers_are_still_until_their_part_is_thawed(share):
    learn = with_norms(callbacks=[Unfreeze({"body": share}, train_bn=False)])
    n = round(10 * share)
    assert modes_of(learn) == [(False, False)] * n + [(True, True)] * (10 - n)
    assert learn.model[1].num_batches_tracked == 10 - n
    assert learn.model[1].training


def test_norm_layers_that_freeze_made_still_wake_up_with_their_part():
    learn = with_norms(callbacks=[Unfreeze({"body": 0.5})], train_bn=False)
    learn.freeze()
    assert modes_of(learn, 3) == [(False, False)] * 8 + [(True, True)] * 7


def test_a_norm_layer_without_parameters_goes_with_the_layer_before_it():
    learn = with_norms(affine=False, callbacks=[Unfreeze({"body": 0.5}, train_bn=False)])
    assert modes_of(learn) == [(False, False)] * 5 + [(True, False)] * 5


def test_validation_is_in_eval_mode_throughout():
    learn = with_norms(callbacks=[Unfreeze({"body": 0.5}, train_bn=False)])
    learn.dls.valid = batches(1, dtype=torch.float64, seed=1)
    assert [training for training, _ in modes_of(learn)] == [False] * 6 + [True] * 5 + [False]


# ---- what it refuses


def refused(match, parts, error=ValueError, **options):
    learn = three_groups(callbacks=[Unfreeze(parts)], **options)
    before = bits(learn.model.state_dict()), trainable(learn.model)
    with pytest.raises(error, match=match):
        learn.fit(0.1)
    assert (bits(learn.model.state_dict()), trainable(learn.model)) == before


def test_arguments_out_of_range_are_refused():
    for share in (-0.1, 1.01, float("nan"), "0.3", True, None):
        match = rf"^parts\['body'\] must be a finite number >= 0 and <= 1, got {share!r}"
        with pytest.raises(ValueError, match=match):
            Unfreeze({"body": share})
    for parts in ("body", ["body"], {3: 0.5}, 0.5):
        with pytest.raises(TypeError, match=r"^parts must be a dict of name -> share of the fit, got "):
            Unfreeze(parts)
    with pytest.raises(ValueError, match=r"^parts must name at least one part of the model, got none"):
        Unfreeze({})
    with pytest.raises(TypeError, match=r"^train_bn must be True or False, got 1"):
        Unfreeze({"body": 0.5}, train_bn=1)
    with pytest.raises(ValueError, match=r"^n_steps must be an int >= 1, got 0"):
        Unfreeze({"body": 0.5}).steps(0)


def test_an_unknown_name_is_refused_with_those_that_there_are():
    refused(r"^there is no layer group, module or parameter 'layer4' to unfreeze\. Layer groups: body, neck, head\. "
            r"Parameters: 0\.weight, 0\.bias, 1\.weight, 1\.bias, 2\.weight and 1 more\.", {"layer4": 0.5})  # fmt: skip


def test_a_parameter_that_two_names_mean_is_refused():
    refused("^'body' and '0' share a parameter", {"body": 0.5, "0": 0.2})
    refused(r"^'neck' and '\*' share a parameter", {"neck": 0.5, "*": 0.2})


def test_a_fit_that_would_begin_with_nothing_to_train_is_refused():
    match = r"^Unfreeze\(parts=\{'body': 0.1, 'neck': 0.2, 'head': 0.3\}.* leaves nothing to train in update 0 of 5\. "
    refused(match, {"body": 0.1, "neck": 0.2, "head": 0.3})
    refused("leaves nothing to train", {"*": 1.0})
    learn = three_groups(callbacks=[Unfreeze({"head": 0.5})])
    for p in learn.model[:2].parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves nothing to train in update 0 of 5"):
        learn.fit(0.1)
    learn.fit(0.1, callbacks=[Unfreeze({"head": 0})])


def test_two_of_them_in_one_fit_are_refused():
    learn = three_groups(callbacks=[Unfreeze({"body": 0.5}), Unfreeze({"neck": 0.5})])
    before = trained(learn)
    with pytest.raises(ValueError, match=r"both Unfreeze\(.*\) and Unfreeze\(.*\) set 'requires_grad'"):
        learn.fit(0.1)
    assert trained(learn) == before
