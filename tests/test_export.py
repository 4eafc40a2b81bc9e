"""export, load_exported, export_info."""

import io
import json
import os
import zipfile
from collections import namedtuple
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from helpers import bits, everything, learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minifast import EMA
from minifast.inference.export import export, export_info, load_exported

PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
Pair = namedtuple("Pair", "first second")


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
                         nn.Linear(4 * 36, 5))  # fmt: skip


def images(n=6):
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 5


def trained(**options):
    """A convnet whose BatchNorm has seen data."""
    learn = learner([images()], model=convnet(), loss_func=nn.CrossEntropyLoss(), **options)
    learn.fit(0.01, 2)
    return learn


class Forward(nn.Module):
    """A linear layer and dropout; `function(layer, ...)` is its forward."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), function

    def forward(self, *args, **kwargs):
        return self.function(self.layer, *args, **kwargs)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, a, mask, labels=None):
        return SimpleNamespace(logits=self.layer(a) * mask.unsqueeze(1), loss=labels)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, rtol=1e-5, atol=1e-6) and a.shape == b.shape
    keys = a if isinstance(a, dict) else range(len(a))
    return type(a) is type(b) and len(a) == len(b) and all(same(a[key], b[key]) for key in keys)


# ---- programs


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The path of a program, and the learner it is of."""
    learn = trained()
    return export(learn, tmp_path_factory.mktemp("program") / "net.pt2", labels=list("abcde")), learn


@pytest.mark.slow
def test_a_program_predicts_what_the_learner_does(program):
    path, learn = program
    module = load_exported(str(path), trusted=True)
    for n in (1, 2, 7, 64):
        x = images(n)[0]
        assert same(module(x), learn.predict(x))
        assert not module(x).requires_grad


@pytest.mark.slow
def test_plain_torch_reads_a_program_and_needs_no_class(tmp_path):
    learn = learner(model=Forward(lambda layer, x: layer(x)))
    module = torch.export.load(export(learn, tmp_path / "net.pt2")).module()
    assert {type(part).__module__.partition(".")[0] for part in module.modules()} == {"torch"}
    x = torch.randn(7, 3)
    assert same(module(x), learn.predict(x))


@pytest.mark.table
@pytest.mark.slow
@pytest.mark.parametrize(("function", "make"), [
    (lambda layer, x, y: layer(x + y), lambda n: (torch.randn(n, 3), torch.randn(n, 3))),
    (lambda layer, x, y: layer(x + y), lambda n: [torch.randn(n, 3), torch.randn(3)]),
    (lambda layer, *, a, b: layer(a - b), lambda n: {"a": torch.randn(n, 3), "b": torch.randn(n, 3)}),
    (lambda layer, x: (layer(x), [2 * layer(x)]), lambda n: torch.randn(n, 3)),
    (lambda layer, x: {"a": layer(x), "b": layer(x).sum(1)}, lambda n: torch.randn(n, 3)),
    (lambda layer, x: {"logits": layer(x), "hidden": x}, lambda n: torch.randn(n, 3)),
    (lambda layer, x: SimpleNamespace(logits=layer(x), loss=None), lambda n: torch.randn(n, 3)),
    (lambda layer, x: layer(torch.cat([x, x]))[: 2 * x.shape[0] - 1], lambda n: torch.randn(n, 3)),
    (lambda layer, x: torch.einsum("ij,kj->ik", layer(x), layer(x)), lambda n: torch.randn(n, 3)),
    (lambda layer, x: layer(x + torch.arange(x.shape[0], device=x.device)[:, None]), lambda n: torch.randn(n, 3)),
], ids=["two", "constant", "keywords", "nest", "dict", "logits", "object", "sizes", "text", "arange"])  # fmt: skip
@pytest.mark.parametrize("traced", [1, 4])
def test_inputs_and_outputs_of_any_kind(tmp_path, function, make, traced):
    learn = learner(model=Forward(function))
    module = load_exported(export(learn, tmp_path / "net.pt2", inputs=make(traced)), trusted=True)
    for n in (1, 4, 9):
        inputs = make(n)
        if isinstance(inputs, dict):
            given = module(**inputs)
        else:
            given = module(inputs) if isinstance(inputs, torch.Tensor) else module(*inputs)
        assert same(given, learn.predict(inputs))


