"""The CIFAR-10 speed run: both versions make the same updates, and the program says how fast they are."""
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import real_data
from PIL import Image

BENCHMARKS = Path(__file__).parent / "benchmarks"
FILE = "cifar10_jpeg.npz"
CPU = torch.device("cpu")


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cifar10
    return cifar10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file like that of CIFAR-10 with blurred noise in it, one colour for each class."""
    rng, arrays = np.random.default_rng(0), {}
    for kind, n in (("train", 512), ("test", 128)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        small = rng.integers(0, 128, (n, 8, 8, 3)) + labels[:, None, None, None] * np.array([12, 0, 4])
        images = np.kron(small, np.ones((1, 4, 4, 1))).astype(np.uint8)
        jpegs = [jpeg(image) for image in images]
        arrays[f"{kind}_labels"] = labels
        arrays[f"{kind}_offsets"] = np.cumsum([0, *map(len, jpegs)])
        arrays[f"{kind}_jpegs"] = np.frombuffer(b"".join(jpegs), dtype=np.uint8)
    path = tmp_path_factory.mktemp("cifar")
    np.savez(path / FILE, **arrays)
    return path


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG")
    return file.getvalue()


def run(*arguments):
    return subprocess.run([sys.executable, "-W", "error", BENCHMARKS / "cifar10.py", *arguments],
                          capture_output=True, text=True, check=False)


@pytest.mark.nightly
def test_the_program_prints_its_table_and_writes_its_figures(folder, tmp_path):
    done = run("--data", folder, "--size", "tiny", "--device", "cpu", "--json", tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("CIFAR-10 tiny: 512 images, 2 epochs of 8 updates")
    assert lines[2].split() == ["s", "an", "epoch", "ratio", "spread", "s", "in", "all", "accuracy", "%", "with",
                                "flips", "%"]
    assert [line.split("  ")[0] for line in lines[3:]] == ["Learner", "plain script"]
    figures = json.loads((tmp_path / "out.json").read_text())
    learner, script = figures["runs"][0]["Learner"], figures["runs"][0]["plain script"]
    assert figures["apart"] <= 1e-3
    assert len(learner["epochs"]) == len(script["epochs"]) == 2
    # the same weights at the end, so the same accuracy but for an image that is on the edge of two classes
    assert learner["accuracy"] == pytest.approx(script["accuracy"], abs=1.5 / 128)
    assert learner["flips"] == pytest.approx(script["flips"], abs=1.5 / 128)


@pytest.mark.nightly
@pytest.mark.parametrize("change", [
    {"bias_scale": 8.0}, {"momentum": 0.85}, {"weight_decay": 5e-3}, {"label_smoothing": 0.0}, {"cutout": 0},
    {"lookahead_slowness": 0.5}])
def test_a_difference_in_any_ingredient_is_seen(program, folder, monkeypatch, change):
    recipe = program.SIZES["tiny"]
    data = program.load(folder / FILE, recipe, CPU)
    epochs = program.plain.epochs

    def changed(model, data, recipe, *args, **options):
        return epochs(model, data, replace(recipe, **change), *args, **options)
    monkeypatch.setattr(program.plain, "epochs", changed)
    with pytest.raises(SystemExit, match=r"after 8 of them their weights are [\d.e-]+ of the way apart"):
        program.check_same_updates(data, recipe, CPU, seed=0)


def test_a_crop_is_a_window_of_the_padded_image_and_a_square_is_blank(program):
    from speedrun.data import MEAN, STD, Augment
    padded = torch.arange(3 * 36 * 36).remainder(251).view(1, 3, 36, 36).to(torch.uint8).expand(64, -1, -1, -1)
    x, _ = Augment(CPU, 0, cutout=0)((padded, torch.zeros(64)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = (x * std + mean).round().to(torch.uint8)
    windows = {window.numpy().tobytes(): (top, left, mirrored) for top in range(5) for left in range(5)
               for mirrored in (False, True)
               for window in [padded[0, :, top:top + 32, left:left + 32].flip([2] if mirrored else []).contiguous()]}
    drawn = {windows[image.contiguous().numpy().tobytes()] for image in pixels}
    assert {mirrored for *_, mirrored in drawn} == {False, True}
    assert {top for top, *_ in drawn} == {left for _, left, _ in drawn} == set(range(5))
    cut, _ = Augment(CPU, 0, cutout=12)((padded, torch.zeros(64)))
    blank = (cut == 0).all(1)
    assert blank.sum((1, 2)).unique().tolist() == [144]
    torch.testing.assert_close(cut.masked_fill(blank.unsqueeze(1), 1.0), x.masked_fill(blank.unsqueeze(1), 1.0))


def test_whitened_patches_are_uncorrelated_and_of_variance_one(program):
    from speedrun.model import Whiten
    images = torch.randn(200, 3, 12, 12).cumsum(3) * torch.tensor([1.0, 3.0, 0.5]).view(3, 1, 1)
    out = Whiten(images)(images)
    torch.testing.assert_close(out[:, 12:], -out[:, :12])
    rows = out[:, :12].permute(1, 0, 2, 3).flatten(1).double()
    torch.testing.assert_close(rows @ rows.T / rows.shape[1], torch.eye(12, dtype=torch.float64), rtol=0, atol=0.01)


def test_the_schedule_rises_to_the_peak_and_falls_nearly_to_zero(program):
    from speedrun.recipe import triangle
    values = [triangle(step, 100) for step in range(100)]
    assert values[19] == 1.0 == max(values)
    assert values[0] == pytest.approx(0.05)
    assert values[99] == pytest.approx(1 / 81)
    assert all(0 < triangle(step, n) <= 1 for n in range(1, 12) for step in range(n))


def test_without_the_file_a_sentence_says_so(tmp_path):
    done = run("--data", tmp_path)
    assert done.returncode == 1
    assert done.stderr == (f"{FILE} is not in {tmp_path}: pass --data or set MINIFAST_DATA, the folder that "
                           "holds it.\n")


@pytest.mark.nightly
def test_it_learns_from_the_real_images(program):
    path = real_data(FILE)
    recipe = replace(program.SIZES["tiny"], n_train=2000, n_test=500, epochs=3, batch_size=32, cutout=0)
    data = program.load(path, recipe, CPU)
    result = program.race(data, recipe, CPU, 0, half=False, compile=False)
    assert result["Learner"]["accuracy"] > 0.2  # guessing: 0.1; seen with 5 seeds: 0.28 to 0.32


@pytest.mark.nightly
@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--no-half"], ["--compile"]])
def test_on_a_gpu(folder, options):
    done = run("--data", folder, "--size", "tiny", "--device", "cuda", *options)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[3:]] == ["Learner", "plain script"]
