"""The benchmark of pictures: the Learner and the loop by hand make the same updates, and the program says what it sees.
"""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_speedrun import BENCHMARKS, FILE, folder  # noqa: F401 (a fixture)

CPU = torch.device("cpu")


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import vision
    return vision


@pytest.fixture
def data(program, folder):  # noqa: F811
    return program.load(folder / FILE, program.SIZES["quick"], CPU)


@pytest.mark.nightly
def test_the_program_prints_its_tables_and_writes_its_figures(program, folder, tmp_path, capsys):  # noqa: F811
    program.main(["--data", str(folder), "--quick", "--seeds", "1", "--device", "cpu",
                  "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("CIFAR-10 quick: 400 pictures, batch 50, a ResNet")
    assert [line.split("  ")[0] for line in lines[-3:]] == ["head first, then slice", "one rate for all",
                                                            "from scratch"]
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["apart"] <= 1e-3
    mine, by_hand = figures["accuracies"].values()
    assert mine == pytest.approx(by_hand, abs=0.011)  # a picture that is on the edge of two classes
    assert len(figures["transfer"]) == 1
    assert len(figures["transfer"][0]) == 3 * 6  # methods and rates
    assert Path(tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.nightly
@pytest.mark.parametrize("change", [{"lr": 0.09}, {"batch_size": 40}])
def test_a_difference_in_any_ingredient_is_seen(program, data, monkeypatch, change):
    by_hand = program.by_hand

    def changed(model, dls, data, size, device):
        return by_hand(model, dls, data, replace(size, **change), device)
    monkeypatch.setattr(program, "by_hand", changed)
    with pytest.raises(SystemExit, match=r"after 4 of them their weights are [\d.e-]+ of the way apart"):
        program.check_same_updates(data, program.SIZES["quick"], CPU, seed=0)


@pytest.mark.nightly
def test_another_augmentation_is_seen(program, data, monkeypatch):
    by_hand = program.by_hand

    def later(*args):
        torch.rand(())  # one random number more
        yield from by_hand(*args)
    monkeypatch.setattr(program, "by_hand", later)
    with pytest.raises(SystemExit, match="do not make the same updates"):
        program.check_same_updates(data, program.SIZES["quick"], CPU, seed=0)


def test_some_pictures_of_some_classes(program):
    from transfer import some
    x, y = torch.arange(40).view(20, 2), torch.arange(20) % 10
    few, labels = some(x, y, range(5, 10), 5, torch.Generator().manual_seed(0))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert [int(row[0]) // 2 % 10 for row in few] == [5, 6, 7, 8, 9]
    assert len(some(x, y, [3])[0]) == 2


def test_without_the_file_a_sentence_says_so(program, tmp_path):
    with pytest.raises(SystemExit, match=r"^cifar10_jpeg.npz is not in .*: pass --data or set MINIFAST_DATA"):
        program.main(["--data", str(tmp_path)])