@pytest.mark.slow
def test_layers_of_any_kind(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.norm(self.encoder(self.rnn(self.embed(tokens))[0]).mean(1)))

    learn = learner(model=Net())
    module = load_exported(export(learn, tmp_path / "net.pt2", inputs=torch.randint(9, (4, 5))), trusted=True)
    for n in (1, 4, 9):
        tokens = torch.randint(9, (n, 5))
        assert same(module(tokens), learn.predict(tokens))


@pytest.mark.slow
def test_a_batch_of_keywords_is_traced_without_its_labels(tmp_path):
    batch = {"a": torch.randn(4, 3), "mask": torch.ones(4), "labels": torch.zeros(4)}
    learn = learner([batch], model=Keywords(), loss_func=None)
    path = export(learn, tmp_path / "net.pt2")
    inputs = {"a": torch.randn(7, 3), "mask": torch.rand(7)}
    assert same(load_exported(path, trusted=True)(**inputs), learn.predict(inputs))
    assert list(export_info(path)["inputs"]) == ["a", "mask"]


@pytest.mark.slow
def test_the_learner_is_left_as_it_was(tmp_path):
    learn = trained()
    learn.model[1].eval()
    learn.model[0].weight.requires_grad_(False)
    learn.model[0].weight.grad = torch.ones(4, 1, 3, 3)
    generator = torch.Generator().manual_seed(3)
    learn.dls.train = DataLoader(TensorDataset(*images()), 3, shuffle=True, generator=generator)
    before = everything(learn, generator)
    for name in ("net.pt2", "net"):
        export(learn, tmp_path / name)
        assert everything(learn, generator) == before
    assert sorted(os.listdir(tmp_path)) == ["net", "net.pt2"]


@pytest.mark.slow
def test_no_sample_and_no_line_of_source_is_in_a_program(program):
    path, _ = program
    files = entries(path)
    assert not files.get("data/sample_inputs/model.pt")
    assert b"site-packages" not in files[PROGRAM]
    assert b"stack_trace" not in path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "message"), [
    ((torch.ones(2, 1, 9, 8),), r"shape\[2\] to be equal to 8, but got 9"),
    ((torch.ones(2, 1, 8, 8), 1), "the same number and type of args"),
    ((), "the same number and type of args"),
])  # fmt: skip
def test_inputs_of_another_shape_are_refused(program, inputs, message):
    module = load_exported(program[0], trusted=True)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        module(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("function", "words"), [
    (lambda layer, x: layer(x) if x.sum() > 0 else -layer(x), "GuardOnDataDependentSymNode|[Dd]ata-dependent"),
    (lambda layer, x: layer(x) if len(x) == 4 else -layer(x), "Constraints? |specialized|== 4"),
    (lambda layer, x: layer(x) if x.shape[0] % 2 == 0 else -layer(x), r"for some numbers of samples only: .*% 2"),
    (lambda layer, x: layer(x) if x.shape[0] < 100 else -layer(x), r"for some numbers of samples only: .*< 100"),
    (lambda layer, x: Pair(layer(x), x), "namedtuple"),
    (lambda layer, x: layer(x) + len([]) * float(x.sum().item()) if x.tolist() else x, "torch.export cannot"),
], ids=["data", "one batch size", "even", "small", "namedtuple", "tolist"])  # fmt: skip
def test_a_model_that_cannot_be_a_program_says_why(tmp_path, function, words):
    learn, inputs = learner(model=Forward(function)), torch.randn(4, 3)
    before = everything(learn)
    message = r"(?s)torch.export cannot make a program of this Forward: .*Export its weights instead: pass a path that"
    with pytest.raises(ValueError, match=message) as caught:
        export(learn, tmp_path / "net.pt2", inputs=inputs)
    caught.match(words)
    assert len(str(caught.value)) < 1000
    assert everything(learn) == before
    assert os.listdir(tmp_path) == []
    export(learn, tmp_path / "net", inputs=inputs)


