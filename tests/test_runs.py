"""Run records, read back and drawn."""
import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import batches, learner
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minifast.loggers import RunLog
from minifast.record.runs import LoggedFit, plot_runs, read_run, to_json, to_line


def write(path, *lines):
    """A record of `lines`, each a dict or text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(to_line(line) if isinstance(line, dict) else line.encode() for line in lines))
    return path


def fit(name="a", **settings):
    return {"kind": "fit", "fit": name, "step": 0, **settings}


def steps(first, losses, name="a", **columns):
    return {"kind": "steps", "fit": name, "first": first, "columns": {"loss": losses, **columns}}


def epoch(number, name="a", **row):
    return {"kind": "epoch", "fit": name, "step": 0, "row": {"epoch": number, **row}}


def run_of(folder, losses, valid=(), **columns):
    """A run of one fit in `folder`."""
    return write(folder / "run.jsonl", fit(), *([steps(0, losses, **columns)] if losses else []),
                 *(epoch(i, valid_loss=loss) for i, loss in enumerate(valid)))


def curves(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines() if line.get_label()[0] != "_"}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ---- reading


@given(st.lists(st.floats(width=64), max_size=5), st.lists(st.integers(0, 5), max_size=5))
def test_every_float_is_read_back_bit_for_bit(tmp_path_factory, losses, cuts):
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    ends = sorted({0, len(losses), *(cut for cut in cuts if cut < len(losses))})
    blocks = [steps(i, losses[i:k]) for i, k in itertools.pairwise(ends)]
    write(path, fit(), *blocks, epoch(0, values=0.0, **{f"m{i}": loss for i, loss in enumerate(losses)}))
    run = read_run(path)
    expected = np.array(losses)
    np.testing.assert_array_equal(run.steps.get("loss", np.empty(0)), expected)
    np.testing.assert_array_equal(np.signbit(run.steps.get("loss", np.empty(0))[expected == 0]),
                                  np.signbit(expected[expected == 0]))
    values = [run.epochs[0][f"m{i}"] for i in range(len(losses))]
    assert {type(value) for value in values} <= {float}
    np.testing.assert_array_equal(values, expected)


def test_the_steps_of_a_fit_with_a_gap_count_on(tmp_path):
    run = read_run(write(tmp_path / "run.jsonl", fit("a"), steps(0, [1], "a"), steps(3, [4], "a"), steps(0, [5], "b")))
    assert run.steps["step"].tolist() == [0, 3, 4]


def test_each_line_is_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = to_line({"a": math.nan, "b": [math.inf, -math.inf], "c": torch.tensor(0.5), "d": np.float32(2), "e": (1,),
                    "f": {1: True, 2: None}, "g": torch.ones(3), "h": "é\n\ud800", "i": np.array(math.nan), "j": 2**70})
    assert line.count(b"\n") == 1
    assert json.loads(line, parse_constant=refuse) == {
        "a": "NaN", "b": ["Infinity", "-Infinity"], "c": 0.5, "d": 2.0, "e": [1], "f": {"1": True, "2": None},
        "g": "tensor([1., 1., 1.])", "h": "é\n\ud800", "i": "NaN", "j": 2**70}
    assert to_json({"x": [1.5]}) == {"x": [1.5]}


def test_a_run_killed_at_any_byte_can_be_read(tmp_path):
    learner(batches(3)).fit(0.1, 2, callbacks=[RunLog(tmp_path)])
    whole, path = (tmp_path / "run.jsonl").read_bytes(), tmp_path / "cut.jsonl"
    first = whole.index(b"\n")
    full = read_run(tmp_path)
    for cut in range(first + 1, len(whole), 7):
        path.write_bytes(whole[:cut])
        run = read_run(path)
        n = len(run.steps.get("loss", ()))
        assert n in (0, 3, 6)
        np.testing.assert_array_equal(run.steps.get("loss", np.empty(0)), full.steps["loss"][:n])
        assert run.epochs == full.epochs[:len(run.epochs)]
        assert run.skipped == (whole[cut - 1:cut] != b"\n" and whole[cut:cut + 1] != b"\n")


@pytest.mark.table
@pytest.mark.parametrize("line", [
    "\n", "{", "[]\n", "3\n", '"x"\n', "{}\n", '{"kind": "fit"}\n', '{"kind": "fit", "fit": []}\n', "\x00\xff\n",
    '{"kind": "other", "fit": "a"}\n', '{"kind": "steps", "fit": "a"}\n', "[" * 100_000 + "\n",
    '{"kind": "steps", "fit": "a", "first": 0, "columns": {"loss": [1], "lr": [1, 2]}}\n',
    '{"kind": "steps", "fit": "a", "first": 0, "columns": {"loss": ["import os"]}}\n',
    '{"kind": "steps", "fit": "a", "first": 0, "columns": {"loss": 1}}\n',
    '{"kind": "steps", "fit": "a", "first": "x", "columns": {"loss": [1]}}\n',
    '{"kind": "steps", "fit": "a", "first": 0, "columns": [1]}\n',
    '{"kind": "epoch", "fit": "a", "row": {"no": 1}}\n', '{"kind": "epoch", "fit": "a", "row": 3}\n',
    '{"kind": "epoch", "fit": "a", "row": {"epoch": [1]}}\n',
    '{"kind": "epoch", "fit": "a", "row": {"epoch": "NaN"}}\n'])
def test_what_is_no_record_is_skipped(tmp_path, line):
    path = write(tmp_path / "run.jsonl", fit(), line, "\n", steps(0, [1.0, 2.0]), line)
    run = read_run(path)
    assert run.steps["loss"].tolist() == [1.0, 2.0]
    assert run.skipped == (0 if line == "\n" else 2)
    assert len(run.fits) == 1


def test_the_newest_of_a_step_and_of_an_epoch_counts(tmp_path):
    path = write(tmp_path / "run.jsonl", fit(), steps(0, [0, 1, 2]), epoch(0, x=1), steps(3, [3, 4]), epoch(1, x=1),
                 {"kind": "end", "fit": "a"}, {**fit(), "step": 2}, steps(2, [22, 33]), epoch(1, x=2), steps(6, [66]))
    run = read_run(path)
    assert run.steps["loss"].tolist() == [0, 1, 22, 33, 4, 66]
    assert run.steps["step"].tolist() == [0, 1, 2, 3, 4, 6], "a block that is lost leaves a gap"
    assert [row["x"] for row in run.epochs] == [1, 2]
    assert [start["step"] for start in run.fits[0].starts] == [0, 2]
    assert run.fits[0].end is None, "it goes on"


def test_fits_stand_end_to_end(tmp_path):
    path = write(tmp_path / "b" / "run.jsonl", fit("a", n=1), steps(0, [1, 2], "a", lr_body=[5, 6]), epoch(0, "a"),
                 fit("c"), fit("b", n=2), steps(0, [3], "b", norm=["NaN"]), epoch(0, "b"), epoch(1, "b"))
    run = read_run(path)
    assert run.settings["n"] == 2
    assert {name: column.tolist() for name, column in run.steps.items() if name != "norm"} == {
        "step": [0, 1, 2], "loss": [1, 2, 3], "lr_body": pytest.approx([5, 6, math.nan], nan_ok=True), "fit": [0, 0, 2]}
    assert run.epochs == [{"epoch": 0, "fit": 0}, {"epoch": 1, "fit": 2}, {"epoch": 2, "fit": 2}]
    assert (run.name, repr(run)) == ("b", f"Run('{path}': 3 fits, 3 steps, 3 epochs)")
    assert isinstance(run.fits[1], LoggedFit)
    assert run.fits[1].steps == {}


def test_a_run_whose_first_line_is_lost(tmp_path):
    run = read_run(write(tmp_path / "run.jsonl", '{"kind":"fit",\n', steps(0, [1.0])))
    assert (run.settings, run.steps["loss"].tolist(), run.skipped) == ({}, [1.0], 1)


def test_no_run_to_read(tmp_path):
    message = rf"no run found at '{tmp_path}': there is no file {tmp_path}.run\.jsonl"
    with pytest.raises(FileNotFoundError, match=message):
        read_run(tmp_path)
    (tmp_path / "notes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"notes\.txt is no run record: none of its 2 lines can be read"):
        read_run(tmp_path / "notes.txt")


# ---- drawing


@pytest.fixture
def three(tmp_path, monkeypatch):
    """runs/a, runs/b, runs/c of different lengths, among other things; the folder they are in is the current one."""
    run_of(tmp_path / "runs" / "a", [4.0, 3.0, 2.0, 1.0], [2.0, 1.0], lr=[1.0] * 4)
    run_of(tmp_path / "runs" / "b", [5.0, 4.0], [3.0], lr=[2.0] * 2)
    run_of(tmp_path / "runs" / "c", [], [])
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("x")
    write(tmp_path / "runs" / "begun" / "run.jsonl")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("three")
def test_epochs_of_several_runs():
    ax = plot_runs("runs/*")
    assert isinstance(ax, Axes)
    assert curves(ax) == {"a": [[0, 2.0], [1, 1.0]], "b": [[0, 3.0]], "c: no valid_loss": []}
    assert legend(ax) == list(curves(ax))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "valid_loss")
    assert len({line.get_color() for line in ax.get_lines()}) == 3
    assert {line.get_marker() for line in ax.get_lines()} == {"o"}


@pytest.mark.usefixtures("three")
def test_steps_of_several_runs():
    ax = plot_runs(["runs/a", "runs/b/run.jsonl"], "lr")
    assert curves(ax) == {"a": [[i, 1.0] for i in range(4)], "b": [[i, 2.0] for i in range(2)]}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step (weight updates)", "learning rate")


@pytest.mark.usefixtures("three")
def test_the_loss_is_drawn_raw_and_smoothed():
    ax = plot_runs("runs/*", "loss")
    pale, smooth = ax.get_lines()[:2]
    assert pale.get_ydata().tolist() == [4.0, 3.0, 2.0, 1.0]
    weights = 0.98 ** np.arange(4)[::-1]
    assert smooth.get_ydata()[-1] == pytest.approx(np.average([4.0, 3.0, 2.0, 1.0], weights=weights))
    assert pale.get_color() == smooth.get_color()
    assert legend(ax) == ["a", "b", "c: no loss"]
    assert ax.get_ylabel() == "loss (pale: each step, line: smoothed)"


@pytest.mark.usefixtures("three")
def test_it_draws_on_the_axes_given():
    left, right = Figure().subplots(1, 2)
    assert plot_runs("runs/a", ax=right) is right
    assert right.has_data()
    assert not left.has_data()


@pytest.mark.usefixtures("three")
def test_no_run_found():
    for runs, wanted in [("runs/x*", "runs/x*"), ("runs/empty", "runs/empty"), (["runs/a", "runs/typo"], "runs/typo"),
                         ("runs/begun", "runs/begun"), ("runs/notes.txt", "runs/notes.txt")]:
        message = f"no run found for '{wanted.replace('*', '[*]')}', seen from '/.*RunLog"
        with pytest.raises(FileNotFoundError, match=message):
            plot_runs(runs)
    with pytest.raises(ValueError, match="no run to draw: the list is empty"):
        plot_runs([])


@pytest.mark.usefixtures("three")
def test_no_such_column():
    with pytest.raises(ValueError, match=r"no run has a column 'acuracy'\. Columns of the steps: step, loss, lr, fit; "
                                         r"of the epochs: epoch, valid_loss, fit\."):
        plot_runs("runs/*", "acuracy")
    with pytest.raises(ValueError, match="Columns of the steps: none; of the epochs: none"):
        plot_runs("runs/c", "loss")


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x/a", "y/a", "y/b"):
        run_of(tmp_path / folder, [1.0])
    write(tmp_path / "y" / "c.jsonl", fit(), steps(0, [1.0]))
    assert legend(plot_runs("*/*", "loss")) == ["x/a/run.jsonl", "y/a/run.jsonl", "b", "c"]


def test_a_name_that_looks_like_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path / "lr[0.1]", [1.0])
    assert legend(plot_runs("lr[0.1]", "loss")) == ["lr[0.1]"]


def test_many_runs_have_different_colours(tmp_path):
    for i in range(14):
        run_of(tmp_path / f"{i:02}", [1.0, float(i)])
    ax = plot_runs(str(tmp_path / "*"), "loss")
    assert len({str(line.get_color()) for line in ax.get_lines()}) == 14
    ax.figure.savefig(io.BytesIO(), format="png")


def test_what_is_not_finite_is_a_gap_and_no_error(tmp_path):
    run_of(tmp_path / "a", [1.0, math.nan, math.inf, 2.0], [math.nan, 1.0])
    for metric in ("loss", "valid_loss"):
        plot_runs(tmp_path / "a", metric).figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize(("rows", "expected"), [
    ([{"epoch": 0, "train_loss": 2.0}], "train_loss"),
    ([{"epoch": 0, "train_loss": 2.0, "valid_loss": 1.0}], "valid_loss"),
    ([{"epoch": 0, "train_loss": 2.0, "clean_valid_loss": 1.0}], "train_loss"),
])
def test_what_is_drawn_if_nothing_is_said(tmp_path, rows, expected):
    lines = [{"kind": "fit", "fit": "a", "step": 0},
             *({"kind": "epoch", "fit": "a", "step": 1, "row": row} for row in rows)]  # fmt: skip
    (tmp_path / "run.jsonl").write_bytes(b"".join(map(to_line, lines)))
    assert plot_runs(tmp_path).get_ylabel() == expected


def test_a_folder_of_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        row = {"kind": "epoch", "fit": "x", "step": 1, "row": {"epoch": 0, "train_loss": 1.0}}
        fit = {"kind": "fit", "fit": "x", "step": 0}
        (tmp_path / "runs" / name / "run.jsonl").write_bytes(to_line(fit) + to_line(row))
    labels = plot_runs(tmp_path / "runs").get_legend_handles_labels()[1]
    assert sorted(labels) == ["a", "b"]
