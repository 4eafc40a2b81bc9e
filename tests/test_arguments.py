"""Every wrong argument: which error it is, what it says, and that nothing has happened before it.

The tables read: what a user types, the error, a part of its message with the numbers in it.
"""
import ast
import math
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import everything, rngs
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import minifast
from minifast import DataLoaders, Learner, TensorLoader

PACKAGE = Path(minifast.__file__).parent


class Net(nn.Module):
    """Three layer groups, and something of everything that a fit could change by mistake."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.neck, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.neck(self.body(x)))


class Unsized(IterableDataset):
    def __iter__(self):
        yield from zip(*samples(), strict=True)


def samples(n=12):
    return torch.linspace(-1, 1, 3 * n).reshape(n, 3), torch.linspace(0, 1, n).reshape(n, 1)


def loaders(n=12, **options):
    return DataLoaders(TensorLoader(*samples(n), batch_size=4, shuffle=True, **options),
                       TensorLoader(*samples(), batch_size=5))


def torch_loader(n=12, **options):
    return DataLoader(TensorDataset(*samples(n)), **({"batch_size": 4} | options))


def make(model=None, dls=None, loss_func=nn.functional.mse_loss, **options):
    """A small Learner: of three layer groups, unless a model is given."""
    splitter = {"body": "body.*", "neck": "neck.*", "head": "head.*"} if model is None else None
    return Learner(Net() if model is None else model, loaders() if dls is None else dls, loss_func,
                   **({"splitter": splitter, "verbose": False, "device": "cpu"} | options))


NAMES = {**{name: getattr(minifast, name) for name in minifast.__all__}, "nn": nn, "torch": torch, "np": np,
         "nan": math.nan, "inf": math.inf, "partial": partial, "DataLoader": DataLoader,
         **{thing.__name__: thing for thing in (make, loaders, torch_loader, samples, Unsized, Net)},
         "mse": nn.functional.mse_loss}


@pytest.fixture
def learn(tmp_path, monkeypatch):
    """A learner that has been trained a little, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    learn = make()
    learn.fit(0.01)
    return learn


def refuse(call, error, message, **names):
    """Evaluate `call`, which must raise just that error."""
    with pytest.raises(error) as caught:
        eval(call, NAMES | names)
    assert type(caught.value) is error
    assert message in str(caught.value)


def refuse_and_leave(learn, call, error, message):
    before = everything(learn)
    refuse(call, error, message, learn=learn)
    assert everything(learn) == before
    assert os.listdir() == []


def table(rows):
    return pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row, id=row[0]) for row in rows])


NOT_A_COUNT = [("0", "0 (int)"), ("-1", "-1 (int)"), ("1.5", "1.5 (float)"), ("2.0", "2.0 (float)"),
               ("'3'", "'3' (str)"), ("True", "True (bool)"), ("nan", "nan (float)"), ("inf", "inf (float)")]
NOT_A_RATE = [("0", "0 (int)"), ("-1", "-1 (int)"), ("nan", "nan (float)"), ("inf", "inf (float)"),
              ("'0.1'", "'0.1' (str)"), ("True", "True (bool)"), ("1j", "1j (complex)"), ("{}", "{} (dict)"),
              ("torch.tensor(0.1, requires_grad=True)", "tensor(0.1000, requires_grad=True) (Tensor)")]

# (call with {} for the value, the name in the message)
COUNTS = [("learn.fit(0.1, {})", "n_cycle"), ("learn.fit(0.1, 1, cycle_len={})", "cycle_len"),
          ("learn.fit(0.1, 2, cycle_len=1, cycle_mult={})", "cycle_mult"),
          ("learn.fit(0.1, steps_per_epoch={})", "steps_per_epoch"), ("learn.fit(0.1, accumulate={})", "accumulate"),
          ("learn.fit_one_cycle({}, 0.1)", "cycle_len"), ("learn.fit_flat_cos({})", "n_epoch"),
          ("learn.fit_sgdr({}, 1)", "n_cycles"), ("learn.fit_sgdr(1, {})", "cycle_len"),
          ("learn.fit_sgdr(1, 1, cycle_mult={})", "cycle_mult"), ("learn.fine_tune({})", "epochs"),
          ("learn.fine_tune(1, freeze_epochs={})", "freeze_epochs"), ("learn.plan({})", "n_epochs"),
          ("learn.plan(1, accumulate={})", "accumulate"), ("CircularLR(n_cycles={})", "n_cycles"),
          ("CircularLRBeta(cycle_mult={})", "cycle_mult"), ("CosineAnnealing(n_cycles={})", "n_cycles"),
          ("OneCycle().values({})", "n_steps"), ("OneCycle().table({}, 2)", "n_epochs"),
          ("OneCycle().table(2, {})", "steps_per_epoch"), ("OneCycle().plot({})", "n_steps"),
          ("digits({})", "batch_size"), ("TensorLoader(torch.ones(3), batch_size={})", "batch_size")]
