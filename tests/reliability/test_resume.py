"""A fit that is killed and goes on equals one that was not, bit for bit: schedules, epoch ends, windows, several fits."""
import pytest
import torch
from resuming import data, every_step, kill, learner, same, uninterrupted

from minifast import OneCycle

pytestmark = pytest.mark.usefixtures("quick_disk")

FITS = {
    "constant": lambda learn, cbs, resume: learn.fit(0.01, 4, callbacks=cbs, resume=resume),
    "cosine": lambda learn, cbs, resume: learn.fit(slice(0.001, 0.01), 2, cycle_len=2, callbacks=cbs, resume=resume),
    "use_clr": lambda learn, cbs, resume: learn.fit(0.01, 2, cycle_len=2, use_clr=(10, 4, 0.95, 0.85), callbacks=cbs,
                                                    resume=resume),
    "use_clr_beta": lambda learn, cbs, resume: learn.fit(0.01, 1, cycle_len=4, use_clr_beta=(10, 15, 0.95, 0.85),
                                                         callbacks=cbs, resume=resume),
    "one_cycle": lambda learn, cbs, resume: learn.fit_one_cycle(4, slice(0.001, 0.02), callbacks=cbs, resume=resume),
    "flat_cos": lambda learn, cbs, resume: learn.fit_flat_cos(4, 0.01, callbacks=cbs, resume=resume),
    "sgdr": lambda learn, cbs, resume: learn.fit_sgdr(2, 1, 0.01, cycle_mult=3, callbacks=cbs, resume=resume),
}  # fmt: skip
STEPS = 24


@pytest.mark.case("S1", "S13")
@pytest.mark.parametrize("name", FITS)
def test_from_every_step_it_ends_with_the_same_bits(tmp_path, name):
    fit = FITS[name]
    reference = uninterrupted(fit, learner())
    fit(learner(), [every_step(tmp_path / "run")], "auto")
    files = sorted((tmp_path / "run" / "fit-1").glob("step-*.ckpt"))
    assert len(files) == STEPS
    for done, file in enumerate(files[:-1], 1):
        learn = learner()
        fit(learn, [], file)
        assert same(learn, reference) == STEPS - done


@pytest.mark.case("S1")
@pytest.mark.parametrize("name", FITS)
def test_killed_and_run_again_three_times(tmp_path, name):
    fit = FITS[name]
    reference = uninterrupted(fit, learner())
    for n in (4, 9, 5):
        kill(fit, learner(), tmp_path, "before_batch", n)
    learn = learner()
    fit(learn, [every_step(tmp_path)], "auto")
    assert same(learn, reference) == STEPS - (3 + 8 + 4)
