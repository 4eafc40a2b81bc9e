"""Pictures to look at, with their classes."""
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import check_flag, check_int
from ..show.pictures import grid, to_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .loaders import ImageDataLoaders


def show_batch(dls: "ImageDataLoaders", n: int, *, train: bool, figure: "Figure | None") -> "Figure":
    """Draw `n` pictures as the model gets them; see `ImageDataLoaders.show_batch`."""
    n = check_int("n", n)
    if check_flag("train", train) or dls.valid is None:  # without validation data one_batch says so
        x, y = dls.one_batch(train=train)
    else:
        x, y = _spread(dls.valid, n)
    classes = dls.classes or ()
    titles = [classes[label] if label < len(classes) else str(label) for label in y[:n].tolist()]
    return grid(list(to_pictures(x[:n], dls.form.mean, dls.form.std)), titles, figure=figure)


def _spread(loader: Any, n: int) -> tuple[Tensor, Tensor]:
    """`n` samples of a loader, evenly spaced: the first ones are often all of one class."""
    data = loader.dataset
    n = min(n, len(data))
    samples = [data[i * len(data) // n] for i in range(n)]
    images, labels = torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples])
    transformed: tuple[Tensor, Tensor] = loader.batch_transform((images, labels))
    return transformed
