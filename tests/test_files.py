"""Files of weights and of plain trees. What a disk and an enemy can do to them: tests/reliability."""
import enum
import io
import math
import os
import sys
import zipfile
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import bits, learner
from torch import nn

from minifast.files.reading import load_tree
from minifast.files.trees import check_plain, size_of, to_save
from minifast.files.weights import load_weights, save_weights
from minifast.files.writing import replacing, save_tree

TREE = {"weight": torch.arange(300.0), "count": torch.tensor(3), "text": ["a", 1, None, 2.5]}


@pytest.fixture
def saved(tmp_path):
    save_tree(TREE, tmp_path / "tree.pt")
    return tmp_path / "tree.pt"


def test_a_tree_comes_back(saved):
    assert bits(load_tree(saved)) == bits(TREE)
    assert [path.name for path in saved.parent.iterdir()] == ["tree.pt"]


def test_a_packed_archive_is_refused_before_it_is_unpacked(saved, tmp_path):
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name) + bytes(10**7))
    with pytest.raises(ValueError, match=r"its entry '.*' is packed"):
        load_tree(bomb)


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args))[1])
    save_tree(TREE, tmp_path / "tree.pt")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, its folder


def test_an_error_of_the_writer_is_its_own(tmp_path):
    with pytest.raises(KeyError, match="mine"), replacing(tmp_path / "a"):
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match=r"^mine$"), replacing(tmp_path / "a"):
        raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []


