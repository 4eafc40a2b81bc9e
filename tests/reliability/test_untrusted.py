"""Files that are damaged, or made to harm: refused through every door, and nothing in them is ever called."""

import ast
import errno
import functools
import hashlib
import io
import json
import os
import pickle
import random
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import in_fork, told, virtual_size
from helpers import bits, learner
from torch import nn

import minifast
from minifast import export_info, load_exported, plot_runs, read_run
from minifast.files.reading import load_tree
from minifast.files.trees import check_plain
from minifast.files.writing import save_tree

PACKAGE = Path(minifast.__file__).resolve().parent
MB = 10**6


# ---- the doors: everything public that reads a file. Each takes the bytes and an empty folder.


def put(content, path):
    path.write_bytes(content)
    return path


def exported_weights(content, folder):
    """The description vouches for the weights."""
    put(content, folder / "weights.pt")
    described = {"format": "minifast export 1", "sha256": hashlib.sha256(content).hexdigest()}
    put(json.dumps(described).encode(), folder / "model.json")
    return load_exported(folder, nn.Linear(4, 4))


def described(content, folder):
    put(content, folder / "model.json")
    return export_info(folder)


# Add a reader of files: give it a door.
DOORS = {
    "learn.load": lambda content, folder: learner().load(put(content, folder / "weights.pt")),
    "load_exported(weights)": exported_weights,
    "load_exported(program)": lambda content, folder: load_exported(put(content, folder / "net.pt2")),
    "export_info(program)": lambda content, folder: export_info(put(content, folder / "net.pt2")),
    "export_info(folder)": described,
    "read_run": lambda content, folder: read_run(put(content, folder / "run.jsonl")),
    "plot_runs": lambda content, folder: plot_runs(put(content, folder / "run.jsonl")),
    "load_tree": lambda content, folder: load_tree(put(content, folder / "tree.pt")),
    "load_tree(checked)": lambda content, folder: load_tree(put(content, folder / "tree.pt"), checked=True),
}


# ---- what is put through them


class Calls:
    """Pickled as a call, `function(*args)`, of which `attributes` are set then."""

    def __init__(self, function, *args, attributes=None):
        self.reduced = (function, args) if attributes is None else (function, args, attributes)

    def __reduce__(self):
        return self.reduced


def torch_bytes(tree, **options):
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


def shell(sentinel):
    return Calls(os.system, f"touch {sentinel}")


def evaluated(sentinel):
    return Calls(eval, f"open({str(sentinel)!r}, 'w')")


def nested(sentinel):
    return Calls(torch.storage._load_from_bytes, torch_bytes(shell(sentinel)))


def partial(sentinel):
    return Calls(functools.partial(os.system, f"touch {sentinel}"))


