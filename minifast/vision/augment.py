"""Random augmentation of a batch of pictures where it is, and what makes of raw pictures those that a model takes."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..base.nest import describe
from ..errors import check_callable, check_choice, torchvision_errors
from .form import ImageForm

Augment = Callable[[Tensor], Tensor]
NAMES = ("auto", "photos", "small", "symbols")
SMALL = 64  # pixels: colour pictures up to this size are things in the middle, not photos to be cropped


def augmentation(augment: Any, form: ImageForm) -> Augment | None:
    """What `augment`, a name, a function or None, means for pictures of `form`. Raises ValueError or TypeError.

    "auto" is "symbols" for grey pictures, "small" for colour ones up to 64x64, else "photos".

    >>> augmentation("auto", ImageForm((32, 32))), augmentation(None, ImageForm((32, 32)))
    (SmallCrops(share=0.125, flips=True), None)
    """
    if augment is None:
        return None
    if not isinstance(augment, str):
        return check_callable("augment", augment, "a function of a float batch (n, channels, height, width) in 0..1, "
                                                  f"None or one of {', '.join(map(repr, NAMES))}")
    if check_choice("augment", augment, NAMES) == "auto":
        augment = "symbols" if form.channels == 1 else "small" if max(form.size) <= SMALL else "photos"
    return _photos(form.size) if augment == "photos" else SmallCrops() if augment == "small" else SmallTurns()


@dataclass(frozen=True)
class PerPicture:
    """Calls `transform` once for each picture of a batch: those of torchvision draw their numbers once in a call."""

    transform: Any

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([self.transform(image) for image in images])


def _photos(size: tuple[int, int]) -> PerPicture:
    """Crops of 60 to 100 % of a photo, mirrored or not, a little lighter or darker."""
    with torchvision_errors():
        from torchvision.transforms import v2
    proportions = size[1] / size[0]
    return PerPicture(v2.Compose([
        v2.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(0.8 * proportions, 1.25 * proportions)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.1)]))


@dataclass(frozen=True)
class SmallCrops:
    """Each picture moved by up to `share` of its sides, what is missing mirrored in, and flipped or not."""

    share: float = 0.125
    flips: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        (n, _, height, width), device = images.shape, images.device
        down, across = max(1, round(self.share * height)), max(1, round(self.share * width))
        mode = "reflect" if min(height - down, width - across) > 0 else "replicate"  # nothing to mirror in one pixel
        padded = functional.pad(images, (across, across, down, down), mode=mode)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        rows = torch.randint(2 * down + 1, (n,), device=device)
        columns = torch.randint(2 * across + 1, (n,), device=device)
        moved: Tensor = windows[torch.arange(n, device=device), :, rows, columns]
        return torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, moved.flip(-1), moved) if self.flips else moved


@dataclass(frozen=True)
class SmallTurns:
    """Each picture turned by up to `degrees`, moved by up to `shift` of its sides, and up to `zoom` larger or smaller.

    Never mirrored: signs would become other signs. What is missing has the colour of the edge.
    """

    degrees: float = 10.0
    shift: float = 0.08
    zoom: float = 0.1

    def __call__(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        turn, zoom, across, down = torch.rand(4, n, device=images.device).mul_(2).sub_(1)  # each in -1..1
        turn, zoom = torch.deg2rad(turn * self.degrees), 1 + zoom * self.zoom
        cos, sin = zoom * turn.cos(), zoom * turn.sin()
        # in the coordinates of grid_sample, where each side is 2 long whatever its pixels
        rows = [cos, -sin * (height / width), across * 2 * self.shift,
                sin * (width / height), cos, down * 2 * self.shift]
        points = functional.affine_grid(torch.stack(rows, 1).reshape(n, 2, 3), list(images.shape), align_corners=False)
        return functional.grid_sample(images, points, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class BatchTransform:
    """Of a batch (uint8 images (n, channels, height, width), labels): floats as the model takes them, and the labels.

    Values in 0..1, then `augment` of the whole batch, then the normalisation of `form`. `plain` is the same without
    `augment`: what validation and predictions see. A loader carries it as its `batch_transform`.

    >>> transform = BatchTransform(ImageForm((2, 2), 1), augment=lambda x: 1 - x)
    >>> x, y = transform((torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5)))
    >>> x.unique(), transform.plain((torch.zeros(5, 1, 2, 2, dtype=torch.uint8), y))[0].unique()
    (tensor([1.]), tensor([0.]))
    """

    form: ImageForm
    augment: Augment | None = None

    def __call__(self, batch: Any) -> tuple[Tensor, Any]:
        images, labels = batch
        if self.augment is None:
            return self.form.normalize(images), labels
        values = images.float().div_(255)
        try:
            augmented = self.augment(values)
        except Exception as error:
            error.add_note(f"in augment=, which is called with a float batch {tuple(images.shape)} in 0..1, not with "
                           "one picture: without ToTensor and ToPILImage")
            raise
        is_batch = isinstance(augmented, Tensor) and augmented.is_floating_point()
        if not is_batch or augmented.ndim != 4 or augmented.shape[:2] != images.shape[:2]:
            raise TypeError(f"augment was called with a float batch {tuple(images.shape)} in 0..1 and must give one "
                            f"with as many pictures and channels, got {describe(augmented)}.")
        return self.form.normalize(augmented), labels

    @cached_property
    def plain(self) -> "BatchTransform":
        return self if self.augment is None else replace(self, augment=None)
