"""A number that is not finite ends the fit before the weights change, is never the best, and spoils no plot."""
import io
import itertools
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from helpers import At, NoWait, batches, bits, learner, spying, throw, trained
from torch import nn

from minifast import (
    EMA,
    AutoMicrobatch,
    Callback,
    CancelBatch,
    CancelFit,
    EarlyStopping,
    FiniteLoss,
    GradientClip,
    GradientNorm,
    MixedPrecision,
    NonFiniteGradient,
    NonFiniteLoss,
    OneCycle,
    ReduceLROnPlateau,
    RunLog,
    SaveBest,
    accuracy,
    plot_runs,
)
from minifast.core.ownership import finite_check
from minifast.standard import finite
from minifast.standard.finite import Unchecked

NAN, INF = math.nan, math.inf
OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "Adam": torch.optim.Adam,
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1, amsgrad=True),
}
optimizers = pytest.mark.parametrize("opt_func", OPTIMIZERS.values(), ids=OPTIMIZERS)
NOT_FUSED = partial(torch.optim.SGD, momentum=0.9, fused=False)


class Losses:
    """A loss that is `value` in call `at` (from 0), and the mean squared error in all others."""

    def __init__(self, value=NAN, *at):
        self.value, self.at, self.count = value, at, itertools.count()

    def __call__(self, pred, target):
        loss = nn.functional.mse_loss(pred, target)
        return loss * self.value if next(self.count) in self.at else loss


@pytest.fixture
def late(monkeypatch):
    """The CPU is taken for a device that is waited for; returns how to say how often the host looks, in seconds."""
    monkeypatch.setattr(finite, "reads_at_once", lambda device: False)
    monkeypatch.setattr(finite, "LOOK_EVERY", INF)
    return partial(monkeypatch.setattr, finite, "LOOK_EVERY")


def learned(learn):
    """The bits of weights and optimizer state, without buffers and hyper-parameters, which schedules write."""
    return {name: value for name, value in trained(learn).items() if name.startswith(("param", "state"))}


class Watch(Callback):
    """What `learned` is after each step, by an observer that comes last."""

    order = 10_000

    def __init__(self, learn):
        self.learn, self.steps = learn, [learned(learn)]

    def after_step(self, state):
        self.steps.append(learned(self.learn))


class Waitless(Callback):
    """Fails where a training batch but the first waits for the device, up to what the host does after the batch."""

    order = -1000
    mode = None

    def before_batch(self, state):
        if state.batch_index:
            self.mode = NoWait()
            self.mode.__enter__()

    def after_batch(self, state):
        self.after_fit(state)

    def after_fit(self, state):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
        self.mode = None


# ---- a loss that is not finite


@pytest.mark.table
@pytest.mark.case("N1")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@optimizers
def test_the_loss_is_refused_before_the_weights_change(opt_func, value):
    learn = learner(batches(4), batches(1), loss_func=Losses(value, 5 + 1), opt_func=opt_func)  # one of validation
    watch = Watch(learn)
    message = (rf"the loss is {value} at epoch 1, step 5 \(lr 0.03\)\. The weights are those of the step before\. "
               r"Lower the learning rate, clip gradients \(GradientClip\(norm=1\.0\)\), or look at the batch\.\n")
    with pytest.raises(NonFiniteLoss, match=message) as caught:
        learn.fit(0.03, 3, callbacks=[watch])
    assert caught.value.__notes__ == ["in FiniteLoss.before_step: epoch 1, step 5"]
    assert len(watch.steps) == 1 + 5
    assert learned(learn) == watch.steps[-1] != watch.steps[-2]
    assert len(learn.recorder.losses) == 5
    assert all(p.grad is None for p in learn.model.parameters())
    learn.fit(0.03)  # the Learner is as good as new
    assert np.isfinite(learn.recorder.losses).all()


@pytest.mark.case("N1")
def test_the_rates_of_all_layer_groups_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    learn = learner(model=model, splitter={"body": "0.*", "head": "1.*"}, loss_func=Losses(NAN, 0))
    with pytest.raises(NonFiniteLoss, match=r"step 0 \(lr 0\.003 of body, 0\.03 of head\)"):
        learn.fit(slice(0.003, 0.03))


