"""What gathers one metric over a pass: the mean of a function's batch values, or an object with update and compute."""
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base import snapshot
from ..base.losses import Weight
from ..base.nest import to_device
from ..record.scalars import ScalarColumn


class MeanOf:
    """A metric that is a function of a mean over all samples: `finish(mean of each(pred, target))`."""

    def __init__(self, name: str, each: Callable[[Tensor, Tensor], Tensor], finish: Callable[[float], float]) -> None:
        self.__name__, self.each, self.finish = name, each, finish

    def __call__(self, pred: Tensor, target: Tensor) -> float:
        return self.finish(float(self.each(pred, target)))


class MeanMeter:
    """The mean of a function's batch values, weighted by samples; with function None, of the loss by its weight."""

    def __init__(self, name: str, function: Any = None) -> None:
        self.name, self.columns = name, (name,)
        self.function = function.each if isinstance(function, MeanOf) else function
        self.finish = function.finish if isinstance(function, MeanOf) else float

    def reset(self, device: torch.device) -> None:
        self.values, self.weights = ScalarColumn(), ScalarColumn()

    def update(self, pred: Any, target: Any, n_samples: int) -> None:
        self.add(self.function(pred, target), n_samples)

    def add(self, value: Any, weight: Weight) -> None:
        """Take in one value, the mean over `weight` samples."""
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        if value.numel() != 1:
            raise ValueError(f"{self.name} must return one number per batch, got shape {tuple(value.shape)}. "
                             "Did you forget .mean()?")
        self.values.append(value.reshape(()))
        self.weights.append(weight)

    def compute(self) -> dict[str, float]:
        weights = self.weights.read()
        mean = float(np.average(self.values.read(), weights=weights)) if weights.any() else None
        return {self.name: math.nan if mean is None else self.finish(mean)}

    def state_dict(self) -> dict[str, Any]:
        return {"values": torch.from_numpy(self.values.read()), "weights": torch.from_numpy(self.weights.read())}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.values, self.weights = ScalarColumn(saved["values"].tolist()), ScalarColumn(saved["weights"].tolist())


class ObjectMeter:
    """A metric object behind the same methods."""

    def __init__(self, name: str, metric: Any) -> None:
        self.name, self.metric = name, metric

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it will give: a collection's keys, its attribute `names`, else its own name."""
        if hasattr(self.metric, "keys"):
            return tuple(map(str, self.metric.keys()))
        names = getattr(self.metric, "names", None)
        return tuple(map(str, names)) if isinstance(names, (list, tuple)) else (self.name,)

    def reset(self, device: torch.device) -> None:
        self.device = device
        if hasattr(self.metric, "to"):
            self.metric = self.metric.to(device)
        self.metric.reset()

    def update(self, pred: Any, target: Any, n_samples: int) -> None:
        self.metric.update(pred, target)

    def compute(self) -> dict[str, float]:
        value = self.metric.compute()
        parts = value if isinstance(value, Mapping) else {self.columns[0]: value}
        for name, part in parts.items():
            if math.prod(getattr(part, "shape", ())) != 1:
                raise ValueError(f"{name} must give one number, got shape {tuple(part.shape)}. Let it average (in "
                                 "torchmetrics average='macro'), or give a dict of numbers by name.")
        return {str(name): float(part) for name, part in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        return _gathered(self.metric)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        _take_up(self.metric, to_device(snapshot.clone(saved), self.device))


Meter = MeanMeter | ObjectMeter


def make_meter(metric: Any) -> Meter:
    """What gathers `metric`, under its name."""
    return (ObjectMeter if is_object(metric) else MeanMeter)(metric_name(metric), metric)


def metric_name(metric: Any) -> str:
    """The key of a metric: its `__name__`, of a partial its function's, of an object its class name in snake case.

    Raises TypeError for what is neither a function nor an object with update, compute and reset.

    >>> metric_name(torch.nn.functional.l1_loss), metric_name(torch.nn.L1Loss())
    ('l1_loss', 'l1_loss')
    """
    if isinstance(metric, type):
        raise TypeError(f"{metric.__name__} is a class: pass an instance, {metric.__name__}(...).")
    if not (is_object(metric) or callable(metric)):
        raise TypeError(f"a metric must be a function (pred, target) -> number, or an object with update, compute and "
                        f"reset, got {metric!r:.80}.")
    own = getattr(metric, "__name__", None)
    inner = metric.func if isinstance(metric, partial) else metric
    return str(own or getattr(inner, "__name__", None) or snake_case(type(inner).__name__))


def is_object(metric: Any) -> bool:
    """Whether a metric gathers its batches by itself."""
    return all(hasattr(metric, name) for name in ("update", "compute", "reset"))


def snake_case(name: str) -> str:
    """
    >>> snake_case("MSEPerPixel"), snake_case("BinaryAUROC")
    ('mse_per_pixel', 'binary_auroc')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@contextmanager
def named(metric: str) -> Iterator[None]:
    """Errors gain a note that names the metric."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the metric {metric}")
        raise


def _gathered(metric: Any) -> dict[str, Any]:
    """What a metric object holds, as far as it is plain values; of a collection, that of its members."""
    if hasattr(metric, "items"):
        return {str(name): _gathered(member) for name, member in metric.items()}
    # torchmetrics: its registered states, and the count without which it warns that it has seen nothing
    names = [*metric.metric_state, "_update_count"] if hasattr(metric, "metric_state") else list(vars(metric))
    return {name: snapshot.clone(getattr(metric, name)) for name in names if _is_plain(getattr(metric, name))}


def _take_up(metric: Any, saved: dict[str, Any]) -> None:
    if hasattr(metric, "items"):
        for name, member in metric.items():
            _take_up(member, saved[str(name)])
    else:
        for name, value in saved.items():
            setattr(metric, name, value)


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(isinstance(key, (str, int)) and _is_plain(inner) for key, inner in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))
