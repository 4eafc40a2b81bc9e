"""Pictures that are in memory already."""
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.classes import check_classes
from ..errors import check_number, quoted
from .form import AS_UINT8, ImageForm, dtype_of
from .listing import Listing, held_back
from .loaders import ImageDataLoaders, Pictures, of_pictures
from .options import Options


def from_arrays(images: Any, labels: Any, valid: Any = 0.2, *, size: int | Sequence[int] | None = None,
                batch_size: int | None = None, classes: Sequence[str] | None = None, augment: Any = "auto",
                resize: str = "crop", channels: int | None = None, mean: Sequence[float] | None = None,
                std: Sequence[float] | None = None, device: torch.device | str | None = None, seed: int = 0
                ) -> ImageDataLoaders:
    """Loaders of pictures that are in memory.

    images: uint8, an array (n, height, width) or (n, height, width, channels) or a tensor (n, height, width) or (n,
        channels, height, width), of 1, 3 or 4 channels (the fourth is dropped).
    labels: (n,) class numbers from 0, without gaps unless `classes` names them all.
    valid: (images, labels) for validation; or a share in 0..1 of each class that is held back; None: no validation.
    size: None is that of the pictures.
    classes: their names; None: their numbers.
    batch_size, augment, resize, channels, mean, std, device, seed: as in `image_folders`.

    Raises TypeError or ValueError for what are no such arrays.

    >>> images, labels = np.zeros((10, 8, 8), dtype=np.uint8), np.arange(10) % 2
    >>> dls = from_arrays(images, labels, classes=["even", "odd"])
    >>> dls
    8 training and 2 validation pictures of 2 classes (even, odd), 8x8 pixels, grey
    >>> dls.one_batch()[0].shape
    torch.Size([8, 1, 8, 8])
    """
    parts = [_arrays("images", images, "labels", labels)]
    _, n_channels, height, width = parts[0].images.shape
    options = Options(size=(height, width) if size is None else size, batch_size=batch_size, augment=augment,
                      resize=resize, channels=channels, mean=mean, std=std, device=device, seed=seed)
    names = None if classes is None else check_classes(classes)
    if isinstance(valid, (tuple, list)) and len(valid) == 2:
        parts.append(_arrays("valid[0]", valid[0], "valid[1]", valid[1]))
    elif isinstance(valid, (int, float)):
        share = check_number("valid", valid, above=0, below=1, example="valid=0.2, or (images, labels)")
        held = held_back(parts[0].labels.tolist(), len(parts[0].labels), share, seed)
        parts = [Pictures(parts[0].images[rows], parts[0].labels[rows]) for rows in (~held, held)]
    elif valid is not None:
        raise TypeError(f"valid must be (images, labels), a share in 0..1 or None, got {quoted(valid)}.")
    if names is None:
        _check_numbers(parts)
    listing = Listing(parts, names, Counter({(width, height): 1}), is_grey=n_channels == 1)
    form = options.form(listing)
    memory = options.memory_for(sum(len(part.labels) for part in parts), form) or torch.device("cpu")
    parts = [Pictures(_in_form(part.images, form).to(memory), part.labels.to(memory)) for part in parts]
    return of_pictures(parts, names, form, options)


def _arrays(name: str, images: Any, name_of_labels: str, labels: Any) -> Pictures:
    """`images` as uint8 (n, channels, height, width), `labels` as int64 (n,); or what is wrong with them."""
    order, turned = "(n, channels, height, width)", "permute(0, 3, 1, 2)"
    pixels: Any = images
    if isinstance(images, np.ndarray):
        order, turned = "(n, height, width, channels)", "transpose(0, 2, 3, 1)"
        pixels = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images
    elif not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a uint8 array or tensor of pictures, got {quoted(images)}.")
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels
    is_uint8 = dtype_of(images) == "uint8"
    if not is_uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3, 4) or 0 in pixels.shape:
        is_turned = pixels.ndim == 4 and pixels.shape[3 if pixels is images else 2] in (1, 3, 4)
        hint = f" Pass x.{turned}." * is_turned if is_uint8 else f" {AS_UINT8}"
        raise ValueError(f"{name} must be uint8 of shape (n, height, width) or {order} with 1, 3 or 4 channels, got "
                         f"{_described(images)}.{hint}")
    pixels = torch.as_tensor(np.ascontiguousarray(pixels) if isinstance(pixels, np.ndarray) else pixels)
    try:
        numbers, hint = torch.as_tensor(labels), ""
    except (TypeError, ValueError, RuntimeError):  # texts, objects, lists of different lengths
        numbers, hint = torch.empty(0), " Names: classes, labels = np.unique(names, return_inverse=True)."
    if numbers.is_floating_point() or numbers.is_complex() or tuple(numbers.shape) != (len(pixels),):
        raise ValueError(f"{name_of_labels} must be {len(pixels)} class numbers, one for each picture, got "
                         f"{_described(labels)}.{hint}")
    return Pictures(pixels.detach(), numbers.long())


def _described(values: Any) -> str:
    """The dtype and shape of an array, as its numbers would not say what is wrong; anything else as it is."""
    return f"{dtype_of(values)} {tuple(values.shape)}" if isinstance(values, (np.ndarray, Tensor)) else quoted(values)


def _check_numbers(parts: Sequence[Pictures]) -> None:
    """Raise ValueError for class numbers that leave some out, as those from 1 do."""
    seen = parts[0].labels.unique().tolist()
    highest = max(int(part.labels.max()) for part in parts)
    if seen[0] >= 0 and highest >= len(seen):
        missing = next(i for i in range(highest + 1) if i >= len(seen) or seen[i] != i)
        raise ValueError(f"no training picture has the class number {missing}, and the highest is {highest}. Number "
                         "the classes from 0 without gaps (np.unique(labels, return_inverse=True)), or pass classes=, "
                         "the names of all.")


def _in_form(images: Tensor, form: ImageForm) -> Tensor:
    if images.shape[1:] == (form.channels, *form.size):
        return images.contiguous()
    return torch.stack([form.read(image) for image in images])