@pytest.mark.case("N1")
@pytest.mark.parametrize("bad", [2, 3])
def test_a_window_with_one_micro_batch_that_is_not_finite_is_not_finite(bad):
    data = batches(6)
    data[bad][0][1, 2] = NAN
    learn = learner(data, opt_func=torch.optim.AdamW)
    watch = Watch(learn)
    with pytest.raises(NonFiniteLoss, match=r"epoch 0, step 1 .* 1 values that are NaN or infinite in a tensor of "
                                            r"shape \(4, 3\), the first at \[1, 2\]"):
        learn.fit(0.1, accumulate=2, callbacks=[watch])
    assert learned(learn) == watch.steps[1] == watch.steps[-1]


def test_the_cause_is_not_that_of_a_window_that_was_dropped():
    data = batches(4)
    data[0][0][0, 0] = NAN  # its window is cancelled
    learn = learner(data, loss_func=Losses(NAN, 2))
    with pytest.raises(NonFiniteLoss, match="or look at the batch") as caught:
        learn.fit(0.1, accumulate=2, callbacks=[At("after_backward", throw(CancelBatch), 0)])
    assert "values that are NaN" not in str(caught.value)


@pytest.mark.case("N1")
def test_parts_of_a_batch_are_one_update():
    data = batches(3, size=6)
    data[1][0][5, 0] = INF
    learn = learner(data)
    watch = Watch(learn)
    with pytest.raises(NonFiniteLoss, match=r"step 1 .* in a tensor of shape \(6, 3\), the first at \[5, 0\]"):
        learn.fit(0.1, callbacks=[AutoMicrobatch(2), watch])
    assert learned(learn) == watch.steps[1]


