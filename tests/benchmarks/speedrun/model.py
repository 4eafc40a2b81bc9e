"""A small ResNet: a whitening layer that is computed, not learned, then eight convolutions and a linear layer."""
import torch
from torch import nn
from torch.nn import functional as F

PATCH = 2  # pixels: the side of the whitening filters


class Whiten(nn.Module):
    """Patches of the image in coordinates that are uncorrelated and of variance 1, and their negatives.

    The filters are a buffer: no optimizer moves them, and no `unfreeze` either.
    """

    def __init__(self, images):
        super().__init__()
        self.register_buffer("weight", whitening_filters(images))

    def forward(self, x):
        return F.conv2d(x, self.weight)


class Norm(nn.BatchNorm2d):
    """A batch norm with a bias but no scale: the convolution behind it has one."""

    def __init__(self, channels):
        super().__init__(channels, momentum=0.4)
        self.weight.requires_grad_(False)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(*conv(channels, channels), *conv(channels, channels))

    def forward(self, x):
        return x + self.branch(x)


class Scale(nn.Module):
    """Logits so small at the start that the loss begins near that of guessing."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def conv(n_in, n_out, pool=False):
    """A stage's first layers; pooled before the norm, which then has a quarter of the work."""
    return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), *([nn.MaxPool2d(2)] if pool else []), Norm(n_out),
            nn.GELU()]


def make_model(recipe, images):
    """The net for float images (n, 3, 32, 32); `images`, some of them, are what the whitening is computed from."""
    first, second, third = recipe.widths
    whiten = Whiten(images)
    return nn.Sequential(
        whiten, nn.GELU(),  # 31 x 31
        *conv(len(whiten.weight), first, pool=True), Residual(first),  # 15 x 15
        *conv(first, second, pool=True),  # 7 x 7
        *conv(second, third, pool=True), Residual(third),  # 3 x 3
        nn.MaxPool2d(3), nn.Flatten(), nn.Linear(third, 10, bias=False), Scale(1 / 9))


def whitening_filters(images, eps=5e-4):
    """Filters (24, 3, 2, 2) that whiten the patches of `images` (n, 3, h, w): principal axes, each with its negative.

    eps: added to the variances, so that axes with hardly any are not blown up.
    """
    patches = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * PATCH**2)
    patches = patches.double()
    variances, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (axes / (variances + eps).sqrt()).T.reshape(-1, 3, PATCH, PATCH).float()
    return torch.cat([filters, -filters])
