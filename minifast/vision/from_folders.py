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

    path: holds `train/<class>/...` and `valid/<class>/...`, or one tree `<class>/...`. Links are followed; hidden files
        and what systems leave behind are passed over, other files that are no pictures too (and said).
    size: a side or (height, width), in pixels, to which all pictures are brought; None: the size that all have, else
        a square with the shorter side of most, none longer than `max_size`.
    batch_size: None is 64, or less for a small set.
    train: the name of the folder with the training pictures.
    valid: the name of that for validation, or the share of each class, in 0..1, that is held back; None: the folder
        valid or val if there is one, else 0.2. What is held back depends on the names of the files and `seed` only.
    augment: of training batches: "auto" chooses by the kind of picture ("photos", "small" or "symbols"); None: none;
        or a function of a whole float batch (n, channels, height, width) in 0..1, where it is, that gives such a batch.
    resize: how they come to that size, "crop", "squish" or "pad": see `ImageForm`.
    channels: 1 or 3; None: 1 if all pictures are grey.
    mean, std: of each channel, in 0..1, for the normalisation; None: those of the training pictures; (): none.
    max_size: the largest side that is chosen, in pixels.
    skip_broken: leave out files that cannot be read, and say so, instead of an error that names the first. All are
        read for it. Without it, a file that is not kept in memory and is damaged behind its beginning is an error only
        when it is trained on.
    in_memory: True decodes all pictures once, now, and keeps them on `device` if they fit, else on the CPU; False
        decodes them in each epoch; None: as they fit.
    num_workers: processes that decode; None chooses.
    device: where pictures are kept; None: where a Learner trains.
    seed: of what is held back.
    verbose: say what was found.

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