RATES = [("learn.fit({})", "lr"), ("learn.fit_one_cycle(1, {})", "max_lr"), ("learn.fit_flat_cos(1, {})", "lr"),
         ("learn.fit_sgdr(1, 1, {})", "lr_max"), ("learn.fine_tune(1, {})", "base_lr"), ("learn.plan(1, lr={})", "lr"),
         ("learn.lr_find({})", "start_lr"), ("learn.lr_find(1e-5, {})", "end_lr"), ("LRFinder({})", "start_lr"),
         ("OneCycle({})", "max_lr"), ("OneCycle().values(2, {})", "peak")]


def product(calls, values, text):
    return [(call.format(value), ValueError, text.format(name=name, shown=shown))
            for call, name in calls for value, shown in values]


@pytest.mark.table
@pytest.mark.case("A1", "A13")
@table(product(COUNTS, NOT_A_COUNT, "{name} must be an int >= 1, got {shown}"))
def test_counts(learn, call, error, message):
    refuse_and_leave(learn, call, error, message)


@pytest.mark.table
@pytest.mark.case("A2")
@table(product(RATES, NOT_A_RATE, "{name} must be a finite number > 0, got {shown}"))
def test_rates(learn, call, error, message):
    refuse_and_leave(learn, call, error, message)


@pytest.mark.table
@pytest.mark.case("A2", "A3", "A4", "A5", "A7", "L6")
@table([
    # what fits take
    ("learn.fit(None)", ValueError, "lr must be a finite number > 0, got None (NoneType). Pass e.g. lr=1e-3"),
    ("learn.fit(3, 1e-2)", ValueError, "got lr=3, n_cycle=0.01. Did you mean fit(0.01, 3)?"),
    ("learn.fit([])", ValueError, "lr must hold at least one learning rate"),
    ("learn.fit([0.1, nan, 0.1])", ValueError, "lr[1] must be a finite number > 0, got nan (float)"),
    ("learn.fit([0.1, 0.2])", ValueError, "2 learning rates for 3 layer groups (body, neck, head): pass one float, "
                                          "slice(lo, hi) or 3 values."),
    ("learn.fit(np.full(4, 0.1))", ValueError, "4 learning rates for 3 layer groups (body, neck, head)"),
    ("learn.fit(slice(None))", ValueError, "lr must be slice(hi) or slice(lo, hi), got slice(None, None, None)"),
    ("learn.fit(slice(1e-5, None))", ValueError, "got slice(1e-05, None, None)"),
    ("learn.fit(slice(1e-5, 1e-3, 2))", ValueError, "got slice(1e-05, 0.001, 2)"),
    ("learn.fit(slice(1e-2, 1e-5))", ValueError, "got slice(0.01, 1e-05). Swap the two."),
    ("learn.fit(slice(0, 1e-5))", ValueError, "lr=slice(...) start must be a finite number > 0, got 0 (int)"),
    ("learn.fit(slice(-1))", ValueError, "lr=slice(...) end must be a finite number > 0, got -1 (int)"),
    ("learn.fit(0.1, wd=-0.5)", ValueError, "wd must be a finite number >= 0, got -0.5 (float)"),
    ("learn.fit(0.1, wd='x')", ValueError, "wd must be a finite number >= 0, got 'x' (str)"),
    ("learn.fit(0.1, resume=True)", ValueError, "resume=True has to know where the checkpoints are"),
    ("learn.fit(0.1, resume='no')", FileNotFoundError, "there is no checkpoint no to resume"),
    ("learn.fit(0.1, resume=3)", TypeError, "resume must be \"auto\", True, False, or the path of a checkpoint, got 3"),
    ("learn.fit(0.1, verbose=1)", TypeError, "verbose must be True or False, got 1 (int)"),
    ("learn.fit(0.1, steps_per_epoch=4)", ValueError, "steps_per_epoch=4 is more than the 3 updates that one pass "
                                                      "over 3 batches makes"),
    ("learn.fit(0.1, steps_per_epoch=3, accumulate=2)", ValueError, "steps_per_epoch=3 is more than the 2 updates"),
    ("learn.fit(0.1, cycle_mult=2)", ValueError, "cycle_mult=2 needs cycle_len"),
    ("learn.fit(0.1, 2, use_clr=(32, 5))", ValueError, "use_clr=(32, 5) needs cycle_len, the number of epochs in the "
                                                       "first cycle. Pass e.g. fit(lr, 2, cycle_len=1, use_clr=(32, 5))"
                                                       ),
    ("learn.fit(0.1, use_clr_beta=(10, 5))", ValueError, "use_clr_beta=(10, 5) needs cycle_len"),
    ("learn.fit(0.1, cycle_len=1, use_clr=(32, 5, 0.9))", ValueError, "use_clr takes 2 numbers (div, cut_div) or 4, "
                                                                      "with (mom_max, mom_min) behind, got (32, 5, 0.9)"
                                                                      ),
    ("learn.fit(0.1, cycle_len=1, use_clr=32)", ValueError, "use_clr takes 2 numbers (div, cut_div) or 4"),
    ("learn.fit(0.1, cycle_len=1, use_clr_beta=(1,))", ValueError, "use_clr_beta takes 2 numbers (div, pct) or 4"),
    ("learn.fit(0.1, cycle_len=1, use_clr=(32, 5), use_clr_beta=(10, 5))", ValueError,
     "use_clr=(32, 5) and use_clr_beta=(10, 5) are two schedules for one fit"),
    ("learn.fit(0.1, cycle_len=1, use_clr=(0, 5))", ValueError, "div must be a finite number > 0, got 0 (int)"),
    ("learn.fit(0.1, cycle_len=1, use_clr=(32, 0.5))", ValueError, "cut_div must be a finite number >= 1, got 0.5"),
    ("learn.fit(0.1, cycle_len=1, use_clr=(32, 5, 0.9, 1.2))", ValueError,
     "moms[1] must be a finite number >= 0 and < 1, got 1.2 (float)"),
    ("learn.fit(0.1, 10**9, cycle_len=1, cycle_mult=2)", ValueError, "n_cycles=1000000000 cycles, each cycle_mult=2 "
                                                                     "times as long as the one before, are more than"),
    ("learn.fit_sgdr(64, 1)", ValueError, "n_cycles=64 cycles, each cycle_mult=2 times as long"),
    ("learn.fit(0.1, 10**9, cycle_len=10**10)", ValueError, "must be an int >= 1 and <= 9223372036854775807, got 1000"),
    ("CosineAnnealing(64, 2)", ValueError, "n_cycles=64 cycles, each cycle_mult=2 times as long as the one before"),
    ("learn.fit(1e31)", ValueError, "lr must be at most 1e+30, got 1e+31 (float)"),
    ("OneCycle(div_factor=1e-9)", ValueError, "div_factor must be at least 1e-08, got 1e-09 (float)"),
    ("LinearLR(start=1e9)", ValueError, "start must be at most 1e+08 times the peak, got 1000000000.0 (float)"),
    ("learn.fit(0.1, wd=1e39)", ValueError, "wd must be a finite number >= 0 and of at most 3.4e+38, got 1e+39"),
    ("learn.fit_one_cycle()", ValueError, "cycle_len must be an int >= 1, got None (NoneType)"),
    ("learn.fit_one_cycle(1, cyc_len=2)", ValueError, "cycle_len=1 and cyc_len=2 are the same argument"),
    ("learn.fit_one_cycle(1, 0.1, lr_max=0.2)", ValueError, "max_lr=0.1 and lr_max=0.2 are the same argument"),
    ("learn.fit_one_cycle(1, [])", ValueError, "max_lr must hold at least one learning rate"),
    ("learn.fit_sgdr(1, 1, slice(2, 1))", ValueError, "lr_max=slice(lo, hi) must rise"),
    ("learn.fit_one_cycle(1, 0.1, div_factor=0)", ValueError, "div_factor must be a finite number > 0, got 0 (int)"),
    ("learn.fit_one_cycle(1, 0.1, pct_start=1.1)", ValueError, "pct_start must be a finite number >= 0 and <= 1"),
    ("learn.fit_one_cycle(1, 0.1, typo=1)", TypeError, "typo"),
    ("learn.fit_flat_cos(1, div_final=0)", ValueError, "div_final must be a finite number > 0, got 0 (int)"),
    ("learn.fine_tune(1, lr_mult=0.5)", ValueError, "lr_mult must be a finite number >= 1, got 0.5 (float)"),
    ("learn.fine_tune(1, div=-1)", ValueError, "div must be a finite number > 0, got -1 (int)"),
    ("learn.fine_tune(1, pct_start=2)", ValueError, "pct_start must be a finite number >= 0 and <= 1, got 2 (int)"),
    # callbacks
    ("learn.fit(0.1, callbacks='EarlyStopping')", TypeError, "callbacks must be a list of callbacks, got "
                                                             "'EarlyStopping' (str)"),
    ("learn.fit(0.1, callbacks=OneCycle)", TypeError, "callbacks must be a list of callbacks, got <class"),
    ("learn.fit(0.1, callbacks=None)", TypeError, "callbacks must be a list of callbacks, got None (NoneType)"),
    ("learn.fit(0.1, callbacks=['a'])", TypeError, "callbacks must hold callbacks, got 'a' (str). Subclass"),
    ("learn.fit(0.1, callbacks=[None])", TypeError, "callbacks must hold callbacks, got None (NoneType)"),
    ("learn.fit(0.1, callbacks=[OneCycle])", TypeError, "OneCycle is a class: pass an instance, did you mean "
                                                        "OneCycle(...)?"),
    ("learn.fit(0.1, callbacks=[Progress()] * 2)", ValueError, "the same callback is given twice: Progress()"),
    ("learn.fit(0.1, callbacks=[Recorder()])", ValueError, "a Learner has its own Recorder"),
    ("learn.fit(0.1, callbacks=[OneCycle(), FlatCos()])", ValueError, "set 'lr', one would overwrite the other"),
    ("learn.fit(0.1, callbacks=[OneCycle([0.1, 0.2])])", ValueError, "2 learning rates for 3 layer groups"),
    ("learn.fit(0.1, callbacks=[Schedule('dampening', lambda step, n: 0.5)])", ValueError,
     "AdamW has no 'dampening' to schedule. It has lr, betas"),
    # the finder
    ("learn.lr_find(1e-3, 1e-3)", ValueError, "start_lr must be below end_lr, got 0.001 and 0.001"),
    ("learn.lr_find(10, 1e-7)", ValueError, "start_lr must be below end_lr, got 10 and 1e-07"),
    ("learn.lr_find(slice(1e-5, 1e-3), 1e-4)", ValueError, "start_lr must be below end_lr, got 0.0001 and 0.0001"),
    ("learn.lr_find([1e-5, 1e-4])", ValueError, "2 learning rates for 3 layer groups (body, neck, head)"),
    ("learn.lr_find(num_it=1)", ValueError, "num_it must be an int >= 2, got 1 (int). Pass e.g. num_it=100"),
    ("learn.lr_find(num_it=50.0)", ValueError, "num_it must be an int >= 2, got 50.0 (float)"),
    ("learn.fit(0.1, callbacks=[LRFinder()], accumulate=0)", ValueError, "accumulate must be an int >= 1, got 0 (int)"),
    ("learn.fit(0.1, callbacks=[LRFinder()], wd=-1)", ValueError, "wd must be a finite number >= 0, got -1 (int)"),
    ("learn.fit(0.1, callbacks=[LRFinder()], verbose=1)", TypeError, "verbose must be True or False, got 1 (int)"),
    ("learn.fit([0.1, 0.2], callbacks=[LRFinder()])", ValueError, "2 learning rates for 3 layer groups"),
    ("learn.lr_find(stop_div=None)", TypeError, "stop_div must be True or False, got None (NoneType)"),
    ("learn.lr_find(callbacks=[OneCycle])", TypeError, "OneCycle is a class"),
    # freezing, looking
    ("learn.freeze_to(3)", ValueError, "freeze_to(n) needs an int -3 <= n < 3 for 3 layer groups (body, neck, head), "
                                       "got 3 (int)."),
    ("learn.freeze_to(-4)", ValueError, "got -4 (int)."),
    ("learn.freeze_to(1.0)", ValueError, "got 1.0 (float)."),
    ("learn.freeze_to(True)", ValueError, "got True (bool)."),
    ("learn.freeze_to('head')", ValueError, "got 'head' (str)."),
    ("learn.plan(1, OneCycle)", TypeError, "schedule must be a schedule such as OneCycle(0.1), got <class"),
    ("learn.plan(1, steps_per_epoch=9)", ValueError, "steps_per_epoch=9 is more than the 3 updates"),
    ("learn.validate(3)", TypeError, "dl must be an iterable of batches, got 3"),
    ("learn.get_preds(3)", TypeError, "dl must be an iterable of batches, got 3"),
    ("learn.validate(learn.dls)", TypeError, "dl must be one loader, got a DataLoaders with two. Pass dl.valid or"),
    ("learn.validate([])", ValueError, "0 batches"),
    ("learn.get_preds([])", ValueError, "there is nothing to predict: the data yielded 0 batches"),
    ("learn.recorder.plot()", RuntimeError, "there is no LR finder run to plot. Call learn.lr_find() first"),
    ("learn.recorder.plot_metrics()", RuntimeError, "no metric was recorded. Pass e.g. Learner(..., "
                                                    "metrics=[accuracy])"),
    ("learn.load('nowhere.pth')", FileNotFoundError, "nowhere.pth"),
    ("learn.load(None)", TypeError, "NoneType"),
    ("learn.save('no/where.pth')", FileNotFoundError, "cannot save to no/where.pth: there is no folder no. Make it"),
])
def test_what_a_learner_refuses(learn, call, error, message):
    refuse_and_leave(learn, call, error, message)
    learn.fit(0.01)
    assert len(learn.recorder.lrs) == 3, "the next fit works as if nothing had been asked"


