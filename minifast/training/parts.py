"""What a fit is made of: model, data, loss, optimizer and their settings, checked and kept together."""
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..base import snapshot
from ..base.batch import Batch, UnpackBatch, output_loss, split_batch
from ..core.callback import Callback
from ..core.checks import check_optimizer
from ..core.ownership import check_callbacks
from ..data.dataloaders import DataLoaders, as_dataloaders
from ..errors import check_callable, check_flag, check_number, quoted
from ..optim.groups import LayerGroups, Splitter, split
from ..optim.hypers import group_lrs
from ..optim.making import as_device, freeze, label_groups, make_optimizer
from ..optim.rates import LR, check_lr, spread_lrs
from ..show.tables import listed
from ..standard.metrics import Metrics
from ..standard.recorder import Recorder

Data = DataLoaders | tuple[Iterable[Batch], Iterable[Batch] | Mapping[str, Iterable[Batch]] | None]


class Parts:
    """Owns what a fit is made of. `Learner` describes the arguments."""

    def __init__(self, model: nn.Module, dls: Data, loss_func: Callable[[Any, Any], Any] | None = None, *,
                 opt_func: Callable[..., Optimizer] = torch.optim.AdamW, lr: LR = 1e-3, splitter: Splitter = None,
                 wd: float | None = None, wd_norm_bias: bool = False, train_bn: bool = True,
                 metrics: Iterable[Any] = (), train_metrics: bool = False, callbacks: Iterable[Callback] = (),
                 device: torch.device | str | None = None, seed: int | None = None,
                 compile: bool | Mapping[str, Any] = False, unpack: UnpackBatch = split_batch,
                 verbose: bool = True) -> None:
        self.model, self.loss_func, self.dls = model, loss_func, as_dataloaders(model, dls)
        self.metrics: list[Any] = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
        self.callbacks = check_callbacks(callbacks, "callbacks")
        self.check_assigned()
        self.train_bn, self.wd_norm_bias = check_flag("train_bn", train_bn), check_flag("wd_norm_bias", wd_norm_bias)
        self.train_metrics = check_flag("train_metrics", train_metrics)
        self.verbose = check_flag("verbose", verbose)
        check_callable("unpack", unpack, "a function batch -> (inputs, target)")
        wd = None if wd is None else check_number("wd", wd, minimum=0)
        device = as_device(device, model)
        self._groups = split(model, splitter)
        self.lr, lrs = check_lr("lr", lr), spread_lrs(lr, self._groups.names)
        self.model, self.device, self.unpack = model.to(device), device, unpack
        self.opt = make_optimizer(opt_func, self.model, self._groups, lrs, wd, self.wd_norm_bias)
        self.recorder = Recorder()
        self._compile_options = options = _compile_options(compile)
        self._compiled: Any = None if options is None else torch.compile(self.model, **options)
        self.is_fitting = False
        self.fits_ended: dict[str, int] = {}  # of each run's folder: how many fits were saved in it
        if seed is not None:
            snapshot.seed_all(seed)

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.model.parameters())
        return (f"{type(self).__name__}: {type(self.model).__name__}, {n:,} parameters in {len(self._groups)} layer "
                f"group{'s' * (len(self._groups) != 1)} ({listed(self._groups.names)}), on {self.device}")

    @property
    def groups(self) -> LayerGroups:
        """The layer groups, first layers first; printed, a table of what they hold and how they are trained."""
        label_groups(self.opt, len(self._groups))
        self._groups.lrs = group_lrs(self.opt, len(self._groups))
        wds = [(group["layer_group"], group["weight_decay"]) for group in self.opt.param_groups
               if group.get("weight_decay") is not None]
        self._groups.wds = [max((wd for at, wd in wds if at == i), default=None) for i in range(len(self._groups))]
        return self._groups

    @property
    def forward(self) -> Callable[..., Any]:
        """What a fit calls with the inputs: the model, or with `compile` its compiled form with the same weights."""
        if self._compile_options is None:
            return self.model
        if self._compiled._orig_mod is not self.model:  # learn.model was assigned
            self._compiled = torch.compile(self.model, **self._compile_options)
        compiled: Callable[..., Any] = self._compiled
        return compiled

    @property
    def loss(self) -> Callable[[Any, Any], Any]:
        """(output, target) -> loss: `loss_func`, or what the output carries."""
        return self.loss_func or output_loss

    @property
    def sched(self) -> Recorder:
        """fastai 0.7's name of `recorder`."""
        return self.recorder

    def check_assigned(self) -> None:
        """Bring what may be assigned between fits into its form. Raises TypeError or ValueError for what cannot be."""
        self.dls = as_dataloaders(self.model, self.dls)
        if (self.loss_func is not None and not callable(self.loss_func)) or isinstance(self.loss_func, type):
            raise TypeError(f"loss_func must be a function (output, target) -> loss, got {self.loss_func!r:.80}. "
                            "Pass e.g. nn.CrossEntropyLoss().")
        callbacks = check_callbacks(self.callbacks, "callbacks")
        self.callbacks = self.callbacks if isinstance(self.callbacks, list) else callbacks
        if not isinstance(self.metrics, list):
            self.metrics = list(self.metrics) if isinstance(self.metrics, tuple) else [self.metrics]
        Metrics(self.metrics)  # refuses what is no metric, and two of one name

    def check_together(self) -> None:
        """Raise ValueError if model, layer groups and optimizer do not belong together."""
        check_optimizer(self.model, self.opt, (p for group in self.groups for p in group.params))

    def freeze(self) -> None:
        """Train the last layer group only (and, with `train_bn`, all norm layers)."""
        self.freeze_to(-1)

    def freeze_to(self, n: int) -> None:
        """Freeze layer groups [:n] and train [n:]; -g <= n < g for g groups.

        A frozen parameter has requires_grad False and no gradient, is not decayed, and loses its optimizer state.
        Raises ValueError for another n.
        """
        g = len(self._groups)
        if isinstance(n, bool) or not isinstance(n, int) or not -g <= n < g:
            raise ValueError(f"freeze_to(n) needs an int {-g} <= n < {g} for {g} layer group{'s' * (g > 1)} "
                             f"({', '.join(self._groups.names)}), got {quoted(n)}.")
        freeze(self._groups, n % g, self.opt, self.train_bn)

    def unfreeze(self) -> None:
        """Train all layer groups."""
        self.freeze_to(0)


def _compile_options(compile: Any) -> dict[str, Any] | None:
    """Options of `torch.compile`; None: it is not called."""
    if isinstance(compile, Mapping) and all(isinstance(option, str) for option in compile):
        return dict(compile)
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be True, False or a dict of options of torch.compile, got {compile!r:.80}. "
                        "Pass e.g. {'mode': 'reduce-overhead'}.")
    return {} if compile else None
