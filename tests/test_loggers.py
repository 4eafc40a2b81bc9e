"""Loggers: what they write while a fit goes on, what they cost, and what is left when something fails."""
import csv
import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import At, FakeRun, batches, learner, rngs, throw, trained
from torch import nn

from minifast import Callback, CancelEpoch, CancelFit, FitRecord
from minifast.loggers import CSVLogger, RunLog, TensorBoardLogger, WandbLogger, base
from minifast.record.runs import read_run

NEVER = 1e9  # seconds: only when an epoch or the fit ends


def mae(pred, target):
    return (pred - target).abs().mean()


def trainer(n=3, **options):
    return learner(batches(n), batches(1, seed=1), **{"metrics": [mae]} | options)


def groups(**options):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    return trainer(model=model, splitter={"body": "0.*", "head": "1.*"}, **options)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def records(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def kinds(path):
    return [record["kind"] for record in records(path)]


def text(rows):
    """Epoch rows as a CSV has them."""
    return [[str(value) for value in row.values()] for row in rows]


class Extra(Callback):
    """Adds a column to the epoch rows from epoch `first` on, and one to every `every`-th step."""

    def __init__(self, first=1, every=2):
        self.first, self.every = first, every

    def after_step(self, state):
        if state.step % self.every == 0:
            state.record.log("norm", torch.tensor(float(state.step)))

    def after_epoch(self, state):
        if state.epoch >= self.first:
            state.metrics["extra"] = 7.0


def state_of(learn):
    """The state of a fit that `learn` has done."""
    kept = []
    learn.fit(0.1, callbacks=[At("before_fit", kept.append)])
    return kept[0]


class ByHand:
    """Drives loggers through a fit that is resumed, event by event, with a record that is filled by hand."""

    def __init__(self, n_steps=0, n_epochs=0, learn=None):
        self.state = state_of(learner() if learn is None else learn)
        self.state.record = FitRecord(self.state.group_names)
        self.state.step = self.state.epoch = 0
        self.grow(n_steps, n_epochs)

    def grow(self, n_steps, n_epochs=0, loss=100.0):
        record = self.state.record
        for _ in range(n_steps):
            step = len(record)
            for column in record.lr_columns:
                column.append(step / 10)
            record.mom_column.append(0.9)
            record.loss_column.append(torch.tensor(loss + step))
            self.state.step += 1
        for _ in range(n_epochs):
            record.epochs.append({"epoch": len(record.epochs), "train_loss": 1.0 + len(record.epochs)})
            record.epoch_ends.append(len(record))
        return self

    def start(self, logger, saved=None):
        logger.before_fit(self.state)
        if saved is None:
            logger.before_epoch(self.state)
        else:
            logger.load_state_dict(saved)
        return self


# ---- the epochs as CSV


def test_csv_has_the_epoch_rows(tmp_path):
    learn = trainer()
    learn.fit(0.1, 3, callbacks=[CSVLogger(tmp_path / "new" / "epochs.csv")])
    header, *rows = rows_of(tmp_path / "new" / "epochs.csv")
    assert header == ["epoch", "train_loss", "valid_loss", "mae", "time"]
    assert rows == text(learn.recorder.epochs)
    assert os.listdir(tmp_path / "new") == ["epochs.csv"], "nothing temporary is left"


def test_csv_is_on_disk_as_each_epoch_ends(tmp_path):
    seen = []
    path = tmp_path / "epochs.csv"
    look = At("before_batch", lambda state: seen.append(len(rows_of(path))))
    trainer(1).fit(0.1, 3, callbacks=[CSVLogger(path), look])
    assert seen == [0, 2, 3]


@pytest.mark.parametrize("append", [False, True])
def test_csv_of_two_fits(tmp_path, append):
    learn, path = trainer(), tmp_path / "epochs.csv"
    logger = CSVLogger(path, append=append)
    for n_epochs in (2, 1):
        learn.fit(0.1, n_epochs, callbacks=[logger])
    first, second = learn.recorder.fits[0].epochs, learn.recorder.epochs
    assert rows_of(path)[1:] == text([*first, *second] if append else second)
    assert rows_of(path)[0] == list(second[0])


def test_csv_appends_to_a_file_with_a_torn_line(tmp_path):
    path = tmp_path / "epochs.csv"
    path.write_text("epoch,train_loss\n0,1.5\n1,0.")
    learn = learner()
    learn.fit(0.1, callbacks=[At("after_epoch", lambda state: state.metrics.pop("time")), CSVLogger(path, append=True)])
    assert rows_of(path) == [["epoch", "train_loss"], ["0", "1.5"], ["1", "0."],
                             ["0", str(learn.recorder.epochs[0]["train_loss"])]]


def test_a_column_that_appears_later_is_added_to_the_header(tmp_path):
    path = tmp_path / "epochs.csv"
    learn = learner()
    learn.fit(0.1, 3, callbacks=[Extra(first=1), CSVLogger(path)])
    header, *rows = rows_of(path)
    assert header == ["epoch", "train_loss", "time", "extra"]
    assert [row[3] for row in rows] == ["", "7.0", "7.0"]
    assert [row[:3] for row in rows] == [row[:3] for row in text(learn.recorder.epochs)]


def test_a_column_that_is_missing_in_an_epoch_is_empty(tmp_path):
    path = tmp_path / "epochs.csv"
    learn = trainer(2, callbacks=[At("before_batch", throw(CancelEpoch), 3)])
    learn.fit(0.1, 3, callbacks=[CSVLogger(path)])
    assert [[cell == "" for cell in row] for row in rows_of(path)[1:]] == [
        [False] * 5, [False, False, True, True, False], [False] * 5]


def test_csv_of_what_is_no_float(tmp_path):
    path = tmp_path / "epochs.csv"
    row = {"epoch": 0, "loss": float("nan"), "tensor": torch.tensor(0.5), "numpy": np.float32(2), "none": None,
           "text": 'a "b", c\nd'}
    by_hand, logger = ByHand(), CSVLogger(path)
    by_hand.start(logger)
    by_hand.state.record.epochs.append(row)
    by_hand.state.record.epoch_ends.append(0)
    logger.after_epoch(by_hand.state)
    assert rows_of(path) == [list(row), ["0", "nan", "0.5", "2.0", "", 'a "b", c\nd']]


def test_csv_keeps_a_link_a_link(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    learner().fit(0.1, callbacks=[CSVLogger(tmp_path / "link.csv")])
    assert (tmp_path / "link.csv").is_symlink()
    assert len(rows_of(tmp_path / "real.csv")) == 2


def test_an_epoch_that_another_callback_ends_the_fit_in_is_there(tmp_path):
    learn = trainer()
    loggers = [CSVLogger(tmp_path / "epochs.csv"), RunLog(tmp_path)]
    learn.fit(0.1, 3, callbacks=[*loggers, At("after_epoch", throw(CancelFit), 1)])
    assert rows_of(tmp_path / "epochs.csv")[1:] == text(learn.recorder.epochs)
    assert [row["epoch"] for row in read_run(tmp_path).epochs] == [0, 1]


@pytest.mark.parametrize("append", [False, True])
def test_csv_of_a_resumed_fit_goes_on_where_it_was_saved(tmp_path, append):
    path = tmp_path / "epochs.csv"
    path.write_text("epoch,train_loss\n9,0.5\n")
    logger = CSVLogger(path, append)
    by_hand = ByHand(2, 1).start(logger)
    logger.after_epoch(by_hand.state)
    saved = logger.state_dict()
    logger.after_epoch(by_hand.grow(2, 1).state)  # and then it is killed
    assert len(rows_of(path)) == 3 + append
    again, by_hand = CSVLogger(path, append), ByHand(2, 1)
    by_hand.start(again, saved)
    for _ in range(2):
        again.after_epoch(by_hand.grow(2, 1).state)
    earlier = [["9", "0.5"]] if append else []
    assert rows_of(path) == [["epoch", "train_loss"], *earlier, ["0", "1.0"], ["1", "2.0"], ["2", "3.0"]]


# ---- the record of a run


def test_the_record_holds_every_step_and_epoch(tmp_path):
    learn = groups()
    learn.fit_one_cycle(3, slice(1e-3, 1e-1), callbacks=[RunLog(tmp_path / "runs" / "a"), Extra()])
    run, recorder = read_run(tmp_path / "runs" / "a"), learn.recorder
    assert list(run.steps) == ["step", "lr_body", "lr_head", "momentum", "loss", "norm", "fit"]
    np.testing.assert_array_equal(run.steps["step"], range(9))
    np.testing.assert_array_equal(np.stack([run.steps["lr_body"], run.steps["lr_head"]], axis=1), recorder.lr_groups)
    np.testing.assert_array_equal(run.steps["momentum"], recorder.moms)
    np.testing.assert_array_equal(run.steps["loss"], recorder.losses)
    np.testing.assert_array_equal(run.steps["norm"], [0, np.nan, 2, np.nan, 4, np.nan, 6, np.nan, 8])
    assert run.epochs == [{**row, "fit": 0} for row in recorder.epochs]
    assert kinds(tmp_path / "runs" / "a" / "run.jsonl") == ["fit", *["steps", "epoch"] * 3, "end"]


def test_the_settings(tmp_path):
    learn = groups(callbacks=[CSVLogger(tmp_path / "e.csv")])
    log = RunLog(tmp_path)
    learn.freeze()
    learn.fit_one_cycle(2, slice(1e-3, 1e-1), callbacks=[log], accumulate=2)
    settings = read_run(tmp_path).settings
    schedule = "OneCycle(max_lr=None, div_factor=25.0, pct_start=0.3, final_div=None, moms=(0.95, 0.85))"
    assert settings["versions"].keys() == {"minifast", "torch", "python"}
    assert settings["versions"]["torch"] == str(torch.__version__)
    assert settings["model"] == {"class": "Sequential", "parameters": 21, "trainable": 5}
    assert settings["optimizer"]["class"] == "Spy"
    assert settings["optimizer"]["defaults"]["nesterov"] is False
    assert settings["lrs"] == pytest.approx([1e-3, 1e-1])
    expected = {"group_names": ["body", "head"], "n_epochs": 2, "n_steps": 4, "steps_per_epoch": 2, "accumulate": 2,
                "batch_size": None, "schedule": schedule, "device": "cpu", "step": 0}
    assert {key: settings[key] for key in expected} == expected
    assert {repr(log), repr(learn.callbacks[0]), schedule, "Metrics"} <= set(settings["callbacks"])
    assert not any("0x" in shown or "Recorder" in shown for shown in settings["callbacks"])


def test_the_batch_size_if_the_loader_has_one(tmp_path):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(6, 3), torch.ones(6, 1)), batch_size=3)
    learner(data).fit(0.1, callbacks=[RunLog(tmp_path)])
    assert read_run(tmp_path).settings["batch_size"] == 3


