"""`python -m minifast`: what it writes, how well it trains, and what it says of options and folders it cannot use."""
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import real_data
from PIL import Image
from torch import nn

from minifast import Learner, accuracy, demo, digits
from minifast.__main__ import main
from minifast.vision import image_folders


@pytest.fixture(autouse=True)
def one_thread():
    """With images this small, threads wait for each other longer than they compute, most of all on a busy machine."""
    torch.set_num_threads(1)  # put back by conftest.py


def minifast(*options, cwd, timeout=300):
    command = [sys.executable, "-m", "minifast", *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def save(path, size, mode="L", seed=0):
    """An image of noise around a grey level that tells the classes apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    level = 60 if path.parent.name == "dark" else 200
    pixels = np.random.default_rng(seed).integers(level - 50, level + 50, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 12 training and 4 validation images each, of 20x20 pixels, grey."""
    for name in ("dark", "light"):
        for i in range(12):
            save(tmp_path / "images" / "train" / name / f"{i}.png", (20, 20), seed=i)
        for i in range(4):
            save(tmp_path / "images" / "valid" / name / f"{i}.png", (20, 20), seed=100 + i)
    return tmp_path / "images"


def mix(folder):
    """Colour among the grey, a JPEG, a palette with transparency, and other sizes."""
    save(folder / "train" / "dark" / "0.png", (30, 18), mode="RGB")
    save(folder / "train" / "light" / "0.jpg", (100, 90), mode="RGB")
    image = Image.new("P", (20, 20))
    image.putpalette([200, 190, 210, 0, 0, 0])
    image.save(folder / "valid" / "light" / "palette.png", transparency=b"\0\xff")


def images_of(folder):
    """The loaders of `python -m minifast --data folder`."""
    return image_folders(folder, valid="valid", max_size=64, augment=None, in_memory=True, verbose=False)


def assert_plots(out):
    assert {path.name for path in out.iterdir()} == set(demo.PLOTS)
    for path in out.iterdir():
        pixels = np.array(Image.open(path).convert("L"))
        assert pixels.shape[0] > 300
        assert pixels.std() > 3, f"{path.name} is empty"


# ---- what it does


@pytest.mark.slow
def test_on_digits_it_prints_tables_and_writes_plots(tmp_path):
    done = minifast("--epochs", 1, "--out", "plots/here", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,437 training and 360 validation images of 10 classes, 8x8 pixels, grey" in done.stdout
    assert "suggestions: valley " in done.stdout
    assert "learn.fit_one_cycle(1, " in done.stdout
    assert "1, cycle_len=1, use_clr=(32, 5))" in done.stdout
    assert done.stdout.count("train_loss  valid_loss    accuracy") == 2
    assert "The plots are in plots/here:\n  lr_find.png\n" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "plots"]
    assert_plots(tmp_path / "plots" / "here")


@pytest.mark.nightly
def test_a_default_run_reaches_what_the_readme_says(tmp_path, capsys):
    reached = demo.run(digits(16), tmp_path)
    assert reached["one cycle"] >= 0.98
    assert reached["circular"] >= 0.97
    assert_plots(tmp_path)


@pytest.mark.nightly
def test_on_a_folder_of_mixed_images(folder, tmp_path):
    mix(folder)
    done = minifast("--data", folder, "--epochs", 2, "--lr", 0.01, "--seed", 3, "--out", tmp_path / "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "25 training and 9 validation images of 2 classes, 20x20 pixels, colour" in done.stdout
    assert "training with 0.01, as given" in done.stdout
    assert_plots(tmp_path / "out")


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:a cycle of")
def test_without_validation_pictures_a_fifth_is_held_back(folder, tmp_path, capsys):
    for one_tree in (folder, folder / "train"):
        shutil.rmtree(folder / "valid", ignore_errors=True)
        assert main(["--data", str(one_tree), "--epochs", "1", "--lr", "0.01", "--out", str(tmp_path / "out")]) == 0
        assert "20 training and 4 validation images of 2 classes, 20x20 pixels, grey" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.filterwarnings("default:a cycle of")
def test_a_schedule_that_is_cut_short_is_one_line_of_warning(folder, tmp_path, capsys):
    assert main(["--data", str(folder), "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "24 training and 8 validation images of 2 classes, 20x20 pixels, grey" in printed.out
    assert printed.err.startswith("minifast: a cycle of 3 steps is shorter than cut_div=5")
    assert printed.err.count("\n") == 1


@pytest.mark.nightly
def test_on_a_sample_of_mnist(tmp_path):
    shutil.unpack_archive(real_data("mnist_sample.tgz"), tmp_path, filter="data")
    dls = images_of(tmp_path / "mnist_sample")
    assert [loader.tensors[0].shape for loader in (dls.train, dls.valid)] == [(12396, 1, 28, 28), (2038, 1, 28, 28)]
    torch.manual_seed(0)
    learn = Learner(demo.convnet((1, 28, 28), 2), dls, nn.CrossEntropyLoss(), metrics=[accuracy], verbose=False)
    learn.fit_one_cycle(1, 1e-3)
    assert learn.recorder.epochs[0]["accuracy"] > 0.98


@pytest.mark.slow
def test_without_a_suggestion_it_trains_with_a_usual_rate(monkeypatch, tmp_path, capsys):
    find = Learner.lr_find
    monkeypatch.setattr(Learner, "lr_find", lambda learn: find(learn, 1e-7, 1e-6, 5))
    demo.run(digits(64), tmp_path, epochs=1)
    printed = capsys.readouterr().out
    assert "suggestions: none, " in printed
    assert f"training with {demo.FALLBACK_LR:.3g}, because there is no suggestion" in printed


@pytest.mark.slow
def test_a_rate_that_is_too_high_is_called_that(tmp_path, capsys):
    assert main(["--lr", "1e9", "--epochs", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert re.match(r"minifast: the loss is (nan|inf) at epoch 0, step \d+ \(lr .*\)\. .* Lower the learning rate, "
                    r".* The option is --lr\.\n$", said)


@pytest.mark.nightly
def test_ctrl_c_is_one_line_and_status_130(tmp_path):
    # The handler is set because a test run in the background hands down one that ignores the signal.
    code = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from minifast.__main__ import main; sys.exit(main(['--epochs', '1000']))")
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "minifast: interrupted\n")


@pytest.mark.nightly
def test_a_reader_that_leaves_is_no_crash(tmp_path):
    with subprocess.Popen([sys.executable, "-m", "minifast", "--epochs", "1"], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 64), (3, 17, 20), (1, 28, 28), (3, 64, 64)])
def test_the_convnet_takes_images_of_any_size(shape):
    assert demo.convnet(shape, 7, width=4)(torch.zeros(2, *shape)).shape == (2, 7)


# ---- images


def everything(loader):
    return tuple(torch.cat(column) for column in zip(*loader, strict=True))


@pytest.mark.slow
def test_images_of_one_size_are_taken_as_they_are(folder):
    dls = images_of(folder)
    images, labels = everything(dls.valid)
    expected = [np.array(Image.open(folder / "valid" / name / f"{i}.png"))
                for name in ("dark", "light") for i in range(4)]
    assert torch.equal(images, torch.tensor(np.stack(expected)).unsqueeze(1))
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert dls.train.tensors[0].dtype == torch.uint8
    assert len(dls.train) == 3  # small sets are cut into small batches


@pytest.mark.slow
def test_mixed_images_become_one_kind(folder):
    mix(folder)
    dls = images_of(folder)
    train, valid = dls.train.tensors[0], dls.valid.tensors[0]
    assert (train.shape, valid.shape) == ((25, 3, 20, 20), (9, 3, 20, 20))
    images, labels = everything(dls.valid)
    # the grey image is grey in RGB too, the palette's is the colour of its only entry in use
    assert torch.equal(images[0, 0], images[0, 2])
    assert images[-1, :, 0, 0].tolist() == [200, 190, 210]
    assert labels.tolist() == [0] * 4 + [1] * 5
    assert dls.train.drop_last, "25 images in batches of 8 leave one, which BatchNorm cannot train on"


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "side"), [(((30, 40), (30, 50), (99, 99)), 30), (((4, 4),), 8), (((500, 300),), 64)])
def test_other_sizes_are_brought_to_a_square_that_fits_most(tmp_path, sizes, side):
    for name in ("dark", "light"):
        for i, size in enumerate(sizes):
            save(tmp_path / "train" / name / f"{i}.png", size)
        save(tmp_path / "valid" / name / "0.png", sizes[0])
    assert images_of(tmp_path).train.tensors[0].shape[1:] == (1, side, side)


@pytest.mark.slow
def test_sixteen_bits_and_rotated_photos(folder):
    Image.fromarray(np.full((20, 20), 128 * 256 + 7, dtype=np.uint16)).save(folder / "valid" / "dark" / "0.png")
    photo = Image.fromarray(np.repeat(np.uint8([[0], [255]]), 10, axis=0).repeat(20, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo.save(folder / "valid" / "dark" / "1.png", exif=exif)
    images, _ = everything(images_of(folder).valid)
    assert images[0].unique().tolist() == [128]
    assert (images[1, 0, 0, 0], images[1, 0, -1, 0]) == (255, 0)


@pytest.mark.slow
def test_a_class_may_be_missing_in_valid(folder):
    shutil.rmtree(folder / "valid" / "dark")
    assert everything(images_of(folder).valid)[1].tolist() == [1] * 4


# ---- what it cannot use


def refusal(options, capsys):
    """The one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        main([str(option) for option in options])
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err.count("\n") == 1
    return printed.err.rstrip()


HINT = "(--help lists the options)"


@pytest.mark.table
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--epochs", 0], f"minifast: argument --epochs: '0' is not an int >= 1 {HINT}"),
        (["--epochs", "1.5"], f"minifast: argument --epochs: '1.5' is not an int >= 1 {HINT}"),
        (["--lr", "-0.1"], f"minifast: argument --lr: '-0.1' is not a number > 0 {HINT}"),
        (["--lr", "nan"], f"minifast: argument --lr: 'nan' is not a number > 0 {HINT}"),
        (["--lr", "inf"], f"minifast: argument --lr: 'inf' is not a number > 0 {HINT}"),
        (["--lr", "fast"], f"minifast: argument --lr: 'fast' is not a number > 0 {HINT}"),
        (["--seed", 2**32], f"minifast: argument --seed: '4294967296' is not an int from 0 to 4294967295 {HINT}"),
        (["--epoch", 3], f"minifast: unrecognized arguments: --epoch 3 {HINT}"),
        (["here"], f"minifast: unrecognized arguments: here {HINT}"),
        (["--out"], f"minifast: argument --out: expected one argument {HINT}"),
        (["--device", "meta"], "minifast: --device: 'meta' cannot be used: Tensor.item() cannot be called on meta"),
        (["--device", "gpu"], "minifast: --device: 'gpu' cannot be used: "),
    ],
)
def test_wrong_options(options, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(options, capsys).startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_plots_should_go(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert refusal(["--out", out], capsys) == f"minifast: --out: {tmp_path / 'file'} is a file, not a folder"


def test_a_folder_that_is_read_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    line = refusal(["--out", tmp_path / "new"], capsys)
    assert line == f"minifast: --out: no permission to write into {tmp_path}"


def no_folder(folder):
    shutil.rmtree(folder)
    return f"there is no folder {folder}"


def no_class(folder):
    shutil.rmtree(folder / "train")
    save(folder / "train" / "1.png", (20, 20))
    return f"{folder}/train holds no folder: expected {folder}/train/<class>/<image>"


def one_class(folder):
    shutil.rmtree(folder / "train" / "dark")
    shutil.rmtree(folder / "valid" / "dark")
    return f"{folder}/train has one class only (light): nothing to tell apart"


def only_in_valid(folder):
    save(folder / "valid" / "other" / "1.png", (20, 20))
    return f"the class 'other' is in {folder}/valid only: {folder}/train has dark, light"


def empty_class(folder):
    (folder / "train" / "nothing").mkdir()
    return f"{folder}/train/nothing holds no image (.jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp .gif .jfif)"


def no_image(folder):
    (folder / "train" / "dark" / "3.png").write_text("not an image")
    return f"{folder}/train/dark/3.png is not an image"


def cut_off(folder):
    path = folder / "valid" / "light" / "2.jpg"
    save(path, (64, 64))
    path.write_bytes(path.read_bytes()[:-500])
    return f"cannot read the image {path}: image file is truncated"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil", [no_folder, no_class, one_class, only_in_valid, empty_class, no_image, cut_off]
)
def test_folders_that_cannot_be_used(spoil, folder, tmp_path, capsys):
    line = spoil(folder)
    assert refusal(["--data", folder, "--out", tmp_path / "out"], capsys).startswith(f"minifast: --data: {line}")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_exits_with_status_2_and_without_a_traceback(tmp_path):
    done = minifast("--data", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "minifast: --data: there is no folder nowhere\n")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert [option for option in ("--data", "--epochs", "--lr", "--out", "--device", "--seed")
            if option not in printed] == []
