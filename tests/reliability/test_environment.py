"""What differs from one machine to the next and must not matter: flags of Python, hash seeds, time zones, languages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FIT = """
import torch
from helpers import learner, bits, trained, batches
from torch import nn
from minifast import ActivationStats, EMA, GradientClip, accuracy
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
learn = learner(batches(5), {"b": batches(2), "a": batches(2)}, model=model, verbose=True, metrics=[nn.L1Loss()],
                splitter={"head": "2.*", "body": "0.*"}, callbacks=[EMA(0.9), GradientClip(1.0), ActivationStats()])
learn.lr_find()
learn.fit_one_cycle(2, slice(1e-3, 1e-2))
rows = [{name: value for name, value in row.items() if name != "time"} for row in learn.recorder.epochs]
print("digest", trained(learn), bits(learn.recorder.losses), bits(rows), list(rows[0]))
"""


def run(*arguments, **environment):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.nightly
@pytest.mark.case("E7")
def test_a_fit_under_other_hash_seeds_time_zones_and_languages():
    """And warnings are errors."""
    digests = [run("-W", "error", "-c", FIT, PYTHONHASHSEED=seed, TZ=zone, LC_ALL=language).partition("digest")[2]
               for seed, zone, language in (("0", "UTC", "C"), ("4242", "Asia/Kathmandu", "de_DE.UTF-8"))]
    assert digests[0] == digests[1] != ""


REFUSALS = """
import sys
from test_arguments import NAMES, make, COUNTS, RATES, NOT_A_COUNT, NOT_A_RATE
assert False, "asserts are removed"
calls = [(call.format(value), name) for calls, values in ((COUNTS, NOT_A_COUNT), (RATES, NOT_A_RATE))
         for call, name in calls for value, _ in values]
learn = make()
for call, name in calls:
    try:
        eval(call, NAMES | {"learn": learn})
    except ValueError as error:
        if name not in str(error):
            sys.exit(f"{call}: {error}")
    else:
        sys.exit(f"{call} is taken")
print(len(calls))
"""


@pytest.mark.nightly
@pytest.mark.case("E6")
def test_arguments_are_refused_where_asserts_are_removed():
    assert int(run("-O", "-c", REFUSALS)) > 250
