"""Metrics: functions of (pred, target) and objects with update, compute and reset, over the validation data."""
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import scores
from .callback import Callback, Order
from .scalars import ScalarColumn
from .state import State

OTHER_COLUMNS = ("epoch", "train_loss", "time")  # of an epoch row, beside the validation loss and the metrics


def accuracy(pred: Tensor, target: Tensor) -> Tensor:
    """Share of predictions whose highest score is the target's class, 0..1.

    pred: (n, classes, ...) scores, target: (n, ...) class indices; (n, ..., classes) with (n, ...) is understood too.
    Raises ValueError for other shapes.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    return (pred.argmax(_class_dim(pred, target)) == target).float().mean()


def error_rate(pred: Tensor, target: Tensor) -> Tensor:
    """1 - accuracy.

    >>> error_rate(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    return 1 - accuracy(pred, target)


def top_k_accuracy(pred: Tensor, target: Tensor, k: int = 5) -> Tensor:
    """Share of targets that are among the k highest scores, 0..1; shapes as in `accuracy`, k at most the classes.

    >>> top_k_accuracy(torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]), torch.tensor([2, 1]), k=2)
    tensor(0.5000)
    """
    dim = _class_dim(pred, target)
    if not (isinstance(k, int) and 1 <= k <= pred.shape[dim]):
        raise ValueError(f"k must be 1..{pred.shape[dim]}, the number of classes, got {k}. "
                         "Pass functools.partial(top_k_accuracy, k=...).")
    return (pred.topk(k, dim).indices == target.unsqueeze(dim)).any(dim).float().mean()


class MeanOf:
    """A metric that is a function of a mean over all samples: `finish(mean of each(pred, target))`."""

    def __init__(self, name: str, each: Callable[[Tensor, Tensor], Tensor], finish: Callable[[float], float]) -> None:
        self.__name__, self.each, self.finish = name, each, finish

    def __call__(self, pred: Tensor, target: Tensor) -> float:
        return self.finish(float(self.each(pred, target)))


def _mse(pred: Tensor, target: Tensor) -> Tensor:
    if pred.shape != target.shape:
        raise ValueError(f"rmse needs a prediction and a target of one shape, got {tuple(pred.shape)} and "
                         f"{tuple(target.shape)}.")
    return (pred.float() - target.float()).square().mean()


rmse = MeanOf("rmse", _mse, math.sqrt)  # root mean squared error, over all samples and not the mean of batches' roots


class Metrics(Callback):
    """Accumulates the validation loss and `metrics` on the device and reads them once per epoch.

    A function's batch values are averaged by samples. An object's `update(pred, target)` sees each batch and its
    `compute()` gives the number, or a dict of numbers by name: the torchmetrics protocol.
    """

    order = Order.SETUP  # first: in `after_validate` the row is complete for all others

    def __init__(self, metrics: Iterable[Any] = (), *, train: bool = False) -> None:
        self._meters: dict[str, _Meter | _Adapter] = {"valid_loss": _Meter("valid_loss", None)}
        for metric in metrics:
            name = metric_name(metric)
            if name in self._meters or name in OTHER_COLUMNS:
                raise ValueError(f"two columns of the epoch table would be called {name!r}. Give one metric another "
                                 "__name__.")
            self._meters[name] = _Adapter(name, metric) if _is_object(metric) else _Meter(name, metric)

    def names(self, sets: Iterable[str]) -> tuple[str, ...]:
        """The keys of a complete epoch row, for validation sets of these names."""
        return ("epoch", "train_loss", *(f"{name}_{key}" if name else key for name in sets for key in self._meters),
                "time")

    def before_validate(self, state: State) -> None:
        for meter in self._meters.values():
            meter.reset(state.device)

    def after_valid_batch(self, state: State) -> None:
        pred = scores(state.pred)
        for name, meter in self._meters.items():
            with _named(name):
                meter.update(state.loss, pred, state.target, state.n_samples)

    def after_validate(self, state: State) -> None:
        row: dict[str, float] = {}
        for name, meter in self._meters.items():
            with _named(name):
                columns = meter.compute()
                twice = sorted(columns.keys() & {*row, *OTHER_COLUMNS})
                if twice:
                    raise ValueError(f"two columns of the epoch table would be called {', '.join(twice)}. Rename one, "
                                     "e.g. by MetricCollection(..., prefix='my_').")
            row |= columns
        state.metrics |= row


def metric_name(metric: Any) -> str:
    """The key of a metric: its `__name__`, of a partial its function's, of an object its class name in snake case.

    Raises TypeError for what is neither a function nor an object with update, compute and reset.

    >>> metric_name(accuracy), metric_name(partial(top_k_accuracy, k=3)), metric_name(rmse)
    ('accuracy', 'top_k_accuracy', 'rmse')
    """
    if isinstance(metric, type):
        raise TypeError(f"{metric.__name__} is a class: pass an instance, {metric.__name__}(...).")
    if not (_is_object(metric) or callable(metric)):
        raise TypeError(f"a metric must be a function (pred, target) -> number, or an object with update, compute and "
                        f"reset, got {metric!r:.80}.")
    own = getattr(metric, "__name__", None)
    named = metric.func if isinstance(metric, partial) else metric
    return str(own or getattr(named, "__name__", None) or _snake_case(type(named).__name__))


def _is_object(metric: Any) -> bool:
    return all(hasattr(metric, name) for name in ("update", "compute", "reset"))


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@contextmanager
def _named(metric: str) -> Iterator[None]:
    """Errors gain a note that names the metric."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the metric {metric}")
        raise


class _Meter:
    """The sample-weighted mean of a function's batch values, or of the loss."""

    def __init__(self, name: str, function: Callable[[Any, Any], Any] | None) -> None:
        self.name = name
        self.function = function.each if isinstance(function, MeanOf) else function
        self.finish = function.finish if isinstance(function, MeanOf) else float

    def reset(self, device: torch.device) -> None:
        self.values, self.weights = ScalarColumn(), array("q")

    def update(self, loss: Tensor, pred: Any, target: Any, n_samples: int) -> None:
        value = loss if self.function is None else self.function(pred, target)
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        if value.numel() != 1:
            raise ValueError(f"{self.name} must return one number per batch, got shape {tuple(value.shape)}. "
                             "Did you forget .mean()?")
        self.values.append(value.reshape(()))
        self.weights.append(n_samples)

    def compute(self) -> dict[str, float]:
        if not any(self.weights):
            return {self.name: math.nan}
        return {self.name: self.finish(float(np.average(self.values.read(), weights=self.weights)))}


class _Adapter:
    """A metric object behind the same four methods."""

    def __init__(self, name: str, metric: Any) -> None:
        self.name, self.metric = name, metric

    def reset(self, device: torch.device) -> None:
        if hasattr(self.metric, "to"):
            self.metric = self.metric.to(device)
        self.metric.reset()

    def update(self, loss: Tensor, pred: Any, target: Any, n_samples: int) -> None:
        self.metric.update(pred, target)

    def compute(self) -> dict[str, float]:
        value = self.metric.compute()
        parts = value if isinstance(value, Mapping) else {self.name: value}
        return {str(name): float(part) for name, part in parts.items()}


def _class_dim(pred: Tensor, target: Tensor) -> int:
    if pred.ndim == target.ndim + 1:
        if pred.shape[:1] + pred.shape[2:] == target.shape:
            return 1
        if pred.shape[:-1] == target.shape:
            return pred.ndim - 1
    raise ValueError(f"scores of shape {tuple(pred.shape)} do not fit targets of shape {tuple(target.shape)}: wanted "
                     "(n, classes) and (n,). For one output per sample pass a function of your own, e.g. "
                     "lambda pred, target: ((pred > 0) == target).float().mean().")
