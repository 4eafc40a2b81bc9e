"""What torch may see of a program in a file: it trusts what it loads, so each entry and text has to be a known one.

`torch.export.load` unpickles objects, loads native code and evaluates text that it finds in the archive.
"""
import io
import json
import os
import re
import struct
import zipfile
from collections import Counter
from typing import Any, BinaryIO, cast

MOST_ENTRIES = 100_000
_ENTRY = re.compile(r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|"
                    r"data/weights/(weight_\d+|model_weights_config\.json)|data/sample_inputs/model\.pt|"
                    r"data/constants/(tensor_\d+|model_constants_config\.json)|extra/minifast\.json")
_NAME = re.compile(r"[\w.+-]*")
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.(?!from_file)(_?[a-z]\w*|__(and|or|xor|lshift|rshift)__)\.[A-Za-z]\w*|"
    r"torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond)|torch\.sym_[a-z]+|"
    r"math\.(ceil|floor|trunc|sqrt|pow)|_operator\.(add|sub|mul|mod|neg|pos|pow|truediv|floordiv|eq|ne|lt|le|gt|ge|"
    r"and_|or_|not_|getitem)")
# sizes, e.g. Add(Mul(Integer(2), Symbol('s5', integer=True)), -1): only capitalised names are called
_EXPRESSION = re.compile(r"('[A-Za-z]\w*'|[A-Z]\w*|[a-z]\w*(?![\w(])|\d+(\.\d+)?|[-+*/%(),=<>&|~ ])*")
_EQUAL_SIZES = re.compile(r"L[\w'\[\]]+\.size\(\)\[\d+\] == L[\w'\[\]]+\.size\(\)\[\d+\]")
_TEXT = re.compile(r".*", re.DOTALL)
_RULES = {"target": _OPERATOR, "as_operator": _OPERATOR, "expr_str": _EXPRESSION, "as_string": _TEXT,
          "as_strings": _TEXT}
_NESTS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def entries(content: bytes) -> dict[str, bytes]:
    """The files in an archive, without the name of their common folder."""
    _check_directory(io.BytesIO(content), len(content))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
        names = [info.filename.partition("/")[2] for info in infos]
        counts = Counter(names)
        for name, info in zip(names, infos, strict=True):
            if not _ENTRY.fullmatch(name) or counts[name] > 1 or info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"it holds {info.filename!r:.80}, which is no part of a program")
        if sum(info.file_size for info in infos) > len(content):
            raise ValueError("its entries overlap")
        return {name: archive.read(info) for name, info in zip(names, infos, strict=True)}


def _check_directory(file: BinaryIO, size: int) -> int:
    """The number of entries that an archive claims to hold, from its end: before a list of them is made.

    The end has to be as torch writes it, without a gap: then all readers find the same list.
    """
    file.seek(-min(size, 98), os.SEEK_END)
    tail = file.read(98)
    if len(tail) < 22:
        raise ValueError("its end is missing")
    mark, *_, n, n_bytes, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    end = size - 22
    if mark != b"PK\5\6" or comment:
        raise ValueError("its end is missing")
    if tail[-42:-38] == b"PK\6\7":  # larger numbers
        end = size - 98
        if struct.unpack("<4sLQL", tail[-42:-22])[2] != end or tail[:4] != b"PK\6\6":
            raise ValueError("its end is missing")
        n, n_bytes, start = struct.unpack("<3Q", tail[32:56])
    if n > MOST_ENTRIES:
        raise ValueError(f"it claims to hold {n:,} entries")
    if start + n_bytes != end:
        raise ValueError("its list of entries is not where it says")
    file.seek(start)
    if file.read(n_bytes).count(b"PK\1\2") > MOST_ENTRIES:
        raise ValueError(f"it holds more than {MOST_ENTRIES:,} entries")
    return cast(int, n)


def checked(content: bytes) -> bytes:
    """The same program, written anew from what is known to be harmless. Raises ValueError for anything else."""
    files = entries(content)
    for config in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
        for name, payload in json.loads(files[config])["config"].items():
            if payload["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                raise ValueError(f"{name!r:.80} is a pickled object, not a plain tensor")
    program = json.loads(files["models/model.json"])
    for guard in program.pop("guards_code", ()):  # code that torch would evaluate; equal sizes it checks without
        if not _EQUAL_SIZES.fullmatch(guard):
            raise ValueError(f"it holds for some numbers of samples only: {guard!r:.120}")
    files["models/model.json"] = json.dumps(_plain(program) | {"guards_code": []}).encode()
    files["data/sample_inputs/model.pt"] = b""  # the traced batch, pickled
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # one reading of it: torch has a zip reader of its own
        for name, data in files.items():
            archive.writestr(f"model/{name}", data)
    return buffer.getvalue()


def _plain(value: Any, key: str = "") -> Any:
    """The graph without its comments (metadata: source lines of the author). Raises ValueError for unknown text."""
    if isinstance(value, dict):
        return {_named(name): {} if name == "metadata" else _plain(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, key) for inner in value]
    if isinstance(value, str) and key in ("in_spec", "out_spec"):
        _check_nest(json.loads(value)[1])
    elif isinstance(value, str):
        _named(value, _RULES.get(key, _NAME))
    return value


def _check_nest(spec: dict[str, Any]) -> None:
    """A nest of inputs or outputs, as torch writes it down: tuples, lists and dicts with text as keys."""
    if spec["type"] is not None and spec["type"] not in _NESTS:
        raise ValueError(f"it takes or gives a {spec['type']!r:.80}; tuples, lists and dicts can be exported")
    for name in (json.loads(spec["context"]) if spec["context"] is not None else None) or ():
        _named(name)
    for child in spec["children_spec"]:
        _check_nest(child)


def _named(text: Any, rule: re.Pattern[str] = _NAME) -> Any:
    if not isinstance(text, str) or not rule.fullmatch(text):
        raise ValueError(f"it holds {text!r:.80}, which is not known to be harmless")
    return text