@pytest.mark.table
@pytest.mark.case("A5", "A6", "L6")
@table([
    ("CircularLR(0)", ValueError, "div must be a finite number > 0, got 0 (int)"),
    ("CircularLR(10, 0.9)", ValueError, "cut_div must be a finite number >= 1, got 0.9 (float)"),
    ("CircularLR(nan)", ValueError, "div must be a finite number > 0, got nan (float)"),
    ("CircularLR(moms=(0.9, 0.8, 0.7))", ValueError, "moms must hold 2 momentums or be None, got (0.9, 0.8, 0.7)"),
    ("CircularLR(10, 10, 2)", TypeError, "positional"),
    ("CircularLRBeta(-1)", ValueError, "div must be a finite number > 0, got -1 (int)"),
    ("CircularLRBeta(10, 101)", ValueError, "pct must be a finite number >= 0 and <= 100, got 101 (int)"),
    ("OneCycle(div_factor=0)", ValueError, "div_factor must be a finite number > 0, got 0 (int)"),
    ("OneCycle(pct_start=-0.1)", ValueError, "pct_start must be a finite number >= 0 and <= 1, got -0.1 (float)"),
    ("OneCycle(pct_start=1.1)", ValueError, "pct_start must be a finite number >= 0 and <= 1, got 1.1 (float)"),
    ("OneCycle(final_div=0)", ValueError, "final_div must be a finite number > 0, got 0 (int)"),
    ("OneCycle(moms=(1.2, 0.9))", ValueError, "moms[0] must be a finite number >= 0 and < 1, got 1.2 (float)"),
    ("OneCycle(moms=(0.9, 1))", ValueError, "moms[1] must be a finite number >= 0 and < 1, got 1 (int)"),
    ("OneCycle(moms=(0.95,))", ValueError, "moms must hold 2 or 3 momentums or be None, got (0.95,)"),
    ("OneCycle(moms='no')", ValueError, "moms must hold 2 or 3 momentums or be None, got 'no'"),
    ("CosineAnnealing(warmup_frac=2)", ValueError, "warmup_frac must be a finite number >= 0 and <= 1, got 2 (int)"),
    ("FlatCos(1.5)", ValueError, "pct_start must be a finite number >= 0 and <= 1, got 1.5 (float)"),
    ("FlatCos(div_final=-3)", ValueError, "div_final must be a finite number > 0, got -3 (int)"),
    ("LinearLR(-1)", ValueError, "start must be a finite number >= 0, got -1 (int)"),
    ("LinearLR(end=inf)", ValueError, "end must be a finite number >= 0, got inf (float)"),
    ("ExponentialLR(end=0)", ValueError, "end must be a finite number > 0, got 0 (int)"),
    ("PolynomialLR(power=0)", ValueError, "power must be a finite number > 0, got 0 (int)"),
    ("PiecewiseLR([(0.2, FlatCos()), (0.7, FlatCos())])", ValueError, "must add up to 1, got 0.9"),
    ("PiecewiseLR([(1.5, FlatCos())])", ValueError, "the share in pieces[0] must be a finite number > 0 and <= 1"),
    ("PiecewiseLR([(1, FlatCos)])", TypeError, "pieces must be (share, schedule) pairs"),
    ("PiecewiseLR([(0.5, FlatCos()), (0.5, OneCycle())])", ValueError,
     "the pieces must own the same hyper-parameters, got lr, lr+momentum"),
    ("PiecewiseLR([])", ValueError, "the shares of the pieces must add up to 1, got 0"),
    ("Schedule({})", TypeError, "Schedule takes a name and a shape, or a dict of them, got {}"),
    ("Schedule('lr')", TypeError, "the shape of 'lr' must be a function of (step, n_steps), got None"),
    ("Schedule({'lr': 0.5})", TypeError, "the shape of 'lr' must be a function of (step, n_steps), got 0.5"),
    ("LRFinder(num_it=0)", ValueError, "num_it must be an int >= 2, got 0 (int)"),
    ("LRFinder(1, 0.1)", ValueError, "start_lr must be below end_lr, got 1 and 0.1"),
    ("TensorLoader()", TypeError, "TensorLoader takes tensors of shape (n, ...), got none"),
    ("TensorLoader([1, 2])", TypeError, "TensorLoader takes tensors of shape (n, ...), got list"),
    ("TensorLoader(torch.tensor(1.0))", TypeError, "TensorLoader takes tensors of shape (n, ...), got Tensor"),
    ("TensorLoader(torch.ones(3), torch.ones(4))", ValueError, "tensors must have one length, got [3, 4]"),
    ("TensorLoader(torch.ones(3), shuffle=1)", TypeError, "shuffle must be True or False, got 1 (int)"),
    ("TensorLoader(torch.ones(3), drop_last='no')", TypeError, "drop_last must be True or False, got 'no' (str)"),
    ("DataLoaders('mnist')", TypeError, "train must be an iterable of batches, got str"),
    ("DataLoaders(torch.ones(3, 2))", TypeError, "train must be an iterable of batches, got Tensor"),
    ("DataLoaders([], {})", TypeError, "valid must be an iterable of batches, got dict"),
    ("DataLoaders(3)", TypeError, "train must be an iterable of batches, got int"),
    ("DataLoaders([], nn.ReLU())", TypeError, "valid must be an iterable of batches, got ReLU"),
    ("top_k_accuracy(torch.ones(2, 3), torch.ones(2), k=4)", ValueError, "k must be 1..3, the number of classes, "
                                                                         "got 4"),
    ("top_k_accuracy(torch.ones(2, 3), torch.ones(2), k=1.5)", ValueError, "k must be 1..3"),
])
def test_what_is_refused_without_a_learner(call, error, message):
    before = rngs()
    refuse(call, error, message)
    assert rngs() == before


