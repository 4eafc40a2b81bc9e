"""The pair of loaders that a Learner trains on, and where it comes from."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..base.batch import Batch
from .classes import check_classes, common_classes
from .loader import named_sets
from .tensor_loader import TensorLoader

if TYPE_CHECKING:
    from .in_memory import Transform


@dataclass
class DataLoaders:
    """The training data and, if there is any, the validation data: iterables of batches.

    A torch `DataLoader`, a `TensorLoader`, a list of batches, or any object whose `__iter__` starts a new pass. Several
    validation sets are a dict of name -> loader: then the columns of the epoch rows begin with the name. A worker
    process that hangs is waited for until the `timeout` of its DataLoader, which torch leaves at 0: for ever.

    classes: the name of each class, class 0 first, where targets are class indices; tables and plots write them.

    >>> dls = DataLoaders([(torch.zeros(2, 3), torch.zeros(2))])
    >>> dls.valid is None
    True
    """

    train: Iterable[Batch]
    valid: Iterable[Batch] | Mapping[str, Iterable[Batch]] | None = None
    classes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.classes = None if self.classes is None else check_classes(self.classes)
        sets = named_sets(self.train, self.valid)
        if isinstance(self.valid, Mapping):
            if not all(isinstance(name, str) and name for name in self.valid):
                raise ValueError(f"valid must name each of its loaders, got {list(self.valid)}. "
                                 "Pass e.g. {'clean': loader, 'noisy': other}.")
            sets |= {} if self.valid else {"valid": self.valid}
        for name, loader in sets.items():
            if isinstance(loader, (list, tuple)) and loader and isinstance(loader[0], (DataLoader, TensorLoader)):
                raise TypeError(f"{name} must hold batches, got a {type(loader).__name__} of loaders. Several "
                                "validation sets are a dict of them, e.g. {'clean': loader, 'noisy': other}.")
            is_one_thing = isinstance(loader, (str, bytes, Mapping, Tensor, np.ndarray))
            if is_one_thing or not isinstance(loader, Iterable):
                raise TypeError(f"{name} must be an iterable of batches, got {type(loader).__name__}. "
                                "Pass e.g. a torch DataLoader.")

    @classmethod
    def in_memory(cls, train: Any, valid: Any = None, *, batch_size: int = 64, transform: "Transform | None" = None,
                  valid_transform: "Transform | None" = None, device: torch.device | str | None = None,
                  drop_last: bool = False, generator: torch.Generator | None = None, num_workers: int | None = None,
                  verbose: bool = True) -> "DataLoaders":
        """`TensorLoader`s of data sets that are read once, now, and kept: one that shuffles, and the validation's.

        train, valid: map-style data sets (torchvision's, a Subset, a list); of `valid` also a dict of name -> data set.
        batch_size, drop_last (of training), generator (of the order): as in `TensorLoader`.
        transform: of a training batch, where it is kept, batch -> batch: random augmentation, uint8 to float.
        valid_transform: of a validation batch.
        device: where they are kept; None: in the memory of the CPU.
        num_workers: processes that read; None: none if that takes a few seconds, else one per core, 8 at most.
        verbose: a bar while it reads, where there is a screen, and a line when done.

        A sample is any nest of tensors, numpy arrays, numbers and PIL images, all of one shape and dtype. Batches have
        its nest and the dtypes that a DataLoader gives (a float becomes float64); a PIL image becomes uint8 (channels,
        height, width). What the data sets do is done once: a training set with random augmentation is refused (four
        samples are read four times: what changes one in a hundred is not seen). Random generators are left as they
        were; `classes` are as in `from_datasets`. Raises MemoryError if it does not fit, before all is read; TypeError
        for what is no map-style data set or cannot be kept; ValueError for samples that differ and an empty set.

        >>> dls = DataLoaders.in_memory([([0.5, i], i % 2) for i in range(6)], batch_size=4, verbose=False)
        >>> [x, z], y = next(iter(dls.train))
        >>> x.shape, y.dtype
        (torch.Size([4]), torch.int64)
        """
        from . import in_memory  # not before it is used: so `import minifast` takes no longer for it
        classes = common_classes(train, valid)
        return cls(*in_memory.loaders(train, valid, transform=transform, valid_transform=valid_transform, device=device,
                                      num_workers=num_workers, verbose=verbose, batch_size=batch_size,
                                      drop_last=drop_last, generator=generator), classes)

    @classmethod
    def from_datasets(cls, train: Any, valid: Any = None, *, batch_size: int = 64, num_workers: int | None = None,
                      **options: Any) -> "DataLoaders":
        """Torch DataLoaders over data sets: shuffled for training, in order for validation.

        train, valid: map-style data sets, IterableDatasets, or lists; of `valid` also a dict of name -> data set.
        batch_size: samples a batch, >= 1.
        num_workers: processes that load, >= 0; None: one for each CPU but one, 8 at most; none for data in memory
            (TensorDataset, a list), for an IterableDataset, and where workers are not forked (Windows, macOS).
        options: those of torch's DataLoader; `shuffle`, `sampler` and `drop_last` are for training only.

        What torch leaves off and is on here: `pin_memory` where there is a CUDA device; `drop_last` for training where
        the last batch would have one sample, of which BatchNorm cannot take statistics. `persistent_workers` stays
        off: the random generators of such workers cannot be saved, so a resumed fit would go on with other
        augmentation.

        `classes` are the `.classes` of the training set, or of the one that it is a `Subset` of, if it has no
        `target_transform`. Raises TypeError or ValueError for what is no data set or no option, ValueError for a
        validation set that gives another class the same number.

        >>> dls = DataLoaders.from_datasets([(torch.zeros(3), 0)] * 65, batch_size=32)
        >>> len(dls.train), dls.train.num_workers, dls.valid
        (2, 0, None)
        """
        from . import samples, torch_loaders
        for name, dataset in named_sets(train, valid).items():
            samples.check_data_set(name, dataset, streams=True)
        torch_loaders.check_options(batch_size, num_workers, options)

        def make(dataset: Any) -> Iterable[Batch]:
            return torch_loaders.valid_loader(dataset, batch_size, num_workers, **options)

        classes = common_classes(train, valid)
        if isinstance(valid, Mapping):
            valid = {name: make(dataset) for name, dataset in valid.items()}
        elif valid is not None:
            valid = make(valid)
        return cls(torch_loaders.train_loader(train, batch_size, num_workers, **options), valid, classes)


def eval_data(dls: DataLoaders, dl: Any) -> Any:
    """The loader, or the loaders by name, that `dl` means: None for the validation data, a text for one set of it."""
    data = dls.valid if dl is None else dl
    if isinstance(data, str):
        sets = dls.valid if isinstance(dls.valid, Mapping) else {}
        if data not in sets:
            raise ValueError(f"there is no validation set {data!r}: " +
                             (f"the names are {', '.join(sets)}. Pass one of them, or a loader." if sets else
                              "there are no names. Pass a loader, or no dl for the validation data."))
        data = sets[data]
    if data is None:
        raise ValueError("there is no validation data. Pass a loader, or make the Learner with "
                         "DataLoaders(train, valid).")
    if isinstance(data, Mapping) and not data:
        raise ValueError("dl must hold at least one validation set, got none.")
    if isinstance(data, DataLoaders):
        raise TypeError(f"dl must be one loader, got a {type(data).__name__} with two. Pass dl.valid or dl.train.")
    if not isinstance(data, Iterable):
        raise TypeError(f"dl must be an iterable of batches, got {dl!r:.80}.")
    return data


def as_dataloaders(model: Any, dls: Any) -> DataLoaders:
    """`dls` as `DataLoaders`. Raises TypeError for what is no data, or for model and data swapped."""
    if isinstance(dls, nn.Module) and not isinstance(model, nn.Module):
        raise TypeError(f"model and data are swapped: got Learner({type(model).__name__}, {type(dls).__name__}). "
                        "The call is Learner(model, dls, loss_func).")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r:.80} ({type(model).__name__}).")
    if isinstance(dls, DataLoaders):
        return dls
    if isinstance(dls, tuple) and len(dls) == 2:
        return DataLoaders(*dls)
    raise TypeError(f"dls must be DataLoaders(train, valid) or a tuple (train, valid), got a {type(dls).__name__}. "
                    "Without validation data pass DataLoaders(train).")
