"""A VisionLearner predicts pictures, and what it exports does, too."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from minifast import EMA, Learner, export_info
from minifast.vision import Classifier, ImageForm, Prediction, VisionLearner, from_arrays, load_classifier
from minifast.vision import vision_learner as make_learner

Image = pytest.importorskip("PIL.Image")

COLOURS = {"blue": (30, 40, 200), "green": (40, 180, 50), "red": (220, 30, 40)}


def painted(n, side=16, seed=0):
    """Pictures in one of three colours with noise on them: uint8 (n, 3, side, side), and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % len(COLOURS)
    plain = torch.tensor(list(COLOURS.values()))[y].view(n, 3, 1, 1)
    noise = torch.randint(-30, 31, (n, 3, side, side), generator=generator)
    return (plain + noise).clamp(0, 255).to(torch.uint8), y


def dataloaders(channels=3, augment=None):
    (x, y), (valid_x, valid_y) = painted(48), painted(12, seed=1)
    return from_arrays(x[:, :channels], y, (valid_x[:, :channels], valid_y), classes=list(COLOURS), batch_size=12,
                       augment=augment)


def net(n_classes, channels=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, n_classes))


@pytest.fixture(scope="module")
def learn():
    learn = make_learner(dataloaders().normalized((0.4, 0.3, 0.4), (0.3, 0.2, 0.3)), net, seed=0, device="cpu",
                         verbose=False)
    learn.fit_one_cycle(6, 2e-2)
    assert learn.validate()["accuracy"] == 1
    return learn


@pytest.fixture
def array():
    """A red picture of another size, uint8 (height, width, 3)."""
    return np.full((30, 24, 3), COLOURS["red"], dtype=np.uint8)


@pytest.fixture
def file(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "some.png")
    return tmp_path / "some.png"


# ---- predict


def test_a_picture_in_any_form_gives_class_and_probabilities(learn, array, file):
    pictures = {"path": file, "text": str(file), "Pillow": Image.open(file), "array": array,
                "tensor": torch.from_numpy(array).permute(2, 0, 1), "RGBA": Image.open(file).convert("RGBA")}
    found = {name: learn.predict(picture) for name, picture in pictures.items()}
    first = found["path"]
    assert type(first) is Prediction
    assert first.label == "red"
    assert first.probability == max(first.probabilities.values()) > 0.5
    assert list(first.probabilities) == list(COLOURS)
    assert sum(first.probabilities.values()) == pytest.approx(1)
    assert {name for name, prediction in found.items() if prediction != first} == set()


def test_it_is_the_softmax_of_what_get_preds_gives(learn):
    x, _ = painted(12, seed=1)
    preds, targets = learn.get_preds()
    found = learn.predict(list(x))
    assert [prediction.label for prediction in found] == [list(COLOURS)[i] for i in targets]
    shares = torch.tensor([list(prediction.probabilities.values()) for prediction in found])
    torch.testing.assert_close(shares, preds.softmax(1))
    assert learn.predict(x) == found  # a uint8 batch is several pictures
    assert [prediction.label for prediction in learn.predict(tuple(x[:2]))] == ["blue", "green"]
    assert learn.predict([]) == []


def test_floats_are_a_batch_of_inputs(learn):
    x = learn.form.normalize(painted(4)[0])
    raw = learn.predict(x)
    assert raw.shape == (4, 3)
    torch.testing.assert_close(raw, Learner.predict(learn, x))
    with pytest.raises(ValueError, match=r"must be a batch of .*, got float32 \(3, .*as uint8, or x\[None\]"):
        learn.predict(x[0])


def test_more_pictures_than_fit_in_a_batch(learn):
    x, y = painted(150, seed=3)
    labels = [prediction.label for prediction in learn.predict(x)]
    assert labels == [list(COLOURS)[i] for i in y]
    sizes = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    Classifier(model, learn.form, learn.classes)(x)
    assert sum(sizes) == 150
    assert max(sizes) <= 64


