"""Broken versions of saving and resuming: the kill loop has to see each of them, or it can see nothing.

Each is a function that breaks the process in which it is called. None of them changes an uninterrupted run.
"""
import copy
import io
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import BatchSampler

from minifast import EMA
from minifast.base import rng
from minifast.callbacks.monitors import SaveBest
from minifast.core.state import State
from minifast.files import writing as files
from minifast.record.record import FitRecord
from minifast.resume import replay, saved_state, session
from minifast.standard.recorder import Recorder

from . import scripts
from .points import die_in_write
from .server import Bench


def no_random_numbers():
    rng.restore = lambda noted, generators=(): None


def no_order():
    _reading(lambda saved: saved.update(epoch_rng=copy.deepcopy(saved["rng"])))


def position_off_by_one():
    def change(saved):
        saved["position"]["n_done"] = max(0, saved["position"]["n_done"] - 1)
    _reading(change)


def no_optimizer():
    saved_state.load_optimizer = lambda opt, saved: None


def no_norm_buffers():
    load = saved_state.load_model

    def without(model, saved):
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        load(model, saved)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])

    saved_state.load_model = without


def no_ema():
    EMA.load_state_dict = lambda self, saved: None


def no_best():
    SaveBest.load_state_dict = lambda self, saved: None


def no_augmentation():
    """The indices that are behind are skipped, and no sample is read: what workers would have drawn is not."""
    def forward(loader, n_done, interrupt):
        iterate = BatchSampler.__iter__
        BatchSampler.__iter__ = lambda self: islice(iterate(self), n_done, None)
        try:
            return replay.Pass(iter(loader))
        finally:
            BatchSampler.__iter__ = iterate

    replay.way = lambda loader: "indices"
    replay.forward = forward


def no_rows():
    load = Recorder.load_state_dict

    def without(self, saved):
        load(self, saved)
        self.newest, self._first_step = FitRecord(self.newest.group_names), 0

    Recorder.load_state_dict = without


def schedule_restarts():
    """Schedules count from where the fit was taken up."""
    begin, schedule_step, first = session.Resumed.begin, State.schedule_step.fget, {}

    def begin_and_note(self, folder):
        begin(self, folder)
        first["step"] = self._state.step

    session.Resumed.begin = begin_and_note
    State.schedule_step = property(lambda self: schedule_step(self) - first.get("step", 0))


def straight_to_its_name():
    @contextmanager
    def writing(path, *args, **options):
        Path(path).unlink(missing_ok=True)  # else it would write into the best checkpoint, where that is the same file
        with io.BufferedWriter(_Straight(path, "wb")) as file:
            yield file

    files.replacing = writing


class _Straight(io.FileIO):
    def write(self, data):
        return files.write(self.fileno(), memoryview(data).cast("B"))


def _reading(change):
    """Have each checkpoint that is resumed changed when it is read."""
    newest = session.newest

    def changed(paths):
        path, saved = newest(paths)
        change(saved)
        return path, saved

    session.newest = changed


WITH, WITHOUT = "DataLoader, 2 workers", "DataLoader"
KILLED_IN = {WITH: 10, WITHOUT: 10, "TensorLoader": 16}  # the save after this update; the one before lies in an epoch

# name -> (what breaks it, the script that shows it)
VARIANTS = {
    "random generators are not restored": (no_random_numbers, WITHOUT),
    "generators of the epoch's start are not": (no_order, WITHOUT),
    "position off by one": (position_off_by_one, WITHOUT),
    "optimizer is not restored": (no_optimizer, WITHOUT),
    "buffers of BatchNorm are not": (no_norm_buffers, WITHOUT),
    "EMA is not restored": (no_ema, WITHOUT),
    "SaveBest is not restored": (no_best, "TensorLoader"),
    "rows of the Recorder are not": (no_rows, WITHOUT),
    "learning rate schedule restarts": (schedule_restarts, WITHOUT),
    "augmentation in workers is not replayed": (no_augmentation, WITH),
    "file is written under its final name": (straight_to_its_name, WITHOUT),
}


def seen_once(script, mutate, expected):
    """What shows after one kill in the middle of a save in the middle of an epoch, where it always does; a list."""
    with Bench(script, mutate) as bench:
        killed = bench.finish(before=partial(die_in_write, KILLED_IN[script.name]))
        assert killed.was_killed, killed.log
        lines, ended = bench.invalid(), bench.finish()
        return lines + ([ended.log] if ended.status else scripts.differences(ended.digest, expected))
