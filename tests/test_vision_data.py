"""Pictures as data: any picture in the form that a model takes, loaders of them, augmentation, exact resuming."""
import json
import random
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from minifast import Learner, TensorLoader, accuracy
from minifast.data.feed import feed
from minifast.data.loader import in_order
from minifast.machine.signals import DeferredInterrupt
from minifast.vision import ImageForm, from_arrays, from_dataset
from minifast.vision.augment import BatchTransform, SmallCrops, SmallTurns, augmentation

CPU = torch.device("cpu")


def noise(size, mode="RGB", seed=0, low=0, high=256):
    """An image of Pillow's, (width, height), of random pixels."""
    pixels = np.random.default_rng(seed).integers(low, high, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# ---- the form of a picture


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path):
    picture = noise((9, 7))
    picture.save(tmp_path / "a.png")
    pixels = np.array(picture)
    form, expected = ImageForm((7, 9)), torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), picture, pixels, expected):
        read = form.read(given)
        assert read.dtype == torch.uint8
        assert torch.equal(read, expected)


def test_it_is_cropped_squished_or_padded():
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 200  # dark, light, dark
    read = {how: ImageForm((10, 10), 1, resize=how).read(pixels)[0].float() for how in ("crop", "squish", "pad")}
    assert read["crop"].unique().tolist() == [200]
    assert read["squish"][:, 0].max() == 0
    assert read["squish"][:, 5].min() > 190
    assert read["pad"][:3].max() == 0
    assert read["pad"][5, 5] > 190


def saved(picture, path, **options):
    picture.save(path, **options)
    return path


def cmyk(folder):
    return saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), folder / "a.jpg", quality=100), (0, 255, 255)


def rgba(folder):
    return saved(Image.new("RGBA", (8, 8), (10, 20, 30, 128)), folder / "a.png"), (10, 20, 30)


def grey_and_alpha(folder):
    return saved(Image.new("LA", (8, 8), (40, 128)), folder / "a.png"), (40, 40, 40)


def palette(folder):
    image = Image.new("P", (8, 8))
    image.putpalette([200, 190, 210, 0, 0, 0])
    return saved(image, folder / "a.png"), (200, 190, 210)


def transparent_palette(folder):
    image = Image.new("P", (8, 8))
    image.putpalette([200, 190, 210, 0, 0, 0])
    return saved(image, folder / "a.png", transparency=b"\x80\xff"), (200, 190, 210)


def sixteen_bits(folder):
    return saved(Image.fromarray(np.full((8, 8), 128 * 256 + 7, dtype=np.uint16)), folder / "a.png"), (128,) * 3


def thirty_two_bits(folder):
    return saved(Image.fromarray(np.full((8, 8), 50 * 256, dtype=np.int32)), folder / "a.tif"), (50,) * 3


def floats(folder):
    return saved(Image.fromarray(np.full((8, 8), 0.2, dtype=np.float32)), folder / "a.tif"), (51,) * 3


def black_and_white(folder):
    return saved(Image.new("1", (8, 8), 1), folder / "a.png"), (255,) * 3


def animated(folder):
    frames = [Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8))]
    return saved(frames[0], folder / "a.gif", save_all=True, append_images=frames[1:]), (255, 0, 0)


@pytest.mark.table
@pytest.mark.parametrize("make", [cmyk, rgba, grey_and_alpha, palette, transparent_palette, sixteen_bits,
                                  thirty_two_bits, floats, black_and_white, animated])  # fmt: skip
def test_every_kind_of_file_becomes_rgb_and_grey(make, tmp_path):
    path, color = make(tmp_path)
    read = ImageForm((8, 8)).read(path)
    assert (read.float() - torch.tensor(color).reshape(3, 1, 1)).abs().max() <= 3, "JPEG is lossy"
    grey = ImageForm((8, 8), 1).read(path)
    luma = sum(part * weight for part, weight in zip(color, (0.299, 0.587, 0.114), strict=True))
    assert (grey[0].float() - luma).abs().max() <= 3


