"""The Learner: a Trainer, and the questions that can be asked of one."""
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .base.batch import Batch
from .core.callback import Callback
from .core.ownership import check_callbacks
from .errors import check_int
from .finder.finder import LRFinder
from .finder.result import LRFind
from .optim.rates import LR
from .schedules.scheduler import Scheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .studies.preflight import Report
    from .studies.race import Race
    from .studies.summary import Summary
    from .studies.timeline import Profile, Trace
from .training.trainer import Trainer


class Learner(Trainer):
    """Trains `model` on `dls`, remembers how it went, and answers questions about both.

    model: any `nn.Module`; moved to `device`.
    dls: `DataLoaders(train, valid)` or a tuple (train, valid) of iterables of batches; valid may be a dict of them by
        name, or None.
    loss_func: (output, target) -> the mean loss, (), or (sum, count) of a loss that is summed over tokens or the like;
        None: the output carries `.loss`.
    opt_func: a torch optimizer class or partial, called once with all parameters in their layer groups. Its state
        persists across fits.
    lr: the default peak, in every form: float, slice(hi), slice(lo, hi), one value per layer group.
    splitter: None for one layer group, a callable model -> list of modules or parameter lists, or a dict of
        name -> glob over parameter names.
    wd: weight decay; None for the optimizer's own default.
    wd_norm_bias: whether norms and biases are decayed too.
    train_bn: whether norm layers of frozen groups go on training.
    metrics: functions (pred, target) or objects with update, compute and reset.
    train_metrics: whether to compute them over the training data too, as `train_<name>`.
    callbacks: of every fit.
    device: None for the accelerator, if there is one.
    seed: an int seeds Python, numpy and torch now; None: nothing is seeded.
    compile: whether fits call the model through `torch.compile`; a dict holds its options. With
        {"mode": "reduce-overhead"} torch runs small models as CUDA graphs.
    unpack: batch -> (inputs, target).
    verbose: print and show progress.

    `model, dls, loss_func, metrics, callbacks, opt, recorder` may be read, and assigned between fits.

    Raises ValueError or TypeError for what cannot work, before anything is changed.

    >>> import torch
    >>> from torch import nn
    >>> learn = Learner(nn.Linear(4, 1), ([(torch.ones(8, 4), torch.ones(8, 1))], None), nn.MSELoss(), verbose=False)
    >>> learn.fit(0.1, 3)
    >>> learn.recorder.lrs
    array([0.1, 0.1, 0.1])
    """

    def lr_find(self, start_lr: LR = 1e-7, end_lr: LR = 10.0, num_it: int = 100, *, stop_div: bool = True,
                repeats: int = 1, callbacks: Iterable[Callback] = ()) -> LRFind:
        """Train with a growing learning rate until the loss explodes, and undo all of it.

        start_lr, end_lr, num_it, stop_div: as in `LRFinder`.
        repeats: runs from the same weights, of which the result holds the median and the band. The first is the one of
            repeats=1; each later one has another seed, drawn from torch's generator, for all random generators, those
            of the loaders too.
        callbacks: only those with `in_lr_find = True` run, of these and of the learner's.

        There is no validation. The result is returned, and drawn by `recorder.plot()`; its `verdict` says whether to
        rely on it. However it ends, model, optimizer, random generators and Recorder are bit for bit what they were: a
        fit after it equals a fit without it. Costs repeats * num_it weight updates and a copy of model and optimizer
        state, two with repeats > 1.

        Raises ValueError for values out of range and for data that is good for one pass only.
        """
        if check_int("repeats", repeats, example="lr_find(repeats=3)") > 1:
            from .studies.lr_repeats import find_repeatedly
            return find_repeatedly(self, start_lr, end_lr, num_it, repeats=repeats, stop_div=stop_div,
                                   callbacks=callbacks)
        finder = LRFinder(start_lr, end_lr, num_it, stop_div=stop_div)
        self.fit(self.lr, callbacks=[finder, *check_callbacks(callbacks, "callbacks")])
        return cast(LRFind, self.recorder.lr_find)

    def race(self, lrs: Iterable[LR], steps: int = 100, *, schedule: Scheduler | None = None,
             callbacks: Iterable[Callback] = ()) -> "Race":
        """Train shortly with each of `lrs`, from the same weights on the same batches, undo it, and say which wins.

        lrs: two or more learning rates in any form: float, slice(hi), slice(lo, hi), one value per layer group.
        steps: weight updates of each, over as many passes as that takes.
        schedule: None for a constant rate, or one without a peak of its own, such as OneCycle(), over these steps.
        callbacks: only those with `in_lr_find = True` run, of these and of the learner's; they hear of one epoch.

        Each candidate sees the same random numbers too, and is validated once at the end (of several sets, on the
        first). Costs len(lrs) * steps + 10 weight updates (10 show the starting loss), a copy of model and optimizer
        state in memory, and no file.

        The winner has the lowest mean training loss over the last quarter of the steps. Its margin to every other
        candidate has to exceed 2 standard errors of the differences step by step, raised for differences that hang
        together (lag-1 autocorrelation), and no candidate may have a validation loss that is lower by as much (the
        differences are then those of the batches; a single one says nothing). Otherwise there is no clear winner. That
        noise is of this start and these batches: another order of the data can decide otherwise. A candidate has
        diverged if a loss is not finite, or the mean over a quarter of the steps exceeds 4 times the loss of the
        starting weights.

        Raises ValueError for fewer than 2 candidates, two that are the same, steps < 1, or one-pass data.

        >>> import torch
        >>> from torch import nn
        >>> data = [(torch.eye(4), torch.ones(4, 1))] * 5
        >>> learn = Learner(nn.Linear(4, 1), (data, None), nn.MSELoss(), opt_func=torch.optim.SGD, verbose=False)
        >>> learn.race([1e-3, 1e-1, 1e3], steps=20).winner
        0.1
        """
        from .studies.race import race
        return race(self, lrs, steps, schedule=schedule, callbacks=callbacks)

    def check(self) -> "Report":
        """Look everything over before a long fit, in seconds, and undo it: gives a `Report`, true if all is well.

        Looked at: whether a fit could begin; shapes, dtypes and values of the first batches; the target against the
        output; the loss at the start against that of guessing; a finite gradient for every trainable parameter; eval
        mode; leaks between the samples of a batch; the loader's time against the step's; whether one batch can be
        learned by heart. Each is "ok", a "note" or a "problem". In a script: `sys.exit(learn.check().exit_code)`.

        >>> import torch
        >>> from torch import nn
        >>> learn = Learner(nn.Linear(4, 1), ([(torch.ones(8, 4), torch.ones(8))], None), nn.L1Loss(), verbose=False)
        >>> print(learn.check())
        ok       parts   5 trainable parameters on cpu
        ok       data    inputs float32 (8, 4), target float32 (8,)
        problem  output  ValueError: the model's output (8, 1) and the target (8,) would be broadcast ...
        1 problem
        """
        from .studies.preflight import check
        return check(self)

    def overfit(self, steps: int = 100, lr: LR | None = None) -> list[float]:
        """Train on the first batch alone for `steps` weight updates and undo it; gives the loss of each.

        lr: None for the learner's.

        A model that cannot bring this close to 0 will not learn the data either. Only callbacks with
        `in_lr_find = True` run.
        """
        from .studies.overfit import overfit
        return overfit(self, steps, lr)

    def summary(self) -> "Summary":
        """The layers of the model, their shapes for one training batch, and the memory they take; prints as a table.

        The batch runs in eval mode, and all outputs are held at once, as training would. Modes, buffers and random
        generators, those of the loaders too, are put back. Raises ValueError for data that is good for one pass (the
        batch would be missing from training), and for data without a batch.
        """
        self.check_assigned()
        from .studies.summary import summary
        return summary(self)

    def trace(self, n: int = 2, *, callbacks: Iterable[Callback] = (), accumulate: int = 1) -> "Trace":
        """Run `n` batches of training and of validation and undo them; gives what happened, in order.

        callbacks, accumulate: as in `fit`; callbacks that write files (`in_sandbox = False`) are left out.

        Printed, it is a table: each event and piece of work, the callback that was called, its microseconds, and what
        it changed.
        """
        from .studies.timeline import trace
        return trace(self, n, callbacks=callbacks, accumulate=accumulate)

    def profile(self, n: int = 50, *, callbacks: Iterable[Callback] = (), accumulate: int = 1,
                ops: bool = False) -> "Profile":
        """Run `n` batches (one pass at most) of training and of validation and undo them; gives where the time went.

        callbacks, accumulate: as in `fit`; callbacks that write files (`in_sandbox = False`) are left out.
        ops: add `torch.profiler`'s table of operators.

        Waiting for data, forward, loss, backward, optimizer step and each callback; on a GPU each is waited for, so
        the sum is more than a fit takes. The first 3 batches, in which much is done for the first time, are not
        counted where there are enough.
        """
        from .studies.timeline import profile
        return profile(self, n, callbacks=callbacks, accumulate=accumulate, ops=ops)

    def tta(self, dl: Iterable[Batch] | str | None = None, *, transform: Callable[[Any], Any] | None = None, n: int = 4,
            beta: float = 0.25, use_max: bool = False) -> tuple[Any, Any]:
        """(predictions, targets) as `get_preds` gives them, from `n` augmented passes and one as it is.

        dl: as in `get_preds`.
        transform: called n times on the inputs of each batch, a copy, on the device; gives the inputs of one pass.
            None: the training loader's own, its `batch_transform` or that of a `TensorLoader`, called with the whole
            batch; the pass as it is and the targets are then those of the batch without augmentation.
        n: augmented passes, >= 1.
        beta: predictions = (1 - beta) * mean(augmented) + beta * as_it_is, 0..1.
        use_max: the largest of the n + 1 outputs instead: for outputs that can be compared between passes
            (probabilities, sigmoid logits), not for softmax logits.

        Raw outputs are averaged, so that metrics and losses read the mean as they read an output. The samples are in
        the order of the data set, and all random generators are put back. Raises ValueError for arguments out of range
        or no transform, TypeError for outputs that are not floats. Source: fastai 2's tta.

        >>> import torch
        >>> x = torch.arange(3.0).reshape(3, 1)
        >>> learn = Learner(torch.nn.Linear(1, 1), ([(x, x)], [(x, x)]), torch.nn.MSELoss(), verbose=False)
        >>> preds, targets = learn.tta(transform=lambda x: x + 8)
        >>> (preds - learn.get_preds()[0]) / learn.model.weight.item()
        tensor([[6.], [6.], [6.]])
        """
        from .inference.tta import tta
        return tta(self, dl, transform=transform, n=n, beta=beta, use_max=use_max)

    def show_results(self, n: int = 9, dl: Iterable[Batch] | str | None = None, *, figure: "Figure | None" = None
                     ) -> "Figure":
        """Pictures of `n` samples drawn from all of `dl` (None: the validation data), with actual and predicted class.

        For classifiers of images; one pass over the data. More of what a model gets wrong: `minifast.interpret`.
        Random generators are left as they were. Raises as `minifast.interpret.Interpretation.from_learner` does.
        """
        from .interpret.interpretation import Interpretation
        n = check_int("n", n)
        return Interpretation.from_learner(self, dl, keep=n).show_results(n, figure=figure)

    def export(self, path: str | os.PathLike[str], *, inputs: Any = None, labels: Sequence[str] | None = None,
               metadata: Mapping[str, Any] | None = None) -> Path:
        """Write the model to `path`, for the CPU and in eval mode, to predict what `predict` gives; gives the path.

        path: one that ends in .pt2 is a program made by `torch.export`, which runs without the model's class. The
            first dimension of the inputs, the samples, may vary; the others are fixed. A model that branches on its
            data or on the number of samples, or takes len(x) for x.shape[0], cannot be one. Any other path is a folder
            of weights.pt and model.json, which describes the model; it is made if need be.
        inputs: a batch as `predict` takes it, traced and described, not written; None: the inputs of the first
            validation batch, or training batch, without the target.
        labels: names of the classes.
        metadata: text, numbers, True, False and None, in lists and in dicts with text as keys.

        `load_exported` and `export_info` read both. Loading a program runs what is in it, so `load_exported` takes one
        only with `trusted=True`. Each file is replaced whole or not at all. Raises ValueError, with torch's words, for
        a model that cannot be a program, and OSError where the file or the folder cannot be.
        """
        from .inference.export import export
        return export(self, path, inputs=inputs, labels=labels, metadata=metadata)
