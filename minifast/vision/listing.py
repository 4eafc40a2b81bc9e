"""Pictures that have been found and not been read, and which of them are held back for validation."""
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset


class Sample(NamedTuple):
    """A file and the number of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Listing:
    """Pictures, and what is known of them before they are read.

    parts: the training data, and the validation data if there are any; of each the samples (picture, class number).
    classes: their names; None: their numbers.
    sizes: how often each (width, height) comes. is_grey: whether all pictures are grey.
    are_files: whether these are `Sample`s. One that cannot be read is named, or left out if `skip_broken`.
    validation: where the validation data come from, in words.
    others, broken: files that are left out, as they are no pictures or cannot be read. Raises ValueError for a class
        that has no file left to train on.
    """

    parts: list[Any]
    classes: Sequence[str] | None
    sizes: Counter[tuple[int, int]]
    is_grey: bool
    are_files: bool = False
    skip_broken: bool = False
    validation: str = ""
    others: list[Path] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.are_files:
            return
        trained_on = {sample.label for sample in self.parts[0]}
        for label, name in enumerate(self.classes or ()):
            if label not in trained_on:
                raise ValueError(f"no picture of the class {name!r} that it could be trained on can be read")

    def without(self, broken: Iterable[Path]) -> "Listing":
        """The same without these files."""
        left_out = {*self.broken, *broken}
        train, *valid = ([sample for sample in part if sample.path not in left_out] for part in self.parts)
        return replace(self, parts=[train, *filter(None, valid)], broken=sorted(left_out))


def sample_of(data: Any, i: int, name: str = "the data set") -> Any:
    """Sample `i`; an error in it says which one that is, and of which file if the data set knows (`.samples`)."""
    try:
        return data[i]
    except OSError as error:
        raise ValueError(f"cannot read sample {i} of {name}{_file(data, i)}: {error}") from error
    except Exception as error:
        error.add_note(f"in sample {i} of {name}")
        raise


def _file(data: Any, i: int) -> str:
    if isinstance(data, Subset):
        return _file(data.dataset, data.indices[i])
    samples = getattr(data, "samples", None)  # of torchvision's ImageFolder
    return f" ({samples[i][0]})" if isinstance(samples, list) else ""


def targets(data: Any) -> list[int] | None:
    """The class numbers of a data set that are there without reading it: its `.targets`, also of a Subset."""
    if isinstance(data, Subset):
        inner = targets(data.dataset)
        return None if inner is None else [inner[i] for i in data.indices]
    found = getattr(data, "targets", None)
    return None if found is None or len(found) != len(data) else [int(label) for label in found]


def class_numbers(parts: list[Any]) -> list[str]:
    """The numbers of the classes of data sets that know them without being read, as names."""
    labels = [label for data in parts for label in targets(data) or ()]
    if not labels:
        raise ValueError("the data set has neither .classes nor .targets, and is not read before training: pass "
                         "classes=, the names of the classes.")
    return [str(i) for i in range(max(labels) + 1)]


def chosen(n: int, share: float, seed: str) -> list[int]:
    """Which of `n` samples of a class are for validation, in order: the share, at least one, but never all."""
    return sorted(random.Random(seed).sample(range(n), min(max(1, round(share * n)), n - 1)))


def held_back(labels: Sequence[int] | None, n: int, share: float, seed: int) -> Tensor:
    """Which of `n` samples are for validation, (n,) bool: the share of each class, or of all without `labels`.

    >>> held_back([0, 0, 1, 1, 1, 1, 2], 7, 0.5, seed=0).sum()
    tensor(3)
    """
    held, rows = torch.zeros(n, dtype=torch.bool), defaultdict[int, list[int]](list)
    for i in range(n):
        rows[0 if labels is None else labels[i]].append(i)
    for label, own in rows.items():
        held[[own[k] for k in chosen(len(own), share, f"{seed} {label}")]] = True
    if not held.any():
        raise ValueError(f"of {n} samples none can be held back for validation, as each class has one only. Pass "
                         "validation data, or valid=None.")
    return held
