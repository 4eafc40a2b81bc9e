"""What `python -m minifast` does: find a learning rate, train by one cycle and by a circular one, draw the curves."""
import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .data.dataloaders import DataLoaders
from .learner import Learner
from .standard.metrics import accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FALLBACK_LR = 3e-3  # where the finder has no suggestion: a usual peak for AdamW on a small convnet
EPOCHS = {"one cycle": 5, "circular": 3}
PLOTS = ("lr_find.png", *(f"{name.replace(' ', '_')}_{what}.png" for name in EPOCHS
                          for what in ("lr", "losses", "metrics")))


def run(dls: DataLoaders, out: Path, *, lr: float | None = None, epochs: int | None = None,
        device: torch.device | str | None = None, seed: int = 0) -> dict[str, float]:
    """Train twice from the same weights on `dls` and write the plots into `out`, an existing folder.

    dls: `TensorLoader`s of images (n, channels, height, width) and class indices (n,).
    lr: the peak, None for what the finder suggests.
    epochs: of each run, None for `EPOCHS`.

    Gives the accuracy, 0..1, of each run.
    """
    torch.manual_seed(seed)
    loaders: Any = dls
    images, labels = loaders.train.tensors
    n_classes, (n, channels, height, width) = int(labels.max()) + 1, images.shape
    model = convnet((channels, height, width), n_classes)

    def learner() -> Learner:  # the same weights and, by the seed, the same order of the data for each
        return Learner(copy.deepcopy(model), dls, nn.CrossEntropyLoss(), metrics=[accuracy], device=device, seed=seed)

    one, circular = (usual if epochs is None else epochs for usual in EPOCHS.values())
    learn = learner()
    print(f"{n:,} training and {len(loaders.valid.tensors[0]):,} validation images of {n_classes} classes, "
          f"{width}x{height} pixels, {'grey' if channels == 1 else 'colour'}\n"
          f"a convnet of {sum(p.numel() for p in model.parameters()):,} parameters on {learn.device}")
    lr = _find(learn, lr, out)
    print(f"\nlearn.fit_one_cycle({one}, {lr:.3g})")
    learn.fit_one_cycle(one, lr)
    reached = {"one cycle": _show(learn, "one cycle", out)}
    print(f"\nlearn.fit({lr:.3g}, 1, cycle_len={circular}, use_clr=(32, 5))   # again, from the same initial weights")
    learn = learner()
    learn.fit(lr, 1, cycle_len=circular, use_clr=(32, 5))
    reached["circular"] = _show(learn, "circular", out)
    print("\n  ".join([f"\nThe plots are in {out}:", *PLOTS]), flush=True)
    return reached


def convnet(shape: tuple[int, ...], n_classes: int, width: int = 48) -> nn.Sequential:
    """A small convnet for images of `shape` (channels, height, width), both sides >= 8 pixels."""
    side = min(shape[1:])
    stride = 1 if side <= 16 else 2  # at full size the first layers would take most of the time
    layers = [*_conv(shape[0], width, stride), *_conv(width, width), nn.MaxPool2d(2)]
    side //= 2 * stride
    while side > 3:
        wider = min(2 * width, 256)
        layers += [*_conv(width, wider), nn.MaxPool2d(2)]
        width, side = wider, side // 2
    body = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        n_features = body.eval()(torch.zeros(1, *shape)).shape[1]
    return body.train().append(nn.Linear(n_features, n_classes))


def _conv(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]


def _find(learn: Learner, lr: float | None, out: Path) -> float:
    """The learning rate to train with, after a run of the finder."""
    print("\nlearn.lr_find()", flush=True)
    found = learn.lr_find()
    _draw(learn.recorder.plot, "LR finder", f"{out / 'lr_find'}.png")
    if lr is not None:
        print(f"training with {lr:.3g}, as given")
        return lr
    if found.suggestion is None:
        print(f"training with {FALLBACK_LR:.3g}, because there is no suggestion")
        return FALLBACK_LR
    print(f"training with the valley's, {found.suggestion:.3g} (--lr takes another)")
    return found.suggestion


def _show(learn: Learner, name: str, out: Path) -> float:
    """Print what a run reached and draw its curves; gives the accuracy."""
    recorder, path = learn.recorder, out / name.replace(" ", "_")
    _draw(recorder.plot_lr, f"{name}: learning rate and momentum", f"{path}_lr.png", show_moms=True)
    _draw(recorder.plot_losses, f"{name}: loss", f"{path}_losses.png")
    _draw(recorder.plot_metrics, f"{name}: accuracy on the validation images", f"{path}_metrics.png")
    n, reached = len(recorder.epochs), float(recorder.epochs[-1]["accuracy"])
    seconds = sum(row["time"] for row in recorder.epochs)
    print(f"{name}: accuracy {reached:.2%} after {n} epoch{'s' * (n > 1)} in {seconds:.1f} s", flush=True)
    return reached


def _draw(plot: "Callable[..., Axes]", title: str, path: str, **options: Any) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout="constrained")  # a bare one: on a desktop, pyplot's would open windows
    plot(**options, ax=figure.subplots())
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
