"""A first data set that needs no download."""
from importlib import resources

import numpy as np
import torch

from .dataloaders import DataLoaders
from .tensor_loader import TensorLoader


def digits(batch_size: int = 64) -> DataLoaders:
    """1,797 real handwritten digits, 8x8, embedded in the package: a first data set that needs no download.

    Images float32 (n, 1, 8, 8) in 0..1, labels int64 (n,) in 0..9, `classes` "0" to "9". Every fifth image is held back
    for validation (360), the other 1,437 are the shuffled training data. Source: UCI, Alpaydin and Kaynak 1998,
    CC BY 4.0.

    >>> x, y = next(iter(digits().valid))
    >>> x.shape, y.shape
    (torch.Size([64, 1, 8, 8]), torch.Size([64]))
    """
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as data:
        images = torch.from_numpy(data["images"]).unsqueeze(1).float() / 16
        labels = torch.from_numpy(data["labels"]).long()
    held_back = torch.arange(len(labels)) % 5 == 0
    return DataLoaders(TensorLoader(images[~held_back], labels[~held_back], batch_size=batch_size, shuffle=True),
                       TensorLoader(images[held_back], labels[held_back], batch_size=batch_size),
                       [str(digit) for digit in range(10)])