@pytest.mark.slow
def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    learn = trained()
    path = export(learn, tmp_path / "net.pt2")
    learn.fit(0.1)
    export(learn, path)
    x = images()[0]
    assert same(load_exported(path, trusted=True)(x), learn.predict(x))
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minifast.files.writing.os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        export(learn, path)
    assert os.listdir(tmp_path) == ["net.pt2"]
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_program_needs_no_model(program):
    with pytest.raises(ValueError, match=r"net.pt2 is a program, which needs no model. Leave out model="):
        load_exported(program[0], convnet())


# ---- programs run what is in them


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def zipped(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_program_that_runs_code_does_so_only_where_it_is_trusted(program, tmp_path):
    files, sentinel, path = entries(program[0]), tmp_path / "sentinel", tmp_path / "net.pt2"
    config = json.loads(files[WEIGHTS])
    config["config"]["0.weight"]["use_pickle"] = True
    files |= {WEIGHTS: json.dumps(config).encode(), "data/weights/weight_0": saved(Evil(sentinel))}
    path.write_bytes(zipped(files))
    assert export_info(path)["labels"] == list("abcde")
    for options in ({}, {"trusted": False}):
        with pytest.raises(ValueError, match=r"(?s)net.pt2 is a program: whoever loads it runs what is in it.*pass "
                                             r"trusted=True. From strangers take weights with their description"):
            load_exported(path, **options)
    assert not sentinel.exists()
    with suppress(ValueError):  # what comes after the code was run
        load_exported(path, trusted=True)
    assert sentinel.exists()


def test_trusted_is_a_flag(tmp_path):
    with pytest.raises(TypeError, match=r"trusted must be True or False, got 'yes' \(str\)"):
        load_exported(tmp_path / "net.pt2", trusted="yes")


@pytest.mark.table
@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), [
    (lambda files: zipped({**files, PROGRAM: b"[" * 100_000}), "damaged"),
    (lambda files: zipped({name: data for name, data in files.items() if name != WEIGHTS}), "damaged"),
    (lambda files: b"", "damaged"),
    (lambda files: b"nonsense", "damaged"),
    (lambda files: zipped(files)[:-500], "damaged"),
    (lambda files: (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:])(zipped(files)),
     "the check sum of 'archive/data/weights/weight_0' is wrong"),
], ids=["deep", "incomplete", "empty", "nonsense", "cut", "a bit"])  # fmt: skip
def test_a_damaged_program_is_refused(program, tmp_path, change, message):
    (tmp_path / "net.pt2").write_bytes(change(entries(program[0])))
    with pytest.raises(ValueError, match=r"net.pt2 is damaged, or not what export wrote") as caught:
        load_exported(tmp_path / "net.pt2", trusted=True)
    caught.match(message)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    lambda files: zipped(files, zipfile.ZIP_DEFLATED),
    lambda files: zipped({name: data for name, data in files.items() if "minifast" not in name}),
    lambda files: b"",
    lambda files: b"nonsense",
    lambda files: zipped(files)[:-500],
], ids=["packed", "without", "empty", "nonsense", "cut"])  # fmt: skip
def test_a_program_without_its_description(program, tmp_path, change):
    (tmp_path / "net.pt2").write_bytes(change(entries(program[0])))
    with pytest.raises(ValueError, match=r"net.pt2 is damaged, or not what export wrote"):
        export_info(tmp_path / "net.pt2")


# ---- weights and their description


def test_weights_fill_a_model_of_the_class(tmp_path):
    learn = trained()
    assert export(learn, str(tmp_path / "net")) == tmp_path / "net"
    assert sorted(os.listdir(tmp_path / "net")) == ["model.json", "weights.pt"]
    model = convnet()
    assert load_exported(tmp_path / "net", model) is model
    assert not any(module.training for module in model.modules())
    x = images(7)[0]
    assert torch.equal(model(x), learn.predict(x))
    assert bits(torch.load(tmp_path / "net" / "weights.pt", weights_only=True)) == bits(dict(learn.model.state_dict()))


