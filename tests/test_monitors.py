"""EarlyStopping, SaveBest and ReduceLROnPlateau: on metrics whose values the test gives."""

import itertools
import math
import re

import pytest
import torch
from helpers import At, batches, bits, learner, spying, throw, trained
from torch import nn

import minifast
from minifast import CancelBatch, CancelEpoch, CancelFit, Checkpoint, CosineAnnealing, OneCycle, accuracy
from minifast.callbacks import monitors
from minifast.callbacks.monitors import EarlyStopping, ReduceLROnPlateau, SaveBest

pytestmark = pytest.mark.filterwarnings("ignore:.*Training goes on; such a value")  # tests/reliability: it is said

NAN, INF = math.nan, math.inf
MONITORS = [EarlyStopping, SaveBest, ReduceLROnPlateau]


class Given:
    """A metric object that computes the given values, one per epoch, then the last one for ever."""

    def __init__(self, values, name="given"):
        self.values, self.newest, self.__name__ = iter(values), None, name

    def reset(self): ...

    def update(self, pred, target): ...

    def compute(self):
        self.newest = next(self.values, self.newest)
        return self.newest


def fit(values, *callbacks, name="accuracy", n_epochs=None, train=2, lr=0.1, **options):
    """A learner after a fit in which metric `name` had `values`; the fit is as long as they are."""
    learn = learner(batches(train), batches(1), metrics=[Given(values, name)])
    learn.fit(lr, n_epochs or len(values), callbacks=list(callbacks), **options)
    return learn


def by_hand(values, mode, min_delta):
    """(the index of each improvement) by the definition."""
    best, better = None, []
    for i, value in enumerate(values):
        if not math.isfinite(value):
            continue
        if best is None or (value > best + min_delta if mode == "max" else value < best - min_delta):
            best = value
            better.append(i)
    return better


def sequences(n=12, seeds=12):
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(-4, 5, (n,), generator=generator).double() / 4
        yield [NAN if seed % 3 == 1 and i % 4 == seed % 4 else INF if seed % 4 == 2 and i == 1 else v
               for i, v in enumerate(values.tolist())]  # fmt: skip


# ---- what all of them have in common


