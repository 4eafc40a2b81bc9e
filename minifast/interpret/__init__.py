"""What a classifier gets wrong, in one pass over data. Knows a Trainer; nobody below knows it."""
from .confusion import Confused, MostConfused
from .interpretation import ClassificationInterpretation, Interpretation

__all__ = ["ClassificationInterpretation", "Confused", "Interpretation", "MostConfused"]