def test_a_photo_is_upright(tmp_path):
    photo = Image.fromarray(np.repeat(np.uint8([[0], [255]]), 10, axis=0).repeat(20, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = saved(photo, tmp_path / "a.jpg", exif=exif, quality=100)
    read = ImageForm((20, 20), 1).read(path)
    assert read[0, 0].min() > 250
    assert read[0, -1].max() < 5


def test_a_large_photo_is_decoded_small_and_looks_the_same(tmp_path):
    gradient = np.linspace(0, 255, 1600).astype(np.uint8)[None].repeat(1200, axis=0)
    path = saved(Image.fromarray(gradient), tmp_path / "a.jpg")
    read = ImageForm((30, 40), 1).read(path)[0].float()
    assert (read - torch.linspace(3, 252, 40)).abs().max() < 3
    for factor in (2, 3, 9):  # decoded at full size, at full size, at a quarter
        fine = noise((5 * 40, 5 * 30), seed=factor).resize((40 * factor, 30 * factor), Image.Resampling.BICUBIC)
        path = saved(fine, tmp_path / "b.jpg", quality=95)
        with Image.open(path) as image:
            whole = ImageForm((30, 40)).read(image)
        assert (ImageForm((30, 40)).read(path).float() - whole.float()).abs().mean() < 2


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    form = ImageForm((8, 8))
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png is not an image$"):
        form.read(tmp_path / "text.png")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"IMG_1\.HEIC is HEIC, which Pillow cannot read: export it as JPEG"):
        form.read(tmp_path / "IMG_1.HEIC")
    path = saved(noise((64, 64)), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"cannot read the image .*cut\.jpg: image file is truncated"):
        form.read(path)
    with pytest.raises(ValueError, match=r"cannot read the image .*gone\.jpg: No such file or directory"):
        form.read(tmp_path / "gone.jpg")


@pytest.mark.parametrize(
    ("picture", "kind", "says"),
    [
        (3, TypeError, r"a picture must be a path, an image of Pillow's, .*, got 3 \(int\)"),
        (torch.zeros(3, 8, 8), ValueError, r"uint8 of shape \(channels, height, width\) .*, got float32 \(3, 8, 8\)"),
        (np.zeros((8, 8, 2), np.uint8), ValueError, r"with 1, 3 or 4 channels, got uint8 \(8, 8, 2\)"),
        (np.zeros(8, np.uint8), ValueError, r"uint8 of shape \(height, width\) or .*, got uint8 \(8,\)"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), ValueError, r"got uint8 \(3, 0, 8\)"),
    ],
)
def test_what_is_no_picture_is_refused(picture, kind, says):
    with pytest.raises(kind, match=says):
        ImageForm((8, 8)).read(picture)


def test_normalize():
    form = ImageForm((2, 2), mean=(0.1, 0.2, 0.3), std=(1, 0.5, 0.25))
    images = torch.full((4, 3, 2, 2), 255, dtype=torch.uint8)
    expected = torch.tensor([0.9, 1.6, 2.8]).reshape(3, 1, 1).expand(3, 2, 2)
    for given in (images, images.float() / 255):
        torch.testing.assert_close(form.normalize(given), expected.expand(4, 3, 2, 2))
    torch.testing.assert_close(form.normalize(images[0]), expected)
    assert images.min() == 255, "the pictures themselves stay"
    assert ImageForm((2, 2)).normalize(images).unique().tolist() == [1]
    with pytest.raises(ValueError, match=r"of shape \(n, 3, height, width\), got \(4, 1, 2, 2\)"):
        form.normalize(images[:, :1])


def test_a_form_goes_through_json():
    form = ImageForm((5, 6), 1, mean=[0.5], std=[np.float32(0.25)], resize="pad")
    again = ImageForm.from_dict(json.loads(json.dumps(form.as_dict())))
    assert again == form
    assert hash(again) == hash(form)
    with pytest.raises(ValueError, match=r"must be a dict with channels, mean, resize, size, std, got \{'size': 3\}"):
        ImageForm.from_dict({"size": 3})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": (8, 8, 3)}, r"size must be \(height, width\) in pixels, got \(8, 8, 3\)"),
        ({"size": (0, 8)}, "height must be an int >= 1 and <= 32768, got 0"),
        ({"channels": 4}, r"channels must be 1 \(grey\) or 3 \(RGB\), got 4"),
        ({"mean": (0.5,), "std": (0.5,)}, "a number for each of 3 channels, got 1 and 1"),
        ({"mean": (0.5,) * 3}, "a number for each of 3 channels, got 3 and 0"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0, 1)}, "std must be a finite number > 0, got 0"),
        ({"resize": "fit"}, "resize must be one of 'crop', 'squish', 'pad', got 'fit'"),
    ],
)
def test_forms_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        ImageForm(**{"size": (8, 8)} | options)