def test_steps_are_written_by_the_clock(tmp_path, monkeypatch):
    clock = itertools.count()  # a second each time that somebody looks
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    learner(batches(20)).fit(0.1, callbacks=[RunLog(tmp_path, every_seconds=3.5)])
    blocks = [len(record["columns"]["loss"]) for record in records(tmp_path / "run.jsonl") if record["kind"] == "steps"]
    assert blocks == [4] * 5
    assert kinds(tmp_path / "run.jsonl") == ["fit", *["steps"] * 5, "epoch", "end"]


@pytest.mark.parametrize("every_seconds", [0, NEVER])
@pytest.mark.parametrize("make", [RunLog, lambda path, s: CSVLogger(path / "e.csv")], ids=["RunLog", "CSVLogger"])
def test_a_logger_changes_nothing(tmp_path, every_seconds, make):
    results = []
    for callbacks in ([], [make(tmp_path, every_seconds)]):
        learn = trainer()
        torch.manual_seed(3)
        learn.fit_one_cycle(2, 0.1, callbacks=callbacks)
        results.append((trained(learn), rngs(), learn.recorder.losses.tolist()))
    assert results[0] == results[1]


def reads(monkeypatch, **options):
    """How often a fit of 2 epochs of 50 batches brings something over from the device."""
    count = 0

    def counting(name):
        real = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            nonlocal count
            count += 1
            return real(self, *args, **kwargs)
        return read

    learn = learner(batches(50), batches(1))
    with monkeypatch.context() as patch:
        for name in ("cpu", "item", "__float__", "__bool__", "numpy", "tolist"):
            patch.setattr(torch.Tensor, name, counting(name))
        learn.fit(0.1, 2, **options)
    return count


