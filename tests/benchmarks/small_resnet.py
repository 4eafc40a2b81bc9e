"""What both parts of the benchmark of pictures train: a small ResNet, on loaders of CIFAR-10, in several sizes."""
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Size:
    """How much of it: for two cores, for a GPU, or only to see that it runs."""

    n_train: int  # pictures
    n_test: int
    epochs: int
    width: int  # channels of the first stage
    blocks: int  # of each stage
    lr: float  # peak, of SGD
    source_epochs: int  # on the pictures of the first five classes
    target_epochs: int  # on those of the others
    n_target: int = 500
    batch_size: int = 128
    padding: int = 0  # of the pictures when they are read: augmentation has its own


SIZES = {
    "quick": Size(400, 100, epochs=2, width=8, blocks=1, lr=0.1, source_epochs=1, target_epochs=4, n_target=50,
                  batch_size=50),
    "small": Size(10_000, 5_000, epochs=6, width=32, blocks=1, lr=0.2, source_epochs=8, target_epochs=8),
    "full": Size(50_000, 10_000, epochs=20, width=64, blocks=2, lr=0.4, source_epochs=15, target_epochs=20),
}


def small_resnet(n_classes, size):
    """A ResNet for pictures of 32 x 32: a stem of 3 x 3, three stages."""
    from torchvision.models.resnet import BasicBlock

    def stage(channels, planes, stride):
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        return nn.Sequential(BasicBlock(channels, planes, stride, shortcut),
                             *(BasicBlock(planes, planes) for _ in range(size.blocks - 1)))

    width = size.width
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.MaxPool2d(2), stage(width, width, 1), stage(width, 2 * width, 2),
                         stage(2 * width, 4 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4 * width, n_classes))
