"""Architectures of torchvision: their head, their layer groups, their weights from torch's cache."""
from operator import attrgetter
from urllib.error import URLError

import pytest
import torch
from helpers import tiers
from torch import nn

from minifast import Learner
from minifast.vision import ImageForm, from_arrays, layer_groups, vision_learner
from minifast.vision.architectures import image_model


def models():
    """torchvision.models, which is not imported while tests are collected: that would take seconds of every run."""
    from torchvision import models

    return models


class Late(str):
    """The name of something in torchvision.models, in a table."""

    def get(self):
        return attrgetter(self)(models())

STAGES = [f"stage {i}" for i in range(1, 6)]
# by hand, from the papers: where each family halves the picture
GROUPS = {
    "resnet18": ["stem", *STAGES[:4], "head"],
    "resnext50_32x4d": ["stem", *STAGES[:4], "head"],
    "regnet_x_400mf": ["stem", *STAGES[:4], "head"],
    "efficientnet_b0": ["stem", *STAGES, "head"],
    "efficientnet_v2_s": ["stem", *STAGES, "head"],
    "convnext_tiny": ["stem", *STAGES[:4], "head"],
    "mobilenet_v2": ["stem", *STAGES, "head"],
    "mobilenet_v3_small": ["stem", *STAGES[:4], "linear", "head"],
    "vit_b_16": ["stem", *STAGES[:4], "head"],
    "swin_t": ["stem", *STAGES[:4], "head"],
    "swin_v2_t": ["stem", *STAGES[:4], "head"],
    "vgg11_bn": ["stem", *STAGES[:4], "linear", "head"],
    "densenet121": ["stem", *STAGES[:4], "head"],
    "shufflenet_v2_x0_5": ["stem", *STAGES[:3], "head"],
    "mnasnet0_5": ["stem", *STAGES[:4], "head"],
    "squeezenet1_1": ["stem", *STAGES[:3], "head"],
    "alexnet": ["stem", *STAGES[:2], "linear", "head"],
    "maxvit_t": ["stem", *STAGES[:4], "linear", "head"],
    "googlenet": ["stem", *STAGES[:4], "head"],
    "inception_v3": ["stem", *STAGES[:4], "head"],
}


def pictures(n=8, channels=3, side=32, classes=("cat", "dog", "owl"), size=None):
    """Noise, as `ImageDataLoaders` without augmentation."""
    with torch.device("cpu"):
        x = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
        y = torch.arange(n) % len(classes)
        return from_arrays(x, y, (x, y), classes=list(classes), batch_size=4, augment=None)


def learner(arch, pretrained=False, channels=3, side=32, **options):
    return vision_learner(pictures(channels=channels, side=side), arch, pretrained, verbose=False, device="cpu",
                          **options)


