"""What surrounds every fit, however it ends."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..base import snapshot
from .state import State


@contextmanager
def guarded(state: State) -> Iterator[None]:
    """A block that signals end only between two batches.

    At its end the modes of the modules and the grad mode are what they were, and every `.grad` is None.
    """
    restore_modes, has_gradients = snapshot.modes(state.model), torch.is_grad_enabled()
    with state.interrupt:
        try:
            yield
        finally:
            state.interrupt.is_held = True  # no signal stops this half way
            torch.set_grad_enabled(has_gradients)  # a validation that was stopped at once has left it off
            state.opt.zero_grad()
            restore_modes()
