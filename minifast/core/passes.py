"""One pass over the training data or a validation set: modes, batches, and whether as many came as were announced."""
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager

from ..base.batch import Batch
from ..data.feed import feed
from ..data.loader import plain
from .checks import check_passes
from .state import State
from .window import Window


@contextmanager
def training_pass(state: State) -> Iterator[Iterator[tuple[int, Batch]]]:
    """A block for one epoch's (index, batch) pairs, in training mode and with a new `state.window`."""
    state.model.train()
    for norm in state.norms_in_eval:
        norm.eval()
    source, entry = state.source, state.source.take_entry()
    state.batch_index = entry.n_done - 1
    state.window = Window(state.opt, state.accumulate, state.n_batches)
    if entry.window is not None:
        state.window.load_state_dict(entry.window)
    batches = feed(state.train_dl, state.device, entry.limit, state.interrupt, f"epoch {state.epoch}, training data",
                   entry.n_done, entry.iterator, source.waiting, noted=source.note)
    with closing(batches):
        yield enumerate(batches, entry.n_done)
    is_whole = not state.is_ending and not entry.is_cut
    check_passes("training", state.batch_index + 1, state.n_batches if is_whole else None)


@contextmanager
def validation_pass(state: State, loader: Iterable[Batch]) -> Iterator[Iterator[tuple[int, Batch]]]:
    """A block for the (index, batch) pairs of one validation set, without augmentation."""
    state.batch_index = -1
    what = f"{state.valid_set} validation data".lstrip()
    batches = feed(plain(loader), state.device, None, state.interrupt, f"epoch {state.epoch}, {what}")
    with closing(batches):
        yield enumerate(batches)
    check_passes(what.removesuffix(" data"), state.batch_index + 1)
