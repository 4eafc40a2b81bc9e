"""Loaders of pictures that know their classes and the form in which a model takes them."""
import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..base import snapshot
from ..base.batch import Batch
from ..data.dataloaders import DataLoaders
from ..data.feed import first_batch
from ..data.loader import generators, second_copy
from ..data.tensor_loader import TensorLoader
from ..errors import check_flag, check_int
from ..show.pictures import grid, to_pictures
from ..show.tables import listed
from .augment import BatchTransform, augmentation
from .form import ImageForm
from .options import Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED = 512  # pictures, at most, whose mean and spread stand for all
STREAMED = 32  # and of those that are not kept in memory


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
            device = loader.tensors[0].device if isinstance(loader, TensorLoader) else torch.device("cpu")
            x, y = first_batch(second_copy(loader), device)
        finally:
            restore()
        return x, y

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
        form = dataclasses.replace(self.form, mean=mean, std=std)  # type: ignore[arg-type]  # the form makes tuples

        def renewed(loader: Any) -> Any:
            return loader and carrying(loader, dataclasses.replace(loader.batch_transform, form=form))

        return dataclasses.replace(self, train=renewed(self.train), valid=renewed(self.valid), form=form)

    def __repr__(self) -> str:
        loaders: dict[str, Any] = {"training": self.train, "validation": self.valid}
        counts = " and ".join(f"{len(loader.dataset):,} {name}" for name, loader in loaders.items() if loader)
        (height, width), classes = self.form.size, self.classes or ()
        return (f"{counts} pictures of {len(classes)} class{'es' * (len(classes) != 1)} ({listed(classes)}), "
                f"{width}x{height} pixels, {'grey' if self.form.channels == 1 else 'colour'}")


class Pictures(NamedTuple):
    """Pictures in memory, uint8 (n, channels, height, width), and their class numbers, int64 (n,)."""

    images: Tensor
    labels: Tensor


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
    transform = _transform(form, options, lambda: parts[0].images)
    n = len(parts[0].labels)
    size = options.batch_size_for(n)
    train = TensorLoader(*parts[0], batch_size=size, shuffle=True, drop_last=n > size and n % size == 1)
    valid = TensorLoader(*parts[1], batch_size=size) if len(parts) > 1 else None
    return ImageDataLoaders(carrying(train, transform), carrying(valid, transform.plain), list(classes),
                            form=transform.form)


def of_data_sets(data_sets: Sequence[Any], classes: Sequence[str], form: ImageForm, options: Options
                 ) -> ImageDataLoaders:
    """Loaders that read the pictures of training, and perhaps of validation, anew in each epoch."""
    n = len(data_sets[0])
    transform = _transform(form, options, lambda: torch.stack([
        data_sets[0][i][0] for i in range(0, n, -(-n // STREAMED))]))
    made = DataLoaders.from_datasets(*data_sets, batch_size=options.batch_size_for(n), num_workers=options.num_workers)
    return ImageDataLoaders(carrying(made.train, transform), carrying(made.valid, transform.plain), list(classes),
                            form=transform.form)


def _transform(form: ImageForm, options: Options, training: Callable[[], Tensor]) -> BatchTransform:
    """What makes of training batches those that a model takes.

    training: makes training pictures, whose mean and spread normalise where the options give none.
    """
    mean, std = measured(training()) if options.mean is None else (options.mean, options.std)
    form = dataclasses.replace(form, mean=mean, std=std)  # type: ignore[arg-type]  # the form makes tuples
    return BatchTransform(form, augmentation(options.augment, form))


def measured(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel of uint8 pictures, in 0..1, of up to 512 of them.

    >>> measured(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    some = images[::-(-len(images) // MEASURED)].cpu().double() / 255
    mean, std = some.mean((0, 2, 3)).tolist(), some.std((0, 2, 3), correction=0).tolist()
    # pictures of one colour have no spread
    return tuple(round(value, 4) for value in mean), tuple(max(0.01, round(value, 4)) for value in std)


def normalized_as(form: ImageForm, loader: Iterable[Batch]) -> Iterable[Batch]:
    """The loader itself, or, if it is one of pictures with another mean and std, a copy with those of `form`."""
    own = getattr(loader, "batch_transform", None)
    if not isinstance(own, BatchTransform) or own.form.channels != form.channels:
        return loader
    wanted = dataclasses.replace(own.form, mean=form.mean, std=form.std)
    twin: Iterable[Batch] = carrying(loader, dataclasses.replace(own, form=wanted))
    return loader if own.form == wanted else twin


def carrying(loader: Any, transform: BatchTransform) -> Any:
    """A loader over the same data with this `batch_transform`; None for no loader."""
    if loader is None:
        return None
    twin: Any = second_copy(loader) if isinstance(loader, DataLoader) else copy.copy(loader)
    twin.batch_transform = transform
    return twin


def _spread(loader: Any, n: int) -> tuple[Tensor, Tensor]:
    """`n` samples of a loader as the model takes them, evenly spaced: the first ones are often all of one class."""
    data = loader.dataset
    n = min(n, len(data))
    images, labels = zip(*(data[i * len(data) // n] for i in range(n)), strict=True)
    x, y = loader.batch_transform((torch.stack(images), torch.tensor([int(label) for label in labels])))
    return x, y