def test_a_logger_reads_nothing_in_a_step(tmp_path, monkeypatch):
    without = reads(monkeypatch)
    assert reads(monkeypatch, callbacks=[RunLog(tmp_path, NEVER), CSVLogger(tmp_path / "e.csv")]) == without
    assert reads(monkeypatch, callbacks=[RunLog(tmp_path, 0)]) >= without + 100, "the observer observes"


@pytest.mark.parametrize(("spoil", "ended"), [
    (None, "finished"), (At("before_batch", throw(CancelFit), 4), "stopped"),
    (At("before_batch", throw(KeyError("x")), 4), "stopped"),
    (At("before_batch", lambda state: os.kill(os.getpid(), signal.SIGINT), 3), "interrupted")],
    ids=["finished", "cancelled", "failed", "interrupted"])
def test_how_the_fit_ended(tmp_path, spoil, ended):
    learn = trainer()
    try:
        learn.fit(0.1, 2, callbacks=[RunLog(tmp_path, NEVER), *([spoil] if spoil else [])])
    except (KeyError, KeyboardInterrupt):
        assert ended != "finished"
    end = read_run(tmp_path).fits[0].end
    n_steps = len(learn.recorder.losses)
    assert (end["ended"], end["step"], end["epochs"]) == (ended, n_steps, 2 if ended == "finished" else 1)
    np.testing.assert_array_equal(read_run(tmp_path).steps["loss"], learn.recorder.losses)