@pytest.mark.case("N1")
def test_statistics_that_the_batch_has_spoiled_are_named():
    data = batches(3)
    data[2][0][0, 0] = NAN
    learn = learner(data, model=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    with pytest.raises(NonFiniteLoss, match=r"The weights are those of the step before, but the forward pass has left "
                                            r"running statistics that are not finite \(0.running_mean, 0.running_var"):
        learn.fit(0.1)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


@pytest.mark.case("B5")
@pytest.mark.parametrize("step", [0, 2])
def test_what_is_wrong_with_the_batch_is_said_at_every_step(step):
    data = batches(4)
    data[step][0][2, 1] = data[step][0][3, 0] = INF
    with pytest.raises(NonFiniteLoss, match=rf"step {step} .* 2 values that are NaN or infinite in a tensor of shape "
                                            r"\(4, 3\), the first at \[2, 1\]. Clean the data."):
        learner(data).fit(0.1)
    data = batches(4)
    data[step][1][3, 0] = NAN
    with pytest.raises(NonFiniteLoss, match=r"1 values .* of shape \(4, 1\), the first at \[3, 0\]"):
        learner(data).fit(0.1)


@pytest.mark.case("N7")
@pytest.mark.parametrize(("loss_func", "label"), [
    (nn.CrossEntropyLoss(), -100), (nn.CrossEntropyLoss(ignore_index=2), 2), (nn.functional.cross_entropy, -100),
    (partial(nn.functional.cross_entropy, ignore_index=0), 0),
])  # fmt: skip
def test_a_batch_without_a_label_is_called_that(loss_func, label):
    x = torch.randn(4, 3)
    data = [(x, torch.tensor([1, 1, 1, label])), (x, torch.full((4,), label)), (x, torch.ones(4).long())]
    learn = learner(data, model=nn.Linear(3, 3), loss_func=loss_func)
    with pytest.raises(NonFiniteLoss, match=f"step 1 .* The batch has no valid target: all 4 are {label}, the label "
                                            r"that is ignored.* Leave such batches out, or let loss_func return \(sum"):
        learn.fit(0.1)
    learn = learner(data, model=nn.Linear(3, 3), loss_func=loss_func)
    with pytest.raises(NonFiniteLoss, match="The batch has no valid target"):
        learn.fit(0.1, accumulate=3)


@pytest.mark.case("N7")
def test_an_empty_batch_is_called_that():
    data = [*batches(1), (torch.zeros(0, 3), torch.zeros(0, 1))]
    with pytest.raises(NonFiniteLoss, match=r"step 1 .* The batch is empty: leave such batches out"):
        learner(data).fit(0.1)


@pytest.mark.case("N10")
def test_weights_that_were_not_finite_before_are_not_called_good():
    """A rate so high that the weight is -inf, where ReLU hides it: the fit ends with the first loss that shows it."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    nn.init.ones_(model[0].weight)
    data = [(torch.full((2, 1), x), torch.full((2, 1), -1e9)) for x in (1.0, 1.0, 1.0, -1.0)]
    learn = learner(data, model=model)
    with pytest.raises(NonFiniteLoss, match=r"loss is inf at epoch 0, step 3 \(lr 1e\+30\). The weights were not "
                                            r"finite before that \(0.weight\): an earlier update has made them so"):
        learn.fit(1e30)
    assert np.isfinite(learn.recorder.losses).tolist() == [True, True, True]


# ---- on a device that is waited for: late, but without an update


@pytest.mark.case("N1")
@optimizers
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_update_is_made_from_the_bad_step_on(late, opt_func, accumulate):
    learn = learner(batches(20), batches(1), loss_func=Losses(NAN, 5 * accumulate), opt_func=opt_func)
    watch = Watch(learn)
    schedule = OneCycle(0.03, moms=None)
    with pytest.raises(NonFiniteLoss) as caught:
        learn.fit(0.03, callbacks=[watch, schedule, Waitless()], accumulate=accumulate)
    n = 20 // accumulate
    rate = schedule.values(n)["lr"][5]
    assert str(caught.value) == (
        f"the loss is nan at epoch 0, step 5 (lr {rate:.3g}). The weights are those of the step before. "
        f"{finite.ADVICE} Found at step {n}; FiniteLoss(strict=True) stops at once, and looks at the batch.")
    assert caught.value.__notes__ == ["in FiniteLoss.before_validate: epoch 0, step " + str(n)]
    assert len({str(step) for step in watch.steps[:6]}) == 6
    assert all(step == watch.steps[5] for step in watch.steps[5:])
    assert len(watch.steps) == n + 1
    assert learned(learn) == watch.steps[5]
    assert "found_inf" not in vars(learn.opt)
    learn.fit(0.03)


@pytest.mark.case("N1")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_host_looks_by_the_clock(late, value):
    late(0.0)
    learn = learner(batches(10), loss_func=Losses(value, 5))
    with pytest.raises(NonFiniteLoss, match=f"the loss is {value} at epoch 0, step 5 .* Found at step 6;"):
        learn.fit(0.1)
    assert len(learn.recorder.losses) == 6


@pytest.mark.case("N1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_flag_is_of_its_own_dtype(late, dtype):
    learn = learner(batches(6, dtype=dtype), model=nn.Linear(3, 1).to(dtype), loss_func=Losses(NAN, 3),
                    opt_func=torch.optim.SGD)
    watch = Watch(learn)
    with pytest.raises(NonFiniteLoss, match="step 3 "):
        learn.fit(0.1, callbacks=[watch])
    assert learned(learn) == watch.steps[3]


@pytest.mark.case("N1")
def test_the_epoch_is_that_of_the_step(late):
    """A fit that is cancelled twice over: the host looks at the end of each epoch, and of the fit."""
    learn = learner(batches(3), loss_func=Losses(INF, 4))
    with pytest.raises(NonFiniteLoss, match=r"the loss is inf at epoch 1, step 4 .* Found at step 5;") as caught:
        learn.fit(0.1, 3, callbacks=[At("after_batch", throw(CancelFit), 4)])
    assert caught.value.__notes__ == ["in FiniteLoss.after_fit: epoch 1, step 5"]
    with pytest.raises(NonFiniteLoss, match=r"the loss is inf at epoch 1, step 3 .* Found at step 6;"):
        learner(batches(3), loss_func=Losses(INF, 3)).fit(0.1, 3)
    learn = learner(batches(3), loss_func=Losses(INF, 4))
    with pytest.raises(ZeroDivisionError) as caught:
        learn.fit(0.1, 3, callbacks=[At("after_batch", throw(ZeroDivisionError), 4)])
    assert "FiniteLoss.after_fit failed: NonFiniteLoss('the loss is inf at epoch 1, step 4" in caught.value.__notes__[1]


@pytest.mark.case("N1")
def test_an_error_is_told_once(late):
    learn = learner(batches(3), loss_func=Losses(INF, 1))
    with pytest.raises(NonFiniteLoss) as caught:
        learn.fit(0.1)
    assert caught.value.__notes__ == ["in FiniteLoss.after_epoch: epoch 0, step 3"]


@pytest.mark.case("B5")
def test_the_first_batch_is_looked_at_at_once(late):
    data = batches(4)
    data[0][0][2, 1] = NAN
    learn = learner(data)
    with pytest.raises(NonFiniteLoss, match=r"step 0 .* the first at \[2, 1\].* Found at step 1;"):
        learn.fit(0.1)
    assert len(learn.recorder.losses) == 1


@pytest.mark.parametrize("ending", ["well", "before_batch", "before_step", "after_step", "after_fit"])
def test_the_optimizer_is_given_back(late, ending):
    learn = learner(batches(3), opt_func=torch.optim.Adam)
    seen = []
    look = At("before_step", lambda state: seen.append(vars(state.opt).get("found_inf")))
    if ending == "well":
        learn.fit(0.1, callbacks=[look])
    else:
        with pytest.raises(ZeroDivisionError):
            learn.fit(0.1, callbacks=[look, At(ending, throw(ZeroDivisionError), 0)])
    assert all(isinstance(flag, torch.Tensor) for flag in seen)
    assert ending == "before_batch" or seen
    assert "found_inf" not in vars(learn.opt)


def test_a_good_fit_is_the_same_bit_for_bit(late, monkeypatch):
    for opt_func in OPTIMIZERS.values():
        make = partial(learner, batches(6), batches(1), opt_func=opt_func)
        ours, exact, without = make(), make(), make()
        ours.fit_one_cycle(2, 0.1)
        exact.fit_one_cycle(2, 0.1, callbacks=[FiniteLoss(strict=True)])
        without.fit_one_cycle(2, 0.1, callbacks=[Unchecked()])
        assert trained(ours) == trained(exact) == trained(without)
        assert bits(ours.recorder.losses) == bits(exact.recorder.losses) == bits(without.recorder.losses)


@pytest.mark.case("N1")
@pytest.mark.parametrize("opt_func", [torch.optim.AdamW, NOT_FUSED, torch.optim.RMSprop])
def test_strict_stops_at_once_with_any_optimizer(late, opt_func):
    data = batches(6)
    data[3][0][2, 1] = NAN
    learn = learner(data, opt_func=opt_func, callbacks=[FiniteLoss(strict=True)])
    watch = Watch(learn)
    with pytest.raises(NonFiniteLoss, match=r"step 3 \(lr 0.1\). The weights are .* the first at \[2, 1\]"):
        learn.fit(0.1, callbacks=[watch])
    assert len(watch.steps) == 4
    assert learned(learn) == watch.steps[-1]


@pytest.mark.case("N1")
@pytest.mark.parametrize("opt_func", [NOT_FUSED, torch.optim.RMSprop])
def test_with_an_optimizer_that_does_not_skip_the_error_comes_late_and_says_what_is_left(late, opt_func):
    learn = learner(batches(6), opt_func=opt_func, loss_func=Losses(NAN, 3))
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at epoch 0, step 3 \(lr 0.1\). The weights were not "
                                            r"finite before that \(weight, bias\).*Found at step 6;"):
        learn.fit(0.1)


def test_an_optimizer_whose_state_says_that_it_is_not_fused_is_left_alone(late):
    """As after loading the state of one that was not: it would raise an error for the flag."""
    learn, other = learner(opt_func=torch.optim.AdamW), learner(opt_func=partial(torch.optim.AdamW, fused=False))
    other.fit(0.1)
    learn.opt.load_state_dict(other.opt.state_dict())
    learn.fit(0.1)
    assert len(learn.recorder.losses) == 2


@pytest.mark.case("N1")
def test_who_keeps_the_weights_can_ask_first(late):
    def keep(state):
        finite_check(state.callbacks).check(state)
        kept.append(state.step)

    for event, steps in (("after_step", [0, 1, 2]), ("after_batch", [1, 2, 3])):
        kept = []
        learn = learner(batches(6), loss_func=Losses(NAN, 3))
        with pytest.raises(NonFiniteLoss, match="the loss is nan at epoch 0, step 3 "):
            learn.fit(0.1, callbacks=[At(event, keep)])
        assert kept == steps


def test_on_the_cpu_there_is_nothing_to_ask():
    checks = At("after_step", lambda state: finite_check(state.callbacks).check(state))
    learner(batches(3)).fit(0.1, callbacks=[checks])


def test_an_update_that_a_later_callback_cancels_is_refused_all_the_same(late):
    learn = learner(batches(4), loss_func=Losses(NAN, 2))
    with pytest.raises(NonFiniteLoss, match=r"a loss or gradient was not finite before epoch 0, step 3. The weights"):
        learn.fit(0.1, callbacks=[At("before_step", throw(CancelBatch), 2)])


# ---- half precision


def small(n):
    return [(x / 4, y / 4) for x, y in batches(n)]


@pytest.mark.case("N1", "N4")
@pytest.mark.parametrize("is_late", [False, True])
def test_what_fp16_skips_is_left_to_it(is_late, request):
    if is_late:
        request.getfixturevalue("late")
    learn = learner(small(8), loss_func=Losses(INF, 2, 5))
    ema, schedule = EMA(0.5), OneCycle(0.1, moms=None)
    learn.fit(0.1, callbacks=[MixedPrecision("fp16"), GradientClip(norm=1.0), ema, schedule])
    assert np.isfinite(learn.recorder.losses).all()
    assert learn.recorder.lrs.tolist() == schedule.values(8)["lr"][:6], "the schedule stands still for what is skipped"
    assert len(learn.opt.seen) == ema.n_averaged == 6


@pytest.mark.case("N1")
@pytest.mark.parametrize("is_late", [False, True])
def test_what_fp16_lets_through_is_an_error(is_late, request):
    if is_late:
        request.getfixturevalue("late")
    learn = learner(small(50), loss_func=Losses(NAN, *range(3, 50)), opt_func=torch.optim.SGD)
    watch, seen = Watch(learn), []
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at epoch 0, step 3 \(lr 0.1\)"):
        learn.fit(0.1, callbacks=[MixedPrecision("fp16"), watch, At("after_loss", lambda state: seen.append(1))])
    assert len(seen) == 50 if is_late else len(seen) == 3 + 32 + 1
    assert learned(learn) == watch.steps[3]
    assert all(step == watch.steps[3] for step in watch.steps[3:])


# ---- a gradient that is not finite


class Root(nn.Module):
    """|x| by way of a square root, whose derivative at 0 is infinite."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head((self.body(x) * x).square().sqrt())


def with_zeros(n=6, at=3):
    data = batches(n)
    data[at][0][1] = 0.0
    return data


clips = pytest.mark.parametrize("clip", [GradientClip(norm=1.0), GradientClip(value=0.5)])


@pytest.mark.case("N2")
@clips
@optimizers
def test_a_gradient_is_refused_before_the_step(clip, opt_func):
    learn = learner(with_zeros(), model=Root(), opt_func=opt_func)
    watch = Watch(learn)
    with pytest.raises(NonFiniteGradient, match=(
            r"^the norm of the gradient is nan at epoch 0, step 3 \(lr 0.1\)\. It is not finite in body.weight, "
            r"body.bias\. The weights are those of the step before\. Look for what has no finite derivative")):
        learn.fit(0.1, callbacks=[clip, watch])
    assert len(watch.steps) == 4
    assert learned(learn) == watch.steps[3] != watch.steps[2]
    assert np.isfinite(learn.recorder.losses).all()
    learn.dls = learner(batches(2)).dls
    learn.fit(0.1, callbacks=[clip])


@pytest.mark.case("N2")
@clips
def test_the_gradient_of_a_window_is_refused_whole(clip):
    learn = learner(with_zeros(), model=Root())
    watch = Watch(learn)
    with pytest.raises(NonFiniteGradient, match=r"epoch 0, step 1 .* body.weight, body.bias"):
        learn.fit(0.1, accumulate=2, callbacks=[clip, watch])
    assert learned(learn) == watch.steps[1]


@pytest.mark.case("N2")
def test_at_most_five_parameters_are_named():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 1))
    spoil = At("after_backward", lambda state: [p.grad.fill_(NAN) for p in state.model.parameters()])
    with pytest.raises(NonFiniteGradient, match=r"in 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 5 more\."):
        learner(model=model).fit(0.1, callbacks=[spoil, GradientClip(norm=1.0)])


