"""Metrics that need all samples at once, such as scikit-learn's, as metric objects."""
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import check_choice, check_text
from .meters import metric_name

FLUSH_BYTES = 2**26  # outputs and targets that may wait on the device before they are moved to the host


class WholeSet:
    """A metric from a function `(y_true, y_pred) -> number` of numpy arrays, called once with all samples.

    For whatever is no mean over samples (F1, AUC, a correlation): the mean of its values for single batches would be
    another number. Made for scikit-learn's metrics: `WholeSet(f1_score, pred="labels", average="macro")`.

    function: gets the targets first, then what `pred` says, then `options` as keywords. pred: "scores", the model's
    outputs as they are; "labels", the class of the highest of (n, classes, ...) scores, or for targets of the
    outputs' shape whether each output is > 0; "probabilities", their softmax (n, classes), for two classes that of
    the second (n,), or for targets of the outputs' shape the sigmoid. Labels, and single outputs, are flattened to
    (n,), unless targets are (n, labels) with several labels; pixels count as samples. Targets that are probabilities
    (mixup) are taken for several labels: leave `train_metrics` off there. name: the column's, None for the function's.

    Outputs and targets are kept in host memory until the end of the pass, moved there 64 MiB at a time. Raises
    ValueError for another `pred`, TypeError for a function that cannot be called.

    >>> def errors(y_true, y_pred): return float((y_true != y_pred).sum())
    >>> metric = WholeSet(errors, pred="labels")
    >>> metric.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    >>> metric.update(torch.tensor([[0.3, 0.7]]), torch.tensor([0]))
    >>> metric.__name__, metric.compute()
    ('errors', 2.0)
    """

    def __init__(self, function: Callable[..., Any], *, pred: str = "scores", name: str | None = None,
                 **options: Any) -> None:
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"function must be a function (y_true, y_pred) -> number, got {function!r:.80}.")
        check_choice("pred", pred, tuple(_KINDS))
        self.function, self.pred, self.options = function, pred, options
        self.__name__ = metric_name(function) if name is None else check_text("name", name)
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._preds: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._on_host = self._waiting = 0  # batches there, bytes that wait to go there

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
            raise TypeError(f"{self.__name__} needs the output and the target to be tensors, got a "
                            f"{type(pred).__name__} and a {type(target).__name__}.")
        pred, target = _KINDS[self.pred](pred.detach(), target)
        self._preds.append(pred)
        self._targets.append(target.clone())  # the loader may fill the same memory again
        self._waiting += sum(part.numel() * part.element_size() for part in (pred, target))
        if self._waiting > FLUSH_BYTES:
            self._flush()

    def compute(self) -> float:
        """The function of all samples; nan of none."""
        if not self._preds:
            return math.nan
        self._flush()
        return float(self.function(_joined(self._targets), _joined(self._preds), **self.options))

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"WholeSet({metric_name(self.function)}, pred={self.pred!r}, name={self.__name__!r}{options})"

    def _flush(self) -> None:
        for parts in (self._preds, self._targets):
            parts[self._on_host:] = [part.cpu() for part in parts[self._on_host:]]
        self._on_host, self._waiting = len(self._preds), 0


def _joined(parts: list[Tensor]) -> NDArray[Any]:
    whole = torch.cat(parts)
    return np.asarray(whole.float() if whole.dtype in (torch.bfloat16, torch.float16) else whole)


def _scores(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return pred.clone(), target  # an output may be the same memory for each batch


def _labels(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if pred.shape == target.shape:
        return _flat((pred > 0).long(), target)
    _check(pred, target)
    return pred.argmax(1).flatten(), target.flatten()


def _probabilities(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    pred = pred.float() if pred.dtype in (torch.bfloat16, torch.float16) else pred
    if pred.shape == target.shape:
        return _flat(pred.sigmoid(), target)
    _check(pred, target)
    rows = pred.softmax(1).movedim(1, -1).reshape(-1, pred.shape[1])
    return rows[:, 1].clone() if rows.shape[1] == 2 else rows, target.flatten()


def _flat(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    is_table = pred.ndim == 2 and pred.shape[1] > 1
    return (pred, target) if is_table else (pred.flatten(), target.flatten())


def _check(pred: Tensor, target: Tensor) -> None:
    if pred.ndim < 2 or pred.shape[:1] + pred.shape[2:] != target.shape:
        raise ValueError(f"outputs of shape {tuple(pred.shape)} do not fit targets of shape {tuple(target.shape)}: "
                         "wanted (n, classes, ...) and (n, ...), or one shape. For others pass pred=\"scores\".")


_KINDS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "scores": _scores, "probabilities": _probabilities, "labels": _labels}