def test_a_fit_that_is_refused_leaves_no_record_of_the_fit_before(tmp_path):
    learn = learner()
    learn.fit(0.1)
    late = At("before_fit", throw(ValueError("no")))
    late.order = 1000  # after the loggers
    with pytest.raises(ValueError, match="no"):
        learn.fit(0.1, callbacks=[RunLog(tmp_path), CSVLogger(tmp_path / "e.csv"), late])
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "e.csv").read_text() == ""
    learn.fit(0.1, callbacks=[RunLog(tmp_path)])
    assert len(read_run(tmp_path).fits) == 1


def test_further_fits_append_also_after_a_torn_line(tmp_path):
    learn, log = trainer(), RunLog(tmp_path)
    learn.fit(0.1, 1, callbacks=[log])
    with open(tmp_path / "run.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind":"steps","fit":"x","first":3,"colu')
    learn.fit(0.2, 2, callbacks=[log])
    run = read_run(tmp_path)
    assert run.skipped == 1
    assert [len(fit.epochs) for fit in run.fits] == [1, 2]
    np.testing.assert_array_equal(run.steps["lr"], [0.1] * 3 + [0.2] * 6)
    np.testing.assert_array_equal(run.fits[1].steps["loss"], learn.recorder.losses)


def test_a_resumed_fit_continues_its_own_record(tmp_path):
    log = RunLog(tmp_path, NEVER)
    by_hand = ByHand().start(log)
    log.after_epoch(by_hand.grow(4, 1).state)
    saved = log.state_dict()
    log.after_epoch(by_hand.grow(4, 1).state)  # after the state was saved; and then it is killed
    again, by_hand = RunLog(tmp_path, NEVER), ByHand(6, 1)  # saved in the middle of epoch 1
    by_hand.start(again, saved)
    for column in by_hand.state.record.lr_columns:
        column[5] = 55.0  # to see which one is kept
    by_hand.grow(6, 2)
    again.after_epoch(by_hand.state)
    again.after_fit(by_hand.state)
    run = read_run(tmp_path)
    assert len(run.fits) == 1
    np.testing.assert_array_equal(run.steps["step"], range(12))
    np.testing.assert_array_equal(run.steps["loss"], np.arange(12) + 100)
    np.testing.assert_array_equal(run.steps["lr"], [0, 0.1, 0.2, 0.3, 0.4, 55, 0.6, 0.7, 0.8, 0.9, 1, 1.1])
    assert [row["epoch"] for row in run.epochs] == [0, 1, 2]
    assert [start["step"] for start in run.fits[0].starts] == [0, 4]
    assert kinds(tmp_path / "run.jsonl") == ["fit", "steps", "epoch", "steps", "epoch", "fit", "steps", "epoch",
                                             "epoch", "end"]


@pytest.mark.slow
def test_what_a_kill_leaves_can_be_read(tmp_path):
    program = """
        import os, signal, sys
        import torch
        from torch import nn
        from minifast import Callback, Learner
        from minifast.loggers import CSVLogger, RunLog

        class Kill(Callback):
            def before_batch(self, state):
                if state.step == 7:
                    os.kill(os.getpid(), signal.SIGKILL)

        data = [(torch.ones(4, 3), torch.ones(4, 1))] * 5
        learn = Learner(nn.Linear(3, 1), (data, None), nn.MSELoss(), verbose=False)
        learn.fit(0.1, 3, callbacks=[RunLog(sys.argv[1], every_seconds=0), CSVLogger(sys.argv[1] + "/e.csv"), Kill()])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    run = read_run(tmp_path)
    assert (len(run.steps["loss"]), len(run.epochs), run.fits[0].end, run.skipped) == (7, 1, None, 0)
    assert np.isfinite(run.steps["loss"]).all()
    assert len(rows_of(tmp_path / "e.csv")) == 2


def test_what_a_sandbox_did_stays_written(tmp_path):
    log = RunLog(tmp_path)
    learn = trainer(callbacks=[log])
    with learn.sandbox():
        learn.fit(0.1)
    learn.fit(0.2)
    assert [fit.steps["lr"].tolist() for fit in read_run(tmp_path).fits] == [[0.1] * 3, [0.2] * 3]


# ---- what cannot be written


@pytest.mark.parametrize("make", [RunLog, CSVLogger])
def test_a_path_that_cannot_be_written_is_refused_before_the_fit(tmp_path, make):
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "a" / "log.jsonl"
    learn = learner()
    with pytest.raises(OSError, match=rf"{make.__name__} cannot write to '{path}': Not a directory\. Pass a path"):
        learn.fit(0.1, callbacks=[make(path)])
    assert len(learn.recorder.losses) == 0


def lose(folder):
    """Replace a folder by a file: no file in it can be written any more."""
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)
    folder.write_text("")
    return kept


def give_back(folder, kept):
    folder.unlink()
    folder.mkdir()
    for name, content in kept.items():
        (folder / name).write_bytes(content)


def test_an_error_in_the_middle_is_said_once_and_made_up_for(tmp_path, caplog):
    folder, kept = tmp_path / "a", {}
    learn = trainer()
    loggers = [RunLog(folder, 0), CSVLogger(folder / "e.csv")]
    spoil = At("before_batch", lambda state: kept.update(lose(folder)), 4)
    repair = At("before_batch", lambda state: give_back(folder, kept), 10)
    with caplog.at_level(logging.WARNING, logger="minifast"):
        learn.fit(0.1, 5, callbacks=[*loggers, spoil, repair])
    assert [record.getMessage() for record in caplog.records] == [
        f"RunLog cannot write to {folder / 'run.jsonl'} (Not a directory): training goes on, and what is missing is "
        "tried again",
        f"CSVLogger cannot write to {folder / 'e.csv'} (Not a directory): training goes on, and what is missing is "
        "tried again"]
    run = read_run(folder)
    np.testing.assert_array_equal(run.steps["loss"], learn.recorder.losses)
    assert [row["epoch"] for row in run.epochs] == list(range(5))
    assert rows_of(folder / "e.csv")[1:] == text(learn.recorder.epochs)
    assert kinds(folder / "run.jsonl")[0] == "fit"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(tmp_path, caplog):
    path = tmp_path / "run.jsonl"
    full = At("before_batch", lambda state: (path.rename(tmp_path / "kept.jsonl"), path.symlink_to("/dev/full")), 4)
    learn = trainer()
    learn.fit(0.1, 3, callbacks=[RunLog(tmp_path), full])
    assert [record.getMessage() for record in caplog.records] == [
        f"RunLog cannot write to {path} (No space left on device): training goes on, and what is missing is tried "
        "again"]
    assert len(learn.recorder.losses) == 9
    run = read_run(tmp_path / "kept.jsonl")
    assert (len(run.steps["loss"]), len(run.epochs), run.fits[0].end) == (3, 1, None)


def test_half_a_line_is_made_up_for(tmp_path, monkeypatch, caplog):
    """A disk that takes only part of a write: the torn line is left behind, and the whole one follows."""
    import builtins
    real, count = open, itertools.count()

    class Short:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[: len(data) // 2] if data and next(count) in (1, 5) else data)

    def opened(path, mode="r", *args, **options):
        file = real(path, mode, *args, **options)
        return Short(file) if mode == "a+b" and str(path).startswith(str(tmp_path)) else file

    learn = trainer()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        learn.fit(0.1, 4, callbacks=[RunLog(tmp_path, NEVER)])
    run = read_run(tmp_path)
    assert run.skipped == 2
    np.testing.assert_array_equal(run.steps["loss"], learn.recorder.losses)
    assert [row["epoch"] for row in run.epochs] == [0, 1, 2, 3]
    assert len(caplog.records) == 1


def test_half_a_csv_line_is_made_up_for(tmp_path, monkeypatch, caplog):
    from minifast.loggers import targets as files
    path, real, calls = tmp_path / "e.csv", files._append, []

    def append(file, lines):
        calls.append(lines)
        if len(calls) == 3:
            real(file, lines[:4])
            raise OSError(28, "No space left on device")
        real(file, lines)

    monkeypatch.setattr(files, "_append", append)
    learn = trainer()
    learn.fit(0.1, 4, callbacks=[CSVLogger(path)])
    assert rows_of(path)[1:] == text(learn.recorder.epochs)
    assert len(caplog.records) == 1


# ---- all of them


EVERY = [lambda path: CSVLogger(path / "e.csv"), lambda path: RunLog(path, 0.5),
         lambda path: TensorBoardLogger(path, 2), lambda path: WandbLogger("p", "n", {"a": 1}, "id", 3)]


@pytest.mark.parametrize("make", EVERY)
def test_the_repr_rebuilds_it(tmp_path, make):
    logger = make(tmp_path)
    again = eval(repr(logger))
    assert repr(again) == repr(logger)
    assert type(again) is type(logger)
    assert again.every_seconds == logger.every_seconds


def test_they_are_not_made_for_the_finder(tmp_path):
    learn = learner(callbacks=[RunLog(tmp_path), CSVLogger(tmp_path / "e.csv"), TensorBoardLogger(tmp_path),
                               WandbLogger()])
    learn.lr_find(num_it=3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: CSVLogger(3), TypeError, r"path must be a path, got 3 \(int\)"),
    (lambda: CSVLogger("a.csv", append=1), TypeError, r"append must be True or False, got 1 \(int\)"),
    (lambda: RunLog(""), ValueError, "path must be a path, got an empty one"),
    (lambda: RunLog("a", -1), ValueError, r"every_seconds must be a finite number >= 0, got -1 \(int\)"),
    (lambda: TensorBoardLogger(None), TypeError, r"log_dir must be a path, got None \(NoneType\)"),
    (lambda: TensorBoardLogger("a", "1"), ValueError, r"every_seconds must be a finite number >= 0, got '1' \(str\)"),
    (lambda: WandbLogger(project=3), TypeError, "project must be text or None, got 3"),
    (lambda: WandbLogger(config=[1]), TypeError, r"config must be a dict or None, got \[1\]. Pass e\.g\. config="),
    (lambda: WandbLogger(every_seconds=math.nan), ValueError, "every_seconds must be a finite number >= 0, got nan"),
])
def test_wrong_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("logger", "module", "extra"), [
    (TensorBoardLogger("a"), "torch.utils.tensorboard", "tensorboard"), (WandbLogger(), "wandb", "wandb")])
def test_without_the_extra(monkeypatch, logger, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf"{type(logger).__name__} needs the package {extra} \(.*\). Install it: "
                                          rf"pip install 'minifast\[{extra}\]'"):
        learner().fit(0.1, callbacks=[logger])


# ---- TensorBoard


def scalars(path):
    """tag -> [(step, value), ...], as TensorBoard itself reads them, and its texts."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(path), size_guidance={accumulator.SCALARS: 0, accumulator.TENSORS: 0})
    events.Reload()
    tags = events.Tags()
    return ({tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]},
            [events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]])


