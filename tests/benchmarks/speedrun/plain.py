"""The speed run as a script: one loop by hand, as lean as it gets without giving up an ingredient."""
import contextlib

import torch
from torch.nn import functional as F

from .data import Augment, Normalize
from .recipe import triangle


def epochs(model, data, recipe, device, seed, *, half=False, compile=False):
    """A generator that trains `model` and comes back after each epoch."""
    model.to(device, memory_format=torch.channels_last).train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    biases = {"params": [p for name, p in named if name.endswith(".bias")], "weight_decay": 0.0}
    weights = {"params": [p for name, p in named if not name.endswith(".bias")]}
    opt = torch.optim.SGD([biases, weights], lr=recipe.lr, momentum=recipe.momentum, nesterov=True,
                          weight_decay=recipe.weight_decay, fused=True)
    augment, order_generator = Augment(device, seed, recipe.cutout), torch.Generator().manual_seed(seed)
    fast = [p.detach() for p in model.parameters()] + [b for b in model.buffers() if b.is_floating_point()]
    slow = [tensor.clone() for tensor in fast]
    forward = torch.compile(model) if compile else model

    def gradient(x, y):
        with precision(device, half):
            output = forward(x)
        F.cross_entropy(output.float(), y, label_smoothing=recipe.label_smoothing).backward()

    step, n, size = 0, len(data.train_x), recipe.batch_size
    for _ in range(recipe.epochs):
        order = torch.randperm(n, generator=order_generator).to(device)
        for i in range(0, n - size + 1, size):
            rows = order[i:i + size]
            x, y = augment((data.train_x.index_select(0, rows), data.train_y.index_select(0, rows)))
            lr = recipe.lr * triangle(step, recipe.n_steps)
            opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = lr * recipe.bias_scale, lr
            gradient(x, y)
            opt.step()
            opt.zero_grad()
            step += 1
            if step % recipe.lookahead_every == 0:
                torch._foreach_lerp_(slow, fast, 1 - recipe.slowness(step - 1))
                torch._foreach_copy_(fast, slow)
        yield


def precision(device, half):
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()


@torch.no_grad()
def evaluate(model, data, recipe, device, half=False):
    """The accuracy, 0..1, as it is, and of the mean of the outputs for each image and its mirror image."""
    model.eval()
    normalize, right, right_of_both = Normalize(device), 0, 0
    for x, y in zip(*(tensor.split(2 * recipe.batch_size) for tensor in (data.test_x, data.test_y)), strict=True):
        x, y = normalize((x, y))
        with precision(device, half):
            plain, mirrored = model(x).float(), model(x.flip(3)).float()
        right = right + (plain.argmax(1) == y).sum()
        right_of_both = right_of_both + ((plain + mirrored).argmax(1) == y).sum()
    return float(right) / len(data.test_x), float(right_of_both) / len(data.test_x)
