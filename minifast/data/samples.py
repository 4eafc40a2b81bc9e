"""One sample of a data set as tensors: what is read from it, whether all are alike, whether it changes."""
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..base.nest import describe, map_leaves, map_tensors, tensors
from ..errors import quoted

PROBES, READS = 4, 4  # samples that are read several times, and how often, to see whether they change


def check_data_set(name: str, data: Any, *, streams: bool = False) -> int:
    """How many samples the map-style data set `data` has; 0 for an IterableDataset, which `streams` allows."""
    kind = type(data).__name__
    if isinstance(data, IterableDataset):
        if not streams:
            raise TypeError(f"{name} is an IterableDataset ({kind}), which gives its samples as a stream. Pass a "
                            "DataLoader: DataLoaders(DataLoader(data)).")
        return 0
    if isinstance(data, DataLoader):
        raise TypeError(f"{name} must be a data set, got a {kind}, which is a loader already. Pass its .dataset, or "
                        "loaders to DataLoaders(train, valid).")
    if isinstance(data, tuple) and data and all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        raise TypeError(f"{name} must be a data set, got a tuple of {len(data)} arrays. Pass TensorDataset(*tensors), "
                        "or make a TensorLoader(*tensors).")
    try:
        if isinstance(data, (str, bytes, bytearray, Mapping, type)) or not hasattr(data, "__getitem__"):
            raise TypeError("it has no samples by number")
        n = len(data)
    except TypeError as error:  # of len(): of arrays without dimensions, and of data sets that do not know
        wanted = "with len() and [i]" + (", or an IterableDataset" if streams else "")
        raise TypeError(f"{name} must be a map-style data set, {wanted}, got {quoted(data)}: {error}.") from error
    if n == 0:
        raise ValueError(f"{name} is empty: {kind} with 0 samples.")
    return n


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """The samples of a data set as lists of tensors; each that is not like the first one is a text that says so."""

    name: str
    data: Any
    first: Any  # the nest of tensors of sample 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> list[Tensor] | str:
        sample = read(self.name, self.data, i)
        return difference(self.name, i, self.first, sample) or list(tensors(sample))


def read(name: str, data: Any, i: int) -> Any:
    try:
        return map_leaves(as_tensor, data[i])
    except Exception as error:
        error.add_note(f"in sample {i} of {name}")
        raise


def as_tensor(leaf: Any) -> Tensor:
    """A tensor of the dtype that torch's DataLoader gives; an image as (channels, height, width).

    >>> as_tensor(True), as_tensor(0.5), as_tensor(np.float32(2))
    (tensor(True), tensor(0.5000, dtype=torch.float64), tensor(2.))
    """
    if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_meta:
        return leaf.detach()
    if isinstance(leaf, (bool, int)) and -2**63 <= leaf < 2**63:
        return torch.tensor(leaf)
    if isinstance(leaf, float):
        return torch.tensor(leaf, dtype=torch.float64)
    if hasattr(leaf, "getbands") and hasattr(leaf, "convert"):  # a PIL image, without importing Pillow
        return _of_image(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufc":
        return torch.from_numpy(np.array(leaf))  # a copy: torch warns of arrays that cannot be written
    what = quoted(leaf) if not isinstance(leaf, Tensor) else "a Tensor without values (device meta)" if leaf.is_meta \
        else f"a sparse Tensor ({leaf.layout})"
    raise TypeError(f"only tensors, numpy arrays, numbers and PIL images can be kept in memory, the sample holds {what}"
                    ". Leave it out of the samples, or pass a DataLoader: DataLoaders(DataLoader(data)).")


def _of_image(image: Any) -> Tensor:
    """Of 8-bit modes uint8; a palette is spelt out; more bits (I, I;16, F) stay int32 or float32."""
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    pixels = np.array(image)
    pixels = pixels.astype(np.int32) if pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 1 else pixels
    return torch.from_numpy(pixels).reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def difference(name: str, i: int, first: Any, sample: Any) -> str:
    """How sample `i` differs in form from sample 0, as text; "" if it does not."""
    own, theirs = describe(sample), describe(first)
    return "" if own == theirs else f"{name}: sample {i} is {own}, sample 0 is {theirs}"


def changing(name: str, data: Any, n: int) -> int | None:
    """The first of some samples that is another when it is read again, with other random numbers; None if none is.

    It seeds the global generators of the CPU: keep and restore them around it.
    """
    for i in sorted({round(k * (n - 1) / max(1, PROBES - 1)) for k in range(PROBES)}):
        seen = None
        for k in range(READS):
            torch.default_generator.manual_seed(k)  # torch.manual_seed would seed an unused GPU, too, for good
            random.seed(k)
            np.random.seed(k)
            bits = list(_bits(read(name, data, i)))
            if seen is not None and bits != seen:
                return i
            seen = bits
    return None


def _bits(nest: Any) -> Iterator[tuple[Any, ...]]:
    for tensor in tensors(nest):
        flat = tensor.cpu().contiguous().resolve_conj().resolve_neg().flatten()
        yield tensor.shape, tensor.dtype, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@dataclass(frozen=True)
class Nested:
    """A transform of a `TensorLoader`: the tensors of a batch as the nest that the samples have, then `transform`.

    >>> Nested({"x": torch.zeros(2), "labels": torch.tensor(1)})((torch.ones(4, 2), torch.arange(4)))["labels"]
    tensor([0, 1, 2, 3])
    """

    form: Any
    transform: Any = None

    def __call__(self, batch: tuple[Tensor, ...]) -> Any:
        columns = iter(batch)
        nest = map_tensors(lambda _: next(columns), self.form)
        return nest if self.transform is None else self.transform(nest)
