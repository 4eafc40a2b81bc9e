"""The benchmarks run, compare the same updates, and say what was reached. Their figures are for people."""
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import At

FOLDER = Path(__file__).parent / "benchmarks"
ROOT = FOLDER.parent.parent


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """The benchmarks are programs: they import each other as files of one folder."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def results():
    import results
    return results


def table(title="a task", reference="loop", **rows):
    from harness import Row, Table
    return Table(title, "us", [Row(name, values) for name, values in rows.items()], reference)


def program(*arguments, **options):
    return subprocess.run([sys.executable, "-W", "error", FOLDER / "run.py", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, **options)


# ---- the programs


@pytest.mark.nightly
def test_every_suite_runs_and_what_is_not_there_is_said(tmp_path):
    from run import SUITES, about
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    done = program("--quick", "--json", path, "--plot", picture)
    missing = [name for name in SUITES if about(name).startswith("NOT THERE")]
    assert done.stderr == ""
    assert re.findall(r"== (\w+): NOT MEASURED", done.stdout) == missing
    assert done.returncode == (1 if missing else 0)
    suites = json.loads(path.read_text(encoding="utf-8"))["suites"]
    assert suites.keys() == SUITES.keys() - set(missing)
    for run in suites.values():
        assert run["tables"]
        assert {"python", "torch", "minifast"} <= run["versions"].keys()
        assert {"cpu", "cores", "device"} <= run["machine"].keys()
        assert run["command"] == "python tests/benchmarks/run.py --quick"
        assert str(tmp_path) not in json.dumps(run)
    named = {row["name"] for run in suites.values() for table in run["tables"] for row in table["rows"]}
    assert {"Learner, default", "Learner, silent", "Learner, default, opt.step()", "Learner, all callbacks",
            "learn.lr_find", "import minifast, after it"} <= named
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("arguments", "said"), [
    (["stepz"], "there is no suite stepz: choose from steps"),
    (["steps", "--rounds", "0"], "must be at least 1, got 0"),
    (["--quick", "--keep"], "leave one of them out"),
    (["--readme", "--against", "nowhere.json"], "there is no nowhere.json: write results with --keep"),
])
def test_what_cannot_be_run_is_said(arguments, said, capsys):
    from run import parse
    with pytest.raises(SystemExit):
        parse(arguments)
    assert said in capsys.readouterr().err


def test_a_suite_whose_file_is_missing_is_an_error(monkeypatch, capsys):
    import run
    monkeypatch.setitem(run.SUITES, "steps", "no_such_file:suite")
    assert run.main(["steps", "--quick"]) == 1
    assert "== steps: NOT MEASURED: No module named 'no_such_file'" in capsys.readouterr().out


# ---- rounds and figures


def test_rounds_are_interleaved_in_an_order_that_rotates():
    from harness import Options, interleave
    calls = []
    rows = interleave({name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}, Options(rounds=3))
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"  # the first round warms up
    assert [row.values for row in rows] == [[4, 9, 11], [5, 7, 12], [6, 8, 10]]


def test_ratios_are_paired_and_goals_are_judged_by_them():
    from harness import Goal
    found = table(loop=[100.0, 200.0, 400.0], ours=[60.0, 90.0, 240.0], slow=[110.0, 230.0, 440.0])
    assert found.ratios("ours") == [0.6, 0.45, 0.6]
    assert Goal("ours", 0.6).figure(found) == 0.6
    assert Goal("ours", 0.6).said(found) == "ours, beside loop: 0.60x, at most 0.60x: reached"
    assert Goal("ours", 0.5).said(found).endswith("MISSED")
    assert Goal("slow", 25, "more").said(found) == "slow, beside loop: 30.0 us more, at most 25.0: MISSED"
    assert Goal("ours", 0.6, than="slow").figure(found) == pytest.approx(60 / 110)
    assert Goal("ours", 90, "value").said(found) == "ours: 90.0 us, at most 90.0: reached"
    lines = str(replace(found, goals=[Goal("ours", 0.5)], notes=["why not"])).splitlines()
    assert lines[3].split() == ["ours", "90", "-110", "0.60", "0.53-0.60", "0.45-0.60"]
    assert lines[5:] == ["  ours, beside loop: 0.60x, at most 0.50x: MISSED", "  why not"]
    with pytest.raises(KeyError, match="no row 'other': there are loop, ours, slow"):
        found.row("other")


# ---- the same updates


def learners(**options):
    from workloads import MLP, with_learner
    return {"Learner": lambda model, batches: with_learner(MLP, model, batches, "cpu", **options)}


@pytest.mark.parametrize("opt", ["AdamW", "SGD, momentum"])
def test_the_check_of_updates_passes_for_a_learner_and_fails_for_another_training(opt):
    import steps
    from workloads import MLP, check_same_updates
    task = replace(MLP, opt=opt, n_groups=3)
    batches = task.batches(20)
    steps.check(task, batches, "cpu")
    if opt == "AdamW":
        with pytest.raises(AssertionError, match=r"MLP.* Learner: 0\.weight: Tensor-likes are not close"):
            check_same_updates(MLP, learners(wd_norm_bias=True, wd=0.1), batches, "cpu")
        with pytest.raises(AssertionError, match="Learner: "):
            check_same_updates(MLP, learners(wd_norm_bias=True, callbacks=[
                At("after_backward", lambda state: state.model[2].bias.grad.add_(0.01))]), batches, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["DECAY", "NORM", "save"])
def test_the_check_of_all_callbacks_notices_a_loop_that_does_something_else(broken, monkeypatch, quick_disk):
    import common
    from workloads import MLP
    common.check(MLP, 6, torch.device("cpu"))
    real = common.by_hand

    def by_hand(*args):
        with monkeypatch.context() as patch:
            patch.setattr(common, broken, {"DECAY": 0.9, "NORM": 0.01, "save": lambda path, content: path.touch()
                                           if path.stem != "step-18" else path.with_suffix(".x").touch()}[broken])
            if broken == "save":
                patch.setattr(Path, "unlink", lambda self: None)
            return real(*args)

    monkeypatch.setattr(common, "by_hand", by_hand)
    said = {"DECAY": "averages: 0", "NORM": "weights: 0", "save": "checkpoints of steps"}[broken]
    with pytest.raises(AssertionError, match=said):
        common.check(MLP, 6, torch.device("cpu"))


def test_the_check_of_peers_notices_other_updates():
    from peer_loops import PEERS, by_hand, check
    from workloads import MLP
    batches = MLP.batches(10)
    for lean in (False, True):
        check(partial(PEERS["minifast"][1]), MLP.make_model, batches, lean)
    check(by_hand, MLP.make_model, batches, False)
    with pytest.raises(AssertionError, match=r"0\.weight"):
        check(lambda model, batches, lean: by_hand(model, batches[1:]), MLP.make_model, batches, False)


# ---- results


def run_of(results, *tables):
    return json.loads(json.dumps(results.record(list(tables), "run.py", torch.device("cpu"))))


def test_results_are_written_and_read_and_those_of_other_suites_stay(results, tmp_path):
    path, first = tmp_path / "kept.json", table(loop=[1.0], ours=[2.0])
    results.write(path, {"a": run_of(results, first)})
    results.write(path, {"b": run_of(results, table("other", loop=[3.0]))})
    kept = results.read(path)
    assert list(kept) == ["a", "b"]
    assert results.tables(kept["a"]) == [first]
    path.write_text('{"format": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds no results of format 1"):
        results.read(path)


def test_a_row_that_got_slower_by_more_than_the_noise_is_named(results):
    before = run_of(results, table(loop=[100.0] * 5, ours=[50.0, 51.0, 52.0, 53.0, 54.0],
                                   noisy=[40.0, 50.0, 60.0, 70.0, 80.0]))
    now = run_of(results, table(loop=[200.0] * 5, ours=[120.0, 121.0, 122.0, 123.0, 124.0],
                                noisy=[100.0, 120.0, 130.0, 140.0, 160.0], new=[900.0] * 5))
    assert results.slower(now, before) == ["a task: ours: 0.61x, was 0.52x"]
    assert results.slower(before, before) == []
    assert results.slower(before, now) == []


def test_values_without_a_reference_are_compared_on_the_same_kind_of_machine_only(results):
    before, now = (run_of(results, table(reference=None, size=[value])) for value in (1.0, 2.0))
    assert results.slower(now, before) == ["a task: size: 2 us, was 1 us"]
    now["machine"]["cpu"] = "another"
    assert results.slower(now, before) == []


def test_the_table_for_the_readme(results):
    text = results.markdown({"steps": run_of(results, table(loop=[100.0, 200.0, 300.0], ours=[50.0, 100.0, 150.0]))})
    lines = text.splitlines()
    assert lines[4:6] == ["| a task | loop | 200 us |  |", "|  | ours | 100 us | 0.50 (0.50-0.50) |"]
    assert "torch" in lines[-1]
    assert lines[-1].endswith("`run.py`")


def test_the_command_in_the_results_names_no_path(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/run.py"])
    given = ["steps", "--json", "/home/me/x.json", "--rounds", "3", "--plot=/home/me/x.png", "--keep"]
    assert results.command(given) == "python tests/benchmarks/run.py steps --rounds 3"


# ---- peers: those that are not installed


@pytest.mark.nightly
def test_a_peer_that_is_missing_is_named_with_the_reason(monkeypatch):
    import peers
    from harness import Options
    from peer_loops import PEERS
    monkeypatch.setattr(peers, "PEERS", {name: PEERS[name] for name in ("minifast", "fastai")})
    (found,) = peers.suite(Options(rounds=2, steps=5, quick=True))
    assert [row.name.split(",")[-1].strip() for row in found.rows] == [
        "CosineAnnealingLR", "as a user gets it", "at its leanest"]
    assert [note for note in found.notes if note.startswith("fastai: NOT MEASURED: ModuleNotFoundError: No module")]
