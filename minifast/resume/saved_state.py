"""The state of a fit as a tree of plain values, and back: all of it fits, or nothing is changed."""
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base import snapshot
from ..core.callback import Callback
from ..core.state import State
from ..data.loader import generators
from ..show.tables import listed
from ..standard.recorder import Recorder

OWN_CHOICE = ("fused", "foreach", "capturable", "differentiable")  # how an optimizer computes, not what
# in an optimizer's state, of the shape of the weights: torch's fused kernels do not check it
PER_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


def capture_model(model: nn.Module) -> dict[str, Any]:
    """Weights, buffers (those outside the state dict too) and which parameters are trained. Holds no copies."""
    return {"weights": dict(model.state_dict()),
            "transient": {name: holder[key] for name, (holder, key) in _transient(model).items()},
            "trainable": [name for name, p in model.named_parameters() if p.requires_grad]}


def capture_trained(state: State, loss_func: Any) -> dict[str, Any]:
    """Model, optimizer and a loss that is a module. Holds no copies."""
    return {"model": capture_model(state.model),
            "optimizer": {"names": _names(state.model, state.opt),  # torch itself takes parameters in any order
                          "state": state.opt.state_dict()},
            "loss": dict(loss_func.state_dict()) if isinstance(loss_func, nn.Module) else {}}


def capture_callbacks(state: State) -> dict[str, Any]:
    """What the callbacks keep over a kill."""
    return {name: cb.state_dict() for name, cb in keyed(state.callbacks).items()}


def keyed(callbacks: Iterable[Callback]) -> dict[str, Callback]:
    """Callbacks by the name under which their state is kept: the class, and a number from the second of a class on."""
    counts: Counter[str] = Counter()
    named: dict[str, Callback] = {}
    for cb in callbacks:
        name = type(cb).__name__
        counts[name] += 1
        named[name if counts[name] == 1 else f"{name}-{counts[name]}"] = cb
    return named


def loader_generators(state: State) -> list[Any]:
    """The random generators that the loaders of a fit carry."""
    loaders = [state.train_dl, *(loader for _, loader in state.valid_sets)]
    return [generator for loader in loaders for generator in generators(loader)]


def load(state: State, loss_func: Any, saved: Mapping[str, Any]) -> list[Callback]:
    """Put what was captured in place; gives the callbacks of which nothing was. Call it in `all_or_nothing`."""
    load_model(state.model, saved["model"])
    load_optimizer(state.opt, saved["optimizer"])
    if isinstance(loss_func, nn.Module):
        loss_func.load_state_dict(saved["loss"])
    own, kept = keyed(state.callbacks), saved["callbacks"]
    for name in own.keys() & kept.keys():
        own[name].load_state_dict(kept[name])
    return [cb for name, cb in own.items() if name not in kept]


def model_misfits(model: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """What of the saved model does not fit, a line each."""
    own, theirs = dict(model.state_dict()), saved["weights"]
    lines = _misfits("model", theirs, own)
    lines += [f"model: {name} is {_form(theirs[name])} in the checkpoint, {_form(own[name])} in this fit"
              for name in own if name in theirs and _form(theirs[name]) != _form(own[name])][:5]
    if not saved["trainable"] or not set(saved["trainable"]) <= {name for name, _ in model.named_parameters()}:
        lines.append(f"model: the parameters that are trained are said to be {saved['trainable']!r:.80}")
    return lines


def optimizer_misfits(model: nn.Module, opt: Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """What of the saved optimizer does not fit, a line each."""
    own, theirs = _names(model, opt), saved["names"]
    if own != theirs:
        return _misfits("optimizer", [*chain(*theirs)], [*chain(*own)]) or [
            "optimizer: its parameters are in other groups, or in another order, than in the checkpoint"]
    flat, shapes = [*chain(*own)], [tuple(p.shape) for group in opt.param_groups for p in group["params"]]
    return [f"optimizer: the state {key} of {flat[i]} has the shape {tuple(value.shape)} for {shapes[i]}"
            for i, values in saved["state"]["state"].items() for key, value in values.items()
            if key in PER_WEIGHT and isinstance(value, Tensor) and tuple(value.shape) != shapes[i]][:5]


def _misfits(what: str, saved: Iterable[str], own: Iterable[str]) -> list[str]:
    """Names that only the checkpoint, or only this fit, has."""
    return [f"{what}: {kind} {listed(names)}" for kind, names in (
        ("missing in the checkpoint:", [name for name in own if name not in set(saved)]),
        ("only in the checkpoint:", [name for name in saved if name not in set(own)])) if names]


def load_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Put the saved model in place; `model_misfits` has found none."""
    model.load_state_dict(saved["weights"])
    with torch.no_grad():
        for name, (holder, key) in _transient(model).items():
            if name in saved["transient"]:
                holder[key] = _as(saved["transient"][name], holder[key], model)
    trainable = set(saved["trainable"])
    for name, p in model.named_parameters():
        p.requires_grad_(name in trainable)


def load_optimizer(opt: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put the saved state of the optimizer in place. Its param_groups stay the same objects: a fit holds on to them."""
    groups = list(opt.param_groups)
    kept = [{key: group[key] for key in OWN_CHOICE if key in group} for group in groups]
    opt.load_state_dict(saved["state"])  # which it keeps, where that is on its device
    for group, loaded, own in zip(groups, opt.param_groups, kept, strict=True):
        group.update(loaded | own)
    opt.param_groups[:] = groups


@contextmanager
def all_or_nothing(state: State) -> Iterator[None]:
    """If the block fails, model, optimizer, callbacks, Recorder and random generators are what they were."""
    undo = snapshot.capture(state.model, state.opt, loader_generators(state))
    undo_recorder = [cb.keep() for cb in state.callbacks if isinstance(cb, Recorder)]
    watched = [(thing, dict(vars(thing))) for thing in (*state.callbacks, state.record)]
    try:
        yield
    except BaseException:
        for thing, attributes in watched:
            vars(thing).clear()
            vars(thing).update(attributes)
        for put_back in (*undo_recorder, undo):
            put_back()
        raise


def has_finite_weights(model: nn.Module) -> bool:
    """Whether no parameter that is trained holds NaN or infinity. Waits for the device."""
    params = [p.detach() for p in model.parameters() if p.requires_grad and p.is_floating_point() and p.numel()]
    return not params or bool(torch.stack([norm.float().cpu() for norm in torch._foreach_norm(params, float("inf"))])
                              .isfinite().all())


def _transient(model: nn.Module) -> dict[str, tuple[dict[str, Tensor | None], str]]:
    """Where buffers are that are not in the state dict: caches, which may grow or come later."""
    return {f"{prefix}.{name}".lstrip("."): (module._buffers, name)
            for prefix, module in model.named_modules() for name in sorted(module._non_persistent_buffers_set)}


def _as(value: Any, buffer: Tensor | None, model: nn.Module) -> Tensor | None:
    """`value` in `buffer` itself, where that has its shape. What was not made yet will be made as it was before."""
    if value is None:
        return buffer
    if not isinstance(value, Tensor) or (buffer is not None and buffer.dtype != value.dtype):
        raise ValueError(f"a buffer cannot be {_form(value)}")
    if buffer is not None and buffer.shape == value.shape:
        return buffer.copy_(value)
    return value.to(next((p.device for p in model.parameters()), value.device))


def _names(model: nn.Module, opt: Optimizer) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in opt.param_groups]


def _form(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}" if isinstance(value, Tensor) \
        else type(value).__name__
