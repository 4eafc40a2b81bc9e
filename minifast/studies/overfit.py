"""Whether a model can learn one batch by heart."""
from typing import Any

from ..data.dataloaders import DataLoaders
from ..data.feed import first_batch
from ..errors import check_int
from ..optim.rates import check_lr
from ..standard.finite import Unchecked
from ..training.trainer import Trainer


def overfit(learn: Trainer, steps: int = 100, lr: Any = None) -> list[float]:
    """See `Learner.overfit`."""
    steps = check_int("steps", steps, example="overfit(100)")
    lr = learn.lr if lr is None else check_lr("lr", lr)
    learn.check_assigned()
    with learn.sandbox():
        batch = first_batch(learn.dls.train, learn.device)
        if batch is None:
            raise ValueError("the training data yielded 0 batches: there is none to learn by heart.")
        return overfit_batch(learn, batch, steps, lr)


def overfit_batch(learn: Trainer, batch: Any, steps: int, lr: Any) -> list[float]:
    """The loss of each of `steps` weight updates on `batch` alone, undone."""
    with learn.sandbox():
        learn.dls = DataLoaders([batch] * steps)
        learn.callbacks = [cb for cb in learn.callbacks if cb.in_lr_find]
        learn.fit(lr, callbacks=[Unchecked()], verbose=False)
        return [float(loss) for loss in learn.recorder.losses]
