"""Any junk for any argument: an error that names the parameter and shows the value, or something that works.

`TABLE` lists every public callable with a valid value, and what else is a documented form, of each of its parameters;
a new callable or parameter has to be added to it. Everything else is done by `test_junk`.
"""
import contextlib
import inspect
import itertools
import math
import numbers
import os
import re
import signal
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, everything, throw
from helpers import learner as make_learner
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import nn

import minifast
from minifast import Callback, CancelFit, DataLoaders, Learner, OneCycle, RunLog, TensorLoader, accuracy, schedules
from minifast.core.callback import EVENTS
from minifast.data.loader import valid_sets
from minifast.training.fitting import FitOptions

FULL = os.environ.get("MINIFAST_FULL") == "1"
EXAMPLES = 200 if FULL else 40  # of junk for each parameter
TICKING = 0.02  # minutes of a fit that is limited in time; it is ended after a few batches anyway


# ---- junk

def tensors():
    """0-d and empty ones, of every kind of number."""
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
              torch.complex64)
    for dtype in dtypes:
        for shape in ((), (0,), (1,), (3,), (2, 2), (0, 3), (4, 3)):
            for value in (0, 1):
                yield partial(torch.full, shape, value, dtype=dtype)
    for value in (math.nan, math.inf, -1.0, 0.01, 1e30):
        yield partial(torch.tensor, value)
    for shape in ((), (2,)):
        yield partial(torch.ones, shape, requires_grad=True)
        yield partial(torch.ones, shape, device="meta")
    yield lambda: torch.eye(2).to_sparse()


def arrays():
    """numpy's scalars and arrays, those of objects too."""
    for kind in (np.float32, np.float64, np.float16, np.int64, np.int8, np.uint64, np.bool_, np.complex64, np.str_):
        for value in (0, 1):
            yield partial(kind, value)
    for value in (math.nan, math.inf, 0.01, [], [0.1], [0.1, 0.2], [[1.0, 2.0]], "a", ["a", "b"], [1, 2, 3], b"x"):
        yield partial(np.array, value)
    yield lambda: np.array([object(), None], dtype=object)
    yield lambda: np.datetime64("2020-01-01")


def a_generator():
    yield 1


def objects():
    """Things that somebody might pass by mistake: an instance where a class is wanted, and the other way round."""
    plain = [object(), ..., NotImplemented, 1j, complex(math.nan), Decimal("0.1"), Fraction(1, 3), range(3), range(0),
             torch.float32, torch.device("cpu"), Path("a"), Path(), ValueError("x"), len, math.cos, torch.relu, print,
             int, dict, str, type, Callback, OneCycle, nn.Linear, nn.Module, torch.optim.SGD, Learner, slice(None),
             slice(0.1), slice(1e-3, 0.1), slice(0.1, 1e-3), slice(1, 2, 3), slice("a"), slice(None, object()), math,
             frozenset(), frozenset({1}), memoryview(b"ab"), bytearray(b"a"), minifast.Order.HYPER,
             10**400, -10**400, 2**63, -2**63, 2**64 + 1]  # fmt: skip
    yield from (partial(_same, value) for value in plain)
    yield from (set, OneCycle, torch.Generator, partial(nn.Linear, 3, 1), nn.ReLU, a_generator, partial(iter, [1]),
                partial(_same, lambda: None), partial(_same, lambda *args, **options: None),
                partial(_same, lambda *args, **options: 0.5), partial(RunLog, "x"), nn.MSELoss, make_learner)


def _same(value):
    return value


FACTORIES = [*tensors(), *arrays(), *objects()]
TEXTS = ["", " ", "a", "lr", "valid_loss", "accuracy", "a/b", "../a", "é", "*", "[", "0.1", "3", 
         "cpu", "cuda", "max", "auto", "x" * 300, "~", "*.weight", "labels", "{}", "%s"]  # fmt: skip
# Of whole numbers the small ones, and those that nothing can count: what lies between is work that was asked for.
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 4), st.floats(), st.text("abc.*_0-é\n", max_size=4),
                    st.sampled_from(TEXTS), st.binary(max_size=3))
THINGS = st.sampled_from(range(len(FACTORIES))).map(lambda i: FACTORIES[i]())
LEAVES = st.one_of(SCALARS, THINGS, THINGS)
JUNK = st.one_of(SCALARS, THINGS, THINGS, THINGS, st.lists(LEAVES, max_size=3), st.lists(LEAVES, max_size=3).map(tuple),
                 st.dictionaries(st.sampled_from(["a", "lr", "", 1, None, (1,), "*", "body"]), LEAVES, max_size=2))


# What has once been taken, or refused in words that helped nobody: tried for every parameter, not left to chance.
ONCE_TROUBLE = [partial(_same, value) for value in (
    None, True, 10**400, math.nan, 1e39, Fraction(1, 3), "", b"", b"x", [], {}, [None], {(1,): 3},
    (tuple(), None), object(), OneCycle, np.array("a"), np.array([]))] + [
    partial(torch.tensor, 0.0), partial(torch.ones, (2, 2), dtype=torch.bfloat16), partial(iter, [1]),
    partial(torch.ones, 2, device="meta")]  # fmt: skip


# ---- what the documentation allows

def none(value):
    return value is None


def is_flag(value):
    return isinstance(value, bool)


