"""Pictures: from a folder of them to a trained classifier.

Knows the whole house below, down to the Learner; only the command line knows it. The way: find the pictures
(`from_folders`), decide their form (`options`), make the loaders (`loaders`), train (`vision_learner`).
"""
from .classifier import Classifier, Prediction, load_classifier
from .form import ImageForm
from .from_arrays import from_arrays
from .from_datasets import from_dataset
from .from_folders import image_folders
from .loaders import ImageDataLoaders
from .stages import layer_groups
from .vision_learner import VisionLearner, vision_learner

__all__ = ["Classifier", "ImageDataLoaders", "ImageForm", "Prediction", "VisionLearner", "from_arrays", "from_dataset",
           "image_folders", "layer_groups", "load_classifier", "vision_learner"]
