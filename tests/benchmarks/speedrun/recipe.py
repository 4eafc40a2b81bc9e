"""What both versions agree on: sizes, rates, and the shape of the learning rate.

The ingredients are those of the CIFAR-10 speed runs: D. Page, "How to train your ResNet" (DAWNBench 2018/19: data in
memory, augmentation by the batch, whitening, rates of their own for biases, label smoothing, flips when testing) and
K. Jordan, "94% on CIFAR-10 in 3.29 seconds" (arXiv 2404.00498: a Lookahead that slows down), after T. Dettmers and
others; cutout: DeVries and Taylor 2017 (arXiv 1708.04552); Lookahead: Zhang et al. 2019 (arXiv 1907.08610).
"""
from dataclasses import dataclass

RISE = 0.2  # the share of the steps in which the learning rate rises


@dataclass(frozen=True)
class Recipe:
    """One configuration. Rates are for a loss that is the mean over the batch."""

    widths: tuple[int, int, int]  # channels of the three stages
    n_train: int  # images
    n_test: int
    epochs: int
    batch_size: int
    lr: float  # peak
    bias_scale: float = 16.0  # the biases' rate is so many times as high
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of weights only
    label_smoothing: float = 0.2
    padding: int = 2  # pixels: random crops move the image by at most so many
    cutout: int = 12  # side in pixels of the square that is blanked, 0 for none
    lookahead_every: int = 5  # updates
    lookahead_slowness: float = 0.95**5  # the slow weights' share at the end of training

    @property
    def n_steps(self):
        return self.epochs * (self.n_train // self.batch_size)

    def slowness(self, step):
        """The slow weights' share, 0..1, when Lookahead meets after 0-based update `step`: it grows by the cube."""
        return self.lookahead_slowness * ((step + 1) / self.n_steps) ** 3


def triangle(step, n_steps):
    """The fraction of the peak in 0-based update `step`: a straight line up, a straight line down."""
    rise = max(1, int(RISE * n_steps))
    return (step + 1) / rise if step < rise else (n_steps - step) / (n_steps - rise + 1)


SIZES = {
    "tiny": Recipe((8, 8, 16), n_train=512, n_test=128, epochs=2, batch_size=64, lr=0.1, cutout=8),
    "small": Recipe((32, 64, 128), n_train=10_000, n_test=10_000, epochs=5, batch_size=125, lr=0.2, cutout=0),
    "full": Recipe((64, 256, 512), n_train=50_000, n_test=10_000, epochs=12, batch_size=512, lr=0.4),
}
