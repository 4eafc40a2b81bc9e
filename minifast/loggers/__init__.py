"""Loggers: the same rows that the Recorder has, in files and services, while the fit goes on.

They know the state of a fit and records; nothing of a Learner.
"""
from .targets import CSVLogger, RunLog, TensorBoardLogger, WandbLogger

__all__ = ["CSVLogger", "RunLog", "TensorBoardLogger", "WandbLogger"]
