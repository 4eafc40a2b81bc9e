"""What `lr_find` costs beside as many steps by hand: time, memory, files. (What it finds: finder.py.)"""
import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from harness import Goal, Options, Row, Table, interleave, seconds
from torch import nn
from workloads import CONVNET, DEEP_MLP, MLP

from minifast import Learner

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
START, END, NUM_IT = 1e-7, 1e-2, 100
REFERENCE, FUSED, LEARNER = "by hand: torch's defaults", "by hand: fused", "learn.lr_find"


def by_hand(task, model, batches, **options):
    """100 steps with a learning rate that grows, the loss read after each; gives the losses. Nothing is put back."""
    opt, loss_func, losses = task.optimizer(model, START, **options), nn.CrossEntropyLoss(), []
    model.train()
    for i, (x, y) in enumerate(batches[:NUM_IT]):
        for group in opt.param_groups:
            group["lr"] = START * (END / START) ** (i / NUM_IT)
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def with_learner(task, model, batches, device):
    learn = task.learner(model, batches, device, wd_norm_bias=True, verbose=False)
    return learn.lr_find(START, END, NUM_IT, stop_div=False).losses.tolist()


def measure(task, options: Options) -> Table:
    batches, start = task.batches(NUM_IT, options.device), task.make_model().to(options.device)
    rows = {REFERENCE: by_hand, FUSED: partial(by_hand, fused=True),
            LEARNER: partial(with_learner, device=options.device)}
    losses = [torch.tensor(row(task, copy.deepcopy(start), batches)) for row in rows.values()]
    for name, found in zip(rows, losses, strict=True):
        torch.testing.assert_close(found, losses[0], rtol=1e-3, atol=1e-3, msg=partial("{}: {}".format, name))

    def run(row):
        model = copy.deepcopy(start)
        return 1e3 * seconds(lambda: row(task, model, batches), options.device)

    found = interleave({name: partial(run, row) for name, row in rows.items()}, options)
    return Table(f"{NUM_IT} steps of the finder: {task.title}", "ms", found, REFERENCE, [Goal(LEARNER, 1.05)])


# ---- memory and files, in a process of its own: its peak is its own


def resident(key):
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def peak(function):
    """Bytes that the process holds at most during a call, beyond what it held before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def costs(width):
    """{"copies": of model and optimizer that lr_find holds beyond what as many steps of a fit do, "files": opened}."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    learn = Learner(model, (batches_of(width), None), nn.CrossEntropyLoss(), device="cpu", verbose=False)
    learn.fit(1e-4)  # the optimizer has its state, which is to be kept as well
    state = sum(t.numel() * t.element_size() for p in model.parameters()
                for t in (p, *(v for v in learn.opt.state[p].values() if v.ndim)))
    fitted = peak(lambda: learn.fit(1e-4))
    opened, watching = [], True

    def watch(event, args):
        if watching and event == "open" and isinstance(args[2], int) and args[2] & WRITING:
            opened.append(str(args[0]))

    sys.addaudithook(watch)
    found = peak(lambda: learn.lr_find(1e-7, 1e-4, 8, stop_div=False))
    watching = False
    return {"copies": (found - fitted) / state, "files": [path for path in opened if "clear_refs" not in path]}


def batches_of(width):
    return replace(MLP, shape=(width,), batch_size=2).batches(8)


def memory(options: Options) -> Table:
    width = 1000 if options.quick else 3000
    values = []
    for _ in range(min(3, options.rounds)):
        done = subprocess.run([sys.executable, __file__, str(width)], capture_output=True, text=True, check=True)
        values.append(json.loads(done.stdout))
    files = [len(value["files"]) for value in values]
    return Table("memory and files of the finder: copies of model and AdamW's state, beyond what a fit takes", "count",
                 [Row("copies of the state", [value["copies"] for value in values]), Row("files written", files)],
                 goals=[Goal("copies of the state", 2.0, "value"), Goal("files written", 0.0, "value")])


def suite(options: Options) -> Iterator[Table]:
    for task in [MLP] if options.quick else [MLP, replace(DEEP_MLP, n_groups=1), CONVNET]:
        yield measure(task, options)
    if Path("/proc/self/clear_refs").exists() and options.device.type == "cpu":
        yield memory(options)
    else:
        yield Table("memory and files of the finder", "count", [], notes=["not measured: needs Linux, and the CPU"])


if __name__ == "__main__":
    print(json.dumps(costs(int(sys.argv[1]))))
