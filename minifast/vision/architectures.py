"""Image models of torchvision, or of one's own, with a head for other classes and a stem for other channels."""
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from torch import nn

from ..errors import check_callable, check_flag, quoted, torchvision_errors
from ..show.tables import listed
from .stages import SIDE, output_layer, run_on_blank

AUXILIARY = {"aux_logits": False, "aux1": None, "aux2": None, "AuxLogits": None}  # of GoogLeNet and Inception v3


class ImageModel(NamedTuple):
    """A model that is ready to be trained."""

    model: nn.Module
    head: nn.Module | None  # its last layer, which is new; None for a model of one's own
    weights: Any  # of torchvision, None for random ones


def image_model(arch: Any, n_classes: int, *, channels: int = 3, pretrained: bool = True, weights: Any = None,
                head: Callable[[int, int], nn.Module] | None = None, progress: bool = True) -> ImageModel:
    """The model of `arch` with `n_classes` outputs; the arguments and errors are those of `vision_learner`."""
    check_flag("pretrained", pretrained)
    if head is not None and (isinstance(head, nn.Module) or not callable(head)):
        raise TypeError(f"head must be a function (n_features, n_classes) -> module, got {quoted(head)}. Pass e.g. "
                        "lambda n_features, n_classes: nn.Linear(n_features, n_classes).")
    builder = _torchvision_builder(arch)
    if builder is None:
        for name, value in (("weights", weights), ("head", head)):
            if value is not None:
                raise ValueError(f"{name}= is for architectures of torchvision, and {quoted(arch)} is your own.")
        try:
            own = arch(n_classes)
        except Exception as error:
            error.add_note(f"in arch, called with the number of classes, {n_classes}")
            raise
        if not isinstance(own, nn.Module):
            raise TypeError(f"arch must give an nn.Module, and arch({n_classes}) gives {quoted(own)}.")
        return ImageModel(own, None, None)
    weights = _resolved(builder, pretrained, weights)
    model = _built(builder, weights, progress)
    for name, off in AUXILIARY.items():  # while they train, GoogLeNet and Inception v3 would give a tuple
        if hasattr(model, name):
            setattr(model, name, off)
    if channels == 1:
        _make_grey(model, weights)
    return ImageModel(model, _replace_head(model, channels, n_classes, head), weights)


