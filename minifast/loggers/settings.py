"""What a fit was given, as plain values: the head of its record."""
import platform
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from ..core.callback import Callback
from ..core.state import State
from ..standard.recorder import Recorder


def settings(state: State) -> dict[str, Any]:
    """Versions, device, model, optimizer, layer groups, lengths, schedule and callbacks of a fit, in `before_fit`."""
    params = list(state.model.parameters())
    device = str(state.device)
    if state.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(state.device)})"
    return {
        "time": now(),
        "versions": {"minifast": sys.modules["minifast"].__version__, "torch": str(torch.__version__),
                     "python": platform.python_version()},
        "device": device,
        "model": {"class": type(state.model).__name__, "parameters": sum(p.numel() for p in params),
                  "trainable": sum(p.numel() for p in params if p.requires_grad)},
        "optimizer": {"class": type(state.opt).__name__, "defaults": dict(state.opt.defaults)},
        "group_names": list(state.group_names),
        "lrs": list(state.lrs),
        "n_epochs": state.n_epochs,
        "n_steps": state.n_steps,
        "steps_per_epoch": state.steps_per_epoch,
        "accumulate": state.accumulate,
        "batch_size": getattr(state.train_dl, "batch_size", None),
        "schedule": next((in_words(callback) for callback in state.callbacks if "lr" in callback.owns), None),
        "callbacks": [in_words(callback) for callback in state.callbacks if not isinstance(callback, Recorder)],
    }


def now() -> str:
    """The time in UTC, as ISO 8601 has it, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def in_words(callback: Callback) -> str:
    """Its repr; of one that has none its class: an address says nothing."""
    has_none = type(callback).__repr__ is object.__repr__
    return type(callback).__name__ if has_none else f"{callback!r:.1000}"
