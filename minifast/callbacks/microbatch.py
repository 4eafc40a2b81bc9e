"""Batches that do not fit into memory: run in parts, whose gradients add up to the whole batch's."""
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..base import snapshot
from ..base.batch import n_samples, parts
from ..base.losses import nonzero
from ..core.callback import Callback, Order
from ..core.state import State
from ..errors import check_int

NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")  # what torch's backends say, in lower case
log = logging.getLogger("minifast")


@dataclass(eq=False)
class AutoMicrobatch(Callback):
    """Runs training batches in parts that fit into memory; their gradients add up to the whole batch's.

    size: samples in a part at most, None for whole batches. min_size: what it may fall to, >= 1 and at most `size`.
    Where memory runs out, the size is halved and the same batch is run again, from the same random numbers. The log
    "minifast" says once what it settled on; later fits begin with that, `current_size`. At `min_size` the error is
    raised, with a note of what was tried. Raises ValueError for sizes out of range.

    Batches may be nests, as `minifast.base.batch.parts` describes. Means are weighted as with `accumulate`, so updates
    are those of the whole batch within rounding, but for BatchNorm, which takes its statistics over each part (a failed
    attempt has moved its running ones), and dropout, which draws other numbers. Callbacks hear `after_pred`,
    `after_loss` and `after_backward` once per part of each attempt; in `after_batch`, `batch`, `n_samples`, `loss` and
    `loss_weight` are those of the whole batch, `pred` and `target` of its last part. Validation is not covered.

    >>> AutoMicrobatch(size=16)
    AutoMicrobatch(size=16, min_size=1)
    """

    size: int | None = None
    min_size: int = 1

    order = Order.SETUP  # innermost, whatever else wraps `state.gradient`
    owns = ("the micro-batch size",)  # one of them in a fit
    in_lr_find = True
    saves = ("current_size",)

    def __post_init__(self) -> None:
        self.min_size = check_int("min_size", self.min_size)
        if self.size is not None:
            self.size = check_int("size", self.size, self.min_size, example="AutoMicrobatch(size=16)")
        self.current_size = self.size

    def before_fit(self, state: State) -> None:
        state.gradient = partial(self._gradient, state.gradient)

    def _gradient(self, gradient: Any, state: State, emit: Any, window: Any) -> None:
        """What `State.gradient` is: the gradient of `state.batch`, in as many parts as it takes."""
        restore_rng, before = snapshot.rng(), self.current_size
        while not self._attempt(gradient, state, emit, window):
            for name in ("pred", "loss"):  # they hold the memory of the failed attempt
                if hasattr(state, name):
                    delattr(state, name)
            if state.device.type == "cuda":
                torch.cuda.empty_cache()
            restore_rng()
        if self.current_size != before:
            log.warning("out of memory: from now on, batches are run in parts of at most %d samples (AutoMicrobatch).",
                        self.current_size)

    def _attempt(self, gradient: Any, state: State, emit: Any, window: Any) -> bool:
        """Run all parts; False if memory ran out. Once it has returned, nothing holds the tensors in the traceback."""
        batch, done = state.batch, []
        small = [batch] if self.current_size is None else parts(batch, _n_samples(state, batch), self.current_size)
        try:
            with window.in_parts(len(small)):
                for state.batch in small:
                    gradient(state, emit, window)
                    done.append((state.n_samples, state.loss.detach(), state.loss_weight))
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or any(text in str(error).lower() for text in NO_MEMORY)):
                raise
            self._halve(_n_samples(state, batch), error)
            return False
        finally:
            state.batch = batch
        if len(small) > 1:
            state.n_samples, state.loss_weight = sum(n for n, _, _ in done), sum(weight for _, _, weight in done)
            state.loss = torch.stack([loss * weight for _, loss, weight in done]).sum() / nonzero(state.loss_weight)
        return True

    def _halve(self, n: int, error: RuntimeError) -> None:
        """Half the size of the parts that `n` samples were run in; raises `error` if they may not shrink."""
        size = n if self.current_size is None else -(-n // -(-n // self.current_size))
        if size <= self.min_size:
            error.add_note(f"AutoMicrobatch: no memory for {size} of the batch's {n} samples at a time, and "
                           f"min_size={self.min_size} allows no smaller parts.")
            raise error
        self.current_size = max(self.min_size, size // 2)


def _n_samples(state: State, batch: Any) -> int:
    inputs, target = state.unpack(batch)
    return n_samples(target, inputs)