@pytest.mark.case("N2")
def test_a_norm_beyond_all_numbers_is_called_that():
    spoil = At("after_backward", lambda state: state.model.weight.grad.fill_(3e38))
    with pytest.raises(NonFiniteGradient, match=r"gradient is inf .* Its elements are finite, but too large"):
        learner().fit(0.1, callbacks=[spoil, GradientClip(norm=1.0)])


@pytest.mark.case("N2")
@pytest.mark.parametrize("is_late", [False, True])
def test_sparse_gradients_are_refused_too(is_late, request):
    if is_late:
        request.getfixturevalue("late")
    data = [(torch.tensor([[0, 1], [1, 1], [4, 2]]), torch.ones(3, 1)) for _ in range(3)]
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))
    learn = learner(data, model=model, opt_func=spying())
    spoil = At("after_backward", lambda state: model[0].weight.grad._values().fill_(NAN), 1)
    watch = Watch(learn)
    with pytest.raises(NonFiniteGradient, match="step 1 " if is_late else "step 1 .* in 0.weight"):
        learn.fit(0.1, callbacks=[spoil, GradientClip(norm=1.0), watch])
    assert learned(learn) == watch.steps[1]


@pytest.mark.case("N2")
def test_fp16_lets_a_gradient_through_that_is_finite_at_no_scale_and_clipping_refuses_it():
    learn = learner([*batches(3), *with_zeros(1, 0) * 37], model=Root())
    watch = Watch(learn)
    with pytest.raises(NonFiniteGradient, match=r"step 3 .* body.weight, body.bias"):
        learn.fit(0.1, callbacks=[MixedPrecision("fp16"), GradientClip(norm=1.0), watch])
    assert learned(learn) == watch.steps[3]