@pytest.mark.table
@pytest.mark.case("A2", "A7", "A12", "A15")
@table([
    ("Learner(loaders(), net, mse)", TypeError, "model and data are swapped: got Learner(DataLoaders, Net). The call "
                                                "is Learner(model, dls, loss_func)."),
    ("Learner(Net, loaders(), mse)", TypeError, "model must be an nn.Module, got <class"),
    ("Learner(None, loaders(), mse)", TypeError, "model must be an nn.Module, got None (NoneType)"),
    ("make(net, torch_loader())", TypeError, "dls must be DataLoaders(train, valid) or a tuple (train, valid), got a "
                                             "DataLoader. Without validation data pass DataLoaders(train)."),
    ("make(net, samples() + samples())", TypeError, "dls must be DataLoaders(train, valid)"),
    ("make(net, (None, None))", TypeError, "train must be an iterable of batches, got NoneType"),
    ("make(net, (torch_loader(), 3))", TypeError, "valid must be an iterable of batches, got int"),
    ("make(net, loss_func='mse')", TypeError, "loss_func must be a function (output, target) -> loss, got 'mse'"),
    ("make(net, loss_func=nn.MSELoss)", TypeError, "loss_func must be a function (output, target) -> loss, got <class"),
    ("make(net, lr=[1, 2])", ValueError, "2 learning rates for 1 layer group (model): pass one float, slice(lo, hi) "
                                         "or 1 value."),
    *product([("make(net, lr={})", "lr")], [*NOT_A_RATE, ("None", "None (NoneType)")],
             "{name} must be a finite number > 0, got {shown}"),
    ("make(net, wd=-1)", ValueError, "wd must be a finite number >= 0, got -1 (int)"),
    ("make(net, wd_norm_bias=None)", TypeError, "wd_norm_bias must be True or False, got None (NoneType)"),
    ("make(net, train_bn=1)", TypeError, "train_bn must be True or False, got 1 (int)"),
    ("make(net, verbose='no')", TypeError, "verbose must be True or False, got 'no' (str)"),
    ("make(net, compile=1)", TypeError, "compile must be True, False or a dict of options of torch.compile, got 1"),
    ("make(net, unpack=3)", TypeError, "unpack must be a function batch -> (inputs, target), got 3"),
    ("make(net, seed=-1)", ValueError, "seed must be an int >= 0 and <= 4294967295, got -1 (int)"),
    ("make(net, seed=1.5)", ValueError, "seed must be an int >= 0 and <= 4294967295, got 1.5 (float)"),
    ("make(net, seed=2**65)", ValueError, "<= 4294967295, got 36893488147419103232"),
    ("make(net, seed=2**32)", ValueError, "seed must be an int >= 0 and <= 4294967295, got 4294967296"),
    ("make(net, seed='7')", ValueError, "seed must be an int >= 0 and <= 4294967295, got '7' (str)"),
    ("make(net, device='gpu')", ValueError, "device='gpu' cannot be used: "),
    ("make(net, device=1.5)", ValueError, "device=1.5 (float) cannot be used: "),
    ("make(net, metrics=['accuracy'])", TypeError, "a metric must be a function (pred, target) -> number, or an object "
                                                   "with update, compute and reset, got 'accuracy'"),
    ("make(net, metrics=None)", TypeError, "a metric must be a function"),
    ("make(net, metrics=[nn.MSELoss])", TypeError, "MSELoss is a class: pass an instance, MSELoss(...)"),
    ("make(net, metrics=[rmse, rmse])", ValueError, "two columns of the epoch table would be called 'rmse'"),
    ("make(net, metrics=[dict(valid_loss=rmse)])", TypeError, "a metric must be a function"),
    ("make(net, callbacks=[OneCycle])", TypeError, "OneCycle is a class: pass an instance"),
    ("make(net, callbacks='all')", TypeError, "callbacks must be a list of callbacks, got 'all' (str)"),
    ("make(net, splitter=3)", TypeError, "splitter must be a callable, a dict of name -> glob, or None, got 3"),
    ("make(net, splitter={})", ValueError, "8 of 8 parameters are in no layer group: body.0.weight, body.0.bias, "
                                           "body.1.weight, body.1.bias, neck.weight and 3 more"),
    ("make(net, splitter={'all': '*', 'head': 'haed.*'})", ValueError, "layer group 'head': no parameter matches "
                                                                       "'haed.*'. Parameters of this model: body.0."),
    ("make(net, splitter={'all': '*', 'head': 'head.*'})", ValueError, "layer group 'head' has no parameters of its "
                                                                       "own"),
    ("make(net, splitter=lambda net: [net.body, net.neck])", ValueError, "2 of 8 parameters are in no layer group: "
                                                                         "head.weight, head.bias"),
    ("make(net, splitter=lambda net: [net, other])", ValueError, "2 parameters that are not the model's"),
    ("make(net, splitter=lambda net: [net, 3])", TypeError, "modules, parameters or lists of them, got a int"),
    ("make(nn.ReLU())", ValueError, "the model (ReLU) has no parameters to train"),
    ("make(nn.Sequential(nn.LazyLinear(1)))", ValueError, "the model (Sequential) has lazy layers without a shape yet"),
    ("make(net, opt_func=None)", TypeError, "opt_func must be a torch optimizer class or a partial of one, got None"),
    ("make(net, opt_func='SGD')", TypeError, "opt_func must be a torch optimizer class or a partial of one, got 'SGD'"),
    ("make(net, opt_func=torch.optim.SGD([torch.ones(1)], 1))", TypeError, "opt_func must be a torch optimizer class"),
    ("make(net, seed=3, opt_func=None)", TypeError, "opt_func must be a torch optimizer class"),
    ("make(net, splitter=lambda net: 3)", TypeError, "splitter must return a list or dict of modules or parameter"),
    ("make(net, opt_func=lambda params, lr: 3)", TypeError, "opt_func must make a torch optimizer, got int"),
    ("make(net, opt_func=torch.optim.Rprop, wd=0.1)", ValueError, "wd=0.1, but Rprop has no weight_decay"),
    ("make(net, optim=torch.optim.SGD)", TypeError, "optim"),
])
def test_what_the_constructor_refuses(call, error, message):
    net, other = Net(), nn.Linear(1, 1)
    before = rngs(), [value.clone() for value in net.state_dict().values()]
    refuse(call, error, message, net=net, other=other)
    assert rngs() == before[0]
    assert all(map(torch.equal, net.state_dict().values(), before[1]))
    assert all(p.requires_grad for p in net.parameters())
    make(net).fit(0.1)


