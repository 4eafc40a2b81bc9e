"""minifast: callback-based training for PyTorch that can be read in an evening."""
from . import schedules, suggest
from .activations import ActivationStats
from .augment import CutMix, MixUp, ProgressiveResizing
from .averaging import EMA, SWA
from .batches import split_batch
from .budget import TimeLimit
from .callback import Callback, CancelBatch, CancelEpoch, CancelFit, Order
from .composed import PiecewiseLR, Schedule
from .data import DataLoaders, TensorLoader, digits
from .export import export_info, load_exported
from .gradients import GradientClip, GradientNorm
from .groups import LayerGroup, LayerGroups
from .hooks import Hook, Hooks, hook_outputs
from .layer_stats import GradientStats
from .learner import Learner
from .loggers import CSVLogger, RunLog, TensorBoardLogger, WandbLogger
from .lr import (
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
from .lr_find import LRFind, LRFinder
from .metrics import Metrics, accuracy, error_rate, rmse, top_k_accuracy
from .microbatch import AutoMicrobatch
from .monitors import EarlyStopping, ReduceLROnPlateau, SaveBest
from .plan import Plan
from .precision import ChannelsLast, MixedPrecision
from .preflight import Finding, Report
from .progress import Progress
from .race import Race
from .record import FitRecord
from .recorder import Recorder
from .runs import LoggedFit, Run, plot_runs, read_run
from .scheduler import Scheduler
from .snapshots import SnapshotEnsemble
from .state import State
from .summary import Summary
from .timeline import Moment, Profile, Trace
from .unfreeze import Unfreeze
from .whole_set import WholeSet

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SWA",
    "ActivationStats",
    "AutoMicrobatch",
    "CSVLogger",
    "Callback",
    "CancelBatch",
    "CancelEpoch",
    "CancelFit",
    "ChannelsLast",
    "CircularLR",
    "CircularLRBeta",
    "ConstantLR",
    "CosineAnnealing",
    "CutMix",
    "DataLoaders",
    "EarlyStopping",
    "ExponentialLR",
    "Finding",
    "FitRecord",
    "FlatCos",
    "GradientClip",
    "GradientNorm",
    "GradientStats",
    "Hook",
    "Hooks",
    "LRFind",
    "LRFinder",
    "LayerGroup",
    "LayerGroups",
    "Learner",
    "LinearLR",
    "LoggedFit",
    "Metrics",
    "MixUp",
    "MixedPrecision",
    "Moment",
    "OneCycle",
    "Order",
    "PiecewiseLR",
    "Plan",
    "PolynomialLR",
    "Profile",
    "Progress",
    "ProgressiveResizing",
    "Race",
    "Recorder",
    "ReduceLROnPlateau",
    "Report",
    "Run",
    "RunLog",
    "SaveBest",
    "Schedule",
    "Scheduler",
    "SnapshotEnsemble",
    "State",
    "Summary",
    "TensorBoardLogger",
    "TensorLoader",
    "TimeLimit",
    "Trace",
    "Unfreeze",
    "WandbLogger",
    "WholeSet",
    "accuracy",
    "digits",
    "error_rate",
    "export_info",
    "hook_outputs",
    "load_exported",
    "plot_runs",
    "read_run",
    "rmse",
    "schedules",
    "split_batch",
    "suggest",
    "top_k_accuracy",
]
