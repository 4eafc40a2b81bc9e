"""Pictures as data: any picture in the form that a model takes, loaders of them, augmentation, exact resuming."""
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from minifast.vision import ImageForm


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
