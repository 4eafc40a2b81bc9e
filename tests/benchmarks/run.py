"""Microseconds per step, beside the loop one would write by hand.

Every row does the same updates on the same batches from the same weights; rounds of all rows are interleaved in one
process, so that a machine that slows down slows them all; figures are medians over the rounds, ratios are paired
round by round. First it is checked that the Learner makes the same updates. Usage: `make bench`, or
`python tests/benchmarks/run.py --help`.
"""
import argparse
import contextlib
import copy
import io
import platform
import statistics
import time

import torch
from torch import nn

import minifast

MAX_LR = 0.01


class Screen(io.StringIO):
    """A terminal that keeps nothing: what the progress bar draws is drawn, and forgotten."""

    def isatty(self):
        return True

    def write(self, text):
        return len(text)


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))


def by_hand(model, batches, device, **options):
    """The reference: torch's optimizer and OneCycleLR, as in torch's own documentation."""
    loss_func = nn.CrossEntropyLoss()
    opt = torch.optim.AdamW(model.parameters(), lr=MAX_LR, **options)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, MAX_LR, total_steps=len(batches))
    model.train()
    for x, y in batches:
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        sched.step()


def by_hand_fused(model, batches, device):
    """The same loop by someone who knows the tricks: a fused optimizer and a plain float in place of OneCycleLR."""
    loss_func = nn.CrossEntropyLoss()
    opt = torch.optim.AdamW(model.parameters(), lr=MAX_LR, fused=True)
    model.train()
    for i, (x, y) in enumerate(batches):
        opt.param_groups[0]["lr"] = MAX_LR * minifast.schedules.one_cycle(i, len(batches))
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()


def with_learner(model, batches, device, **options):
    """A Learner as a user gets it, with Recorder, one-cycle and, unless verbose=False, the bar."""
    learn = minifast.Learner(model, minifast.DataLoaders(batches), nn.CrossEntropyLoss(), device=device, **options)
    with contextlib.redirect_stdout(Screen()):
        learn.fit_one_cycle(1, MAX_LR)


def check_same_updates(batches, device):
    """A Learner ends where torch's plain loop ends, given the same schedule of learning rate and momentum.

    Fused and for-loop kernels round differently: the weights agree to 1e-4, not to the last bit.
    """
    mine, theirs = mlp().to(device), mlp().to(device)
    theirs.load_state_dict(mine.state_dict())
    with_learner(mine, batches, device, wd_norm_bias=True, verbose=False)
    opt, plan = torch.optim.AdamW(theirs.parameters(), foreach=False), minifast.OneCycle(MAX_LR).values(len(batches))
    for (x, y), lr, momentum in zip(batches, plan["lr"], plan["momentum"], strict=True):
        opt.param_groups[0].update(lr=lr, betas=(momentum, 0.999))
        nn.CrossEntropyLoss()(theirs(x), y).backward()
        opt.step()
        opt.zero_grad()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


ROWS = {
    "by hand: AdamW + OneCycleLR": by_hand,
    "by hand: fused, float schedule": by_hand_fused,
    "Learner, default": with_learner,
    "Learner, silent": lambda *args: with_learner(*args, verbose=False),
}


def measure(make_model, batches, device, rounds):
    """Seconds per step of each row: {row: [one per round]}."""
    start = make_model().to(device)
    seconds = {name: [] for name in ROWS}
    for i in range(rounds + 1):
        for name, row in ROWS.items():
            model = copy.deepcopy(start)
            synchronize(device)
            began = time.perf_counter()
            row(model, batches, device)
            synchronize(device)
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / len(batches))
    return seconds


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(seconds):
    reference = seconds["by hand: AdamW + OneCycleLR"]
    rows = []
    for name, times in seconds.items():
        over = [(mine - theirs) * 1e6 for mine, theirs in zip(times, reference, strict=True)]
        ratios = [mine / theirs for mine, theirs in zip(times, reference, strict=True)]
        rows.append([name, f"{statistics.median(times) * 1e6:.1f}", f"{statistics.median(over):+.1f}",
                     f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"])
    return minifast.tables.table(["", "us per step", "over by hand", "ratio", "spread"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = [(torch.randn(64, 16, device=device), torch.randint(0, 2, (64,), device=device))
               for _ in range(args.steps)]
    check_same_updates(batches[:200], device)
    print(f"MLP 16-32-2, batch 64, AdamW, one-cycle; {args.steps} steps, medians of {args.rounds} rounds; torch "
          f"{torch.__version__}, {device}, one thread, Python {platform.python_version()}")
    print(table(measure(mlp, batches, device, args.rounds)))


if __name__ == "__main__":
    main()