def tiny(n_classes):
    """A model of one's own."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, n_classes))


@pytest.fixture
def blank(monkeypatch):
    """Models without values, for questions about their structure: made in no time."""
    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, lambda tensor, *args, **options: tensor)
    with torch.device("meta"):
        yield


# ---- layer groups


@pytest.mark.parametrize("arch", tiers(GROUPS, quick=["resnet18", "regnet_x_400mf", "convnext_tiny", "vgg11_bn"]))
def test_groups_of_each_family(blank, arch):
    extra = {"aux_logits": False, "init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if arch.startswith("regnet") else "meta"):  # it computes with values to find its widths
        model = models().get_model(arch, num_classes=3, **extra)
    groups = layer_groups(model)
    assert list(groups) == GROUPS[arch]
    claimed = [id(p) for group in groups.values() for p in group]
    assert sorted(claimed) == sorted(id(p) for p in model.parameters())
    order = {id(p): i for i, p in enumerate(model.parameters())}
    in_first_layers = [min(order[id(p)] for p in group) for group in groups.values()]
    assert in_first_layers == sorted(in_first_layers)
    assert {3} == {p.shape[0] for p in groups["head"]}


def test_the_groups_of_a_resnet_are_its_layers(blank):
    model = models().resnet18(num_classes=3)
    wanted = {"stem": [model.conv1, model.bn1], "stage 1": [model.layer1], "stage 2": [model.layer2],
              "stage 3": [model.layer3], "stage 4": [model.layer4], "head": [model.fc]}
    wanted = {name: [p for module in modules for p in module.parameters()] for name, modules in wanted.items()}
    found = layer_groups(model)
    assert {name: list(map(id, group)) for name, group in found.items()} == {
        name: list(map(id, group)) for name, group in wanted.items()}


def test_a_transformer_is_cut_into_four_and_its_tokens_go_with_the_stem(blank):
    model = models().vit_b_16()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {name: [names[id(p)] for p in group] for name, group in layer_groups(model).items()}
    assert sorted(groups["stem"]) == ["class_token", "conv_proj.bias", "conv_proj.weight", "encoder.pos_embedding"]
    for i in range(4):
        blocks = {name.split(".")[2] for name in groups[f"stage {i + 1}"] if "encoder_layer" in name}
        assert blocks == {f"encoder_layer_{k}" for k in range(3 * i, 3 * i + 3)}


def test_a_stage_of_swin_begins_where_patches_are_merged(blank):
    model = models().swin_t()
    names = {id(p): name for name, p in model.named_parameters()}
    first = [names[id(group[0])] for group in layer_groups(model).values()]
    assert first == ["features.0.0.weight", "features.1.0.norm1.weight", "features.2.reduction.weight",
                     "features.4.reduction.weight", "features.6.reduction.weight", "head.weight"]


def test_groups_of_a_model_of_ones_own_leave_it_as_it_was():
    model = nn.ModuleDict({"net": tiny(3)})["net"]
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn = Learner(model, ([(torch.randn(4, 3, 8, 8), torch.zeros(4).long())], None), nn.CrossEntropyLoss(),
                    splitter=layer_groups, verbose=False)
    assert learn.groups.names == ("stem", "head")
    assert [module.training for module in model] == [True, True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())


def test_a_wrapped_model_is_opened_and_a_model_without_a_linear_layer_is_one_group():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(8, 3), Body()  # the head is defined first

        def forward(self, x):
            return self.head(self.body(x).mean((2, 3)))

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.one = nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(3, 8, 3, stride=2)  # the last one first

        def forward(self, x):
            return self.two(self.one(x))

    model = Wrapper()
    groups = layer_groups(model)
    assert list(groups) == ["stem", "stage 1", "head"]
    assert groups["stage 1"][0] is model.body.two.weight
    assert list(layer_groups(nn.BatchNorm2d(3))) == ["model"]


def test_a_model_that_takes_one_size_only_or_looks_at_values():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2 * 36, 3)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.out(x.flatten(1)) if float(x.sum()) < 1e9 else x

    model = Looks()
    assert list(layer_groups(model, 1, (8, 8))) == ["stem", "head"]
    assert model.norm.num_batches_tracked == 0
    assert model.norm.running_mean.tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer_groups(Looks(), 1, (9, 9))


# ---- head and stem


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_freeze_slice_and_fine_tune_work_at_once(arch):
    learn = learner(arch, seed=0, side=40)
    names = learn.groups.names
    assert names[0] == "stem"
    assert names[-1] == "head"
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    learn.freeze()
    frozen = [name for name, p in learn.model.named_parameters() if not p.requires_grad]
    assert frozen
    assert not learn.groups[-1].is_frozen
    learn.fit(1e-3, 1)
    now = dict(learn.model.named_parameters())
    assert all(torch.equal(now[name], before[name]) for name in frozen)
    assert any(not torch.equal(now[name], before[name]) for name in now if name not in frozen)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    assert all(not torch.equal(now[name], before[name]) for name in frozen if name.endswith("weight"))
    assert learn.groups.lrs[-1] == pytest.approx(100 * learn.groups.lrs[0])
    learn.fine_tune(1)
    assert 0 <= learn.validate()["accuracy"] <= 1


@pytest.mark.slow
def test_a_head_of_ones_own():
    learn = learner(models().shufflenet_v2_x0_5,
                    head=lambda n, classes: nn.Sequential(nn.Linear(n, 16), nn.ReLU(), nn.Linear(16, classes)))
    assert isinstance(learn.model.fc, nn.Sequential)
    assert sorted(tuple(p.shape) for p in learn.groups[-1].params) == [(3,), (3, 16), (16,), (16, 1024)]
    with pytest.raises(ValueError, match=r"^head\(1024, 3\) gives a module that does not go with 1024 features: mat1"):
        learner("shufflenet_v2_x0_5", head=lambda n, classes: nn.Linear(n + 1, classes))


def test_a_head_that_cannot_be(blank):
    with pytest.raises(TypeError, match=r"head must be a function \(n_features, n_classes\) -> module, got Linear"):
        learner("shufflenet_v2_x0_5", head=nn.Linear(1024, 3))
    with pytest.raises(TypeError, match=r"head\(1024, 3\) gives 3 \(int\)"):
        learner("shufflenet_v2_x0_5", head=lambda n, classes: classes)
    with pytest.raises(ValueError, match=r"gives \(2, 4\) for 2 images, and 3 classes need \(2, 3\)"):
        learner("shufflenet_v2_x0_5", head=lambda n, classes: nn.Linear(n, 4))


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(blank, arch):
    model = image_model(arch, 3, pretrained=False).model.train()
    assert model(torch.zeros(2, 3, 80, 80)).shape == (2, 3)
    assert [name for name, _ in model.named_parameters() if "aux" in name.lower()] == []


@pytest.mark.slow
def test_grey_pictures_without_weights_have_a_stem_of_one_channel():
    learn = learner("shufflenet_v2_x0_5", channels=1)
    assert learn.model.conv1[0].weight.shape == (24, 1, 3, 3)
    learn.fit(1e-3, 1)


def test_a_model_of_ones_own():
    learn = learner(tiny)
    assert learn.groups.names == ("stem", "head")
    assert learn.form == pictures().form
    learn.fit(1e-3, 1)
    with pytest.raises(ValueError, match=r"weights= is for architectures of torchvision"):
        learner(tiny, pretrained=True, weights="DEFAULT")
    with pytest.raises(TypeError, match=r"arch\(3\) gives 3 \(int\)"):
        learner(lambda n_classes: n_classes)
    with pytest.raises(ZeroDivisionError) as caught:
        learner(lambda n_classes: 1 / 0)
    assert caught.value.__notes__ == ["in arch, called with the number of classes, 3"]


@pytest.mark.nightly
def test_the_seed_is_that_of_the_new_layers_too():
    first, second, other = (learner("shufflenet_v2_x0_5", seed=seed).model.fc.weight for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# ---- what is refused


@pytest.mark.parametrize(("arch", "side", "error", "message"), [
    ("resnet19", 32, ValueError, r"no architecture 'resnet19'. Did you mean 'resnet18' or .*\? There are alexnet, "),
    ("xyzzy", 32, ValueError, r"no architecture 'xyzzy'. There are alexnet, "),
    ("fcn_resnet50", 32, ValueError, r"'fcn_resnet50' is no architecture that classifies pictures"),
    ("quantized_resnet18", 32, ValueError, r"is no architecture that classifies pictures"),
    (Late("detection.fasterrcnn_resnet50_fpn"), 32, ValueError,
     r"faster_rcnn.fasterrcnn_resnet50_fpn is no function that makes a classifier"),
    (Late("quantization.resnet18"), 32, ValueError, r"quantization.resnet.resnet18 is no function"),
    (Late("ResNet"), 32, ValueError, r"resnet.ResNet is no function that makes a classifier"),
    (tiny(3), 32, TypeError, r"got a Sequential that is made already. Pass e.g. resnet18 without \(\)"),
    (3, 32, TypeError, r"arch must be an architecture of torchvision, its name, .* got 3 \(int\)"),
    ("alexnet", 32, ValueError, r"AlexNet cannot take images of 32 x 32 pixels with 3 channels: .*size=224"),
    ("maxvit_t", 64, ValueError, r"MaxVit cannot take images of 64 x 64 pixels"),
])
def test_an_architecture_that_cannot_be(blank, arch, side, error, message):
    with pytest.raises(error, match=message):
        learner(arch.get() if isinstance(arch, Late) else arch, side=side)


def test_what_else_is_refused_before_anything_is_made():
    def never(n_classes):
        raise AssertionError("arch was called")

    with pytest.raises(TypeError, match=r"vision_learner has no option lr_max: it takes its own and those of Learner"):
        learner(never, lr_max=1)
    with pytest.raises(TypeError, match=r"pretrained must be True or False, got 1 \(int\)"):
        learner(never, pretrained=1)
    with pytest.raises(TypeError, match=r"dls must be ImageDataLoaders, got a tuple. Make them with image_folders"):
        vision_learner(([], []), never)


# ---- weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch's cache, empty, and no internet."""
    def no_internet(*args, **options):
        raise URLError("no internet")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_internet)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put(folder, weights, **options):
    """Random weights where torchvision would have put its own; gives the model that they are of."""
    torch.manual_seed(1)
    model = models().shufflenet_v2_x0_5(**options)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    torch.save(model.state_dict(), folder / weights.url.rpartition("/")[2])
    return model


