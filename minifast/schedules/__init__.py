"""Schedules: pure functions of the step (`shapes`, whose names are here), and the callbacks that write them.

Knows callbacks, the state of a fit and optimizers; nothing of a Learner or of data.
"""
from .shapes import (  # noqa: I001 - filled, as below
    Shape, circular, circular_beta, circular_beta_momentum, circular_momentum, constant, cosine, cosine_restarts,
    cycle_at, cycle_ends, exponential, flat_cosine, linear, n_units, one_cycle, one_cycle_momentum, piece_at, piecewise,
    polynomial)

__all__ = ["Shape", "circular", "circular_beta", "circular_beta_momentum", "circular_momentum", "constant", "cosine",
           "cosine_restarts", "cycle_at", "cycle_ends", "exponential", "flat_cosine", "linear", "n_units", "one_cycle",
           "one_cycle_momentum", "piece_at", "piecewise", "polynomial"]
