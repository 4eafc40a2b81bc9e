"""Mixed batches and small images: what the model and the loss are really given."""

import math
import random
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from helpers import At, bits, learner, rngs, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minifast import CircularLR, Learner, TensorLoader, accuracy
from minifast.callbacks.batches import CutMix, MixUp, ProgressiveResizing
from minifast.callbacks.unfreeze import Unfreeze
from minifast.schedules.time_limit import TimeLimit

CLASSES = 3
MIXERS = [MixUp(num_classes=CLASSES), CutMix(num_classes=CLASSES), CutMix(num_classes=CLASSES, mixup_alpha=0.4)]
BOTH = pytest.mark.parametrize("kind", [MixUp, CutMix])
Pair = namedtuple("Pair", "x y")


def images(n=3, size=6, side=8, *, seed=0, dtype=torch.float64):
    """`n` batches of noise (size, 2, side, side) whose neighbours never have the same label."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 2, side, side, generator=generator, dtype=dtype), (torch.arange(size) + i) % CLASSES)
            for i in range(n)]  # fmt: skip


def classifier(train=None, valid=None, *, seed=0, dtype=torch.float64, loss_func=None, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    return learner(images() if train is None else train, valid, model=model.to(dtype),
                   loss_func=nn.CrossEntropyLoss() if loss_func is None else loss_func, **options)  # fmt: skip


class Given:
    """What the model and the loss were called with in training."""

    def __init__(self, learn):
        self.inputs, self.targets = [], []
        learn.model.register_forward_pre_hook(lambda model, args: self.inputs.append(args[0].clone()))
        learn.loss_func.register_forward_pre_hook(lambda loss, args: self.targets.append(args[1].clone()))


def given_by(callbacks, train=None, **options):
    """(learner, what model and loss were given) after one epoch."""
    learn = classifier(train, callbacks=callbacks)
    seen = Given(learn)
    learn.fit(0.1, 1, **options)
    return learn, seen


# ---- mixing


@pytest.mark.parametrize("seed", range(5))
def test_mixup_weighs_samples_and_targets_alike(seed):
    data = images(seed=seed)
    torch.manual_seed(seed)
    _, seen = given_by([MixUp(num_classes=CLASSES)], data)
    shares = set()
    for (x, y), mixed, target in zip(data, seen.inputs, seen.targets, strict=True):
        share = target[0, y[0]].item()
        shares.add(share)
        assert 0 <= share <= 1
        wanted = torch.zeros(len(y), CLASSES, dtype=torch.float64)
        for i in range(len(y)):
            wanted[i, y[i]] += share
            wanted[i, y[i - 1]] += 1 - share
        torch.testing.assert_close(target, wanted)
        before = torch.stack([x[i - 1] for i in range(len(x))])
        torch.testing.assert_close(mixed, share * x + (1 - share) * before)
    assert len(shares) == len(data)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_a_rectangle_and_weighs_targets_by_its_area(seed):
    data = images(seed=seed, side=16)
    torch.manual_seed(seed)
    _, seen = given_by([CutMix(num_classes=CLASSES)], data)
    for (x, y), mixed, target in zip(data, seen.inputs, seen.targets, strict=True):
        for i in range(len(y)):
            pasted = (mixed[i] != x[i]).any(0)
            assert torch.equal(mixed[i][:, pasted], x[i - 1][:, pasted])
            rows, columns = pasted.any(1).sum().item(), pasted.any(0).sum().item()
            assert pasted.sum() == rows * columns  # a rectangle
            assert target[i, y[i - 1]].item() == pytest.approx(rows * columns / 256, abs=1e-12)
            assert target[i].sum().item() == pytest.approx(1)


def kinds_of_mix(mixer, n=60):
    data = images(n, size=2)
    torch.manual_seed(0)
    _, seen = given_by([mixer], data)
    return ["cut" if torch.isin(mixed, x).all() else "mix" for (x, _), mixed in zip(data, seen.inputs, strict=True)]


def test_cutmix_with_mixup_alpha_draws_one_of_the_two_for_each_batch():
    kinds = kinds_of_mix(CutMix(num_classes=CLASSES, mixup_alpha=1.0))
    assert 15 <= kinds.count("mix") <= 45  # 60 fair draws: less than one chance in 10,000 of leaving that
    assert set(kinds_of_mix(CutMix(num_classes=CLASSES), 20)) == {"cut"}


@pytest.mark.parametrize("alpha", [0.01, 0.4, 1.0, 8.0])
def test_alpha_sets_how_far_the_shares_spread(alpha):
    """The variance of Beta(a, a) is 1 / (4 * (2a + 1))."""
    data = [(torch.zeros(2, 1, dtype=torch.float64), torch.tensor([0, 1]))] * 400
    learn = learner(data, model=nn.Linear(1, 2).double(), loss_func=nn.CrossEntropyLoss(), callbacks=[MixUp(alpha, 2)])
    seen = Given(learn)
    learn.fit(0.1)
    shares = torch.stack([target[0, 0] for target in seen.targets])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.08)
    assert shares.std().item() == pytest.approx(math.sqrt(1 / (4 * (2 * alpha + 1))), rel=0.12)


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_a_fit_is_the_hand_written_loop_over_the_batches_it_was_given(mixer):
    learn, start = classifier(callbacks=[mixer]), classifier().model
    seen = Given(learn)
    learn.fit(0.1, 2)
    for x, y in zip(seen.inputs, seen.targets, strict=True):
        loss = -(y * start(x).log_softmax(1)).sum(1).mean()
        grads = torch.autograd.grad(loss, list(start.parameters()))
        with torch.no_grad():
            for p, grad in zip(start.parameters(), grads, strict=True):
                p -= 0.1 * grad
    for ours, theirs in zip(learn.model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_composes_with_mixup(smoothing):
    learn = classifier(loss_func=nn.CrossEntropyLoss(label_smoothing=smoothing), callbacks=[MixUp(num_classes=CLASSES)])
    seen, outputs = Given(learn), []
    learn.model.register_forward_hook(lambda model, args, out: outputs.append(out.detach().clone()))
    learn.fit(0.1)
    smooth = [(1 - smoothing) * target + smoothing / CLASSES for target in seen.targets]
    losses = [-(y * out.log_softmax(1)).sum(1).mean().item() for y, out in zip(smooth, outputs, strict=True)]
    assert learn.recorder.losses == pytest.approx(losses, rel=1e-6)


def test_label_smoothing_needs_nothing_of_ours():
    learn = classifier(loss_func=nn.CrossEntropyLoss(label_smoothing=0.1))
    x, y = images()[0]
    wanted = nn.functional.cross_entropy(learn.model(x), y, label_smoothing=0.1).item()
    learn.fit(0.1)
    assert learn.recorder.losses[0] == pytest.approx(wanted)


@BOTH
def test_floating_point_targets_are_mixed_as_they_are(kind):
    x, _ = images(1)[0]
    for y in (torch.arange(6.0).double(), torch.rand(6, 1).double(), torch.eye(6)[:, :CLASSES].double()):
        model = nn.Sequential(nn.Flatten(), nn.Linear(128, max(1, y[0].numel()))).double()
        if y.ndim == 1:
            model.append(nn.Flatten(0))
        learn = learner([(x, y)], model=model, loss_func=nn.MSELoss(), callbacks=[kind(alpha=1.0)])
        seen = Given(learn)
        learn.fit(0.01)
        (target,), before = seen.targets, y.roll(1, 0)
        differs = y != before
        shares = (target - before)[differs] / (y - before)[differs]
        assert target.shape == y.shape
        torch.testing.assert_close(shares, shares[:1].expand_as(shares))


def test_mixup_takes_inputs_of_any_shape():
    for shape in [(5,), (5, 3), (5, 2, 3), (5, 1, 2, 2, 2)]:
        x = torch.randn(shape, dtype=torch.float64)
        model = nn.Sequential(nn.Flatten() if len(shape) > 1 else nn.Unflatten(0, (5, 1)),
                              nn.Linear(x[0].numel(), 5)).double()  # fmt: skip
        learn = learner([(x, torch.arange(5))], model=model, loss_func=nn.CrossEntropyLoss(),
                        callbacks=[MixUp(num_classes=5)])  # fmt: skip
        seen = Given(learn)
        learn.fit(0.1)
        share = seen.targets[0][0, 0]
        torch.testing.assert_close(seen.inputs[0], share * x + (1 - share) * x.roll(1, 0))


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_a_batch_of_one_sample_stays_as_it_is(mixer):
    data = images(2, size=1)
    _, seen = given_by([mixer], data)
    for (x, y), mixed, target in zip(data, seen.inputs, seen.targets, strict=True):
        torch.testing.assert_close(mixed, x)
        torch.testing.assert_close(target, nn.functional.one_hot(y, CLASSES).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probabilities_are_at_least_single_precision(dtype):
    learn = classifier(images(dtype=dtype), dtype=dtype, callbacks=[MixUp(num_classes=CLASSES)])
    seen = Given(learn)
    learn.fit(0.01)
    assert {x.dtype for x in seen.inputs} == {dtype}
    assert {y.dtype for y in seen.targets} == {torch.promote_types(dtype, torch.float32)}


@BOTH
def test_the_loaders_own_tensors_and_the_validation_data_are_untouched(kind):
    data, held_back = images(), images(2, seed=1)
    before = bits([data, held_back])
    learn = classifier(data, held_back, metrics=[accuracy], callbacks=[kind(num_classes=CLASSES)])
    seen = Given(learn)
    learn.fit(0.1)
    assert bits([data, held_back]) == before
    assert bits(seen.inputs[3:]) == bits([x for x, _ in held_back])
    assert [tuple(y.shape) for y in seen.targets] == [(6, CLASSES)] * 3 + [(6,)] * 2
    seen.targets.clear()
    learn.validate()
    assert [tuple(y.shape) for y in seen.targets] == [(6,)] * 2


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_its_chance_is_all_in_torchs_global_generator(mixer):
    """A fresh callback that begins with the generator of the middle goes on like the one that was there."""
    states, python, numpy = [], random.getstate(), bits(list(np.random.get_state()))
    keep = At("before_batch", lambda state: states.append(torch.get_rng_state()))
    first = classifier(images(5), callbacks=[keep, mixer])
    whole = Given(first)
    first.fit(0.1)
    restore = At("before_batch", lambda state: torch.set_rng_state(states[3]), 0)
    second = classifier(images(5)[3:], callbacks=[restore, eval(repr(mixer))])
    rest = Given(second)
    second.fit(0.1)
    assert bits([rest.inputs, rest.targets]) == bits([whole.inputs[3:], whole.targets[3:]])
    assert (random.getstate(), bits(list(np.random.get_state()))) == (python, numpy)


def test_it_takes_lists_and_named_tuples_and_keeps_their_kind():
    for make in (list, Pair._make, tuple):
        kinds = []
        note = At("after_loss", lambda state, kinds=kinds: kinds.append(type(state.batch)))
        learn = classifier([make(images()[0])], callbacks=[MixUp(num_classes=CLASSES), note])
        learn.unpack = (lambda batch: (batch.x, batch.y)) if make == Pair._make else learn.unpack
        learn.fit(0.1)
        assert kinds == [Pair if make == Pair._make else make]


def test_it_runs_in_lr_find():
    learn = classifier(images(20), callbacks=[MixUp(num_classes=CLASSES)])
    seen, before = Given(learn), trained(learn) | rngs()
    learn.lr_find(num_it=15)
    assert len(seen.targets) == 15
    assert {tuple(y.shape) for y in seen.targets} == {(6, CLASSES)}
    assert trained(learn) | rngs() == before


@pytest.mark.parametrize("cb", [*MIXERS, ProgressiveResizing(), ProgressiveResizing(0.75, 0.1, 0.3, 2)], ids=repr)
def test_repr_rebuilds_it_and_it_serves_two_fits(cb):
    twin = eval(repr(cb))
    assert type(twin) is type(cb)
    assert repr(twin) == repr(cb)
    learn = classifier(callbacks=[cb])
    learn.fit(0.1)
    learn.fit(0.1, 2)
    assert learn.recorder.epochs[-1]["epoch"] == 1
    assert all(module.training for module in learn.model.modules())


# ---- what mixing refuses


def refused(error, match, cb, train=None, **options):
    learn = classifier(train, callbacks=[cb], **options)
    before = bits(learn.model.state_dict())
    with pytest.raises(error, match=match):
        learn.fit(0.1)
    assert bits(learn.model.state_dict()) == before


@BOTH
def test_arguments_out_of_range_are_refused(kind):
    for alpha in (0, 0.001, -1, float("nan"), "1"):
        with pytest.raises(ValueError, match=rf"^alpha must be a finite number >= 0.01, got {alpha!r}"):
            kind(alpha)
    for n in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match=f"^num_classes must be an int >= 2, got {n!r}"):
            kind(num_classes=n)


def test_a_bad_mixup_alpha_is_refused():
    with pytest.raises(ValueError, match=r"^mixup_alpha must be a finite number >= 0.01, got 0"):
        CutMix(mixup_alpha=0)


def test_two_of_them_in_one_fit_are_refused_and_the_fits_own_wins():
    with pytest.raises(ValueError, match=r"both MixUp\(.*\) and CutMix\(.*\) set 'the mixing of samples'"):
        classifier(callbacks=[MIXERS[0], MIXERS[1]]).fit(0.1)
    learn = classifier(images(1), callbacks=[MIXERS[0]])
    seen = Given(learn)
    learn.fit(0.1, callbacks=[MIXERS[1]])
    assert torch.isin(seen.inputs[0], images(1)[0][0]).all()


@BOTH
@pytest.mark.parametrize(
    "loss_func", [nn.NLLLoss(), nn.functional.nll_loss, partial(nn.functional.multi_margin_loss, p=2)]
)
def test_a_loss_that_wants_class_indices_is_refused(kind, loss_func):
    refused(ValueError, rf"^{kind.__name__} makes targets of probabilities, but (NLLLoss|nll_loss|multi_margin_loss) "
            r"takes class indices.*CrossEntropyLoss", kind(num_classes=3), loss_func=loss_func)  # fmt: skip


@BOTH
def test_without_num_classes_the_model_is_asked(kind):
    told, asked = classifier(callbacks=[kind(num_classes=CLASSES)]), classifier(callbacks=[kind()])
    for learn in (told, asked):
        torch.manual_seed(0)
        learn.fit(0.1, 2)
    assert trained(asked) == trained(told)


@BOTH
@pytest.mark.parametrize(("head", "shape"), [(nn.Flatten(0), r"\(\d+,\)"), (nn.Unflatten(1, (3, 1)), r"\(1, 3, 1\)")])
def test_an_output_that_does_not_tell_the_classes(kind, head, shape):
    learn = classifier(callbacks=[kind()])
    learn = Learner(nn.Sequential(learn.model, head), learn.dls, nn.CrossEntropyLoss(), callbacks=[kind()],
                    verbose=False, device="cpu")  # fmt: skip
    name = kind.__name__
    with pytest.raises(ValueError, match=rf"^{name} must know how many classes.* float\d+ {shape} for one sample"
                                         rf".*{name}\(num_classes=10\)"):  # fmt: skip
        learn.fit(0.1)


@BOTH
def test_wrong_labels_are_refused(kind):
    x, y = images()[0]
    name = kind.__name__
    refused(ValueError, rf"^labels must be 0\.\.2 for {name}\(num_classes=3\), got 0\.\.3", kind(num_classes=3),
            [(x, y.clone().fill_(3).index_fill(0, torch.tensor([0]), 0))])  # fmt: skip
    refused(ValueError, r"^labels must be 0\.\.2 for .*, got -100\.\.-100", kind(num_classes=3), [(x, y * 0 - 100)])
    refused(ValueError, rf"^{name} takes class labels of shape \(n,\), .*got int64 \(6, 1\).*squeeze\(1\)",
            kind(num_classes=3), [(x, y[:, None])])  # fmt: skip
    refused(ValueError, rf"^{name}\(num_classes=3\) takes class labels.*got float64 \(6, 4\)",
            kind(num_classes=3), [(x, torch.rand(6, 4).double())])  # fmt: skip
    refused(ValueError, rf"^{name}\(num_classes=4\), but the model has 3 outputs", kind(num_classes=4))
    refused(TypeError, rf"^{name} mixes targets that are tensors \(n, \.\.\.\), got \(int64 \(6,\), int64 \(6,\)\)",
            kind(num_classes=3), [(x, (y, y))])  # fmt: skip


@pytest.mark.parametrize("cb", [*MIXERS[:2], ProgressiveResizing()], ids=lambda cb: type(cb).__name__)
def test_batches_that_are_no_pair_are_refused(cb):
    x, y = images()[0]
    name = type(cb).__name__
    for batch in ((x, x, y), {"x": x, "labels": y}, ((x, x), y)):
        refused(TypeError, rf"^{name} takes batches \(inputs, target\) with one tensor of inputs, got ", cb, [batch])
    learn = classifier([(y, x)], callbacks=[cb], unpack=lambda batch: (batch[1], batch[0]))
    with pytest.raises(TypeError, match=r"got \(int64 \(6,\), float64 \(6, 2, 8, 8\)\)"):
        learn.fit(0.1)


def test_inputs_that_cannot_be_mixed_are_refused():
    x, y = images()[0]
    pixels = (x * 9).to(torch.uint8)
    for kind in (MixUp, CutMix):
        refused(TypeError, rf"^{kind.__name__} mixes floating-point inputs, got uint8 \(6, 2, 8, 8\).*/ 255",
                kind(num_classes=3), [(pixels, y)])  # fmt: skip
    refused(ValueError, r"^CutMix takes images \(n, channels, height, width\), got float64 \(6, 128\)",
            CutMix(num_classes=3), [(x.flatten(1), y)])  # fmt: skip


# ---- resizing

shares = st.integers(0, 10).flatmap(lambda a: st.tuples(st.just(a), st.integers(0, 10 - a)))


@given(tenths=shares, initial=st.floats(0.05, 1), n_steps=st.integers(1, 200), size=st.integers(1, 300),
       increment=st.integers(1, 40))  # fmt: skip
def test_sizes_grow_from_the_first_to_the_full_one(tenths, initial, n_steps, size, increment):
    finetune, delay = tenths[0] / 10, tenths[1] / 10
    sizes = ProgressiveResizing(initial, finetune, delay, increment).values(n_steps, size)["size"]
    assert sizes == sorted(sizes)
    for step, side in enumerate(sizes):
        if 10 * step >= (10 - tenths[0]) * n_steps:  # in whole numbers: no rounding
            assert side == size
        elif 10 * step <= tenths[1] * n_steps:
            assert abs(side - initial * size) <= max(increment / 2 + 1e-6, increment - initial * size)
        assert 1 <= side <= size
        assert side == size or side % increment == 0


def test_the_ramp_has_the_values_of_its_formula():
    cb = ProgressiveResizing(0.5, finetune_fraction=0.2, delay_fraction=0.5, size_increment=4)
    assert cb.values(10, 224)["size"] == [112] * 6 + [148, 188, 224, 224]  # 0.5 + 0.5 * 1/3, then 2/3
    assert [cb.scale(step, 10) for step in (5, 6, 7, 8)] == pytest.approx([0.5, 2 / 3, 5 / 6, 1])


def test_shares_that_floating_point_cannot_hold_are_exact():
    assert ProgressiveResizing(0.5, 0.7, 0.3, 1).values(10, 8)["size"] == [4] * 3 + [8] * 7


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_model_sees_the_previewed_sizes_and_validation_the_full_one(accumulate):
    cb, data = ProgressiveResizing(0.5, 0.25, 0.25, 2), images(8, side=12)
    learn = classifier(data, images(1, side=12), callbacks=[cb])
    seen = Given(learn)
    learn.fit(0.1, 2, accumulate=accumulate)
    sizes = [side for side in cb.values(16 // accumulate, 12)["size"] for _ in range(accumulate)]
    assert len(set(sizes)) > 2
    assert [tuple(x.shape[-2:]) for x in seen.inputs] == [
        (side, side) for side in (*sizes[:8], 12, *sizes[8:], 12)]  # fmt: skip
    assert bits(seen.inputs[-2]) == bits(data[-1][0])


def test_height_and_width_keep_their_ratio_and_constants_stay():
    x = torch.full((2, 2, 8, 20), 0.25, dtype=torch.float64)
    _, seen = given_by([ProgressiveResizing(0.5, 0, 1, 2)], [(x, torch.tensor([0, 1]))])
    torch.testing.assert_close(seen.inputs[0], x[:, :, :4, :10])


def test_small_images_are_antialiased():
    """White stripes at pixels 0, 3, 4, 7, ... become grey; from the two pixels in the middle of four, all is black."""
    stripes = ((torch.arange(16) + 1) % 4 < 2).double().expand(1, 2, 16, 16)
    _, seen = given_by([ProgressiveResizing(0.25, 0, 1, 1)], [(stripes, torch.tensor([0]))])
    torch.testing.assert_close(seen.inputs[0], torch.full((1, 2, 4, 4), 0.5, dtype=torch.float64), rtol=0, atol=0.15)


def test_sizes_follow_the_clock_in_a_fit_limited_in_time():
    at = At("before_batch", lambda state: setattr(state, "elapsed", state.n_steps - 1))
    at.order = TimeLimit.order
    _, seen = given_by([at, ProgressiveResizing(0.5, 0.4, 0.5)])
    assert {x.shape[-1] for x in seen.inputs} == {8}


def test_resizing_and_mixing_compose():
    data = images(4)
    learn, seen = given_by([ProgressiveResizing(0.5, 0.5, 0.5), MIXERS[0]], data)
    assert [x.shape[-1] for x in seen.inputs] == [4, 4, 8, 8]
    assert {tuple(y.shape) for y in seen.targets} == {(6, CLASSES)}
    assert learn.recorder.losses.size == 4


def test_lr_find_runs_at_full_size():
    learn = classifier(images(12), callbacks=[ProgressiveResizing()])
    seen = Given(learn)
    learn.lr_find(num_it=12)
    assert {x.shape[-1] for x in seen.inputs} == {8}


def test_resizing_refuses_arguments_out_of_range():
    number = "must be a finite number"
    for arguments, match in [
        ({"initial_scale": 0}, rf"^initial_scale {number} > 0 and <= 1, got 0"),
        ({"initial_scale": 1.5}, rf"^initial_scale {number} > 0 and <= 1, got 1.5"),
        ({"finetune_fraction": -0.1}, rf"^finetune_fraction {number} >= 0 and <= 1, got -0.1"),
        ({"delay_fraction": 2}, rf"^delay_fraction {number} >= 0 and <= 1, got 2"),
        ({"size_increment": 0}, "^size_increment must be an int >= 1, got 0"),
        ({"delay_fraction": 0.7, "finetune_fraction": 0.4},
         r"^finetune_fraction \+ delay_fraction must be at most 1, got 0.4 \+ 0.7"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ProgressiveResizing(**arguments)
    for n_steps, size, match in [(0, 8, "^n_steps must be an int >= 1"), (8, 0, "^size must be an int >= 1")]:
        with pytest.raises(ValueError, match=match):
            ProgressiveResizing().values(n_steps, size)


def test_resizing_refuses_what_is_no_image():
    x, y = images()[0]
    wants = r"^ProgressiveResizing takes floating-point images \(n, channels, height, width\), got "
    refused(ValueError, wants + r"float64 \(6, 128\)", ProgressiveResizing(), [(x.flatten(1), y)])
    refused(ValueError, wants + r"uint8 \(6, 2, 8, 8\)", ProgressiveResizing(), [((x * 9).to(torch.uint8), y)])
    refused(ValueError, r"^ProgressiveResizing leaves targets as they are, but these, float64 \(6, 8, 8\), are as "
            r"large as the images, float64 \(6, 2, 8, 8\)", ProgressiveResizing(), [(x, x[:, 0])])  # fmt: skip


# ---- all together


def test_mixup_unfreezing_accumulation_and_one_cycle_train_together():
    torch.manual_seed(0)
    y = torch.arange(96) % CLASSES
    x = torch.randn(96, 2, 8, 8) * 0.3 + y[:, None, None, None] * torch.tensor([1.0, -1.0])[:, None, None]
    train, valid = TensorLoader(x[:72], y[:72], batch_size=6, shuffle=True), TensorLoader(x[72:], y[72:])
    learn = classifier(train, valid, dtype=torch.float32, opt_func=torch.optim.AdamW, metrics=[accuracy],
                       loss_func=nn.CrossEntropyLoss(label_smoothing=0.1), splitter={"body": "0.*", "head": "4.*"})
    learn.fit_one_cycle(8, slice(0.01, 0.1), accumulate=2, callbacks=[
        MixUp(num_classes=CLASSES), ProgressiveResizing(), Unfreeze({"body": 0.25})])  # fmt: skip
    assert len(learn.recorder.losses) == 48
    assert learn.recorder.epochs[-1]["accuracy"] > 0.9
    assert learn.recorder.lr_groups.shape == (48, 2)
    assert all(p.requires_grad for p in learn.model.parameters())
    learn.fit(0.01, 1, cycle_len=1, use_clr=(5, 5), callbacks=[CutMix(num_classes=CLASSES)])
    assert learn.recorder.lrs.tolist() == CircularLR(5, 5).values(12, 0.01)["lr"]


@BOTH
def test_the_model_is_asked_in_eval_mode(kind):
    """One sample is no batch for BatchNorm, and its statistics are of the training data only."""
    model = nn.Sequential(nn.Conv2d(2, 4, 8), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double()
    learn = learner(images(2), model=model, loss_func=nn.CrossEntropyLoss(), callbacks=[kind()])
    learn.fit(0.1)
    assert int(model[2].num_batches_tracked) == 2