def test_no_file_stays_open(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageForm((8, 8)).read(saved(noise((8, 8)), tmp_path / "a.png"))
    (tmp_path / "a.png").unlink()


# ---- loaders of arrays and of data sets


def arrays(n=24, size=(8, 8), channels=3, classes=3, seed=0):
    """uint8 (n, height, width, channels) of noise around a level that tells the class, and the classes."""
    generator, labels = np.random.default_rng(seed), np.arange(n) % classes
    images = 60 * labels[:, None, None, None] + generator.integers(0, 60, (n, *size, channels))
    return images.astype(np.uint8), labels


def test_arrays_in_every_layout():
    images, labels = arrays()
    for given in (images, torch.from_numpy(images).permute(0, 3, 1, 2)):
        for own in (labels, torch.from_numpy(labels), labels.tolist(), labels.astype(np.uint8)):
            dls = from_arrays(given, own, (given, own))
            assert torch.equal(dls.train.tensors[0], torch.from_numpy(images).permute(0, 3, 1, 2))
            assert dls.valid.tensors[1].tolist() == labels.tolist()
            assert dls.valid.tensors[1].dtype == torch.int64
    assert repr(dls) == "24 training and 24 validation pictures of 3 classes (0, 1, 2), 8x8 pixels, colour"
    grey = from_arrays(images[..., 0], labels, None, classes=["a", "b", "c", "d"])
    assert repr(grey) == "24 training pictures of 4 classes (a, b, c, d), 8x8 pixels, grey"
    assert grey.valid is None
    assert torch.equal(from_arrays(torch.from_numpy(images[..., 0]), labels, None).train.tensors[0],
                       grey.train.tensors[0])
    rgba = np.concatenate([images, images[..., :1]], axis=-1)
    assert torch.equal(from_arrays(rgba, labels, None).train.tensors[0], dls.train.tensors[0])
    assert from_arrays(images, labels, size=6, channels=1).train.tensors[0].shape[1:] == (1, 6, 6)


def test_a_share_of_each_class_is_held_back():
    images, labels = arrays(30)
    dls = from_arrays(images, labels, 0.2)
    assert dls.valid.tensors[1].bincount().tolist() == [2, 2, 2]
    assert len(dls.train.dataset) == 24
    again = from_arrays(images, labels, 0.2)
    assert torch.equal(dls.valid.tensors[0], again.valid.tensors[0])
    assert not torch.equal(from_arrays(images, labels, 0.2, seed=1).valid.tensors[0], again.valid.tensors[0])


TWO = np.zeros((2, 8, 8), np.uint8)


@pytest.mark.table
@pytest.mark.parametrize(
    ("args", "kind", "says"),
    [
        (([1], [0]), TypeError, r"images must be a uint8 array or tensor of pictures, got \[1\]"),
        ((np.zeros((2, 8, 8)), [0, 1]), ValueError, r"uint8 of shape \(n, height, width\) or .*, got float64 \(2, 8"),
        ((np.zeros((2, 8, 8, 2), np.uint8), [0, 1]), ValueError, r"got uint8 \(2, 8, 8, 2\)"),
        ((np.zeros((0, 8, 8), np.uint8), []), ValueError, r"got uint8 \(0, 8, 8\)"),
        ((TWO, [0.5, 1]), ValueError, r"labels must be 2 class numbers, .* got \[0.5, 1\]"),
        ((TWO, ["a", "b"]), ValueError, r"labels must be 2 class numbers, .* got \['a', 'b'\]"),
        ((TWO, [0]), ValueError, r"labels must be 2 class numbers, one for each .* got \[0\]"),
        ((TWO, np.zeros((2, 3))), ValueError, r"labels must be 2 class numbers, .* got float64 \(2, 3\)\.$"),
        ((TWO, np.array(["b", "a"])), ValueError, r"got <U1 \(2,\)\. Names: classes, labels = np\.unique\("),
        ((np.zeros((2, 3, 8, 8), np.uint8), [0, 1]), ValueError, r"3, 8, 8\)\. Pass x\.transpose\(0, 2, 3, 1\)\.$"),
        ((torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [0, 1]), ValueError, r"\. Pass x\.permute\(0, 3, 1, 2\)\.$"),
        ((TWO, [1, 2], None), ValueError, r"no training picture has the class number 0, and the highest is 2\. Number"),
        ((TWO, [0, 10**15], None), ValueError, "no training picture has the class number 1, and the highest is 10000"),
        ((TWO, [0, 1], (TWO, [0, 2])), ValueError, "no training picture has the class number 2, and the highest is 2"),
        ((TWO, [0, 1]), ValueError, "of 2 samples none can be held back"),
        ((TWO, [0, 1], "valid"), TypeError, r"valid must be \(images, labels\), a share in 0..1 .* got 'valid'"),
        ((TWO, [0, -1], None), ValueError, "labels must be numbers from 0 to 0, .*got -1"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_used(args, kind, says):
    with pytest.raises(kind, match=says):
        from_arrays(*args)


def test_names_may_be_of_more_classes_than_there_are_pictures():
    assert from_arrays(TWO, [2, 2], None, classes=["a", "b", "c", "d"]).classes == ["a", "b", "c", "d"]


def test_labels_beyond_the_names():
    images, labels = arrays()
    with pytest.raises(ValueError, match="from 0 to 1, as there are 2 classes, got 2"):
        from_arrays(images, labels, classes=["a", "b"])
    with pytest.raises(TypeError, match="classes must be a list of names, got 'ab'"):
        from_arrays(images, labels, classes="ab")


class Photos(Dataset):
    """As a data set of torchvision's: images of Pillow's, `.classes` and `.targets`."""

    classes = ("ant", "bee", "cow")

    def __init__(self, n=30, transform=None, **options):
        self.data, self.targets = arrays(n, **options)
        self.transform = transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        picture = Image.fromarray(self.data[i])
        return picture if self.transform is None else self.transform(picture), int(self.targets[i])


def quiet(*args, **options):
    return from_dataset(*args, **{"verbose": False} | options)


def test_a_data_set_of_images():
    data = Photos()
    dls = quiet(data, Photos(6, seed=1))
    assert repr(dls) == "30 training and 6 validation pictures of 3 classes (ant, bee, cow), 8x8 pixels, colour"
    assert torch.equal(dls.train.tensors[0], torch.from_numpy(data.data).permute(0, 3, 1, 2))
    assert dls.train.tensors[1].tolist() == data.targets.tolist()
    part = quiet(Subset(data, [0, 1, 4]), size=5, augment=None)
    assert part.classes == ["ant", "bee", "cow"]
    assert part.train.tensors[0].shape == (3, 3, 5, 5)
    held = quiet(data, 0.2)
    assert held.valid.tensors[1].bincount().tolist() == [2, 2, 2]
    assert quiet(data, classes=["x", "y", "z"]).classes == ["x", "y", "z"]


def test_a_data_set_that_is_not_kept_in_memory():
    kept, read = quiet(Photos(), 0.2), quiet(Photos(), 0.2, in_memory=False, num_workers=0)
    assert kept.form == read.form
    assert read.classes == kept.classes
    assert isinstance(read.train, DataLoader)
    assert torch.equal(read.one_batch(train=False)[0], kept.one_batch(train=False)[0])
    bare = [(picture, label) for picture, label in Photos()]
    assert quiet(bare).classes == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"neither \.classes nor \.targets"):
        quiet(bare, in_memory=False)


def test_a_data_set_of_tensors_and_of_mixed_sizes():
    data = [(torch.zeros(1, 8 + i % 3, 9, dtype=torch.uint8), torch.tensor(i % 2)) for i in range(9)]
    assert quiet(data).form.size == (9, 9)
    assert quiet(data).form.channels == 1


def test_data_sets_that_disagree_about_their_classes():
    other = Photos(6)
    other.classes = ("bee", "ant", "cow")
    with pytest.raises(ValueError, match="class 0 is 'ant' in train and 'bee' in valid"):
        quiet(Photos(), other)
    other.classes = None
    assert quiet(Photos(), other).classes == ["ant", "bee", "cow"]


def random_flip(picture):
    return picture.transpose(0) if random.random() < 0.5 else picture


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (DataLoader([1]), TypeError, "train must be a data set, got a DataLoader"),
        ([], ValueError, "train is empty"),
        ([1, 2], TypeError, r"sample 0 of train must be \(picture, class number\), got 1"),
        ([("a.png", 0)], TypeError, r"its picture is 'a.png' \(str\)"),
        ([(np.zeros((8, 8), np.uint8), "cat")], ValueError, "sample 0 of train must have a class number .* got 'cat'"),
        ([(np.zeros((8, 8), np.uint8), 0.5)], ValueError, "a class number from 0, got 0.5"),
        (Photos(transform=lambda picture: torch.zeros(3, 8, 8)), ValueError,
         r"sample 0 of train holds float32 \(3, 8, 8\) and no uint8 picture: .* make it without ToTensor"),
        (Photos(transform=random_flip), ValueError, "train: sample 0 is another one each time it is read"),
    ],
)  # fmt: skip
def test_data_sets_that_cannot_be_used(data, kind, says):
    with pytest.raises(kind, match=says):
        quiet(data)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_file_that_a_data_set_cannot_read_is_named(in_memory, tmp_path):
    from torchvision.datasets import ImageFolder

    for i in range(10):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    path = tmp_path / "cat" / "7.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=rf"^cannot read sample \d+ of train \({path}\): "):
        quiet(ImageFolder(tmp_path), 0.2, in_memory=in_memory)


def test_one_batch_leaves_the_random_generators_as_they_were():
    for options in ({}, {"in_memory": False, "num_workers": 0}):
        dls = quiet(Photos(), 0.2, **options)
        torch.manual_seed(3)
        first, _ = dls.one_batch()
        again, y = dls.one_batch()
        assert torch.equal(first, again)
        assert (first.dtype, first.shape, y.shape) == (torch.float32, (8, 3, 8, 8), (8,))
        with closing(feed(dls.train, CPU, 1, DeferredInterrupt())) as batches:
            assert torch.equal(next(batches)[0], first), "it is what a fit would see now"
    with pytest.raises(ValueError, match="there is no validation data: pass train=True"):
        quiet(Photos()).one_batch(train=False)


def test_another_normalisation_shares_the_pictures():
    dls = quiet(Photos(), 0.2, augment=None)
    other = dls.normalized([0.0] * 3, [1 / 255] * 3)
    assert other.train.tensors[0].data_ptr() == dls.train.tensors[0].data_ptr()
    assert torch.equal(other.one_batch(train=False)[0].round().byte(), other.valid.tensors[0])
    assert other.form.std == (1 / 255,) * 3
    assert dls.form.std != other.form.std
    assert other.classes == dls.classes
    assert quiet(Photos()).normalized((), ()).valid is None
    with pytest.raises(TypeError, match=r"mean must be a list of numbers, got 0\.5"):
        dls.normalized(0.5, 0.5)


# ---- augmentation


def test_the_augmentation_that_is_chosen():
    assert augmentation("auto", ImageForm((64, 64))) == SmallCrops()
    assert augmentation("auto", ImageForm((400, 400), 1)) == SmallTurns()
    assert "RandomResizedCrop(size=(64, 65)" in repr(augmentation("auto", ImageForm((64, 65))))
    assert augmentation("symbols", ImageForm((8, 8))) == SmallTurns()
    assert augmentation(None, ImageForm((8, 8))) is None
    assert augmentation(torch.flip, ImageForm((8, 8))) is torch.flip


@pytest.mark.parametrize("name", ["photos", "small", "symbols"])
def test_each_picture_of_a_batch_gets_numbers_of_its_own(name):
    augment = augmentation(name, ImageForm((16, 24)))
    picture = torch.rand(3, 16, 24)
    batch = picture.expand(32, 3, 16, 24).clone()
    torch.manual_seed(0)
    first = augment(batch)
    assert first.shape == batch.shape
    assert (first >= 0).all()
    assert (first <= 1).all()
    assert len({row.numpy().tobytes() for row in first}) > 15
    assert torch.equal(batch, picture.expand_as(batch)), "the batch itself stays"
    torch.manual_seed(0)
    assert torch.equal(augment(batch), first)


def test_small_pictures_are_moved_and_mirrored():
    picture = torch.arange(64.0).reshape(1, 1, 8, 8).div(64)
    padded = nn.functional.pad(picture, (1, 1, 1, 1), mode="reflect")
    places = {tuple(padded[0, 0, y:y + 8, x:x + 8].flatten().tolist()) for y in range(3) for x in range(3)}
    places |= {tuple(padded.flip(-1)[0, 0, y:y + 8, x:x + 8].flatten().tolist()) for y in range(3) for x in range(3)}
    found = {tuple(row.flatten().tolist()) for row in SmallCrops()(picture.expand(400, 1, 8, 8))}
    assert found == places
    assert SmallCrops()(torch.rand(3, 1, 1, 1)).shape == (3, 1, 1, 1)


def test_symbols_are_turned_as_they_should():
    level, upright = torch.zeros(2, 1, 33, 65)
    level[0, 16, 4:60] = upright[0, 2:30, 32] = 1  # lines through the middle
    for line, is_level in ((level, True), (upright, False)):
        assert torch.allclose(SmallTurns(0, 0, 0)(line[None])[0], line, atol=1e-5)
        angles = []
        for turned in SmallTurns(degrees=20, shift=0, zoom=0)(line.expand(200, 1, 33, 65)):
            along, across = (turned[0] > 0.3).nonzero().T.numpy()[::-1 if is_level else 1]
            angles.append(np.degrees(np.arctan(np.polyfit(along, across, 1)[0])))
        assert min(angles) < -15
        assert max(angles) > 15
        assert max(map(abs, angles)) < 21, "degrees are those of the picture, however wide it is"
    moved = SmallTurns(degrees=0, shift=0.25, zoom=0)(torch.ones(50, 1, 8, 8))
    torch.testing.assert_close(moved, torch.ones(50, 1, 8, 8))  # what is missing has the colour of the edge


def test_a_function_of_ones_own_gets_the_whole_batch():
    seen = []

    def darker(batch):
        seen.append((batch.shape, batch.dtype, float(batch.min()) >= 0, float(batch.max()) <= 1))
        return batch * 0

    dls = from_arrays(*arrays(), augment=darker)
    x, _ = dls.one_batch()
    assert seen == [((8, 3, 8, 8), torch.float32, True, True)]
    expected = -torch.tensor(dls.form.mean) / torch.tensor(dls.form.std)
    torch.testing.assert_close(x[0, :, 0, 0], expected)  # normalised after it
    assert dls.one_batch(train=False)[0].std() > 0


def test_an_augmentation_that_gives_no_batch():
    dls = from_arrays(*arrays(), augment=lambda batch: batch[0])
    with pytest.raises(TypeError, match=r"float batch \(8, 3, 8, 8\) .* must give one with .*\(3, 8, 8\)") as error:
        dls.one_batch()
    assert "in the batch_transform of the data, called with (uint8 (8, 3, 8, 8), int64 (8,))" in error.value.__notes__


def test_an_augmentation_of_one_picture_is_explained():
    def to_tensor(picture):
        raise TypeError(f"pic should be PIL Image or ndarray. Got {type(picture)}")

    dls = from_arrays(*arrays(), augment=to_tensor)
    with pytest.raises(TypeError, match="pic should be PIL Image") as error:
        dls.one_batch()
    assert any("in augment=, which is called with a float batch (8, 3, 8, 8) in 0..1, not with one picture" in note
               for note in error.value.__notes__)


# ---- the batch_transform of a loader


def model(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, 3))  # fmt: skip


