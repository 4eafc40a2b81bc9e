"""What can be said of pictures wherever they come from, checked before anything is read."""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from ..errors import check_device, check_flag, check_int, check_items
from ..machine.limits import available
from .augment import augmentation
from .form import MOST_PIXELS, ImageForm
from .listing import Listing

MAX_SIZE = 224  # pixels of a side, where nobody says more: what the classical architectures were made for
SMALLEST = 8  # pixels: of smaller sides nothing is left after the first layers of a convnet
SHARE_OF_MEMORY = 0.5  # that pictures may take: model and batches want some too


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments that `image_folders`, `from_dataset` and `from_arrays` share; there they are described."""

    size: int | Sequence[int] | None = None
    batch_size: int | None = None
    augment: Any = "auto"
    resize: str = "crop"
    channels: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    max_size: int = MAX_SIZE
    in_memory: bool | None = None
    num_workers: int | None = None
    device: torch.device | str | None = None
    seed: int = 0
    verbose: bool = False

    def __post_init__(self) -> None:
        check_int("max_size", self.max_size, SMALLEST, MOST_PIXELS)
        check_int("seed", self.seed, 0)
        check_flag("verbose", self.verbose)
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        if self.in_memory is not None:
            check_flag("in_memory", self.in_memory)
        if self.device is not None:
            check_device(self.device)
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                check_items(name, getattr(self, name), "a number for each channel", f"{name}=(0.5, 0.5, 0.5)")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: pass both, or none of them.")
        form = self.form(Listing([], None, Counter({(SMALLEST, SMALLEST): 1}), is_grey=False))
        augmentation(self.augment, form)  # these two say what else is wrong

    def form(self, listing: Listing) -> ImageForm:
        """The form of the pictures that are listed, without a normalisation unless mean and std are given."""
        size: Any = common_size(listing.sizes, self.max_size) if self.size is None else self.size
        if isinstance(size, Integral):  # of numpy's too
            size = (size, size)
        mean, std = self.mean or (), self.std or ()
        channels = len(mean) or (1 if listing.is_grey else 3) if self.channels is None else self.channels
        return ImageForm(size, channels, mean, std, self.resize)  # type: ignore[arg-type]  # it makes tuples

    def batch_size_for(self, n: int) -> int:
        """The batch size for `n` training pictures. If none is given: 64, or less where that makes few steps an epoch.

        >>> [Options().batch_size_for(n) for n in (1000, 100, 9)]
        [64, 12, 8]
        """
        return min(64, max(8, n // 8)) if self.batch_size is None else self.batch_size

    def memory_for(self, n: int, form: ImageForm) -> torch.device | None:
        """Where `n` pictures are kept, the device or else the CPU; None: in no memory. Raises MemoryError."""
        if self.in_memory is False:
            return None
        n_bytes = n * form.channels * form.size[0] * form.size[1]
        cpu = torch.device("cpu")
        own = torch.accelerator.current_accelerator(check_available=True) or cpu  # where a Learner trains
        for device in (own if self.device is None else check_device(self.device), cpu):
            free = available(device)
            # None: nobody says what is free
            fits = self.in_memory or device.type == "cpu" if free is None else n_bytes <= SHARE_OF_MEMORY * free
            if fits:
                return device
        if self.in_memory is None:
            return None
        raise MemoryError(f"{n:,} pictures of {n_bytes // n:,} bytes are {n_bytes / 1e6:,.0f} MB, more than "
                          f"{SHARE_OF_MEMORY:.0%} of the memory that is free. Pass in_memory=False or a smaller size.")


def common_size(sizes: Counter[tuple[int, int]], max_size: int) -> tuple[int, int]:
    """The (height, width) for pictures of these (width, height): their own where all have the same, within bounds.

    Else a square as long as the shorter side of most of them. The bounds are 8..`max_size`.

    >>> common_size(Counter({(28, 20): 5}), 224), common_size(Counter({(4032, 3024): 9, (640, 480): 1}), 224)
    ((20, 28), (224, 224))
    """
    width, height = next(iter(sizes))
    if len(sizes) == 1 and min(width, height) >= SMALLEST and max(width, height) <= max_size:
        return height, width
    shorter = Counter(min(size) for size in sizes.elements())
    side = max(SMALLEST, min(max_size, shorter.most_common(1)[0][0]))
    return side, side
