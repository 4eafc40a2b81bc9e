"""What a loss function may return, and what its mean weighs."""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Weight = int | float | Tensor  # what a mean loss is the mean over: samples, or tokens, weights, ... as a number or ()


def mean_and_weight(loss: Any, n_samples: int) -> tuple[Any, Weight]:
    """The mean loss of a batch and what it weighs among others.

    loss: a scalar, the mean over `n_samples`, or a tuple (sum, count) of a loss that is summed over `count` tokens,
    weights or the like; a count on the device stays there. A count of 0 gives a mean of sum / 1.

    >>> mean_and_weight((torch.tensor(6.0), 3), n_samples=2)
    (tensor(2.), 3)
    """
    if not isinstance(loss, tuple):
        return loss, n_samples
    if len(loss) != 2 or not isinstance(loss[0], Tensor):
        raise TypeError(f"loss_func must return a scalar tensor, or (sum, count), got a tuple of {len(loss)}: "
                        f"({', '.join(type(part).__name__ for part in loss)}).")
    total, count = loss
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(f"the count of a loss (sum, count) must be one number, got shape {tuple(count.shape)}.")
        count = count.detach().reshape(())
        return total / nonzero(count), count
    return total / (count or 1), count


def nonzero(weight: Weight) -> Weight:
    """`weight`, or 1 where it is 0: a divisor, without waiting for the device."""
    return torch.where(weight == 0, torch.ones_like(weight), weight) if isinstance(weight, Tensor) else weight or 1


def is_loss(loss_func: Any, kind: type[nn.Module] | tuple[type[nn.Module], ...], *functions: Callable[..., Any]
            ) -> bool:
    """Whether `loss_func` is a torch loss of class `kind` or one of its `functions`, as itself or in a partial.

    >>> is_loss(partial(nn.functional.mse_loss, reduction="mean"), nn.MSELoss, nn.functional.mse_loss)
    True
    """
    loss_func = loss_func.func if isinstance(loss_func, partial) else loss_func
    return isinstance(loss_func, kind) or any(loss_func is function for function in functions)


def is_cross_entropy(loss_func: Any) -> bool:
    """Whether `loss_func` is torch's cross entropy, as module, function or partial."""
    return is_loss(loss_func, nn.CrossEntropyLoss, nn.functional.cross_entropy)


def ignored_label(loss_func: Any) -> int:
    """The label that a cross entropy, as module, function or partial, leaves out: its `ignore_index`."""
    given = getattr(loss_func, "keywords", {}).get("ignore_index", -100)  # of a partial
    return int(getattr(loss_func, "ignore_index", given))
