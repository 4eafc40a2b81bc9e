"""A look at the first batch of a fit."""
import math

import torch

from .batches import tensors
from .callback import Callback, Order
from .state import State


class FiniteInputs(Callback):
    """Raises ValueError if the first loss of a fit is not finite because its batch is not.

    A model that can deal with NaN in its inputs has a finite loss, and is left alone. Costs one look at the device
    per fit.
    """

    order = Order.SETUP

    def before_fit(self, state: State) -> None:
        self._is_first = True

    def after_loss(self, state: State) -> None:
        if not self._is_first:
            return
        self._is_first = False
        loss = float(state.loss.detach())
        if math.isfinite(loss):
            return
        for tensor in tensors(state.batch):
            bad = ~torch.isfinite(tensor)
            if bad.any():
                first = ", ".join(str(int(i)) for i in bad.nonzero()[0])
                raise ValueError(f"the loss of the first batch is {loss}: the batch itself has "
                                 f"{int(bad.sum())} values that are NaN or infinite in a tensor of shape "
                                 f"{tuple(tensor.shape)}, the first at [{first}]. Clean the data.")
