"""What a model is made of, what one batch makes of it, and how much memory that takes."""
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

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
from ..show.tables import shown, table
from ..training.trainer import Trainer

MOST_LINES = 60  # of a printed table: a longer model is shown by its outer modules
ROOT = "(model)"  # the name of the model among its modules


@dataclass(frozen=True, eq=False, repr=False)
class Summary:
    """The layers of a model and their totals; prints as a table.

    A module or parameter that is used twice is counted where it comes first. Each piece of memory counts once.
    """

    model: str
    inputs: str
    # One per layer, a module without children or with parameters of its own, in the order of the model: layer (dotted
    # name), type, output (shape of its first output for one batch; "not run" if it had none), parameters, trainable.
    rows: list[dict[str, Any]]
    outer: dict[str, tuple[str, str]]  # of all modules: name -> (type, output)
    n_parameters: int
    n_trainable: int
    parameter_bytes: int
    gradient_bytes: int  # of the trainable parameters
    buffer_bytes: int
    activation_bytes: int  # of all modules' outputs for one batch; what functions between them keep is not seen
    optimizer_bytes: int | None  # of its state after a first step as it is now; None: that cannot be told

    def __repr__(self) -> str:
        rows, depth = self._shown()
        lines = [f"{self.model}, inputs {self.inputs}", table(["layer", "type", "output", "parameters", "trainable"], [
            list(row.values()) for row in rows])]
        if len(rows) < len(self.rows):
            lines.append(f"{len(self.rows)} layers, shown to depth {depth}: `.rows` holds all")
        for name, count, size in (("parameters", self.n_parameters, self.parameter_bytes),
                                  ("trainable, and their gradients", self.n_trainable, self.gradient_bytes),
                                  ("buffers", None, self.buffer_bytes),
                                  ("outputs of all modules, one batch", None, self.activation_bytes),
                                  ("optimizer state after a step", None, self.optimizer_bytes)):
            lines.append(f"{name:33}  {shown(count):>14}  {'unknown' if size is None else _size(size):>13}")
        return "\n".join(lines)

    def _shown(self) -> tuple[list[dict[str, Any]], int]:
        """The rows, merged into their outer modules as far as that takes to be few; and how deep they then are."""
        depth, rows = max(row["layer"].count(".") + 1 for row in self.rows), self.rows
        while len(rows) > MOST_LINES and depth > 1:
            depth -= 1
            merged: dict[str, dict[str, Any]] = {}
            for row in self.rows:
                name = ".".join(row["layer"].split(".")[:depth])
                kind, output = self.outer[name]
                sums = merged.setdefault(name, {"layer": name, "type": kind, "output": output, "parameters": 0,
                                                "trainable": 0})
                for key in ("parameters", "trainable"):
                    sums[key] += row[key]
            rows = list(merged.values())
        return rows, depth


def summary(learn: Trainer) -> Summary:
    """See `Learner.summary`."""
    model, data = learn.model, second_copy(as_dataloaders(learn.model, learn.dls).train)
    with _as_it_was(model, data), closing(feed(data, learn.device, 1)) as batches:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"there is nothing to run: the training data ({type(data).__name__}) yielded 0 batches.")
        inputs, _ = learn.unpack(batch)
        outputs, held = _run(model, inputs)
        activations = _distinct_bytes(held, [*model.parameters(), *model.buffers(), *tensors(batch)])
    outer, rows, seen = {}, [], set[int]()
    for name, module in model.named_modules():
        kind, output = outer[name or ROOT] = type(module).__name__, outputs.get(name, "not run")
        params = list(module.parameters(recurse=False))
        if params or not list(module.children()):
            own = [p for p in params if id(p) not in seen]
            seen |= set(map(id, own))
            rows.append({"layer": name or ROOT, "type": kind, "output": output,
                         "parameters": sum(p.numel() for p in own),
                         "trainable": sum(p.numel() for p in own if p.requires_grad)})
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Summary(
        type(model).__name__, describe(inputs), rows, outer, sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in trainable), sum(p.nbytes for p in model.parameters()),
        sum(p.nbytes for p in trainable), sum(buffer.nbytes for buffer in model.buffers()), activations,
        state_bytes(learn.opt))


@contextmanager
def _as_it_was(model: nn.Module, data: Any) -> Iterator[None]:
    """Eval mode without gradients; modes, buffers and random generators are put back at the end."""
    restore_modes, restore_rng = snapshot.modes(model), snapshot.rng(generators(data))
    buffers = [(module, name, buffer, snapshot.clone(buffer))
               for module in model.modules() for name, buffer in module._buffers.items()]
    model.eval()
    with torch.no_grad():
        try:
            yield
        finally:
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # a module may have put another tensor there
                if buffer is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
            restore_modes()
            restore_rng()


def _run(model: nn.Module, inputs: Any) -> tuple[dict[str, str], list[Tensor]]:
    """The shape of each module's first output, and all tensors that any of them put out."""
    names = {module: name for name, module in model.named_modules()}
    shapes: dict[str, str] = {}
    held: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        shapes.setdefault(names[module], describe(output, lambda tensor: str(tuple(tensor.shape))))
        held.extend(tensors(output))

    with hook_outputs(names, note):
        try:
            call_model(model, inputs)
        except Exception as error:
            error.add_note(f"in the model, for its summary: inputs {describe(inputs)}")
            raise
    return shapes, held


def _distinct_bytes(held: list[Tensor], known: list[Tensor]) -> int:
    """Bytes behind `held`: views and in-place results of one another, or of `known`, cost nothing."""
    mine, others = ({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in of
                     if tensor.layout is torch.strided} for of in (held, known))
    return sum(mine[at] for at in mine.keys() - others.keys())


def state_bytes(opt: Optimizer) -> int | None:
    """Bytes of `opt`'s state once it has made a step; None where that cannot be told.

    A twin of the optimizer makes one step on tensors without memory. Frozen parameters have no state.
    """
    unfused = {"fused": None, "foreach": None, "capturable": False}  # these ask for a real device
    groups = []
    for group in opt.param_groups:
        params = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"] if p.requires_grad]
        for p in params:
            p.grad = torch.empty_like(p)
        groups.append(group | {key: value for key, value in unfused.items() if key in group} | {"params": params})
    try:
        twin = type(opt)([group for group in groups if group["params"]], lr=1e-3)  # type: ignore[call-arg]
        twin.step()
    except Exception:  # an optimizer of the user's may do anything; and some of torch's read values
        return None
    return sum(tensor.nbytes for state in twin.state.values() for tensor in tensors(state))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.2f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"
