"""`vision_learner`: pictures and the name of an architecture become a Learner."""
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base import snapshot
from ..base.batch import Batch
from ..base.nest import describe
from ..data.dataloaders import DataLoaders
from ..errors import check_flag
from ..learner import Learner
from ..optim.groups import Splitter
from ..show.screen import say
from ..show.tables import listed
from ..standard.metrics import accuracy
from .architectures import check_takes, image_model
from .classifier import classify
from .loaders import ImageDataLoaders, normalized_as
from .stages import layer_groups


class VisionLearner(Learner):
    """A `Learner` of pictures: `predict` takes a picture, and `export` writes down classes and preprocessing.

    Made by `vision_learner`, or from any model that gives (n, classes): the arguments are those of `Learner`. Pictures
    that replace `dls` must have the same `classes`; they and those of a test set are normalised as the model's were.
    They may have another size, which becomes that of `form`.
    """

    def __init__(self, model: nn.Module, dls: ImageDataLoaders, *args: Any, **options: Any) -> None:
        _check_dls(dls)
        self.classes, self.form = list(dls.classes or ()), dls.form
        super().__init__(model, dls, *args, **options)

    @property
    def dls(self) -> DataLoaders:
        """The data; may be assigned between fits."""
        return self._dls

    @dls.setter
    def dls(self, dls: DataLoaders) -> None:
        if isinstance(dls, ImageDataLoaders):
            if list(dls.classes or ()) != self.classes:  # else the numbers of the model's classes mean others
                raise ValueError(f"the model is one of {listed(self.classes)}, and dls has the classes "
                                 f"{listed(dls.classes or ())}. Make another vision_learner for them.")
            if dls.form.channels != self.form.channels:
                raise ValueError(f"the model takes pictures of {self.form.channels} channel(s), and dls has "
                                 f"{dls.form.channels}. Load them as those were, e.g. with channels=.")
            if (dls.form.mean, dls.form.std) != (self.form.mean, self.form.std):
                dls = dls.normalized(self.form.mean, self.form.std)
            self.form = dls.form
        self._dls = dls

    def eval_data(self, dl: Iterable[Batch] | str | None) -> Iterable[Batch]:
        data = super().eval_data(dl)  # may be a test set, with the mean and std of its own pictures
        if isinstance(data, Mapping):
            return {name: normalized_as(self.form, loader) for name, loader in data.items()}
        return normalized_as(self.form, data)

    def predict(self, x: Any) -> Any:
        """The `Prediction` for a picture: a path, a PIL image, a uint8 array (height, width[, 3]) or tensor (c, h, w).

        A list of pictures gives a list. A tensor of floats is a batch of inputs, as `Learner.predict` takes it, and
        gives the raw outputs. Raises FileNotFoundError for a missing file, ValueError for what is no picture.
        """
        if isinstance(x, Tensor) and x.is_floating_point():
            if x.ndim == 3:  # of which convolutions make an unbatched picture, and the model something without sense
                raise ValueError("a tensor of floats must be a batch of inputs (n, channels, height, width), got "
                                 f"{describe(x)}. Pass the picture itself, as uint8, or x[None].")
            return super().predict(x)
        return classify(super().predict, x, self.form, self.classes)

    def export(self, path: str | os.PathLike[str], *, inputs: Any = None, labels: Sequence[str] | None = None,
               metadata: Mapping[str, Any] | None = None) -> Path:
        """Write the model for inference, as `Learner.export` does, so that `load_classifier(path)` can read pictures.

        labels: None for the classes, or as many other names. To `metadata` comes "image", the form of a picture.
        """
        if isinstance(labels, (list, tuple)) and not len(set(map(str, labels))) == len(labels) == len(self.classes):
            raise ValueError(f"labels must be {len(self.classes)} different names, one for each class "
                             f"({listed(self.classes)}), got {labels!r:.80}.")
        if inputs is None:  # blank ones will do: they are described and traced, not written
            inputs = self.form.normalize(torch.zeros(2, self.form.channels, *self.form.size, dtype=torch.uint8))
        if metadata is None or isinstance(metadata, Mapping):
            if "image" in (metadata or {}):
                raise ValueError("metadata['image'] is where the form of a picture goes. Take another key.")
            metadata = {**(metadata or {}), "image": self.form.as_dict()}
        return super().export(path, inputs=inputs, labels=self.classes if labels is None else labels,
                              metadata=metadata)


