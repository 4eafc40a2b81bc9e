"""Whether a checkpoint is one of this fit."""
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.callback import Callback
from ..core.state import State
from . import saved_state
from .checkpoint import FORMAT
from .identity import Facts, changes, differences, environment, texts

MOST = 2**53  # of anything that is counted


def check(path: Path, saved: Any, state: State, own: Facts) -> None:
    """Raise ValueError unless `saved`, read from `path`, is a checkpoint of this fit; warn of what may change bits.

    own: the `facts` of the fit.
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
                         "arguments (what is computed before it, such as a learning rate, only comes out the same in a "
                         "script that is seeded).\nTo train on from its weights by another plan, load "
                         "them by learn.load(path) and give Checkpoint another folder.")
    new = [name for name, cb in mine.items() if name not in saved["callbacks"] and _keeps_anything(cb)]
    others = changes(*({name: text for name, text in written.items() if name not in (*gone, *new)}
                       for written in (saved["texts"], texts(state))))
    warned = [
        *(f": there is no {name} in this fit: what it has kept is left out" for name in gone),
        *(f": there is no {name} in the checkpoint: it begins in the middle of the fit" for name in new),
        *([f": {'; '.join(others)} in this fit, so it will not end as it would have"] if others else []),
        *([f" was made elsewhere ({'; '.join(changed)}): training goes on, but maybe not with the same bits"]
          if changed else [])]
    for text in warned:
        warnings.warn(f"{path}{text}.", stacklevel=2)


def _keeps_anything(cb: Callback) -> bool:
    """Whether a callback has a state to keep over a kill."""
    return bool(cb.saves) or type(cb).state_dict is not Callback.state_dict


def _check_form(saved: Mapping[str, Any], state: State) -> None:
    """Raise ValueError or KeyError unless what a fit relies on is there, with its type and range."""
    position, loader = saved["position"], saved["loader"]
    types = {
        dict: [saved[name] for name in ("environment", "rng", "loss", "texts")] + [position["metrics"]],
        bool: [saved["finished"], position["is_epoch_end"], position["is_ending"], loader["is_first_pass"]],
        int: [position[name] for name in ("epoch", "step", "n_done")],
        str: [saved["run"], *(loader[name] for name in ("first", "last") if loader[name] is not None)],
        list: [loader["validating"]], float: [position["lr_scale"]]}
    is_right = (
        all(type(value) is kind for kind, values in types.items() for value in values)
        and all(isinstance(kept, dict) for kept in saved["callbacks"].values())
        and all(0 <= count < MOST for count in types[int]) and 0 < position["lr_scale"] < math.inf
        and (state.n_epochs is None or position["epoch"] < state.n_epochs)
        and (isinstance(saved["epoch_rng"], dict) or saved["finished"])
        and isinstance(saved["window"], (dict, type(None))))
    if not is_right:
        raise ValueError("what says where the fit was is not in its form")