@pytest.mark.table
@pytest.mark.case("B1", "B2", "B8")
@table([
    ("make(net, loaders(13)).fit(0.1)", ValueError, "the last training batch has 1 sample (13 samples, batch_size 4), "
                                                    "and the model's BatchNorm cannot take statistics of one. Set "
                                                    "drop_last=True or another batch_size."),
    ("make(net, (torch_loader(13), None)).fit(0.1)", ValueError, "1 sample (13 samples, batch_size 4)"),
    ("make(net, (torch_loader(13), None)).lr_find(num_it=20)", ValueError, "1 sample (13 samples, batch_size 4)"),
    ("make(net, (torch_loader(3, batch_size=1), None)).fit(0.1)", ValueError, "1 sample (3 samples, batch_size 1)"),
    ("make(net, ([samples(4), samples(1)], None)).fit(0.1)", ValueError, "the last training batch has 1 sample"),
    ("make(net, loaders(3, drop_last=True)).fit(0.1)", ValueError, "the training data yields 0 batches: 3 samples, "
                                                                   "batch_size 4, drop_last=True. Lower batch_size or "
                                                                   "set drop_last=False."),
    ("make(net, (torch_loader(3, drop_last=True), None)).fit(0.1)", ValueError, "0 batches: 3 samples, batch_size 4, "
                                                                                "drop_last=True"),
    ("make(net, loaders(0)).fit(0.1)", ValueError, "the training data yields 0 batches: 0 samples, batch_size 4, "
                                                   "drop_last=False"),
    ("make(net, ([], None)).fit(0.1)", ValueError, "the training data yields 0 batches"),
    ("make(net, (iter([samples()]), None)).fit(0.1)", ValueError, "the training data (list_iterator) has no len(), and "
                                                                  "a schedule has to know how long it is. Pass "
                                                                  "steps_per_epoch="),
    ("make(net, (iter([samples()]), None)).fit(0.1, 2, steps_per_epoch=1)", ValueError,
     "the training data is an iterator (list_iterator), good for one pass, but 2 epochs are asked for"),
    ("make(net, (iter([samples()]), None)).lr_find()", ValueError, "the data is an iterator (list_iterator), good for "
                                                                   "one pass"),
    ("make(net, (DataLoader(Unsized(), 4), None)).fit(0.1)", ValueError, "the training data (DataLoader) has no len()"),
    ("make(net, (loaders().train, None)).validate()", ValueError, "there is no validation data. Pass a loader, or make "
                                                                  "the Learner with DataLoaders(train, valid)"),
    ("make(net, (loaders().train, None)).get_preds()", ValueError, "there is no validation data"),
    ("make(net, loss_func=None).get_preds(with_loss=True)", ValueError, "with_loss=True needs a loss_func"),
    ("make(net, opt_func=torch.optim.Adagrad).fit_one_cycle(1, 0.1)", ValueError,
     "schedules the momentum, but Adagrad has none. Pass moms=None."),
    ("make(net, opt_func=torch.optim.Rprop).fit(0.1, wd=0.1)", ValueError, "wd=0.1, but Rprop has no weight_decay. "
                                                                           "Pass wd=None."),
])
def test_what_is_refused_before_the_first_batch(call, error, message):
    net = Net()
    before = rngs(), [value.clone() for value in net.state_dict().values()]
    refuse(call, error, message, net=net)
    assert rngs() == before[0]
    assert all(map(torch.equal, net.state_dict().values(), before[1]))


