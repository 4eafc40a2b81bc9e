"""One training by each peer: as its documentation shows it, and with everything switched off that can be.

All make the same updates: one pass over the same list of batches from the same weights, AdamW with torch's defaults at
LR, a half-cosine towards 0 over the steps (in every peer by the scheduler that is its own way), weight decay for all
parameters. Each function trains `model`; what is not installed fails in its import.
"""
import contextlib
import copy
import tempfile
import warnings

import torch
from torch import nn

LR = 0.01


def optimizer(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=LR, **options)


def cosine(opt, n):
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=n)


def by_hand(model, batches, lean=False, **options):
    """The reference: torch's optimizer and scheduler, as in torch's own documentation."""
    loss_func, opt = nn.CrossEntropyLoss(), optimizer(model, **options)
    sched = cosine(opt, len(batches))
    model.train()
    for x, y in batches:
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        sched.step()


def minifast(model, batches, lean):
    """Recorder, schedule and bar; lean: no bar."""
    from minifast import CosineAnnealing, Learner
    learn = Learner(model, (batches, None), nn.CrossEntropyLoss(), wd_norm_bias=True, device="cpu", verbose=not lean)
    learn.fit(LR, 1, callbacks=[CosineAnnealing(warmup_frac=0.0)])


def fastai(model, batches, lean):
    """Its own AdamW with torch's constants, Recorder and bar; lean: neither of these."""
    from fastai.callback.progress import ProgressCallback
    from fastai.callback.schedule import ParamScheduler, SchedCos
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, Recorder
    from fastai.optimizer import Adam

    def adam(params, lr, **hypers):
        return Adam(params, lr, mom=0.9, sqr_mom=0.999, eps=1e-8, **hypers)

    class NoValidation(Learner):
        def _do_epoch_validate(self, *args, **options): ...

    dls = DataLoaders(batches, [], device=torch.device("cpu"))
    learn = NoValidation(dls, model, nn.CrossEntropyLoss(), opt_func=adam, lr=LR, wd=0.01, wd_bn_bias=True)
    if lean:
        learn.remove_cbs([Recorder, ProgressCallback])
    learn.fit(1, LR, cbs=[ParamScheduler({"lr": SchedCos(LR, 0.0)})])


class Loader:
    """Batches as something that is no list: to Lightning a list is one of several loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def lightning(model, batches, lean):
    """Bar with the loss, logger, checkpoint; lean: `barebones=True`."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.loss_func = model, nn.CrossEntropyLoss()

        def training_step(self, batch, index):
            x, y = batch
            loss = self.loss_func(self.model(x), y)
            if not lean:
                self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self):
            opt = optimizer(self.model)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": cosine(opt, len(batches)), "interval": "step"}}

    options = {"barebones": True} if lean else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, default_root_dir=folder, **options)
        trainer.fit(Module(), Loader(batches))


def ignite(model, batches, lean):
    """`create_supervised_trainer`, a running average of the loss, its own cosine and the bar.

    lean: an Engine that reads no loss, and torch's cosine. (Its wrapper of torch's schedulers calls `get_lr` without a
    step; torch's recursive cosine then begins with another rate.)
    """
    from ignite.engine import Engine, Events, create_supervised_trainer
    from ignite.handlers import ProgressBar
    from ignite.handlers.param_scheduler import CosineAnnealingScheduler
    from ignite.metrics import RunningAverage
    opt, loss_func = optimizer(model), nn.CrossEntropyLoss()

    def update(engine, batch):
        model.train()
        opt.zero_grad()
        x, y = batch
        loss_func(model(x), y).backward()
        opt.step()

    if lean:
        trainer = Engine(update)
        sched = cosine(opt, len(batches))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: sched.step())
    else:
        trainer = create_supervised_trainer(model, opt, loss_func)
        trainer.add_event_handler(Events.ITERATION_STARTED,
                                  CosineAnnealingScheduler(opt, "lr", LR, 0.0, len(batches)))
        RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
        ProgressBar().attach(trainer, ["loss"])
    trainer.run(batches, max_epochs=1)


def skorch(model, batches, lean):
    """`NeuralNet` with the scheduler and its line per epoch (it has no bar by itself); lean: the scheduler alone."""
    from skorch import NeuralNet
    from skorch.callbacks import LRScheduler
    options = dict.fromkeys(("callbacks__epoch_timer", "callbacks__train_loss", "callbacks__valid_loss",
                             "callbacks__print_log")) if lean else {}
    sched = LRScheduler(policy="CosineAnnealingLR", T_max=len(batches), step_every="batch")
    net = NeuralNet(model, nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, lr=LR, max_epochs=1, train_split=None,
                    iterator_train=lambda dataset, **_: batches, callbacks=[("sched", sched)],
                    verbose=0 if lean else 1, **options)
    net.fit(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))


def accelerate(model, batches, lean):
    """One's own loop with its objects in it, accumulation and tqdm; lean: only what it must wrap."""
    from accelerate import Accelerator
    from tqdm import tqdm
    accelerator, loss_func = Accelerator(cpu=True), nn.CrossEntropyLoss()
    opt = optimizer(model)
    sched = cosine(opt, len(batches))
    if lean:
        wrapped, opt = accelerator.prepare(model, opt)
    else:
        wrapped, opt, sched = accelerator.prepare(model, opt, sched)
    wrapped.train()
    for x, y in batches if lean else tqdm(batches):
        with contextlib.nullcontext() if lean else accelerator.accumulate(wrapped):
            loss = loss_func(wrapped(x), y)
            accelerator.backward(loss)
            opt.step()
            sched.step()
            opt.zero_grad()


# name -> (what is installed for it, how it trains)
PEERS = {"minifast": ("minifast", minifast), "fastai": ("fastai", fastai), "lightning": ("lightning", lightning),
         "ignite": ("pytorch-ignite", ignite), "skorch": ("skorch", skorch), "accelerate": ("accelerate", accelerate)}


def check(train, make_model, batches, lean):
    """Raise AssertionError unless `train` ends with the weights of a plain loop over these batches."""
    mine = make_model()
    theirs = copy.deepcopy(mine)
    train(mine, batches, lean)
    by_hand(theirs, batches, foreach=False)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def quietly():
    """A block without what a library says to those who use it in a program of their own."""
    return warnings.catch_warnings(action="ignore")