@pytest.mark.parametrize("min_delta", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_is_the_last_improvement(mode, min_delta):
    for values in sequences():
        better = by_hand(values, mode, min_delta)
        callbacks = [kind("x", mode=mode, min_delta=min_delta) for kind in (SaveBest, ReduceLROnPlateau)]
        stop = EarlyStopping("x", 99, mode=mode, min_delta=min_delta)
        fit(values, *callbacks, stop, name="x", train=1)
        for callback in (*callbacks, stop):
            assert callback.best_epoch == (better[-1] if better else None)
            assert callback.best == (values[better[-1]] if better else None)


@pytest.mark.table
@pytest.mark.parametrize(("name", "mode"), [
    *((name, "min") for name in ("loss", "my_loss", "error_rate", "rmse", "mean_squared_error", "MeanAbsoluteError",
                                 "perplexity", "top_5_error", "dice_loss", "l1_loss")),
    *((name, "max") for name in ("accuracy", "acc", "top_k_accuracy", "top_5", "auc", "BinaryAUROC", "f1",
                                 "MulticlassF1Score", "precision", "recall", "r2", "R2Score", "mean_iou", "dice")),
])  # fmt: skip
def test_the_mode_goes_by_the_name(name, mode):
    save = SaveBest(name)
    fit([1.0, 2.0, 0.0], save, name=name)
    assert save.best == {"min": 0.0, "max": 2.0}[mode]


@pytest.mark.parametrize("valid_set", ["error_prone", "top_loss"])
@pytest.mark.parametrize("column", ["accuracy", "valid_loss"])
def test_the_name_of_a_validation_set_says_nothing_about_the_mode(valid_set, column):
    learn = learner(batches(2), {valid_set: batches(1), "other": batches(1, seed=2)},
                    metrics=[Given(itertools.cycle([1.0, 9.0, 2.0, 9.0]), "accuracy")])  # fmt: skip
    save = SaveBest(f"{valid_set}_{column}")
    learn.fit(0.1, 2, callbacks=[save])
    rows = [row[f"{valid_set}_{column}"] for row in learn.recorder.epochs]
    assert rows[0] != rows[1]
    assert save.best == (max(rows) if column == "accuracy" else min(rows))


def test_train_columns_can_be_watched():
    saves = [SaveBest("train_loss"), SaveBest("train_mae"), SaveBest("valid_loss")]

    def mae(pred, target):
        return (pred - target).abs().mean()

    learn = learner(batches(2), batches(1), metrics=[mae], train_metrics=True)
    learn.fit(0.05, 3, callbacks=saves)
    for save in saves:
        assert save.best == min(row[save.monitor] for row in learn.recorder.epochs)


def test_without_validation_data_train_loss_can_be_watched():
    save = SaveBest("train_loss")
    learn = learner(batches(2))
    learn.fit(0.05, 3, callbacks=[save])
    assert save.best == min(row["train_loss"] for row in learn.recorder.epochs)


@pytest.mark.case("A9")
@pytest.mark.parametrize("kind", MONITORS)
def test_an_unknown_column_is_an_error_before_the_fit(kind):
    learn = learner(batches(2), batches(1), metrics=[accuracy])
    before = trained(learn)
    message = (f"{kind.__name__} watches 'acuracy', which is not in the epoch table: the columns of this fit are "
               "train_loss, valid_loss, accuracy, time. Did you mean 'accuracy'?")  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        learn.fit(0.1, callbacks=[kind("acuracy")])
    assert trained(learn) == before


def test_a_column_of_which_there_is_one_per_set_is_an_error_too():
    learn = learner(batches(2), {"clean": batches(1), "noisy": batches(1)})
    message = r"are train_loss, clean_valid_loss, noisy_valid_loss, time. Did you mean '(clean|noisy)_valid_loss'\?"
    with pytest.raises(ValueError, match=message):
        learn.fit(0.1, callbacks=[SaveBest()])


@pytest.mark.parametrize("kind", MONITORS)
def test_no_validation_data(kind):
    message = f"{kind.__name__} watches 'valid_loss', but there is no validation data: .* train_loss, time. Make the"
    with pytest.raises(ValueError, match=message):
        learner(batches(2)).fit(0.1, callbacks=[kind()])


@pytest.mark.parametrize("kind", MONITORS)
def test_a_name_that_says_no_direction(kind):
    with pytest.raises(ValueError, match=rf"smaller or a larger 'given' is better: pass {kind.__name__}\(\.\.\., mod"):
        fit([1.0], kind("given"), name="given")
    fit([1.0], kind("given", mode="max"), name="given")


def test_the_mode_argument_beats_the_name():
    save = SaveBest("accuracy", mode="min")
    fit([2.0, 1.0, 3.0], save)
    assert save.best == 1.0


def test_a_dict_of_which_the_keys_were_not_told():
    metric = Given([{"low": 1.0, "high": 2.0}] * 2, "pair")
    learn = learner(batches(1), batches(1), metrics=[metric])
    with pytest.raises(ValueError, match=r"no 'pair' in the epoch row: epoch, train_loss, valid_loss, low, high, time"):
        learn.fit(0.1, callbacks=[SaveBest("pair", mode="max")])
    metric.names = ["low", "high"]
    save = SaveBest("high", mode="max")
    learn.fit(0.1, callbacks=[save])
    assert save.best == 2.0


@pytest.mark.parametrize("kind", MONITORS)
def test_an_epoch_without_validation_is_skipped(kind):
    """The middle one of three is cancelled: it is neither better nor worse."""
    callback = kind("accuracy")
    fit([1.0, 0.0], callback, At("before_batch", throw(CancelEpoch), 2), n_epochs=3)
    assert (callback.best, callback.best_epoch) == (1.0, 0)
    if kind is not SaveBest:
        assert callback._waited == 1


def test_an_epoch_of_which_every_batch_is_cancelled_has_no_train_loss():
    save = SaveBest("train_loss")
    learn = learner(batches(2), batches(1))
    learn.fit(0.1, callbacks=[save, At("before_batch", throw(CancelBatch))])
    assert (save.best, save.weights) == (None, None)


@pytest.mark.parametrize("kind", MONITORS)
def test_a_second_fit_knows_nothing_of_the_first(kind):
    callback = kind("accuracy")
    fit([5.0, 6.0], callback)
    fit([1.0, 2.0], callback)
    assert (callback.best, callback.best_epoch) == (2.0, 1)
    learn = learner(batches(1), batches(1), metrics=[Given([NAN], "accuracy")])
    learn.fit(0.1, callbacks=[callback])
    assert callback.best is None


@pytest.mark.case("L8")
@pytest.mark.parametrize("kind", MONITORS)
def test_not_in_lr_find(kind):
    callback = kind("nowhere")
    learn = learner(batches(2), callbacks=[callback])
    learn.lr_find(num_it=4)
    assert callback.best is None


@pytest.mark.parametrize("callback", [
    EarlyStopping(), EarlyStopping("accuracy", 5, mode="max", min_delta=0.1), SaveBest(),
    SaveBest("f1", "best.pt", mode="max", min_delta=1, restore=True), ReduceLROnPlateau(),
    ReduceLROnPlateau("x", 0.5, 2, 0.01, 3, mode="min", min_delta=0.5),
])  # fmt: skip
def test_its_repr_rebuilds_it(callback):
    twin = eval(repr(callback), vars(monitors))
    assert repr(twin) == repr(callback)
    assert vars(twin) == vars(callback)


@pytest.mark.table
@pytest.mark.case("A10")
@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: EarlyStopping(accuracy), TypeError, "monitor must be the name of a column .* got <function accuracy"),
    (lambda: SaveBest("x", mode="maximum"), ValueError, "mode must be \"min\", \"max\" or None, got 'maximum'"),
    (lambda: SaveBest("x", min_delta=-1), ValueError, r"min_delta must be a finite number >= 0, got -1 \(int\)"),
    (lambda: SaveBest("x", mode="mni"), ValueError, "mode must be \"min\", \"max\" or None, got 'mni'"),
    (lambda: EarlyStopping(min_delta=NAN), ValueError, r"min_delta must be a finite number >= 0, got nan \(float\)"),
    (lambda: EarlyStopping(patience=0), ValueError, r"patience must be an int >= 1, got 0 \(int\)"),
    (lambda: EarlyStopping(patience=-1), ValueError, r"patience must be an int >= 1, got -1 \(int\)"),
    (lambda: Checkpoint("runs/a", keep=0), ValueError, r"keep must be an int >= 1, got 0 \(int\)"),
    (lambda: Checkpoint("runs/a", keep=1.5), ValueError, r"keep must be an int >= 1, got 1.5 \(float\)"),
    (lambda: Checkpoint("runs/a", every_steps=0), ValueError, r"every_steps must be an int >= 1, got 0 \(int\)"),
    (lambda: Checkpoint("runs/a", every_seconds=NAN), ValueError, "every_seconds must be a finite number > 0, got nan"),
    (lambda: Checkpoint("runs/a", every_seconds=0), ValueError, "every_seconds must be a finite number > 0, got 0"),
    (lambda: Checkpoint(""), ValueError, "path must be a path, got an empty one"),
    (lambda: Checkpoint(None), TypeError, "path must be a path, got None"),
    (lambda: EarlyStopping(patience=2.5), ValueError, r"patience must be an int >= 1, got 2.5 \(float\)"),
    (lambda: SaveBest(path=3), TypeError, "path must be a path, got 3"),
    (lambda: SaveBest(restore=1), TypeError, "restore must be True or False, got 1"),
    (lambda: ReduceLROnPlateau(factor=1.0), ValueError, r"factor must be a finite number > 0 and < 1, got 1.0"),
    (lambda: ReduceLROnPlateau(patience=0), ValueError, "patience must be an int >= 1, got 0"),
    (lambda: ReduceLROnPlateau(min_scale=2), ValueError, "min_scale must be a finite number >= 0 and <= 1, got 2"),
    (lambda: ReduceLROnPlateau(cooldown=-1), ValueError, "cooldown must be an int >= 0, got -1"),
])  # fmt: skip
def test_settings_out_of_range(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- EarlyStopping


@pytest.mark.parametrize(("values", "patience", "epochs"), [
    ([1, 2, 3, 4, 5], 1, 5),
    ([1, 1, 1, 1, 1], 1, 2),
    ([1, 1, 1, 1, 1], 3, 4),
    ([1, 0, 2, 1, 2, 1, 3], 2, 5),
    ([1, 0, 0, 2, 0, 0, 3], 3, 7),
    ([NAN, NAN, NAN, NAN], 2, 2),
    ([1, INF, INF, INF], 2, 3),
    ([3, 2, NAN, 4, 1, 1], 2, 3),
])  # fmt: skip
def test_it_stops_after_so_many_epochs_without_a_better_one(values, patience, epochs):
    stop = EarlyStopping("accuracy", patience)
    learn = fit(values, stop)
    assert len(learn.recorder.epochs) == epochs
    stopped = epochs < len(values)
    assert stop.stopped_epoch == (epochs - 1 if stopped else None)
    assert (stop.reason is not None) == stopped


def test_nobody_misses_the_last_epoch():
    """Those before it and after it hear the same."""
    heard = {"before": [], "after": []}
    watch = {key: [At(event, lambda state, key=key, event=event: heard[key].append((event, state.epoch)))
                   for event in ("after_epoch", "after_fit")] for key in heard}  # fmt: skip
    learn = fit([1.0] * 9, *watch["before"], EarlyStopping("accuracy", 2), *watch["after"])
    assert heard["before"] == heard["after"] == [*(("after_epoch", i) for i in range(3)), ("after_fit", 2)]
    assert "valid_loss" in learn.recorder.epochs[-1]


@pytest.mark.parametrize(("values", "options", "reason"), [
    ([1.0, 0.5, 0.25], {},
     "stopped early after epoch 2: for 2 epochs accuracy was not above 1.0000, its value in epoch 0"),
    ([1.0, 2.0, 1.0], {"mode": "min", "min_delta": 0.5},
     "stopped early after epoch 2: for 2 epochs accuracy was not below 1.0000, its value in epoch 0, by more than 0.5"),
    ([NAN, NAN, 0.25], {}, "stopped early after epoch 1: for 2 epochs accuracy was no finite number"),
])  # fmt: skip
def test_it_says_why(capsys, values, options, reason):
    stop = EarlyStopping("accuracy", 2, **options)
    fit([*values, 0.0], stop, verbose=True)
    assert stop.reason == reason
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == reason, "under the table"
    assert lines[0].split() == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]
    fit([*values, 0.0], EarlyStopping("accuracy", 2, **options))
    assert capsys.readouterr().out == ""


