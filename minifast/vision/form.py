"""The form in which a model takes pictures, and how any picture is brought to it."""
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import check_choice, check_int, check_items, check_number, quoted

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZE = ("crop", "squish", "pad")
OF_A_CHANNEL = "mean=(0.5, 0.5, 0.5): those of 0..255 are to be divided by 255, std too"
MOST_PIXELS = 2**15  # of a side: memory for more is not to be had
WAY_OUT = "skip_broken=True leaves out the files that cannot be read"  # a note: a command line has no such argument
AS_UINT8 = "Floats in 0..1: pass (255 * x).round() as uint8."
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"}  # Pillow's modes without colour
# What phones and cameras write and Pillow cannot read, and what helps.
FOREIGN = {
    **dict.fromkeys((".heic", ".heif"), "HEIC, which Pillow cannot read: export it as JPEG (of an iPhone: Settings, "
                    "Camera, Formats, Most Compatible)"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw"),
                    "the raw data of a camera, which Pillow cannot read: export it as JPEG"),
    ".svg": "SVG, a drawing without pixels: export it as PNG",
    ".avif": "AVIF, which Pillow reads from 11.3 on: update it, or export the picture as JPEG",
    ".jxl": "JPEG XL, which Pillow cannot read: export it as JPEG",
}  # fmt: skip


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

        picture: a path, an image of Pillow's in any mode, a uint8 array (height, width[, channels]) or a uint8 tensor
        (channels, height, width). Raises ValueError for what cannot be read, TypeError for what is no picture.
        """
        if not isinstance(picture, (str, os.PathLike)):
            return self._fitted(picture if hasattr(picture, "getbands") else from_pixels(picture))
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
            raise ValueError(f"pictures must be of shape (n, {self.channels}, height, width), got {(*images.shape,)}.")
        values = images.float() if images.is_floating_point() else images.float().div_(255)
        if not self.mean:
            return values
        return (values - _per_channel(self.mean, values.device)) / _per_channel(self.std, values.device)

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON, of which `from_dict` makes the form again."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageForm":
        """The form that `as_dict` wrote down. Raises ValueError for what is none."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ValueError(f"a form must be a dict with {', '.join(sorted(names))}, got {quoted(values)}.")
        return cls(**values)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` as (channels, 1, 1) on the device. Kept: to copy them there for each batch would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)


@contextmanager
def opened(path: str | os.PathLike[str]) -> "Iterator[Image]":
    """An open image of Pillow's; whatever goes wrong with it in the block is one ValueError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        foreign = FOREIGN.get(Path(path).suffix.lower())
        raise ValueError(f"{path} is {foreign or 'not an image'}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the image {path}: {reason}") from error


def upright(image: "Image", channels: int) -> "Image":
    """`image` upright as its EXIF data say, in Pillow's mode "L" (1 channel) or "RGB" (3).

    What is transparent shows the colour that the file has there. 16 bits lose the lower 8; floats are 0..1 or 0..255.
    """
    from PIL import ImageOps

    turned = _in_8_bits(ImageOps.exif_transpose(image))
    if "transparency" in turned.info:  # a palette's: Pillow wants it spelt out
        turned = turned.convert("RGBA")
    return turned.convert("L" if channels == 1 else "RGB")


def _in_8_bits(image: "Image") -> "Image":
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    from PIL import Image

    pixels = np.array(image)  # Pillow's own conversion would make everything from 255 up white
    if image.mode == "F":
        pixels = pixels * 255 if pixels.max(initial=0) <= 1 else pixels
    elif image.mode != "I" or pixels.max(initial=0) > 255:
        pixels = pixels // 256
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def dtype_of(array: Any) -> str:
    """The dtype of an array or tensor, as messages name it."""
    return str(array.dtype).removeprefix("torch.")


def from_pixels(picture: Any) -> "Image":
    """A uint8 array (height, width[, channels]) or tensor (channels, height, width) as an image: grey, RGB or RGBA."""
    from PIL import Image

    if isinstance(picture, Tensor):
        wanted = "(channels, height, width)"
        pixels = picture.detach().cpu().movedim(0, -1).numpy() if picture.ndim == 3 else None
    elif isinstance(picture, np.ndarray):
        wanted = "(height, width) or (height, width, channels)"
        pixels = picture[..., None] if picture.ndim == 2 else picture if picture.ndim == 3 else None
    else:
        raise TypeError("a picture must be a path, an image of Pillow's, a uint8 array (height, width[, channels]) or "
                        f"a uint8 tensor (channels, height, width), got {quoted(picture)}.")
    if pixels is None or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape or pixels.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 of shape {wanted} with 1, 3 or 4 channels, got "
                         f"{dtype_of(picture)} {tuple(picture.shape)}. {AS_UINT8}")
    return Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))
