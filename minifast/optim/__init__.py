"""Optimizers: layer groups, learning rates in every form, making one, reading and writing what it holds."""
