"""Pictures to look at, with their classes."""
from typing import TYPE_CHECKING

from ..errors import check_int
from ..pictures import grid, to_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from .loaders import ImageDataLoaders


def show_batch(dls: "ImageDataLoaders", n: int, *, train: bool, figure: "Figure | SubFigure | None"
               ) -> "Figure | SubFigure":
    """Draw the first `n` pictures of a batch; see `ImageDataLoaders.show_batch`."""
    n = check_int("n", n)
    x, y = dls.one_batch(train=train)
    classes = dls.classes or ()
    titles = [classes[label] if label < len(classes) else str(label) for label in y[:n].tolist()]
    return grid(list(to_pictures(x[:n], dls.form.mean, dls.form.std)), titles, figure=figure)
