"""Pictures in data sets such as torchvision's."""
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..data.classes import check_classes
from ..data.dataloaders import DataLoaders
from ..data.samples import check_data_set
from ..errors import check_number, quoted
from .form import GREY, dtype_of
from .listing import Listing, held_back, sample_of, targets
from .loaders import ImageDataLoaders, make_loaders
from .options import MAX_SIZE, Options

PROBES = 100  # samples of a data set that are examined to choose size and channels


def from_dataset(train: Any, valid: Any = None, *, size: int | Sequence[int] | None = None,
                 batch_size: int | None = None, classes: Sequence[str] | None = None, augment: Any = "auto",
                 resize: str = "crop", channels: int | None = None, mean: Sequence[float] | None = None,
                 std: Sequence[float] | None = None, max_size: int = MAX_SIZE, in_memory: bool | None = None,
                 num_workers: int | None = None, device: torch.device | str | None = None, seed: int = 0,
                 verbose: bool = True) -> ImageDataLoaders:
    """Loaders of data sets such as torchvision's: samples (picture, class number), with len() and [i].

    A picture is an image of Pillow's, a uint8 tensor or array, as `ImageForm.read` takes it. Floats (of a `transform=`
    with `ToTensor`, `Normalize`) are refused, as augmentation and normalisation come after. A data set whose own
    transform is random takes in_memory=False.

    train: the training data.
    valid: the validation data, with the same classes, or a share in 0..1 of `train` that is held back: of each class
        where the data set has `.targets`, else of all. None: no validation.
    classes: their names; None: the data set's `.classes`, also of a Subset, else the numbers.
    The other arguments are those of `image_folders`; for size and channels None looks at up to 100 of the samples.
    Raises TypeError for what is no such data set, ValueError for samples or labels that cannot be used.

    >>> picture = np.zeros((8, 8), dtype=np.uint8)
    >>> from_dataset([(picture, 0), (picture, 1)] * 5, 0.2, classes=["no", "yes"], verbose=False)
    8 training and 2 validation pictures of 2 classes (no, yes), 8x8 pixels, grey
    """
    options = Options(size=size, batch_size=batch_size, augment=augment, resize=resize, channels=channels, mean=mean,
                      std=std, max_size=max_size, in_memory=in_memory, num_workers=num_workers, device=device,
                      seed=seed, verbose=verbose)
    names = None if classes is None else check_classes(classes)
    check_data_set("train", train)
    if isinstance(valid, (int, float)):
        share = check_number("valid", valid, above=0, below=1, example="valid=0.2, or a data set")
        held = held_back(targets(train), len(train), share, seed)
        parts = [Subset(train, rows.nonzero().flatten().tolist()) for rows in (~held, held)]
    else:
        parts = [train] if valid is None else [train, valid]
    sizes, is_grey = _examined(parts)
    own = DataLoaders.from_datasets(*parts, num_workers=0).classes  # of both data sets, if they agree
    listing = Listing(parts, names or (own and list(own)), sizes, is_grey)
    return make_loaders(listing, options.form(listing), options)


def _examined(parts: Sequence[Any]) -> tuple[Counter[tuple[int, int]], bool]:
    """The (width, height) of some training samples, and whether all are grey; samples of all parts are checked."""
    seen = []
    for name, data in zip(("train", "valid"), parts, strict=False):
        n = check_data_set(name, data)
        seen.append([_seen(f"sample {i} of {name}", sample_of(data, i, name)) for i in range(0, n, -(-n // PROBES))])
    return Counter(size for size, _ in seen[0]), all(is_grey for _, is_grey in seen[0])


def _seen(what: str, sample: Any) -> tuple[tuple[int, int], bool]:
    """The (width, height) of the picture of a sample, and whether it is grey."""
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise TypeError(f"{what} must be (picture, class number), got {quoted(sample)}.")
    picture, label = sample
    try:
        number = float(label)
    except (TypeError, ValueError, RuntimeError):
        number = -1.0
    if number < 0 or not number.is_integer():
        raise ValueError(f"{what} must have a class number from 0, got {quoted(label)}.")
    if hasattr(picture, "getbands"):  # an image of Pillow's
        return picture.size, picture.mode in GREY
    if not isinstance(picture, (Tensor, np.ndarray)):
        raise TypeError(f"{what} must be (picture, class number), its picture is {quoted(picture)}. Pass an image of "
                        "Pillow's, or uint8 pixels.")
    if dtype_of(picture) != "uint8" or picture.ndim not in (2, 3):
        raise ValueError(f"{what} holds {dtype_of(picture)} {tuple(picture.shape)} and no uint8 picture: if a "
                         "transform of the data set makes floats, make it without ToTensor, ToDtype and Normalize. "
                         "Augmentation and normalisation come after.")
    shape = picture.shape if isinstance(picture, Tensor) else (*picture.shape[2:], *picture.shape[:2])
    return (shape[-1], shape[-2]), picture.ndim == 2 or shape[0] == 1
