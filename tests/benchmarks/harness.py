"""Rounds that are interleaved, and what is made of them: tables of rows, with their spread and what they are to reach.

A suite is a function of `Options` that gives `Table`s. All rows of a table are measured in one process (or in processes
that take turns), one after the other in every round, so that a machine that slows down slows them all; ratios and
differences are taken round by round.
"""
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from minifast.show import tables


@dataclass(frozen=True)
class Options:
    """What a person chooses. steps: of one run of the smallest model; others take fewer, about as long."""

    rounds: int = 11
    steps: int = 1000
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False  # whether it is to show only that it runs


@dataclass(frozen=True)
class Row:
    """A name and what was measured: one value per round."""

    name: str
    values: list[float]


@dataclass(frozen=True)
class Goal:
    """That the median of `row` is at most this: of its values, or of what it is beside the row `than`."""

    row: str
    at_most: float
    of: str = "ratio"  # "ratio" to `than`, "more" than it in the table's unit, or the "value" itself
    than: str | None = None  # None: the table's reference

    def figure(self, table: "Table") -> float:
        """What was reached."""
        values = np.array(table.row(self.row).values)
        if self.of != "value":
            beside = np.array(table.row(self.than or table.reference or "").values)
            values = values / beside if self.of == "ratio" else values - beside
        return float(np.median(values))

    def said(self, table: "Table") -> str:
        """In words, with whether it was reached."""
        figure, digits = self.figure(table), 1 if self.at_most >= 10 else 2
        reached = "reached" if figure <= self.at_most else "MISSED"
        most, got = (f"{value:.{digits}f}" for value in (self.at_most, figure))
        if self.of == "value":
            return f"{self.row}: {got} {table.unit}, at most {most}: {reached}"
        than = self.than or table.reference
        kind = f"{got}x, at most {most}x" if self.of == "ratio" else f"{got} {table.unit} more, at most {most}"
        return f"{self.row}, beside {than}: {kind}: {reached}"


@dataclass(frozen=True)
class Table:
    """Rows in one unit, smaller is better. reference: the row that ratios are taken to; None: there is none."""

    title: str
    unit: str
    rows: list[Row]
    reference: str | None = None
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # e.g. what could not be measured, and why

    def row(self, name: str) -> Row:
        """The row of that name. Raises KeyError."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{self.title!r} has no row {name!r}: there are {', '.join(row.name for row in self.rows)}")

    def ratios(self, name: str) -> list[float]:
        """The row's values over the reference's, round by round."""
        reference = self.row(self.reference or "").values
        return [mine / theirs for mine, theirs in zip(self.row(name).values, reference, strict=True)]

    def __str__(self) -> str:
        """The table as people read it, with its goals below."""
        header, lines = ["", self.unit, "over", "ratio", "quartiles", "min-max"], []
        for row in self.rows:
            if self.reference is None:
                low, first, median, third, high = spread(row.values)
                lines.append([row.name, number(median), "", "", f"{number(first)}-{number(third)}",
                              f"{number(low)}-{number(high)}"])
                continue
            pairs = zip(row.values, self.row(self.reference).values, strict=True)
            over = np.median([mine - theirs for mine, theirs in pairs])
            low, first, median, third, high = spread(self.ratios(row.name))
            lines.append([row.name, number(np.median(row.values)), f"{'+' if over > 0 else ''}{number(over)}",
                          f"{median:.2f}", f"{first:.2f}-{third:.2f}", f"{low:.2f}-{high:.2f}"])
        if self.reference is None:
            header, lines = [*header[:2], *header[4:]], [[*line[:2], *line[4:]] for line in lines]
        goals = [f"  {goal.said(self)}" for goal in self.goals]
        return "\n".join([self.title, tables.table(header, lines), *goals, *(f"  {note}" for note in self.notes)])


def number(value: float) -> str:
    """Three digits or all of those before the point.

    >>> number(1234.5), number(12.345), number(0.01234), number(0)
    ('1234', '12.3', '0.0123', '0')
    """
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def spread(values: list[float]) -> list[float]:
    """Minimum, first quartile, median, third quartile, maximum."""
    return [float(v) for v in np.percentile(values, [0, 25, 50, 75, 100])]


def interleave(rows: Mapping[str, Callable[[], float]], options: Options) -> list[Row]:
    """What each of `rows` gives in each round, in an order that rotates; a round before them warms up.

    So no row always comes first, or always after the same other one.
    """
    names, values = list(rows), {name: [] for name in rows}
    for i in range(0 if options.quick else -1, options.rounds):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            gc.collect()  # the garbage of one row is not to be swept up in the time of the next
            value = rows[name]()
            if i >= 0:
                values[name].append(value)
    return [Row(name, column) for name, column in values.items()]


def seconds(function: Callable[[], object], device: torch.device | None = None) -> float:
    """How long a call takes, until the device has done what it was asked for."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device | None) -> None:
    """Wait for a GPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