@pytest.mark.case("N2")
@clips
@optimizers
def test_late_no_update_is_made_from_the_bad_gradient_on(late, clip, opt_func):
    learn = learner(with_zeros(), model=Root(), opt_func=opt_func)
    watch = Watch(learn)
    with pytest.raises(NonFiniteGradient, match=r"^the norm of the gradient is nan at epoch 0, step 3 \(lr 0.1\)\. The "
                                                r"weights are those of the step before\..* Found at step 6; FiniteLoss"
                                                r"\(strict=True\) stops at once, and names the parameters\.\n"):
        learn.fit(0.1, callbacks=[clip, watch, Waitless()])
    assert len(watch.steps) == 7
    assert all(step == watch.steps[3] for step in watch.steps[3:])


@pytest.mark.case("N2")
@clips
def test_late_an_optimizer_that_does_not_skip_gets_zeros(late, clip):
    learn = learner(with_zeros(), model=Root(), opt_func=partial(spying(), fused=False, momentum=0.9))
    with pytest.raises(NonFiniteGradient, match=r"step 3 .* weights are those of the step before, but for momentum"):
        learn.fit(0.1, callbacks=[clip])
    assert all(not grad.any() for note in learn.opt.seen[3:] for grad in note["grads"])
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


@pytest.mark.case("N2")
@pytest.mark.parametrize("is_late", [False, True])
def test_a_gradient_that_is_only_looked_at_is_not_refused(is_late, request):
    """Then it is the next loss that ends the fit, and what it says of the weights is true."""
    if is_late:
        request.getfixturevalue("late")
    learn = learner(with_zeros(), model=Root())
    with pytest.raises(NonFiniteLoss, match=r"step 4 .* The weights were not finite before that \(body.weight"):
        learn.fit(0.1, callbacks=[GradientNorm()])


