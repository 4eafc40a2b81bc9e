"""What a classifier made of each sample of a data set, in one pass whose memory does not grow with the inputs."""
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.batch import Batch, call_model, scores
from ..base.losses import ignored_label, is_loss
from ..base.nest import describe, map_tensors
from ..data.feed import feed
from ..data.loader import in_order
from ..training.predict import sample_losses, sample_of

if TYPE_CHECKING:
    from ..training.trainer import Trainer

OF_LOGITS = nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits
OF_SHARES = nn.BCELoss, F.binary_cross_entropy
OF_NUMBERS = ((nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss), F.mse_loss, F.l1_loss, F.smooth_l1_loss,
              F.huber_loss)
OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss), F.cross_entropy, F.nll_loss
TOLERANCE = 1e-2  # of sums that should be 1: of half precision, and of label smoothing over many classes


@dataclass(frozen=True)
class Outcomes:
    """What came out, in columns (n,): one row per sample, in the order of the data set."""

    n_classes: int
    index: NDArray[np.int64]  # of the sample in the data set
    actual: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float32]  # of the predicted class, 0..1
    loss: NDArray[np.float32]


class Kept:
    """The inputs of the `n` samples with the largest scores of all that were offered, on the CPU."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.scores: dict[int, float] = {}  # by the row among the samples, largest first
        self.inputs: dict[int, Any] = {}  # of them, each a batch of one

    def offer(self, scores: Tensor, inputs: Any, places: Sequence[int], first: int) -> None:
        """Another batch. scores: (m,), on the CPU; places: of each of the m samples in `inputs`; first: its row."""
        top = torch.topk(torch.nan_to_num(scores, nan=torch.inf), min(self.n, len(scores)))
        new = {first + i: score for score, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)}
        ranked = sorted((self.scores | new).items(), key=lambda item: (-item[1], item[0]))
        self.scores = dict(ranked[:self.n])
        kept = {row: sample_of(inputs, places[row - first]) for row in self.scores if row in new}
        self.inputs = {row: map_tensors(_copy, kept[row]) if row in kept else self.inputs[row] for row in self.scores}


def _copy(tensor: Tensor) -> Tensor:  # without the batch that it was part of
    return tensor.detach().to("cpu", copy=True)


def collect(learn: "Trainer", data: Iterable[Batch], largest: Kept, drawn: Kept) -> Outcomes:
    """One pass over `data`. `largest` is offered each sample by its loss, `drawn` by a number drawn at random."""
    generator = torch.Generator().manual_seed(0)  # one of its own: the same samples each time, and no other is moved
    columns: list[tuple[Tensor, ...]] = []
    seen = n_rows = n_classes = 0
    with learn.eval_mode(data), torch.no_grad(), closing(feed(in_order(data), learn.device)) as batches:
        for batch in batches:
            inputs, target = learn.unpack(batch)
            pred = call_model(learn.model, inputs)
            output = _checked_output(scores(pred), learn.loss_func)
            actual, is_counted = _actual(output, target, learn.loss_func, seen)
            predicted, probability = _predicted(output, learn.loss_func)
            loss = _losses(learn.loss_func, pred, output, target)
            places = torch.nonzero(is_counted.cpu()).flatten()
            rows = tuple(column.cpu()[places] for column in (actual, predicted, probability, loss.float()))
            columns.append((places + seen, *rows))
            if len(places):
                for kept, score in ((largest, rows[3]), (drawn, torch.rand(len(places), generator=generator))):
                    kept.offer(score, inputs, places.tolist(), n_rows)
            seen, n_rows, n_classes = seen + len(output), n_rows + len(places), _n_classes(output)
    if n_rows == 0:
        raise ValueError(f"there is nothing to interpret: the data yielded {seen} samples"
                         + ", and the loss ignores the targets of all" * bool(seen) + ".")
    return Outcomes(n_classes, *[torch.cat(column).numpy() for column in zip(*columns, strict=True)])


def _n_classes(output: Tensor) -> int:
    return 2 if output.ndim == 1 else output.shape[1]


def _checked_output(output: Any, loss_func: Any) -> Tensor:
    """(n,) for two classes told apart by one number, else (n, k), k >= 2."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"the model's output must be a tensor (n, classes) of scores, got {describe(output)}. "
                         "Interpretation is for classifiers.")
    if output.ndim not in (1, 2):
        raise ValueError(f"the model's output must be scores (n, classes), one row for each sample, got "
                         f"{describe(output)}: a class for each pixel, or a map that wants nn.Flatten().")
    scores = output[:, 0] if output.ndim == 2 and output.shape[1] == 1 else output
    if scores.ndim == 1 and (loss_func is None or is_loss(loss_func, *OF_NUMBERS)):
        raise ValueError(f"one output for each sample, {describe(output)}, with {_name(loss_func)} is a regression. "
                         "Interpretation is for classifiers: of two classes e.g. with nn.BCEWithLogitsLoss().")
    if scores.ndim == 1 and is_loss(loss_func, *OF_CLASSES):
        raise ValueError(f"the model's output must have scores of at least 2 classes with {_name(loss_func)}, got "
                         f"{describe(output)}.")
    return scores


