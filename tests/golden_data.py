"""The recordings in tests/golden: what they are and what may be compared with them stands in the README there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden"


def load(family: str) -> dict[str, dict[str, Any]]:
    """The recordings of tests/golden/<family>.json by name."""
    recordings: dict[str, dict[str, Any]] = json.loads((GOLDEN / f"{family}.json").read_text(encoding="utf-8"))
    return recordings


def params(*families: str) -> list[Any]:
    """The recordings of some families as arguments of `pytest.mark.parametrize`, with their names as ids."""
    return [pytest.param(recording, id=name) for family in families for name, recording in load(family).items()]


def floats(values: Sequence[Any]) -> NDArray[np.float64]:
    """A recorded list (of lists) as an array; nan and inf are recorded as strings."""
    return np.array(values, dtype=np.float64)
