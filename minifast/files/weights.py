"""The weights of a model in a file."""
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.nest import describe
from ..show.tables import listed
from .reading import load_tree, opened, refused
from .trees import check_plain, size_of, to_save, view_of
from .writing import replacing, save_tree

SAFETENSORS = ".safetensors"


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the state dict of `model` to `path`, whole or not at all; to a .safetensors as other programs read it."""
    path = Path(path)
    if path.suffix == SAFETENSORS:
        _save_safetensors(model.state_dict(), path)
    else:
        save_tree(dict(model.state_dict()), path)
    return path


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what `save_weights` wrote, or the weights in a checkpoint: all of it fits, or nothing is changed.

    Values of another precision become those of the model; of another kind they do not fit. Raises ValueError that
    names what does not fit, and for a damaged file (a flipped bit in a .safetensors is not seen: it has no check sums).
    """
    path = Path(path)
    loaded: Any = _load_safetensors(model, path) if path.suffix == SAFETENSORS else load_tree(path)
    if isinstance(loaded, dict) and {"format", "model", "optimizer"} <= loaded.keys():
        loaded = loaded["model"]["weights"]
    put_weights(model, loaded, path)


def _save_safetensors(weights: Mapping[str, Any], path: Path) -> None:
    """Tied weights are written once, under the first of their names: the format has no others."""
    safetensors = _safetensors()
    check_plain(dict(weights))
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(f"{path} can hold tensors only, and {listed(others)} is something else. Save to a name that "
                        "does not end with .safetensors.")
    names: dict[Any, str] = {}
    for name, value in weights.items():
        names.setdefault(view_of(value), name)
    plain: dict[str, Tensor] = to_save({name: weights[name] for name in names.values()})
    with replacing(path, needed=size_of(plain)) as file:  # copies, as the format refuses parts of one storage
        file.write(safetensors.save({name: value.clone(memory_format=torch.contiguous_format)
                                     for name, value in plain.items()}))


def _load_safetensors(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors in the file, and those that `model` has tied to them."""
    safetensors = _safetensors()
    with opened(path):  # no pipe, no device
        try:
            loaded: dict[str, Tensor] = safetensors.load_file(path)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise refused(path, error) from error
    own = model.state_dict()
    by_view = {view_of(own[name]): name for name in own if name in loaded}
    tied = {name: by_view.get(view_of(value)) for name, value in own.items() if name not in loaded}
    return loaded | {name: loaded[known] for name, known in tied.items() if known is not None}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('.safetensors files need a package: pip install "minifast[safetensors]"') from error
    return safetensors.torch


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
    before = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in (*model.parameters(), *model.buffers())
              if not tensor.is_meta]
    try:
        model.load_state_dict(loaded)
    except BaseException as error:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor.detach().cpu(), value):
                    tensor.copy_(value)
        if isinstance(error, RuntimeError):  # of torch, which goes on after a part that does not fit
            raise ValueError(f"{path} does not fit the model ({type(model).__name__}): {str(error).strip():.500} "
                             "Nothing was changed.") from error
        raise


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else describe(value)


def _kind(value: Any) -> Any:
    """Whether it is complex, real, a truth value or a whole number."""
    return isinstance(value, Tensor) and (value.is_complex(), value.is_floating_point(), value.dtype is torch.bool)
