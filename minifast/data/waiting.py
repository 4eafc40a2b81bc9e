"""How long training waits for its data: the clock is read twice a batch, where batches are handed out."""
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ..machine.limits import n_cpus
from .tensor_loader import TensorLoader

# below a fifth even data that came at once would save little; after 5 seconds the first batches weigh nothing
SHARE, SECONDS = 0.2, 5.0


@dataclass(slots=True)
class Waiting:
    """Where the seconds of some passes over a loader went; written by `feed`.

    Until the first batch of a pass, workers are started and queues are filled: that is counted apart, and not at all
    in the first pass.
    """

    waited: float = 0.0  # for a batch that was not there when it was asked for
    worked: float = 0.0  # between having a batch and asking for the next one
    began: float = 0.0  # until the first batch of each pass but the first one
    n_passes: int = 0

    @property
    def share(self) -> float:
        """Of the time without the beginnings of passes, 0..1, what training waited."""
        return self.waited / (self.waited + self.worked) if self.waited else 0.0

    @property
    def share_of_beginnings(self) -> float:
        """The share of the time, 0..1, that passed until passes had their first batch."""
        return self.began / (self.began + self.waited + self.worked) if self.began else 0.0

    @property
    def is_long(self) -> bool:
        """Whether training has waited long enough to be told of it."""
        return self.waited + self.worked >= SECONDS and self.share >= SHARE

    def begin(self, seconds: float) -> None:
        """A pass has its first batch, `seconds` after it was asked for."""
        if self.n_passes:
            self.began += seconds
        self.n_passes += 1


IN_MEMORY = "DataLoaders.in_memory(dataset), if the data fits, reads it once"


def notice(waiting: Waiting, loader: Any, device: torch.device) -> str:
    """A line for a person whose training waits too long for `loader`; "" if it does not, or nothing can be done."""
    if waiting.is_long:
        remedy = remedies(loader, device)
        return remedy and f"training waits for its data {100 * waiting.share:.0f} % of the time: {remedy}"
    seconds = waiting.began + waiting.waited + waiting.worked
    starts_workers = getattr(loader, "num_workers", 0) and not getattr(loader, "persistent_workers", False)
    if seconds >= SECONDS and waiting.share_of_beginnings >= SHARE and starts_workers:
        return (f"{100 * waiting.share_of_beginnings:.0f} % of the time goes by until epochs have their first batch: "
                "persistent_workers=True keeps the workers over epochs (a killed fit that is resumed then has other "
                "random augmentation)")
    return ""


def remedies(loader: Any, device: torch.device) -> str:
    """What would make batches of `loader` come sooner, in words; "" if there is nothing to say."""
    if isinstance(loader, TensorLoader):
        if loader.tensors[0].device.type != device.type:
            return f"TensorLoader(..., device={device.type!r}) keeps the data there and makes the batches there"
        return "its transform is called in this process, once a batch" if loader.transform is not None else ""
    if not isinstance(loader, DataLoader):
        return (f"the loader ({type(loader).__name__}) makes its batches in this process. A torch DataLoader with "
                "num_workers=, or a TensorLoader, makes them sooner")
    if isinstance(loader.dataset, TensorDataset):
        return "TensorLoader(*dataset.tensors) makes whole batches at once"
    found = [_about_workers(loader), "" if isinstance(loader.dataset, IterableDataset) else IN_MEMORY]
    if device.type == "cuda" and not loader.pin_memory:
        found.append("pin_memory=True lets batches be copied while the GPU computes")
    return "; ".join(filter(None, found))


def _about_workers(loader: "DataLoader[Any]") -> str:
    workers, cpus = loader.num_workers, n_cpus()
    if workers == 0 and cpus > 1:
        return "it makes its batches in this process. num_workers= has other processes make them"
    if 0 < workers < cpus:
        return (f"num_workers={workers} may be too few for {cpus} CPUs; with a larger batch_size they hand over less "
                "often")
    return "make its samples cheaper: smaller files, less to decode, augmentation of whole batches on the device"
