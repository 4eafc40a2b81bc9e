"""One picture, whatever it came in, as an image of Pillow's: upright, 8 bits, grey or RGB."""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..errors import quoted

if TYPE_CHECKING:
    from PIL.Image import Image

WAY_OUT = "skip_broken=True leaves out the files that cannot be read"  # a note: a command line has no such argument
AS_UINT8 = "Floats in 0..1: pass (255 * x).round() as uint8."
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"}  # Pillow's modes without colour
# What phones and cameras write and Pillow cannot read, and what helps.
FOREIGN = {
    **dict.fromkeys((".heic", ".heif"), "HEIC, which Pillow cannot read: export it as JPEG (an iPhone writes JPEG with "
                    "Settings, Camera, Formats, Most Compatible)"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw"),
                    "the raw data of a camera, which Pillow cannot read: export it as JPEG"),
    ".svg": "SVG, a drawing without pixels: export it as PNG",
    ".avif": "AVIF, which Pillow reads from 11.3 on: update it, or export the picture as JPEG",
    ".jxl": "JPEG XL, which Pillow cannot read: export it as JPEG",
}  # fmt: skip


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
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
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
    """A uint8 array (height, width[, channels]) or tensor (channels, height, width) as an image of Pillow's.

    1, 3 or 4 channels: grey, RGB, RGBA. Raises TypeError for another kind, ValueError for another form.
    """
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