def test_a_fit_that_was_over_anyway_was_not_stopped():
    stop = EarlyStopping("accuracy", 2)
    fit([1.0] * 3, stop)
    assert (stop.stopped_epoch, stop.reason) == (None, None)


# ---- SaveBest


def weights_by_epoch(learn_of, n):
    """The weights after each of n epochs, by an observer."""
    seen = []
    watch = At("after_epoch", lambda state: seen.append({k: v.clone() for k, v in state.model.state_dict().items()}))
    return seen, learn_of(watch)


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("restore", [True, False])
def test_it_keeps_the_weights_of_the_best_epoch(tmp_path, in_file, restore):
    path = tmp_path / "best.pt" if in_file else None
    for values in [[1.0, 3.0, 2.0, 0.0], [3.0, 2.0], [1.0, 2.0], [NAN, 1.0, NAN]]:
        save = SaveBest("accuracy", path, restore=restore)
        seen, learn = weights_by_epoch(lambda watch, values=values, save=save: fit(values, save, watch), len(values))
        best = seen[save.best_epoch]
        kept = torch.load(path, weights_only=True) if in_file else save.weights
        assert bits(dict(kept)) == bits(best)
        assert bits(dict(learn.model.state_dict())) == bits(best if restore else seen[-1])
        if restore:
            assert learn.validate()["valid_loss"] == learn.recorder.epochs[save.best_epoch]["valid_loss"]