@pytest.mark.slow
def test_tensorboard_has_every_step_and_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    learn, log = groups(), TensorBoardLogger(tmp_path, NEVER)
    learn.fit_one_cycle(2, slice(1e-3, 1e-1), callbacks=[log, Extra(every=4)])
    drawn, (text,) = scalars(tmp_path)
    assert drawn.keys() == {"step/lr_body", "step/lr_head", "step/momentum", "step/loss", "step/norm",
                            "epoch/train_loss", "epoch/valid_loss", "epoch/mae", "epoch/time", "epoch/extra"}
    recorder = learn.recorder
    assert [step for step, _ in drawn["step/loss"]] == list(range(6))
    for tag, column in [("lr_body", recorder.lr_groups[:, 0]), ("momentum", recorder.moms), ("loss", recorder.losses)]:
        np.testing.assert_array_equal([value for _, value in drawn[f"step/{tag}"]], np.float32(column))
    assert drawn["step/norm"] == [(0, 0.0), (4, 4.0)], "nan means that nobody logged it"
    assert drawn["epoch/valid_loss"] == [(2, np.float32(recorder.epochs[0]["valid_loss"])),
                                         (5, np.float32(recorder.epochs[1]["valid_loss"]))]
    assert drawn["epoch/extra"] == [(5, 7.0)]
    assert '"n_steps": 6' in text
    assert "OneCycle(" in text


