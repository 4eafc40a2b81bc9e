"""A fit on pictures that is killed goes on with the same augmentation, wherever the pictures are."""
import warnings

import numpy as np
import pytest
import torch
from resuming import Kill, Killed, every_step, outcome
from torch import nn
from torch.utils.data import TensorDataset

from minifast import Learner, accuracy
from minifast.vision import from_arrays, from_dataset

pytestmark = pytest.mark.usefixtures("quick_disk")

KILLS = [("after_batch", 2), ("before_step", 4), ("after_epoch", 1), ("after_batch", 7)]
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (40, 3, 8, 8), dtype=np.uint8))
LABELS = torch.arange(40) % 3


def learner(dls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
                          nn.Linear(144, 3))  # fmt: skip
    return Learner(model, dls, nn.CrossEntropyLoss(), metrics=[accuracy], device="cpu", verbose=False, seed=1)


def check(make, path, kills):
    """That fits of 2 epochs of 4 batches, killed at `kills`, come to the end of one that nobody kills."""
    whole = learner(make())
    whole.fit_one_cycle(2, 0.01)
    reference = outcome(whole)
    for event, n in kills:
        run = path / f"{event} {n}"
        with pytest.raises(Killed):
            learner(make()).fit_one_cycle(2, 0.01, callbacks=[every_step(run), Kill(event, n)], resume="auto")
        resumed = learner(make())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.fit_one_cycle(2, 0.01, callbacks=[every_step(run)], resume="auto")
        assert outcome(resumed) == reference, f"killed at {event} {n}"


@pytest.mark.parametrize("augment", ["photos", "small", "symbols"])
def test_in_memory(tmp_path, augment):
    check(lambda: from_arrays(IMAGES, LABELS, 0.2, augment=augment, batch_size=8), tmp_path, KILLS)


@pytest.mark.nightly
@pytest.mark.parametrize("num_workers", [0, 2])
def test_read_as_it_trains(tmp_path, num_workers):
    def make():
        return from_dataset(TensorDataset(IMAGES, LABELS), 0.2, classes=["a", "b", "c"], augment="small", batch_size=8,
                            in_memory=False, num_workers=num_workers, verbose=False)

    check(make, tmp_path, KILLS if num_workers == 0 else KILLS[1:3])
