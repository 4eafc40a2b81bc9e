"""Whether a checkpoint is one of this fit."""
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.state import State
from ..show.tables import listed
from . import saved_state
from .checkpoint import FORMAT
from .identity import changes, differences, environment, texts

PARTS = ("run", "finished", "facts", "environment", "position", "rng", "epoch_rng", "loader", "window", "callbacks",
         "model", "optimizer", "loss", "texts")  # of a checkpoint
MOST = 2**53  # of anything that is counted


def check(path: Path, saved: Any, state: State, own: dict[str, Any]) -> None:
    """Raise ValueError unless `saved`, read from `path`, is a checkpoint of this fit; warn of what may change bits.

    own: the fit's `facts`.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("format"), int):
        raise ValueError(f"{path} is not a checkpoint of a fit. Weights are loaded by learn.load(path).")
    if saved["format"] > FORMAT:
        raise ValueError(f"{path} has format {saved['format']}, and this version of minifast reads up to {FORMAT}. "
                         "Upgrade minifast.")
    missing = [part for part in PARTS if part not in saved]
    mine = saved_state.keyed(state.callbacks)
    try:
        problems = [f"it has no {listed(missing)}"] if missing else [
            *differences(saved["facts"], own), *saved_state.model_misfits(state.model, saved["model"]),
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
                         "arguments (what is computed before it, such as a learning rate, only comes out the same in a "
                         "script that is seeded).\nTo train on from its weights by another plan, load "
                         "them by learn.load(path) and give Checkpoint another folder.")
    new = [name for name, cb in mine.items() if name not in saved["callbacks"] and saved_state.keeps_anything(cb)]
    for names, text in ((gone, "in this fit: what it has kept is left out"),
                        (new, "in the checkpoint: it begins in the middle of the fit")):
        for name in names:
            warnings.warn(f"{path}: there is no {name} {text}.", stacklevel=2)
    others = changes(*({name: text for name, text in written.items() if name not in (*gone, *new)}
                       for written in (saved["texts"], texts(state))))
    if others:
        warnings.warn(f"{path}: {'; '.join(others)} in this fit, so it will not end as it would have.", stacklevel=2)
    if changed:
        warnings.warn(f"{path} was made elsewhere ({'; '.join(changed)}): training goes on, but maybe not with "
                      "the same bits.", stacklevel=2)


def _check_form(saved: Mapping[str, Any], state: State) -> None:
    """Raise ValueError unless what a fit relies on has its type and range."""
    position, loader = saved["position"], saved["loader"]
    counts = [position[name] for name in ("epoch", "step", "n_done")]
    is_right = (
        all(type(count) is int and 0 <= count < MOST for count in counts)
        and (state.n_epochs is None or position["epoch"] < state.n_epochs)
        and all(type(flag) is bool for flag in (saved["finished"], position["is_epoch_end"], position["is_ending"],
                                                loader["is_first_pass"]))
        and type(position["lr_scale"]) is float and 0 < position["lr_scale"] < math.inf
        and all(isinstance(part, dict) for part in (position["metrics"], saved["rng"], *saved["callbacks"].values()))
        and (isinstance(saved["epoch_rng"], dict) or saved["finished"])
        and all(isinstance(loader[name], (str, type(None))) for name in ("first", "last"))
        and isinstance(loader["validating"], list)
        and all(isinstance(saved[name], dict) for name in ("loss", "texts"))
        and isinstance(saved["run"], str) and isinstance(saved["window"], (dict, type(None))))
    if not is_right:
        raise ValueError("what says where the fit was is not in its form")