def learner(dls, callbacks=(), **options):
    torch.manual_seed(0)
    return Learner(model(), dls, nn.CrossEntropyLoss(), metrics=[accuracy], device="cpu", verbose=False, seed=1,
                   callbacks=callbacks, **options)


def test_training_augments_and_nothing_else_does():
    calls = []

    def augment(batch):
        calls.append(len(batch))
        return batch.flip(-1)

    dls = from_arrays(*arrays(48), 0.25, augment=augment, batch_size=8)
    learn = learner(dls)
    learn.fit(1e-2, 2)
    assert calls == [8, 8, 8, 8, 4] * 2
    calls.clear()
    raw = torch.cat([dls.train.tensors[0]])
    preds, targets = learn.get_preds(dls.train)
    learn.validate(dls.train)
    learn.validate()
    assert calls == []
    assert torch.equal(targets, dls.train.tensors[1])
    torch.testing.assert_close(preds, learn.predict(dls.form.normalize(raw)))


def test_all_that_looks_at_the_data_sees_it_as_the_model_does():
    for options in ({}, {"in_memory": False, "num_workers": 0}):
        learn = learner(quiet(Photos(), 0.2, **options))
        assert learn.check()
        assert len(learn.overfit(3)) == 3
        assert "Conv2d" in str(learn.summary())
        assert learn.lr_find(num_it=10).lrs.size
        assert len(learn.trace(2)) > 10
        assert learn.profile(2).seconds > 0


