"""From listed pictures and their form to loaders: kept in memory where they fit, else read anew in each epoch."""
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import in_memory
from ..data.dataloaders import DataLoaders
from ..data.loader import carrying
from ..data.tensor_loader import TensorLoader
from ..show.screen import say
from ..show.tables import listed
from .augment import BatchTransform, augmentation
from .form import WAY_OUT, ImageForm
from .listing import Listing, class_numbers, sample_of
from .loaders import ImageDataLoaders
from .options import Options

BROKEN = -1  # the class of a picture that could not be read
MEASURED = 512  # pictures, at most, whose mean and spread stand for all
STREAMED = 32  # and of those that are not kept in memory


class Pictures(NamedTuple):
    """Pictures in memory, uint8 (n, channels, height, width), and their class numbers, int64 (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Formed(Dataset[tuple[Tensor, int]]):
    """Samples (picture, class number) in the form that a model takes.

    marks: a picture that cannot be read is black and of the class -1, instead of an error.
    """

    samples: Any
    form: ImageForm
    are_files: bool = False
    marks: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture, label = sample_of(self.samples, i)
        try:
            return self.form.read(picture), int(label)
        except ValueError as error:
            if self.marks:
                return torch.zeros(self.form.channels, *self.form.size, dtype=torch.uint8), BROKEN
            if self.are_files:
                error.add_note(WAY_OUT)
            raise


def make_loaders(listing: Listing, form: ImageForm, options: Options) -> ImageDataLoaders:
    """Loaders of what is listed, in `form`; the normalisation that it lacks is that of the training pictures."""
    memory = options.memory_for(sum(map(len, listing.parts)), form)
    if memory is not None or listing.skip_broken:
        listing, pictures = _read(listing, form, memory, options)
    if memory is not None:
        dls = of_pictures(pictures, listing.classes, form, options)
    else:
        data, *more = (Formed(part, form, listing.are_files) for part in listing.parts)
        classes, n = listing.classes or class_numbers(listing.parts), len(data)
        made = DataLoaders.from_datasets(data, *more, batch_size=options.batch_size_for(n),
                                         num_workers=options.num_workers)
        dls = _transformed(made.train, made.valid, classes, form, options,
                           lambda: torch.stack([data[i][0] for i in range(0, n, -(-n // STREAMED))]))
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
          ) -> tuple[Listing, list[Pictures]]:
    """The listing without files that cannot be read, and the pictures of each part, read once into `memory`.

    memory: None only looks which files can be read. These are marked, as an error of a worker process would have many
    lines; unless they are left out, the first is read again here, for its error.
    """
    if memory is None:
        form = replace(form, size=(1, 1), resize="squish")  # of each picture one pixel is kept
        if options.verbose:
            say(f"reading {sum(map(len, listing.parts)):,} pictures, to leave out those that cannot be read")
    data_sets = {name: Formed(part, form, listing.are_files, marks=listing.are_files)
                 for name, part in zip(("train", "valid"), listing.parts, strict=False)}
    kept = in_memory.read_all(data_sets, memory or torch.device("cpu"), options.num_workers,
                              options.verbose and memory is not None)
    pictures = [Pictures(*columns) for _, columns in kept]
    if not listing.are_files:
        return listing, pictures
    broken = [samples[i] for samples, part in zip(listing.parts, pictures, strict=True)
              for i in (part.labels == BROKEN).nonzero().flatten().tolist()]
    if not broken:
        return listing, pictures
    if not listing.skip_broken:
        _ = Formed(broken, form, are_files=True)[0]
    readable = [part.labels != BROKEN for part in pictures]
    return listing.without(sample.path for sample in broken), [
        Pictures(part.images[rows], part.labels[rows]) for part, rows in zip(pictures, readable, strict=True)
        if rows.any()]


def of_pictures(parts: Sequence[Pictures], classes: Sequence[str] | None, form: ImageForm, options: Options
                ) -> ImageDataLoaders:
    """Loaders of pictures in memory, of training and perhaps of validation. classes: None for numbers.

    A last training batch of one picture, of which BatchNorm cannot take statistics, is left out. Raises ValueError for
    a label that is no class.
    """
    low, high = (int(label) for label in torch.cat([part.labels for part in parts]).aminmax())
    if classes is None and high >= sum(len(part.labels) for part in parts):
        raise ValueError(f"labels must be class numbers from 0 without gaps, got {high} with fewer pictures. Pass "
                         "classes=, the names of all, if that is meant.")
    classes = [str(i) for i in range(high + 1)] if classes is None else classes
    if low < 0 or high >= len(classes):
        raise ValueError(f"labels must be numbers from 0 to {len(classes) - 1}, as there are {len(classes)} classes, "
                         f"got {low if low < 0 else high}.")
    n = len(parts[0].labels)
    size = options.batch_size_for(n)
    train = TensorLoader(*parts[0], batch_size=size, shuffle=True, drop_last=n > size and n % size == 1)
    valid = TensorLoader(*parts[1], batch_size=size) if len(parts) > 1 else None
    return _transformed(train, valid, classes, form, options, lambda: parts[0].images)


def _transformed(train: Any, valid: Any, classes: Sequence[str], form: ImageForm, options: Options,
                 some: Callable[[], Tensor]) -> ImageDataLoaders:
    """Loaders of raw batches become those of what a model takes.

    some: makes training pictures, whose mean and spread normalise where the options give none.
    """
    if options.mean is None:
        mean, std = measured(some())
        form = replace(form, mean=mean, std=std)
    transform = BatchTransform(form, augmentation(options.augment, form))
    return ImageDataLoaders(carrying(train, transform), valid and carrying(valid, transform.plain), list(classes),
                            form=form)


def measured(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel of uint8 pictures, in 0..1, of up to 512 of them.

    >>> measured(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    some = images[::-(-len(images) // MEASURED)].cpu().double() / 255
    mean, std = some.mean((0, 2, 3)).tolist(), some.std((0, 2, 3), correction=0).tolist()
    # pictures of one colour have no spread
    return tuple(round(value, 4) for value in mean), tuple(max(0.01, round(value, 4)) for value in std)
