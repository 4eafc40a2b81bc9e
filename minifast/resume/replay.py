"""Brings the data of a resumed fit back to where they were when its checkpoint was written.

1. The random generators get the state that they had when the epoch began.
2. The pass over the training data is begun again and brought to the batch that comes next, by the cheapest way that
   gives the same batches. A user's loader is never wrapped.

    state    the loader has `state_dict` and `load_state_dict`: it does it by itself
    skip     a TensorLoader or a sequence of batches: it begins at the batch that is wanted
    indices  a DataLoader without workers whose sampler draws all that it needs at once: no sample is read
    draw     anything else: batches are drawn and dropped. Whether they are the same is seen by the last one of them.

3. The random generators get the state that they had at the checkpoint.

Between two epochs, 1 and 2 are done only for loaders that remember over passes what no one can ask for: a sampler that
counts epochs, a stream that goes on where it ended. Whether their pass is the same is seen by its first batch.
"""
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import data as torch_data
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..base import rng
from ..base.batch import Batch
from ..base.nest import tensors
from ..core.state import Entry, State
from ..core.window import Window
from ..data.feed import begin, end_workers
from ..data.tensor_loader import TensorLoader
from ..machine.signals import DeferredInterrupt
from . import saved_state

AT_ONCE = (torch_data.SequentialSampler, torch_data.RandomSampler, torch_data.SubsetRandomSampler,
           torch_data.WeightedRandomSampler)  # they draw all that they need when the pass begins


def way(loader: Iterable[Batch]) -> str:
    """How `loader` is brought forward: "state", "skip", "indices" or "draw".

    >>> way([1, 2]), way(DataLoader([1, 2])), way(DataLoader([1, 2], num_workers=1)), way(iter([1, 2]))
    ('skip', 'indices', 'draw', 'draw')
    """
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return "state"
    if type(loader) in (list, tuple) or (
            isinstance(loader, TensorLoader) and type(loader).__iter__ is TensorLoader.__iter__):
        return "skip"
    if (isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__ and loader.num_workers == 0
            and not isinstance(loader.dataset, IterableDataset) and _draws_at_once(loader)):
        return "indices"
    return "draw"


def _draws_at_once(loader: "DataLoader[Any]") -> bool:
    """Whether no index depends on random numbers that are drawn while the pass goes on."""
    if loader.batch_sampler is None:
        return type(loader.sampler) in AT_ONCE
    return type(loader.batch_sampler) is BatchSampler and type(loader.batch_sampler.sampler) in AT_ONCE


def remembers(loader: Iterable[Batch]) -> bool:
    """Whether the batches of a pass may depend on the passes before it, in a way that the loader cannot tell.

    >>> remembers(DataLoader([1, 2], num_workers=1)), remembers(DataLoader([1, 2], sampler=[1, 0]))
    (False, True)
    """
    if way(loader) != "draw":
        return False
    if getattr(loader, "persistent_workers", False) or type(loader).__iter__ is not DataLoader.__iter__:
        return True
    assert isinstance(loader, DataLoader)
    is_iterable = isinstance(loader.dataset, IterableDataset)  # of which workers get a new copy in each pass
    return loader.num_workers == 0 if is_iterable else not _draws_at_once(loader)


