"""Layer groups, learning rates, making an optimizer. Knows models and torch's optimizers; nothing of fits or data."""
