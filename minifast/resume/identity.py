"""What a fit is: its plan, data, model and optimizer in words, and whether a checkpoint is one of this fit."""
import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from ..base.batch import Batch
from ..core.callback import Callback
from ..core.checks import n_items
from ..core.state import State
from ..data.loader import n_batches
from ..data.tensor_loader import TensorLoader
from ..schedules.scheduler import Scheduler
from ..schedules.time_limit import TimeLimit
from . import saved_state
from .replay import digest

FORMAT = 1  # of a checkpoint; a newer one is refused
MOST = 2**53  # of anything that is counted
SAMPLES = 100  # at each end of the data
Facts = dict[str, dict[str, Any]]
# of a param_group: what is no setting, is compared by another name, or is what a fit sets
OWN_TOPICS = ("params", "param_names", "layer_group", "lr", "initial_lr", "weight_decay", *saved_state.OWN_CHOICE)


def check(path: Path, saved: Any, state: State, own: Facts) -> None:
    """Raise ValueError unless `saved`, read from `path`, is a checkpoint of this fit, whose `facts` are `own`.

    Warns of what may change bits.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("format"), int):
        raise ValueError(f"{path} is not a checkpoint of a fit. Weights are loaded by learn.load(path).")
    if saved["format"] > FORMAT:
        raise ValueError(f"{path} has format {saved['format']}, and this version of minifast reads up to {FORMAT}. "
                         "Upgrade minifast.")
    mine = saved_state.keyed(state.callbacks)
    try:
        problems = [*differences(saved["facts"], own), *saved_state.model_misfits(state.model, saved["model"]),
                    *saved_state.optimizer_misfits(state.model, state.opt, saved["optimizer"])]
        if not problems:
            _check_form(saved, state)
        changed = [f"{name} {saved['environment'].get(name)} then, {value} now"
                   for name, value in environment(state).items() if saved["environment"].get(name) != value]
        gone = [name for name, kept in saved["callbacks"].items() if kept and name not in mine]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint that minifast has written ({error!r}).") from error
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{path} was made by another fit:\n  {lines}\nTo go on with it, call the fit with the same "
                         "arguments (computed ones, such as a learning rate, from a script that is seeded).\nTo train "
                         "on from its weights, load them by learn.load(path) and give Checkpoint another folder.")
    new = [name for name, cb in mine.items() if name not in saved["callbacks"]
           and (cb.saves or type(cb).state_dict is not Callback.state_dict)]
    then, now = saved["texts"], texts(state)
    others = [f"{name} {'is gone' if name not in now else 'is new' if name not in then else 'is another'}"
              for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name) and name not in (*gone, *new)]
    warned = [
        *(f": there is no {name} in this fit: what it has kept is left out" for name in gone),
        *(f": there is no {name} in the checkpoint: it begins in the middle of the fit" for name in new),
        *([f": {'; '.join(others)} in this fit, so it will not end as it would have"] if others else []),
        *([f" was made elsewhere ({'; '.join(changed)}): training goes on, but maybe not with the same bits"]
          if changed else [])]
    for text in warned:
        warnings.warn(f"{path}{text}.", stacklevel=2)


def _check_form(saved: Mapping[str, Any], state: State) -> None:
    """Raise ValueError or KeyError unless what a fit relies on is there, in its type and range."""
    position, loader = saved["position"], saved["loader"]
    types = {
        dict: [*(saved[name] for name in ("environment", "rng", "epoch_rng", "loss", "texts")), position["metrics"],
               *saved["callbacks"].values(), *([] if saved["window"] is None else [saved["window"]])],
        bool: [saved["finished"], position["is_epoch_end"], position["is_ending"], loader["is_first_pass"]],
        int: [position[name] for name in ("epoch", "step", "n_done")],
        str: [saved["run"], *(loader[name] for name in ("first", "last") if loader[name] is not None)],
        list: [loader["validating"]], float: [position["lr_scale"]]}
    if not (all(type(value) is kind for kind, values in types.items() for value in values)
            and all(0 <= count < MOST for count in types[int]) and 0 < position["lr_scale"] < math.inf
            and (state.n_epochs is None or position["epoch"] < state.n_epochs)):
        raise ValueError("what says where the fit was is not in its form")


def facts(state: State) -> Facts:
    """What must be the same where a fit goes on: topic -> name -> plain value. Nothing personal: no path, no user."""
    plans = [_text(cb) for cb in state.callbacks if isinstance(cb, (Scheduler, TimeLimit))]
    opt, trained = state.opt, _n_trained(state)
    return {
        "plan": {"epochs": state.n_epochs, "updates": state.n_steps, "updates per epoch": state.steps_per_epoch,
                 "batches per update": state.accumulate, "peak learning rates": list(state.lrs),
                 "schedules": plans, "weight decay": [float(decay) for decay in state.weight_decays]},
        "data": {"training data": _loader(state.train_dl),
                 **{f"validation data {name}".rstrip(): _loader(loader) for name, loader in state.valid_sets}},
        "model": {"class": type(state.model).__name__},
        "optimizer": {"class": type(opt).__name__, "layer groups": list(state.group_names),
                      "parameters in each": [len(group["params"]) for group in opt.param_groups],
                      "frozen layer groups": [name for name, n in trained.items() if not n],
                      "parameters that are trained": list(trained.values()), **_settings(state)},
    }


def environment(state: State) -> dict[str, str]:
    """What changes bits, but no meaning, as text."""
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {"torch": str(torch.__version__), "numpy": np.__version__, "device": device,
            "threads": str(torch.get_num_threads()),
            "worker processes": str(getattr(state.train_dl, "num_workers", 0)),
            "world size": str(torch.distributed.get_world_size() if initialized else 1),
            "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
            "float32 matmul precision": torch.get_float32_matmul_precision(),
            "cudnn benchmark": str(torch.backends.cudnn.benchmark)}


def texts(state: State) -> dict[str, str]:
    """What else decides what a fit does: name -> a digest of how it is written, as that may hold paths.

    The loss, the layers of the model, and callbacks of minifast's own that take part: no logger, no bar.
    """
    numbers = {name: value for name, value in getattr(state.loss_func, "__dict__", {}).items()
               if name != "training" and isinstance(value, (bool, int, float, str))}  # torch's losses do not print them
    written = {"the loss": (state.loss_func, numbers), "the layers of the model": state.model}
    for cb in state.callbacks:
        name = type(cb).__name__
        is_own = type(cb).__module__.startswith("minifast.") and name not in ("Recorder", "Progress")
        if is_own and cb.in_sandbox and type(cb).__repr__ is not object.__repr__:
            written[name if name not in written else f"{name}, again"] = cb
    return {name: hashlib.blake2b(_text(thing).encode(), digest_size=8).hexdigest() for name, thing in written.items()}


def differences(saved: Mapping[str, Any], own: Facts) -> list[str]:
    """What of the `facts` in a checkpoint is another thing in this fit, a line each.

    >>> differences({"plan": {"epochs": 3}}, {"plan": {"epochs": 5}})
    ['plan: epochs 3 in the checkpoint, 5 in this fit']
    """
    lines = []
    for topic, mine in own.items():
        theirs = saved.get(topic) or {}
        for name in dict.fromkeys([*theirs, *mine]):
            then, now = theirs.get(name), mine.get(name)
            if isinstance(then, Mapping) and isinstance(now, Mapping):
                lines += differences({f"{topic}: {name}": then}, {f"{topic}: {name}": dict(now)})
            elif then != now:
                lines.append(f"{topic}: {name} {then!r:.120} in the checkpoint, {now!r:.120} in this fit")
    return lines


def _loader(loader: Iterable[Batch]) -> dict[str, Any]:
    batch_size = getattr(loader, "batch_size", None)
    return {"batches": n_batches(loader), "batch_size": batch_size if isinstance(batch_size, int) else None,
            "samples": n_items(loader), "first and last samples": _content(loader), "order": _order(loader),
            "drop_last": bool(getattr(loader, "drop_last", False))}


def _content(loader: Any) -> str | None:
    """A digest of the first and last samples, where they can be had without reading any: of tensors and of subsets."""
    data = getattr(loader, "dataset", loader)
    if isinstance(data, Subset):
        return digest(torch.as_tensor(list(data.indices)))
    found = data.tensors if isinstance(data, (TensorLoader, TensorDataset)) else ()
    return digest([(tensor[:SAMPLES], tensor[-SAMPLES:]) for tensor in found])


def _order(loader: Any) -> str:
    """In which order it gives its samples, as far as it says so."""
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return type(loader.sampler if loader.batch_size else loader.batch_sampler or loader.sampler).__name__
    return "shuffled" if getattr(loader, "shuffle", False) else "as it comes"


def _n_trained(state: State) -> dict[str, int]:
    """How many parameters of each layer group are trained, as the fit began: norm layers may be, others not."""
    counts = dict.fromkeys(state.group_names, 0)
    for group in state.opt.param_groups:
        counts[state.group_names[group["layer_group"]]] += sum(p.requires_grad for p in group["params"])
    return counts


def _settings(state: State) -> dict[str, list[Any]]:
    """What else the optimizer was made with: plain hyper-parameters, of each of its param_groups."""
    names = dict.fromkeys(key for group in state.opt.param_groups for key in group if key not in OWN_TOPICS)
    return {name: [_plain(group.get(name)) for group in state.opt.param_groups] for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def _text(thing: Any) -> str:
    """Its repr without addresses, which are others in each process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))