@pytest.mark.nightly
@pytest.mark.parametrize("options", [{}, {"weights": Late("ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1")},
                                     {"weights": "IMAGENET1K_V1"},
                                     {"weights": "ShuffleNet_V2_X0_5_Weights.DEFAULT"}])
def test_weights_arrive_in_the_body_and_their_normalisation_is_used(cache, options):
    source = put(cache, models().ShuffleNet_V2_X0_5_Weights.DEFAULT).state_dict()
    options = {name: value.get() if isinstance(value, Late) else value for name, value in options.items()}
    learn = learner("shufflenet_v2_x0_5", pretrained=True, **options)
    state = learn.model.state_dict()
    body = [name for name in source if not name.startswith("fc.")]
    assert any("running_var" in name for name in body)
    assert all(torch.equal(state[name], source[name]) for name in body)
    assert state["fc.weight"].shape == (3, 1024)
    assert learn.form == ImageForm((32, 32), 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert learn.dls.form == learn.form
    x, _ = learn.dls.one_batch(train=False)
    raw, _ = next(iter(pictures().valid))
    torch.testing.assert_close(x, learn.form.normalize(raw))


@pytest.mark.slow
def test_grey_pictures_see_what_they_would_see_in_rgb(cache, capsys):
    source = put(cache, models().ShuffleNet_V2_X0_5_Weights.DEFAULT)
    learn = vision_learner(pictures(channels=1), "shufflenet_v2_x0_5", device="cpu")
    assert capsys.readouterr().out == ("grey pictures: the first convolution has the sum of its weights over red, "
                                       "green and blue (ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1)\n")
    torch.testing.assert_close(learn.model.conv1[0](torch.ones(1, 1, 9, 9)),
                               source.conv1[0](torch.ones(1, 3, 9, 9)))
    assert learn.form.mean == pytest.approx([0.449])
    assert learn.form.std == pytest.approx([0.226])


@pytest.mark.slow
def test_weights_that_cannot_be_had(cache):
    name = models().ShuffleNet_V2_X0_5_Weights.DEFAULT.url.rpartition("/")[2]
    with pytest.raises(OSError, match=r"cannot download the weights ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1 from "
                                      r"https://\S+ \(URLError: .*no internet.*Pass pretrained=False") as caught:
        learner("shufflenet_v2_x0_5", pretrained=True)
    assert f"put it into {cache}, with the name {name}." in str(caught.value)
    (cache / name).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"does not hold the weights .* \(UnpicklingError.*Delete the file") as caught:
        learner("shufflenet_v2_x0_5", pretrained=True)
    assert str(caught.value).startswith(str(cache / name))
    put(cache, models().ShuffleNet_V2_X0_5_Weights.DEFAULT, num_classes=7)
    with pytest.raises(ValueError, match=r"does not hold the weights .* \(RuntimeError: .*size mismatch"):
        learner("shufflenet_v2_x0_5", pretrained=True)


