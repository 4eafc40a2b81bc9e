"""The gradient of each weight update: its norm written down, and clipped; how hard it pulls at each layer group."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.callback import Callback, Order
from ..core.ownership import finite_check
from ..core.state import State
from ..errors import check_int, check_number, check_same_names
from ..show import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLUSH_EVERY = 128  # rows that wait on the device, to come over in one copy
GOOD_RATIO = 1e-3  # a rule of thumb of practitioners, no theorem


@dataclass(eq=False)
class GradientNorm(Callback):
    """Records the L2 norm of the gradient of every weight update: `learn.recorder.column("grad_norm")`.

    Of all parameters together, averaged over the accumulation window and unscaled. Nothing waits for the device.

    >>> import torch
    >>> from minifast import Learner
    >>> learn = Learner(nn.Linear(1, 1, bias=False), ([(torch.ones(2, 1), torch.ones(2, 1))], None),
    ...                 lambda pred, target: 3 * pred.mean(), verbose=False)
    >>> learn.fit(0.1, 2, callbacks=[GradientNorm()])
    >>> learn.recorder.column("grad_norm")
    array([3., 3.])
    """

    owns = ("grad_norm",)  # one writer of this column in a fit

    def before_fit(self, state: State) -> None:
        self._params = [p for group in state.opt.param_groups for p in group["params"]]

    def before_step(self, state: State) -> None:
        # torch 2.10 takes no norm of a sparse tensor
        self._norm = nn.utils.get_total_norm([grad.coalesce().values() if grad.is_sparse else grad
                                              for grad in self._grads()])

    def after_step(self, state: State) -> None:
        state.record.log("grad_norm", self._norm)

    def after_fit(self, state: State) -> None:
        self._params = []

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._params if p.grad is not None]


@dataclass(eq=False)
class GradientClip(GradientNorm):
    """Clips the gradient of every weight update, and records its norm before that, as `GradientNorm` does.

    norm: > 0, the largest L2 norm of the gradient of all parameters together; a longer one is shortened to it.
    value: > 0, the largest absolute value of each element. Exactly one of the two is given, else ValueError. The
    gradient is that of the whole update: averaged over the accumulation window, and unscaled.

    A gradient that is not finite (or whose norm is not) is refused before the step, with `NonFiniteGradient`, which
    names epoch, step, learning rate and parameters: weights and optimizer are those of the step before. On an
    accelerator the error comes up to a second late, as `FiniteLoss` describes; until then, an optimizer that is not one
    of torch's fused ones makes updates with a gradient of 0. Inside `lr_find`, nothing is refused.

    >>> GradientClip(norm=1.0)
    GradientClip(norm=1.0, value=None)
    """

    norm: float | None = None
    value: float | None = None

    in_lr_find = True

    def __post_init__(self) -> None:
        if (self.norm is None) == (self.value is None):
            raise ValueError(f"GradientClip takes either a norm or a value, got norm={self.norm!r:.80} and "
                             f"value={self.value!r:.80}. Pass e.g. GradientClip(norm=1.0).")
        if self.norm is not None:
            self.norm = check_number("norm", self.norm, above=0, example="GradientClip(norm=1.0)")
        if self.value is not None:
            self.value = check_number("value", self.value, above=0, example="GradientClip(value=0.5)")

    def before_fit(self, state: State) -> None:
        super().before_fit(state)
        self._check = finite_check(state.callbacks)

    def before_step(self, state: State) -> None:
        super().before_step(state)
        if self._check is not None:
            self._check.check_gradient(state, self._norm)
        if self.norm is not None:
            nn.utils.clip_grads_with_norm_(self._params, self.norm, self._norm)
        elif self.value is not None:
            nn.utils.clip_grad_value_(self._params, self.value)
        if self._check is not None and self._check.to_zero is not None:
            for grad in self._grads():
                (grad._values() if grad.is_sparse else grad).masked_fill_(self._check.to_zero, 0.0)


class StepStats(Callback):
    """Of `GradientStats` and `ActivationStats`: a row for every n-th update of the newest fit; nothing waits for it."""

    order = Order.RECORD  # last: what it looks at is as all others have left it
    kind: ClassVar[str]  # what `names` are names of, for messages

    def _clear(self, names: Sequence[str], *shape: int) -> None:
        self.names = tuple(names)
        self._steps: list[int] = []
        self._waiting: list[Tensor] = []
        self._flushed = [torch.empty(0, *shape)]

    def _add(self, step: int, row: Tensor) -> None:
        self._steps.append(step)
        self._waiting.append(row)
        if len(self._waiting) >= FLUSH_EVERY:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._flushed.append(torch.stack(self._waiting).cpu())
            self._waiting.clear()

    def _rows(self) -> Tensor:
        self._flush()
        return torch.cat(self._flushed)

    def _check_any(self) -> None:
        if not self._steps:
            raise RuntimeError("no step was recorded. Train first, e.g. learn.fit(0.01, callbacks=[stats]).")

    @property
    def steps(self) -> NDArray[np.int64]:
        """The recorded weight updates, by their 0-based number, (rows,)."""
        return np.array(self._steps, dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "steps": list(self._steps), "rows": self._rows()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if self.names and saved["steps"]:  # else it is what was before the first fit
            check_same_names(self.kind, saved["names"], self.names)
        self.names, self._steps = tuple(saved["names"]), list(saved["steps"])
        self._waiting, self._flushed = [], [saved["rows"].cpu().clone()]


@dataclass(eq=False)
class GradientStats(StepStats):
    """Records, at every `every`-th weight update, the gradient norm and the update ratio of each layer group.

    every: an int >= 1, else ValueError. A recorded step holds a second copy of the trainable weights until it is done.
    The gradient norm is the L2 norm of all gradients of the group as the step uses them: averaged over the accumulation
    window, unscaled and clipped. The update ratio is |weights after - weights before| / |weights before|, over the
    parameters that have a gradient. Both are nan for a group without a gradient (frozen, or not in this batch's forward
    pass); the ratio of weights that are all zero is inf. What is recorded is that of the newest fit, as it goes.

    >>> GradientStats(every=10)
    GradientStats(every=10)
    """

    kind = "layer groups"

    every: int = 1

    def __post_init__(self) -> None:
        self.every = check_int("every", self.every)
        self._clear((), 2, 0)
        self._before: list[tuple[list[Tensor], list[Tensor]]] | None = None  # (parameters, copies) of each group

    def before_fit(self, state: State) -> None:
        self._params = [[p for group in state.opt.param_groups if group["layer_group"] == i for p in group["params"]]
                        for i in range(len(state.group_names))]
        self._nan = torch.full((), float("nan"), device=state.device)
        self._clear(state.group_names, 2, len(state.group_names))

    def before_step(self, state: State) -> None:
        if state.step % self.every == 0:
            trained = [[p for p in params if p.grad is not None] for params in self._params]
            grads = [[p.grad for p in params if p.grad is not None] for params in trained]
            self._norms = [self._norm([grad.coalesce().values() if grad.is_sparse else grad for grad in of_group])
                           for of_group in grads]
            self._before = [(params, [p.detach().clone() for p in params]) for params in trained]

    def after_step(self, state: State) -> None:
        if self._before is None:
            return
        ratios = []
        for params, before in self._before:
            moved = torch._foreach_sub([p.detach() for p in params], before) if params else []
            ratios.append(self._norm(list(moved)) / self._norm(before))
        self._add(state.step, torch.stack([torch.stack(self._norms), torch.stack(ratios)]))
        self._before = None

    def after_fit(self, state: State) -> None:
        self._params, self._norms, self._before = [], [], None

    @property
    def group_names(self) -> tuple[str, ...]:
        """The layer groups of the newest fit."""
        return self.names

    @property
    def grad_norms(self) -> NDArray[np.float64]:
        """L2 norm of each layer group's gradient, (rows, layer groups)."""
        return self._rows()[:, 0].double().numpy()

    @property
    def update_ratios(self) -> NDArray[np.float64]:
        """|change of the weights| / |weights| of each layer group, (rows, layer groups)."""
        return self._rows()[:, 1].double().numpy()

    def plot_grad_norms(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the gradient norm of each layer group, on a log scale. Raises RuntimeError if nothing was recorded."""
        return self._plot(self.grad_norms, "gradient norm", ax)

    def plot_update_ratios(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the update ratio of each layer group, on a log scale. Raises RuntimeError if nothing was recorded.

        A dotted line is at 1e-3: far below, a group hardly learns; far above, its learning rate is likely too high.
        """
        ax = self._plot(self.update_ratios, "update ratio |Δw| / |w|", ax)
        ax.axhline(GOOD_RATIO, color="grey", linestyle=":", linewidth=1)
        return ax

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        """The L2 norm of all together, (); nan of none. Half precision is summed in float32."""
        if not tensors:
            return self._nan
        exact = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=exact)))
        return norm

    def _plot(self, columns: NDArray[np.float64], label: str, ax: "Axes | None") -> "Axes":
        self._check_any()
        ax = plots.step_curves(self.steps, columns, self.names, label, ax)
        if (columns > 0).any():
            ax.set_yscale("log", nonpositive="mask")
        return ax
