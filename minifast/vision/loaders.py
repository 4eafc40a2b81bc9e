"""From listed pictures and their form to loaders: kept in memory where they fit, else read anew in each epoch."""
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..base import snapshot
from ..base.batch import Batch
from ..data import in_memory
from ..data.dataloaders import DataLoaders
from ..data.feed import first_batch
from ..data.loader import generators, second_copy, with_transform
from ..data.tensor_loader import TensorLoader
from ..errors import check_flag, check_int
from ..show.pictures import grid, to_pictures
from ..show.screen import say
from ..show.tables import listed
from .augment import BatchTransform, augmentation
from .form import WAY_OUT, ImageForm
from .listing import Listing, class_numbers, sample_of
from .options import Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BROKEN = -1  # the class of a picture that could not be read
MEASURED = 512  # pictures, at most, whose mean and spread stand for all
STREAMED = 32  # and of those that are not kept in memory


class Pictures(NamedTuple):
    """Pictures in memory, uint8 (n, channels, height, width), and their class numbers, int64 (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(repr=False)
class ImageDataLoaders(DataLoaders):
    """Training and validation pictures with their classes. Made by `image_folders`, `from_dataset`, `from_arrays`.

    train, valid: loaders of batches (uint8 pictures (n, channels, height, width), class numbers (n,)). A Learner sees
    what their `batch_transform` makes of them: floats, augmented in training, normalised. Those of `image_folders` have
    `files`, the paths of their pictures. classes: their names. form: the size, channels and normalisation.
    """

    form: ImageForm = field(kw_only=True)

    def one_batch(self, *, train: bool = True) -> tuple[Tensor, Tensor]:
        """A batch as a model takes it: (pictures float32 (n, channels, height, width), class numbers (n,)).

        Of the training data it is the first one of a pass that began now, augmented. Random generators are left as
        they were. Raises ValueError if there is no validation data.
        """
        loader: Any = self.train if check_flag("train", train) else self.valid
        if loader is None:
            raise ValueError("there is no validation data: pass train=True.")
        restore = snapshot.rng(generators(loader))
        try:
            device = loader.tensors[0].device if isinstance(loader, TensorLoader) else torch.device("cpu")
            return first_batch(second_copy(loader), device)  # type: ignore[no-any-return]
        finally:
            restore()

    def show_batch(self, n: int = 9, *, train: bool = True, figure: "Figure | None" = None) -> "Figure":
        """Draw `n` pictures as the model gets them, but for the normalisation, under their classes.

        train: the first of `one_batch`, augmented, so no more than a batch; False: of the validation data, evenly
        spaced. figure: an empty one to draw on. Random generators are left as they were.
        """
        n = check_int("n", n)
        if check_flag("train", train) or self.valid is None:  # without validation data one_batch says so
            x, y = self.one_batch(train=train)
        else:
            x, y = _spread(self.valid, n)
        classes = self.classes or ()
        titles = [classes[label] if label < len(classes) else str(label) for label in y[:n].tolist()]
        return grid(list(to_pictures(x[:n], self.form.mean, self.form.std)), titles, figure=figure)

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> "ImageDataLoaders":
        """The same pictures with another normalisation, e.g. that of pretrained weights; nothing is copied.

        mean, std: of values in 0..1, a number for each channel; empty ones: no normalisation.
        """
        form = replace(self.form, mean=mean, std=std)  # type: ignore[arg-type]  # the form makes tuples

        loaders: tuple[Any, Any] = self.train, self.valid
        train, valid = (loader and with_transform(loader, replace(loader.batch_transform, form=form))
                        for loader in loaders)
        return replace(self, train=train, valid=valid, form=form)

    def __repr__(self) -> str:
        loaders: dict[str, Any] = {"training": self.train, "validation": self.valid}
        counts = " and ".join(f"{len(loader.dataset):,} {name}" for name, loader in loaders.items() if loader)
        (height, width), classes = self.form.size, self.classes or ()
        return (f"{counts} pictures of {len(classes)} class{'es' * (len(classes) != 1)} ({listed(classes)}), "
                f"{width}x{height} pixels, {'grey' if self.form.channels == 1 else 'colour'}")


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
    """Loaders of pictures in memory, of training and perhaps of validation. classes: None for numbers."""
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
    # BatchNorm cannot take statistics of a last batch of one picture
    train = TensorLoader(*parts[0], batch_size=size, shuffle=True, drop_last=n > size and n % size == 1)
    valid = TensorLoader(*parts[1], batch_size=size) if len(parts) > 1 else None
    return _transformed(train, valid, classes, form, options, lambda: parts[0].images)


def _transformed(train: Any, valid: Any, classes: Sequence[str], form: ImageForm, options: Options,
                 some: Callable[[], Tensor]) -> ImageDataLoaders:
    """Loaders of what a model takes; some: makes pictures whose mean and spread normalise if the options give none."""
    if options.mean is None:
        mean, std = measured(some())
        form = replace(form, mean=mean, std=std)
    transform = BatchTransform(form, augmentation(options.augment, form))
    valid = valid and with_transform(valid, transform.plain)
    return ImageDataLoaders(with_transform(train, transform), valid, list(classes), form=form)


def measured(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel of uint8 pictures, in 0..1, of up to 512 of them.

    >>> measured(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    some = images[::-(-len(images) // MEASURED)].cpu().double() / 255
    std, mean = torch.std_mean(some, (0, 2, 3), correction=0)
    std = std.clamp(min=0.01)  # pictures of one colour have no spread
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())


def normalized_as(form: ImageForm, loader: Iterable[Batch]) -> Iterable[Batch]:
    """The loader itself, or, if its pictures have another mean and std, a copy with those of `form`."""
    own = getattr(loader, "batch_transform", None)
    if not isinstance(own, BatchTransform) or own.form.channels != form.channels:
        return loader
    wanted = replace(own.form, mean=form.mean, std=form.std)
    twin: Iterable[Batch] = loader if own.form == wanted else with_transform(loader, replace(own, form=wanted))
    return twin


def _spread(loader: Any, n: int) -> tuple[Tensor, Tensor]:
    """`n` samples of a loader as the model takes them, evenly spaced: the first ones are often all of one class."""
    data = loader.dataset
    n = min(n, len(data))
    images, labels = zip(*(data[i * len(data) // n] for i in range(n)), strict=True)
    return loader.batch_transform((torch.stack(images), torch.tensor(labels)))  # type: ignore[no-any-return]