SCALAR = "loss_func must return a scalar tensor with grad, got "


@pytest.mark.table
@pytest.mark.case("A11", "B4", "B6")
@table([
    ("make(net, loss_func=nn.MSELoss(reduction='none')).fit(0.1)", ValueError, SCALAR + "float32 (4, 1). Did you leave "
                                                                                        "reduction='none'?"),
    ("make(net, loss_func=lambda pred, target: None).fit(0.1)", TypeError, SCALAR + "None (NoneType)"),
    ("make(net, loss_func=lambda pred, target: 0.25).fit(0.1)", TypeError, SCALAR + "0.25 (float)"),
    ("make(net, loss_func=lambda pred, target: [pred.mean(), 1]).fit(0.1)", TypeError, SCALAR + "[tensor("),
    ("make(net, loss_func=lambda pred, target: [pred.mean(), 1]).fit(0.1)", TypeError,
     "A sum and its count are a tuple: return (sum, count)"),
    ("make(net, loss_func=lambda pred, target: (pred.mean(), 1, 2)).fit(0.1)", TypeError,
     "loss_func must return a scalar tensor, or (sum, count), got a tuple of 3: (Tensor, int, int)"),
    ("make(net, loss_func=lambda pred, target: (pred.sum(), torch.ones(3))).fit(0.1)", ValueError,
     "the count of a loss (sum, count) must be one number, got shape (3,)"),
    ("make(net, loss_func=lambda pred, target: pred.mean().detach()).fit(0.1)", ValueError, SCALAR + "float32 () "
                                                                                                     "without"),
    ("make(net, loss_func=lambda pred, target: pred.argmax()).fit(0.1)", ValueError, SCALAR + "int64 () without"),
    ("make(net, loss_func=None).fit(0.1)", TypeError, "loss_func=None needs a model whose output has `.loss`, but it "
                                                      "returned a Tensor. Pass a loss_func"),
    ("make(net, (DataLoader(samples()[0], 4), None)).fit(0.1)", TypeError,
     "a batch must hold inputs and a target, got one bare tensor of shape (4, 3). Yield (inputs, target), or pass "
     "Learner(..., unpack=lambda batch: (inputs, target))."),
    ("make(net, ([[samples()[0]]], None)).fit(0.1)", TypeError, "got a list of 1 element(s)"),
    ("make(other, ([None], None)).fit(0.1)", TypeError, "a batch must hold inputs and a target, got a NoneType"),
    ("make(net, ([(samples()[0], samples()[1][:, 0])], None)).fit(0.1)", ValueError,
     "the model's output (12, 1) and the target (12,) would be broadcast against each other by the loss. Give both one "
     "shape, e.g. by target.unsqueeze(1) or output.squeeze(1)."),
    ("make(net, ([(samples()[0], torch.ones(12).long())], None), nn.CrossEntropyLoss()).fit(0.1)", ValueError,
     "labels must be 0..0 for the model's 1 outputs, got 1..1. Give the model one output per class, or number the "
     "labels from 0."),
])
def test_what_is_refused_at_the_first_batch(call, error, message):
    """It has to be seen to be refused; no weight has moved then."""
    net, other = Net(), nn.Linear(3, 1)
    before = [p.detach().clone() for p in net.parameters()]
    refuse(call, error, message, net=net, other=other)
    assert all(map(torch.equal, net.parameters(), before))
    assert all(p.grad is None for p in net.parameters())
    assert all(module.training for module in net.modules())
    make(net).fit(0.1)


