"""Pictures: from a folder of them to a trained classifier."""
from .arrays import from_arrays
from .classifier import Classifier, Prediction, load_classifier
from .datasets import from_dataset
from .form import ImageForm
from .learner import VisionLearner, vision_learner
from .loaders import ImageDataLoaders
from .stages import layer_groups
from .tree import image_folders

__all__ = ["Classifier", "ImageDataLoaders", "ImageForm", "Prediction", "VisionLearner", "from_arrays", "from_dataset",
           "image_folders", "layer_groups", "load_classifier", "vision_learner"]
