"""Brings the data of a resumed fit back to where they were when its checkpoint was written.

1. The random generators get the state that they had when the epoch began.
2. The pass over the training data is begun again and brought to the batch that comes next (see `replay`).
3. The random generators get the state that they had at the checkpoint.

Between two epochs, 1 and 2 are done only for loaders that remember earlier passes.
"""
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..base import rng
from ..core.state import Entry, State
from ..core.window import Window
from ..data.feed import begin
from . import replay, saved_state


class Rewind:
    """Brings loader and random generators to where they were when `saved`, read from `path`, was made.

    Where a loader cannot be brought there, a warning says what happens instead.
    """

    def __init__(self, state: State, saved: Mapping[str, Any], path: Path) -> None:
        self._state, self._path, self._loader = state, path, state.train_dl
        self._noted, self._window = saved["loader"], saved["window"]
        self._own = saved_state.loader_generators(state)
        self._at_epoch_start, self._now = rng.from_plain(saved["epoch_rng"]), rng.from_plain(saved["rng"])
        self._n_done, self._is_epoch_end = saved["position"]["n_done"], saved["position"]["is_epoch_end"]
        self._is_whole = self._n_done == state.n_batches  # of its pass nothing is left

    def go(self) -> str:
        """Do it; gives what is to be said. Sets `state.source.entry` if the fit goes on in the middle of an epoch.

        Raises ValueError for what cannot be taken up, before any batch is drawn.
        """
        state, n_done = self._state, self._n_done
        with taking_up(self._path):
            self._check()
        drawn, entry = "", None
        if self._is_epoch_end or state.is_ending or n_done == state.source.limit:
            if not state.is_ending and not (self._is_epoch_end and state.epoch + 1 == state.n_epochs):
                self._end_pass()
        else:
            entry, drawn = self._enter_pass()
        if not self._is_epoch_end:
            entry = entry or Entry(n_done, limit=n_done)
            entry.window = None if entry.is_cut else self._window
            state.source.entry = entry
        for name, loader in state.valid_sets:
            if name in self._noted["validating"] and _persists(loader):
                begin(loader)  # as in `_start_workers`
        rng.restore(self._now, self._own)
        of = "" if state.n_epochs is None else f" of {state.n_steps}"
        if self._is_epoch_end:
            return f"resumed after epoch {state.epoch}, {state.step}{of} updates"
        batches = f"{n_done} batch{'es' * (n_done != 1)}"
        return f"resumed in epoch {state.epoch}, {batches} and {state.step}{of} updates{drawn}"

    def _check(self) -> None:
        """Take up all that can fail for what is in the file."""
        state = self._state
        if len(self._now["own"]) != len(self._own):  # e.g. of a data set that makes them when they are needed
            self._warn("carries other random generators of its own than it did, so they go on with other numbers")
            self._own, self._now["own"], self._at_epoch_start["own"] = [], [], []
        for noted in (self._at_epoch_start, self._now):
            rng.restore(noted, self._own)
        if replay.way(self._loader) == "state":
            self._loader.load_state_dict(self._noted["state"])  # type: ignore[attr-defined]
        if self._window is not None:
            Window(state.opt, state.accumulate, state.n_batches).load_state_dict(self._window)

    def _enter_pass(self) -> tuple[Entry | None, str]:
        """Where the fit enters its epoch, None for its end; and what is to be said of the way there."""
        state, loader, n_done = self._state, self._loader, self._n_done
        is_drawn = replay.way(loader) == "draw"
        if self._is_whole and is_drawn and not replay.remembers(loader):
            return None, ""
        self._start_workers()
        again = self._begin_again()
        if is_drawn and not self._is_same(again, self._is_whole):
            replay.leave(loader, again.iterator)
            return self._new_pass(), ""
        self._may_differ()
        said = (f"; these batches were drawn again and dropped, as the training data ({type(loader).__name__}) can be "
                "brought there in no other way") if is_drawn else ""
        return Entry(n_done, again.iterator, state.source.limit), said

    def _end_pass(self) -> None:
        """Have the loader be where it was when the epoch had drawn all its batches; a new pass comes next."""
        loader = self._loader
        self._start_workers()
        is_exhausted = self._state.source.limit is None and self._is_whole and self._is_epoch_end
        if replay.way(loader) == "state":
            if not is_exhausted:  # else the next pass would be the rest of this one
                replay.leave(loader, begin(loader))
        elif not self._may_differ() and replay.remembers(loader) and self._n_done:
            again = self._begin_again()
            if is_exhausted:
                next(again.iterator, None)
            replay.leave(loader, again.iterator)
            if not self._is_same(again, is_whole=True):
                self._warn_of_others()

    def _start_workers(self) -> None:
        """Have workers that persist be where they were: their first pass draws a random number more than later ones."""
        if _persists(self._loader) and not self._noted["is_first_pass"]:
            begin(self._loader)

    def _begin_again(self) -> replay.Pass:
        """Begin the pass again and bring it to where it was."""
        rng.restore(self._at_epoch_start, self._own)
        return replay.forward(self._loader, self._n_done, self._state.interrupt)

    def _is_same(self, again: replay.Pass, is_whole: bool) -> bool:
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
        if state.n_epochs is not None and state.epoch + 1 == state.n_epochs:
            self._warn_of_others(f"the rest of this last epoch, behind batch {n_done - 1}, comes from a new pass")
            return Entry(n_done, limit=state.n_batches)
        self._warn_of_others(f"the rest of epoch {state.epoch}, behind batch {n_done - 1}, is left out, and training "
                             "goes on with the next epoch")
        return Entry(n_done, limit=n_done, is_cut=True)

    def _may_differ(self) -> bool:
        """Whether other batches may come without anyone noticing. Warns of it."""
        may = _persists(self._loader) and not self._noted["is_first_pass"] and replay.way(self._loader) != "state"
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