# ---- where a loss may be anything


@pytest.mark.case("N1", "N2")
def test_the_finder_ends_as_it_does_without():
    plain = learner(batches(30)).lr_find(1e-3, 1e30, num_it=60, stop_div=False)
    learn = learner(batches(30), callbacks=[FiniteLoss(strict=True), GradientClip(value=1e30)])
    found = learn.lr_find(1e-3, 1e30, num_it=60, stop_div=False)
    assert plain.stopped.startswith("the loss is ")
    assert found.stopped.startswith("the loss is ")
    assert len(learner(with_zeros(), model=Root(), callbacks=[GradientClip(norm=1.0)]).lr_find(num_it=60).lrs) < 60


@pytest.mark.case("N1")
def test_a_candidate_that_explodes_loses_the_race():
    learn = learner(batches(30), batches(2), callbacks=[FiniteLoss(), GradientClip(value=1e30)])
    race = learn.race([1e-3, 1e-2, 1e30], steps=20)
    assert race.rows[2]["result"] == "diverged"
    assert race.rows[0]["result"] != "diverged"


def test_overfit_gives_the_losses_as_they_are():
    assert not np.isfinite(learner().overfit(60, 1e10)).all()


def test_there_is_one_check_and_it_can_be_replaced():
    kinds = []
    look = At("before_fit", lambda state: kinds.append([cb for cb in state.callbacks if cb.owns == FiniteLoss.owns]))
    own, other = FiniteLoss(strict=True), FiniteLoss()
    learner(callbacks=[own]).fit(0.1, callbacks=[look])
    learner(callbacks=[own]).fit(0.1, callbacks=[look, other])
    learner().fit(0.1, callbacks=[look])
    assert kinds[:2] == [[own], [other]]
    assert [type(cb) for cb in kinds[2]] == [FiniteLoss]
    learn = learner(loss_func=Losses(NAN, 0))
    learn.fit(0.1, callbacks=[Unchecked()])
    assert math.isnan(learn.recorder.losses[0])
    with pytest.raises(TypeError, match="strict must be True or False, got 1"):
        FiniteLoss(strict=1)