@pytest.mark.slow
def test_tensorboard_draws_a_loss_that_is_nan_and_no_momentum_where_there_is_none(tmp_path):
    pytest.importorskip("tensorboard")
    by_hand, log = ByHand(), TensorBoardLogger(tmp_path, NEVER)
    by_hand.start(log).grow(1).grow(1, loss=math.nan)
    by_hand.state.record.mom_column[1] = math.nan
    log.after_fit(by_hand.state)
    drawn, _ = scalars(tmp_path)
    assert [step for step, _ in drawn["step/loss"]] == [0, 1]
    assert math.isnan(drawn["step/loss"][1][1])
    assert [step for step, _ in drawn["step/momentum"]] == [0]


@pytest.mark.slow
def test_a_second_fit_continues_the_curves_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    learn, log = trainer(), TensorBoardLogger(tmp_path, 0)
    learn.fit(0.1, 1, callbacks=[log])
    learn.fit(0.2, 2, callbacks=[log])
    drawn, _ = scalars(tmp_path)
    assert drawn["step/lr"] == [(step, np.float32(0.1 if step < 3 else 0.2)) for step in range(9)]
    assert [step for step, _ in drawn["epoch/mae"]] == [2, 5, 8]
    learn.fit(0.3, 1, callbacks=[TensorBoardLogger(tmp_path)])
    assert scalars(tmp_path)[0]["step/lr"] == [(step, np.float32(0.3)) for step in range(3)], "a new logger replaces"


