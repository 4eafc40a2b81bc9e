"""`compile=`: the compiled form shares the model's weights, and neither schedules nor modes compile it again and again.

The backends here need no compiler: "eager" runs what was traced as it is, "aot_eager" takes autograd apart too.
"""

from functools import partial

import pytest
import torch
from helpers import batches, bits, learner, trained
from torch import nn
from torch.optim import SGD, AdamW, RMSprop

from minifast import EMA, AutoMicrobatch, GradientClip, Learner, MixedPrecision, OneCycle, Unfreeze

pytestmark = pytest.mark.slow  # tracing takes a second or two


def compile_counter():
    """A backend that counts what it compiles."""
    from torch._dynamo.testing import CompileCounter  # here: importing it takes seconds of every collection

    return CompileCounter()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))


def make(backend=None, norm=False, **options):
    compiled = {"compile": {"backend": backend}} if backend else {}
    options = {"opt_func": torch.optim.AdamW} | compiled | options
    return learner(batches(4, 6), batches(2, 6), model=make_model(norm), **options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("norm", [False, True])
def test_it_is_the_same_training(backend, norm):
    plain, compiled = make(norm=norm), make(backend, norm=norm)
    for learn in (plain, compiled):
        learn.fit_one_cycle(2, 0.01)
    if backend == "eager":
        assert trained(compiled) == trained(plain)
    for ours, theirs in zip(compiled.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert compiled.recorder.losses == pytest.approx(plain.recorder.losses, rel=1e-5)
    assert compiled.validate() == pytest.approx(plain.validate(), rel=1e-5)
    torch.testing.assert_close(compiled.get_preds()[0], plain.get_preds()[0], rtol=1e-5, atol=1e-6)


def test_the_model_stays_what_it_was(tmp_path):
    compiled, plain = make("eager"), make()
    compiled.fit(0.01)
    assert type(compiled.model) is nn.Sequential
    assert compiled.forward is not compiled.model
    assert plain.forward is plain.model
    names = list(compiled.model.state_dict())
    assert names == list(plain.model.state_dict())
    compiled.save(tmp_path / "weights.pth")
    plain.load(tmp_path / "weights.pth")
    assert bits(dict(plain.model.state_dict())) == bits(dict(compiled.model.state_dict()))
    compiled.load(tmp_path / "weights.pth")
    before = compiled.validate()
    assert before == plain.validate(), "the compiled form uses the weights that were loaded"
    compiled.model[2].bias.data += 1
    assert compiled.validate() != before


def test_schedules_and_modes_compile_it_once_each():
    """One graph for training and one for validation, however often hyper-parameters move and modes change."""
    counter = compile_counter()
    learn = make(counter, norm=True)
    learn.fit_one_cycle(3, OneCycle(0.1).max_lr)
    assert counter.frame_count == 2
    learn.fit(0.3, 2, wd=0.1)
    learn.fit_one_cycle(2, 0.05, callbacks=[GradientClip(norm=0.1)])
    learn.lr_find(num_it=10)
    learn.fit(0.01)
    assert counter.frame_count == 2


def test_a_last_batch_that_is_smaller_compiles_it_once_more():
    """Then torch takes the number of samples for one that varies; nothing else compiles it again."""
    counter = compile_counter()
    data = batches(4, [6, 6, 6, 5]), batches(2, 6)
    compiled = learner(*data, model=make_model(True), opt_func=AdamW, compile={"backend": counter})
    plain = learner(*data, model=make_model(True), opt_func=AdamW)
    for learn in (compiled, plain):
        learn.fit_one_cycle(1, 0.01)
        if learn is compiled:
            assert counter.frame_count == 3, "training, training with any number, validation"
        for _ in range(2):
            learn.fit_one_cycle(2, 0.01)
            learn.fit(0.02, callbacks=[GradientClip(norm=0.1)], wd=0.1)
            learn.lr_find(num_it=10)
        learn.dls.train = batches(5, [6, 4, 3, 6, 2])
        learn.fit(0.01)
    assert counter.frame_count == 3
    assert trained(compiled) == trained(plain)


def test_layers_that_are_thawed_compile_it_once_each():
    """What has a gradient is a part of what was compiled; each set of trained layers is compiled once, in all fits."""
    counter = compile_counter()
    learn = make(counter, norm=True)
    learn.fit_one_cycle(5, 0.01, callbacks=[Unfreeze({"0": 0.5})])
    assert counter.frame_count == 4, "two for training, two for validation"
    learn.fit_one_cycle(5, 0.02, callbacks=[Unfreeze({"0": 0.3})])
    learn.fit(0.01)
    assert counter.frame_count == 4


@pytest.mark.parametrize("opt_func", [AdamW, SGD, partial(SGD, momentum=0.9), partial(AdamW, foreach=True), RMSprop])
def test_the_optimizer_is_not_compiled(opt_func):
    """So whatever it is, no hyper-parameter that moves can compile anything."""
    counter = compile_counter()
    learn = make(counter, opt_func=opt_func, callbacks=[GradientClip(norm=0.1), EMA(0.9)])
    for peak in (0.01, 0.02, 0.05):
        learn.fit_one_cycle(2, peak, wd=peak)
    assert counter.frame_count == 2


@pytest.mark.parametrize("train_bn", [True, False])
def test_frozen_norm_layers_are_right(train_bn):
    compiled, plain = (make(backend, norm=True, train_bn=train_bn, splitter=lambda model: [model[:2], model[2:]])
                       for backend in ("eager", None))  # fmt: skip
    for learn in (compiled, plain):
        learn.freeze()
        learn.fit(0.01)
        frozen = learn.model[1].running_mean.clone()
        learn.unfreeze()
        learn.fit(0.01)
        assert not torch.equal(learn.model[1].running_mean, frozen)
    assert frozen.any() == train_bn
    assert trained(compiled) == trained(plain)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_mixed_precision_and_the_rest_compile_once_each(fullgraph):
    """No graph for each validation, and the predictions are those of the model that is not compiled."""
    counter = compile_counter()
    callbacks = [[MixedPrecision("bf16"), GradientClip(norm=0.1), AutoMicrobatch(3)] for _ in range(2)]
    plain = learner(batches(4, 6), batches(2, 6), model=make_model(True), callbacks=callbacks[0])
    compiled = learner(batches(4, 6), batches(2, 6), model=make_model(True), callbacks=callbacks[1],
                       compile={"backend": counter, "fullgraph": fullgraph})  # fmt: skip
    for learn in (plain, compiled):
        learn.fit(0.01, 12, accumulate=2)
    assert trained(compiled) == trained(plain)
    assert compiled.recorder.epochs[-1]["valid_loss"] == plain.recorder.epochs[-1]["valid_loss"]
    assert counter.frame_count == 2, "training and validation"
    for _ in range(10):
        compiled.validate()
        compiled.fit(0.01)
    assert counter.frame_count == 3, "validation outside of fits, in its own precision"
    assert compiled.get_preds()[0].dtype is torch.float32
    assert bits(plain.get_preds()[0]) != bits(compiled.get_preds()[0]), "it trained on"
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("fullgraph", [False, True])
def test_validation_may_come_before_training(fullgraph):
    compiled = learner(batches(4, 6), batches(2, 6), model=make_model(), callbacks=[MixedPrecision("bf16")],
                       compile={"backend": "eager", "fullgraph": fullgraph})  # fmt: skip
    plain = learner(batches(4, 6), batches(2, 6), model=make_model(), callbacks=[MixedPrecision("bf16")])
    assert compiled.validate() == pytest.approx(plain.validate(), rel=0.02)
    for learn in (plain, compiled):
        learn.fit(0.01)
    assert trained(compiled) == trained(plain)
    assert compiled.recorder.epochs[-1]["valid_loss"] == plain.recorder.epochs[-1]["valid_loss"]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("wrong", [1, None, "inductor"])
def test_what_compile_refuses(wrong):
    with pytest.raises(TypeError, match=r"compile must be True, False or a dict of options of torch\.compile, got"):
        Learner(nn.Linear(3, 1), (batches(), None), nn.MSELoss(), compile=wrong)


def test_an_assigned_model_is_the_one_that_is_compiled():
    class Negative(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return -self.model(x)

    plain, compiled = make(), make("eager")
    for learn in (plain, compiled):
        learn.model = Negative(learn.model)
    assert compiled.validate() == pytest.approx(plain.validate(), rel=1e-5)
    for learn in (plain, compiled):
        learn.fit(0.01, 1)
    assert trained(compiled) == trained(plain)
