"""The weights of the best epoch, out of the folder of a run."""
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..files.reading import load_tree
from ..files.weights import put_weights
from .folder import BEST, FitFolder, fits_of, newest


def load_best(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load the best weights of a run into `model`; gives {"monitor", "value", "epoch"} of them.

    path: the folder of a run (then it is its last fit's), of a fit, or a best.ckpt. Raises FileNotFoundError if there
    is none, ValueError if it is damaged, of another run than the checkpoints beside it, or does not fit the model.
    """
    file = _file(Path(path))
    saved = load_tree(file, checked=True)
    best = saved.get("best") if isinstance(saved, dict) else None
    if not isinstance(best, dict) or not {"monitor", "value", "epoch", "weights"} <= best.keys():
        raise ValueError(f"{file} is not the best checkpoint of a run. Its weights are loaded by learn.load(path).")
    beside = FitFolder(file.parent).checkpoints()
    if beside and newest(beside)[1].get("run") != saved.get("run"):
        raise ValueError(f"{file} is of another run than the checkpoints beside it: there is no best in this one.")
    put_weights(model, saved["model"]["weights"] if best["weights"] is None else best["weights"], file)
    return {name: best[name] for name in ("monitor", "value", "epoch")}


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    fits = fits_of(path)
    folder = fits[-1] if fits else FitFolder(path)
    if folder.best.is_file():
        return folder.best
    others = [str(fit.path) for fit in fits if fit.best.is_file()]
    hint = f"There is one in {', '.join(others)}." if others else \
        "It is written by callbacks=[Checkpoint(path), SaveBest(...)] once an epoch was the best."
    raise FileNotFoundError(f"there is no {BEST} in {folder.path}. {hint}")
