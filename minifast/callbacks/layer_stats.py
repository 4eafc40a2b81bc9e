"""How hard training pulls at each layer group: gradient norms and update ratios."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.callback import Callback, Order
from ..core.state import State
from ..errors import check_int, check_same_names
from ..record.scalars import ScalarColumn
from ..show import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD_RATIO = 1e-3  # a rule of thumb of practitioners, no theorem


@dataclass(eq=False)
class GradientStats(Callback):
    """Records, at every `every`-th weight update, the gradient norm and the update ratio of each layer group.

    every: an int >= 1. The gradient norm is the L2 norm of all gradients of the group as the step uses them: averaged
    over the accumulation window, unscaled and clipped. The update ratio is |weights after - weights before| / |weights
    before|, over the parameters that have a gradient. Both are nan for a group without a gradient (frozen, or not in
    this batch's forward pass); the ratio of weights that are all zero is inf.

    What it records is that of the newest fit, and readable while it runs. A recorded step holds a second copy of the
    trainable weights until it is done: raise `every` where that costs too much. Raises ValueError for another `every`.

    >>> GradientStats(every=10)
    GradientStats(every=10)
    """

    order = Order.RECORD  # last in before_step, behind unscaling and clipping: what the optimizer really gets

    every: int = 1

    def __post_init__(self) -> None:
        self.every = check_int("every", self.every)
        self.group_names: tuple[str, ...] = ()
        self._clear(0)

    def _clear(self, n_groups: int) -> None:
        self._steps: list[int] = []
        self._norm_columns = [ScalarColumn() for _ in range(n_groups)]
        self._ratio_columns = [ScalarColumn() for _ in range(n_groups)]
        self._norms: list[Tensor] = []  # of the update under way
        self._before: list[tuple[list[Tensor], list[Tensor]]] | None = None

    def before_fit(self, state: State) -> None:
        self.group_names = state.group_names
        self._params = [[p for group in state.opt.param_groups if group["layer_group"] == i for p in group["params"]]
                        for i in range(len(state.group_names))]
        self._nan = torch.full((), float("nan"), device=state.device)
        self._clear(len(state.group_names))

    def before_step(self, state: State) -> None:
        if state.step % self.every == 0:
            trained = [[p for p in params if p.grad is not None] for params in self._params]
            self._norms = [self._norm([_values(p.grad) for p in params if p.grad is not None]) for params in trained]
            self._before = [(params, [p.detach().clone() for p in params]) for params in trained]

    def after_step(self, state: State) -> None:
        if self._before is None:
            return
        self._steps.append(state.step)
        columns = zip(self._norms, self._before, self._norm_columns, self._ratio_columns, strict=True)
        for norm, (params, before), norm_column, ratio_column in columns:
            norm_column.append(norm)
            moved = torch._foreach_sub([p.detach() for p in params], before) if params else []
            ratio_column.append(self._norm(list(moved)) / self._norm(before))
        self._before = None

    def after_fit(self, state: State) -> None:
        self._params, self._norms, self._before = [], [], None

    @property
    def steps(self) -> NDArray[np.int64]:
        """The recorded weight updates, by their 0-based number, (rows,)."""
        return np.array(self._steps, dtype=np.int64)

    @property
    def grad_norms(self) -> NDArray[np.float64]:
        """L2 norm of each layer group's gradient, (rows, layer groups)."""
        return self._read(self._norm_columns)

    @property
    def update_ratios(self) -> NDArray[np.float64]:
        """|change of the weights| / |weights| of each layer group, (rows, layer groups)."""
        return self._read(self._ratio_columns)

    def plot_grad_norms(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the gradient norm of each layer group, on a log scale. Raises RuntimeError if nothing was recorded."""
        return self._plot(self.grad_norms, "gradient norm", ax)

    def plot_update_ratios(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the update ratio of each layer group, on a log scale, with a dotted line at 1e-3.

        That is a rule of thumb: far below, a group hardly learns; far above, its learning rate is likely too high.
        Raises RuntimeError if nothing was recorded.
        """
        ax = self._plot(self.update_ratios, "update ratio |Δw| / |w|", ax)
        ax.axhline(GOOD_RATIO, color="grey", linestyle=":", linewidth=1)
        return ax

    def state_dict(self) -> dict[str, Any]:
        """What was recorded so far, as plain values."""
        return {"group_names": list(self.group_names), "steps": list(self._steps),
                "grad_norms": torch.from_numpy(self.grad_norms), "update_ratios": torch.from_numpy(self.update_ratios)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on after the rows of `state_dict`. Raises ValueError if they are of other layer groups."""
        if self.group_names and saved["steps"]:  # else it is what was before the first fit
            check_same_names("layer groups", saved["group_names"], self.group_names)
        self.group_names = tuple(saved["group_names"])
        self._clear(len(self.group_names))
        self._steps = list(saved["steps"])
        for columns, key in ((self._norm_columns, "grad_norms"), (self._ratio_columns, "update_ratios")):
            for column, of_group in zip(columns, saved[key].unbind(1), strict=True):
                for value in of_group.cpu():
                    column.append(value)
                column.read()  # now: what is appended next lies on the device

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        """The L2 norm of all `tensors` as one vector, (); nan of none. Half precision is summed in float32."""
        if not tensors:
            return self._nan
        exact = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=exact)))
        return norm

    def _read(self, columns: Sequence[ScalarColumn]) -> NDArray[np.float64]:
        return np.array([column.read() for column in columns]).reshape(len(columns), len(self._steps)).T

    def _plot(self, columns: NDArray[np.float64], label: str, ax: "Axes | None") -> "Axes":
        if not self._steps:
            raise RuntimeError("no step was recorded. Train first, e.g. learn.fit(0.01, callbacks=[stats]).")
        ax = plots.step_curves(self.steps, columns, self.group_names, label, ax)
        if (columns > 0).any():
            ax.set_yscale("log", nonpositive="mask")
        return ax


def _values(grad: Tensor) -> Tensor:
    """The gradient; of a sparse one, the values that are not zero."""
    return grad.coalesce().values() if grad.is_sparse else grad
