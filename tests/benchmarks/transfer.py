"""What a network that knows five classes is worth when it is to learn five others from 500 pictures.

It is fine-tuned (the head first, then all, early layers at lower rates), or trained with one learning rate for all
layers, or one is trained from scratch: each for as many epochs, with each of six peak learning rates.
"""
import copy
import statistics
from functools import partial

import torch
from small_resnet import small_resnet
from torch import nn

from minifast import ChannelsLast
from minifast.show.tables import table
from minifast.vision import from_arrays, vision_learner

N_SOURCE = 5  # classes that the network knows already; the others are to be learned
FINE_TUNED, ONE_RATE, SCRATCH = "head first, then slice", "one rate for all", "from scratch"
METHODS = (FINE_TUNED, ONE_RATE, SCRATCH)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # peaks, from too low to too high for each method


def some(x, y, classes, n=None, generator=None):
    """Pictures and labels of `classes`, n of them if given, as many of each class, labelled from 0."""
    parts = []
    for label, of_all in enumerate(classes):
        rows = (y == of_all).nonzero().squeeze(1)
        if n is not None:
            rows = rows[torch.randperm(len(rows), generator=generator)[:n // len(classes)]]
        parts.append((x[rows], torch.full((len(rows),), label)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def with_new_head(model, n_classes):
    model = copy.deepcopy(model)
    model[-1] = nn.Linear(model[-1].in_features, n_classes)
    return model


def transfer(data, size, device, seed):
    """The accuracy, 0..1, on the classes that the network knows, and (method, rate) -> that on the others.

    On test pictures.
    """
    source, target = range(N_SOURCE), range(N_SOURCE, 10)
    options = {"seed": seed, "device": device, "verbose": False, "callbacks": [ChannelsLast()]}
    dls = from_arrays(*some(data.train_x, data.train_y, source), some(data.test_x, data.test_y, source),
                      batch_size=size.batch_size, device=device)
    known = vision_learner(dls, partial(small_resnet, size=size), **options)
    known.fit_one_cycle(size.source_epochs, 1e-2)
    few = some(data.train_x, data.train_y, target, size.n_target, torch.Generator().manual_seed(seed))
    dls = from_arrays(*few, some(data.test_x, data.test_y, target), batch_size=size.batch_size // 4, device=device)
    dls = dls.normalized(known.form.mean, known.form.std)
    pretrained = partial(with_new_head, known.model.cpu())
    n_head = size.target_epochs // 4
    accuracies = {}
    for rate in RATES:
        learn = vision_learner(dls, pretrained, **options)
        learn.fine_tune(size.target_epochs - n_head, rate, freeze_epochs=n_head)
        accuracies[FINE_TUNED, rate] = learn.validate()["accuracy"]
        for name, arch in ((ONE_RATE, pretrained), (SCRATCH, partial(small_resnet, size=size))):
            learn = vision_learner(dls, arch, **options)
            learn.fit_one_cycle(size.target_epochs, rate)
            accuracies[name, rate] = learn.validate()["accuracy"]
    return known.validate()["accuracy"], accuracies


def shown_transfer(runs):
    """The table of methods and rates: mean accuracy in percent, and the lowest and highest of the seeds."""
    rows = []
    for name in METHODS:
        cells = []
        for rate in RATES:
            percent = [100 * run[name, rate] for run in runs]
            cells.append(f"{statistics.mean(percent):.1f} ({min(percent):.1f}-{max(percent):.1f})")
        rows.append([name, *cells])
    return table(["accuracy % by peak rate", *(f"{rate:g}" for rate in RATES)], rows)
