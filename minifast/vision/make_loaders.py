"""Loaders of listed pictures in their form: kept in memory where they fit, else read anew in each epoch."""
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import in_memory
from ..data.dataloaders import DataLoaders
from ..data.feed import feed
from ..data.tensor_loader import TensorLoader
from ..data.torch_loaders import valid_loader
from ..machine.signals import DeferredInterrupt
from ..show.screen import say
from ..show.tables import listed
from .augment import BatchTransform
from .folders import WAY_OUT
from .form import ImageForm
from .listing import Listing, sample_of, targets
from .loaders import ImageDataLoaders, carrying
from .options import Options

BROKEN = -1  # the class of a picture that could not be read
STREAMED = 32  # pictures, not kept in memory, whose mean and spread stand for all


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
    device = options.memory_for(sum(map(len, listing.parts)), form)
    if device is None:
        if listing.skip_broken:
            listing = listing.without(_unreadable(listing, form, options))
        dls = _read_as_it_trains(listing, form, options)
    else:
        parts = _read(listing, form, device, options)
        if listing.are_files:
            listing, parts = _readable(listing, form, parts)
        dls = of_pictures(parts, listing.classes, form, options)
    for loader, files in zip((dls.train, dls.valid), listing.files(), strict=False):
        loader.files = files  # type: ignore[union-attr]
    if options.verbose:
        say(f"{dls!r}; validation: {listing.validation}" if listing.validation else repr(dls))
        for left_out, why in ((listing.others, "no pictures"), (listing.broken, "broken")):
            if left_out:
                say(f"left out, as {why}: {len(left_out):,} file{'s' * (len(left_out) > 1)} "
                    f"({listed([path.name for path in left_out], 3)})")
    return dls


# ---- kept in memory


def _read(listing: Listing, form: ImageForm, device: torch.device, options: Options) -> list[Pictures]:
    """The pictures of each part, read once into the memory of `device`."""
    # an error of a worker process has many lines: files that cannot be read are marked, and read again in this one
    data_sets = [Formed(part, form, marks=listing.are_files) for part in listing.parts]
    kept = in_memory.read_all(dict(zip(("train", "valid"), data_sets, strict=False)), device, options.num_workers,
                              options.verbose)
    return [Pictures(*columns) for _, columns in kept]


def _readable(listing: Listing, form: ImageForm, parts: list[Pictures]) -> tuple[Listing, list[Pictures]]:
    """Both without the files that could not be read. Raises the error of the first if none is to be left out."""
    rows = [part.labels != BROKEN for part in parts]
    broken = [samples[i] for samples, good in zip(listing.parts, rows, strict=True)
              for i in (~good).nonzero().flatten().tolist()]
    if not broken:
        return listing, parts
    if not listing.skip_broken:
        _ = Formed(broken, form, are_files=True)[0]
        raise ValueError(f"cannot read the image {broken[0].path}: only at the second attempt it could be")
    left = [Pictures(part.images[good], part.labels[good]) for part, good in zip(parts, rows, strict=True)]
    return listing.without(sample.path for sample in broken), [part for part in left if len(part.labels)]


def of_pictures(parts: Sequence[Pictures], classes: Sequence[str] | None, form: ImageForm, options: Options
                ) -> ImageDataLoaders:
    """Loaders of pictures in memory, of training and perhaps of validation. classes: None for numbers.

    A last training batch of one picture, of which BatchNorm cannot take statistics, is left out. Raises ValueError for
    a label that is no class.
    """
    low = min(int(part.labels.min()) for part in parts)
    high = max(int(part.labels.max()) for part in parts)
    if classes is None and high >= sum(len(part.labels) for part in parts):
        raise ValueError(f"labels must be class numbers from 0 without gaps, got {high} with fewer pictures. Pass "
                         "classes=, the names of all, if that is meant.")
    classes = [str(i) for i in range(high + 1)] if classes is None else classes
    if low < 0 or high >= len(classes):
        raise ValueError(f"labels must be numbers from 0 to {len(classes) - 1}, as there are {len(classes)} classes, "
                         f"got {low if low < 0 else high}.")
    n = len(parts[0].labels)
    size = options.batch_size_for(n)
    loaders = [TensorLoader(*parts[0], batch_size=size, shuffle=True, drop_last=n > size and n % size == 1),
               *(TensorLoader(*part, batch_size=size) for part in parts[1:])]
    return _transformed(loaders, classes, options.normalized(form, lambda: parts[0].images), options)


# ---- read anew in each epoch


def _unreadable(listing: Listing, form: ImageForm, options: Options) -> list[Path]:
    """The files that cannot be read, found by reading all."""
    samples = [sample for part in listing.parts for sample in part]
    if options.verbose:
        say(f"reading {len(samples):,} pictures, to leave out those that cannot be read")
    loader = valid_loader(Formed(samples, form, marks=True), 64, options.num_workers)
    with closing(feed(loader, torch.device("cpu"), None, DeferredInterrupt(), "the pictures")) as batches:
        labels = [label for _, batch in batches for label in batch.tolist()]
    return [sample.path for sample, label in zip(samples, labels, strict=True) if label == BROKEN]


def _read_as_it_trains(listing: Listing, form: ImageForm, options: Options) -> ImageDataLoaders:
    data_sets = [Formed(part, form, listing.are_files) for part in listing.parts]
    classes = _numbers(listing) if listing.classes is None else listing.classes
    made = DataLoaders.from_datasets(*data_sets, batch_size=options.batch_size_for(len(data_sets[0])),
                                     num_workers=options.num_workers)
    loaders = [loader for loader in (made.train, made.valid) if loader is not None]
    return _transformed(loaders, classes, options.normalized(form, lambda: _some(data_sets[0])), options)


def _some(data_set: Formed) -> Tensor:
    """A few pictures, evenly spaced."""
    return torch.stack([data_set[i][0] for i in range(0, len(data_set), -(-len(data_set) // STREAMED))])


def _numbers(listing: Listing) -> list[str]:
    """The numbers of the classes, where the data sets know them without being read."""
    labels = [label for part in listing.parts for label in targets(part) or ()]
    if not labels:
        raise ValueError("the data set has neither .classes nor .targets, and is not read before training: pass "
                         "classes=, the names of the classes.")
    return [str(i) for i in range(max(labels) + 1)]


def _transformed(loaders: Sequence[Any], classes: Sequence[str], form: ImageForm, options: Options
                 ) -> ImageDataLoaders:
    transform = BatchTransform(form, options.augmentation(form))
    train, valid = (*map(carrying, loaders, (transform, transform.plain)), None)[:2]
    return ImageDataLoaders(train, valid, list(classes), form=form)
