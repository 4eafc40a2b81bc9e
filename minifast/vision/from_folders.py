"""Pictures in files, one folder for each class."""
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import check_flag, check_number, check_path, check_text
from . import folders
from .loaders import ImageDataLoaders
from .make_loaders import make_loaders
from .options import MAX_SIZE, Options


def image_folders(path: str | os.PathLike[str], size: int | Sequence[int] | None = None, batch_size: int | None = None,
                  *, train: str = "train", valid: str | float | None = None, augment: Any = "auto",
                  resize: str = "crop", channels: int | None = None, mean: Sequence[float] | None = None,
                  std: Sequence[float] | None = None, max_size: int = MAX_SIZE, skip_broken: bool = False,
                  in_memory: bool | None = None, num_workers: int | None = None,
                  device: torch.device | str | None = None, seed: int = 0, verbose: bool = True) -> ImageDataLoaders:
    """Loaders of the pictures in a folder that has one folder for each class.

    path: holds `train/<class>/...` and `valid/<class>/...`, or one tree `<class>/...` of which a share is held back for
    validation. train, valid: the names of these folders; valid may be the share of each class instead, in 0..1; None
    takes the folder valid or val if there is one, else 0.2. What is held back depends on the names of the files and on
    `seed` only. Hidden files and what systems leave behind are passed over, other files that are no pictures too (and
    said); links are followed.

    size: of a side or (height, width), in pixels, to which all pictures are brought, as `resize` says ("crop",
    "squish", "pad": see `ImageForm`); None: the size that all have, else a square with the shorter side of most, none
    longer than `max_size`. channels: 1 or 3; None: 1 if all are grey. batch_size: None is 64, or less for a small set.
    mean, std: of each channel, in 0..1, for the normalisation; None: those of the training pictures; (): none.

    augment: of training batches: "auto" chooses by the kind of picture ("photos", "small" or "symbols"); None: none; or
    a function of a whole float batch (n, channels, height, width) in 0..1, where it is, that gives such a batch.

    in_memory: True decodes all pictures once, now, and keeps them on `device` (None: where a Learner trains) if they
    fit, else on the CPU; False decodes them in each epoch; None: as they fit. num_workers: processes that decode; None
    chooses. skip_broken: leave out files that cannot be read, and say so, instead of an error that names the first. It
    takes reading all of them once; without it, of pictures that are not kept in memory, a file that is damaged behind
    its beginning is an error only when it is trained on. verbose: say what was found.

    Raises ValueError with one line that names the folder or file for whatever cannot be used, MemoryError for
    `in_memory=True` that does not fit.
    """
    options = Options(size=size, batch_size=batch_size, augment=augment, resize=resize, channels=channels, mean=mean,
                      std=std, max_size=max_size, in_memory=in_memory, num_workers=num_workers, device=device,
                      seed=seed, verbose=verbose)
    root = Path(check_path("path", path)).expanduser()
    if valid is not None and not isinstance(valid, str):
        valid = check_number("valid", valid, above=0, below=1, example="valid=0.2, or the name of a folder")
    listing = folders.find(root, check_text("train", train), valid, seed, check_flag("skip_broken", skip_broken))
    return make_loaders(listing, options.form(listing), options)
