"""The form in which a model takes pictures, and how any picture is brought to it."""
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import check_choice, check_int, check_items, check_number, quoted
from .decode import from_pixels, opened, upright

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZE = ("crop", "squish", "pad")
OF_A_CHANNEL = "mean=(0.5, 0.5, 0.5): those of 0..255 are to be divided by 255, std too"
MOST_PIXELS = 2**15  # of a side: memory for more is not to be had


@dataclass(frozen=True)
class ImageForm:
    """What a model takes: size, channels and normalisation of a picture.

    size: (height, width) in pixels. channels: 1 (grey) or 3 (RGB). mean, std: of each channel, of values in 0..1;
    empty: no normalisation. resize: "crop" cuts the largest part of the right proportions out of the middle, "squish"
    stretches the whole picture, "pad" fits the whole picture in and leaves black bars. Raises ValueError for any other.

    >>> form = ImageForm((8, 8), 1, mean=(0.5,), std=(0.5,))
    >>> grey = form.read(np.full((20, 30), 255, dtype=np.uint8))
    >>> grey.shape, grey.dtype, form.normalize(grey).max()
    (torch.Size([1, 8, 8]), torch.uint8, tensor(1.))
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: str = "crop"

    def __post_init__(self) -> None:
        if len(check_items("size", self.size, "(height, width) in pixels", "size=(224, 224)")) != 2:
            raise ValueError(f"size must be (height, width) in pixels, got {quoted(self.size)}.")
        height, width = map(check_int, ("height", "width"), self.size, (1, 1), (MOST_PIXELS, MOST_PIXELS))
        if check_int("channels", self.channels) not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels}.")
        check_choice("resize", self.resize, RESIZE)
        mean, std = (check_items(name, getattr(self, name), "a list of numbers") for name in ("mean", "std"))
        if (len(mean), len(std)) not in ((0, 0), (self.channels, self.channels)):
            raise ValueError(f"mean and std must have a number for each of {self.channels} channels, got {len(mean)} "
                             f"and {len(std)}. Without normalisation pass none.")
        values = {"size": (height, width), "channels": int(self.channels),
                  "mean": tuple(check_number("mean", m, minimum=0, maximum=1, example=OF_A_CHANNEL) for m in mean),
                  "std": tuple(check_number("std", s, above=0) for s in std)}
        for name, value in values.items():  # equal forms are equal, whatever kinds of numbers they were made of
            object.__setattr__(self, name, value)

    def read(self, picture: Any) -> Tensor:
        """Any picture in this form: uint8 (channels, height, width), upright as its EXIF data say, not normalised.

        picture: a path, an image of Pillow's in any mode (palette, RGBA, CMYK, 16 bits, ...), a uint8 array (height,
        width[, channels]) or a uint8 tensor (channels, height, width). Raises ValueError that names the file if it
        cannot be read, TypeError for what is no picture.
        """
        from PIL import Image

        if isinstance(picture, Image.Image):
            return self._fitted(picture)
        if not isinstance(picture, (str, os.PathLike)):
            return self._fitted(from_pixels(picture))
        with opened(picture) as image:
            enough = 2 * max(self.size)  # a JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size
            image.draft(None, (enough, enough))
            return self._fitted(image)

    def _fitted(self, image: "Image") -> Tensor:
        from PIL import Image, ImageOps

        image, (height, width) = upright(image, self.channels), self.size
        if image.size != (width, height):
            resize: Any = {"crop": ImageOps.fit, "pad": ImageOps.pad, "squish": Image.Image.resize}[self.resize]
            image = resize(image, (width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).reshape(height, width, self.channels).permute(2, 0, 1).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """float32 pictures as the model takes them: (values in 0..1 - mean) / std, of each channel.

        images: (channels, height, width) or (n, channels, height, width), uint8, or floats that are in 0..1 already.
        Raises ValueError for another number of channels.
        """
        if images.ndim not in (3, 4) or images.shape[-3] != self.channels:
            raise ValueError(f"pictures must be of shape (n, {self.channels}, height, width), got "
                             f"{tuple(images.shape)}.")
        values = images.float() if images.is_floating_point() else images.float().div_(255)
        if not self.mean:
            return values
        return (values - _per_channel(self.mean, values.device)) / _per_channel(self.std, values.device)

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON, of which `from_dict` makes the form again.

        >>> ImageForm.from_dict(ImageForm((8, 9)).as_dict())
        ImageForm(size=(8, 9), channels=3, mean=(), std=(), resize='crop')
        """
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageForm":
        """The form that `as_dict` wrote down. Raises ValueError for what is none."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ValueError(f"a form of pictures must be a dict with {', '.join(sorted(names))}, got "
                             f"{quoted(values)}.")
        return cls(**values)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` as (channels, 1, 1) on the device. Kept: to copy them there for each batch would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)