# ---- metrics and validation losses


class Given:
    """A metric object that computes the given values, one per epoch."""

    def __init__(self, *values, name="accuracy"):
        self.values, self.__name__ = iter(values), name

    def reset(self): ...

    def update(self, pred, target): ...

    def compute(self):
        return next(self.values)


def fit_with(values, *callbacks, **options):
    learn = learner(batches(2), batches(1), metrics=[Given(*values)], **options)
    learn.fit(0.1, len(values), callbacks=list(callbacks))
    return learn


BAD = {"nan": NAN, "inf": INF, "-inf": -INF}


@pytest.mark.table
@pytest.mark.case("N5")
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize(("template", "best_epoch"), [
    ("x12", 2), ("1x2", 2), ("12x", 1), ("21x", 0), ("xx1", 2), ("xxx", None), ("1xx", 0),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_not_finite_is_never_the_best(bad, template, best_epoch, mode):
    values = [bad if x == "x" else float(x) * (1 if mode == "max" else -1) for x in template]
    save, stop, plateau = (kind("accuracy", mode=mode, **options) for kind, options in
                           ((SaveBest, {"restore": True}), (EarlyStopping, {"patience": 9}),
                            (ReduceLROnPlateau, {"patience": 9})))  # fmt: skip
    weights = At("after_epoch", lambda state: seen.append(learned(save_learn[0])))
    seen, save_learn = [], []
    learn = learner(batches(2), batches(1), metrics=[Given(*values)])
    save_learn.append(learn)
    with pytest.warns(UserWarning, match=f"accuracy is {bad} in epoch {template.index('x')}") as caught:
        learn.fit(0.1, len(values), callbacks=[save, stop, plateau, weights])
    assert len(caught) == 1, "said once per fit"
    for callback in (save, stop, plateau):
        assert callback.best_epoch == best_epoch
        assert callback.best == (None if best_epoch is None else values[best_epoch])
    kept = {name: value for name, value in learned(learn).items() if name.startswith("param")}
    at = len(values) - 1 if best_epoch is None else best_epoch
    assert kept == {name: value for name, value in seen[at].items() if name.startswith("param")}
    np.testing.assert_array_equal([row["accuracy"] for row in learn.recorder.epochs], values)


@pytest.mark.case("N5")
@pytest.mark.filterwarnings("ignore:accuracy is:UserWarning")
def test_what_is_not_finite_is_no_improvement():
    stop = EarlyStopping("accuracy", patience=2)
    learn = fit_with([1.0, NAN, INF, 2.0, 3.0], stop)
    assert (stop.stopped_epoch, len(learn.recorder.epochs)) == (2, 3)
    stop = EarlyStopping("accuracy", patience=2)
    fit_with([NAN, NAN, 1.0], stop)
    assert stop.reason == "stopped early after epoch 1: for 2 epochs accuracy was no finite number"
    plateau = ReduceLROnPlateau("accuracy", 0.5, patience=2)
    learn = fit_with([1.0, NAN, NAN, 2.0], plateau)
    assert plateau.scale == 0.5
    assert learn.recorder.lrs.tolist() == pytest.approx([0.1] * 6 + [0.05] * 2)


@pytest.mark.case("N6")
def test_a_validation_loss_that_is_not_finite_is_said_once_and_training_goes_on():
    learn = learner(batches(2), batches(1), model=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    spoil = At("before_validate", lambda state: state.model[0].running_mean.fill_(NAN), 1)
    save = SaveBest()
    with pytest.warns(UserWarning, match="valid_loss") as caught:
        learn.fit(0.1, 4, callbacks=[spoil, save])
    assert [str(warning.message) for warning in caught] == [
        "valid_loss is nan in epoch 1. Training goes on; such a value is recorded, but is never the best, and counts "
        "as no improvement."]
    assert np.isfinite(learn.recorder.losses).tolist() == [True] * 8
    assert np.isnan([row["valid_loss"] for row in learn.recorder.epochs]).tolist() == [False, True, True, True]
    assert save.best_epoch == 0
    learn.model[0].reset_running_stats()
    with pytest.warns(UserWarning, match="valid_loss is nan in epoch 0"):  # once per fit
        learn.fit(0.1, callbacks=[At("before_validate", lambda state: state.model[0].running_mean.fill_(NAN))])


@pytest.mark.case("N8")
def test_an_uneven_last_batch_weighs_what_it_holds():
    torch.manual_seed(0)
    x, y = torch.randn(100, 3), torch.randint(0, 4, (100,))
    x[64:] *= 5  # what the last batch holds is different
    model = nn.Linear(3, 4)
    data = [(x[:64], y[:64]), (x[64:], y[64:])]
    learn = learner(data, data, model=model, loss_func=nn.CrossEntropyLoss(), metrics=[accuracy])
    row = learn.validate()
    with torch.no_grad():
        pred = model(x)
    assert row["valid_loss"] == pytest.approx(float(nn.functional.cross_entropy(pred, y)), rel=1e-6)
    assert row["accuracy"] == pytest.approx(float((pred.argmax(1) == y).float().mean()), rel=1e-6)
    learn.fit(0.1, callbacks=[At("before_step", lambda state: [p.grad.zero_() for p in model.parameters()])])
    assert learn.recorder.epochs[0]["train_loss"] == pytest.approx(row["valid_loss"], rel=1e-6)


# ---- plots


def drawn(ax, tmp_path):
    """What a plot shows: its limits, after it was drawn without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.savefig(io.BytesIO(), format="png")
    low, high = ax.get_ylim()
    assert math.isfinite(low)
    assert math.isfinite(high)
    return low, high


BROKEN = {"one": {7}, "the first": {0}, "the last": {19}, "a tail": set(range(10, 20)), "all": set(range(20))}


@pytest.mark.table
@pytest.mark.nightly
@pytest.mark.case("N9")
@pytest.mark.parametrize("where", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_no_plot_is_spoiled(where, bad, tmp_path):
    epochs = [1.0, bad, 2.0, 3.0, bad] if len(where) < 20 else [bad] * 5
    learn = learner(batches(4), batches(1), metrics=[Given(*epochs)], loss_func=Losses(bad, *_calls(where)))
    learn.fit(0.01, 5, callbacks=[Unchecked(), RunLog(tmp_path / "run"), At("after_backward", lambda state: [
        p.grad.nan_to_num_(0, 0, 0) for p in state.model.parameters()])])
    losses, smooth = learn.recorder.losses, learn.recorder.smooth_losses
    assert set(np.flatnonzero(~np.isfinite(losses))) == where
    first = next((i for i in range(20) if i not in where), 20)
    assert np.isfinite(smooth[first:]).all()
    assert np.isnan(smooth[:first]).all()
    finite_ones = losses[np.isfinite(losses)]
    for ax in (learn.recorder.plot_losses(), plot_runs(tmp_path / "run", "loss")):
        low, high = drawn(ax, tmp_path)
        if len(finite_ones):
            assert low < finite_ones.min()
            assert finite_ones.max() < high < 10 * finite_ones.max()
    for ax in (learn.recorder.plot_metrics(), plot_runs(tmp_path / "run", "accuracy")):
        low, high = drawn(ax, tmp_path)
        if len(where) < 20:
            assert low < 1.0 < 3.0 < high < 4.0
    drawn(plot_runs(tmp_path / "run", "valid_loss"), tmp_path)
    drawn(learn.recorder.plot_lr(show_moms=True), tmp_path)


def _calls(steps):
    """The calls of the loss that belong to training steps, of 4 and one of validation per epoch."""
    return [step // 4 * 5 + step % 4 for step in steps]


@pytest.mark.nightly
@pytest.mark.case("N9")
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("at", [0, 1, 30])
def test_the_plot_of_the_finder_is_not_spoiled(bad, at, tmp_path):
    learn = learner(batches(20), loss_func=Losses(bad, *range(at, 60)))
    found = learn.lr_find(num_it=60)
    assert found.stopped == f"the loss is {bad}"
    for skips in ((10, 5), (0, 0)):
        drawn(found.plot(*skips), tmp_path)
    learn.loss_func = Losses(bad, *range(at, 60))
    drawn(learn.lr_find(num_it=30, repeats=2).plot(0, 0), tmp_path)
