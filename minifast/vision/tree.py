"""Pictures in files, one folder for each class."""
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.feed import feed
from ..data.torch_loaders import valid_loader
from ..errors import check_flag, check_number, check_path, check_text
from ..machine.signals import DeferredInterrupt
from ..show.screen import say
from ..show.tables import listed
from . import folders
from .folders import Sample
from .form import ImageForm
from .loaders import ImageDataLoaders, Pictures, of_data_sets, of_pictures, read, some
from .options import MAX_SIZE, Options

BROKEN = -1  # the class of a picture that could not be read


@dataclass(frozen=True)
class Files(Dataset[tuple[Tensor, int]]):
    """Pictures in files; `marks`: one that cannot be read is black and of the class -1, instead of an error."""

    samples: Sequence[Sample]
    form: ImageForm
    marks: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.samples[i]
        try:
            return self.form.read(path), label
        except ValueError as error:
            if not self.marks:
                error.add_note(folders.WAY_OUT)
                raise
            return torch.zeros(self.form.channels, *self.form.size, dtype=torch.uint8), BROKEN


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
    root = Path(check_path("path", path)).expanduser()
    check_flag("skip_broken", skip_broken)
    if valid is not None and not isinstance(valid, str):
        valid = check_number("valid", valid, above=0, below=1, example="valid=0.2, or the name of a folder")
    options = Options(size=size, batch_size=batch_size, augment=augment, resize=resize, channels=channels, mean=mean,
                      std=std, max_size=max_size, in_memory=in_memory, num_workers=num_workers, device=device,
                      seed=seed, verbose=verbose)
    found = folders.find(root, check_text("train", train), valid, seed, skip_broken)
    headers = folders.read_headers([path for path, _ in (*found.train, *found.valid)], skip_broken)
    broken = set(headers.broken)
    parts = _without(found, broken)
    form = options.form(headers.sizes, headers.is_grey)
    place = options.place(sum(map(len, parts)), form)
    if place is None:
        if skip_broken:
            broken.update(path for part in parts for path in _unreadable(Files(part, form, marks=True), options))
            parts = _without(found, broken)
        data_sets = [Files(part, form) for part in parts]
        form = options.normalized(form, lambda: some(data_sets[0]))
        dls = of_data_sets(data_sets, found.classes, form, options)
    else:
        kept = read([Files(part, form, marks=True) for part in parts], place, options)
        kept = [_readable(pictures, part, form, skip_broken, broken)
                for pictures, part in zip(kept, parts, strict=True)]
        parts = _without(found, broken)
        form = options.normalized(form, lambda: kept[0].images)
        dls = of_pictures([pictures for pictures in kept if len(pictures.labels)], found.classes, form, options)
    for loader, part in zip((dls.train, dls.valid), parts, strict=False):
        loader.files = [os.fspath(path) for path, _ in part]  # type: ignore[union-attr]
    if verbose:
        say(f"{dls!r}; validation: {found.validation}")
        for files, why in ((found.others, "no pictures"), (sorted(broken), "broken")):
            if files:
                say(f"left out, as {why}: {len(files):,} file{'s' * (len(files) > 1)} "
                    f"({listed([file.name for file in files], 3)})")
    return dls


def _without(found: folders.Found, broken: set[Path]) -> list[list[Sample]]:
    """The samples of training, and of validation if there are any, but for the broken files.

    Raises ValueError for a class that has none left to train on.
    """
    train, valid = ([sample for sample in part if sample.path not in broken] for part in (found.train, found.valid))
    counts = Counter(label for _, label in train)
    for i, name in enumerate(found.classes):
        if not counts[i]:
            raise ValueError(f"no picture of the class {name!r} that it could be trained on can be read")
    return [part for part in (train, valid) if part]


def _unreadable(files: Files, options: Options) -> list[Path]:
    """The files that cannot be read, found by reading all."""
    if options.verbose:
        say(f"reading {len(files):,} pictures, to leave out those that cannot be read")
    loader = valid_loader(files, 64, options.num_workers)
    with closing(feed(loader, torch.device("cpu"), None, DeferredInterrupt(), "the pictures")) as batches:
        labels = [label for _, part in batches for label in part.tolist()]
    return [path for (path, _), label in zip(files.samples, labels, strict=True) if label == BROKEN]


def _readable(pictures: Pictures, samples: Sequence[Sample], form: ImageForm, skip_broken: bool, broken: set[Path]
              ) -> Pictures:
    """The pictures that could be read. The paths of the others go to `broken`, or the first raises its error again."""
    is_broken = pictures.labels.cpu() == BROKEN
    if not is_broken.any():
        return pictures
    paths = [samples[i].path for i in is_broken.nonzero().flatten().tolist()]
    if not skip_broken:
        try:
            form.read(paths[0])
        except ValueError as error:
            error.add_note(folders.WAY_OUT)
            raise
        raise ValueError(f"cannot read the image {paths[0]}: only at the second attempt it could be")
    broken.update(paths)
    rows = (~is_broken).to(pictures.labels.device)
    return Pictures(pictures.images[rows], pictures.labels[rows])
