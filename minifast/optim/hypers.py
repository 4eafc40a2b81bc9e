"""Hyper-parameters of an optimizer: read, written, and put back."""
from collections.abc import Callable, Iterable, Sequence

from torch.optim import Optimizer


def set_lrs(opt: Optimizer, lrs: Sequence[float]) -> None:
    """Write one learning rate per layer group."""
    for group in opt.param_groups:
        group["lr"] = lrs[group["layer_group"]]


def group_lrs(opt: Optimizer, n_groups: int) -> list[float]:
    """The learning rate of each layer group."""
    lrs = [float("nan")] * n_groups
    for group in opt.param_groups:
        lrs[group["layer_group"]] = float(group["lr"])
    return lrs


def has_momentum(opt: Optimizer) -> bool:
    """Whether there is one: `momentum` as in SGD, or `betas` as in Adam."""
    return all("momentum" in group or "betas" in group for group in opt.param_groups)


def set_momentum(opt: Optimizer, momentum: float) -> None:
    """Write `momentum` (SGD) or `betas[0]` (Adam) of all groups."""
    for group in opt.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum


def get_momentum(opt: Optimizer) -> float:
    """`momentum` (SGD) or `betas[0]` (Adam) of the last group; nan for an optimizer that has neither."""
    group = opt.param_groups[-1]
    return float(group["betas"][0] if "betas" in group else group.get("momentum", float("nan")))


def keep_hypers(opt: Optimizer, names: Iterable[str]) -> Callable[[], None]:
    """What puts back the hyper-parameters `names` of every param_group ("momentum": of SGD or Adam) as they are now."""
    keys = {key for name in names for key in (("momentum", "betas") if name == "momentum" else (name,))}
    noted = [(group, {key: group[key] for key in keys if key in group}) for group in opt.param_groups]

    def restore() -> None:
        for group, values in noted:
            group.update(values)
    return restore
