"""Predictions, and models in files that predict elsewhere.

Nobody below knows it; `Learner` offers it.
"""
