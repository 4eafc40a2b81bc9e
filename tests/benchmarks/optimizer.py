"""The optimizer step alone, of a large model: torch's default against what a Learner uses without being asked."""
from collections.abc import Iterator

import torch
from harness import Goal, Options, Table, interleave, seconds
from torch import nn
from workloads import check_agree, twins

from minifast import Learner
from minifast.optim.fused import updater

REFERENCE, FUSED, LEARNER, INDIRECT = "by hand: torch's default", "by hand: fused", "Learner", "Learner, opt.step()"


class Resnet18:
    """As much of a task as `twins` needs."""

    @staticmethod
    def make_model():
        from torchvision.models import resnet18
        return resnet18(weights=None)


def with_gradients(model):
    """`model` with a gradient for each parameter, the same for the same seed."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
    return model


def updates(models, device):
    """name -> what makes one weight update of a model of its own, AdamW with the same hyper-parameters."""
    found = {}
    for name, model in models.items():
        with_gradients(model)
        if name in (LEARNER, INDIRECT):
            opt = Learner(model, ([(torch.zeros(1), torch.zeros(1))], None), nn.MSELoss(), wd_norm_bias=True,
                          device=device, verbose=False).opt
        else:
            opt = torch.optim.AdamW(model.parameters(), **({"fused": True} if name == FUSED else {}))
        found[name] = updater(opt) if name == LEARNER else opt.step  # a fit asks for its updater
    return found


def suite(options: Options) -> Iterator[Table]:
    names = [REFERENCE, FUSED, LEARNER, INDIRECT]
    models = dict(zip(names, twins(Resnet18, options.device, len(names)), strict=True))
    steps, per_round = updates(models, options.device), 2 if options.quick else 5

    def run(name):
        return 1e3 * seconds(lambda: [steps[name]() for _ in range(per_round)], options.device) / per_round

    found = interleave({name: lambda name=name: run(name) for name in names}, options)
    for name in names[1:]:
        check_agree(models[name], models[REFERENCE], name)
    yield Table("optimizer step of ResNet-18, AdamW, 11.7 million parameters", "ms per step", found, REFERENCE,
                [Goal(LEARNER, 0.2)])
