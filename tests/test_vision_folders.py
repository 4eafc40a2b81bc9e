"""image_folders: what it takes of folders as people have them, and what it says of those that it cannot use."""
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from minifast import Learner
from minifast.interpret import Interpretation
from minifast.standard import progress
from minifast.vision import ImageForm, from_folders, image_folders

SIZE = (20, 16)  # (width, height)


def save(path, size=SIZE, mode="RGB", level=None):
    """A picture of one grey level, so that it can be told from others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    level = 100 if level is None else level
    Image.new("RGB", size, (level,) * 3).convert(mode).save(path)
    return path


def fill(root, n=10, classes=("cat", "dog"), start=0, **options):
    for k, name in enumerate(classes):
        for i in range(n):
            save(root / name / f"{i:02}.png", level=start + 40 * k + i, **options)


@pytest.fixture
def root(tmp_path):
    """One tree of two classes, 10 pictures each, 20 wide and 16 high, of the levels 0..9 and 40..49."""
    fill(tmp_path / "my pictures")
    return tmp_path / "my pictures"


def quiet(path, **options):
    return image_folders(path, **{"verbose": False} | options)


def levels(loader):
    """The grey levels of the pictures of a loader in memory, in its order."""
    return loader.tensors[0][:, 0, 0, 0].tolist()


# ---- what it takes


def test_a_folder_for_training_and_one_for_validation(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "valid", n=3, start=100)
    dls = quiet(tmp_path)
    assert repr(dls) == ("20 training and 6 validation pictures of 2 classes (cat, dog), 20x16 pixels, colour")
    assert dls.classes == ["cat", "dog"]
    assert levels(dls.train) == [*range(10), *range(40, 50)]
    assert levels(dls.valid) == [100, 101, 102, 140, 141, 142]
    assert dls.train.tensors[1].tolist() == [0] * 10 + [1] * 10
    assert dls.train.tensors[0].dtype == torch.uint8
    assert (dls.form.size, dls.form.channels) == ((16, 20), 3)


@pytest.mark.parametrize("name", ["valid", "val", "validation", "held back"])
def test_the_validation_folder_may_have_other_names(tmp_path, name):
    fill(tmp_path / "train")
    fill(tmp_path / name, n=3, start=100)
    dls = quiet(tmp_path, **({"valid": name} if name == "held back" else {}))
    assert len(levels(dls.valid)) == 6
    assert min(levels(dls.valid)) == 100


def test_one_tree_is_split_by_class_the_same_way_each_time(root):
    first = quiet(root)
    held = levels(first.valid)
    assert [sum(level < 40 for level in held), sum(level >= 40 for level in held)] == [2, 2]
    assert sorted(held + levels(first.train)) == [*range(10), *range(40, 50)]
    torch.manual_seed(99)
    np.random.seed(99)
    assert levels(quiet(root).valid) == held, "no global generator has a part in it"
    assert levels(quiet(root, seed=1).valid) != held
    several = [levels(quiet(root, seed=seed).valid) for seed in range(4)]
    assert any(held[:2] != [level - 40 for level in held[2:]] for held in several), "each class by itself"
    assert len(levels(quiet(root, valid=0.5).valid)) == 10
    save(root / "emu" / "1.png", level=200)
    save(root / "emu" / "2.png", level=201)
    assert levels(quiet(root).valid)[:4] == held, "a class more leaves the others as they were"


def test_a_training_folder_without_validation_is_split(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", start=100)
    dls = quiet(tmp_path)
    assert max(levels(dls.valid)) < 100, "nobody is validated on test data without being asked"
    assert len(levels(dls.train)) == 16
    assert max(levels(quiet(tmp_path, valid="test").valid)) == 149


def test_train_may_be_a_class(tmp_path):
    fill(tmp_path, classes=("bus", "train"))
    assert quiet(tmp_path).classes == ["bus", "train"]


def test_a_class_of_one_picture_is_trained_on(root):
    save(root / "emu" / "1.png", level=200)
    dls = quiet(root)
    assert 200 in levels(dls.train)
    assert 200 not in levels(dls.valid)


def test_what_systems_leave_behind_is_passed_over(root, capsys):
    for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "cat/._00.png",
                 "__MACOSX/cat/._00.png", ".ipynb_checkpoints/a.png", "dog/.cache/a.png"):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text("no picture")
    dls = quiet(root)
    assert (dls.classes, len(levels(dls.train))) == (["cat", "dog"], 16)


def test_other_files_are_left_out_and_said(root, capsys):
    for name in ("cat/notes.txt", "dog/IMG_1.MOV", "dog/a"):
        (root / name).write_text("no picture")
    dls = image_folders(root)
    assert len(levels(dls.train)) == 16
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f"{dls!r}; validation: 20% of each class",
                            "left out, as no pictures: 3 files (notes.txt, IMG_1.MOV, a)"]


def test_suffixes_in_capitals_deeper_folders_and_links(root, tmp_path):
    (root / "cat" / "00.png").rename(root / "cat" / "00.PNG")
    save(root / "cat" / "2024" / "summer" / "a.JPG", level=200)
    save(tmp_path / "elsewhere" / "b.png", level=210)
    os.symlink(tmp_path / "elsewhere" / "b.png", root / "dog" / "linked.png")
    os.symlink(tmp_path / "elsewhere", root / "emu")
    save(tmp_path / "elsewhere" / "c.png", level=220)
    os.symlink(root, root / "dog" / "round")  # a link to where it lies in
    dls = quiet(root, valid=0.01)
    both = levels(dls.train) + levels(dls.valid)
    assert {0, 200, 210, 220} <= set(both)
    assert dls.classes == ["cat", "dog", "emu"]
    assert [both.count(level) for level in (1, 41, 220)] == [1, 1, 1], "no class is read again behind the link in dog"


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_loaders_know_the_files(root, in_memory):
    (root / "cat" / "03.png").write_bytes(b"broken")
    dls = quiet(root, valid=0.3, in_memory=in_memory, num_workers=0, skip_broken=True)
    assert len(dls.train.files) + len(dls.valid.files) == 19
    for loader in (dls.train, dls.valid):
        assert [ImageForm((16, 20)).read(file)[0, 0, 0].item() for file in loader.files] == [
            int(image[0, 0, 0]) for image, _ in loader.dataset]


def test_the_files_of_the_largest_losses_are_named(root):
    dls = quiet(root, valid=0.3)
    learn = Learner(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 20, 2)), dls,
                    torch.nn.CrossEntropyLoss(), verbose=False)
    rows = Interpretation.from_learner(learn, dls.train).top_losses(14)
    assert {row["file"] for row in rows} == set(dls.train.files)
    assert [os.path.basename(os.path.dirname(row["file"])) for row in rows] == [row["actual"] for row in rows]


def test_mixed_pictures_become_one_form(root):
    for i, size in enumerate([(30, 40), (400, 300), (500, 300), (300, 900)]):
        save(root / "cat" / f"x{i}.png", size, mode=("L", "CMYK", "RGBA", "P")[i] if i != 1 else "L")
    dls = quiet(root)
    assert dls.form.size == (16, 16), "the shorter side of most of them"
    assert quiet(root, size=33).form.size == (33, 33)
    assert quiet(root, size=(12, 34)).train.tensors[0].shape[2:] == (12, 34)
    assert quiet(root, size=(12, 34), resize="pad").form.resize == "pad"


@pytest.mark.parametrize(("size", "chosen"), [((4, 4), (8, 8)), ((300, 250), (224, 224)), ((9, 200), (200, 9))])
def test_the_size_that_is_chosen_where_all_have_one(tmp_path, size, chosen):
    fill(tmp_path, n=2, size=size)
    assert quiet(tmp_path, augment=None).form.size == chosen


def test_grey_where_all_are_grey(tmp_path):
    fill(tmp_path, mode="L")
    dls = quiet(tmp_path)
    assert (dls.form.channels, dls.train.tensors[0].shape[1]) == (1, 1)
    assert quiet(tmp_path, channels=3).train.tensors[0].shape[1] == 3
    assert quiet(tmp_path, mean=[0.5] * 3, std=[0.25] * 3).form.channels == 3, "as the normalisation says"
    save(tmp_path / "cat" / "coloured.png")
    assert quiet(tmp_path).form.channels == 3


def test_normalisation(root):
    dls = quiet(root, augment=None)
    x, _ = dls.one_batch()
    everything = dls.form.normalize(dls.train.tensors[0])
    assert abs(float(everything.mean())) < 0.01
    assert abs(float(everything.std()) - 1) < 0.01
    assert quiet(root, mean=(), std=()).form.mean == ()
    assert quiet(root, mean=(0.1, 0.2, 0.3), std=(1, 2, 3)).form.std == (1, 2, 3)
    assert x.dtype == torch.float32


def test_not_in_memory_they_are_the_same(root):
    kept, read = quiet(root, augment=None), quiet(root, augment=None, in_memory=False, num_workers=0)
    assert repr(kept) == repr(read)
    assert kept.form == read.form, "of few pictures all are measured"
    assert not hasattr(read.train, "tensors")
    for name in ("train", "valid"):
        images = torch.stack([x for x, _ in getattr(read, name).dataset])
        assert torch.equal(images, getattr(kept, name).tensors[0])
    assert torch.equal(read.one_batch(train=False)[0], kept.one_batch(train=False)[0])


def test_in_memory_as_they_fit(root, monkeypatch):
    monkeypatch.setattr("minifast.vision.options.available", lambda device: 1000)
    assert not hasattr(quiet(root, num_workers=0).train, "tensors")
    with pytest.raises(MemoryError, match=r"^20 pictures of 960 bytes are 0 MB, more than 50% of the memory that is "
                                          r"free\. Pass in_memory=False"):
        quiet(root, in_memory=True)
    monkeypatch.setattr("minifast.vision.options.available", lambda device: None)
    assert hasattr(quiet(root).train, "tensors")


def test_they_are_decoded_by_workers(root):
    dls = quiet(root, in_memory=True, num_workers=2)
    assert levels(dls.train) == levels(quiet(root).train)


def test_batch_sizes(root):
    assert quiet(root).train.batch_size == 8
    assert quiet(root, batch_size=5).train.batch_size == 5
    assert quiet(root, batch_size=5).train.drop_last, "16 pictures in batches of 5 leave one"
    assert not quiet(root, batch_size=6).train.drop_last


# ---- what it refuses


def no_folder(root):
    shutil.rmtree(root)
    return rf"there is no folder {root}$"


def a_file(root):
    shutil.rmtree(root)
    root.touch()
    return rf"{root} is a file, not a folder of pictures$"


def no_training_folder_of_that_name(root):
    return rf"there is no folder {root}/photos: {root} holds cat, dog$", {"train": "photos"}


def no_training_folder(root):
    return rf"there is no folder {root}/train: expected {root}/train/<class>/<image>$", {"valid": "valid"}


def no_validation_folder(root):
    root.rename(root.parent / "train")
    root.mkdir()
    (root.parent / "train").rename(root / "train")
    return rf"there is no folder {root}/valid: expected {root}/valid/<class>/<image>$", {"valid": "valid"}


def loose_pictures(root):
    shutil.rmtree(root)
    fill(root.parent, classes=(root.name,))
    return (rf"{root} holds no folder: expected {root}/<class>/<image>\. Its 10 pictures have to be sorted into one "
            "folder for each class$")


def nothing_at_all(root):
    shutil.rmtree(root)
    root.mkdir()
    return rf"{root} holds no folder: expected {root}/<class>/<image>$"


def one_class(root):
    shutil.rmtree(root / "dog")
    return rf"{root} has one class only \(cat\): nothing to tell apart$"


def one_folder_too_high(root):
    root.rename(root.parent / "inner")
    root.mkdir()
    (root.parent / "inner").rename(root / "inner")
    return rf"{root} has one class only \(inner\): .*It holds the folders cat, dog: did you mean {root}/inner\?"


def an_empty_class(root):
    (root / "emu").mkdir()
    return rf"{root}/emu holds no image \(\.jpg .*\.jfif\)\. Fill or delete this folder, or move it elsewhere"


def a_class_without_pictures(root):
    (root / "emu").mkdir()
    (root / "emu" / "list.csv").touch()
    return rf"{root}/emu holds no image \(\.jpg .*\.jfif\), but list\.csv\. Fill or delete"


def a_class_only_in_validation(root):
    fill(root / "train")
    fill(root / "valid", classes=("cat", "emu"))
    return rf"the class 'emu' is in {root}/valid only: {root}/train has cat, dog$"


def other_names_of_parts(root):
    fill(root / "training")
    fill(root / "Test")
    return rf"{root} holds Test, training, which looks like a part of the data .* train='training', valid='Test'"


def a_text(root):
    (root / "dog" / "03.png").write_text("no picture")
    return rf"{root}/dog/03\.png is not an image"


def an_empty_file(root):
    (root / "dog" / "03.png").write_bytes(b"")
    return rf"{root}/dog/03\.png is not an image"


def cut_off(root):
    path = save(root / "cat" / "04.png", (64, 64))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1500])
    return rf"cannot read the image {path}: image file is truncated"


def pictures_of_a_phone(root):
    for name in ("IMG_1.HEIC", "IMG_2.HEIC"):
        (root / "cat" / name).write_bytes(b"\0\0\0\x18ftypheic")
    return rf"{root}/cat/IMG_1\.HEIC \(and 1 more files of this class\) is HEIC, which Pillow cannot read: export it"


@pytest.mark.table
@pytest.mark.parametrize("spoil", [no_folder, a_file, no_training_folder_of_that_name,
                                   no_training_folder, no_validation_folder, loose_pictures, nothing_at_all,
                                   one_class, one_folder_too_high, an_empty_class, a_class_without_pictures,
                                   a_class_only_in_validation, other_names_of_parts, a_text, an_empty_file, cut_off,
                                   pictures_of_a_phone])  # fmt: skip
def test_folders_that_cannot_be_used(spoil, root):
    says = spoil(root)
    says, options = says if isinstance(says, tuple) else (says, {})
    with pytest.raises(ValueError, match=says) as caught:
        quiet(root, **options)
    assert "\n" not in str(caught.value)
    hints = getattr(caught.value, "__notes__", [])
    is_broken = spoil in (a_text, an_empty_file, cut_off, pictures_of_a_phone)
    assert hints == ["skip_broken=True leaves out the files that cannot be read"] * is_broken


def test_a_folder_that_cannot_be_read_is_not_passed_over(root, monkeypatch):
    save(root / "cat" / "2024" / "a.png")
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("2024"):  # root, as whom tests may run, could read it whatever its permissions
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=rf"^cannot read the folder {root}/cat/2024: Permission denied$"):
        quiet(root)


def test_the_home_folder_may_be_a_tilde(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert quiet(f"~/{root.name}").classes == ["cat", "dog"]


def test_avif_is_read_if_pillow_can(root, monkeypatch):
    known = Image.registered_extensions()
    monkeypatch.setitem(known, ".avif", "PNG")
    path = save(root / "cat" / "a.png", level=200)
    path.rename(path.with_suffix(".avif"))
    dls = quiet(root)
    assert 200 in levels(dls.train) + levels(dls.valid)
    monkeypatch.delitem(known, ".avif")
    with pytest.raises(ValueError, match=r"a\.avif is AVIF, which Pillow reads from 11\.3 on: update it"):
        quiet(root)


@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_files_are_left_out_and_said(root, in_memory, capsys):
    for spoil in (a_text, cut_off, pictures_of_a_phone):
        spoil(root)
    dls = image_folders(root, skip_broken=True, in_memory=in_memory, num_workers=0, valid=0.5)
    assert len(dls.train.dataset) + len(dls.valid.dataset) == 18
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == ["left out, as no pictures: 2 files (IMG_1.HEIC, IMG_2.HEIC)",
                            "left out, as broken: 2 files (04.png, 03.png)"]
    assert len(dls.one_batch()[0]) == 8


@pytest.mark.parametrize("spoil", [a_text, cut_off])
def test_a_class_of_broken_files_only(spoil, root):
    spoil(root)
    (root / "emu").mkdir()
    (root / ("dog/03.png" if spoil is a_text else "cat/04.png")).rename(root / "emu" / "a.png")
    with pytest.raises(ValueError, match="no picture of the class 'emu' that it could be trained on can be read"):
        quiet(root, skip_broken=True)


def test_a_damaged_file_that_is_met_in_training_is_named(root):
    dls = quiet(root, in_memory=False, num_workers=0)
    path = dls.train.dataset.samples[3].path
    path.write_bytes(path.read_bytes()[:50])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 20, 2))
    learn = Learner(model, dls, torch.nn.CrossEntropyLoss(), verbose=False)
    with pytest.raises(ValueError, match=rf"cannot read the image {path}: ") as caught:
        learn.fit(1e-3)
    assert "skip_broken=True leaves out the files that cannot be read" in caught.value.__notes__


@pytest.mark.table
@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"size": "big"}, TypeError, r"size must be \(height, width\) in pixels, got 'big'"),
        ({"size": 0}, ValueError, "height must be an int >= 1 and <= 32768, got 0"),
        ({"size": True}, ValueError, "height must be an int >= 1 .*, got True"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1, got 0"),
        ({"valid": 1.5}, ValueError, r"valid must be a finite number > 0 and < 1, got 1.5 .*valid=0.2, or the name of"),
        ({"valid": True}, ValueError, "valid must be a finite number > 0 and < 1, got True"),
        ({"augment": "autos"}, ValueError, "augment must be one of 'auto', 'photos', 'small', 'symbols', got 'autos'"),
        ({"augment": 3}, TypeError, r"augment must be a function of a float batch .*, None or one of 'auto', .*got 3"),
        ({"resize": "fit"}, ValueError, "resize must be one of 'crop', 'squish', 'pad', got 'fit'"),
        ({"channels": 4}, ValueError, r"channels must be 1 \(grey\) or 3 \(RGB\), got 4"),
        ({"mean": [0.5] * 3}, ValueError, "mean and std belong together"),
        ({"mean": [0.5] * 2, "std": [1] * 2}, ValueError, r"channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"mean": 0.5, "std": 0.5}, TypeError, r"mean must be a number for each channel, got 0.5"),
        ({"mean": [124, 116, 103], "std": [58, 57, 57]}, ValueError,
         "mean must be a finite number >= 0 and <= 1, got 124 .*those of 0..255 are to be divided by 255, std too"),
        ({"max_size": 7}, ValueError, "max_size must be an int >= 8 and <= 32768, got 7"),
        ({"num_workers": -1}, ValueError, "num_workers must be an int >= 0, got -1"),
        ({"in_memory": 1}, TypeError, "in_memory must be True or False, got 1"),
        ({"skip_broken": 1}, TypeError, "skip_broken must be True or False, got 1"),
        ({"device": "gpu"}, ValueError, "device='gpu' cannot be used"),
        ({"seed": -1}, ValueError, "seed must be an int >= 0, got -1"),
        ({"train": 3}, TypeError, "train must be text, got 3"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_read(options, kind, says, tmp_path, monkeypatch):
    monkeypatch.setattr(from_folders, "find", lambda *args: pytest.fail("it has begun to look"))
    with pytest.raises(kind, match=says):
        quiet(tmp_path, **options)


def test_it_says_what_it_has_read(root, capsys, monkeypatch):
    monkeypatch.setattr(progress, "REFRESH", 0)
    quiet(root)
    assert capsys.readouterr() == ("", "")
    dls = image_folders(root)
    read, found = capsys.readouterr().out.splitlines()
    assert read.startswith("in memory: 16 + 4 samples, 0.0 MB on ")
    assert found == f"{dls!r}; validation: 20% of each class"
    assert dls.form == ImageForm.from_dict(dls.form.as_dict())


def test_where_nothing_can_be_held_back_it_says_so(tmp_path, capsys):
    fill(tmp_path, n=1)
    assert image_folders(tmp_path).valid is None
    assert capsys.readouterr().out.splitlines()[-1].endswith("; validation: none, as each class has one picture only")