def test_it_comes_after_the_batch_is_on_the_device():
    loader = TensorLoader(torch.arange(6), batch_size=3)
    loader.batch_transform = lambda batch: (batch[0].to(torch.float16), batch[0].device.type)
    for device in (CPU, torch.device("meta")):
        with closing(feed(loader, device, None, DeferredInterrupt())) as batches:
            assert [(x.dtype, place) for x, place in batches] == [(torch.float16, device.type)] * 2


def test_copies_in_order_keep_it_but_not_the_augmentation():
    transform = BatchTransform(ImageForm((8, 8)), SmallCrops())
    x, y = torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.arange(9)
    data = torch.utils.data.TensorDataset(x, y)
    for loader in (TensorLoader(x, y, shuffle=True), TensorLoader(x, y), DataLoader(data, shuffle=True),
                   DataLoader(data), DataLoader(data, sampler=[3, 1])):  # fmt: skip
        loader.batch_transform = transform
        ordered = in_order(loader)
        assert ordered.batch_transform is transform.plain
        assert ordered.batch_transform.augment is None
        assert loader.batch_transform is transform
        assert in_order(ordered) is ordered
        assert type(ordered) is type(loader)
    loader.batch_transform = abs  # of another kind: it stays
    assert in_order(loader) is loader