def test_a_folder_is_used_again(tmp_path):
    learn = trained()
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "notes.txt").write_text("mine")
    for _ in range(2):
        export(learn, tmp_path / "net")
        learn.fit(0.1)
    export(learn, tmp_path / "net")
    x = images()[0]
    assert torch.equal(load_exported(tmp_path / "net", convnet())(x), learn.predict(x))
    assert sorted(os.listdir(tmp_path / "net")) == ["model.json", "notes.txt", "weights.pt"]


def test_a_model_of_another_shape_is_refused_and_not_changed(tmp_path):
    export(trained(), tmp_path / "net")
    model = convnet()
    model[5] = nn.Linear(144, 6)
    before = bits(dict(model.state_dict()))
    with pytest.raises(ValueError, match=r"does not fit the model \(Sequential\): .*weight \(5, 144\) for \(6, 144\)"):
        load_exported(tmp_path / "net", model)
    assert bits(dict(model.state_dict())) == before
    assert model.training


@pytest.mark.case("X6")
def test_weights_need_a_model(tmp_path):
    export(trained(), tmp_path / "net")
    with pytest.raises(ValueError, match=r"holds weights, which need a model \(Sequential\). Pass one of that"):
        load_exported(tmp_path / "net")
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got .*\(type\)"):
        load_exported(tmp_path / "net", nn.Linear)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("weights.pt", None, r"weights.pt is damaged, or not the file that model.json describes. Nothing was loaded"),
    ("weights.pt", b"nonsense", "weights.pt is damaged, or not the file"),
    ("model.json", b"", r"net is damaged, or not what export wrote \(JSONDecodeError\)"),
    ("model.json", b"[]", r"net is damaged, or not what export wrote \(TypeError\)"),
    ("model.json", b"{}", r"net is damaged, or not what export wrote \(KeyError\)"),
    ("model.json", b'{"format": "minifast export 2"}', "its format is 'minifast export 2', not 'minifast export 1'"),
    ("model.json", b"[" * 100_000, r"\(RecursionError\)"),
])  # fmt: skip
def test_damaged_weights_change_nothing(tmp_path, name, content, message):
    export(trained(), tmp_path / "net")
    if content is None:
        export(learner(), tmp_path / "other")
        content = (tmp_path / "other" / name).read_bytes()
    (tmp_path / "net" / name).write_bytes(content)
    model = convnet()
    before = bits(dict(model.state_dict()))
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path / "net", model)
    assert bits(dict(model.state_dict())) == before