def test_the_copy_is_no_view_of_the_model():
    save = SaveBest("accuracy")
    learn = fit([1.0], save)
    kept = bits(save.weights)
    with torch.no_grad():
        learn.model.weight.zero_()
    assert bits(save.weights) == kept
    learn.fit(0.1, callbacks=[])
    assert bits(save.weights) == kept


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CancelFit])
def test_it_restores_however_the_fit_ends(error):
    save = SaveBest("accuracy", restore=True)
    stop = At("before_batch", throw(error), 5)
    learn = learner(batches(2), batches(1), metrics=[Given([2.0, 1.0], "accuracy")])
    if error is CancelFit:
        learn.fit(0.1, 5, callbacks=[save, stop])
    else:
        with pytest.raises(error):
            learn.fit(0.1, 5, callbacks=[save, stop])
    assert bits(dict(learn.model.state_dict())) == bits(dict(save.weights))
    assert len(learn.recorder.lrs) == 5


@pytest.mark.parametrize("in_file", [True, False])
def test_it_never_restores_what_an_earlier_fit_has_kept(tmp_path, in_file):
    save = SaveBest("accuracy", tmp_path / "best.pt" if in_file else None, restore=True)
    learn = learner(batches(2), batches(1), metrics=[Given([2.0, NAN], "accuracy")])
    learn.fit(0.1, callbacks=[save])
    after_first = trained(learn)
    learn.fit(0.1, callbacks=[save])
    assert trained(learn) != after_first
    assert save.weights is None


