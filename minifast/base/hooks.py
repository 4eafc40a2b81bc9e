"""Hooks on modules that are gone when their block ends."""
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import check_flag, check_items, quoted
from .nest import map_tensors

Function = Callable[[nn.Module, Any, Any], Any]


class Hook:
    """Inside its `with` block: whenever `module` has run, calls `function(module, inputs, output)`.

    stored: what `function` returned the last time, None before that; it never replaces the output. backward: hook the
    backward pass instead; `inputs` and `output` are then tuples of the gradients with respect to them. Raises TypeError
    for what is no module or no function.

    >>> layer = nn.Linear(3, 2)
    >>> with Hook(layer, lambda module, inputs, output: tuple(output.shape)) as hook:
    ...     _ = layer(torch.zeros(5, 3))
    >>> hook.stored, len(layer._forward_hooks)
    ((5, 2), 0)
    """

    def __init__(self, module: nn.Module, function: Function, *, backward: bool = False) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {quoted(module)}.")
        if not callable(function) or isinstance(function, nn.Module):
            raise TypeError(f"function must be a function (module, inputs, output) -> anything, got {function!r:.80}.")
        self.module, self.function, self.backward = module, function, check_flag("backward", backward)
        self.stored: Any = None

    def __enter__(self) -> "Hook":
        register = self.module.register_full_backward_hook if self.backward else self.module.register_forward_hook
        self._handle = register(self._store)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _store(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stored = self.function(module, inputs, output)


class Hooks:
    """A `Hook` on each of `modules`, of which there is at least one; `stored` is a list in their order."""

    def __init__(self, modules: Iterable[nn.Module], function: Function, *, backward: bool = False) -> None:
        if isinstance(modules, nn.Module):
            raise TypeError(f"modules must be an iterable of modules, got a {type(modules).__name__}. Pass [module], "
                            "or module.children().")
        modules = check_items("modules", modules, "an iterable of modules", example="[module] or module.children()")
        self.hooks = [Hook(module, function, backward=backward) for module in modules]
        if not self.hooks:
            raise ValueError("modules must hold at least one module, got none.")

    @property
    def stored(self) -> list[Any]:
        """What each function returned the last time; None where the module has not run."""
        return [hook.stored for hook in self.hooks]

    def __enter__(self) -> "Hooks":
        with ExitStack() as stack:  # a hook that torch refuses takes the others with it
            for hook in self.hooks:
                stack.enter_context(hook)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return len(self.hooks)

    def __iter__(self) -> Iterator[Hook]:
        return iter(self.hooks)


def hook_outputs(modules: Iterable[nn.Module], function: Function | None = None) -> Hooks:
    """`Hooks` on the forward pass of `modules`; function None: store the output, without its graph.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with hook_outputs(model.children()) as hooks:
    ...     y = model(torch.ones(1, 3))
    >>> torch.equal(hooks.stored[1], y), hooks.stored[1].requires_grad
    (True, False)
    """
    return Hooks(modules, _output if function is None else function)


def _output(module: nn.Module, inputs: Any, output: Any) -> Any:
    return map_tensors(torch.Tensor.detach, output)