@pytest.mark.case("A12")
def test_a_frozen_model_is_not_trained(learn):
    learn.freeze()
    for p in learn.model.head.parameters():
        p.requires_grad_(False)
    for p in learn.model.body[1].parameters():
        p.requires_grad_(False)
    refuse_and_leave(learn, "learn.fit(0.1)", ValueError, "there is no trainable parameter: all 3 layer groups (body, "
                                                          "neck, head) are frozen. Call unfreeze() or freeze_to(n).")
    learn.unfreeze()
    learn.fit(0.1)


@pytest.mark.case("A12")
@pytest.mark.parametrize("call", ["learn.fit(0.1)", "learn.fit_one_cycle(1)", "learn.lr_find()"])
def test_an_optimizer_that_does_not_fit_is_not_used(learn, call):
    groups = [*learn.model.body.parameters()], [*learn.model.neck.parameters(), *learn.model.head.parameters()]
    learn.opt = torch.optim.SGD([{"params": params} for params in groups], lr=0.1)
    refuse_and_leave(learn, call, ValueError, "learn.opt has 2 param_groups for 3 layer groups: give it one per layer "
                                              "group, or mark each with its index")
    other = make(Net())
    other.opt = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    refuse(call, ValueError, "learn.opt and learn.model do not belong together: 8 parameters of the model are not in "
                             "the optimizer, 2 of the optimizer not in the model.", learn=other)


