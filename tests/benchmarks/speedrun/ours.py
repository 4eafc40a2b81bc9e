"""The speed run with the Learner and its callbacks."""
from functools import partial

import torch
from torch import nn

from minifast import Callback, ChannelsLast, DataLoaders, Learner, MixedPrecision, Schedule, TensorLoader, accuracy

from .data import Augment, Normalize
from .recipe import triangle


class Lookahead(Callback):
    """Every few updates the weights meet a slow copy of themselves between the two, and go on from there."""

    def __init__(self, every, slowness):
        self.every, self.slowness = every, slowness  # slowness: 0-based step -> the slow weights' share, 0..1

    def before_fit(self, state):
        buffers = [buffer for buffer in state.model.buffers() if buffer.is_floating_point()]
        self.fast = [tensor.detach() for tensor in (*state.model.parameters(), *buffers)]
        self.slow = [tensor.clone() for tensor in self.fast]

    def after_step(self, state):
        if (state.step + 1) % self.every == 0:
            torch._foreach_lerp_(self.slow, self.fast, 1 - self.slowness(state.step))
            torch._foreach_copy_(self.fast, self.slow)

    def after_fit(self, state):
        del self.fast, self.slow


def make_learner(model, data, recipe, device, seed, *, half=False, compile=False):
    """The Learner of the speed run; the layer groups are the biases, with a high rate, and the weights."""
    train_dl = TensorLoader(data.train_x, data.train_y, batch_size=recipe.batch_size, shuffle=True, drop_last=True,
                            transform=Augment(device, seed, recipe.cutout),
                            generator=torch.Generator().manual_seed(seed))
    test_dl = TensorLoader(data.test_x, data.test_y, batch_size=2 * recipe.batch_size, transform=Normalize(device))
    return Learner(
        model, DataLoaders(train_dl), nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
        opt_func=partial(torch.optim.SGD, momentum=recipe.momentum, nesterov=True),
        splitter={"biases": "*.bias", "weights": "*"}, lr=[recipe.lr * recipe.bias_scale, recipe.lr],
        wd=recipe.weight_decay, metrics=[accuracy], callbacks=[ChannelsLast(), *([MixedPrecision("bf16")] * half)],
        device=device, compile=compile, verbose=False), test_dl


def train(learn, recipe, callbacks=()):
    learn.fit(learn.lr, recipe.epochs, callbacks=[
        Schedule({"lr": triangle}), Lookahead(recipe.lookahead_every, recipe.slowness), *callbacks])


def evaluate(learn, test_dl):
    """The accuracy, 0..1, of the mean of the outputs for each image and its mirror image."""
    preds, targets = learn.tta(test_dl, transform=lambda x: x.flip(3), n=1, beta=0.5)
    return float(accuracy(preds, targets))
