"""What a classifier gets wrong: counts, examples and reports of one pass over data."""
from .confusion import Confused, MostConfused
from .interpretation import ClassificationInterpretation, Interpretation

__all__ = ["ClassificationInterpretation", "Confused", "Interpretation", "MostConfused"]