def test_buffers_and_layer_groups_are_kept_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    learn = learner(batches(3), batches(1), model=model, metrics=[Given([2.0, 1.0], "accuracy")],
                    splitter=lambda model: [model[:2], model[2]])  # fmt: skip
    learn.freeze()
    save = SaveBest("accuracy", restore=True)
    learn.fit(0.1, 2, callbacks=[save])
    assert model[1].num_batches_tracked == 3
    assert learn.validate()["valid_loss"] == learn.recorder.epochs[0]["valid_loss"]


def test_the_file_is_one_for_load(tmp_path):
    learn = fit([1.0], SaveBest("accuracy", tmp_path / "best.pt"))
    other = learner(seed=3)
    other.load(tmp_path / "best.pt")
    assert bits(other.model.weight) == bits(learn.model.weight)
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_keeps_the_older_file(tmp_path, monkeypatch, caplog, error):
    """Epochs 1 and 2 are better than 0 but cannot be written; the fit ends with what there is."""
    path, save_now = tmp_path / "best.pt", torch.save
    kept = []

    def fails(*args, **options):
        if kept:
            raise error
        kept.append(1)
        save_now(*args, **options)

    monkeypatch.setattr(torch, "save", fails)
    save = SaveBest("accuracy", path, restore=True)
    seen, learn = weights_by_epoch(lambda watch: fit([1.0, 2.0, 3.0], save, watch), 3)
    assert (save.best, save.best_epoch) == (1.0, 0)
    assert bits(dict(torch.load(path, weights_only=True))) == bits(seen[0])
    assert bits(dict(learn.model.state_dict())) == bits(seen[0])
    said = [record.getMessage() for record in caplog.records]
    what = "No space left on device" if isinstance(error, OSError) else "write failed"
    for epoch, text in zip((1, 2), said, strict=True):
        assert re.fullmatch(rf"SaveBest, after epoch {epoch}: cannot save to .*best.pt: {what}.* Training goes.*", text)
    assert list(tmp_path.iterdir()) == [path], "no half-written one"


