"""Every public callback goes on where the fit was killed, alone and in pairs, through checkpoints and `resume=`."""
import itertools

import pytest
import torch
from helpers import bits, rngs, tiers, trained
from resuming import Kill, Killed, every_step
from test_contract import MAKE, NAMES, PATH, learner, timeless

from minifast import CSVLogger
from minifast.loggers.base import Logger

pytestmark = pytest.mark.usefixtures("quick_disk")

STEPS = 12
# Not by this test: no two fits of the one have equal bits, and the other is what saves.
ALONE = [name for name in MAKE if name not in ("TimeLimit", "Checkpoint")]
STATEFUL = ("EMA", "SWA", "MixedPrecision", "GradientClip", "Unfreeze", "SaveBest", "EarlyStopping", "MixUp",
            "ReduceLROnPlateau", "SnapshotEnsemble", "ProgressiveResizing", "AutoMicrobatch", "OneCycle")  # fmt: skip


@pytest.fixture
def make(tmp_path, wandb):
    """`make("EMA")`: a new callback, the n-th with files of its own."""
    counter = itertools.count()
    (tmp_path / "own").mkdir()
    return lambda name: eval(MAKE[name].replace(PATH, str(tmp_path / "own" / str(next(counter)))), NAMES)


def left(learn, own):
    """All that the fit leaves, but for times."""
    record = learn.recorder
    return trained(learn) | rngs() | {
        "trains": [p.requires_grad for p in learn.model.parameters()],
        "steps": bits([record.lr_groups, record.moms, record.losses, record.epochs_without_time]),
        "columns": bits({name: record.column(name) for name in record.newest.columns}),
        "callbacks": bits([timeless(cb.state_dict()) | ({"_id": 0} if hasattr(cb, "_id") else {}) for cb in own])}


def fit(make, names, path=None, resume=False, others=(), **options):
    """A new learner's fit of 12 updates; gives what it leaves."""
    torch.manual_seed(0)
    learn, own = learner(seed=1), [make(name) for name in names]
    own_saver = [every_step(path, **options)] if path is not None else []
    learn.fit(0.02, 3, callbacks=[*own, *own_saver, *others], resume=resume)
    learn.recorder.epochs_without_time = [timeless(row) for row in learn.recorder.epochs]
    return left(learn, own)


def check_every_way(make, names, tmp_path):
    """From several steps, from epoch ends, after the end, and killed twice: always what an uninterrupted fit leaves."""
    expected = fit(make, names)
    for run, options, wanted in (("steps", {}, (1, 4, 6, 9, 12)), ("epochs", {"every_seconds": 1e-9}, (4, 8))):
        assert fit(make, names, tmp_path / run, "auto", **options) == expected, "a checkpoint changed something"
        for file in sorted((tmp_path / run / "fit-1").glob("step-*.ckpt")):
            if int(file.stem[5:]) in wanted:
                assert fit(make, names, resume=file) == expected, f"{run}: from {file.name}"
    assert fit(make, names, tmp_path / "steps", "auto") == expected, "restored after it had ended"
    with pytest.raises(Killed):
        fit(make, names, tmp_path / "killed", "auto", others=[Kill("before_batch", 3)])
    with pytest.raises(Killed):
        fit(make, names, tmp_path / "killed", "auto", others=[Kill("before_valid_batch", 1)])
    assert fit(make, names, tmp_path / "killed", "auto") == expected, "killed twice"


@pytest.mark.case("S12", "S13", "N4")
@pytest.mark.parametrize("name", tiers(ALONE, quick=[
    "EMA", "SWA", "MixedPrecision", "Unfreeze", "SaveBest", "EarlyStopping", "ReduceLROnPlateau", "OneCycle"]))
def test_it_goes_on(make, tmp_path, name):
    check_every_way(make, [name], tmp_path)


def pairs():
    for pair in itertools.combinations(STATEFUL, 2):
        first, second = (eval(MAKE[name], NAMES) for name in pair)
        if not set(first.owns) & set(second.owns):
            yield pair


@pytest.mark.nightly
@pytest.mark.case("S13")
@pytest.mark.parametrize("pair", list(pairs()), ids="-".join)
def test_two_go_on_together(make, tmp_path, pair):
    expected = fit(make, pair)
    fit(make, pair, tmp_path / "run", "auto")
    for n in (3, 8):
        assert fit(make, pair, resume=tmp_path / "run" / "fit-1" / f"step-{n:08d}.ckpt") == expected
    assert fit(make, pair, tmp_path / "run", "auto") == expected


def test_the_epochs_of_a_run_that_was_killed_are_in_its_csv_once(make, tmp_path):
    def rows(path):
        return [line.split(",")[:-1] for line in path.read_text().splitlines()]

    def log(name):
        return [CSVLogger(tmp_path / name)]

    fit(make, [], others=log("expected.csv"))
    for n in (3, 6):
        with pytest.raises(Killed):
            fit(make, [], tmp_path / "run", "auto", others=[*log("run.csv"), Kill("before_batch", n)])
    fit(make, [], tmp_path / "run", "auto", others=log("run.csv"))
    assert rows(tmp_path / "run.csv") == rows(tmp_path / "expected.csv")
    fit(make, [], tmp_path / "run", "auto", others=log("run.csv"))
    assert rows(tmp_path / "run.csv") == rows(tmp_path / "expected.csv"), "restored after it had ended"


class Steps(Logger):
    """A logger that notes the steps it writes."""

    def __init__(self):
        self.steps = []

    def write_steps(self, first, columns):
        self.steps += range(first, first + len(columns["loss"]))


def test_a_logger_goes_on_behind_what_is_saved(make, tmp_path):
    with pytest.raises(Killed):
        fit(make, [], tmp_path, "auto", others=[Steps(), Kill("before_batch", 7)])
    logger = Steps()
    fit(make, [], tmp_path, "auto", others=[logger])
    assert logger.steps == list(range(4, 12))  # steps 4 and 5 had not been written when the checkpoint was
