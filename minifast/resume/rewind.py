"""How a resumed fit enters its data: loader and random generators are brought to where they were."""
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..base import rng
from ..core.source import Entry
from ..core.state import State
from ..core.window import Window
from ..data.feed import begin
from . import replay, saved_state

OTHER_EPOCHS = "the next epochs may not have the batches that they would have had"


class WayBack:
    """Brings the loader and the random generators of a fit to where they were when `saved`, read from `path`, was made.

    A loader that cannot be brought there is said in a warning, with what happens instead.
    """

    def __init__(self, state: State, saved: Mapping[str, Any], path: Path) -> None:
        self._state, self._path, self._loader = state, path, state.train_dl
        self._position, self._noted = saved["position"], saved["loader"]
        self._window = saved["window"]
        self._own = saved_state.loader_generators(state)
        self._at_epoch_start, self._now = rng.from_plain(saved["epoch_rng"]), rng.from_plain(saved["rng"])
        self._n_done = self._position["n_done"]

    def go(self) -> str:
        """Go there; gives what is to be said of it. Sets `state.source.entry` if that is in the middle of an epoch.

        Raises ValueError for what cannot be taken up, before any batch is drawn.
        """
        state, is_epoch_end = self._state, self._position["is_epoch_end"]
        with taking_up(self._path):
            self._check()
        drawn = ""
        if is_epoch_end or state.is_ending or self._n_done == state.source.limit:
            if not state.is_ending and not (is_epoch_end and state.epoch + 1 == state.n_epochs):
                self._end_pass()
        else:
            drawn = self._enter_pass()
        if not is_epoch_end:
            state.source.entry = state.source.entry or Entry(self._n_done, limit=self._n_done)
            state.source.entry.window = None if state.source.entry.is_cut else self._window
        for name, loader in state.valid_sets:
            if name in self._noted["validating"] and getattr(loader, "persistent_workers", False):
                begin(loader)  # as in `_start_workers`
        rng.restore(self._now, self._own)
        of = "" if state.n_epochs is None else f" of {state.n_steps}"
        if is_epoch_end:
            return f"resumed after epoch {state.epoch}, {state.step}{of} updates"
        batches = f"{self._n_done} batch{'es' * (self._n_done != 1)}"
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

    def _enter_pass(self) -> str:
        """Have the fit enter its epoch where it was killed; gives what is to be said of the way there."""
        state, loader, n_done = self._state, self._loader, self._n_done
        kind, is_whole = replay.way(loader), n_done == state.n_batches
        if is_whole and kind == "draw" and not replay.remembers(loader):
            return ""  # nothing of the pass is left, and nothing stays of it
        self._start_workers()
        rng.restore(self._at_epoch_start, self._own)
        again = replay.forward(loader, n_done, state.interrupt)
        if kind == "draw" and (again.is_over or not self._is_same(again, is_whole)):
            replay.leave(loader, again.iterator)
            state.source.entry = self._new_pass(is_whole)
            return ""
        state.source.entry = Entry(n_done, again.iterator, state.source.limit)
        self._doubt()
        return (f"; these batches were drawn again and dropped, as the training data ({type(loader).__name__}) can be "
                "brought there in no other way") if kind == "draw" else ""

    def _end_pass(self) -> None:
        """Have the loader be where it was when the epoch had drawn all its batches; a new pass comes next."""
        state, loader, n_done = self._state, self._loader, self._n_done
        self._start_workers()
        is_exhausted = state.source.limit is None and n_done == state.n_batches and self._position["is_epoch_end"]
        if replay.way(loader) == "state":
            if not is_exhausted:  # else the next pass would be the rest of this one
                replay.leave(loader, begin(loader))
        elif not self._doubt() and replay.remembers(loader) and n_done:
            rng.restore(self._at_epoch_start, self._own)
            again = replay.forward(loader, n_done, state.interrupt)
            if is_exhausted:
                next(again.iterator, None)
            replay.leave(loader, again.iterator)
            if not self._is_same(again, is_whole=True):
                self._warn_of_others(OTHER_EPOCHS)

    def _start_workers(self) -> None:
        """Have workers that persist be where they were: their first pass draws a random number more than later ones."""
        if getattr(self._loader, "persistent_workers", False) and not self._noted["is_first_pass"]:
            begin(self._loader)

    def _is_same(self, again: replay.Pass, is_whole: bool) -> bool:
        """Whether a pass gives the batches that it gave: the newest, or, of one that is whole, the first.

        Batches that come after it may depend on random numbers that the model has drawn in between.
        """
        then, now = (self._noted["first"], again.first) if is_whole else (self._noted["last"], again.last)
        return now is not None and bool(then == now)

    def _new_pass(self, is_whole: bool) -> Entry:
        """How the fit goes on if the data cannot be brought back into the middle of its pass. Warns of it."""
        state, n_done = self._state, self._n_done
        if is_whole:
            self._warn_of_others(OTHER_EPOCHS)
            return Entry(n_done, limit=n_done)
        if state.n_epochs is not None and state.epoch + 1 == state.n_epochs:
            self._warn_of_others(f"the rest of this last epoch, behind batch {n_done - 1}, comes from a new pass")
            return Entry(n_done, limit=state.n_batches)
        self._warn_of_others(f"the rest of epoch {state.epoch}, behind batch {n_done - 1}, is left out, and training "
                             "goes on with the next epoch")
        return Entry(n_done, limit=n_done, is_cut=True)

    def _doubt(self) -> bool:
        """Whether other batches may come without anyone noticing. Warns of it."""
        doubt = replay.can_differ(self._loader, self._noted["is_first_pass"])
        if doubt:
            self._warn(f"may go on with other batches than it would have: {doubt}")
        return bool(doubt)

    def _warn_of_others(self, what: str) -> None:
        self._warn(f"gives other batches when its pass is begun again, so {what}. A loader with state_dict() and "
                   "load_state_dict() goes on exactly")

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self._path}: the training data ({type(self._loader).__name__}) {what}.", stacklevel=2)


@contextmanager
def taking_up(path: Path) -> Iterator[None]:
    """An error inside means that a checkpoint holds what nobody can take up: a ValueError that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be taken up: {error!r}. Nothing was changed.") from error
