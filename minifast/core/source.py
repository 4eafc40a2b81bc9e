"""Where the training batches of a fit come from, and how far it has come in a pass over them."""
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.batch import Batch
from ..data.waiting import Waiting


@dataclass
class Entry:
    """Where a resumed fit enters its first epoch."""

    n_done: int  # batches of the epoch that are behind
    iterator: Iterator[Batch] | None = None  # the rest of the pass; None: a new pass
    limit: int | None = None  # the epoch ends before batch `limit`; None: with its loader
    is_cut: bool = False  # the rest of the epoch is left out
    window: Mapping[str, Any] | None = None  # the gradients that were gathered, if a window was open


@dataclass(slots=True)
class Source:
    """The passes of one fit over its training data; `passes.training_pass` reads and writes it."""

    limit: int | None = None  # batches per epoch at most; None: all that the loader has
    waiting: Waiting = field(default_factory=Waiting)  # how long training waited for its batches so far
    newest: Batch = None  # the newest training batch as its loader gave it: what a checkpoint compares
    entry: Entry | None = None  # where a resumed fit enters its first epoch; the pass takes it

    def take_entry(self) -> Entry:
        """Where the pass that begins now enters its epoch: at its start, but in the first epoch of a resumed fit."""
        entry, self.entry = self.entry or Entry(0, limit=self.limit), None
        return entry

    def note(self, batch: Batch) -> None:
        """Note the newest batch."""
        self.newest = batch
