"""minifast: callback-based training for PyTorch, with a core that can be read in an evening."""
import typing as _typing
from importlib import import_module as _import_module

from torch import __version__ as _torch

if _torch < "2.10":  # a TorchVersion, which compares by numbers
    raise ImportError(f"minifast needs torch 2.10 or newer, this is {_torch}: older ones can run code from a file of "
                      "weights (CVE-2025-32434, CVE-2026-24747). Install a newer one: pip install --upgrade torch.")

from . import schedules, suggest
from .base.batch import split_batch
from .core.callback import Callback, CancelBatch, CancelEpoch, CancelFit, Order
from .core.state import State
from .data.dataloaders import DataLoaders
from .data.digits import digits
from .data.tensor_loader import TensorLoader
from .errors import NonFiniteGradient, NonFiniteLoss
from .finder.finder import LRFinder
from .finder.result import LRFind
from .learner import Learner
from .optim.groups import LayerGroup, LayerGroups
from .record.record import FitRecord
from .schedules.lr import (
    CircularLR,
    CircularLRBeta,
    ConstantLR,
    CosineAnnealing,
    ExponentialLR,
    FlatCos,
    LinearLR,
    OneCycle,
    PolynomialLR,
)
from .schedules.scheduler import Plan, Scheduler
from .schedules.time_limit import TimeLimit
from .standard.finite import FiniteLoss
from .standard.metrics import Metrics, accuracy, error_rate, rmse, top_k_accuracy
from .standard.progress import Progress
from .standard.recorder import Recorder

__version__ = "0.1.0"

# The toolbox is imported when a name of it is first used: `import minifast` takes no longer however much there is.
_LATER = {
    "callbacks.activations": ("ActivationStats",),
    "callbacks.averaging": ("EMA", "SWA"),
    "callbacks.batches": ("CutMix", "MixUp", "ProgressiveResizing"),
    "callbacks.ensemble": ("SnapshotEnsemble",),
    "callbacks.formats": ("ChannelsLast", "MixedPrecision"),
    "callbacks.gradients": ("GradientClip", "GradientNorm", "GradientStats"),
    "callbacks.microbatch": ("AutoMicrobatch",),
    "callbacks.monitors": ("EarlyStopping", "ReduceLROnPlateau", "SaveBest"),
    "callbacks.unfreeze": ("Unfreeze",),
    "base.hooks": ("Hook", "Hooks", "hook_outputs"),
    "inference.export": ("export_info", "load_exported"),
    "loggers": ("CSVLogger", "RunLog", "TensorBoardLogger", "WandbLogger"),
    "record.runs": ("LoggedFit", "Run", "plot_runs", "read_run"),
    "resume.checkpoint": ("Checkpoint",),
    "schedules.composed": ("PiecewiseLR", "Schedule"),
    "standard.whole_set": ("WholeSet",),
    "studies.preflight": ("Finding", "Report"),
    "studies.race": ("Race",),
    "studies.summary": ("Summary",),
    "studies.timeline": ("Moment", "Profile", "Trace"),
}
if _typing.TYPE_CHECKING:
    from .base.hooks import Hook, Hooks, hook_outputs
    from .callbacks.activations import ActivationStats
    from .callbacks.averaging import EMA, SWA
    from .callbacks.batches import CutMix, MixUp, ProgressiveResizing
    from .callbacks.ensemble import SnapshotEnsemble
    from .callbacks.formats import ChannelsLast, MixedPrecision
    from .callbacks.gradients import GradientClip, GradientNorm, GradientStats
    from .callbacks.microbatch import AutoMicrobatch
    from .callbacks.monitors import EarlyStopping, ReduceLROnPlateau, SaveBest
    from .callbacks.unfreeze import Unfreeze
    from .inference.export import export_info, load_exported
    from .loggers import CSVLogger, RunLog, TensorBoardLogger, WandbLogger
    from .record.runs import LoggedFit, Run, plot_runs, read_run
    from .resume.checkpoint import Checkpoint
    from .schedules.composed import PiecewiseLR, Schedule
    from .standard.whole_set import WholeSet
    from .studies.preflight import Finding, Report
    from .studies.race import Race
    from .studies.summary import Summary
    from .studies.timeline import Moment, Profile, Trace


def __getattr__(name: str) -> _typing.Any:
    module = next((module for module, names in _LATER.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(_import_module(f".{module}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["EMA", "SWA", "ActivationStats", "AutoMicrobatch", "CSVLogger", "Callback", "CancelBatch", "CancelEpoch",
           "CancelFit", "ChannelsLast", "Checkpoint", "CircularLR", "CircularLRBeta", "ConstantLR", "CosineAnnealing",
           "CutMix", "DataLoaders", "EarlyStopping", "ExponentialLR", "Finding", "FiniteLoss", "FitRecord", "FlatCos",
           "GradientClip", "GradientNorm", "GradientStats", "Hook", "Hooks", "LRFind", "LRFinder", "LayerGroup",
           "LayerGroups", "Learner", "LinearLR", "LoggedFit", "Metrics", "MixUp", "MixedPrecision", "Moment",
           "NonFiniteGradient", "NonFiniteLoss", "OneCycle", "Order", "PiecewiseLR", "Plan", "PolynomialLR", "Profile",
           "Progress", "ProgressiveResizing", "Race", "Recorder", "ReduceLROnPlateau", "Report", "Run", "RunLog",
           "SaveBest", "Schedule", "Scheduler", "SnapshotEnsemble", "State", "Summary", "TensorBoardLogger",
           "TensorLoader", "TimeLimit", "Trace", "Unfreeze", "WandbLogger", "WholeSet", "accuracy", "digits",
           "error_rate", "export_info", "hook_outputs", "load_exported", "plot_runs", "read_run", "rmse", "schedules",
           "split_batch", "suggest", "top_k_accuracy"]
