"""What the layers put out while they train: mean, spread, dead units, and the colour plot of their histograms."""
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base.hooks import hook_outputs
from ..base.nest import tensors
from ..core.state import State
from ..errors import check_choice, check_int, quoted
from ..show import plots
from ..show.tables import listed
from .gradients import StepStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATS = ("mean", "std", "near_zero")
NEAR_ZERO = 0.05  # |activation| below it counts as near zero
DECADES = (-4, 4)  # of the histogram: |activation| from 1e-4 to 1e4, what is beyond goes to the outermost bins
MOST_COUNTED = 2**16  # values of one histogram: enough for a picture, and float32, in which torch counts, is exact


@dataclass(eq=False)
class ActivationStats(StepStats):
    """Records mean, standard deviation, share near zero and a histogram of what layers put out, while they train.

    layers: a glob over module names ("*.conv?"), or several; None: every module with parameters and without children.
    every: record each `every`-th weight update, an int >= 1. A recorded step may take twice the time.
    bins: of the histograms, an int >= 2: of |activation| on a log scale, 1e-4 .. 1e4; zeros are in the first bin.

    A row is one weight update; of several micro-batches the first is looked at, of a layer that runs several times its
    first run, of several outputs the first floating-point one. nan: the layer did not run. Values that are not finite
    reach mean and std, but no histogram (inf: its last bin). Of more than 65,536 outputs every k-th is counted there.
    What is recorded is that of the newest fit, also while it runs: 4 * (3 + bins) bytes a layer and row. A model that
    was compiled before has no hooks inside. Raises ValueError for arguments out of range or a glob without a match.

    >>> ActivationStats("*.relu", every=10)
    ActivationStats(layers='*.relu', every=10, bins=40)
    """

    kind = "layers"

    layers: str | Sequence[str] | None = None
    every: int = 1
    bins: int = 40

    def __post_init__(self) -> None:
        globs = [self.layers] if isinstance(self.layers, str) else self.layers
        are_names = isinstance(globs, Sequence) and globs and all(isinstance(glob, str) and glob for glob in globs)
        if globs is not None and not are_names:
            raise ValueError("layers must be a glob over module names, several of them, or None, got "
                             f"{self.layers!r:.80}. Pass e.g. '*.conv1'.")
        self.every, self.bins = check_int("every", self.every), check_int("bins", self.bins, minimum=2)
        self._clear((), 0, len(STATS) + self.bins)
        self._found: dict[nn.Module, Tensor] | None = None  # of the update under way
        self._listening = False

    def before_fit(self, state: State) -> None:
        watched, n = self._watched(state.model), len(STATS) + self.bins
        self._modules = list(watched.values())
        self._clear(tuple(watched), len(watched), n)
        self._nan = torch.full((n,), float("nan"), device=state.device)
        self._hooks = hook_outputs(self._modules, self._note)
        self._hooks.__enter__()

    def before_batch(self, state: State) -> None:
        if state.batch_index % state.accumulate == 0:
            self._listening = state.step % self.every == 0
            self._found = {} if self._listening else None

    def after_pred(self, state: State) -> None:
        self._listening = False

    after_batch = after_pred  # the batch may have been cancelled before its forward pass

    def after_step(self, state: State) -> None:
        if self._found is None:
            return
        if not self._found:
            raise RuntimeError(f"none of the watched layers ran: {listed(self.names)}. One compiled before has no "
                               "hooks: train with compile=False, or watch others, ActivationStats(layers=...).")
        self._add(state.step, torch.stack([self._found.get(module, self._nan) for module in self._modules]))
        self._found = None

    def after_fit(self, state: State) -> None:
        self._hooks.__exit__()
        self._modules, self._found = [], None
        del self._hooks

    @property
    def stats(self) -> dict[str, NDArray[np.float32]]:
        """"mean", "std" (of the population) and "near_zero" (share of |activation| < 0.05), each (rows, layers)."""
        return dict(zip(STATS, self._rows().numpy().transpose(2, 0, 1), strict=False))

    @property
    def hists(self) -> NDArray[np.float32]:
        """How many outputs lay in each bin, (rows, layers, bins)."""
        return self._rows()[:, :, len(STATS):].numpy()

    @property
    def edges(self) -> NDArray[np.float64]:
        """The edges of the bins, in |activation|, (bins + 1,); the outermost bins also hold what lies beyond."""
        return np.logspace(*DECADES, self.bins + 1)

    def plot(self, stat: str = "mean", *, ax: "Axes | None" = None) -> "Axes":
        """Draw one of `stats` of every layer that ran. Raises ValueError for another, RuntimeError without rows."""
        check_choice("stat", stat, STATS)
        self._check_any()
        label = f"share of |activation| < {NEAR_ZERO}" if stat == "near_zero" else f"{stat} of the activations"
        return plots.step_curves(self.steps, self.stats[stat].astype(np.float64), self.names, label, ax)

    def plot_hist(self, layer: str | int = -1, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the colour plot of one layer: a column per step, the brighter the larger the share of its outputs there.

        layer: its name, or its number in `names`. Healthy training has a bright band that moves little; a bright first
        bin is a layer of zeros; waves that climb and collapse: the learning rate is too high. Raises as `plot` does.
        """
        self._check_any()
        n = len(self.names)
        if isinstance(layer, int) and not isinstance(layer, bool) and -n <= layer < n:
            layer = self.names[layer]
        if not isinstance(layer, str) or layer not in self.names:
            raise ValueError(f"layer must be a watched one ({listed(self.names)}) or its number, got {quoted(layer)}.")
        ax = plots.axes(ax)
        steps, counts = self.steps, self.hists[:, self.names.index(layer)]
        half = self.every / 2  # the columns stand `every` steps apart
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # the last batch of an epoch may be smaller
        ax.imshow(np.log1p(1000 * shares.T), origin="lower", aspect="auto", interpolation="nearest", cmap="magma",
                  extent=(steps[0] - half, steps[-1] + half, *DECADES))
        powers = range(DECADES[0], DECADES[1] + 1)
        ax.set_yticks(powers, [f"$10^{{{power}}}$" for power in powers])
        used = np.flatnonzero((counts > 0).any(0))
        if used.size:
            ax.set_ylim(*np.log10(self.edges)[[used[0], used[-1] + 1]])
        plots.count_on_x(ax, plots.STEPS)
        ax.set_ylabel("|activation|")
        ax.set_title(f"{layer}: log(1 + 1000 * share of the outputs)", fontsize="small")
        return ax

    def _watched(self, model: nn.Module) -> dict[str, nn.Module]:
        named = dict(model.named_modules())
        if self.layers is None:
            leaves = {name: module for name, module in named.items()
                      if not list(module.children()) and list(module.parameters(recurse=False))}
            if leaves:
                return leaves
            raise ValueError(f"the model ({type(model).__name__}) has no module that holds parameters and no children: "
                             "say which to watch, ActivationStats(layers=...).")
        globs = [self.layers] if isinstance(self.layers, str) else self.layers
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in named):
                raise ValueError(f"layers={glob!r} matches no module. Those of this model: {listed([*named][1:], 8)}.")
        return {name: module for name, module in named.items() if any(fnmatchcase(name, glob) for glob in globs)}

    @torch.no_grad()
    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._listening or self._found is None or module in self._found:
            return
        out = next((tensor for tensor in tensors(output) if tensor.is_floating_point() and tensor.numel()), None)
        if out is not None:
            out = out.detach().float()
            mean = out.mean()
            std = torch.linalg.vector_norm(out - mean) / out.numel() ** 0.5  # std() is slow on a CPU
            near_zero = (out.abs() < NEAR_ZERO).float().mean()
            self._found[module] = torch.cat([torch.stack([mean, std, near_zero]), histogram(out, self.bins)])


def histogram(values: Tensor, bins: int) -> Tensor:
    """Counts of |values| in `bins` equal steps of the logarithm from 1e-4 to 1e4, float32 (bins,); nan is not counted.

    >>> histogram(torch.tensor([0.0, 1e-9, -3.0, 5.0, 2e7, float("nan")]), bins=4)
    tensor([2., 0., 2., 1.])
    """
    low, high = DECADES
    flat = values.flatten()
    stride = -(-len(flat) // MOST_COUNTED)
    flat = flat[::stride + (stride % 2 == 0)]  # odd: an even one would always hit the same columns of an image
    powers = flat.abs().log10_().clamp_(low, high).nan_to_num_(nan=low - 1)
    if powers.is_cuda and torch.are_deterministic_algorithms_enabled():  # torch then refuses histc
        edges = torch.linspace(low, high, bins + 1, device=powers.device)
        below = torch.searchsorted(powers.sort().values, edges)
        below[-1] = len(powers)  # the last bin holds its right edge
        return below.diff().float()
    return torch.histc(powers, bins, low, high)
