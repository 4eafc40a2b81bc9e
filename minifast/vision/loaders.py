"""Loaders of pictures that know their classes and the form in which a model takes them."""
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base import snapshot
from ..base.batch import Batch
from ..data.dataloaders import DataLoaders
from ..data.feed import first_batch
from ..data.loader import carrying, generators, second_copy
from ..data.tensor_loader import TensorLoader
from ..errors import check_flag, check_int
from ..show.pictures import grid, to_pictures
from ..show.tables import listed
from .augment import BatchTransform
from .form import ImageForm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        form = dataclasses.replace(self.form, mean=mean, std=std)  # type: ignore[arg-type]  # the form makes tuples

        loaders: tuple[Any, Any] = self.train, self.valid
        train, valid = (loader and carrying(loader, dataclasses.replace(loader.batch_transform, form=form))
                        for loader in loaders)
        return dataclasses.replace(self, train=train, valid=valid, form=form)

    def __repr__(self) -> str:
        loaders: dict[str, Any] = {"training": self.train, "validation": self.valid}
        counts = " and ".join(f"{len(loader.dataset):,} {name}" for name, loader in loaders.items() if loader)
        (height, width), classes = self.form.size, self.classes or ()
        return (f"{counts} pictures of {len(classes)} class{'es' * (len(classes) != 1)} ({listed(classes)}), "
                f"{width}x{height} pixels, {'grey' if self.form.channels == 1 else 'colour'}")


def normalized_as(form: ImageForm, loader: Iterable[Batch]) -> Iterable[Batch]:
    """The loader itself, or, if it is one of pictures with another mean and std, a copy with those of `form`."""
    own = getattr(loader, "batch_transform", None)
    if not isinstance(own, BatchTransform) or own.form.channels != form.channels:
        return loader
    wanted = dataclasses.replace(own.form, mean=form.mean, std=form.std)
    twin: Iterable[Batch] = loader if own.form == wanted else carrying(loader, dataclasses.replace(own, form=wanted))
    return twin


def _spread(loader: Any, n: int) -> tuple[Tensor, Tensor]:
    """`n` samples of a loader as the model takes them, evenly spaced: the first ones are often all of one class."""
    data = loader.dataset
    n = min(n, len(data))
    images, labels = zip(*(data[i * len(data) // n] for i in range(n)), strict=True)
    return loader.batch_transform((torch.stack(images), torch.tensor(labels)))  # type: ignore[no-any-return]
