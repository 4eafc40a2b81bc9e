"""Layer groups of an image model by its structure: what runs first, and where the picture gets smaller."""
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..base import snapshot
from ..base.hooks import hook_outputs
from ..optim.groups import is_norm

SIDE = 224  # pixels: of the images on which the groups are found; most image models are made for it
WRAPPER = 0.9  # a module with more of the body's parameters than this is a wrapper around layers, not a layer
N_STAGES = 4  # of a body in which the picture never gets smaller, as in a vision transformer

Run = tuple[nn.Module, tuple[int, ...]]  # a module and the shape of its output


def layer_groups(model: nn.Module, channels: int = 3, size: tuple[int, int] = (SIDE, SIDE),
                 head: nn.Module | None = None) -> dict[str, list[nn.Parameter]]:
    """The layer groups of an image model: "stem", "stage 1" and so on, perhaps "linear", "head", each with parameters.

    A splitter for a `Learner`. The model is run on blank images: a stage ends where the picture has shrunk to half its
    area or less. The stem is what comes before the first block of several layers, or before the picture shrinks. Where
    it never does, as in a vision transformer, the blocks are four stages of equally many. "linear": layers between the
    last stage and the head, as in VGG. What is in no layer (class tokens, position embeddings) goes with the stem.

    channels, size (height, width in pixels): of images that the model takes, used where it does not take 224 x 224.
    head: a group of its own; None: the last linear layer or convolution that runs. Raises what the model raises.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3),
    ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    >>> {name: sum(p.numel() for p in group) for name, group in layer_groups(model, channels=1).items()}
    {'stem': 48, 'stage 1': 296, 'head': 90}
    """
    try:
        runs = run_on_blank(model, (channels, SIDE, SIDE))
    except Exception:  # it takes images of its own size only
        runs = run_on_blank(model, (channels, *size))
    head = output_layer(runs) if head is None else head
    if head is None:
        return {"model": list(model.parameters())}
    order = {id(module): i for i, (module, _) in enumerate(runs)}
    shapes = {id(module): shape for module, shape in runs}
    n_body = _n_parameters(model) - _n_parameters(head)
    layers = sorted(_layers(model, head, n_body), key=lambda layer: order.get(id(layer), -1))
    stages = _stages(layers, shapes)
    names = ["stem", *(f"stage {i}" for i in range(1, len(stages)))]
    if len(stages) > 1 and len(shapes.get(id(stages[-1][-1]), ())) == 2:
        names[-1] = "linear"
    groups = {name: [p for layer in stage for p in layer.parameters()]
              for name, stage in zip(names, stages, strict=False)}
    groups["head"] = list(head.parameters())
    claimed = {id(p) for group in groups.values() for p in group}
    first = next(iter(groups))
    groups[first] = [p for p in model.parameters() if id(p) not in claimed] + groups[first]
    return groups


def run_on_blank(model: nn.Module, shape: tuple[int, int, int]) -> list[Run]:
    """The modules in the order in which they end for two blank images of `shape` (channels, height, width).

    The last one is the model itself, if it gives a tensor. Only shapes are computed; a model that asks for values is
    run for real, in eval mode, without gradients. It is left as it was. Raises what it raises.
    """
    runs: list[Run] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            runs.append((module, tuple(output.shape)))

    restore_modes = snapshot.modes(model)
    model.eval()
    try:
        with hook_outputs(model.modules(), note), torch.no_grad():
            try:
                shadows = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(),
                                                                        *model.named_buffers())}
                functional_call(model, shadows, torch.zeros(2, *shape, device="meta"))
            except Exception:
                runs.clear()
                device = next((p.device for p in model.parameters()), torch.device("cpu"))
                model(torch.zeros(2, *shape, device=device))
    finally:
        restore_modes()
    return runs


def output_layer(runs: Sequence[Run]) -> nn.Linear | nn.Conv2d | None:
    """The last linear layer or convolution that has run."""
    return next((module for module, _ in reversed(runs) if isinstance(module, (nn.Linear, nn.Conv2d))), None)


def _layers(module: nn.Module, head: nn.Module, n_body: int) -> Iterator[nn.Module]:
    """The layers and blocks of a model without its head: containers and wrappers are opened."""
    for child in module.children():
        n = _n_parameters(child)
        is_wrapper = n > WRAPPER * n_body and not _is_single(child)
        if child is head or not n:
            continue
        if isinstance(child, (nn.Sequential, nn.ModuleList)) or is_wrapper or any(m is head for m in child.modules()):
            yield from _layers(child, head, n_body)
        else:
            yield child


def _stages(layers: Sequence[nn.Module], shapes: dict[int, tuple[int, ...]]) -> list[list[nn.Module]]:
    stages: list[list[nn.Module]] = [[layer] for layer in layers[:1]]
    areas = [_area(shapes.get(id(layer))) for layer in layers]
    area = areas[0] if areas else None
    for layer, here in zip(layers[1:], areas[1:], strict=True):
        has_changed = area is not None and here is not None and not 0.5 < here / area < 2
        ends_stem = len(stages) == 1 and _is_single(stages[0][0]) and not _is_single(layer)
        if has_changed or ends_stem:
            stages.append([])
            area = here
        stages[-1].append(layer)
    for before, stage in reversed(list(pairwise(stages))):
        if all(is_norm(layer) for layer in stage):  # behind the pooling, as in ConvNeXt
            before += stage
            stages.remove(stage)
    if len(stages) == 2 and len(stages[1]) >= N_STAGES:
        n = len(stages[1])
        stages[1:] = [stages[1][n * i // N_STAGES:n * (i + 1) // N_STAGES] for i in range(N_STAGES)]
    return stages


def _area(shape: tuple[int, ...] | None) -> int | None:
    """How many positions a layer's output has for each image: (n, c, h, w), (n, h, w, c), (n, tokens, c) or (n, c)."""
    if shape is None:
        return None
    if len(shape) == 4:
        is_channels_last = shape[1] == shape[2] != shape[3]  # the images are square
        return shape[1] * shape[2] if is_channels_last else shape[2] * shape[3]
    return shape[1] if len(shape) == 3 else 1


def _is_single(layer: nn.Module) -> bool:
    return not any(True for _ in layer.children())


def _n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
