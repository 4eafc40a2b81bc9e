"""What a program waits for before it trains: `import minifast`, and the first step. Each value is of a new process."""
import subprocess
import sys
from collections.abc import Iterator

from harness import Goal, Options, Table, interleave

CLOCK = "import time; began = time.perf_counter()"
TOLD = "print(time.perf_counter() - began)"
SETUP = """
import torch, minifast
from torch import nn
torch.set_num_threads(1)
x, y = torch.randn(64, 16), torch.randint(0, 2, (64,))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
"""
BY_HAND = """
opt = torch.optim.AdamW(model.parameters(), lr=0.01{options})
nn.CrossEntropyLoss()(model(x), y).backward()
opt.step()
opt.zero_grad()
"""
LEARNER = """
learn = minifast.Learner(model, ([(x, y)], None), nn.CrossEntropyLoss(), device="cpu", verbose=False)
learn.fit(0.01, 1)
"""
IMPORTS = {"import torch": f"{CLOCK}; import torch; {TOLD}",
           "import minifast, after it": f"import torch; {CLOCK}; import minifast; {TOLD}",
           "import minifast, alone": f"{CLOCK}; import minifast; {TOLD}"}
REFERENCE = "by hand: torch's defaults"
STEPS = {REFERENCE: BY_HAND.format(options=""), "Learner and its fit": LEARNER,
         "by hand: fused": BY_HAND.format(options=", fused=True")}


def milliseconds(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return 1e3 * float(done.stdout.split()[-1])


def chosen(programs, options):
    """All of them; of a quick run the first two, which takes long enough."""
    return list(programs.items())[:2 if options.quick else None]


def suite(options: Options) -> Iterator[Table]:
    rows = {name: lambda program=program: milliseconds(program) for name, program in chosen(IMPORTS, options)}
    yield Table("imports", "ms", interleave(rows, options),
                goals=[Goal("import minifast, after it", 30.0, "value")])
    rows = {name: lambda body=body: milliseconds(f"{SETUP}{CLOCK}\n{body}\n{TOLD}")
            for name, body in chosen(STEPS, options)}
    yield Table("the first step of a program, optimizer and Learner made", "ms", interleave(rows, options),
                REFERENCE)
