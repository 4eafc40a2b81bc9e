"""Predictions averaged over augmented copies of each sample."""
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base import snapshot
from ..base.batch import Batch, call_model, scores
from ..base.nest import describe, join, map_tensors
from ..data.feed import feed
from ..data.loader import generators, in_order, with_transform
from ..data.tensor_loader import TensorLoader
from ..errors import check_flag, check_int, check_number
from ..training.predict import predict_all

if TYPE_CHECKING:
    from ..training.trainer import Trainer

Transform = Callable[[Any], Any]


def tta(learn: "Trainer", dl: Iterable[Batch] | str | None = None, *, transform: Transform | None = None, n: int = 4,
        beta: float = 0.25, use_max: bool = False) -> tuple[Any, Any]:
    """See `Learner.tta`."""
    n, beta = check_int("n", n), check_number("beta", beta, minimum=0, maximum=1)
    use_max = check_flag("use_max", use_max)
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of the inputs, got {transform!r:.80}.")
    data = learn.eval_data(dl)
    on_batch = own = None  # own: the transform of the pass as it is, where the loader is read without it
    if transform is None:
        name, on_batch = _loader_transform(learn.dls.train)
        data, own = _without(name, in_order(data))

    def augmented(batch: Batch) -> Any:
        batch = map_tensors(Tensor.clone, batch)  # a transform may write into it: neither the next pass nor the data
        given = batch if transform is None else learn.unpack(batch)[0]
        try:
            return transform(given) if transform is not None else learn.unpack(on_batch(given))[0]  # type: ignore[misc]
        except Exception as error:
            error.add_note(f"in the transform of tta, called with {describe(given)}")
            raise

    def unpack(batch: Batch) -> tuple[Any, Any]:
        inputs, target = learn.unpack(batch if own is None else own(map_tensors(Tensor.clone, batch)))
        return (inputs, batch), target

    def outputs(inputs: Any, batch: Batch) -> Any:
        passes = [scores(call_model(learn.model, inputs))]
        passes += [scores(call_model(learn.model, augmented(batch))) for _ in range(n)]
        return join(partial(_combined, beta=beta, use_max=use_max), passes)

    restore = snapshot.rng([*generators(transform), *generators(on_batch)])
    try:
        with learn.eval_mode(data):
            preds, targets = predict_all(outputs, feed(in_order(data), learn.device), unpack)
    finally:
        restore()
    return preds, targets


def _loader_transform(loader: Iterable[Batch]) -> tuple[str, Transform]:
    """The transform that augments the training batches, and the name under which the loader keeps it."""
    for name in ("batch_transform", "transform") if isinstance(loader, TensorLoader) else ("batch_transform",):
        transform = getattr(loader, name, None)
        if transform is not None:
            return name, transform
    raise ValueError(f"tta needs a transform, and the training data ({type(loader).__name__}) is no TensorLoader with "
                     "one of its own. Pass a function, e.g. tta(transform=lambda x: x + 0.1 * torch.randn_like(x)).")


def _without(name: str, loader: Iterable[Batch]) -> tuple[Iterable[Batch], Transform | None]:
    """`loader` without its own transform called `name`, and that transform."""
    own = getattr(loader, name, None) if name == "batch_transform" or isinstance(loader, TensorLoader) else None
    if own is None and name == "batch_transform":
        raise ValueError(f"the training data augments raw batches (by its batch_transform), and the data of tta "
                         f"({type(loader).__name__}) has none: its batches are of another kind. Pass data made in the "
                         "same way, or transform=, a function of the inputs.")
    return (loader, None) if own is None else (with_transform(loader, None, name), own)


def _combined(leaves: list[Any], beta: float, use_max: bool) -> Any:
    """One output of those of all passes: that of the pass as it is, then the augmented ones."""
    as_it_is, *augmented = leaves
    if not isinstance(as_it_is, Tensor):
        return as_it_is
    if not as_it_is.is_floating_point():
        raise TypeError(f"tta averages outputs that are floats, got {describe(as_it_is)}. Let the model give its "
                        "scores.")
    if use_max:
        return reduce(torch.maximum, leaves)
    if beta == 1:
        return as_it_is
    is_half = as_it_is.dtype in (torch.float16, torch.bfloat16)
    mean = sum(leaf.float() if is_half else leaf for leaf in augmented) / len(augmented)
    return (mean if beta == 0 else (1 - beta) * mean + beta * as_it_is).to(as_it_is.dtype)  # 0 * inf would be nan
