"""Whether a model can learn one batch by heart."""
from typing import TYPE_CHECKING, Any

from .. import fitting
from ..dataloaders import DataLoaders
from ..errors import check_int
from ..feed import first_batch
from ..finite import Unchecked
from ..hypers import check_lr

if TYPE_CHECKING:
    from ..learner import Learner


def overfit(learn: "Learner", steps: int = 100, lr: Any = None) -> list[float]:
    """Train on one batch for `steps` weight updates and undo it; gives the loss of each; see `Learner.overfit`."""
    steps = check_int("steps", steps, example="overfit(100)")
    lr = learn.lr if lr is None else check_lr("lr", lr)
    fitting.check_assigned(learn)
    with learn.sandbox():
        batch = first_batch(learn.dls.train, learn.device)
        if batch is None:
            raise ValueError("the training data yielded 0 batches: there is none to learn by heart.")
        return overfit_batch(learn, batch, steps, lr)


def overfit_batch(learn: "Learner", batch: Any, steps: int, lr: Any) -> list[float]:
    """The loss of each of `steps` weight updates on `batch` alone, undone."""
    with learn.sandbox():
        learn.dls = DataLoaders([batch] * steps)
        learn.callbacks = [cb for cb in learn.callbacks if cb.in_lr_find]
        learn.fit(lr, callbacks=[Unchecked()], verbose=False)
        return [float(loss) for loss in learn.recorder.losses]