def vision_learner(dls: ImageDataLoaders, arch: Any, pretrained: bool = True, *, weights: Any = None,
                   head: Callable[[int, int], nn.Module] | None = None, splitter: Splitter = None,
                   loss_func: Callable[[Any, Any], Any] | None = None, metrics: Iterable[Any] = (accuracy,),
                   **options: Any) -> VisionLearner:
    """A `VisionLearner` with an architecture of torchvision, its last layer replaced by a new one for the classes.

    dls: pictures and their classes, from `image_folders`, `from_dataset` or `from_arrays`.
    arch: a function of `torchvision.models` that makes a classifier (resnet18), its name, or a function of your own,
        n_classes -> module, which then decides about weights and normalisation.
    pretrained: whether to begin with torchvision's default weights, downloaded unless they are in torch's cache.
    weights: other ones, a member of torchvision's enum or its name, such as "IMAGENET1K_V2".
    head: a function (n_features, n_classes) -> module, in place of a new linear layer.
    splitter: None for `layer_groups`: stem, stages, head.
    loss_func: None for cross entropy.
    metrics, options: as in `Learner`; `seed` seeds the new layers, too.

    With weights the pictures are normalised as those were that they were trained on. For grey pictures the first
    convolution has one channel, with the sum of its weights over red, green and blue, and mean and std are the means of
    theirs. Nothing is frozen: `fine_tune` trains the head first, or call `freeze()`. GoogLeNet and Inception v3 come
    without their auxiliary heads.

    Raises ValueError or TypeError for what cannot work, before anything is downloaded where that can be told; OSError
    for weights that cannot be had, with what to do.

    >>> from minifast.vision import from_arrays
    >>> pictures = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    >>> dls = from_arrays(pictures, torch.arange(20) % 2, classes=["no", "yes"])
    >>> learn = vision_learner(dls, "squeezenet1_1", pretrained=False, verbose=False)
    >>> learn.groups.names
    ('stem', 'stage 1', 'stage 2', 'stage 3', 'head')
    >>> learn.predict(pictures[0]).label in dls.classes
    True
    """
    _check_dls(dls)
    if unknown := set(options) - set(inspect.signature(Learner).parameters):
        raise TypeError(f"vision_learner has no option {', '.join(sorted(unknown))}: it takes its own and those of "
                        "Learner.")
    verbose = check_flag("verbose", options.get("verbose", True))
    if options.get("seed") is not None:
        snapshot.seed_all(options["seed"])  # the Learner does that, too, when the new layers are made already
    form, classes = dls.form, list(dls.classes or ())
    made = image_model(arch, len(classes), channels=form.channels, pretrained=pretrained, weights=weights, head=head,
                       progress=verbose)
    check_takes(made.model, form.channels, form.size, len(classes))
    if made.weights is not None:
        preset = made.weights.transforms()
        mean, std = preset.mean, preset.std
        if form.channels == 1:
            mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
            if verbose:
                say("grey pictures: the first convolution has the sum of its weights over red, green and blue "
                    f"({made.weights})")
        dls = dls.normalized(mean, std)
    by_stages = partial(layer_groups, channels=form.channels, size=form.size, head=made.head)
    return VisionLearner(made.model, dls, nn.CrossEntropyLoss() if loss_func is None else loss_func,
                         splitter=by_stages if splitter is None else splitter, metrics=metrics, **options)


def _check_dls(dls: Any) -> None:
    if not isinstance(dls, ImageDataLoaders):
        raise TypeError(f"dls must be ImageDataLoaders, got a {type(dls).__name__}. Make them with "
                        "image_folders(path), from_dataset(train, valid) or from_arrays(...).")
    if len(dls.classes or ()) < 2:
        raise ValueError(f"dls must have at least two classes, to be told apart, got {dls.classes!r:.60}.")