def test_what_is_no_picture(learn, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no picture .*missing\.jpg$"):
        learn.predict(tmp_path / "missing.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.jpg is not an image"):
        learn.predict([tmp_path / "text.jpg"])
    with pytest.raises(TypeError):
        learn.predict(3)


def test_predictions_are_those_of_the_average_and_leave_the_model_as_it_was(array):
    ema = EMA(decay=0.5)
    learn = make_learner(dataloaders(), net, seed=0, device="cpu", verbose=False, callbacks=[ema])
    learn.fit(0.1, 1)
    learn.model.train()
    own = learn.predict(array)
    with ema.swapped(learn.model):
        swapped = {name: value.clone() for name, value in learn.model.state_dict().items()}
    assert learn.model.training
    twin = net(3)
    twin.load_state_dict(swapped)
    assert own.probability == pytest.approx(Classifier(twin.eval(), learn.form, learn.classes)(array).probability)


def test_classes_and_form_stay_the_models_own(learn, array):
    before = learn.predict(array)
    with learn.sandbox():  # in which the loaders are bare ones
        assert learn.predict(array) == before


def test_pictures_that_replace_dls_are_normalised_as_the_models_were(array):
    learn = make_learner(dataloaders().normalized((0.4, 0.3, 0.4), (0.3, 0.2, 0.3)), net, seed=0, device="cpu",
                         verbose=False)
    (x, y), (valid_x, valid_y) = painted(24), painted(12, side=20, seed=1)
    learn.dls = from_arrays(x, y, (valid_x[..., :16, :16], valid_y), classes=list(COLOURS), augment=None)
    assert learn.dls.form == learn.form == ImageForm((16, 16), 3, (0.4, 0.3, 0.4), (0.3, 0.2, 0.3))
    learn.fit(1e-2, 1)
    learn.dls = from_arrays(valid_x, valid_y, (valid_x, valid_y), classes=list(COLOURS))  # larger ones
    assert learn.form == ImageForm((20, 20), 3, (0.4, 0.3, 0.4), (0.3, 0.2, 0.3))
    preds, _ = learn.get_preds()
    shares = torch.tensor([list(prediction.probabilities.values()) for prediction in learn.predict(valid_x)])
    torch.testing.assert_close(shares, preds.softmax(1))


def test_a_test_set_is_normalised_as_the_models_pictures_were(learn):
    x, y = painted(12, seed=5)
    other = from_arrays(x // 4, y, (x // 4, y), classes=list(COLOURS), augment=None)
    own = other.valid.batch_transform
    preds, _ = learn.get_preds(other.valid)
    torch.testing.assert_close(preds, Learner.predict(learn, learn.form.normalize(x // 4)))
    loss = nn.functional.cross_entropy(preds, y).item()
    assert learn.validate(other.valid)["valid_loss"] == pytest.approx(loss, rel=1e-4)
    several = learn.validate({"dark": other.valid, "own": learn.dls.valid})
    assert several["dark_valid_loss"] == pytest.approx(loss, rel=1e-4)
    assert other.valid.batch_transform is own


def test_pictures_of_other_classes_do_not_replace_dls(learn):
    (x, y), before = painted(12), learn.dls
    with pytest.raises(ValueError, match=r"^the model is one of blue, green, red, and dls has the classes red, green,"):
        learn.dls = from_arrays(x, y, (x, y), classes=["red", "green", "blue"])
    with pytest.raises(ValueError, match=r"^the model takes pictures of 3 channel\(s\), and dls has 1"):
        learn.dls = from_arrays(x[:, :1], y, (x[:, :1], y), classes=list(COLOURS))
    assert learn.dls is before


def test_what_is_printed(learn):
    assert repr(learn) == "VisionLearner: Sequential, 339 parameters in 2 layer groups (stem, head), on cpu"
    shares = dict(zip("abcdefg", (0.1, 0.3, 0.2, 0.04, 0.06, 0.1, 0.2), strict=True))
    assert str(Prediction("b", 0.3, shares)) == ("Prediction: b 0.3000, c 0.2000, g 0.2000, a 0.1000, f 0.1000 "
                                                 "and 2 more")


def test_outputs_that_are_not_one_for_each_class(array):
    learn = VisionLearner(net(4), dataloaders(), nn.CrossEntropyLoss(), verbose=False, device="cpu")
    with pytest.raises(ValueError, match=r"the model gives \(1, 4\) for 1 picture\(s\), and there are 3 classes"):
        learn.predict(array)


# ---- export


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_an_exported_program_predicts_the_same(tmp_path, array, file, channels):
    learn = make_learner(dataloaders(channels), lambda n: net(n, channels), seed=0, device="cpu", verbose=False)
    learn.fit_one_cycle(1, 1e-2)
    path = learn.export(tmp_path / "model.pt2", metadata={"author": "me"})
    info = export_info(path)
    assert info["labels"] == list(COLOURS)
    assert info["metadata"] == {"author": "me", "image": learn.form.as_dict()}
    assert info["inputs"]["shape"] == ["n", channels, 16, 16]
    with pytest.raises(ValueError, match=r"model.pt2 is a program: .* pass trusted=True"):
        load_classifier(path)
    classifier = load_classifier(path, trusted=True)
    assert classifier.form == learn.form
    assert repr(classifier) == "Classifier of 3 classes, pictures of 16 x 16 pixels"
    for picture in (file, str(file), Image.open(file), array):
        mine, theirs = classifier(picture), learn.predict(picture)
        assert type(mine) is Prediction
        assert mine.label == theirs.label
        assert mine.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
    assert [prediction.label for prediction in classifier([array] * 3)] == [learn.predict(array).label] * 3


def test_a_folder_of_weights_needs_the_model(learn, array, tmp_path):
    path = learn.export(tmp_path / "weights", labels=["b", "g", "r"])
    with pytest.raises(ValueError, match="holds weights, which need a model"):
        load_classifier(path)
    classifier = load_classifier(path, net(3))
    assert classifier(array).label == "r"
    assert classifier(array).probability == pytest.approx(learn.predict(array).probability, abs=1e-5)


def test_a_file_that_says_nothing_of_pictures(learn, tmp_path):
    path = Learner.export(learn, tmp_path / "bare", inputs=torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"bare holds no labels and no 'image', so it is a model but no classifier"):
        load_classifier(path, net(3))
    path = Learner.export(learn, tmp_path / "labelled", inputs=torch.zeros(2, 3, 16, 16), labels=list(COLOURS))
    with pytest.raises(ValueError, match=r"labelled holds no 'image', so"):
        load_classifier(path, net(3))
    path = Learner.export(learn, tmp_path / "bare", inputs=torch.zeros(2, 3, 16, 16),
                          metadata={"image": learn.form.as_dict()})
    with pytest.raises(ValueError, match=r"bare holds no labels, so"):
        load_classifier(path, net(3))
    path = learn.export(tmp_path / "whole")
    described = json.loads((path / "model.json").read_text())
    described["metadata"]["image"]["channels"] = 2
    (path / "model.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), got 2"):
        load_classifier(path, net(3))
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path / "missing.pt2")
    with pytest.raises(TypeError, match=r"path must be a path, got 3 \(int\)"):
        load_classifier(3)


def test_metadata_of_ones_own(learn, tmp_path):
    with pytest.raises(ValueError, match=r"metadata\['image'\] is where the form of a picture goes"):
        learn.export(tmp_path / "weights", metadata={"image": 1})
    with pytest.raises(TypeError, match="metadata must be a dict"):
        learn.export(tmp_path / "weights", metadata=[1])
    for labels in (["b", "g"], ["b", "g", "g"]):
        with pytest.raises(ValueError, match=r"^labels must be 3 different names, one for each class \(blue, gr"):
            learn.export(tmp_path / "weights", labels=labels)
    assert not Path(tmp_path / "weights").exists()


# ---- with the rest


def test_tta_augments_as_training_does():
    learn = make_learner(dataloaders(augment="small"), net, seed=0, device="cpu", verbose=False)
    learn.fit_one_cycle(3, 2e-2)
    plain, targets = learn.get_preds()
    preds, same = learn.tta(n=2)
    assert torch.equal(targets, same)
    assert not torch.equal(preds, plain)
    assert (preds - plain).abs().max() < 1  # the same pictures, moved by two pixels at most


def test_a_look_over_everything_finds_nothing(learn):
    assert learn.form == ImageForm((16, 16), 3, (0.4, 0.3, 0.4), (0.3, 0.2, 0.3))
    report = learn.check()
    assert report.exit_code == 0, str(report)


def test_one_class_is_nothing_to_learn():
    x, _ = painted(12)
    dls = from_arrays(x, torch.zeros(12, dtype=torch.int64), valid=None)
    with pytest.raises(ValueError, match=r"dls must have at least two classes, to be told apart, got \['0'\]"):
        make_learner(dls, net)
