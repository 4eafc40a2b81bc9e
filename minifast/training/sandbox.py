"""A block that leaves no trace in the parts of a fit."""
import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from ..base import snapshot
from ..core.callback import Callback
from ..core.ownership import check_callbacks
from ..data.loader import generators, second_copy, valid_sets
from ..machine.signals import DeferredInterrupt
from .parts import Parts


@contextmanager
def sandbox(parts: Parts, callbacks: Iterable[Callback] = ()) -> Iterator[None]:
    """A block that leaves no trace in `parts` and `callbacks`: see `Trainer.sandbox`."""
    train, valid = parts.dls.train, parts.dls.valid
    copies = {name: second_copy(loader) for name, loader in valid_sets(valid)}
    twins = copy.copy(parts.dls)  # whatever else it holds, such as the classes
    twins.train, twins.valid = second_copy(train), copies if isinstance(valid, Mapping) else copies.get("")
    watched = [(cb, cb.state_dict()) for cb in (*parts.callbacks, *check_callbacks(callbacks, "callbacks"))]
    attributes = dict(vars(parts))
    lists = [(value, list(value)) for value in attributes.values() if isinstance(value, list)]
    restore_recorder = parts.recorder.keep()
    restore = snapshot.capture(parts.model, parts.opt, [generator for loader in (train, *copies.values())
                                                        for generator in generators(loader)])
    parts.dls = twins
    try:
        yield
    finally:
        with DeferredInterrupt(is_held=True):  # Ctrl-C must not stop this half way
            vars(parts).clear()
            vars(parts).update(attributes)
            for value, items in lists:
                value[:] = items
            for cb, saved in watched:
                cb.load_state_dict(saved)
            restore_recorder()
            restore()
