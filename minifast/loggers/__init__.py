"""Loggers: the same rows that the Recorder has, in files and services, while the fit goes on."""
from .files import CSVLogger, RunLog
from .services import TensorBoardLogger, WandbLogger

__all__ = ["CSVLogger", "RunLog", "TensorBoardLogger", "WandbLogger"]
