"""Layer groups: named slices of a model, first layers first, each with a learning rate of its own."""
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import quoted
from ..show.tables import listed, table

Splitter = Callable[[nn.Module], Any] | Mapping[str, str | Sequence[str]] | None


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """The parameters that share one peak learning rate, and the norm layers among them."""

    name: str
    decayed: tuple[nn.Parameter, ...]
    undecayed: tuple[nn.Parameter, ...]  # norm parameters and biases: no weight decay unless wd_norm_bias=True
    norms: tuple[nn.Module, ...]

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        return self.decayed + self.undecayed

    @property
    def is_frozen(self) -> bool:
        """Whether none of its parameters is trained."""
        return not any(p.requires_grad for p in self.params)


class LayerGroups(tuple[LayerGroup, ...]):
    """The layer groups of a model, first layers first; prints as a table. `lrs`, `wds`: what the table shows."""

    lrs: Sequence[float]
    wds: Sequence[float | None]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self)

    def __repr__(self) -> str:
        rows = [[group.name, sum(p.numel() for p in group.params),
                 sum(p.numel() for p in group.params if p.requires_grad), lr, wd]
                for group, lr, wd in zip(self, self.lrs, self.wds, strict=True)]
        return table(["layer group", "parameters", "trainable", "lr", "weight decay"], rows)


def split(model: nn.Module, splitter: Splitter = None) -> LayerGroups:
    """The layer groups of `model`: all of its parameters, each in exactly one group.

    splitter: None for one group; a callable that returns a list (or a dict by name) of modules, parameters or lists
    of them; or a dict of group name -> glob or globs over parameter names, in the order of the layers.

    A parameter that several groups claim (tied weights, overlapping globs) belongs to the first. Raises ValueError
    that names the parameters left over, a group without parameters, or a model without any.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    >>> split(model, {"body": ["0.*", "1.*"], "head": "2.*"}).names
    ('body', 'head')
    """
    named = dict(model.named_parameters())
    if not named:
        raise ValueError(f"the model ({type(model).__name__}) has no parameters to train.")
    if any(map(is_lazy, named.values())):
        raise ValueError(f"the model ({type(model).__name__}) has lazy layers without a shape yet. Call it once on a "
                         "batch before making the Learner.")
    claimed: set[int] = set()
    claims: dict[str, list[nn.Parameter]] = {}
    for name, wanted in _wanted(model, named, splitter).items():
        claims[name] = [p for p in wanted if id(p) not in claimed]
        claimed |= set(map(id, wanted))
        if not claims[name]:
            raise ValueError(f"layer group {name!r} has no parameters of its own. Parameters of this model: "
                             f"{listed(named)}.")
    if left := [name for name, p in named.items() if id(p) not in claimed]:
        raise ValueError(f"{len(left)} of {len(named)} parameters are in no layer group: {listed(left)}. "
                         "Let the splitter name them too, e.g. with a last group '*'.")
    if foreign := claimed - set(map(id, named.values())):
        raise ValueError(f"the splitter names {len(foreign)} parameters that are not the model's.")
    return _group(model, claims)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer: torch's own, or by its class name, as in LlamaRMSNorm."""
    return re.search(r"Norm(\d?d)?$", type(module).__name__) is not None or isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))


def _wanted(model: nn.Module, named: Mapping[str, nn.Parameter], splitter: Splitter) -> dict[str, list[nn.Parameter]]:
    if splitter is None:
        return {"model": list(named.values())}
    if isinstance(splitter, Mapping):
        return {str(group): _matching(str(group), globs, named) for group, globs in splitter.items()}
    if not callable(splitter):
        raise TypeError(f"splitter must be a callable, a dict of name -> glob, or None, got {splitter!r:.80}.")
    given = splitter(model)
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"splitter must return a list or dict of modules or parameter lists, got {given!r:.80}.")
    by_name = given if isinstance(given, Mapping) else {f"group {i}": group for i, group in enumerate(given)}
    return {str(name): _parameters(group) for name, group in by_name.items()}


def _matching(group: str, given: Any, named: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    globs = [given] if isinstance(given, str) else given
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"splitter[{group!r}] must be a glob over parameter names or a list of them, got "
                        f"{quoted(given)}.")
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in named):
            raise ValueError(f"layer group {group!r}: no parameter matches {glob!r}. Parameters of this model: "
                             f"{listed(named)}.")
    return [p for name, p in named.items() if any(fnmatchcase(name, glob) for glob in globs)]


def _parameters(given: Any) -> list[nn.Parameter]:
    if isinstance(given, nn.Parameter):
        return [given]
    if isinstance(given, nn.Module):
        return list(given.parameters())
    if isinstance(given, Iterable) and not isinstance(given, str):
        return [p for inner in given for p in _parameters(inner)]
    raise TypeError(f"a splitter returns modules, parameters or lists of them, got a {type(given).__name__}.")


def _group(model: nn.Module, claims: dict[str, list[nn.Parameter]]) -> LayerGroups:
    owner = {id(p): name for name, params in claims.items() for p in params}
    norms: dict[str, list[nn.Module]] = {name: [] for name in claims}
    undecayed: set[int] = set()
    current = next(iter(claims))
    for module in model.modules():
        own = list(module.named_parameters(recurse=False))
        # a norm layer without parameters still has statistics: it goes with the layer before it
        current = owner[id(own[0][1])] if own else current
        if is_norm(module):
            norms[current].append(module)
        undecayed |= {id(p) for name, p in own if is_norm(module) or "bias" in name}
    groups = LayerGroups(LayerGroup(name, tuple(p for p in params if id(p) not in undecayed),
                                    tuple(p for p in params if id(p) in undecayed), tuple(norms[name]))
                         for name, params in claims.items())
    groups.lrs, groups.wds = [float("nan")] * len(groups), [None] * len(groups)
    return groups