def test_tta_augments_with_the_training_loaders_transform():
    dls = from_arrays(*arrays(24), augment=lambda batch: batch.flip(-1), batch_size=8)
    learn = learner(dls)
    learn.fit(1e-2)
    plain, _ = learn.get_preds()
    flipped = learn.predict(dls.form.normalize(dls.valid.tensors[0].flip(-1)))
    preds, targets = learn.tta(n=2, beta=0.25)
    torch.testing.assert_close(preds, 0.25 * plain + 0.75 * flipped)
    assert torch.equal(targets, dls.valid.tensors[1])
    read = quiet(Photos(), 0.2, in_memory=False, num_workers=0, augment=lambda batch: batch.flip(-1))
    assert learn.tta(read.valid, beta=1)[0].shape == (6, 3)
    with pytest.raises(ValueError, match=r"the data of tta \(list\) has none: its batches are of another kind"):
        learn.tta([(torch.zeros(2, 3, 8, 8), torch.zeros(2))])


# ---- looking at them


def drawn(figure):
    """(title, pixels) of each picture."""
    return [(ax.get_title(), ax.images[0].get_array()) for ax in figure.axes]


def test_a_batch_is_shown_with_the_names_of_its_classes():
    data = Photos()
    dls = quiet(data, 0.2)
    shown = drawn(dls.show_batch(4, train=False))
    raw, rows = dls.valid.tensors[0].permute(0, 2, 3, 1), (0, 1, 3, 4)  # of six, evenly spaced
    for i, (title, pixels) in zip(rows, shown, strict=True):
        assert title == data.classes[dls.valid.tensors[1][i]]
        assert np.abs(pixels.astype(int) - raw[i].numpy()).max() <= 1, "without the normalisation"
    assert len(drawn(dls.show_batch(100, train=False))) == 6
    assert len(drawn(dls.show_batch(100))) == 8, "no more than a batch"
    bright = quiet(data, augment=lambda batch: batch * 0 + 1)
    assert all(pixels.min() == 255 for _, pixels in drawn(bright.show_batch(3))), "augmented, as it is trained on"
    with pytest.raises(ValueError, match="n must be an int >= 1, got 0"):
        dls.show_batch(0)
    with pytest.raises(ValueError, match="there is no validation data"):
        bright.show_batch(train=False)


def test_it_is_drawn_on_a_figure_that_is_given():
    from matplotlib.figure import Figure
    figure = Figure()
    assert from_arrays(*arrays(channels=1)).show_batch(2, figure=figure) is figure
    assert [title for title, _ in drawn(figure)] != []


def test_a_class_number_beyond_all_reason_is_refused():
    picture = np.zeros((8, 8), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"without gaps, got 1000000000 with fewer pictures. Pass classes="):
        from_dataset([(picture, 0), (picture, 10**9)] * 5, 0.2, verbose=False)
