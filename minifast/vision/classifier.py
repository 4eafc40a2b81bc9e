"""From a picture, as a file or in memory, to the name of its class; by a learner, or by a model in a file."""
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import check_path
from ..inference.export import export_info, load_exported
from ..show.tables import listed, shown
from .form import ImageForm

BATCH = 64  # pictures that go through the model together


class Prediction(NamedTuple):
    """What a model says of one picture: the likeliest class, its probability, and class -> probability for all, 0..1.

    >>> Prediction("cat", 0.75, {"dog": 0.25, "cat": 0.75})
    Prediction: cat 0.7500, dog 0.2500
    """

    label: str
    probability: float
    probabilities: dict[str, float]

    def __repr__(self) -> str:
        likeliest = sorted(self.probabilities.items(), key=lambda item: -item[1])
        return f"Prediction: {listed(f'{name} {shown(share)}' for name, share in likeliest)}"


class Classifier:
    """A model that was exported, called with a picture, or a list of them, like `VisionLearner.predict`.

    classes: the names of the outputs. form: how a picture becomes an input.
    """

    def __init__(self, model: nn.Module, form: ImageForm, classes: Sequence[str]) -> None:
        self.model, self.form, self.classes = model, form, list(classes)

    @torch.no_grad()
    def __call__(self, picture: Any) -> Any:
        """A `Prediction`, or for a list of pictures a list of them."""
        return classify(self.model, picture, self.form, self.classes)

    def __repr__(self) -> str:
        height, width = self.form.size
        return f"Classifier of {len(self.classes)} classes, pictures of {height} x {width} pixels"


def load_classifier(path: str | os.PathLike[str], model: nn.Module | None = None, *,
                    trusted: bool = False) -> Classifier:
    """What `VisionLearner.export` wrote, as a `Classifier` on the CPU.

    A program (.pt2) needs `trusted=True`, as for `load_exported`; a folder of weights needs `model`, of the class that
    was exported. Raises FileNotFoundError without the file, ValueError for one that is damaged or not `trusted`, or
    says nothing of classes or pictures.
    """
    path = check_path("path", path)
    described = export_info(path)
    labels, image = described.get("labels"), (described.get("metadata") or {}).get("image")
    if not isinstance(labels, list) or not isinstance(image, dict):
        missing = " and no ".join(name for name, value in (("labels", labels), ("'image'", image)) if not value)
        raise ValueError(f"{path} holds no {missing}, so it is a model but no classifier of pictures. Export a "
                         "vision_learner, or call load_exported(path) for the model itself.")
    return Classifier(load_exported(path, model, trusted=trusted), ImageForm.from_dict(image), labels)


def classify(outputs: Callable[[Tensor], Tensor], pictures: Any, form: ImageForm, classes: Sequence[str]) -> Any:
    """The `Prediction` for one picture, or a list of them for several; outputs: a batch -> logits, (n, classes)."""
    are_several = isinstance(pictures, (list, tuple)) or (isinstance(pictures, (Tensor, np.ndarray))
                                                          and pictures.ndim == 4)
    found = list(_predictions(outputs, pictures if are_several else [pictures], form, classes))
    return found if are_several else found[0]


def _predictions(outputs: Callable[[Tensor], Tensor], pictures: Sequence[Any], form: ImageForm,
                 classes: Sequence[str]) -> Iterator[Prediction]:
    for start in range(0, len(pictures), BATCH):
        several = pictures[start:start + BATCH]
        for picture in several:
            if isinstance(picture, (str, os.PathLike)) and not os.path.exists(check_path("picture", picture)):
                raise FileNotFoundError(f"there is no picture {os.fspath(picture)}")
        images = torch.stack([form.read(picture) for picture in several])
        logits = outputs(form.normalize(images))
        if logits.shape != (len(images), len(classes)):
            raise ValueError(f"the model gives {tuple(logits.shape)} for {len(images)} picture(s), and there are "
                             f"{len(classes)} classes: it does not give one output for each class.")
        for row in logits.float().softmax(1):
            best = int(row.argmax())
            yield Prediction(classes[best], float(row[best]), dict(zip(classes, row.tolist(), strict=True)))
