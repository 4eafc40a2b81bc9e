"""Pictures: from a folder of them to a trained classifier."""
from .arrays import from_arrays
from .datasets import from_dataset
from .form import ImageForm
from .loaders import ImageDataLoaders
from .tree import image_folders

__all__ = ["ImageDataLoaders", "ImageForm", "from_arrays", "from_dataset", "image_folders"]
