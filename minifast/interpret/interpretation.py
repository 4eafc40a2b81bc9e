"""What a classifier gets wrong: confusion matrix, most confused classes, largest losses, a report per class."""
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.batch import Batch
from ..base.nest import describe, tensors
from ..data.classes import check_classes
from ..errors import check_flag, check_int
from ..show.pictures import are_pictures, grid, to_pictures
from ..show.tables import Table
from . import confusion
from .confusion import MostConfused
from .outcomes import Kept, Outcomes, collect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..training.trainer import Trainer


class Interpretation:
    """What a classifier made of each sample of a data set. Made by `Interpretation.from_learner(learn)`.

    classes: the names of the k classes. index, actual, predicted: int64, probability (of the predicted class, 0..1) and
    loss: float32, all (n,), one entry per sample in the order of the data set.
    """

    def __init__(self, outcomes: Outcomes, classes: Sequence[str], largest: Kept, drawn: Kept,
                 mean: Sequence[float] = (), std: Sequence[float] = (), files: Sequence[str] | None = None) -> None:
        self.index, self.actual, self.predicted = outcomes.index, outcomes.actual, outcomes.predicted
        self.probability, self.loss = outcomes.probability, outcomes.loss
        self.classes = list(classes)
        self._largest, self._drawn = largest, drawn
        self._mean, self._std, self._files = mean, std, files

    @classmethod
    def from_learner(cls, learn: "Trainer", dl: Iterable[Batch] | str | None = None, *, keep: int = 64,
                     classes: Sequence[str] | None = None) -> "Interpretation":
        """Look at all samples of `dl` (None: the validation data; a text: the validation set of that name), once.

        The model is in eval mode, with averaged weights where a callback of the learner validates with them; random
        generators are left as they were.

        keep: inputs are kept, on the CPU, of so many largest losses, and of as many samples drawn at random for
            `show_results`.
        classes: the names of the classes, None for those of `learn.dls.classes`, or else their numbers.

        The output of the model is (n, k) scores, or (n,) or (n, 1) for two classes, where the score 0 (with
        `nn.BCELoss` 0.5) divides them. Targets are class indices, or shares of the output's shape (one-hot, mixup):
        then the class is the largest share's. Samples that the loss ignores (`ignore_index`) are left out.

        The probability is the softmax of the scores, so that log-probabilities are read as such; the sigmoid with
        `nn.BCEWithLogitsLoss` or one output; the score itself with `nn.BCELoss`, and where all scores of a batch are
        >= 0 and those of a sample sum to 1. The loss is that of `learn.loss_func` for the sample alone; of a model
        that computes its own it is the cross entropy of its logits.

        Raises ValueError for what is no classification of each sample into one of k classes, targets beyond 0..k-1,
        names of another number, and if there is no sample.

        >>> import torch
        >>> from minifast import Learner
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
        >>> learn = Learner(torch.nn.Linear(3, 3), ([(x, y)], [(x, y)]), torch.nn.CrossEntropyLoss(), verbose=False)
        >>> with torch.no_grad():
        ...     _ = learn.model.weight.copy_(torch.eye(3) * 9)
        >>> Interpretation.from_learner(learn, classes=["cat", "dog", "emu"])
        Interpretation: 3 samples, 3 classes, accuracy 0.6667; most confused: dog as emu (1)
        """
        if not hasattr(learn, "eval_data"):
            raise TypeError(f"learn must be the Learner, got a {type(learn).__name__}: pass learn, not learn.model.")
        keep = check_int("keep", keep)
        names = learn.dls.classes if classes is None else check_classes(classes)
        data = learn.eval_data(dl)
        if isinstance(data, Mapping):
            raise ValueError(f"there are several validation sets: pass one of them, e.g. dl={next(iter(data))!r}.")
        largest, drawn = Kept(keep), Kept(keep)
        outcomes = collect(learn, data, largest, drawn)
        form, k = getattr(learn.dls, "form", None), outcomes.n_classes
        names = list(map(str, range(k))) if names is None else names
        if len(names) != k:
            raise ValueError(f"{'learn.dls.' * (classes is None)}classes has {len(names)} names for {k} classes, the "
                             f"outputs of the model. Pass classes= with {k} names.")
        return cls(outcomes, names, largest, drawn, getattr(form, "mean", ()), getattr(form, "std", ()),
                   getattr(data, "files", None))

    @property
    def accuracy(self) -> float:
        """Share of samples whose class was predicted, 0..1."""
        return float((self.actual == self.predicted).mean())

    def confusion_matrix(self) -> NDArray[np.int64]:
        """How many samples of each class (row) were taken for each class (column), (k, k)."""
        k = len(self.classes)
        return np.bincount(self.actual * k + self.predicted, minlength=k * k).reshape(k, k)

    def plot_confusion_matrix(self, *, normalize: bool = False, ax: "Axes | None" = None) -> "Axes":
        """Draw the confusion matrix, coloured by the share of the row; gives the axes.

        In the cells stand the counts, or with `normalize` the shares, if there is room; the row of a class without
        samples is grey. A figure of your own wants `layout="constrained"`, or long names are cut.
        """
        return confusion.plot(self.confusion_matrix(), self.classes, check_flag("normalize", normalize), ax)

    def most_confused(self, min_val: int = 1) -> MostConfused:
        """(actual, predicted, count) of the classes confused at least `min_val` times, most frequent first."""
        return confusion.most_confused(self.confusion_matrix(), self.classes, check_int("min_val", min_val))

    def report(self) -> Table:
        """Precision, recall, f1 (0..1) and support (samples) of each class, then accuracy and the mean over classes.

        precision: of what was taken for the class, the share that is of it; recall: of what is of the class, the share
        that was taken for it; f1: their harmonic mean. A class that nothing was taken for has precision 0. A class
        without samples has no recall and no f1 (None), and no part in the mean ("macro avg").
        """
        return confusion.report(self.confusion_matrix(), self.classes)

    def top_losses(self, k: int = 9) -> Table:
        """The `k` samples with the largest losses (all, if there are fewer), largest first.

        index: in the data set, of `dl` as it is without shuffling; actual and predicted class, the probability of the
        predicted one, the loss, and the file where the loader knows it (`dl.files`, of `vision.image_folders`). A loss
        that is NaN counts as infinite.
        """
        losses = np.where(np.isnan(self.loss), np.inf, self.loss)
        order = np.argsort(-losses, kind="stable")[:check_int("k", k)]
        return Table(self._row(int(row)) for row in order)

    def plot_top_losses(self, k: int = 9, *, figure: "Figure | None" = None) -> "Figure":
        """Draw the pictures of `top_losses(k)`, wrong ones under a red title; gives the figure.

        Raises ValueError for inputs that are no images (n, 1 or 3, height, width), and for more than were kept.
        """
        return self._draw(self._largest, "k", k, figure)

    def show_results(self, n: int = 9, *, figure: "Figure | None" = None) -> "Figure":
        """Draw `n` pictures drawn at random (the same ones each time), as `plot_top_losses`; gives the figure."""
        return self._draw(self._drawn, "n", n, figure)

    def _draw(self, kept: Kept, name: str, n: int, figure: "Figure | None") -> "Figure":
        n = check_int(name, n)
        if n > kept.n and len(self.loss) > kept.n:
            raise ValueError(f"{name}={n} is more than the {kept.n} inputs that were kept. Pass "
                             f"Interpretation.from_learner(learn, keep={n}).")
        rows, pictures = list(kept.inputs)[:n], []
        for row in rows:
            images = next((tensor for tensor in tensors(kept.inputs[row]) if are_pictures(tensor)), None)
            if images is None:
                raise ValueError("only images (n, 1 or 3, height, width) can be drawn, and the inputs of a sample are "
                                 f"{describe(kept.inputs[row])}. top_losses() lists losses without pictures.")
            pictures.append(to_pictures(images, self._mean, self._std)[0])
        found = [self._row(row) for row in rows]
        titles = [f"predicted {row['predicted']}\nactual {row['actual']}\n{row['probability']:.0%}, loss "
                  f"{row['loss']:.2f}" for row in found]
        colors = [None if row["predicted"] == row["actual"] else "red" for row in found]
        return grid(pictures, titles, colors, figure)

    def _row(self, row: int) -> dict[str, Any]:
        index = int(self.index[row])
        file = {} if self._files is None else {"file": self._files[index]}
        return {"index": index, "actual": self.classes[self.actual[row]],
                "predicted": self.classes[self.predicted[row]], "probability": float(self.probability[row]),
                "loss": float(self.loss[row]), **file}

    def __repr__(self) -> str:
        worst = ", ".join(f"{pair.actual} as {pair.predicted} ({pair.count:,})" for pair in self.most_confused()[:3])
        return (f"{type(self).__name__}: {len(self.actual):,} samples, {len(self.classes):,} classes, accuracy "
                f"{self.accuracy:.4f}; " + (f"most confused: {worst}" if worst else "nothing confused"))


ClassificationInterpretation = Interpretation  # fastai's name of it
