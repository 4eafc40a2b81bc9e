"""The images, decoded once and kept as bytes on the device, and what is done to a batch of them there."""
import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIDE = 32  # pixels
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10's training images, 0..255


@dataclass
class Data:
    """Images uint8 (n, 3, h, w) and labels int64 (n,), on the device; training images are padded for the crops."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def first(self, n):
        """The first `n` training images only."""
        return Data(self.train_x[:n], self.train_y[:n], self.test_x, self.test_y)


def load(path, recipe, device):
    """As many images as `recipe` wants. Raises FileNotFoundError or ValueError if they are not there."""
    with np.load(path) as file:
        sets = [_decoded(file, kind, n) for kind, n in (("train", recipe.n_train), ("test", recipe.n_test))]
    (train_x, train_y), (test_x, test_y) = sets
    edge = (recipe.padding, recipe.padding)
    train_x = np.pad(train_x, ((0, 0), edge, edge, (0, 0)), mode="reflect")
    return Data(*(torch.from_numpy(array).to(device) for array in (_channels_first(train_x), train_y,
                                                                   _channels_first(test_x), test_y)))


def _decoded(file, kind, n):
    from PIL import Image

    blob, offsets, labels = file[f"{kind}_jpegs"], file[f"{kind}_offsets"], file[f"{kind}_labels"]
    if len(labels) < n:
        raise ValueError(f"{n:,} images are wanted, but the file has {len(labels):,} for {kind}.")
    images = [np.asarray(Image.open(io.BytesIO(blob[offsets[i]:offsets[i + 1]]))) for i in range(n)]
    return np.stack(images), labels[:n].astype(np.int64)


def _channels_first(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


class Normalize:
    """Bytes to floats of mean 0 and variance 1, in channels_last."""

    def __init__(self, device):
        self.mean, self.scale = (torch.tensor(values, device=device).view(1, 3, 1, 1)
                                 for values in (MEAN, [1 / std for std in STD]))

    def __call__(self, batch):
        x, y = batch
        return x.to(torch.float32, memory_format=torch.channels_last).sub_(self.mean).mul_(self.scale), y


class Augment(Normalize):
    """A random crop, a random flip and a blank square for each image of a batch (n, 3, 32 + 2p, 32 + 2p) of bytes.

    All of it happens on the device for the whole batch, and nothing in it waits for the device. The random numbers are
    one draw from a generator of its own.
    """

    def __init__(self, device, seed, cutout):
        super().__init__(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.cutout, self.pixels = cutout, torch.arange(SIDE, device=device)

    def __call__(self, batch):
        x, y = batch
        n, places = len(x), x.shape[-1] - SIDE + 1
        u = torch.rand(5, n, device=x.device, generator=self.generator)
        top, left = (u[:2] * places).long()
        windows = x.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # a view: (n, 3, top, left, 32, 32)
        x = windows[torch.arange(n, device=x.device), :, top, left]
        x = torch.where((u[2] < 0.5).view(n, 1, 1, 1), x.flip(3), x)
        x, y = super().__call__((x, y))
        if self.cutout:
            first = (u[3:] * (SIDE + 1 - self.cutout)).long().unsqueeze(2)  # (2, n, 1)
            rows, columns = (self.pixels >= first) & (self.pixels < first + self.cutout)
            x.masked_fill_((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0.0)
        return x, y
