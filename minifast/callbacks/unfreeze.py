"""Gradual unfreezing as a schedule."""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ..core.callback import Callback, Order
from ..core.state import State
from ..errors import check_flag, check_int, check_number
from ..optim.groups import is_norm
from ..optim.making import fill_momentum
from ..show.tables import listed


@dataclass(eq=False)
class Unfreeze(Callback):
    """Freezes parts of the model and thaws each of them at its own share of the fit.

    parts: name -> share of the fit, 0..1. A name is that of a layer group, of a module, or a glob over parameter names;
        the first that is found. A part is frozen before the first update with schedule_step >= share * n_steps, and
        trained as a whole from that one on: 0.0 from the start, 1.0 not at all. What is not named is left as it is.
    train_bn: norm layers of frozen parts are left as they are, which is training unless `freeze` made them still, as
        with the Learner's `train_bn`; False: they are frozen, in eval mode, with the rest.

    The optimizer neither moves nor decays a frozen parameter, and leaves its state alone. A part that is thawed late
    joins in at the learning rate of that moment. After the fit, however it ended, what was thawed stays so, and what
    was still frozen is as it was before. It does not run in `lr_find`. Raises ValueError or TypeError for other
    arguments, names that are not found, a parameter that two of them mean, and if nothing were left to train.
    Source: Howard and Ruder 2018 (arXiv 1801.06146), section 3.3, there an epoch per layer.

    >>> Unfreeze({"layer4": 0.3, "layer3": 0.5}).steps(n_steps=10)
    {'layer4': 3, 'layer3': 5}
    """

    parts: Mapping[str, float]
    train_bn: bool = True

    order = Order.HYPER
    owns = ("requires_grad",)  # one of them in a fit

    def __post_init__(self) -> None:
        example = 'Unfreeze({"layer4": 0.3})'
        if not isinstance(self.parts, Mapping) or not all(isinstance(name, str) for name in self.parts):
            raise TypeError("parts must be a dict of name -> share of the fit, got "
                            f"{self.parts!r:.80}. Pass e.g. {example}.")
        if not self.parts:
            raise ValueError(f"parts must name at least one part of the model, got none. Pass e.g. {example}.")
        self.parts = {name: check_number(f"parts[{name!r}]", share, minimum=0, maximum=1, example=example)
                      for name, share in self.parts.items()}
        self.train_bn = check_flag("train_bn", self.train_bn)

    def steps(self, n_steps: int) -> dict[str, int]:
        """The first update (0-based) of `n_steps`, >= 1, that trains each part; `n_steps` for a part that none does.

        >>> Unfreeze({"body": 0.07}).steps(100)  # although 0.07 * 100 > 7 in floating point
        {'body': 7}
        """
        n_steps = check_int("n_steps", n_steps)
        return {name: math.ceil(round(share * n_steps, 6)) for name, share in self.parts.items()}

    def before_fit(self, state: State) -> None:
        parts = [part for part in _find(self.steps(state.n_steps), state) if part.first > state.schedule_step]
        held = {id(p) for part in parts for p in part.params}
        if self.train_bn:
            held -= {id(p) for module in state.model.modules() if is_norm(module)
                     for p in module.parameters(recurse=False)}
        if not any(p.requires_grad and id(p) not in held for p in state.model.parameters()):
            raise ValueError(f"{self!r:.200} leaves nothing to train in update {state.schedule_step} of "
                             f"{state.n_steps}. Give one part, e.g. the head, the share 0, or do not name it.")
        for p in (p for part in parts for p in part.params if id(p) in held):
            p.requires_grad_(False)
        if not self.train_bn:
            state.norms_in_eval += tuple(norm for part in parts for norm in part.norms)
        self._frozen = sorted(parts, key=lambda part: part.first)

    def before_batch(self, state: State) -> None:
        if not self._frozen or state.schedule_step < self._frozen[0].first or state.batch_index % state.accumulate:
            return  # with a time limit the step moves on within a window, whose gradients are to be of all parts
        while self._frozen and state.schedule_step >= self._frozen[0].first:
            part = self._frozen.pop(0)
            for p in part.params:
                p.requires_grad_(True)
            for norm in part.norms:
                norm.train()
            state.norms_in_eval = tuple(norm for norm in state.norms_in_eval if norm not in part.norms)
        fill_momentum(state.opt, any("momentum" in callback.owns for callback in state.callbacks))

    def after_fit(self, state: State) -> None:
        for part in self._frozen:
            for p, was_trained in zip(part.params, part.were_trained, strict=True):
                p.requires_grad_(was_trained)
        self._frozen = []  # no hold on the model


class _Part(NamedTuple):
    first: int  # the first update that trains it
    params: list[nn.Parameter]
    were_trained: list[bool]  # each of them, before the fit
    norms: list[nn.Module]


def _find(steps: Mapping[str, int], state: State) -> list[_Part]:
    """The parts of the model that are named in `steps`."""
    owner: dict[int, str] = {}
    parts: dict[str, _Part] = {}
    for name, first in steps.items():
        params = _params(name, state)
        if not params:
            parameters = listed(full for full, _ in state.model.named_parameters())
            raise ValueError(f"there is no layer group, module or parameter {name!r} to unfreeze. Layer groups: "
                             f"{listed(state.group_names)}. Parameters: {parameters}.")
        both = next((owner[id(p)] for p in params if id(p) in owner), None)
        if both is not None:
            raise ValueError(f"{both!r} and {name!r} share a parameter: when would it be thawed? Name each once.")
        owner |= {id(p): name for p in params}
        parts[name] = _Part(first, params, [p.requires_grad for p in params], [])
    current = None
    for module in state.model.modules():
        own = next(module.parameters(recurse=False), None)
        current = current if own is None else owner.get(id(own))  # without parameters: part of the layer before it
        if current is not None and is_norm(module):
            parts[current].norms.append(module)
    return list(parts.values())


def _params(name: str, state: State) -> list[nn.Parameter]:
    if name in state.group_names:
        index = state.group_names.index(name)
        return [p for group in state.opt.param_groups if group["layer_group"] == index for p in group["params"]]
    named = state.model.named_parameters(remove_duplicate=False)  # tied weights have two names
    found = {id(p): p for full, p in named if full.startswith(f"{name}.") or fnmatchcase(full, name)}
    return list(found.values())
