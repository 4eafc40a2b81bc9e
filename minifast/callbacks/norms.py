"""The statistics of BatchNorm layers, computed anew for weights that no training step has seen."""
from contextlib import closing

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ..base import snapshot
from ..base.batch import call_model
from ..core.checks import check_passes
from ..core.state import State
from ..data.feed import feed
from ..data.loader import generators


def norms_to_update(state: State) -> list[_BatchNorm]:
    """The BatchNorm layers that keep statistics and are not frozen."""
    frozen = set(state.norms_in_eval)
    return [module for module in state.model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module not in frozen]


@torch.no_grad()
def update_norms(state: State) -> None:
    """Compute the statistics of the BatchNorm layers anew, in one pass over the training data, in train mode.

    They become the mean over the batches, as the loader yields them. Modes and random generators are put back. Without
    such layers there is no pass. Raises what loader and model raise, ValueError for a pass without batches, and
    KeyboardInterrupt.
    """
    norms = norms_to_update(state)
    if not norms:
        return
    restore_modes, restore_rng = snapshot.modes(state.model), snapshot.rng(generators(state.train_dl))
    momenta = [norm.momentum for norm in norms]
    state.model.train()
    for frozen in state.norms_in_eval:
        frozen.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        index = -1
        with closing(feed(state.train_dl, state.device, state.source.limit, state.interrupt)) as batches:
            for index, batch in enumerate(batches):  # noqa: B007
                call_model(state.forward, state.unpack(batch)[0])
                state.interrupt.check()
        check_passes("training", index + 1)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        restore_modes()
        restore_rng()
