"""The weights of a model in a file."""
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.nest import describe
from ..show.tables import listed
from .reading import load_tree
from .writing import save_tree


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the state dict of `model`, plain tensors, to `path`: whole, or not at all."""
    path = Path(path)
    save_tree(dict(model.state_dict()), path)
    return path


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what `save_weights` wrote, or the weights in a checkpoint. Nothing in the file is executed.

    All of it fits, or nothing is changed. Values of another precision (float16 for float32) become those of the model;
    whole numbers for real ones, or any other kind, do not fit. Raises ValueError that names what is missing,
    unexpected, of another shape or kind, and for a damaged file.
    """
    loaded = load_tree(path)
    if isinstance(loaded, dict) and {"format", "model", "optimizer"} <= loaded.keys():
        loaded = loaded["model"]["weights"]
    put_weights(model, loaded, path)


def put_weights(model: nn.Module, loaded: Any, path: str | os.PathLike[str]) -> None:
    """Give `model` the weights `loaded`, read from `path`; the errors are those of `load_weights`."""
    own = model.state_dict()
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the weights of a model.")
    both = [name for name in own if name in loaded]
    problems = [f"{kind} {listed(names)}" for kind, names in (
        ("missing", [name for name in own if name not in loaded]),
        ("unexpected", [name for name in loaded if name not in own]),
        ("of another shape", [f"{name} {_shape(loaded[name])} for {_shape(own[name])}" for name in both
                              if _shape(loaded[name]) != _shape(own[name])]),
        ("of another kind", [f"{name} {loaded[name].dtype} for {own[name].dtype}" for name in both
                             if _shape(loaded[name]) == _shape(own[name]) and _kind(loaded[name]) != _kind(own[name])]),
    ) if names]
    if problems:
        raise ValueError(f"{path} does not fit the model ({type(model).__name__}): {'; '.join(problems)}. "
                         "Nothing was loaded.")
    with _all_or_nothing(model):
        try:
            model.load_state_dict(loaded)
        except RuntimeError as error:  # of torch, which goes on after a part that does not fit
            raise ValueError(f"{path} does not fit the model ({type(model).__name__}): {str(error).strip():.500} "
                             "Nothing was changed.") from error


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """After an error in its block, the parameters and buffers of `model` are what they were."""
    before = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*model.parameters(), *model.buffers())
              if not tensor.is_meta]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor.detach().cpu(), value):
                    tensor.copy_(value)
        raise


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else describe(value)


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return ""
    if value.dtype is torch.bool:
        return "truth"
    return "complex" if value.is_complex() else "real" if value.is_floating_point() else "whole"
