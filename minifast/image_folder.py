"""A folder of images, decoded once into memory: `DIR/train/<class>/*` and `DIR/valid/<class>/*`."""
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .batches import Batch
from .dataloaders import DataLoaders
from .errors import torchvision_errors
from .tables import listed
from .tensor_loader import TensorLoader

if TYPE_CHECKING:
    from PIL.Image import Image

SIDES = (8, 64)  # pixels: smaller ones vanish in a convnet, larger ones take minutes on a CPU
GREY = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"}  # Pillow's modes without colour


def image_folder(folder: Path, batch_size: int = 64, device: torch.device | str | None = None) -> DataLoaders:
    """The images under `folder` as loaders of (float images (n, channels, height, width) in 0..1, class indices (n,)).

    Grey if all images are, else RGB. Images of one size keep it if both sides are 8..64 pixels; otherwise all become
    squares, as long as the shorter side of most of them and within these bounds. The classes are the folders of
    `train`, sorted; a class may be missing in `valid`, not the other way round. Raises ValueError or OSError with one
    line that names the folder or file, ImportError for a torchvision that does not fit torch.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    train, classes = _samples(folder / "train")
    valid, valid_classes = _samples(folder / "valid")
    for name in valid_classes:
        if name not in classes:
            raise ValueError(f"the class {name!r} is in {folder / 'valid'} only: {folder / 'train'} has "
                             f"{listed(classes)}")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} has one class only ({classes[0]}): nothing to tell apart")
    size, mode = _common_form([path for path, _ in (*train, *valid)])
    return DataLoaders(_loader(train, classes, size, mode, batch_size, device, is_train=True),
                       _loader(valid, classes, size, mode, batch_size, device, is_train=False), classes)


def _samples(folder: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """(path, class) of every image in the folders of `folder`, and these folders' names."""
    with torchvision_errors():
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: expected {folder}/<class>/<image>")
    try:
        found = ImageFolder(folder, allow_empty=True)
    except FileNotFoundError:  # torchvision's way of saying: no folder in it
        raise ValueError(f"{folder} holds no folder: expected {folder}/<class>/<image>") from None
    samples = [(Path(path), found.classes[i]) for path, i in found.samples]
    for name in found.classes:
        if not any(own == name for _, own in samples):
            raise ValueError(f"{folder / name} holds no image ({' '.join(IMG_EXTENSIONS)})")
    return samples, found.classes


def _common_form(paths: Sequence[Path]) -> tuple[tuple[int, int], str]:
    """The (width, height) and Pillow mode that all images are brought to; reads only their headers."""
    sizes, modes = Counter[tuple[int, int]](), set()
    for path in paths:
        with _reading(path) as image:
            sizes[image.size] += 1
            modes.add(image.mode)
    low, high = SIDES
    width, height = next(iter(sizes))
    if len(sizes) > 1 or min(width, height) < low or max(width, height) > high:
        shorter = Counter({size: sum(n for other, n in sizes.items() if min(other) == min(size)) for size in sizes})
        width = height = max(low, min(high, min(shorter.most_common(1)[0][0])))
    return (width, height), "L" if modes <= GREY else "RGB"


def _loader(samples: Sequence[tuple[Path, str]], classes: Sequence[str], size: tuple[int, int], mode: str,
            batch_size: int, device: torch.device | str | None, is_train: bool) -> TensorLoader:
    images = torch.empty(len(samples), 1 if mode == "L" else 3, size[1], size[0], dtype=torch.uint8)
    for i, (path, _) in enumerate(samples):
        images[i] = _decode(path, size, mode)
    labels = torch.tensor([classes.index(name) for _, name in samples])
    batch_size = min(batch_size, max(8, len(samples) // 8))  # a small set still makes several steps an epoch
    has_single = len(samples) % batch_size == 1  # BatchNorm cannot train on a last batch of one
    return TensorLoader(images, labels, batch_size=batch_size, shuffle=is_train, transform=_as_float,
                        device=device, drop_last=is_train and has_single)


def _decode(path: Path, size: tuple[int, int], mode: str) -> Tensor:
    from PIL import Image, ImageOps

    with _reading(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # Pillow would make everything from 255 up white
            upright = Image.fromarray((np.array(upright) // 256).astype(np.uint8))
        if "transparency" in upright.info:  # a palette's: Pillow wants it spelt out
            upright = upright.convert("RGBA")
        upright = upright.convert(mode)
        if upright.size != size:
            upright = upright.resize(size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(upright)).reshape(size[1], size[0], -1).permute(2, 0, 1)


@contextmanager
def _reading(path: Path) -> "Iterator[Image]":
    """An open image; whatever goes wrong with it is one ValueError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the image {path}: {reason}") from error


def _as_float(batch: tuple[Tensor, ...]) -> Batch:
    images, labels = batch
    return images.float() / 255, labels