def test_weights_that_ask_to_run_code_are_refused(tmp_path):
    """Even where the description vouches for them."""
    import hashlib

    export(trained(), tmp_path / "net")
    (tmp_path / "net" / "weights.pt").write_bytes(saved(Evil(tmp_path / "sentinel")))
    info = json.loads((tmp_path / "net" / "model.json").read_text())
    info["sha256"] = hashlib.sha256((tmp_path / "net" / "weights.pt").read_bytes()).hexdigest()
    (tmp_path / "net" / "model.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"weights\.pt was not loaded: it asks to run code \(.*\): refused"):
        load_exported(tmp_path / "net", convnet())
    assert not (tmp_path / "sentinel").exists()


def test_a_failure_leaves_no_empty_folder(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minifast.files.writing.torch.save", fail)
    with pytest.raises(OSError, match="No space left"):
        export(trained(), tmp_path / "net")
    assert os.listdir(tmp_path) == []


# ---- the description


@pytest.mark.parametrize("name", ["net", pytest.param("net.pt2", marks=pytest.mark.slow)])
def test_the_description(tmp_path, name):
    learn = trained(splitter={"body": ["0.*", "1.*"], "head": "*"})
    metadata = {"mean": [0.5, 1], "note": "ü", "nothing": None, "nest": {"a": True}}
    path = export(learn, tmp_path / name, labels=("a", "b", "c", "d", "e"), metadata=metadata)
    info = export_info(path)
    assert info["labels"] == list("abcde")
    assert info["metadata"] == metadata
    assert info["model"] == "Sequential"
    assert info["groups"] == ["body", "head"]
    assert info["inputs"] == {"dtype": "float32", "shape": ["n", 1, 8, 8]}
    assert list(info["state"]) == list(learn.model.state_dict())
    assert info["state"]["5.weight"] == {"dtype": "float32", "shape": [5, 144]}
    assert info["versions"]["torch"] == torch.__version__


def test_the_description_of_a_nest(tmp_path):
    inputs = {"a": (torch.ones(4, 3), [torch.ones(2, dtype=torch.int64), 3])}
    info = export_info(export(learner(), tmp_path / "net", inputs=inputs))
    assert info["inputs"] == {"a": [{"dtype": "float32", "shape": ["n", 3]},
                                    [{"dtype": "int64", "shape": [2]}, {"type": "int"}]]}  # fmt: skip
    assert (info["labels"], info["metadata"]) == (None, {})


# ---- what is refused before anything is written


@pytest.mark.table
@pytest.mark.parametrize(("options", "error", "message"), [
    ({"labels": "abc"}, TypeError, "labels must be a list of class names, got 'abc'"),
    ({"labels": ["a", 1]}, TypeError, r"labels must be a list of class names, got \['a', 1\]"),
    ({"metadata": [1]}, TypeError, r"metadata must be a dict with text as keys, .* got \[1\]"),
    ({"metadata": {1: 2}}, TypeError, "metadata must be .* got {1: 2}"),
    ({"metadata": {"a": (1, 2)}}, TypeError, "metadata must be"),
    ({"metadata": {"a": float("nan")}}, TypeError, "metadata must be"),
    ({"metadata": {"a": torch.ones(1)}}, TypeError, "metadata must be"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["net", "net.pt2"])
def test_arguments_out_of_range(tmp_path, name, options, error, message):
    with pytest.raises(error, match=message):
        export(learner(), tmp_path / name, **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "error", "message"), [
    ("gone/net.pt2", FileNotFoundError, r"cannot export to .*gone/net.pt2: there is no folder .*gone. Make it first"),
    ("gone/net", FileNotFoundError, "there is no folder .*gone"),
    ("folder.pt2", IsADirectoryError, r"folder.pt2: it is a folder, and a program \(.pt2\) is a file"),
    ("file", FileExistsError, r"cannot export to .*file: it is a file, .* or one that ends in .pt2 for a program"),
    ("net.pth", ValueError, r"cannot export to .*net.pth: pass a name that ends in .pt2 .* learn.save\('net.pth'\)"),
    ("net.ONNX", ValueError, "pass a name that ends in .pt2"),
])  # fmt: skip
def test_paths_that_cannot_be(tmp_path, name, error, message):
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(error, match=message):
        export(learner(), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.pt2"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("read", [load_exported, export_info])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"net.pt2"):
        read(tmp_path / "net.pt2")
    (tmp_path / "net").mkdir()
    with pytest.raises(FileNotFoundError, match=r"model.json"):
        read(tmp_path / "net")


def test_data_for_one_pass_is_not_drawn_from(tmp_path):
    data = iter([images(), images()])
    learn = learner(data, model=convnet())
    with pytest.raises(ValueError, match=r"the data is an iterator \(list_iterator\), .* Pass inputs="):
        export(learn, tmp_path / "net")
    assert len(list(data)) == 2
    export(learn, tmp_path / "net", inputs=images()[0])
    with pytest.raises(ValueError, match=r"the data yielded 0 batches. Pass inputs="):
        export(learner([images()], [], model=convnet()), tmp_path / "other")


@pytest.mark.slow
def test_both_formats_hold_the_weights_that_predict_uses(tmp_path):
    learn = learner([(torch.randn(8, 3), torch.randn(8, 1))] * 4, callbacks=[EMA(0.9)])
    learn.fit(0.5, 2)
    x = torch.randn(5, 3)
    expected = learn.predict(x)
    with torch.no_grad():
        assert not torch.allclose(learn.model(x), expected)
        torch.testing.assert_close(load_exported(learn.export(tmp_path / "a.pt2"), trusted=True)(x), expected)
        torch.testing.assert_close(load_exported(learn.export(tmp_path / "a"), nn.Linear(3, 1))(x), expected)