def test_a_link_or_a_folder_in_the_way(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"it is a folder\. Pass the name of a file in it"):
        save_tree(TREE, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone\. Make it first"):
        save_tree(TREE, tmp_path / "gone" / "tree.pt")
    with pytest.raises(FileNotFoundError):
        load_tree(tmp_path / "nowhere.pt")


# ---- plain trees


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    pass


class Own(torch.Tensor):
    pass


Pair = namedtuple("Pair", "a b")
NOT_PLAIN = [
    (np.float64(0.5), "is a numpy.float64: use x.item()"),
    (np.float32(0.5), "is a numpy.float32: use x.item()"),
    (np.int64(3), "is a numpy.int64: use x.item()"),
    (np.bool_(True), ": use x.item()"),
    (np.ones(2), "is a numpy.ndarray: use torch.from_numpy(x)"),
    (Path("a"), "PosixPath: use str(x)"),
    (Level.LOW, "Level: use int(x)"),
    (Text("a"), "Text: use str(x)"),
    (Pair(1, 2), "Pair: use tuple(x)"),
    ({1, 2}, "is a set: use sorted(x)"),
    (frozenset(), "is a frozenset: use sorted(x)"),
    (OrderedDict(), "is a collections.OrderedDict: use dict(x)"),
    (torch.Size([1]), "is a torch.Size: use tuple(x)"),
    (torch.float32, "is a torch.dtype: use str(x)"),
    (torch.device("cpu"), "is a torch.device: use str(x)"),
    (1 + 2j, "is a complex"),
    (bytearray(b"a"), "is a bytearray"),
    (b"", "is empty bytes, which torch cannot read back: use None"),
    (2**2000, "is an int of 2000 bits or more: use str(x)"),
    (-(2**2000), "is an int of 2000 bits or more: use str(x)"),
    (print, "is a builtin_function_or_method"),
    (object(), "is a object"),
    (io.BytesIO(), "is a _io.BytesIO"),
    (nn.Linear(1, 1), "is a torch.nn.modules.linear.Linear"),
    (torch.ones(2, device="meta"), "is a tensor on the meta device, without values: load or initialise it first"),
    (torch.ones(2).to_sparse(), "sparse or quantized tensor: use x.to_dense()"),
    (torch.ones(2).as_subclass(Own), "Own: use x.as_subclass(torch.Tensor)"),
    (nn.LazyLinear(3).weight, "which has no values yet: run a batch through the model first"),
]  # fmt: skip


@pytest.mark.table
@pytest.mark.case("S15")
@pytest.mark.parametrize(("value", "message"), NOT_PLAIN, ids=[message for _, message in NOT_PLAIN])
def test_what_is_not_plain_is_refused_with_its_place_when_it_is_saved(tmp_path, value, message):
    with pytest.raises(TypeError) as caught:
        save_tree({"callbacks": {"SaveBest": {"best": value}}}, tmp_path / "tree.pt")
    assert str(caught.value).startswith("callbacks.SaveBest.best is ")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.case("S15")
@pytest.mark.parametrize(("tree", "place"), [
    ([{"a": (1, {2})}], "[0].a[1] is a set"), ({3: [None, {4}]}, "3[1] is a set"), ({5}, "it is a set"),
    ({"a": {1.5: 2}}, "a has the key 1.5, a float: use str or int"),
    ({"a": {True: 2}}, "a has the key True, a bool: use str or int"),
    ({(1, 2): 2}, "it has the key (1, 2), a tuple: use str or int")])  # fmt: skip
def test_the_place_of_what_is_not_plain(tree, place):
    with pytest.raises(TypeError) as caught:
        check_plain(tree)
    assert str(caught.value).startswith(place)
    with pytest.raises(TypeError, match=r"^run[.\[ ]"):
        check_plain(tree, "run")


def test_all_that_is_plain_comes_back_as_it_was(tmp_path):
    shared = [1, 2]
    tree = {"": "", "numbers": [0, -1, 2**63, -(2**1999), 2**2000 - 1, 0.1, -0.0, math.inf, math.nan, True,
                        False, None],
            "texts": ["\ud800", "\x00", "é", "a" * 10**5], "bytes": b"\x00\xff", 5: {-3: (), "list": [], "dict": {}},
            "tuple": (1, (2.5, "a")), "shared": [shared, shared], "tensors": [torch.ones(2, 3), torch.tensor(True)]}
    save_tree(tree, tmp_path / "tree.pt")
    loaded = load_tree(tmp_path / "tree.pt", checked=True)
    assert bits(loaded) == bits(tree)
    assert str(loaded["numbers"]) == str(tree["numbers"])
    assert [type(value) for value in loaded["numbers"]] == [type(value) for value in tree["numbers"]]
    assert type(loaded["tuple"]) is tuple
    assert type(loaded["tuple"][1]) is tuple


def test_a_tree_may_be_64_levels_deep_and_no_deeper(tmp_path):
    def deep(n):
        tree = 1
        for _ in range(n):
            tree = [tree]
        return tree

    save_tree(deep(64), tmp_path / "tree.pt")
    assert load_tree(tmp_path / "tree.pt", checked=True) == deep(64)
    for n in (65, 100_000):
        with pytest.raises(TypeError, match=r"^x(\[0\])+.* is nested more than 64 levels deep, or holds itself"):
            check_plain({"x": deep(n - 1)})
    own = []
    own.append(own)
    with pytest.raises(TypeError, match="or holds itself"):
        check_plain(own)


def test_a_small_tree_cannot_claim_to_hold_much():
    tree = [0.5]
    for _ in range(40):
        tree = [tree, tree]
    with pytest.raises(TypeError, match=r"holds too much: more than 10,000,000 values\. Put "):
        check_plain(tree)


# ---- tensors: as large as they are, and tied as they were


@pytest.mark.case("K19")
def test_a_file_has_the_size_of_its_tensors(tmp_path):
    """Views do not drag along what they are parts of; what is shared is written once."""
    big = torch.rand(1000, 1000)
    tied = torch.rand(10_000)
    flat = torch.rand(20_000)
    trees = {  # a tree and the bytes it should take
        "row": ({"a": big[3]}, 4000), "column": ({"a": big[:, 3]}, 4000), "two rows": ([big[0], big[1]], 8000),
        "tied": ({"a": tied, "b": tied, "c": [tied.detach()]}, 40_000), "tied rows": ([big[2], big[2]], 4000),
        "views of all of it": ([flat[:10_000], flat[10_000:], flat], 80_000),
        "a transpose": ({"a": big[:100].clone().t()}, 400_000), "expanded": ({"a": torch.ones(1).expand(5000)}, 20_000),
        "windows": (torch.arange(1000.0).unfold(0, 10, 1), 991 * 40), "empty": ([torch.empty(0, 3), torch.empty(0)], 0),
        "two dtypes of the same bytes": ([tied, tied.view(torch.int32)], 80_000),
        "a graph": ({"a": (tied.clone().requires_grad_() * 2)}, 40_000), 
        "conj": (torch.full((9,), 1j, dtype=torch.complex64).conj(), 72),
    }  # fmt: skip
    for name, (tree, n_bytes) in trees.items():
        assert size_of(tree) == n_bytes, name
        save_tree(tree, tmp_path / "tree.pt")
        assert n_bytes <= (tmp_path / "tree.pt").stat().st_size < n_bytes + 3000, name
        assert bits(load_tree(tmp_path / "tree.pt", checked=True)) == bits(_resolved(tree)), name


def _resolved(tree):
    return tree.resolve_conj() if isinstance(tree, torch.Tensor) else tree


@pytest.mark.case("K19")
def test_what_is_tied_is_tied_when_it_comes_back(tmp_path):
    weight, big = nn.Parameter(torch.rand(20)), torch.rand(100)
    save_tree({"a": weight, "b": weight, "row": big[:10], "same row": big[:10], "none": [torch.empty(0)] * 2},
              tmp_path / "tree.pt")  # fmt: skip
    loaded = load_tree(tmp_path / "tree.pt", checked=True)
    loaded["a"][0] = loaded["row"][0] = -1
    assert loaded["b"][0] == loaded["same row"][0] == -1
    assert not loaded["a"].requires_grad


@pytest.mark.case("K19", "E9")
def test_nothing_is_copied_that_need_not_be():
    big, flat, weight = torch.rand(100, 100), torch.rand(20), nn.Parameter(torch.rand(5))
    tree = {"whole": weight, "t": big.t(), "halves": [flat[:10], flat[10:]], "row": torch.rand(100, 100)[0]}
    saved = to_save(tree)
    assert saved["whole"].data_ptr() == weight.data_ptr()
    assert saved["t"].data_ptr() == big.data_ptr()
    assert [half.data_ptr() for half in saved["halves"]] == [half.data_ptr() for half in tree["halves"]]
    assert saved["row"].untyped_storage().nbytes() == 400
    assert type(saved["whole"]) is torch.Tensor


# ---- weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.register_buffer("part", torch.arange(10_000.0)[5:8])


@pytest.mark.case("K19")
def test_tied_weights_and_views_of_a_model(tmp_path):
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").stat().st_size < 4000
    load_weights(other, tmp_path / "weights.pt")
    assert other.first.weight is other.last.weight
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    with pytest.raises(TypeError, match=r"^part is a tensor on the meta device, without values"):
        save_weights(Tied().to("meta"), tmp_path / "meta.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_another_precision_fits_and_another_kind_does_not(tmp_path):
    model = nn.BatchNorm1d(3)
    torch.save({name: value.half() if value.is_floating_point() else value.int()
                for name, value in model.state_dict().items()}, tmp_path / "half.pt")
    load_weights(model, tmp_path / "half.pt")
    assert model.weight.dtype is torch.float32
    assert model.num_batches_tracked.dtype is torch.int64
    before = bits(dict(model.state_dict()))
    torch.save({**model.state_dict(), "weight": torch.zeros(3, dtype=torch.int64),
                "bias": torch.zeros(3, dtype=torch.bool)}, tmp_path / "ints.pt")
    with pytest.raises(ValueError, match=r"of another kind weight torch.int64 for torch.float32, bias torch.bool for "
                                         r"torch.float32\. Nothing was loaded"):
        load_weights(model, tmp_path / "ints.pt")
    assert bits(dict(model.state_dict())) == before


class Fussy(nn.Module):
    """Refuses its own part of a state dict when the others have been loaded already."""

    def __init__(self, error):
        super().__init__()
        self.layer, self.own = nn.Linear(3, 3), nn.Parameter(torch.zeros(2))
        self.norm = nn.BatchNorm1d(3)
        self.fails_with = error

    def load_state_dict(self, *args, **options):
        super().load_state_dict(*args, **options)
        raise self.fails_with


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), TypeError("mine")])
def test_a_model_that_fails_half_way_is_left_as_it_was(tmp_path, error):
    model = Fussy(error)
    torch.save({name: value + 1 for name, value in model.state_dict().items()}, tmp_path / "weights.pt")
    before, own = bits(dict(model.state_dict())), model.layer.weight
    expected = ValueError if type(error) is RuntimeError else type(error)
    with pytest.raises(expected, match="does not fit the model .* mine Nothing was changed" if expected is ValueError
                       else None):
        load_weights(model, tmp_path / "weights.pt")
    assert bits(dict(model.state_dict())) == before
    assert model.layer.weight is own


