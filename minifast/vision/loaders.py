"""Loaders of pictures that know their classes and the form in which a model takes them."""
import copy
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..base import snapshot
from ..base.batch import Batch
from ..data import in_memory
from ..data.dataloaders import DataLoaders
from ..data.feed import first_batch
from ..data.loader import generators, second_copy
from ..data.tensor_loader import TensorLoader
from ..errors import check_flag
from ..show.tables import listed
from .augment import BatchTransform
from .form import ImageForm
from .options import Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STREAMED = 32  # pictures, not kept in memory, whose mean and spread stand for all


@dataclass(repr=False)
class ImageDataLoaders(DataLoaders):
    """Training and validation pictures with their classes. Made by `image_folders`, `from_dataset`, `from_arrays`.

    train, valid: loaders of batches (uint8 pictures (n, channels, height, width), class numbers (n,)). A Learner sees
    them as its `batch_transform` makes them: floats, augmented in training, normalised. Those of `image_folders` have
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
            x, y = first_batch(second_copy(loader), _place(loader))
        finally:
            restore()
        return x, y

    def show_batch(self, n: int = 9, *, train: bool = True, figure: "Figure | None" = None) -> "Figure":
        """Draw `n` pictures as the model gets them, but for the normalisation, under their classes.

        train: the first of `one_batch`, augmented, so no more than a batch; False: of the validation data, evenly
        spaced. figure: an empty one to draw on. Random generators are left as they were.
        """
        from .show import show_batch
        return show_batch(self, n, train=train, figure=figure)

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> "ImageDataLoaders":
        """The same pictures with another normalisation, e.g. that of pretrained weights; nothing is copied.

        mean, std: of values in 0..1, a number for each channel; empty ones: no normalisation.
        """
        form = dataclasses.replace(self.form, mean=mean, std=std)  # type: ignore[arg-type]  # the form makes tuples

        def renewed(loader: Any) -> Any:
            return loader and _carrying(loader, dataclasses.replace(loader.batch_transform, form=form))

        return dataclasses.replace(self, train=renewed(self.train), valid=renewed(self.valid), form=form)

    def __repr__(self) -> str:
        counts = [f"{len(loader.dataset):,} {name}" for name, loader in (("training", self.train),  # type: ignore[union-attr]
                                                                         ("validation", self.valid)) if loader]
        height, width = self.form.size
        classes = self.classes or ()
        of = f"{len(classes)} class{'es' * (len(classes) != 1)}"
        return (f"{' and '.join(counts)} pictures of {of} ({listed(classes)}), {width}x{height} pixels, "
                f"{'grey' if self.form.channels == 1 else 'colour'}")


class Pictures(NamedTuple):
    """Pictures in memory, uint8 (n, channels, height, width), and their class numbers, int64 (n,)."""

    images: Tensor
    labels: Tensor


def read(data_sets: Sequence[Any], place: torch.device, options: Options) -> list[Pictures]:
    """The pictures of one or two data sets, each read once into the memory of `place`."""
    train, valid = (*data_sets, None)[:2]
    loaders = in_memory.loaders(train, valid, batch_size=1, transform=None, valid_transform=None, device=place,
                                drop_last=False, generator=None, num_workers=options.num_workers,
                                verbose=options.verbose)
    return [Pictures(*loader.tensors) for loader in loaders if loader is not None]


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
    size = options.steps_of(n)
    loaders = [TensorLoader(*parts[0], batch_size=size, shuffle=True, drop_last=n > size and n % size == 1),
               *(TensorLoader(*part, batch_size=size) for part in parts[1:])]
    return _of_loaders(loaders, classes, form, options)


def of_data_sets(data_sets: Sequence[Any], classes: Sequence[str], form: ImageForm, options: Options
                 ) -> ImageDataLoaders:
    """Loaders that read the pictures of training, and perhaps of validation, anew in each epoch."""
    made = DataLoaders.from_datasets(*data_sets, batch_size=options.steps_of(len(data_sets[0])),
                                     num_workers=options.num_workers)
    return _of_loaders([loader for loader in (made.train, made.valid) if loader is not None], classes, form, options)


def _of_loaders(loaders: Sequence[Any], classes: Sequence[str], form: ImageForm, options: Options) -> ImageDataLoaders:
    transform = BatchTransform(form, options.augmentation(form))
    train, valid = (*(_carrying(loader, each) for loader, each in zip(loaders, (transform, transform.plain),
                                                                      strict=False)), None)[:2]
    return ImageDataLoaders(train, valid, list(classes), form=form)


def some(data: Any) -> Tensor:
    """A few pictures of a data set, evenly spaced."""
    return torch.stack([data[i][0] for i in range(0, len(data), -(-len(data) // STREAMED))])


def normalized_as(form: ImageForm, loader: Iterable[Batch]) -> Iterable[Batch]:
    """The loader itself, or, if it is one of pictures with another mean and std, a copy with those of `form`."""
    own = getattr(loader, "batch_transform", None)
    if not isinstance(own, BatchTransform) or own.form.channels != form.channels:
        return loader
    wanted = dataclasses.replace(own.form, mean=form.mean, std=form.std)
    return loader if own.form == wanted else _carrying(loader, dataclasses.replace(own, form=wanted))


def _carrying(loader: Iterable[Batch], transform: BatchTransform) -> Any:
    twin: Any = second_copy(loader) if isinstance(loader, DataLoader) else copy.copy(loader)
    twin.batch_transform = transform
    return twin


def _place(loader: Any) -> torch.device:
    """Where the batches of a loader are."""
    return loader.tensors[0].device if isinstance(loader, TensorLoader) else torch.device("cpu")
