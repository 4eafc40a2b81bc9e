"""What a model is made of, what one batch makes of it, and how much memory that takes."""
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base import snapshot
from ..base.batch import call_model
from ..base.hooks import hook_outputs
from ..base.nest import describe, tensors
from ..data.dataloaders import as_dataloaders
from ..data.feed import feed
from ..data.loader import generators, second_copy
from ..machine.signals import DeferredInterrupt
from ..show.tables import table

if TYPE_CHECKING:
    from ..training.trainer import Trainer

MOST_LINES = 60  # of a printed table: a longer model is shown by its outer modules
ROOT = "(model)"  # the name of the model among its modules


@dataclass(frozen=True, eq=False, repr=False)
class Summary:
    """The layers of a model and their totals; prints as a table.

    rows: one dict per layer (a module without children, or with parameters of its own), in the order of the model:
    layer (dotted name), type, output (shape of its first output for one batch; "not run" if it had none), parameters,
    trainable. A module or parameter that is used twice is counted where it comes first.

    Bytes: `parameter_bytes`; `gradient_bytes`, of the trainable ones; `buffer_bytes`; `activation_bytes`, of all
    outputs of all modules in a forward pass of one batch, each piece of memory once (what functions between the modules
    keep for the backward pass is not seen); `optimizer_bytes`, of the state that the optimizer has after its first
    step with the hyper-parameters of now, None where that cannot be told.
    """

    model: str
    inputs: str
    rows: list[dict[str, Any]]
    outer: dict[str, tuple[str, str]]  # of all modules: name -> (type, output)
    n_parameters: int
    n_trainable: int
    parameter_bytes: int
    gradient_bytes: int
    buffer_bytes: int
    activation_bytes: int
    optimizer_bytes: int | None

    def __repr__(self) -> str:
        rows, depth = self._shown()
        lines = [f"{self.model}, inputs {self.inputs}", table(["layer", "type", "output", "parameters", "trainable"], [
            list(row.values()) for row in rows])]
        if len(rows) < len(self.rows):
            lines.append(f"{len(self.rows)} layers, shown to depth {depth}: `.rows` holds all")
        state = "unknown" if self.optimizer_bytes is None else _size(self.optimizer_bytes)
        totals = [["parameters", f"{self.n_parameters:,}", _size(self.parameter_bytes)],
                  ["trainable, and their gradients", f"{self.n_trainable:,}", _size(self.gradient_bytes)],
                  ["buffers", "", _size(self.buffer_bytes)],
                  ["outputs of all modules, one batch", "", _size(self.activation_bytes)],
                  ["optimizer state after a step", "", state]]
        widths = [max(len(row[i]) for row in totals) for i in range(3)]
        lines += [f"{name.ljust(widths[0])}  {count.rjust(widths[1])}  {size.rjust(widths[2])}"
                  for name, count, size in totals]
        return "\n".join(lines)

    __str__ = __repr__

    def _shown(self) -> tuple[list[dict[str, Any]], int]:
        """The rows, merged into their outer modules as far as that takes to be few; and how deep they then are."""
        depth = max(row["layer"].count(".") + 1 for row in self.rows)
        rows = self.rows
        while len(rows) > MOST_LINES and depth > 1:
            depth -= 1
            rows = self._merged(depth)
        return rows, depth

    def _merged(self, depth: int) -> list[dict[str, Any]]:
        merged: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            name = ".".join(row["layer"].split(".")[:depth])
            kind, output = self.outer[name]
            into = merged.setdefault(name, {"layer": name, "type": kind, "output": output,
                                            "parameters": 0, "trainable": 0})
            into["parameters"] += row["parameters"]
            into["trainable"] += row["trainable"]
        return list(merged.values())