def test_a_learner_is_as_it_was_when_a_file_is_refused(tmp_path):
    learn = learner()
    before = bits(dict(learn.model.state_dict()))
    part = list(learn.model.state_dict().items())[:-1]
    torch.save({name: value + 1 for name, value in part}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"does not fit the model .*: missing .*\. Nothing was loaded"):
        learn.load(tmp_path / "weights.pt")
    assert bits(dict(learn.model.state_dict())) == before


# ---- safetensors


@pytest.mark.case("K19")
def test_safetensors_there_and_back(tmp_path):
    """As any other file: other programs read it, what is tied is written once, whatever has parts is whole."""
    model, other = Tied(), Tied()
    path = tmp_path / "weights.safetensors"
    assert save_weights(model, path) == path
    found = safetensors.torch.load_file(path)
    assert sorted(found) == ["first.bias", "first.weight", "last.bias", "part"]
    assert bits(found) == bits({name: model.state_dict()[name] for name in found})
    load_weights(other, path)
    assert other.first.weight is other.last.weight
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    assert [found.name for found in tmp_path.iterdir()] == ["weights.safetensors"]


def test_safetensors_of_other_programs(tmp_path):
    """Whichever name of what is tied they have left out; and all dtypes of a model."""
    model, other = Tied(), Tied()
    safetensors.torch.save_file({name: value.clone() for name, value in model.state_dict().items()
                                 if name != "first.weight"}, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    kinds = nn.ParameterDict({str(dtype).replace("torch.", "a "): torch.full((2, 3), 1.5, dtype=dtype).t()
                              for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)})
    save_weights(kinds, tmp_path / "kinds.safetensors")
    before = bits(dict(kinds.state_dict()))
    for parameter in kinds.values():
        nn.init.zeros_(parameter)
    load_weights(kinds, tmp_path / "kinds.safetensors")
    assert bits(dict(kinds.state_dict())) == before


