"""Predictions, and models in files that predict elsewhere."""
