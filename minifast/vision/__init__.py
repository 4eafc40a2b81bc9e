"""Pictures: from a folder of them to a trained classifier."""
from .form import ImageForm

__all__ = ["ImageForm"]