def test_a_learner_saves_and_loads_safetensors_or_stays_as_it_was(tmp_path):
    learn, other, path = learner(), learner(), tmp_path / "weights.safetensors"
    learn.fit(0.01, 1)
    learn.save(path)
    assert other.load(path) is other
    after = bits(dict(learn.model.state_dict()))
    assert bits(dict(other.model.state_dict())) == after
    part = dict(list(learn.model.state_dict().items())[:-1])
    safetensors.torch.save_file({name: value + 1 for name, value in part.items()}, path)
    with pytest.raises(ValueError, match=r"does not fit the model .*: missing .*\. Nothing was loaded"):
        learn.load(path)
    for content in (b"", b"weights", path.read_bytes()[:-1], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.safetensors is damaged, or holds more than plain tensors"):
            learn.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        learn.load(path)
    with pytest.raises(IsADirectoryError):
        learn.load(tmp_path.rename(tmp_path.with_name("folder.safetensors")))
    assert bits(dict(learn.model.state_dict())) == after


def test_safetensors_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    learn, path = learner(), tmp_path / "weights.safetensors"
    learn.save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot save to .*weights\.safetensors: No space left on device \(needs 0"):
        learn.save(path)
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (before, 1)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"scale": 2}

    def set_extra_state(self, state): ...


def test_what_safetensors_cannot_hold_and_where_there_is_no_such_package(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"can hold tensors only, and _extra_state is something else\. Save to a name"):
        save_weights(Extra(2, 2), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save_weights, load_weights):
        with pytest.raises(ImportError, match=r'need a package: pip install "minifast\[safetensors\]"'):
            call(nn.Linear(2, 2), tmp_path / "weights.safetensors")
    assert list(tmp_path.iterdir()) == []