@pytest.mark.parametrize(("pretrained", "weights", "message"), [
    (False, "DEFAULT", r"pretrained=False and weights='DEFAULT': pass one of them"),
    (True, "IMAGENET1K_V9", r"shufflenet_v2_x0_5 has no weights 'IMAGENET1K_V9': there are .*IMAGENET1K_V1"),
    (True, Late("ResNet18_Weights.DEFAULT"), r"has no weights ResNet18_Weights.IMAGENET1K_V1: there are"),
    (True, 3, r"has no weights 3: there are"),
])
def test_weights_that_there_are_not(cache, pretrained, weights, message):
    with pytest.raises(ValueError, match=message):
        learner("shufflenet_v2_x0_5", pretrained, weights=weights.get() if isinstance(weights, Late) else weights)


@pytest.mark.slow
def test_grey_pictures_and_weights_that_take_channels_apart(cache):
    model = models().googlenet(aux_logits=True, init_weights=False)
    torch.save(model.state_dict(), cache / models().GoogLeNet_Weights.DEFAULT.url.rpartition("/")[2])
    with pytest.raises(ValueError, match=r"GoogLeNet with the weights \S+ takes three channels apart .*in colour"):
        learner("googlenet", pretrained=True, channels=1)
    assert learner("googlenet", pretrained=True, side=64).model.transform_input