def digest(batch: Batch) -> str | None:
    """A number that two batches share if all bits of their tensors are the same; None if there is no tensor.

    >>> digest((torch.ones(2), "text")) == digest((torch.ones(2), "other"))
    True
    """
    hasher, found = hashlib.blake2b(digest_size=8), list(tensors(batch))
    for tensor in found:
        plain = tensor.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous()
        hasher.update(repr((plain.dtype, tuple(plain.shape))).encode())
        hasher.update(plain.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest() if found else None


class Pass(NamedTuple):
    """A pass that was begun again; where batches were drawn, with the `digest` of its first one and of the newest."""

    iterator: Iterator[Batch]
    first: str | None = None
    last: str | None = None


def forward(loader: Any, n_done: int, interrupt: DeferredInterrupt) -> Pass:
    """A pass from its begin, for which the random generators were put back, to behind its batch `n_done`."""
    kind = way(loader)
    if kind == "skip":
        return Pass(loader.iter_from(n_done) if isinstance(loader, TensorLoader) else iter(loader[n_done:]))
    iterator = begin(loader)
    if kind == "indices":
        for _ in islice(iterator._sampler_iter, n_done):  # type: ignore[attr-defined]
            interrupt.check()
    if kind in ("indices", "state"):  # the state was loaded before
        return Pass(iterator)
    first = batch = None
    try:
        for i in range(n_done):
            interrupt.check()
            batch = next(iterator)
            first = digest(batch) if i == 0 else first
    except StopIteration:
        return Pass(iterator)
    except BaseException:
        leave(loader, iterator)
        raise
    return Pass(iterator, first, digest(batch))


def leave(loader: Iterable[Batch], iterator: Iterator[Batch]) -> None:
    """End a pass in the middle."""
    end_workers(loader, iterator)
    if hasattr(iterator, "close"):  # a generator
        iterator.close()


class Rewind:
    """Brings the data to where they were when `saved`, read from `path`, was made, or warns of what happens instead."""

    def __init__(self, state: State, saved: Mapping[str, Any], path: Path) -> None:
        self._state, self._path, self._loader = state, path, state.train_dl
        self._noted, self._window = saved["loader"], saved["window"]
        self._own = saved_state.loader_generators(state)
        self._at_epoch_start, self._now = rng.from_plain(saved["epoch_rng"]), rng.from_plain(saved["rng"])
        self._n_done, self._is_epoch_end = saved["position"]["n_done"], saved["position"]["is_epoch_end"]
        self._is_whole = self._n_done == state.n_batches  # of its pass nothing is left

    def go(self) -> str:
        """Gives what is to be said; raises ValueError for what cannot be taken up, before any batch is drawn."""
        state, n_done = self._state, self._n_done
        with taking_up(self._path):
            self._check()
        drawn, entry = "", None
        if not (self._is_epoch_end or state.is_ending or n_done == state.source.limit):
            entry, drawn = self._enter_pass()
        elif not state.is_ending and not (self._is_epoch_end and state.epoch + 1 == state.n_epochs):
            self._end_pass()
        if not self._is_epoch_end:
            entry = entry or Entry(n_done, limit=n_done)
            entry.window = None if entry.is_cut else self._window
            state.source.entry = entry
        for name, loader in state.valid_sets:
            if name in self._noted["validating"] and _persists(loader):
                begin(loader)  # as in `_start_workers`
        rng.restore(self._now, self._own)
        updates = f"{state.step}{'' if state.n_epochs is None else f' of {state.n_steps}'} updates"
        if self._is_epoch_end:
            return f"resumed after epoch {state.epoch}, {updates}"
        return f"resumed in epoch {state.epoch}, {n_done} batch{'es' * (n_done != 1)} and {updates}{drawn}"

    def _check(self) -> None:
        """Take up all that can fail for what is in the file."""
        if len(self._now["own"]) != len(self._own):  # e.g. of a data set that makes them when they are needed
            self._warn("carries other random generators of its own than it did, so they go on with other numbers")
            self._own, self._now["own"], self._at_epoch_start["own"] = [], [], []
        for noted in (self._at_epoch_start, self._now):
            rng.restore(noted, self._own)
        if way(self._loader) == "state":
            self._loader.load_state_dict(self._noted["state"])  # type: ignore[attr-defined]
        if self._window is not None:
            Window(self._state.opt, self._state.accumulate, self._state.n_batches).load_state_dict(self._window)

    def _enter_pass(self) -> tuple[Entry | None, str]:
        """Where the fit enters its epoch, None for its end; and what is to be said of the way there."""
        loader = self._loader
        is_drawn = way(loader) == "draw"
        if self._is_whole and is_drawn and not remembers(loader):
            return None, ""
        self._start_workers()
        again = self._begin_again()
        if is_drawn and not self._is_same(again, self._is_whole):
            leave(loader, again.iterator)
            return self._new_pass(), ""
        self._may_differ()
        said = (f"; these batches were drawn again and dropped, as the training data ({type(loader).__name__}) can be "
                "brought there in no other way")
        return Entry(self._n_done, again.iterator, self._state.source.limit), said * is_drawn

    def _end_pass(self) -> None:
        """Have the loader be where it was when the epoch had drawn all its batches; a new pass comes next."""
        loader = self._loader
        self._start_workers()
        is_exhausted = self._state.source.limit is None and self._is_whole and self._is_epoch_end
        if way(loader) == "state":
            if not is_exhausted:  # else the next pass would be the rest of this one
                leave(loader, begin(loader))
        elif not self._may_differ() and remembers(loader) and self._n_done:
            again = self._begin_again()
            if is_exhausted:
                next(again.iterator, None)
            leave(loader, again.iterator)
            if not self._is_same(again, is_whole=True):
                self._warn_of_others()

    def _start_workers(self) -> None:
        """Have workers that persist be where they were: their first pass draws a random number more than later ones."""
        if _persists(self._loader) and not self._noted["is_first_pass"]:
            begin(self._loader)

    def _begin_again(self) -> Pass:
        rng.restore(self._at_epoch_start, self._own)
        return forward(self._loader, self._n_done, self._state.interrupt)

    def _is_same(self, again: Pass, is_whole: bool) -> bool:
        """Whether a pass gives the batches that it gave: the newest, or, of one that is whole, the first.

        Batches that come after the first may depend on random numbers that the model has drawn in between.
        """
        then, now = (self._noted["first"], again.first) if is_whole else (self._noted["last"], again.last)
        return now is not None and bool(then == now)

    def _new_pass(self) -> Entry:
        """How the fit goes on if the data cannot be brought back into the middle of its pass. Warns of it."""
        state, n_done = self._state, self._n_done
        if self._is_whole:
            self._warn_of_others()
            return Entry(n_done, limit=n_done)
        if state.epoch + 1 == state.n_epochs:
            self._warn_of_others(f"the rest of this last epoch, behind batch {n_done - 1}, comes from a new pass")
            return Entry(n_done, limit=state.n_batches)
        self._warn_of_others(f"the rest of epoch {state.epoch}, behind batch {n_done - 1}, is left out, and training "
                             "goes on with the next epoch")
        return Entry(n_done, limit=n_done, is_cut=True)

    def _may_differ(self) -> bool:
        """Whether other batches may come without anyone noticing. Warns of it."""
        may = _persists(self._loader) and not self._noted["is_first_pass"] and way(self._loader) != "state"
        if may:
            self._warn("may go on with other batches than it would have: its worker processes persist over epochs, and "
                       "their random generators cannot be saved: random augmentation goes on with other numbers")
        return may

    def _warn_of_others(self, what: str = "the next epochs may not have the batches that they would have had") -> None:
        self._warn(f"gives other batches when its pass is begun again, so {what}. A loader with state_dict() and "
                   "load_state_dict() goes on exactly")

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self._path}: the training data ({type(self._loader).__name__}) {what}.", stacklevel=2)


def _persists(loader: Any) -> bool:
    return bool(getattr(loader, "persistent_workers", False))


@contextmanager
def taking_up(path: Path) -> Iterator[None]:
    """An error inside means that a checkpoint holds what nobody can take up: a ValueError that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be taken up: {error!r}. Nothing was changed.") from error
