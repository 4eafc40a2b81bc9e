"""What is trained in the benchmarks, and the loops that people write by hand for it."""
import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn

import minifast
from minifast.optim import fused

MAX_LR = 0.01
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD, momentum": partial(torch.optim.SGD, momentum=0.9)}


class Screen(io.StringIO):
    """A terminal that keeps nothing: what the progress bar draws is drawn, and forgotten."""

    def isatty(self):
        return True

    def write(self, text):
        return len(text)


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))


def deep_mlp():
    """60 linear layers: as many layer groups as anyone has."""
    hidden = (layer for _ in range(58) for layer in (nn.Linear(16, 16), nn.ReLU()))
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), *hidden, nn.Linear(16, 2))


def convnet():
    """About 10 ms a step on one core."""
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


@dataclass(frozen=True)
class Task:
    """A model on batches of random numbers."""

    name: str
    make_model: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one sample
    n_classes: int
    opt: str = "AdamW"  # one of OPTIMIZERS
    n_groups: int = 1
    share: float = 1.0  # of the steps that the smallest task takes
    batch_size: int = 64

    @property
    def title(self) -> str:
        groups = f"{self.n_groups} param group{'s' * (self.n_groups > 1)}"
        return f"{self.name}, batch {self.batch_size}, {self.opt}, {groups}"

    def steps(self, steps: int) -> int:
        return max(3, round(steps * self.share))

    def batches(self, n, device="cpu"):
        return [(torch.randn(self.batch_size, *self.shape, device=device),
                 torch.randint(0, self.n_classes, (self.batch_size,), device=device)) for _ in range(n)]

    def split(self, model):
        """The parameters in `n_groups` lists, first layers first, as evenly as it goes."""
        params = list(model.parameters())
        bounds = [round(i * len(params) / self.n_groups) for i in range(self.n_groups + 1)]
        return [params[low:high] for low, high in pairwise(bounds)]

    def optimizer(self, model, lr=MAX_LR, **options):
        return OPTIMIZERS[self.opt]([{"params": params} for params in self.split(model)], lr=lr, **options)

    def learner(self, model, batches, device, **options):
        splitter = self.split if self.n_groups > 1 else None
        return minifast.Learner(model, options.pop("dls", (batches, None)), nn.CrossEntropyLoss(), splitter=splitter,
                                opt_func=OPTIMIZERS[self.opt], device=device, **options)


MLP = Task("MLP 16-32-2", mlp, (16,), 2)
DEEP_MLP = Task("MLP of 60 layers", deep_mlp, (16,), 2, n_groups=60, share=0.1)
CONVNET = Task("convnet 28x28", convnet, (1, 28, 28), 10, share=0.04)


def by_hand(task, model, batches, device, **options):
    """The reference: torch's optimizer and OneCycleLR, as in torch's own documentation."""
    loss_func, opt = nn.CrossEntropyLoss(), task.optimizer(model, **options)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, MAX_LR, total_steps=len(batches))
    model.train()
    for x, y in batches:
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        sched.step()


def by_hand_fused(task, model, batches, device):
    """The same loop by someone who knows the tricks: a fused optimizer and a plain float in place of OneCycleLR."""
    loss_func, opt = nn.CrossEntropyLoss(), task.optimizer(model, fused=True)
    model.train()
    for i, (x, y) in enumerate(batches):
        lr = MAX_LR * minifast.schedules.one_cycle(i, len(batches))
        for group in opt.param_groups:
            group["lr"] = lr
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()


def with_learner(task, model, batches, device, **options):
    """A Learner as a user gets it, with Recorder, one-cycle and, unless verbose=False, the bar."""
    learn = task.learner(model, batches, device, **options)
    with contextlib.redirect_stdout(Screen()):
        learn.fit_one_cycle(1, MAX_LR)


def without_direct_kernels(run, *args, **options):
    """`run` with fits that call `opt.step()` and `loss.backward()`."""
    was, fused.DIRECT = fused.DIRECT, False
    try:
        run(*args, **options)
    finally:
        fused.DIRECT = was


def one_cycle_by_hand(task, model, batches):
    """A plain loop with torch's for-loop optimizer, and the very learning rates and momentums of minifast's one cycle.
    """
    opt, loss_func = task.optimizer(model, foreach=False), nn.CrossEntropyLoss()
    plan = minifast.OneCycle(MAX_LR).values(len(batches))
    model.train()
    for (x, y), lr, momentum in zip(batches, plan["lr"], plan["momentum"], strict=True):
        set_hypers(opt, lr, momentum)
        loss_func(model(x), y).backward()
        opt.step()
        opt.zero_grad()


def set_hypers(opt, lr, momentum):
    for group in opt.param_groups:
        group.update({"lr": lr, "betas": (momentum, 0.999)} if "betas" in group else {"lr": lr, "momentum": momentum})


def twins(task, device="cpu", n=2):
    """Models with the same weights."""
    first = task.make_model().to(device)
    return [first, *(copy.deepcopy(first) for _ in range(n - 1))]


def check_agree(mine, theirs, what, rtol=1e-4, atol=1e-5):
    """Raise AssertionError unless two models agree; fused and for-loop kernels round differently.

    Counters of batches are left out: torch's averaged models do not copy them.
    """
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        if not a.is_floating_point():
            continue
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{what}: {name}: {text}")


def in_double(task, batches, device, n):
    """`n` models with the same weights, and the batches, in float64: rounding is no excuse there."""
    return [model.double() for model in twins(task, device, n)], [(x.double(), y) for x, y in batches]


def check_same_updates(task, runs, batches, device):
    """Each of `runs` (name -> a function of model and batches) ends where torch's plain loop ends."""
    (reference, *models), batches = in_double(task, batches, device, 1 + len(runs))
    one_cycle_by_hand(task, reference, batches)
    for (name, run), model in zip(runs.items(), models, strict=True):
        run(model, batches)
        check_agree(model, reference, f"{task.title}, {name}", rtol=1e-6, atol=1e-8)