def is_count(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    """A finite real number; 0-dimensional tensors and arrays of them are."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        if value.ndim or getattr(value, "requires_grad", False):
            return False
        if str(getattr(value, "device", "")) == "meta":
            return False
        value = value.item()
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and -3.4e38 <= value <= 3.4e38


def is_rate(value):
    """A learning rate in one of its forms."""
    if isinstance(value, slice):
        return value.step is None and is_number(value.stop) and (value.start is None or is_number(value.start))
    is_column = getattr(value, "ndim", 0) == 1 or isinstance(value, (list, tuple))
    return is_number(value) or (is_column and len(value) > 0 and all(map(is_number, value)))


def is_text(value):
    return isinstance(value, str)


def is_path(value):
    return isinstance(value, (str, os.PathLike))


def is_function(value):
    return callable(value)


def is_iterable(value):
    return isinstance(value, Iterable)


def is_mapping(value):
    return isinstance(value, Mapping)


def is_sequence(value):
    return isinstance(value, Sequence) or getattr(value, "ndim", 0)


def is_data_set(value):
    return isinstance(value, Sized) and hasattr(value, "__getitem__")


def anything(value):
    return True


def is_of_torch_compile(value):
    return value is True or (is_mapping(value) and all(map(is_text, value)))


def a(kind):
    return lambda value: isinstance(value, kind)


def is_callbacks(value):
    return isinstance(value, Callback) or (isinstance(value, Iterable) and not isinstance(value, (str, type)))


@dataclass
class P:
    """One parameter: a valid value (or what makes one), which others are, and the words that an error may name it by.

    also: what has to be passed with it. without: what must not. raises: errors beside ValueError and TypeError, which
    the documentation promises. code: the value is a function, whose errors are the user's own.
    """

    value: Any
    forms: tuple
    also: dict = field(default_factory=dict)
    without: tuple = ()
    says: tuple = ()
    raises: tuple = ()
    code: bool = False
    work: Any = None  # says of which junk it would take long to find out that it is valid

    def make(self):
        return self.value() if isinstance(self.value, New) else self.value


class New(partial):
    """A value that is made anew for each call."""


def flag(value=True, *forms, **options):
    return P(value, (is_flag, *forms), **options)


def count(value=2, *forms, **options):
    return P(value, (is_count, *forms), **options)


def number(value=0.5, *forms, **options):
    return P(value, (is_number, *forms), **options)


def rate(value=0.01, *forms, **options):
    return P(value, (is_rate, *forms), **options)


def text(value="a", *forms, **options):
    return P(value, (is_text, *forms), **options)


def path(value="file", **options):
    return P(value, (is_path,), raises=(OSError,), **options)


def function(value=_same, *forms, **options):
    return P(value, (is_function, *forms), code=True, **options)


class Ends(Callback):
    """Ends a fit that would take long."""

    def before_fit(self, state):
        self.left = 3

    def after_batch(self, state):
        self.left -= 1
        if self.left <= 0:
            raise CancelFit


def ends():
    return [Ends()]


FOLDERS = itertools.count()


def new_folder():
    """A run's folder that is not there yet."""
    return f"runs/{next(FOLDERS)}"


def best_run():
    """The folder of a run that holds a best checkpoint."""
    folder = new_folder()
    make_learner(valid=batches(1)).fit(0.01, callbacks=[minifast.Checkpoint(folder), minifast.SaveBest()])
    return folder


def is_auto(value):
    return isinstance(value, str) and value == "auto"


AX = P(New(lambda: minifast.show.plots.axes()), (none, lambda value: hasattr(value, "plot")))
CALLBACKS = P(New(ends), (is_callbacks,), says=("callback", "both"))
FIT = {"wd": number(0.1, none), "callbacks": CALLBACKS, "steps_per_epoch": count(1, none), "accumulate": count(),
       "effective_batch_size": count(8, none), "minutes": number(TICKING, none, also={"callbacks": New(ends)}),
       "resume": flag(False, is_path, raises=(OSError,)), "verbose": flag(False, none)}  # fmt: skip
DL = P(New(lambda: batches(1)), (none, is_iterable), says=(
    "data", "batch", "loader", "validation set", "validation sets", "inputs", "forward"))
MOMS = P((0.95, 0.85), (none, is_number, is_iterable))
STEPS = {"n_steps": count(7), "peak": number(0.1, none)}
MODULE = P(New(lambda: nn.Linear(3, 1)), (a(nn.Module),))


def found():
    """A result of the LR finder."""
    return make_learner(valid=batches(1)).lr_find(1e-4, 1.0, 20)


def images(callbacks=(), **options):
    """A convnet on images of three classes, for callbacks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(2, 3))
    x, y = torch.randn(12, 1, 6, 6), torch.arange(12) % 3
    data = DataLoaders(TensorLoader(x[:8], y[:8], batch_size=4), TensorLoader(x[8:], y[8:], batch_size=4))
    return Learner(model, data, nn.CrossEntropyLoss(), metrics=[accuracy], splitter={"body": "0.*", "head": ["1.*",
                   "5.*"]}, callbacks=callbacks, device="cpu", verbose=False, opt_func=torch.optim.AdamW, **options)


def averaged():
    """An EMA that has averaged."""
    ema = minifast.EMA(decay=0.5)
    make_learner().fit(0.01, callbacks=[ema])
    return ema


def ensemble():
    cb = minifast.SnapshotEnsemble(keep=2)
    make_learner().fit(0.01, 2, cycle_len=1, callbacks=[cb])
    return cb


def watched(name):
    def make():
        cb = getattr(minifast, name)()
        make_learner().fit(0.01, callbacks=[cb])
        return cb
    return make


def raced():
    return make_learner(valid=batches(1)).race([1e-3, 1e-2], 4)


def whole_set():
    return minifast.WholeSet(lambda y_true, y_pred, options=1: 0.5)


def run_file():
    make_learner().fit(0.01, callbacks=[RunLog("the run")])
    return "the run"


def exported():
    make_learner().export("exported", inputs=torch.zeros(2, 3))
    return "exported"


def saved():
    return str(make_learner().save("weights.pt"))


CURVE = {"lrs": P(New(lambda: np.geomspace(1e-5, 1, 30)), (anything,)),
         "losses": P(New(lambda: np.linspace(2, 1, 30) ** 2), (anything,))}  # fmt: skip
MONITOR = {"monitor": text("valid_loss", says=("watches",)), "mode": P("min", (none, a(str))), "min_delta": number(0.1)}

# What it is called by -> what each of its parameters takes. "x" are constructors and functions, "X.y" methods.
TABLE: dict[str, dict[str, P]] = {
    "Learner": {
        "model": MODULE, "dls": P(New(lambda: (batches(), None)), (a((DataLoaders, tuple)),),
                                  says=("data", "dls", "train", "valid", "batch")),
        "loss_func": function(nn.functional.mse_loss, none, says=("loss_func", "loss")),
        "opt_func": function(torch.optim.SGD), "lr": rate(), "splitter": function(None, none, is_mapping,
                                                                                 says=("layer group",)),
        "wd": number(0.1, none), "wd_norm_bias": flag(), "train_bn": flag(),
        "metrics": P(New(lambda: [minifast.rmse]), (is_iterable, is_function, lambda v: hasattr(v, "update")),
                     says=("metric",), code=True),
        "train_metrics": flag(), "callbacks": CALLBACKS,
        "device": P("cpu", (none, is_text, a(torch.device), is_count)),
        "seed": count(1, none), "compile": P(False, (is_flag, is_mapping), work=is_of_torch_compile),
        "unpack": function(minifast.split_batch), "verbose": flag(False)},
    "Learner.fit": {
        "lr": rate(), "n_cycle": count(also={"callbacks": New(ends)}), "cycle_len": count(1, none),
        "cycle_mult": count(also={"cycle_len": 1}), "use_clr": P((32, 5), (none, is_iterable), {"cycle_len": 1}),
        "use_clr_beta": P((10, 5), (none, is_iterable), {"cycle_len": 1}), **FIT},
    "Learner.fit_one_cycle": {
        "cycle_len": count(1), "max_lr": rate(0.01, none), "div_factor": number(), "pct_start": number(),
        "final_div": number(10, none), "moms": MOMS, 
        "cyc_len": count(1, none, without=("cycle_len",), says=("cycle_len",)),
        "lr_max": rate(0.01, none, without=("max_lr",)), **FIT},
    "Learner.fit_flat_cos": {"n_epoch": count(1), "lr": rate(0.01, none), "pct_start": number(), "div_final": number(),
                             **FIT},
    "Learner.fit_sgdr": {"n_cycles": count(1), "cycle_len": count(1), "lr_max": rate(0.01, none), "cycle_mult": count(),
                         **FIT},
    "Learner.fine_tune": {"epochs": count(1), "base_lr": number(0.01), "freeze_epochs": count(1), "lr_mult": number(2),
                          "pct_start": number(), "div": number(), **FIT},
    "Learner.lr_find": {"start_lr": rate(1e-4), "end_lr": rate(1.0), "num_it": count(3), "stop_div": flag(),
                        "repeats": count(also={"num_it": 3}), "callbacks": CALLBACKS},
    "Learner.race": {"lrs": P((1e-3, 1e-2), (is_iterable,)), "steps": count(1),
                     "schedule": P(New(lambda: OneCycle()), (none, a(minifast.Scheduler))), "callbacks": CALLBACKS},
    "Learner.sandbox": {"callbacks": CALLBACKS},
    "Learner.freeze_to": {"n": count(0)},
    "Learner.plan": {"n_epochs": count(), "schedule": P(New(lambda: OneCycle()), (none, a(minifast.Scheduler))),
                     "lr": rate(0.01, none), "steps_per_epoch": count(1, none), "accumulate": count()},
    "Learner.overfit": {"steps": count(), "lr": rate(0.01, none)},
    "Learner.trace": {"n": count(1), "callbacks": CALLBACKS, "accumulate": count()},
    "Learner.profile": {"n": count(1), "callbacks": CALLBACKS, "accumulate": count(), "ops": flag(False)},
    "Learner.validate": {"dl": DL},
    "Learner.get_preds": {"dl": DL, "with_loss": flag(False)},
    "Learner.predict": {"x": P(torch.zeros(2, 3), (anything,), says=("input", "forward"),
                               raises=(RuntimeError,))},  # the model's own
    "Learner.tta": {"dl": DL, "transform": function(also={}), "n": count(), "beta": number(), "use_max": flag()},
    "Learner.show_results": {
        "n": count(), "dl": P(New(lambda: images().dls.valid), DL.forms, says=DL.says),
        "figure": P(New(lambda: minifast.show.plots.axes().figure), (none, lambda value: hasattr(value, "subplots")))},
    "Learner.export": {"path": path("exported"),
                       "inputs": P(New(lambda: torch.zeros(2, 3)), (anything,), says=("inputs", "model"),
                                   raises=(NotImplementedError,)),  # torch's word for a tensor without values
                       "labels": P(["a"], (none, is_sequence)), "metadata": P({"a": 1}, (none, is_mapping))},
    "Learner.save": {"path": path()},
    "Learner.load": {"path": path(New(saved))},
    "Learner.load_best": {"path": path(New(best_run))},
    "Recorder.column": {"name": text("logged", raises=(KeyError,))},
    "Recorder.plot": {"skip_start": count(), "skip_end": count(), "suggestions": flag(), "ax": AX},
    "Recorder.plot_lr": {"show_moms": flag(), "ax": AX},
    "Recorder.plot_losses": {"ax": AX},
    "Recorder.plot_metrics": {"ax": AX},
    "Recorder.to_csv": {"path": path(), "epochs": flag()},
    "FitRecord.column": {"name": text("logged", raises=(KeyError,))},
    "FitRecord.mean_loss": {"start": count(0)},
    "FitRecord.plot_lr": {"show_moms": flag(), "ax": AX},
    "FitRecord.plot_losses": {"ax": AX},
    "FitRecord.plot_metrics": {"ax": AX},
    "FitRecord.to_csv": {"path": path(), "epochs": flag()},
    "LRFind.plot": {"skip_start": count(), "skip_end": count(), "suggestions": flag(), "ax": AX},
    "Race.plot": {"ax": AX},
    "Plan.plot": {"ax": AX},
    "Profile.share": {"what": text("forward", raises=(KeyError,))},
    "DataLoaders": {"train": P(New(batches), (is_iterable,), says=("training", "batch", "inputs")),
                    "valid": P(New(batches), (none, is_iterable), says=("validation", "batch", "inputs")),
                    "classes": P(["a", "b"], (none, is_sequence))},
    "TensorLoader": {"tensors": P(torch.ones(4, 2), (a(torch.Tensor),)), "batch_size": count(), "shuffle": flag(),
                     "transform": function(_same, none), "device": P("cpu", (none, is_text, a(torch.device), is_count)),
                     "drop_last": flag(False), "generator": P(New(torch.Generator), (none, a(torch.Generator)))},
    "TensorLoader.shard": {"rank": count(0), "world_size": count()},
    "DataLoaders.in_memory": {
        "train": P(([0.5, 1], [1.5, 0]), (is_data_set,), says=("sample",)),
        "valid": P([(0.5, 1), (1.5, 0)], (none, is_data_set, is_mapping), says=("sample",)), "batch_size": count(),
        "transform": function(_same, none), "valid_transform": function(_same, none, also={"valid": [(0.5, 1)]}),
        "device": P("cpu", (none, is_text, a(torch.device), is_count)), "drop_last": flag(False),
        "generator": P(New(torch.Generator), (none, a(torch.Generator))), "num_workers": count(0, none),
        "verbose": flag(False)},
    "DataLoaders.from_datasets": {
        "train": P([(0.5, 1), (1.5, 0)], (is_data_set,)),
        "valid": P([(0.5, 1), (1.5, 0)], (none, is_data_set, is_mapping)), "batch_size": count(),
        "num_workers": P(0, (none, is_count))},
    "digits": {"batch_size": count()},
    "split_batch": {"batch": P((1, 2), (anything,))},
    "Metrics": {"metrics": P(New(lambda: [accuracy]), (is_iterable, is_function), says=("metric",), code=True),
                "train": flag()},
    "Progress": {"title": text()},
    "Hook": {"module": MODULE, "function": function(), "backward": flag()},
    "Hooks": {"modules": P(New(lambda: [nn.Linear(3, 1)]), (is_iterable,), says=("modules", "module")),
              "function": function(), "backward": flag()},
    "hook_outputs": {"modules": P(New(lambda: [nn.Linear(3, 1)]), (is_iterable,), says=("modules", "module")),
                     "function": function(_same, none)},
    "WholeSet": {"function": function(lambda y_true, y_pred, options=1: 0.5), "pred": text("labels"),
                 "name": text("a", none), "options": P(1, (anything,))},
    "WholeSet.update": {"pred": P(torch.ones(2, 1), (a(torch.Tensor),), says=("output",)),
                        "target": P(torch.ones(2, 1), (a(torch.Tensor),))},
    "export_info": {"path": path(New(exported))},
    "load_exported": {"path": path(New(exported), also={"model": New(lambda: nn.Linear(3, 1))}),
                      "model": P(New(lambda: nn.Linear(3, 1)), (a(nn.Module),), says=("model",)),
                      "trusted": flag(False)},
    "read_run": {"path": path(New(run_file))},
    "plot_runs": {"runs": P(New(run_file), (is_path, is_iterable), raises=(OSError,)),
                  "metric": text("loss", none, says=("column",)), "ax": AX},
    "LRFinder": {"start_lr": rate(1e-4), "end_lr": rate(1.0), "num_it": count(), "stop_div": flag()},
    "Scheduler.values": STEPS,
    "Scheduler.table": {"n_epochs": count(), "steps_per_epoch": count(), "peak": number(0.1, none)},
    "Scheduler.plot": STEPS | {"ax": AX},
    "CircularLR": {"div": number(), "cut_div": number(2), "n_cycles": count(), "cycle_mult": count(), "moms": MOMS},
    "CircularLRBeta": {"div": number(), "pct": number(), "n_cycles": count(), "cycle_mult": count(), "moms": MOMS},
    "CosineAnnealing": {"n_cycles": count(), "cycle_mult": count(), "warmup_frac": number()},
    "ExponentialLR": {"start": number(), "end": number()},
    "LinearLR": {"start": number(), "end": number()},
    "PolynomialLR": {"start": number(), "end": number(), "power": number()},
    "FlatCos": {"pct_start": number(), "div_final": number()},
    "OneCycle": {"max_lr": rate(0.01, none), "div_factor": number(), "pct_start": number(),
                 "final_div": number(10, none), "moms": MOMS},
    "PiecewiseLR": {"pieces": P(((0.5, minifast.LinearLR()), (0.5, minifast.ConstantLR())), (is_iterable,))},
    "Schedule": {"shapes": P("lr", (is_text, is_mapping, a(tuple)), says=("shapes", "shape", "Schedule"), code=True),
                 "shape": function(schedules.cosine, none)},
    "ActivationStats": {"layers": P("*", (none, is_text, is_sequence)), "every": count(), "bins": count(4)},
    "ActivationStats.plot": {"stat": text("std"), "ax": AX},
    "ActivationStats.plot_hist": {"layer": P(0, (is_text, is_count)), "ax": AX},
    "AutoMicrobatch": {"size": count(4, none), "min_size": count(1)},
    "CSVLogger": {"path": path(), "append": flag(False)},
    "Checkpoint": {"path": path(New(new_folder)), "every_steps": count(2, none),
                   "every_seconds": number(60, none, is_auto), "keep": count()},
    "CutMix": {"alpha": number(), "num_classes": count(3, none), "mixup_alpha": number(0.5, none)},
    "MixUp": {"alpha": number(), "num_classes": count(3, none)},
    "ProgressiveResizing": {"initial_scale": number(), "finetune_fraction": number(), "delay_fraction": number(),
                            "size_increment": count()},
    "ProgressiveResizing.values": {"n_steps": count(7), "size": count(32)},
    "EMA": {"decay": number(0.5, none), "half_life": number(10, none, without=("decay",)), "in_validation": flag()},
    "WeightAverage.swapped": {"model": MODULE},
    "WeightAverage.copy_to": {"model": MODULE},
    "SWA": {"start": number(), "every": count(1, none), "apply": flag(), "in_validation": flag()},
    "EarlyStopping": MONITOR | {"patience": count()},
    "ReduceLROnPlateau": MONITOR | {"factor": number(), "patience": count(), "min_scale": number(),
                                    "cooldown": count()},
    "SaveBest": MONITOR | {"path": P("best.pt", (none, is_path), raises=(OSError,)), "restore": flag()},
    "FiniteLoss": {"strict": flag()},
    "GradientClip": {"norm": number(1.0, none), "value": number(1.0, none, without=("norm",))},
    "GradientStats": {"every": count()},
    "GradientStats.plot_grad_norms": {"ax": AX},
    "GradientStats.plot_update_ratios": {"ax": AX},
    "MixedPrecision": {"precision": text("bf16")},
    "RunLog": {"path": path(), "every_seconds": number()},
    "TensorBoardLogger": {"log_dir": path(), "every_seconds": number()},
    "WandbLogger": {"project": text("a", none), "name": text("a", none), "config": P({"a": 1}, (none, is_mapping)),
                    "id": text("a", none), "every_seconds": number()},
    "SnapshotEnsemble": {"keep": count(2, none)},
    "SnapshotEnsemble.averaged": {"learn": P(New(make_learner), (a(Learner),)), "norms": flag()},
    "SnapshotEnsemble.get_preds": {"learn": P(New(make_learner), (a(Learner),)), "dl": DL,
                                   "activation": function(_same, none)},
    "TimeLimit": {"minutes": number(TICKING)},
    "Unfreeze": {"parts": P({"body": 0.5}, (is_mapping,)), "train_bn": flag()},
    "Unfreeze.steps": {"n_steps": count(7)},
    "suggest.valley": CURVE, "suggest.steep": CURVE, "suggest.minimum": CURVE,
    "suggest.slide": CURVE | {"lr_diff": count(), "thresh": number(), "adjust_value": number()},
    "suggest.usable": CURVE | {"num_it": count(30)},
    "suggest.suggestions": CURVE | {"num_it": P(30, (anything,))},
    "suggest.largest_fall": {"losses": CURVE["losses"]}, "suggest.needed_fall": {"losses": CURVE["losses"]},
}  # fmt: skip

# Passed besides the parameter that is tried out and those without a default: to be quick, or to get anywhere.
ALSO = {
    "Learner": ("loss_func", "verbose"), "Learner.fit_one_cycle": ("cycle_len", "max_lr"),
    "Learner.fit_flat_cos": ("n_epoch",), "Learner.lr_find": ("start_lr", "end_lr", "num_it"),
    "Learner.race": ("steps",), "Learner.overfit": ("steps",), "Learner.trace": ("n",), "Learner.profile": ("n",),
    "Learner.tta": ("dl", "transform"), "Learner.export": ("inputs",), "TensorLoader": ("tensors",),
    "DataLoaders.in_memory": ("train", "verbose"), "DataLoaders.from_datasets": ("train",),
    "load_exported": ("model",), "Schedule": ("shape",), "EMA": ("decay",), "GradientClip": ("norm",),
    "SnapshotEnsemble.get_preds": ("dl",), "plot_runs": ("runs",), "suggest.slide": ("lr_diff",),
}  # fmt: skip

# Public, and not in the table, each for a reason.
RESULT = "minifast makes it: a record of what happened"
LOOP = "called by the loop, not by users"
LEFT_OUT = {
    **dict.fromkeys(["Finding", "FitRecord", "LRFind", "LayerGroup", "LayerGroups", "LoggedFit", "Moment", "Plan",
                     "Profile", "Race", "Report", "Run", "Summary", "Trace"], RESULT),
    "State": "the loop makes it", "Order": "an enumeration",
    "CancelBatch": "an exception", "CancelEpoch": "an exception", "CancelFit": "an exception",
    **dict.fromkeys([f"{name}.value" for name in (
        "Scheduler", "CircularLR", "CircularLRBeta", "ConstantLR", "CosineAnnealing", "ExponentialLR", "FlatCos",
        "LinearLR", "OneCycle", "PiecewiseLR", "PolynomialLR", "Schedule")], "called in every step"),
    **dict.fromkeys([f"{name}.{method}" for method in ("cycle_ends", "check_steps") for name in (
        "Scheduler", "CircularLR", "CircularLRBeta", "CosineAnnealing", "PiecewiseLR")], LOOP),
    **dict.fromkeys([f"schedules.{name}" for name, member in vars(schedules).items() if inspect.isfunction(member)],
                    "called in every step; the schedules check their arguments when they are made"),
    **dict.fromkeys(["accuracy", "error_rate", "rmse", "top_k_accuracy"], "called with every batch"),
    **dict.fromkeys(["Callback.evaluating", "WeightAverage.evaluating", "MixedPrecision.evaluating",
                     "SaveBest.evaluating"], LOOP),
    **dict.fromkeys(["EarlyStopping.judge", "ReduceLROnPlateau.judge", "SaveBest.judge", "Monitor.keep_best"], LOOP),
    **dict.fromkeys([f"{name}.{method}" for name in (
        "Logger", "CSVLogger", "RunLog", "TensorBoardLogger", "WandbLogger") for method in (
        "open", "close", "write_settings", "write_steps", "write_epoch")], LOOP),
    "FitRecord.log": "called in every step", "ProgressiveResizing.scale": "called with every batch",
    **dict.fromkeys(["Checkpoint.begin", "Checkpoint.finish", "Checkpoint.take_up", "FiniteLoss.check",
                     "FiniteLoss.check_gradient", "TensorLoader.iter_from"], LOOP),
    "Metrics.names": LOOP, "_Service.by_step": LOOP, "_Service.of_epoch": LOOP, "LRFinder.ramps": LOOP,
    "Progress.say": LOOP, "Learner.eval_mode": "what its methods and the studies share",
    "Learner.eval_data": "what its methods and the studies share",
}  # fmt: skip
BY_STATE = "load_state_dict"  # of whatever class: takes what its state_dict gave, out of a file that was checked


def members():
    """Every public callable by its name in the table: constructors, functions, methods with arguments."""
    for name in minifast.__all__:
        thing = getattr(minifast, name)
        if inspect.ismodule(thing):
            yield from ((f"{name}.{key}", member) for key, member in vars(thing).items()
                        if inspect.isfunction(member) and member.__module__.startswith(thing.__name__)
                        and key[0] != "_")
        elif callable(thing):
            yield name, thing
        if inspect.isclass(thing):
            for key in dir(thing):
                member = inspect.getattr_static(thing, key)
                member = member.__get__(None, thing) if isinstance(member, classmethod) else member
                if isinstance(member, (FunctionType, MethodType)) and key not in EVENTS and not key.startswith("_"):
                    module = member.__module__.startswith("minifast")
                    if module and len(inspect.signature(member).parameters) > 1 and key != BY_STATE:
                        owner, _, method = inspect.unwrap(member).__qualname__.partition(".")
                        yield f"{'Learner' if owner in ('Parts', 'Trainer') else owner}.{method}", member


def parameters(thing):
    """The parameters that users pass, those of **options by their own names."""
    try:
        named = dict(inspect.signature(thing).parameters)
    except ValueError:  # exceptions
        return {}
    named.pop("self", None)
    if named.pop("options", None) is not None and "FitOptions" in str(inspect.signature(thing)):
        named |= dict.fromkeys(FitOptions.__annotations__, inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY,
                                                                            default=None))
    elif thing is minifast.WholeSet:
        named["options"] = inspect.Parameter("options", inspect.Parameter.KEYWORD_ONLY, default=None)
    return named


PUBLIC = dict(members())


def test_the_table_is_complete():
    """A new public callable, or a new parameter of one, is to be added to TABLE (or, with a reason, to LEFT_OUT)."""
    without = {name for name in PUBLIC if not parameters(PUBLIC[name])}
    assert set(PUBLIC) - set(TABLE) - set(LEFT_OUT) - without == set()
    assert set(TABLE) <= set(PUBLIC)
    assert set(TABLE).isdisjoint(LEFT_OUT)
    for name, entry in TABLE.items():
        assert set(entry) == set(parameters(PUBLIC[name])), name


# ---- calling

OWNERS = {
    "Learner.show_results": images,
    "Learner": lambda: make_learner(valid=batches(1), metrics=[minifast.rmse]),
    "Recorder": lambda: a_record().recorder, "FitRecord": lambda: a_record().recorder.newest, "LRFind": found,
    "Race": raced, "Plan": lambda: make_learner().plan(2), "Profile": lambda: make_learner().profile(2),
    "Metrics": minifast.Metrics, "WholeSet": whole_set, "Scheduler": lambda: OneCycle(0.1),
    "ActivationStats": watched("ActivationStats"), "GradientStats": watched("GradientStats"),
    "ProgressiveResizing": minifast.ProgressiveResizing, "WeightAverage": averaged, "SnapshotEnsemble": ensemble,
    "Unfreeze": lambda: minifast.Unfreeze({"model": 0.5}),
    "TensorLoader": lambda: TensorLoader(torch.ones(4, 2)), "DataLoaders": lambda: DataLoaders,
}


def a_record():
    """A learner whose Recorder has something of everything."""
    learn = make_learner(valid=batches(1), metrics=[minifast.rmse])
    learn.fit(0.01, callbacks=[At("after_step", lambda state: state.record.log("logged", 1.0))])
    learn.lr_find(1e-4, 1.0, 20)
    return learn


def call(owner, name, arguments):
    """Call it, and use what it gave."""
    arguments = dict(arguments)
    thing = PUBLIC[name] if owner is None else getattr(owner, name.partition(".")[2])
    if name == "DataLoaders.from_datasets":
        return thing(**arguments)  # what a sample may be is between torch's collate and the data set
    if name == "DataLoaders.in_memory":
        dls = thing(**arguments)
        return [list(loader) for loader in (dls.train, *(loader for _, loader in valid_sets(dls.valid)))]
    if name == "TensorLoader":
        tensors = arguments.pop("tensors")
        return list(thing(tensors, **arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of schedules for few steps
        return use(thing(**arguments))


def use(result):
    """What was constructed must work: a short fit, a pass over it."""
    if isinstance(result, Learner):
        result.fit(0.01, callbacks=ends())
    elif isinstance(result, DataLoaders) and len(list(result.train)) < 100:
        learn = make_learner(result.train, result.valid)
        learn.fit(0.01, callbacks=ends())
    elif isinstance(result, minifast.Scheduler):
        result.values(7)
        repr(result)
        images().fit(0.01, callbacks=[result])
    elif isinstance(result, minifast.LRFinder):
        make_learner().fit(0.01, callbacks=[result])
    elif isinstance(result, (minifast.Metrics, minifast.Recorder)):
        pass
    elif isinstance(result, Callback):
        repr(result)
        images().fit(0.01, callbacks=[result, *ends()])
    elif isinstance(result, minifast.WholeSet):
        repr(result)
        result.update(torch.ones(2, 1), torch.ones(2, 1))
        result.compute()
    elif isinstance(result, (contextlib.AbstractContextManager, minifast.Hook, minifast.Hooks)):
        with result:
            pass
    return result


def with_others(name, param, value):
    """The arguments of one call: `value` for `param`, valid ones for those that are needed."""
    entry, known = TABLE[name], parameters(PUBLIC[name])
    wanted = entry[param]
    empty = inspect.Parameter.empty
    others = {key for key, parameter in known.items() if parameter.default is empty} | set(ALSO.get(name, ()))
    arguments = {key: entry[key].make() for key in entry if key in others and key not in wanted.without}
    also = {key: other() if isinstance(other, New) else other for key, other in wanted.also.items()}
    if "minutes" in entry and param not in ("callbacks", "minutes"):
        also.setdefault("callbacks", ends())
    return arguments | also | {param: value}


PARAMETERS = [(name, param) for name, entry in TABLE.items() for param in entry]
each = pytest.mark.parametrize(("name", "param"), PARAMETERS, ids=[f"{name}-{param}" for name, param in PARAMETERS])


@pytest.fixture
def folder(tmp_path, monkeypatch, wandb):
    monkeypatch.chdir(tmp_path)


def owner_of(name):
    if "." not in name or name.startswith("suggest"):
        return None
    return OWNERS[name if name in OWNERS else name.partition(".")[0]]()


@pytest.mark.table
@each
def test_the_table_holds_what_works(name, param, folder):
    call(owner_of(name), name, with_others(name, param, TABLE[name][param].make()))


def inside(value):
    """`value` and what it holds."""
    yield value
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from inside(inner)
    elif isinstance(value, dict):
        for pair in value.items():
            yield from inside(pair)
    elif isinstance(value, (set, frozenset)):
        yield from value
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    elif isinstance(value, (bytes, bytearray, memoryview, str, range)):
        yield from value
    elif getattr(value, "ndim", 0) and not isinstance(value, type):
        with contextlib.suppress(TypeError, NotImplementedError):  # a sparse tensor
            for inner in value:
                yield from inside(inner)


def shows(value, words):
    """Whether an error's words show `value`, a part of it, its type, length or shape."""
    if value is None or isinstance(value, Iterator):  # what says nothing, and what is used up when it is looked at
        return True
    for part in inside(value):
        texts = [str(part)] if is_text(part) and part else []
        texts += [_repr(part)[:15], type(part).__name__, *([part.__name__] if isinstance(part, type) else [])]
        if isinstance(part, Sized) and getattr(part, "ndim", 1) and not isinstance(part, type):
            n = len(part)
            texts += [f"({n},)", "have shape"]
            texts += [f"got {n}", f"holds {n}"] if n else ["none", "0", "empty", "no ", "with ()"]
        if is_number(part):
            texts.append(f"{float(part):g}")
        if hasattr(part, "shape"):
            texts.append(str(tuple(part.shape)))
        if any(text in words for text in texts):
            return True
    return False


def complaint(param, known, value, error):
    """What is wrong with how `value` was refused, or ''."""
    words = "\n".join([str(error), *getattr(error, "__notes__", ())])
    if known.code and any(map(callable, inside(value))):
        return ""  # the user's own code
    if isinstance(error, known.raises):
        return ""
    if "forward" in known.says and ".forward() " in words:
        return ""  # the model's own: a batch of other parts than it takes
    if not isinstance(error, (ValueError, TypeError)):
        return f"a {type(error).__name__}"
    if not any(re.search(rf"\b{re.escape(says)}\b", words) for says in (param, *known.says)) and not (
            is_path(value) and str(value) in words):
        return "it does not name the parameter"
    return "" if shows(value, words) else "it does not show the value"


def _repr(value):
    try:
        return repr(value)
    except ValueError:  # an int of more than 4,300 digits
        return type(value).__name__


def check(name, param, value, owner):
    """Call with `value`; gives whether it was taken. Fails if neither that nor the refusal is as it should be."""
    known = TABLE[name][param]
    learn = owner if isinstance(owner, Learner) else None
    arguments = with_others(name, param, value)
    before = None if learn is None else everything(learn)
    try:
        call(owner, name, arguments)
    except minifast.NonFiniteLoss:  # a rate so high that training explodes: it was taken
        refused = None
    except Exception as error:
        wrong = complaint(param, known, value, error)
        if wrong:
            raise AssertionError(f"{wrong}: {type(error).__name__}: {error}") from error
        refused = error
    else:
        refused = None
    if refused is not None:
        assert learn is None or everything(learn) == before, f"refused, and yet something changed: {refused}"
        return False
    assert any(form(value) for form in known.forms), "taken, although it is no documented form"
    return True


@pytest.mark.nightly
@pytest.mark.case("A1", "A2", "A3", "A4", "A5", "A6", "A7", "A9", "A10", "A11", "A12", "A13", "A15")
@each
def test_junk(name, param, folder):
    """It works, or it is refused by an error that helps, and then nothing has happened."""
    owner, known = [owner_of(name)], TABLE[name][param]

    def try_out(value):
        if known.work is not None and known.work(value):
            return
        if check(name, param, value, owner[0]):
            owner[0] = owner_of(name)

    @seed(zlib.crc32(f"{name}-{param}".encode()))  # or every parameter would see the same junk
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(JUNK)
    def run(value):
        try_out(value)

    for make in ONCE_TROUBLE:
        try_out(make())
    run()
    if isinstance(owner[0], Learner):
        owner[0].fit(0.01)


# ---- in any order

class Life(RuleBasedStateMachine):
    """What a learner may be put through in any order; after each step it is as tidy as it was at first."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.learn = images(callbacks=[minifast.EMA(decay=0.9)])
        self.tidy = self.traces()

    def teardown(self):
        self.folder.cleanup()

    def traces(self):
        """All that nothing may leave behind."""
        modules = list(self.learn.model.modules())
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return {"handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
                "hooks": [len(getattr(module, kind)) for module in modules for kind in kinds],
                "modes": [module.training for module in modules],
                "callbacks": list(map(id, self.learn.callbacks)), "metrics": list(map(id, self.learn.metrics)),
                "identity": list(map(id, self.learn.model.parameters())),
                "gradients": [p.grad for p in self.learn.model.parameters()],
                "fitting": self.learn.is_fitting, "threads": threading.active_count(),
                "files": sorted(name for name in os.listdir(self.folder.name) if not name.startswith("w"))}

    def undone(self, action):
        """`action` changes nothing."""
        before = everything(self.learn)
        action()
        assert everything(self.learn) == before

    @rule(lr=st.sampled_from([1e-3, slice(1e-4, 1e-2)]), n=st.integers(1, 2), accumulate=st.integers(1, 3))
    def fit(self, lr, n, accumulate):
        steps = len(self.learn.recorder.fits)
        self.learn.fit(lr, n, accumulate=accumulate)
        assert len(self.learn.recorder.epochs) == n
        assert len(self.learn.recorder.fits) in (steps, steps + 1)

    @rule(moms=st.sampled_from([None, (0.95, 0.85)]))
    def fit_one_cycle(self, moms):
        self.learn.fit_one_cycle(1, 1e-3, moms=moms)

    @rule(event=st.sampled_from(["before_epoch", "after_loss", "before_step", "after_valid_batch"]),
          kind=st.sampled_from([CancelFit, minifast.CancelEpoch]))
    def cancel(self, event, kind):
        self.learn.fit(1e-3, 2, callbacks=[At(event, throw(kind), 1)])

    @rule(event=st.sampled_from(sorted(EVENTS)))
    def fail(self, event):
        with pytest.raises(ZeroDivisionError):
            self.learn.fit(1e-3, 2, callbacks=[At(event, throw(ZeroDivisionError), 0)])

    @rule(value=JUNK)
    def refused(self, value):
        assume(not is_rate(value))
        with pytest.raises((ValueError, TypeError)):
            self.learn.fit(value)

    @rule()
    def lr_find(self):
        found = self.learn.recorder.lr_find
        before = everything(self.learn)
        self.learn.lr_find(1e-4, 1.0, 4)
        assert self.learn.recorder.lr_find is not found
        assert everything(self.learn) == before

    @rule(fails=st.booleans())
    def sandbox(self, fails):
        def block():
            with contextlib.suppress(ZeroDivisionError), self.learn.sandbox():
                self.learn.freeze()
                self.learn.fit(0.5)
                if fails:
                    raise ZeroDivisionError

        self.undone(block)

    @rule(n=st.integers(-2, 1))
    def freeze(self, n):
        self.learn.freeze_to(n)
        head = list(self.learn.groups)[-1]
        assert not head.is_frozen

    @rule()
    def unfreeze(self):
        self.learn.unfreeze()
        assert all(p.requires_grad for p in self.learn.model.parameters())

    @rule()
    def look(self):
        def looks():
            self.learn.predict(torch.zeros(2, 1, 6, 6))
            self.learn.validate()
            self.learn.get_preds()

        self.undone(looks)

    @rule()
    def save_and_load(self):
        """Another learner that loads the weights has their bits; so has this one after it has trained on."""
        path = self.learn.save(Path(self.folder.name) / "w.pt")
        saved = bits(dict(self.learn.model.state_dict()))
        other = images()
        other.load(path)
        assert bits(dict(other.model.state_dict())) == saved
        self.learn.fit(1e-2)
        self.learn.load(path)
        assert bits(dict(self.learn.model.state_dict())) == saved

    @invariant()
    def is_tidy(self):
        assert self.traces() == self.tidy
        assert all(torch.isfinite(p).all() for p in self.learn.model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of epochs that were cut short
def test_any_order():
    run_state_machine_as_test(Life, settings=settings(max_examples=200 if FULL else 20, stateful_step_count=15,
                                                      suppress_health_check=list(HealthCheck)))
