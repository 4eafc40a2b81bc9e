"""From listed pictures and their form to loaders: kept in memory where they fit, else read anew in each epoch."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import in_memory
from ..show.screen import say
from ..show.tables import listed
from .folders import WAY_OUT
from .form import ImageForm
from .listing import Listing, class_numbers, sample_of
from .loaders import ImageDataLoaders, Pictures, of_data_sets, of_pictures
from .options import Options

BROKEN = -1  # the class of a picture that could not be read


@dataclass(frozen=True)
class Formed(Dataset[tuple[Tensor, int]]):
    """Samples (picture, class number) in the form that a model takes."""

    samples: Any
    form: ImageForm
    are_files: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture, label = sample_of(self.samples, i)
        try:
            return self.form.read(picture), int(label)
        except ValueError as error:
            if self.are_files:
                error.add_note(WAY_OUT)
            raise


@dataclass(frozen=True)
class Marked(Dataset[tuple[Tensor, int]]):
    """The same, where a picture that cannot be read is black and of the class -1, instead of an error.

    is_kept: whether anybody wants the pictures; else all are empty.
    """

    pictures: Formed
    is_kept: bool

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        form = self.pictures.form
        try:
            picture, label = self.pictures[i]
        except ValueError:
            picture, label = torch.zeros(form.channels, *form.size, dtype=torch.uint8), BROKEN
        return picture if self.is_kept else picture[:0], label


def make_loaders(listing: Listing, form: ImageForm, options: Options) -> ImageDataLoaders:
    """Loaders of what is listed, in `form`; the normalisation that it lacks is that of the training pictures."""
    memory = options.memory_for(sum(map(len, listing.parts)), form)
    pictures: list[Pictures] = []
    if memory is not None or listing.skip_broken:
        pictures, broken = _read(listing, form, memory, options)
        if broken:
            listing, pictures = listing.without(broken), [part for part in map(_readable, pictures) if len(part.labels)]
    if memory is None:
        classes = listing.classes or class_numbers(listing.parts)
        data_sets = [Formed(part, form, listing.are_files) for part in listing.parts]
        dls = of_data_sets(data_sets, classes, form, options)
    else:
        dls = of_pictures(pictures, listing.classes, form, options)
    if listing.are_files:
        for loader, samples in zip((dls.train, dls.valid), listing.parts, strict=False):
            loader.files = [os.fspath(sample.path) for sample in samples]  # type: ignore[union-attr]
    if options.verbose:
        say(f"{dls!r}; validation: {listing.validation}" if listing.validation else repr(dls))
        for left_out, why in ((listing.others, "no pictures"), (listing.broken, "broken")):
            if left_out:
                say(f"left out, as {why}: {len(left_out):,} file{'s' * (len(left_out) > 1)} "
                    f"({listed([path.name for path in left_out], 3)})")
    return dls


def _read(listing: Listing, form: ImageForm, memory: torch.device | None, options: Options
          ) -> tuple[list[Pictures], list[Path]]:
    """The pictures of each part, read once into `memory`, and the files that cannot be read.

    memory: None keeps the labels only. A file that cannot be read is marked, as an error of a worker process would have
    many lines. Unless such files are left out, the first is read again here, for its error.
    """
    data_sets: list[Any] = [Formed(part, form) for part in listing.parts]
    if listing.are_files:
        data_sets = [Marked(data_set, memory is not None) for data_set in data_sets]
    if memory is None and options.verbose:
        say(f"reading {sum(map(len, data_sets)):,} pictures, to leave out those that cannot be read")
    kept = in_memory.read_all(dict(zip(("train", "valid"), data_sets, strict=False)), memory or torch.device("cpu"),
                              options.num_workers, options.verbose and memory is not None)
    pictures = [Pictures(*columns) for _, columns in kept]
    if not listing.are_files:
        return pictures, []
    broken = [samples[i].path for samples, part in zip(listing.parts, pictures, strict=True)
              for i in (part.labels == BROKEN).nonzero().flatten().tolist()]
    if broken and not listing.skip_broken:
        _ = Formed([(broken[0], 0)], form, are_files=True)[0]
        raise ValueError(f"cannot read the image {broken[0]}: only at the second attempt it could be")
    return pictures, broken


def _readable(part: Pictures) -> Pictures:
    rows = part.labels != BROKEN
    return Pictures(part.images[rows], part.labels[rows])
