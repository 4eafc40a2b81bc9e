"""Which samples are held back for validation."""
import random
from collections.abc import Sequence

import torch
from torch import Tensor


def chosen(n: int, share: float, seed: str) -> set[int]:
    """Which of `n` samples of a class are for validation: the share, at least one, but never all."""
    return set(random.Random(seed).sample(range(n), min(max(1, round(share * n)), n - 1)))


def held_back(labels: Sequence[int] | None, n: int, share: float, seed: int) -> Tensor:
    """Which of `n` samples are for validation, (n,) bool: the share of each class, or of all if nobody knows these.

    Of a class at least one, but never all. Raises ValueError if there is none.

    >>> held_back([0, 0, 1, 1, 1, 1, 2], 7, 0.5, seed=0).sum()
    tensor(3)
    """
    held = torch.zeros(n, dtype=torch.bool)
    rows: dict[int, list[int]] = {}
    for i in range(n):
        rows.setdefault(0 if labels is None else labels[i], []).append(i)
    for label, own in rows.items():
        held[[own[k] for k in chosen(len(own), share, f"{seed} {label}")]] = True
    if not held.any():
        raise ValueError(f"of {n} samples none can be held back for validation, as each class has one only. Pass "
                         "validation data, or valid=None.")
    return held