def numpy_objects(sentinel):
    buffer = io.BytesIO()
    np.save(buffer, np.array([shell(sentinel)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


CALLS = {"os.system": shell, "eval": evaluated, "_load_from_bytes": nested, "partial": partial}
PAYLOADS = {
    **{f"{name} in an archive": lambda sentinel, call=call: torch_bytes({"weight": call(sentinel)})
       for name, call in CALLS.items()},
    **{f"{name} in a legacy file": lambda sentinel, call=call: torch_bytes(
        {"weight": call(sentinel)}, _use_new_zipfile_serialization=False) for name, call in CALLS.items()},
    **{f"a pickle of protocol {n}": lambda sentinel, n=n: pickle.dumps({"weight": shell(sentinel)}, protocol=n)
       for n in (0, 1, 2, 4, 5)},
    "npy": numpy_objects,
}  # fmt: skip
GADGETS = {"_instantiator": "os.system", "_target_": "os.system", "__class__": "builtins.eval", "path": "../../x",
           "../../../etc/passwd": "{0.__globals__}", "__reduce__": ["os.system", "touch x"]}


def repickled(content, pickled, extra=()):
    """The archive `content` with other plain values, and entries added: sizes and check sums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
        for name, data in extra:
            new.writestr(name, data)
    return buffer.getvalue()


def plain_archive():
    return torch_bytes({"weight": torch.ones(3)})


def tensor_that_claims(shape, strides, n_stored=3):
    """A tensor of 3 floats with another shape; n_stored: what its storage claims to hold."""
    pickled = (b"\x80\x02}X\x06\x00\x00\x00weightctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
               b"FloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + _int(n_stored) + b"tQK\x00("
               + b"".join(map(_int, shape)) + b"t(" + b"".join(map(_int, strides)) + b"t\x89ccollections\n"
               b"OrderedDict\n)RtRs.")  # fmt: skip
    return repickled(plain_archive(), pickled)


def _int(n):
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def torchscript():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4)), buffer)
    return buffer.getvalue()


def packed():
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain_archive())) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(500 * MB) if name.endswith("data/0") else old.read(name), compresslevel=1)
    return buffer.getvalue()


def one_entry_many_times(n, claimed=None, folder="archive/data/"):
    """An archive of `n` entries that are all the same bytes, 1 MB; claimed: how many it says there are."""
    name, data = b"archive/data/0", bytes(MB)
    import binascii

    crc = binascii.crc32(data)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, MB, MB, len(name), 0) + name + data
    entries = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, MB, MB, len(own), 0, 0, 0, 0, 0, 0) + own
        for own in (f"{folder}{i}".encode() for i in range(n)))
    claimed = n if claimed is None else claimed
    end = len(local) + len(entries)
    return (local + entries + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, claimed, claimed, len(entries),
                                          len(local))
            + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))  # fmt: skip


def claims_entries(n):
    """An ordinary archive whose end says that it has `n` entries."""
    content = bytearray(plain_archive())
    content[-98 + 24 : -98 + 40] = struct.pack("<2Q", n, n)
    content[-14:-10] = b"\xff" * 4
    return bytes(content)


def gap():
    """Space for a second list of entries: readers would differ in which one they take."""
    content = plain_archive()
    end = bytearray(content[-98:])
    end[56 + 8 : 56 + 16] = struct.pack("<Q", len(content) - 98 + 50)
    return content[:-98] + bytes(50) + bytes(end)


def deep(n):
    return repickled(plain_archive(), b"\x80\x02}X\x06\x00\x00\x00weight" + b"]" * n + b"a" * (n - 1) + b"s.")


def long_key():
    """The place of each of these lists, written out, would be 1 MB; one is too deep."""
    tree = []
    for _ in range(70):
        tree = [tree]
    return pickle.dumps({"k" * MB: [[[]] for _ in range(10**5)], "b": tree}, protocol=2)


def laughs(n, make):
    """n levels of containers of twice the one below: 2**n values."""
    tree = make([1.0])
    for _ in range(n):
        tree = make([tree, tree])
    return pickle.dumps({"weight": tree}, protocol=2)


BOMBS = {  # name: (the content, what is said of it)
    "a packed entry": (packed, "is packed"),
    "10**6 entries, claimed": (lambda: claims_entries(10**6), "is damaged"),
    "entries that overlap": (lambda: one_entry_many_times(20_000), "its entries overlap"),
    "a gap before its end": (lambda: gap(), "is damaged"),
    "a piece before its beginning": (
        lambda: b"PK\3\4" + plain_archive(), "its list of entries is not where it says"),
    "lists, 10**5 deep": (lambda: deep(10**5), r"weight(\[0\])*.*nested more than 64 levels deep"),
    "a key of 1 MB over 100,000 lists": (lambda: repickled(plain_archive(), long_key()), "nested more than 64 levels"),
    "2**50 values": (lambda: repickled(plain_archive(), laughs(50, list)), "holds too much"),
    "a text of 2 GB that is not there": (
        lambda: repickled(plain_archive(), b"\x80\x02X\xff\xff\xff\x7fabc."), "expected 2147483647 bytes"),
    "a tensor larger than its storage": (
        lambda: tensor_that_claims((10**11,), (1,)), "RuntimeError"),
    "a storage larger than its entry": (
        lambda: tensor_that_claims((10**10,), (1,), 10**10), "RuntimeError"),
    "a storage larger than a legacy file": (
        lambda: torch_bytes({"weight": torch.ones(300)}, _use_new_zipfile_serialization=False).replace(
            b"M,\x01", b"J\xff\xff\xff\x7f"), "no archive as torch writes it since 1.6"),
    "a function that is named, not called": (
        lambda: torch_bytes({"weight": os.system}), r"asks to run code \('posix\.system'\): refused"),
    "a bytearray of 100 GB": (lambda: torch_bytes({"weight": Calls(bytearray, 10**11)}), "asks to run code"),
    "a sparse tensor of 10**12 rows": (lambda: sparse(), "asks to run code"),
    "a TorchScript program": (torchscript, "TorchScript program"),
    "attributes": (lambda: torch_bytes(attributes()), "it has attributes|OrderedDict"),
    "nothing": (bytes, "is damaged"),
    "the middle of nothing": (lambda: b"PK\3\4" + bytes(3), "is damaged"),
    "text": (lambda: b"weights\n" * 100, "is damaged"),
    "an entry of another name": (
        lambda: repickled(plain_archive(), b"\x80\x02N.", [("archive/../../../x", b"")]), "which torch does not write"),
    "an entry twice": (lambda: twice(), "not all different"),
}  # fmt: skip


def attributes():
    """An OrderedDict with a text in place of a method."""
    return Calls(OrderedDict, attributes={"items": "mine"})


def sparse():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the checks that torch leaves out
        return torch_bytes(torch.sparse_coo_tensor(torch.ones(1, 1, dtype=torch.int64), torch.ones(1), (10**12,)))


def twice():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return repickled(plain_archive(), b"\x80\x02N.", [("archive/data/0", bytes(12))])


OF_TREES = ("learn.load", "load_exported(weights)", "load_tree", "load_tree(checked)")


def refusal(door, content, folder):
    """The error that `content` meets at a door: one of ours, or None."""
    folder.mkdir()
    try:
        DOORS[door](content, folder)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.table
@pytest.mark.slow
@pytest.mark.case("X1", "X2", "X3", "X5")
@pytest.mark.parametrize("forced", [False, True], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("door", DOORS)
def test_no_file_runs_code(tmp_path, monkeypatch, door, forced):
    if forced:  # an unset weights_only is then False
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sentinel = tmp_path / "sentinel"

    def read(tell):
        for i, (name, payload) in enumerate(PAYLOADS.items()):
            tell([name, refusal(door, payload(sentinel), tmp_path / str(i)), sentinel.exists()])

    outcomes = told(read, memory=1000 * MB)
    assert [outcome[0] for outcome in outcomes] == list(PAYLOADS)
    for name, said, ran in outcomes:
        assert not ran, name
        assert said is not None, name
        if door in OF_TREES and name.endswith(" in an archive"):
            assert re.search(r"(tree|weights)\.pt was not loaded: it asks to run code \(.*\): refused\.", said), said
    assert not sentinel.exists()


@pytest.mark.table
@pytest.mark.case("X1", "X2")
@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payloads_are_armed(tmp_path, monkeypatch, name):
    """What would happen: they do run where weights_only is left out and the environment turns it off."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sentinel = tmp_path / "sentinel"
    path = put(PAYLOADS[name](sentinel), tmp_path / "file")
    reader = torch.load
    if "protocol" in name:
        reader = pickle.load
    elif name == "npy":
        reader = functools.partial(np.load, allow_pickle=True)

    def read(tell):
        warnings.simplefilter("ignore")  # torch says that it does so
        with path.open("rb") as file:
            reader(file)

    in_fork(read)
    assert sentinel.exists()


@pytest.fixture(scope="module")
def bombs():
    return {name: make() for name, (make, _) in BOMBS.items()}


@pytest.mark.nightly
@pytest.mark.case("X4")
@pytest.mark.parametrize("door", DOORS)
def test_bombs_are_refused_in_little_memory_and_time(tmp_path, bombs, door):
    def read(tell):
        before = virtual_size("VmPeak")
        for i, (name, content) in enumerate(bombs.items()):
            tell([name, "started"])
            tell([name, refusal(door, content, tmp_path / str(i)), virtual_size("VmPeak") - before])

    outcomes = told(read, memory=2000 * MB, seconds=60)[1::2]
    assert [outcome[0] for outcome in outcomes] == list(BOMBS)
    for name, said, n_bytes in outcomes:
        assert said is not None, name
        assert n_bytes < 400 * MB, (name, n_bytes)  # they have 20 MB at most
        if door in OF_TREES:
            assert re.search(BOMBS[name][1], said), (name, said)


FORGED = {  # name: (shape, strides, floats that the storage claims to hold), where it holds 3
    "a larger shape": ((10**9,), (1,), 3), "a shape larger by one": ((4,), (1,), 3), "a larger stride": ((2,), (9,), 3),
    "a larger storage": ((3,), (1,), 10**9), "a storage larger by one": ((3,), (1,), 4),
    "both larger": ((10**9,), (1,), 10**9), "a smaller storage": ((2,), (1,), 2), "no storage": ((0,), (1,), 0),
    "a negative stride": ((2,), (-1,), 3), "a negative shape": ((-2,), (1,), 3), "a negative storage": ((1,), (1,), -1),
    "a shape beyond 2**64": ((2**32, 2**32), (1, 2**33), 3),
}  # fmt: skip


@pytest.mark.case("X4")
@pytest.mark.parametrize("name", FORGED)
def test_torch_itself_refuses_forged_sizes(tmp_path, name):
    path = put(tensor_that_claims(*FORGED[name]), tmp_path / "tree.pt")
    with pytest.raises((RuntimeError, TypeError)):
        torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"tree\.pt is damaged, or holds more than plain tensors"):
        load_tree(path)


@pytest.mark.case("X4")
def test_the_same_tensor_without_a_forged_size_is_read(tmp_path):
    """So the test above is about sizes. Rows that repeat take no memory."""
    for shape, strides in (((3,), (1,)), ((10**9, 10**9), (0, 0))):
        loaded = load_tree(put(tensor_that_claims(shape, strides), tmp_path / "tree.pt"))["weight"]
        assert (loaded.shape, loaded.untyped_storage().nbytes()) == (shape, 12)


@pytest.mark.case("X4")
def test_a_checkpoint_has_no_rows_that_repeat(tmp_path):
    """The fused kernels of optimizers take what they are given for dense, and would write behind its end."""
    path = put(tensor_that_claims((4,), (0,)), tmp_path / "tree.pt")
    assert load_tree(path)["weight"].tolist() == [1.0] * 4
    with pytest.raises(ValueError, match=r"a tensor of shape \(4,\) does not lie in a storage of the file"):
        load_tree(path, checked=True)


def set_onto_a_storage():
    """A tensor of the file that is then set onto a storage of one byte, which is no part of the file, as MB bytes."""
    with zipfile.ZipFile(io.BytesIO(tensor_that_claims((3,), (1,)))) as archive:
        whole = archive.read("archive/data.pkl").replace(b"FloatStorage", b"ByteStorage").replace(_int(3), _int(12), 1)
    return whole.removesuffix(b"s.") + (b"(ctorch.storage\nUntypedStorage\nK\x01\x85RK\x00" + _int(MB) + b"\x85K\x01"
                                        b"\x85tbs.")  # fmt: skip


TAKEN = {  # name: (the content, which torch takes, bytes that the tensor has there, what we say)
    "a Tensor of 4 MB, memory as it was": (
        lambda: torch_bytes({"weight": Calls(torch.Tensor, MB)}), 4 * MB, r"asks to run code \('torch\.Tensor'\)"),
    "a storage of one float, enlarged": (
        lambda: torch_bytes({"weight": Calls(torch._utils._rebuild_tensor_v2, Calls(torch.TypedStorage, 1), 0, (MB,),
                                             (1,), False, OrderedDict())}),
        4 * MB, r"asks to run code \('torch\.storage\.TypedStorage'\)"),
    "a storage of one byte, enlarged": (
        lambda: repickled(plain_archive(), set_onto_a_storage()), MB, r"does not lie in a storage of the file"),
}  # fmt: skip


@pytest.mark.case("X4")
@pytest.mark.parametrize("name", TAKEN)
def test_storages_that_are_no_part_of_the_file_are_refused(tmp_path, name):
    """torch takes them: a small file makes a tensor of any size, of memory that holds whatever was there."""
    make, n_bytes, said = TAKEN[name]
    path = put(make(), tmp_path / "tree.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TypedStorage is on its way out
        assert torch.load(path, weights_only=True)["weight"].nbytes == n_bytes > path.stat().st_size
    with pytest.raises(ValueError, match=said):
        load_tree(path)


@pytest.mark.case("X4")
def test_a_program_whose_entries_overlap_is_not_unpacked(tmp_path):
    """20 GB in a file of 2 MB."""
    path = put(one_entry_many_times(20_000, folder="model/data/weights/weight_"), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="it holds no description"):
        export_info(path)
    with pytest.raises(ValueError, match="pass trusted=True"):
        load_exported(path)


@pytest.mark.case("X3")
def test_text_stays_text(tmp_path):
    tree = {"state": GADGETS, "names": list(GADGETS.values())}
    save_tree(tree, tmp_path / "tree.pt")
    assert load_tree(tmp_path / "tree.pt", checked=True) == tree
    save_tree(GADGETS | {"weight": torch.ones(2)}, tmp_path / "tree.pt")
    with pytest.raises(ValueError, match=r"does not fit the model .* unexpected _instantiator, _target_, "):
        learner().load(tmp_path / "tree.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["tree.pt"]


@pytest.mark.case("X7")
def test_a_pipe_a_device_or_a_folder_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match=r"cannot load .*: it is a pipe or a device\. Pass the name of a file"):
            load_tree(path)
    with pytest.raises(IsADirectoryError):
        load_tree(tmp_path)


@pytest.mark.case("X7")
def test_a_link_to_a_file_can_be_read(tmp_path):
    save_tree({"a": 1}, tmp_path / "tree.pt")
    (tmp_path / "link.pt").symlink_to("tree.pt")
    assert load_tree(tmp_path / "link.pt") == {"a": 1}


# ---- damage

TREE = {"model": {"weight": torch.arange(5000.0).reshape(50, 100), "steps": torch.tensor(7)}, "epoch": 3,
        "rows": [{"loss": 0.5, "name": "a"}] * 3, "rng": torch.arange(500, dtype=torch.uint8), "key": b"\x00\xff"}


def damaged(whole, trial, numbers):
    """`whole` with a flipped bit, cut, with a page of zeros, or with a piece of itself in another place."""
    data, at = bytearray(whole), numbers.randrange(len(whole))
    kind = trial % 4
    if kind == 0:
        data[at] ^= 1 << numbers.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        size = numbers.choice([512, 4096])
        at -= at % size
        data[at : at + size] = bytes(len(data[at : at + size]))
    else:
        other = numbers.randrange(len(data))
        piece = data[other : other + 512]
        data[at : at + len(piece)] = piece
    return bytes(data)


@pytest.mark.nightly
@pytest.mark.case("K4", "K5", "X11")
def test_2000_damaged_files_are_refused_or_without_effect(tmp_path):
    save_tree(TREE, tmp_path / "tree.pt")
    whole = (tmp_path / "tree.pt").read_bytes()

    def read(tell):
        numbers = random.Random(0)
        for trial in range(2000):
            data = damaged(whole, trial, numbers)
            path = put(data, tmp_path / "damaged.pt")
            try:
                loaded = load_tree(path, checked=trial % 8 < 4)
            except ValueError as error:
                tell(["refused", str(error)])
            else:
                tell(["same" if bits(loaded) == bits(TREE) else "OTHER DATA", data == whole])

    outcomes = told(read, memory=1000 * MB)
    assert len(outcomes) == 2000
    kinds = [kind for kind, _ in outcomes]
    assert set(kinds) == {"refused", "same"}
    assert kinds.count("refused") > 1700
    assert all(re.search("damaged.pt (is damaged, or holds|was not loaded: it asks to run)", said)
               for kind, said in outcomes if kind == "refused")


@pytest.mark.case("K4", "K5")
def test_torch_alone_would_load_most_of_them(tmp_path):
    """What the check sums are for: the test above can fail."""
    save_tree(TREE, tmp_path / "tree.pt")
    data = bytearray((tmp_path / "tree.pt").read_bytes())
    data[data.index(torch.tensor(4999.0).numpy().tobytes())] ^= 1
    put(data, tmp_path / "tree.pt")
    assert bits(torch.load(tmp_path / "tree.pt", weights_only=True)) != bits(TREE)
    with pytest.raises(ValueError, match=r"the check sum of its entry '.*data/0' is wrong\. Nothing was"):
        load_tree(tmp_path / "tree.pt")


@pytest.mark.case("K6")
def test_a_file_without_check_sums_is_refused_and_ours_always_have_them(tmp_path):
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(TREE, tmp_path / "other.pt")
        save_tree(TREE, tmp_path / "tree.pt")
        assert torch.serialization.get_crc32_options() is False  # the user's choice stays
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(ValueError, match=r"the check sum of its entry '.*' is wrong"):
        load_tree(tmp_path / "other.pt")
    assert bits(load_tree(tmp_path / "tree.pt", checked=True)) == bits(TREE)


# ---- weights of other programs


@pytest.mark.case("X1")
def test_ordinary_weights_of_other_programs_can_be_loaded(tmp_path):
    """An OrderedDict with its versions, Parameters, other dtypes: but not as a checkpoint."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3).double(), nn.Linear(3, 3).bfloat16())
    own = learner(model=nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)))
    for state in (model.state_dict(), model.state_dict(keep_vars=True)):
        torch.save(state, tmp_path / "weights.pth")
        own.load(tmp_path / "weights.pth")
        assert all(torch.equal(value.to(state[name].dtype), state[name].detach())
                   for name, value in own.model.state_dict().items())
        with pytest.raises(ValueError, match="OrderedDict"):
            load_tree(tmp_path / "weights.pth", checked=True)


@pytest.mark.case("X1")
def test_a_file_of_torch_before_1_6_is_refused_with_the_way_to_load_it(tmp_path):
    """It has no check sums, and its storages are of any size that it claims."""
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pth is .*: it is no archive as torch writes it since 1\.6; load an "
                                         r"older file by torch\.load\(path, weights_only=True\) and save that\."):
        load_tree(tmp_path / "old.pth")
    save_tree(torch.load(tmp_path / "old.pth", weights_only=True), tmp_path / "new.pt")
    assert bits(load_tree(tmp_path / "new.pt", checked=True)) == bits({"a": torch.ones(3)})


def test_every_dtype_comes_back(tmp_path):
    tree = {str(dtype): torch.zeros(3, dtype=dtype)
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                          torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
                          torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)}
    save_tree(tree, tmp_path / "tree.pt")
    loaded = load_tree(tmp_path / "tree.pt", checked=True)
    assert {name: (str(value.dtype), tuple(value.shape)) for name, value in loaded.items()} == {
        name: (name, (3,)) for name in tree}


# ---- what stands in the source


BANNED_NAMES = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml",
                  "tarfile", "runpy", "code", "imp"}
BANNED_METHODS = {"extractall", "extract", "unpack_archive", "_load_from_bytes", "Unpickler", "add_safe_globals",
                  "safe_globals", "dis"}
# What imports by a variable: the package's own table of names, and packages of loggers (their callers: below).
IMPORTERS = {"minifast/__init__.py", "minifast/loggers/base.py"}
# What torch trusts: a program that the user trusts, or has just made.
PROGRAMS = {"minifast/inference/export.py"}


def complaints(source, path="minifast/x.py"):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names = names if isinstance(node, ast.Import) else [node.module or "", *names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in BANNED_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in BANNED_NAMES or last in BANNED_METHODS:
            yield called
        if keywords.get("allow_pickle", "False") != "False":
            yield f"{called}(allow_pickle)"
        if last == "load" and "torch" in called and "weights_only" not in keywords and path not in PROGRAMS:
            yield f"{called} without weights_only"
        if keywords.get("weights_only", "True") != "True":
            yield f"{called} with weights_only={keywords['weights_only']}"
        if last.endswith("import_module") and path not in IMPORTERS and not isinstance(node.args[0], ast.Constant):
            yield f"{called} of a variable"


@pytest.mark.case("X1", "X2", "X3")
def test_no_line_of_the_package_reads_what_can_run():
    found = {str(path): lines for path in PACKAGE.rglob("*.py") if (lines := [*complaints(
        path.read_text(encoding="utf-8"), path.relative_to(PACKAGE.parent).as_posix())])}
    assert found == {}


@pytest.mark.case("X3")
def test_loggers_import_packages_that_their_source_names():
    calls = [node for path in (PACKAGE / "loggers").glob("*.py")
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "load"]
    assert calls
    assert all(isinstance(call.args[0], ast.Constant) for call in calls)


@pytest.mark.table
@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import load", "from torch.serialization import pickle", "eval(x)", "exec(x)",
    "__import__(x)", "compile(x, '', 'exec')", "torch.load(x)", "torch.load(x, weights_only=False)",
    "torch.load(x, weights_only=flag)", "torch.jit.load(x)", "np.load(x, allow_pickle=True)",
    "tar.extractall(x)", "archive.extract(x)", "importlib.import_module(name)", "import yaml",
    "torch.storage._load_from_bytes(x)", "torch.serialization.add_safe_globals([x])", "pickletools.dis(x)"])
def test_the_check_of_the_source_bites(source):
    assert list(complaints(source))


def test_the_check_of_the_source_lets_ordinary_lines_pass():
    assert list(complaints("model.eval(); re.compile('a'); torch.load(x, weights_only=True); json.load(f); "
                           "import_module('wandb'); tensor.exec")) == []


# ---- what a checkpoint says of its owner


@pytest.mark.case("X10")
def test_a_file_says_nothing_of_who_wrote_it_and_where(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-hunter2")
    monkeypatch.chdir(tmp_path)
    path = learner().save(tmp_path / "a-name-of-its-own.pt")
    content = path.read_bytes()
    secrets = {os.getcwd(), str(PACKAGE), os.path.expanduser("~"), os.uname().nodename, "a-name-of-its-own",
               "/home", "/tmp", "/root", *(value for value in os.environ.values() if len(value) > 5)}
    assert [secret for secret in secrets if len(secret) > 3 and secret.encode() in content] == []


@pytest.mark.case("X4")
def test_what_is_read_is_plain(tmp_path):
    """Also where the file comes from another program: no deeper, no larger than what can be saved."""
    torch.save({"a": OrderedDict(b=OrderedDict())}, tmp_path / "tree.pt")
    check_plain(load_tree(tmp_path / "tree.pt"), ordered=True)
    torch.save({"a": {1.5: 2}}, tmp_path / "tree.pt")
    with pytest.raises(ValueError, match=r"has the key 1\.5, a float: use str or int"):
        load_tree(tmp_path / "tree.pt")


def test_an_error_of_the_disk_stays_one(tmp_path, monkeypatch):
    save_tree(TREE, tmp_path / "tree.pt")

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile.ZipFile, "testzip", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_tree(tmp_path / "tree.pt")