def _actual(output: Tensor, target: Any, loss_func: Any, seen: int) -> tuple[Tensor, Tensor]:
    """The class of each sample, (n,) int64, and which samples count: not those that the loss ignores."""
    if not isinstance(target, Tensor):
        raise ValueError(f"the target of a batch must be a tensor, got {describe(target)}. If it lies elsewhere in the "
                         "batch, pass Learner(..., unpack=lambda batch: (inputs, target)).")
    n = len(output)
    if target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if target.shape == output.shape:
        classes = _of_one_number(target, loss_func) if output.ndim == 1 else _of_shares(target)
        return classes, torch.ones(n, dtype=torch.bool)
    if target.shape != (n,):
        raise ValueError(f"the target does not fit the model's output: {describe(target)} and {describe(output)}. "
                         f"Expected {n} class indices, or shares of the classes, ({n}, {_n_classes(output)}).")
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"class indices are integers, got targets {describe(target)}: floats are for regression.")
    labels, k = target.long(), output.shape[1]
    is_counted = labels != ignored_label(loss_func)
    wrong = torch.nonzero(is_counted & ((labels < 0) | (labels >= k))).flatten()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"the target of sample {seen + i} is {int(labels[i])}, and the model has {k} outputs: "
                         f"expected 0..{k - 1}.")
    return labels, is_counted


def _of_one_number(target: Tensor, loss_func: Any) -> Tensor:
    """Classes 0 and 1 from targets 0 and 1, or what lies between, of which a binary cross entropy knows the meaning."""
    values = target.float()
    is_binary = is_loss(loss_func, *OF_LOGITS) or is_loss(loss_func, *OF_SHARES)
    is_allowed = (values >= 0) & (values <= 1) if is_binary else (values == 0) | (values == 1)
    if not is_allowed.all():
        raise ValueError(f"one output for each sample tells the classes 0 and 1 apart, got the target "
                         f"{values[~is_allowed][0].item():g}. Interpretation is for classifiers, not for regression.")
    return (values >= 0.5).long()


def _of_shares(target: Tensor) -> Tensor:
    """The class with the largest share, of targets (n, k) that are probabilities or one-hot."""
    sums = target.double().sum(1)
    wrong = torch.nonzero(((target < 0).any(1)) | ((sums - 1).abs() > TOLERANCE)).flatten()
    if len(wrong):
        raise ValueError(f"targets {describe(target)}, as the output, must be shares of the classes that sum to 1, got "
                         f"a sum of {sums[wrong[0]].item():.3g}: neither several labels nor regression.")
    return target.double().argmax(1)


def _predicted(output: Tensor, loss_func: Any) -> tuple[Tensor, Tensor]:
    """The class of the highest score, (n,) int64, and its probability, (n,) float32; see `Interpretation`."""
    wide, are_shares = output.float(), is_loss(loss_func, *OF_SHARES)
    if output.ndim == 1:
        predicted = (output > (0.5 if are_shares else 0)).long()
        positive = wide if are_shares else wide.sigmoid()
        return predicted, torch.where(predicted == 1, positive, 1 - positive)
    if is_loss(loss_func, *OF_LOGITS):
        wide = wide.sigmoid()
    elif not (are_shares or (bool((wide >= 0).all()) and bool(((wide.sum(1) - 1).abs() < TOLERANCE).all()))):
        wide = wide.softmax(1)
    predicted = output.argmax(1)
    return predicted, wide.gather(1, predicted[:, None])[:, 0]


def _losses(loss_func: Any, pred: Any, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample, (n,)."""
    if loss_func is None:  # the model's own is the mean of a batch
        target = target.to(output.dtype) if target.shape == output.shape else target.reshape(-1).long()
        return F.cross_entropy(output, target, reduction="none")
    return sample_losses(loss_func, pred, target)


def _name(loss_func: Any) -> str:
    loss_func = getattr(loss_func, "func", loss_func)  # of a partial
    name: str = getattr(loss_func, "__name__", type(loss_func).__name__)
    return "a loss of the model's own" if loss_func is None else name