@pytest.mark.slow
def test_tensorboard_of_a_resumed_fit(tmp_path):
    pytest.importorskip("tensorboard")
    log = TensorBoardLogger(tmp_path, NEVER)
    by_hand = ByHand().start(log)
    log.after_epoch(by_hand.grow(4, 1).state)
    saved = log.state_dict()
    log.after_epoch(by_hand.grow(4, 1).state)
    log.after_fit(by_hand.state)  # so that all of it is in the file, as after a late kill
    again, by_hand = TensorBoardLogger(tmp_path, NEVER), ByHand(6, 1)
    by_hand.start(again, saved)
    again.after_epoch(by_hand.grow(6, 2).state)
    again.after_fit(by_hand.state)
    drawn, _ = scalars(tmp_path)
    assert drawn["step/loss"] == [(step, 100.0 + step) for step in range(12)]
    assert drawn["epoch/train_loss"] == [(3, 1.0), (11, 2.0), (11, 3.0)]


@pytest.mark.slow
def test_a_log_dir_that_cannot_be_written(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=rf"TensorBoardLogger cannot write to '{tmp_path / 'file'}'.*Pass a path"):
        learner().fit(0.1, callbacks=[TensorBoardLogger(tmp_path / "file")])


# ---- Weights & Biases


def test_wandb_gets_every_step_and_epoch(wandb):
    learn = trainer()
    learn.fit(0.1, 2, callbacks=[WandbLogger("digits", name="first", config={"size": 32}), Extra(every=100)])
    run, = wandb.runs
    recorder = learn.recorder
    assert run.finished == 1
    assert {key: run.options[key] for key in ("project", "name", "id", "resume")} == {
        "project": "digits", "name": "first", "id": None, "resume": None}
    assert run.options["config"]["size"] == 32
    assert run.options["config"]["n_steps"] == 6
    assert json.loads(json.dumps(run.options["config"])) == run.options["config"]
    steps = [(step, values) for step, values in run.logged if "step/loss" in values]
    assert steps == [(i, {"step/lr": 0.1, "step/momentum": 0.0, "step/loss": recorder.losses[i],
                          **({"step/norm": 0.0} if i == 0 else {})}) for i in range(6)]
    assert [(step, values) for step, values in run.logged if "epoch" in values] == [
        (end - 1, {"epoch": row["epoch"], **{f"epoch/{name}": value for name, value in row.items() if name != "epoch"}})
        for end, row in zip((3, 6), recorder.epochs, strict=True)]