def check_takes(model: nn.Module, channels: int, size: tuple[int, int], n_classes: int) -> None:
    """Raises ValueError unless the model gives (n, n_classes) for images of `channels` and `size` (height, width)."""
    try:
        runs = run_on_blank(model, (channels, *size))
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot take images of {size[0]} x {size[1]} pixels with {channels} "
                         f"channel{'s' * (channels > 1)}: {_first_line(error)}. Load them in another size, e.g. with "
                         f"size={getattr(model, 'image_size', SIDE)}, or pass another architecture.") from error
    shape: Any = runs[-1][1] if runs and runs[-1][0] is model else "no tensor"
    if shape != (2, n_classes):
        raise ValueError(f"{type(model).__name__} gives {shape} for 2 images, and {n_classes} classes need "
                         f"{(2, n_classes)}: let its last layer have {n_classes} outputs.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".!")[:300]


def _torchvision_builder(arch: Any) -> Callable[..., nn.Module] | None:
    """torchvision's function for `arch`; None for a function of one's own."""
    with torchvision_errors():
        from torchvision import models

    names = models.list_models(module=models)
    there_are = f"There are {listed(names)}: all in torchvision.models.list_models(module=torchvision.models)."
    if isinstance(arch, str):
        if arch.lower() in names:
            return models.get_model_builder(arch)  # type: ignore[no-any-return]
        if arch.lower() in models.list_models():
            raise ValueError(f"{arch!r} is no architecture that classifies pictures. {there_are}")
        close = get_close_matches(arch.lower(), names, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"torchvision has no architecture {arch!r:.60}. {hint}{there_are}")
    if isinstance(arch, nn.Module):
        raise TypeError(f"arch must be a function that makes the model, got a {type(arch).__name__} that is made "
                        "already. Pass e.g. resnet18 without (), its name, or lambda n_classes: model.")
    check_callable("arch", arch, "an architecture of torchvision, its name, or a function n_classes -> module",
                   "'resnet18'")
    if not str(getattr(arch, "__module__", "")).startswith("torchvision.models"):
        return None
    name = getattr(arch, "__name__", "")
    if name not in names or models.get_model_builder(name) is not arch:
        raise ValueError(f"{arch.__module__}.{name} is no function that makes a classifier of pictures. {there_are}")
    return arch  # type: ignore[no-any-return]


def _resolved(builder: Callable[..., nn.Module], pretrained: bool, weights: Any) -> Any:
    """The member of torchvision's enum of weights; None for random weights."""
    from torchvision import models

    if not pretrained:
        if weights is not None:
            raise ValueError(f"pretrained=False and weights={weights!r:.60}: pass one of them.")
        return None
    kinds = models.get_model_weights(builder)
    try:
        return kinds.verify("DEFAULT" if weights is None else weights)
    except (KeyError, TypeError):
        raise ValueError(f"{builder.__name__} has no weights {weights!r:.60}: there are "
                         f"{', '.join(kinds.__members__)}, of torchvision.models.{kinds.__name__}.") from None


def _built(builder: Callable[..., nn.Module], weights: Any, progress: bool) -> nn.Module:
    """The model with `weights`, from torch's cache or the internet; None: with random ones."""
    if weights is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # how GoogLeNet and Inception are initialised may change
            return builder(weights=None)
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(weights.url).path).name)
    try:
        return builder(weights=weights, progress=progress)
    except Exception as error:  # of sockets, HTTP, a wrong hash, unpickling, shapes
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        if path.is_file():
            raise ValueError(f"{path} does not hold the weights {weights} ({reason}). Delete the file to have it "
                             "downloaded again, or pass pretrained=False.") from error
        raise OSError(f"cannot download the weights {weights} from {weights.url} ({reason}). Pass pretrained=False, or "
                      f"get the file and put it into {path.parent}, with the name {path.name}.") from error


def _replace_head(model: nn.Module, channels: int, n_classes: int,
                  make: Callable[[int, int], nn.Module] | None) -> nn.Module:
    side = getattr(model, "image_size", SIDE)  # a vision transformer takes images of its own size only
    old = output_layer(run_on_blank(model, (channels, side, side)))
    if old is None:
        raise ValueError(f"{type(model).__name__} has no linear layer or convolution to be replaced by a new head.")
    n_features = old.in_features if isinstance(old, nn.Linear) else old.in_channels
    new: Any = make(n_features, n_classes) if make is not None else (
        nn.Linear(n_features, n_classes, bias=old.bias is not None) if isinstance(old, nn.Linear)
        else nn.Conv2d(n_features, n_classes, 1))  # of SqueezeNet
    if not isinstance(new, nn.Module):
        raise TypeError(f"head must give an nn.Module, and head({n_features}, {n_classes}) gives {quoted(new)}.")
    model.set_submodule(next(name for name, module in model.named_modules() if module is old), new)
    if make is not None:  # the layer that it replaces took these images, so what goes wrong now is the head's
        try:
            run_on_blank(model, (channels, side, side))
        except Exception as error:
            raise ValueError(f"head({n_features}, {n_classes}) gives a module that does not go with {n_features} "
                             f"features: {_first_line(error)}.") from error
    return new


def _make_grey(model: nn.Module, weights: Any) -> None:
    """Let the first convolution take one channel: what it did to grey pictures in RGB it does to them as they are."""
    if getattr(model, "transform_input", False):
        raise ValueError(f"{type(model).__name__} with the weights {weights} takes three channels apart and cannot "
                         "take grey images. Load them in colour, or pass pretrained=False.")
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    rgb = first.weight.detach()
    first.weight = nn.Parameter(rgb[:, :1].clone() if weights is None else rgb.sum(1, keepdim=True))
    first.in_channels = 1