@pytest.mark.parametrize(("name", "value", "error", "message"), [
    ("loss_func", nn.MSELoss, TypeError, "loss_func must be a function (output, target) -> loss, got <class"),
    ("dls", [(1, 2)], TypeError, "dls must be DataLoaders(train, valid) or a tuple (train, valid), got a list"),
    ("metrics", ["accuracy"], TypeError, "a metric must be a function"),
    ("callbacks", [minifast.OneCycle], TypeError, "OneCycle is a class: pass an instance"),
    ("callbacks", [minifast.Recorder()], ValueError, "a Learner has its own Recorder"),
])
def test_what_is_assigned_between_fits_is_checked_before_the_next(learn, name, value, error, message):
    before = getattr(learn, name)
    setattr(learn, name, value)
    refuse_and_leave(learn, "learn.fit(0.1)", error, message)
    setattr(learn, name, before)
    learn.fit(0.1)


def test_another_model_needs_another_learner(learn):
    learn.model = nn.Linear(3, 1)
    refuse("learn.fit(0.1)", ValueError, "Make a new Learner for a new model", learn=learn)


def test_a_refused_fine_tune_freezes_nothing(learn):
    for call in ("learn.fine_tune(1, wd=-1)", "learn.fine_tune(1, callbacks=3)", "learn.fine_tune(1, accumulate=0)",
                 "learn.fine_tune(1, steps_per_epoch=99)", "learn.fine_tune(1, resume=True)"):
        before = everything(learn)
        with pytest.raises((ValueError, TypeError)):
            eval(call, {"learn": learn})
        assert everything(learn) == before, call


@pytest.mark.table
@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_check_is_an_assert(file):
    """`python -O` removes asserts. What is left of them tells mypy about a type: isinstance, or not None."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            assert re.fullmatch(r"isinstance\(.*\)|[\w.]+ is not None", ast.unparse(node.test)), f"line {node.lineno}"
