"""The weights of a model in a file."""
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .batches import describe
from .files import load_tree, save_tree
from .tables import listed


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the state dict of `model`, plain tensors, to `path`: whole, or not at all."""
    path = Path(path)
    save_tree({name: _plain(value) for name, value in model.state_dict().items()}, path)
    return path


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what `save_weights` wrote. Nothing in the file is executed, and all of it fits or nothing is changed.

    Raises ValueError that names what is missing, unexpected or of another shape, and for a damaged file.
    """
    loaded, own = load_tree(path), model.state_dict()
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not the weights of a model.")
    problems = [f"{kind} {listed(names)}" for kind, names in (
        ("missing", [name for name in own if name not in loaded]),
        ("unexpected", [name for name in loaded if name not in own]),
        ("of another shape", [f"{name} {_shape(loaded[name])} for {_shape(own[name])}" for name in own
                              if name in loaded and _shape(loaded[name]) != _shape(own[name])])) if names]
    if problems:
        raise ValueError(f"{path} does not fit the model ({type(model).__name__}): {'; '.join(problems)}. "
                         "Nothing was loaded.")
    model.load_state_dict(loaded)


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    is_part = value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if is_part else value  # torch.save would write all that a view is a part of


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else describe(value)