def summary(learn: "Trainer") -> Summary:
    """Run one batch of the training data through the model of `learn`, in eval mode, and say what came out.

    Modes, buffers and random generators, those of the loaders too, are put back; nothing is trained. All outputs of
    the batch are held at once, as training would. Raises ValueError for data that is an iterator, good for one pass
    (the batch would be missing from training), and for data without a batch.
    """
    model, data = learn.model, second_copy(as_dataloaders(learn.model, learn.dls).train)
    modules = {name: module for name, module in model.named_modules()}
    layers = [name for name, module in modules.items()
              if not list(module.children()) or list(module.parameters(recurse=False))]
    with _as_it_was(model, data), closing(feed(data, learn.device, 1, DeferredInterrupt())) as batches:
        for batch in batches:
            inputs, _ = learn.unpack(batch)
            outputs, held = _run(model, modules, inputs)
            break
        else:
            raise ValueError(f"there is nothing to run: the training data ({type(data).__name__}) yielded 0 batches.")
        activations = _distinct_bytes(held, [*model.parameters(), *model.buffers(), *tensors(batch)])
    rows, seen = [], set[int]()
    for name in layers:
        own = [p for p in modules[name].parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        rows.append({"layer": name or ROOT, "type": type(modules[name]).__name__,
                     "output": outputs.get(name, "not run"), "parameters": sum(p.numel() for p in own),
                     "trainable": sum(p.numel() for p in own if p.requires_grad)})
    params = list(model.parameters())
    trainable = [p for p in params if p.requires_grad]
    return Summary(
        type(model).__name__, describe(inputs), rows,
        {name or ROOT: (type(module).__name__, outputs.get(name, "not run")) for name, module in modules.items()},
        sum(p.numel() for p in params), sum(p.numel() for p in trainable), sum(map(_n_bytes, params)),
        sum(map(_n_bytes, trainable)), sum(map(_n_bytes, model.buffers())), activations, state_bytes(learn.opt))


@contextmanager
def _as_it_was(model: nn.Module, data: Any) -> Iterator[None]:
    """Eval mode without gradients; modes, buffers and random generators are put back at the end."""
    restore_modes, restore_rng = snapshot.modes(model), snapshot.rng(generators(data))
    buffers = [(module, name, buffer, None if buffer is None else buffer.clone())
               for module in model.modules() for name, buffer in module._buffers.items()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # a module may have put another tensor there
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
        restore_modes()
        restore_rng()


def _run(model: nn.Module, modules: dict[str, nn.Module], inputs: Any) -> tuple[dict[str, str], list[Tensor]]:
    """The shape of each module's first output, and all tensors that any of them put out."""
    names = {module: name for name, module in modules.items()}
    shapes: dict[str, str] = {}
    held: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        shapes.setdefault(names[module], _shape(output))
        held.extend(tensors(output))

    with hook_outputs(modules.values(), note):
        try:
            call_model(model, inputs)
        except Exception as error:
            error.add_note(f"in the model, for its summary: inputs {describe(inputs)}")
            raise
    return shapes, held


def _shape(nest: Any) -> str:
    """A nest of tensors by their shapes.

    >>> _shape((torch.zeros(4, 3), {"hidden": torch.zeros(2)}))
    '((4, 3), {hidden: (2,)})'
    """
    if isinstance(nest, Tensor):
        return str(tuple(nest.shape))
    if isinstance(nest, Mapping):
        return "{" + ", ".join(f"{key}: {_shape(value)}" for key, value in nest.items()) + "}"
    if isinstance(nest, (tuple, list)):
        return "(" + ", ".join(map(_shape, nest)) + ")"
    inner = list(tensors(nest))
    return f"{type(nest).__name__}({', '.join(map(_shape, inner))})" if inner else type(nest).__name__


def _distinct_bytes(held: list[Tensor], known: list[Tensor]) -> int:
    """Bytes behind `held`: views and in-place results of one another, or of `known`, cost nothing."""
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
              for tensor in held if tensor.layout is torch.strided}
    for tensor in known:
        if tensor.layout is torch.strided:
            memory.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(memory.values())


def _n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def state_bytes(opt: Optimizer) -> int | None:
    """Bytes of `opt`'s state once it has made a step; None where that cannot be told.

    A twin of the optimizer makes one step on tensors that have a shape and no memory. Frozen parameters have no state.

    >>> layer = nn.Linear(9, 1, bias=False)
    >>> state_bytes(torch.optim.Adam(layer.parameters())) == 2 * 9 * 4 + 4  # two moments, and the count of steps
    True
    """
    unfused = {"fused": None, "foreach": None, "capturable": False}  # these ask for a real device
    groups = [group | {key: value for key, value in unfused.items() if key in group}
              | {"params": [_without_memory(p) for p in group["params"] if p.requires_grad]}
              for group in opt.param_groups]
    try:
        twin = type(opt)([group for group in groups if group["params"]], lr=1e-3)  # type: ignore[call-arg]
        twin.step()
    except Exception:  # an optimizer of the user's may do anything; and some of torch's read values
        return None
    return sum(_n_bytes(tensor) for state in twin.state.values() for tensor in tensors(state))


def _without_memory(p: Tensor) -> nn.Parameter:
    twin = nn.Parameter(torch.empty_like(p, device="meta"))
    twin.grad = torch.empty_like(twin)
    return twin


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.2f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"
