"""Metrics: functions of (pred, target) and objects with update, compute and reset, over the data of an epoch."""
import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..base.batch import scores
from ..base.nest import map_tensors
from ..core.callback import Callback, Order
from ..core.state import State
from ..errors import check_flag, check_items, check_text
from .meters import MeanMeter, MeanOf, Meter, is_object, make_meter, named


def accuracy(pred: Tensor, target: Tensor) -> Tensor:
    """Share of predictions whose highest score is the target's class, 0..1.

    pred: (n, classes, ...) or (n, ..., classes) scores, target: (n, ...) class indices, or probabilities of the scores'
    shape, as mixup makes them: their class is the most probable one. Raises ValueError for other shapes.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    dim, labels = _classes(pred, target)
    return (pred.argmax(dim) == labels).float().mean()


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
    dim, labels = _classes(pred, target)
    if not (isinstance(k, int) and 1 <= k <= pred.shape[dim]):
        raise ValueError(f"k must be 1..{pred.shape[dim]}, the number of classes, got {k}. "
                         "Pass functools.partial(top_k_accuracy, k=...).")
    return (pred.topk(k, dim).indices == labels.unsqueeze(dim)).any(dim).float().mean()


def _mse(pred: Tensor, target: Tensor) -> Tensor:
    if pred.shape != target.shape:
        raise ValueError(f"rmse needs a prediction and a target of one shape, got {tuple(pred.shape)} and "
                         f"{tuple(target.shape)}.")
    return (pred.float() - target.float()).square().mean()


rmse = MeanOf("rmse", _mse, math.sqrt)  # root mean squared error, over all samples and not the mean of batches' roots


class Metrics(Callback):
    """Accumulates the validation loss and `metrics` on the device and reads them once per epoch.

    A function's batch values are averaged by samples, the loss by what it is the mean over. An object's
    `update(pred, target)` sees each batch and its `compute()` gives the number, or a dict of numbers by name: the
    torchmetrics protocol. Columns must be known before the fit: of a dict they are the object's keys, if it has
    `keys()`, or its attribute `names`.

    Of several validation sets each has columns of its own, e.g. `noisy_valid_loss`, `noisy_accuracy`. train: also
    compute the metrics over the training data, as `train_accuracy` etc., from what the model puts out while it trains
    (weights that move, dropout, augmented inputs), every batch whose gradient is taken; metric objects are copied.
    """

    order = Order.SETUP  # first: in `after_validate` the row is complete for all others

    def __init__(self, metrics: Iterable[Any] = (), *, train: bool = False) -> None:
        metrics = check_items("metrics", metrics, "a list of metrics", example="metrics=[accuracy]")
        train = check_flag("train", train)
        self._loss = MeanMeter("valid_loss")
        self._valid = [make_meter(metric) for metric in metrics]
        self._scored: list[Meter] = [self._loss, *self._valid]
        self._train = [make_meter(copy.deepcopy(metric) if is_object(metric) else metric)
                       for metric in (metrics if train else [])]
        self._n_trained = 0  # training batches seen in this epoch
        self._parts: list[tuple[Any, Any, int]] = []  # (pred, target, samples) of the batch under way
        self._row: dict[str, float] = {}  # of the validation sets that were looked at so far
        self._set: str | None = None  # the one that is looked at
        self.names([""])

    def names(self, sets: Iterable[str]) -> tuple[str, ...]:
        """The keys of a complete epoch row, for validation sets of these names. Raises ValueError if two are one."""
        sets = [check_text("sets", name) for name in check_items("sets", sets, "a list of names")]
        names = ("epoch", "train_loss", *(f"train_{column}" for meter in self._train for column in meter.columns),
                 *(_prefix(name) + column for name in sets for meter in self._scored for column in meter.columns),
                 "time")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two columns of the epoch table would be called {twice!r}. Give one metric another "
                             "__name__, or one validation set another name.")
        return names

    def before_fit(self, state: State) -> None:
        names = dict.fromkeys([*state.record.row_names, *self.names(name for name, _ in state.valid_sets)])
        state.record.row_names = (*(name for name in names if name != "time"), "time")
        self._reset(self._train, state)

    def before_epoch(self, state: State) -> None:
        self._n_trained, self._parts = 0, []
        self._reset(self._train, state)

    def after_backward(self, state: State) -> None:
        if self._train:
            self._parts.append((map_tensors(Tensor.detach, scores(state.pred)), state.target, state.n_samples))

    def after_batch(self, state: State) -> None:
        """Take in the newest parts that make up the batch: older ones are of an attempt that ran out of memory."""
        if not self._parts:
            return
        n, first = 0, len(self._parts)
        while first and n < state.n_samples:
            first -= 1
            n += self._parts[first][2]
        parts, self._parts = self._parts[first:], []
        with torch.no_grad():
            for pred, target, n_samples in parts:
                self._update(self._train, pred, target, n_samples)
        self._n_trained += 1

    def before_validate(self, state: State) -> None:
        self._note_train(state)
        self._row, self._set = {}, None

    def after_valid_batch(self, state: State) -> None:
        if state.valid_set != self._set:
            self._note_set()
            self._set = state.valid_set
            self._reset(self._scored, state)
        self._loss.add(state.loss, state.loss_weight)
        self._update(self._valid, scores(state.pred), state.target, state.n_samples)

    def after_validate(self, state: State) -> None:
        self._note_set()
        state.metrics |= self._row

    def after_epoch(self, state: State) -> None:
        if self._n_trained:  # there was no validation
            self._note_train(state)
            state.metrics["time"] = state.metrics.pop("time")  # the last column

    def state_dict(self) -> dict[str, Any]:
        return {"n_trained": self._n_trained,
                "train": [meter.state_dict() for meter in self._train] if self._n_trained else []}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._n_trained = saved["n_trained"]
        if self._n_trained:
            for meter, its in zip(self._train, saved["train"], strict=True):
                with named(meter.name):
                    meter.load_state_dict(its)

    def _reset(self, meters: Iterable[Meter], state: State) -> None:
        for meter in meters:
            with named(meter.name):
                meter.reset(state.device)

    def _update(self, meters: Iterable[Meter], pred: Any, target: Any, n_samples: int) -> None:
        for meter in meters:
            with named(meter.name):
                meter.update(pred, target, n_samples)

    def _note_train(self, state: State) -> None:
        if self._n_trained:
            state.metrics |= self._columns(self._train, "train_", state.metrics)
        self._n_trained = 0

    def _note_set(self) -> None:
        if self._set is not None:
            self._row |= self._columns(self._scored, _prefix(self._set), self._row)

    def _columns(self, meters: Iterable[Meter], prefix: str, others: Iterable[str]) -> dict[str, float]:
        """The columns of `meters`, which must differ from each other and from `others`."""
        row: dict[str, float] = {}
        for meter in meters:
            with named(meter.name):
                columns = {prefix + name: value for name, value in meter.compute().items()}
                twice = sorted(columns.keys() & {*row, *others, "epoch", "train_loss", "time"})
                if twice:
                    raise ValueError(f"two columns of the epoch table would be called {', '.join(twice)}. Rename one, "
                                     "e.g. by MetricCollection(..., prefix='my_').")
            row |= columns
        return row


def _prefix(valid_set: str) -> str:
    return f"{valid_set}_" if valid_set else ""


def _classes(pred: Tensor, target: Tensor) -> tuple[int, Tensor]:
    """(the dimension of the classes, the target's class indices)."""
    if pred.ndim == target.ndim + 1:
        if pred.shape[:1] + pred.shape[2:] == target.shape:
            return 1, target
        if pred.shape[:-1] == target.shape:
            return pred.ndim - 1, target
    if pred.shape == target.shape and pred.ndim >= 2 and pred.shape[1] > 1 and target.is_floating_point():
        return 1, target.argmax(1)
    raise ValueError(f"scores of shape {tuple(pred.shape)} do not fit targets of shape {tuple(target.shape)}: wanted "
                     "(n, classes) and (n,). For one output per sample pass a function of your own, e.g. "
                     "lambda pred, target: ((pred > 0) == target).float().mean().")
