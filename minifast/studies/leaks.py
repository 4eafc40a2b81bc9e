"""Whether a model mixes the samples of a batch: what it gives for one alone, beside what it gives for it among all."""
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batch import call_model, scores
from ..base.nest import map_tensors, tensors

LEAK = 1e-2  # a change of more than this share of the largest output is no rounding


def find_leaks(model: nn.Module, inputs: Any, target: Any, outputs: Sequence[Tensor], n: int, may_be_second: bool
               ) -> tuple[str, str]:
    """The level of the finding, and what it says.

    outputs: the tensors that `model` gives for the `n` samples of `inputs`.
    may_be_second: whether it may be dimension 1 that counts the samples.
    """
    if n < 2:
        return "note", "a batch of one sample shows none"
    try:
        change = _change(model, inputs, outputs, 0, n)
    except Exception as error:
        return "note", f"the model does not take one sample alone ({type(error).__name__}: {error!s:.120})"
    if change is None:
        return "note", "the output has no dimension of samples to compare"
    if change <= LEAK:
        return "ok", "the output of a sample does not depend on the others"
    sizes = {leaf.shape[1] if leaf.ndim > 1 else None for leaf in (*tensors(inputs), *tensors(target), *outputs)}
    second = sizes.pop()
    if may_be_second and not sizes and second is not None:
        with suppress(Exception):
            if (_change(model, inputs, outputs, 1, second) or 0.0) <= LEAK:
                return "note", "the model mixes rows but not columns: fine if the batch is (time, samples, ...)"
    return "problem", (f"in eval mode the output of a sample alone differs by {change:.1%} from its output within the "
                       "batch: the model mixes samples (a wrong dimension in a softmax, norm, reshape or attention?)")


def _change(model: nn.Module, inputs: Any, outputs: Sequence[Tensor], dim: int, n: int) -> float | None:
    """By how much of the largest output that of a sample changes when it is alone; None if that cannot be seen."""
    def sample(i: int, leaf: Tensor) -> Tensor:  # of a leaf of all samples: a mask for all stays whole
        return leaf.narrow(dim, i, 1) if leaf.ndim > dim and leaf.shape[dim] == n else leaf

    changes = []
    for i in sorted({0, n - 1}):  # the last one too: a recurrence over the batch leaves the first alone
        alone = tensors(scores(call_model(model, map_tensors(partial(sample, i), inputs))))
        for a, whole in zip(alone, outputs, strict=False):
            b = sample(i, whole)
            if b is not whole and whole.numel() and a.shape == b.shape:
                a, b = a.double(), b.double()
                same = (a == b) | (a.isnan() & b.isnan())
                change = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
                changes.append(float(change.max()) / (float(b.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) or 1.0))
    return max(changes, default=None)