def test_a_path_that_cannot_be_a_file_is_an_error_before_the_fit(tmp_path):
    learn = learner(batches(1), batches(1))
    with pytest.raises(IsADirectoryError, match=r"it is a folder. Pass the name of a file in it"):
        learn.fit(0.1, callbacks=[SaveBest(path=tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere. Make it first"):
        learn.fit(0.1, callbacks=[SaveBest(path=tmp_path / "nowhere" / "best.pt")])
    assert len(learn.recorder.lrs) == 0


@pytest.mark.parametrize("in_file", [True, False])
def test_what_it_keeps_goes_over_a_kill(tmp_path, in_file):
    path = tmp_path / "best.pt" if in_file else None
    save = SaveBest("accuracy", path)
    seen, _ = weights_by_epoch(lambda watch: fit([3.0, 1.0], save, watch), 2)
    saved = save.state_dict()
    assert (saved["best"], saved["best_epoch"]) == (3.0, 0)
    resumed = SaveBest("accuracy", path, restore=True)
    learn = fit([2.0, 1.0], resumed, At("before_fit", lambda state: resumed.load_state_dict(saved)))
    assert bits(dict(learn.model.state_dict())) == bits(seen[0])
    if not in_file:
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(saved["weights"].values(), resumed.weights.values(),
                                                                strict=True))  # fmt: skip


def test_a_sandbox_puts_back_what_it_kept():
    save = SaveBest("accuracy")
    learn = learner(batches(2), batches(1), metrics=[Given([1.0, 5.0], "accuracy")], callbacks=[save])
    with learn.sandbox():
        learn.fit(0.1)
    assert (save.best, save.weights) == (None, None)


# ---- ReduceLROnPlateau

PLATEAU = [1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]


def scales(learn, peak=0.1, per_epoch=2):
    """What multiplied the learning rate in each epoch, by the spying optimizer."""
    return [seen["lr"] / peak for seen in learn.opt.seen][::per_epoch]


@pytest.mark.parametrize(("options", "expected"), [
    ({"patience": 2}, [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]),
    ({"patience": 1}, [1, 1, 0.5, 0.25, 0.25, 0.125, 0.0625, 0.03125]),
    ({"patience": 1, "cooldown": 1}, [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]),
    ({"patience": 2, "cooldown": 5}, [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5]),
    ({"patience": 1, "min_scale": 0.3}, [1, 1, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3]),
    ({"patience": 9}, [1] * 8),
])  # fmt: skip
def test_it_multiplies_a_constant_rate(options, expected):
    plateau = ReduceLROnPlateau("accuracy", 0.5, **options)
    learn = fit(PLATEAU, plateau)
    assert scales(learn) == pytest.approx(expected, rel=1e-15)
    learn.fit(0.1, callbacks=[])
    assert learn.opt.seen[-1]["lr"] == 0.1, "the next fit has its whole rate"


@pytest.mark.parametrize("schedule", [OneCycle(), CosineAnnealing(2), minifast.FlatCos(), minifast.CircularLR()])
def test_it_multiplies_every_schedule(schedule):
    learn = fit(PLATEAU, ReduceLROnPlateau("accuracy", 0.5, patience=2), schedule)
    factors = [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    own = schedule.values(16, 0.1)["lr"]
    assert [seen["lr"] for seen in learn.opt.seen] == pytest.approx(
        [lr * factors[i // 2] for i, lr in enumerate(own)], rel=1e-15)  # fmt: skip
    if "momentum" in schedule.owns:
        assert [seen["momentum"] for seen in learn.opt.seen] == schedule.values(16)["momentum"], "left alone"


def test_every_layer_group_is_multiplied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    learn = learner(batches(1), batches(1), model=model, metrics=[Given(PLATEAU, "accuracy")],
                    splitter=lambda model: [model[0], model[1]])  # fmt: skip
    learn.fit(slice(0.01, 0.1), 4, callbacks=[ReduceLROnPlateau("accuracy", 0.5, patience=2)])
    rates = learn.recorder.lr_groups
    assert rates[0] == pytest.approx([0.01, 0.1])
    assert rates[3] == pytest.approx([0.005, 0.05])


def test_two_of_them_multiply():
    a, b = ReduceLROnPlateau("accuracy", 0.5, patience=2), ReduceLROnPlateau("accuracy", 0.1, patience=3)
    learn = fit(PLATEAU, a, b)
    assert scales(learn) == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.025])


def kill_and_resume(values, killed_after, make):
    """The learner of a fit in two halves: the second is a new Learner with what the first one has saved."""
    first, callbacks = learner(batches(2), batches(1), metrics=[Given(values, "accuracy")]), make()
    scale = []
    first.fit(0.1, killed_after, callbacks=[*callbacks, At("after_epoch", lambda state: scale.append(state.lr_scale))])
    saved = first.model.state_dict(), first.opt.state_dict(), [cb.state_dict() for cb in callbacks]
    second = learner(batches(2), batches(1), seed=9, metrics=[Given(values[killed_after:], "accuracy")])
    fresh = make()

    def load(state):
        second.model.load_state_dict(saved[0])
        second.opt.load_state_dict(saved[1])
        for cb, of_it in zip(fresh, saved[2], strict=True):
            cb.load_state_dict(of_it)
        state.lr_scale = scale[-1]

    at = At("before_fit", load)
    at.order = 999
    second.fit(0.1, len(values) - killed_after, callbacks=[*fresh, at])
    return second


@pytest.mark.table
@pytest.mark.parametrize("killed_after", range(1, 8))
@pytest.mark.parametrize("make", [
    lambda: [ReduceLROnPlateau("accuracy", 0.1, patience=1)],
    lambda: [ReduceLROnPlateau("accuracy", 0.1, patience=1, cooldown=2)],
    lambda: [ReduceLROnPlateau("accuracy", 0.7, 1), ReduceLROnPlateau("accuracy", 0.1, 2, cooldown=1)],
    lambda: [ReduceLROnPlateau("accuracy", 0.1, 2), ReduceLROnPlateau("accuracy", 0.7, 1, min_scale=0.4)],
], ids=["one", "resting", "two", "two, other order"])  # fmt: skip
def test_the_scale_goes_over_a_kill_to_the_last_bit(killed_after, make):
    whole = fit(PLATEAU, *make())
    second = kill_and_resume(PLATEAU, killed_after, make)
    assert [seen["lr"].hex() for seen in second.opt.seen] == [
        seen["lr"].hex() for seen in whole.opt.seen[2 * killed_after:]]  # fmt: skip
    assert bits(second.model.weight) == bits(whole.model.weight)


def test_a_scale_that_was_put_back_by_another_is_not_applied_twice():
    plateau = ReduceLROnPlateau("accuracy", 0.5, patience=1)
    fit([1.0, 0.0], plateau)
    saved = plateau.state_dict()

    def load(state):
        plateau.load_state_dict(saved)
        state.lr_scale = 0.5

    learn = fit([2.0, 3.0], plateau, At("before_fit", load))
    assert scales(learn) == [0.5, 0.5]


@pytest.mark.parametrize("killed_after", range(1, 5))
def test_early_stopping_waits_on_after_a_kill(killed_after):
    values = [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    whole = fit(values, EarlyStopping("accuracy", 5))
    assert len(whole.recorder.epochs) == 6
    second = kill_and_resume(values, killed_after, lambda: [EarlyStopping("accuracy", 5)])
    assert len(second.recorder.epochs) == 6 - killed_after


def test_with_adam_too():
    learn = learner(batches(2), batches(1), metrics=[Given(PLATEAU, "accuracy")], opt_func=spying(torch.optim.AdamW))
    learn.fit(0.1, 4, callbacks=[ReduceLROnPlateau("accuracy", 0.5, patience=2)])
    assert scales(learn) == [1, 1, 1, 0.5]


@pytest.mark.parametrize("in_file", [False, True])
def test_the_best_weights_are_those_that_were_validated(in_file, tmp_path):
    """With an average in validation, the number is the average's; so are the weights."""
    best = SaveBest("valid_loss", tmp_path / "best.pt" if in_file else None, restore=True)
    learn = learner(batches(4), batches(2, seed=1), callbacks=[minifast.EMA(0.9), best])
    learn.fit(0.3, 5)
    assert learn.validate()["valid_loss"] == pytest.approx(best.best, rel=1e-6)
    raw = SaveBest("train_loss")
    learn = learner(batches(4), callbacks=[minifast.EMA(0.9), raw])
    seen = []
    learn.fit(0.3, 1, callbacks=[At("after_step", lambda state: seen.append(state.model.weight.detach().clone()))])
    assert torch.equal(raw.weights["weight"], seen[-1])


@pytest.mark.parametrize("other", [lambda: minifast.SWA(0.0), lambda: SaveBest("train_loss", restore=True)])
def test_only_one_decides_with_which_weights_a_fit_ends(other):
    learn = learner(batches(4), batches(2))
    with pytest.raises(ValueError, match="'the weights that the fit ends with', one would overwrite the other"):
        learn.fit(0.1, 2, callbacks=[SaveBest("valid_loss", restore=True), other()])
    learn.fit(0.1, 2, callbacks=[SaveBest("valid_loss"), other()])