def test_each_fit_is_a_run_of_wandb(wandb):
    learn, log = trainer(), WandbLogger(every_seconds=0)
    for _ in range(2):
        learn.fit(0.1, callbacks=[log])
    assert [run.logged[0][0] for run in wandb.runs] == [0, 0]
    assert [run.finished for run in wandb.runs] == [1, 1]


@pytest.mark.parametrize("is_active", [True, False])
def test_fits_of_one_wandb_run_do_not_go_back_in_time(wandb, is_active):
    wandb.run = FakeRun() if is_active else None
    learn, log = trainer(), WandbLogger(id=None if is_active else "abc")
    for _ in range(2):
        learn.fit(0.1, callbacks=[log])
    if is_active:
        assert (wandb.runs, wandb.run.finished) == ([], 0)
        assert sorted({step for step, _ in wandb.run.logged}) == list(range(6))
    else:
        assert [run.options["resume"] for run in wandb.runs] == ["allow", "allow"]
        assert [{step for step, _ in run.logged} for run in wandb.runs] == [{0, 1, 2}, {3, 4, 5}]


def test_a_resumed_fit_goes_on_in_wandb(wandb):
    log = WandbLogger(id="abc", every_seconds=NEVER)
    by_hand = ByHand().start(log)
    log.after_epoch(by_hand.grow(4, 1).state)
    again, by_hand_again = WandbLogger(id="abc", every_seconds=NEVER), ByHand(6, 1)
    by_hand_again.start(again, log.state_dict())
    again.after_fit(by_hand_again.state)
    assert [step for step, _ in wandb.runs[1].logged] == [4, 5]
    assert wandb.runs[1].finished == 1


def test_after_a_sandbox_wandb_does_not_go_back_in_time(wandb):
    wandb.run = FakeRun()
    learn = trainer(callbacks=[WandbLogger()])
    with learn.sandbox():
        learn.fit(0.1)
    learn.fit(0.1)
    assert [step for step, values in wandb.run.logged if "step/lr" in values] == list(range(6))


def test_a_second_fit_that_is_resumed_keeps_its_place_in_wandb(wandb):
    learn, log = trainer(), WandbLogger(id="abc", every_seconds=NEVER)
    learn.fit(0.1, callbacks=[log])
    by_hand = ByHand().start(log)
    log.after_epoch(by_hand.grow(4, 1).state)
    again, by_hand = WandbLogger(id="abc", every_seconds=NEVER), ByHand(6, 1)
    by_hand.start(again, log.state_dict())
    again.after_fit(by_hand.state)
    assert [step for step, _ in wandb.runs[-1].logged] == [7, 8]


def test_a_wandb_run_is_finished_when_the_fit_fails(wandb):
    learn = trainer()
    with pytest.raises(KeyError):
        learn.fit(0.1, callbacks=[WandbLogger(), At("before_batch", throw(KeyError("x")), 2)])
    run, = wandb.runs
    assert run.finished == 1
    assert [step for step, _ in run.logged] == [0, 1]
