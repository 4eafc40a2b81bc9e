"""Making an optimizer over layer groups, and changing what it holds between fits."""
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer

from ..errors import check_device
from .groups import LayerGroup, LayerGroups

_MAKE_STATE_AS_THEY_GO = (optim.Adadelta, optim.Adafactor, optim.Adam, optim.Adamax, optim.ASGD, optim.NAdam,
                          optim.RAdam, optim.RMSprop, optim.Rprop, optim.SparseAdam)


def make_optimizer(opt_func: Callable[..., Optimizer], model: nn.Module, groups: LayerGroups, lrs: Sequence[float],
                   wd: float | None, wd_norm_bias: bool) -> Optimizer:
    """`opt_func` over all parameters of `model`, fused where optimizer, device and model allow that.

    Each layer group becomes one of its param_groups, or two where norms and biases are not decayed; "layer_group" in
    them is its index.
    """
    param_groups = [{"params": list(params), "lr": lr, "layer_group": i}
                    for i, (group, lr) in enumerate(zip(groups, lrs, strict=True))
                    for params in ((group.params,) if wd_norm_bias else (group.decayed, group.undecayed)) if params]
    if not callable(opt_func) or isinstance(opt_func, Optimizer):
        raise TypeError(f"opt_func must be a torch optimizer class or a partial of one, got {opt_func!r:.80}. "
                        "Pass e.g. torch.optim.AdamW.")
    opt = _call(partial(opt_func, param_groups, lr=lrs[-1]), _can_fuse(opt_func, model))
    if not isinstance(opt, Optimizer):
        raise TypeError(f"opt_func must make a torch optimizer, got {type(opt).__name__}. Pass a class such as "
                        "torch.optim.AdamW, or functools.partial(torch.optim.SGD, momentum=0.9).")
    set_weight_decay(opt, groups, wd, wd_norm_bias)
    return opt


def _call(make: Callable[..., Optimizer], can_fuse: bool) -> Any:
    if can_fuse:
        with suppress(RuntimeError, TypeError):  # no fused kernel for this device or dtype: the usual one does the same
            return make(fused=True)
    try:
        return make()
    except TypeError as error:
        error.add_note("opt_func is called as opt_func(param_groups, lr=...): pass an optimizer class or a partial")
        raise


def _can_fuse(opt_func: Callable[..., Optimizer], model: nn.Module) -> bool:
    given = opt_func.keywords if isinstance(opt_func, partial) else {}
    if given.keys() & {"fused", "foreach", "capturable", "differentiable"} or given.get("dampening"):
        return False  # the user has chosen; or `fill_momentum` would not be exact
    if any(getattr(module, "sparse", False) for module in model.modules()):
        return False  # an embedding with sparse gradients, which fused kernels do not take
    with suppress(TypeError, ValueError):  # of what has no signature
        return "fused" in inspect.signature(opt_func).parameters and all(
            p.is_floating_point() for p in model.parameters())
    return False


def fill_momentum(opt: Optimizer, is_scheduled: bool) -> None:
    """Give every trainable parameter of a fused SGD its momentum buffer, zeros, which is where momentum begins.

    The fused kernel makes them at the first gradient, and fails where the parameters of a group do not all have theirs
    in the same step: thawed layers, or a branch of the model that is taken later.
    """
    if isinstance(opt, optim.SGD) and opt.defaults.get("fused") and not opt.defaults.get("dampening"):
        groups = [group for group in opt.param_groups if group["momentum"] or is_scheduled]
        for p in (p for group in groups for p in group["params"] if p.requires_grad):
            if opt.state[p].get("momentum_buffer") is None:
                opt.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def forget_unmade(opt: Optimizer) -> None:
    """Empty the states that an update has begun to make and never used, so that the next one makes them whole.

    Torch makes them part by part and takes for whole what is not empty: after an update that lack of memory or a second
    Ctrl-C has cut short, every later one would fail with a KeyError.
    """
    if isinstance(opt, _MAKE_STATE_AS_THEY_GO):
        for p, state in list(opt.state.items()):
            if float(state.get("step", 1)) == 0:
                del opt.state[p]


def label_groups(opt: Optimizer, n_groups: int) -> None:
    """Give the param_groups of a user's optimizer the index of their layer group; ValueError if that is not clear."""
    if all("layer_group" in group for group in opt.param_groups):
        return
    if n_groups not in (1, len(opt.param_groups)):
        raise ValueError(f"learn.opt has {len(opt.param_groups)} param_groups for {n_groups} layer groups: give it one "
                         "per layer group, or mark each with its index, {'params': ..., 'layer_group': 0}.")
    for i, group in enumerate(opt.param_groups):
        group["layer_group"] = 0 if n_groups == 1 else i


def set_weight_decay(opt: Optimizer, groups: LayerGroups, wd: float | None, wd_norm_bias: bool) -> None:
    """Write the optimizer's own weight decay (None: its default), and 0 for norms and biases unless `wd_norm_bias`."""
    if "weight_decay" not in opt.defaults:
        if wd is not None:
            raise ValueError(f"wd={wd:g}, but {type(opt).__name__} has no weight_decay. Pass wd=None.")
        return
    undecayed = {id(p) for group in groups for p in group.undecayed}
    for group in opt.param_groups:
        decays = wd_norm_bias or not all(id(p) in undecayed for p in group["params"])
        group["weight_decay"] = (opt.defaults["weight_decay"] if wd is None else float(wd)) if decays else 0.0


def freeze(groups: LayerGroups, n: int, opt: Optimizer, train_bn: bool) -> None:
    """Freeze groups[:n] and unfreeze groups[n:]; with `train_bn` the norm layers of frozen groups stay trainable."""
    for i, group in enumerate(groups):
        kept = {id(p) for norm in group.norms for p in norm.parameters(recurse=False)} if train_bn else set()
        for p in group.params:
            p.requires_grad_(i >= n or id(p) in kept)
            if not p.requires_grad:  # once thawed again, an old momentum would be a wrong one
                p.grad = None
                opt.state.pop(p, None)


def norms_in_eval(groups: Iterable[LayerGroup], train_bn: bool) -> tuple[nn.Module, ...]:
    """The norm layers that stay in eval mode while the rest trains: those of frozen groups, unless `train_bn`."""
    return () if train_bn else tuple(norm for group in groups if group.is_frozen for norm in group.norms)


def as_device(device: torch.device | str | None, model: nn.Module) -> torch.device:
    """Where to train: `device`, else where the model already sits if that is no CPU, else the accelerator if any."""
    if device is not None:
        return check_device(device)
    current = next((p.device for p in model.parameters()), torch.device("cpu"))
    if current.type != "cpu" or not torch.accelerator.is_available():
        return current
    return torch.accelerator.current_accelerator() or current
