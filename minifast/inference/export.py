"""A trained model in files: a `torch.export` program, or its weights with a description."""
import copy
import hashlib
import io
import json
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.batch import call_model, n_samples, scores
from ..base.nest import map_tensors, tensors, to_device
from ..data.feed import first_batch
from ..data.loader import in_order, is_one_shot, second_copy, valid_sets
from ..errors import check_flag, check_path
from ..files.reading import opened
from ..files.weights import load_weights, save_weights
from ..files.writing import replacing

if TYPE_CHECKING:
    from ..training.trainer import Trainer

WEIGHTS, DESCRIPTION = "weights.pt", "model.json"  # the two files of a folder
FORMAT = "minifast export 1"
EQUAL_SIZES = re.compile(r"L[\w'\[\]]+\.size\(\)\[\d+\] == L[\w'\[\]]+\.size\(\)\[\d+\]")  # a guard of a program


def export(learn: "Trainer", path: str | os.PathLike[str], *, inputs: Any = None, labels: Sequence[str] | None = None,
           metadata: Mapping[str, Any] | None = None) -> Path:
    """See `Learner.export`."""
    path = Path(check_path("path", path))
    is_program = _check_place(path)
    labels, metadata = _check_labels(labels), _check_metadata(metadata)
    inputs = _first_inputs(learn) if inputs is None else to_device(inputs, "cpu")
    described: dict[str, Any] = {
        "format": FORMAT,
        "versions": {"torch": str(torch.__version__), "minifast": sys.modules["minifast"].__version__},
        "model": type(learn.model).__qualname__, "groups": list(learn.groups.names),
        "inputs": _described(inputs, n_samples(None, inputs)), "state": _described(learn.model.state_dict()),
        "labels": labels, "metadata": metadata}
    if is_program:
        with learn.eval_mode():
            _write(path, _program(learn.model, inputs, described))
        return path
    path.mkdir(exist_ok=True)
    try:
        with learn.eval_mode():  # the weights that `predict` uses
            described["sha256"] = _sha256(save_weights(learn.model, path / WEIGHTS))
        _write(path / DESCRIPTION, json.dumps(described, indent=1).encode())
    finally:
        if not any(path.iterdir()):
            path.rmdir()
    return path


def load_exported(path: str | os.PathLike[str], model: nn.Module | None = None, *, trusted: bool = False) -> nn.Module:
    """What `Learner.export` wrote, as a module for inference on the CPU that gives what `predict` gives.

    model: for a folder of weights, one of the class that was exported: it is filled, put in eval mode and returned; all
        of the weights fit, or nothing is changed. Nothing in the folder is run: it may come from strangers.
    trusted: True for a program, because `torch.export.load` runs what is in it: it unpickles objects, loads native code
        and evaluates text. It comes as a module of its own; torch lets nobody call train() or eval() on it.

    Raises ValueError for a program that is not `trusted`, and with what is wrong with the file or does not fit the
    model; FileNotFoundError without it.
    """
    path = Path(check_path("path", path))
    trusted = check_flag("trusted", trusted)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r:.80} ({type(model).__name__}).")
    if path.is_dir():
        described = export_info(path)
        if model is None:
            raise ValueError(f"{path} holds weights, which need a model ({described.get('model')}). Pass one of that "
                             "class as model=.")
        if described.get("sha256") != _sha256(path / WEIGHTS):
            raise ValueError(f"{path / WEIGHTS} is damaged, or not the file that {DESCRIPTION} describes. Nothing was "
                             "loaded. Export again.")
        load_weights(model, path / WEIGHTS)
        return model.eval()
    if model is not None:
        raise ValueError(f"{path} is a program, which needs no model. Leave out model=.")
    with opened(path) as file:
        if not trusted:
            raise ValueError(f"{path} is a program: whoever loads it runs what is in it. If you know who made it, pass "
                             "trusted=True. From strangers take weights with their description, which run nothing.")
        try:
            with zipfile.ZipFile(file) as archive:  # torch checks no check sums here
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the check sum of {damaged!r:.80} is wrong")
            file.seek(0)
            return torch.export.load(file).module()
        except Exception as error:
            raise _refusal(path, error) from error


def export_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in what `export` wrote, plain values; the model itself is not loaded, and nothing is run.

    Keys: format, versions, model (the class's name), groups (layer groups), inputs and state (dtype and shape of each
    tensor, "n" for the number of samples), labels, metadata. Raises ValueError if there is none.
    """
    path = Path(check_path("path", path))
    try:
        described = json.loads((path / DESCRIPTION).read_bytes() if path.is_dir() else _description(path))
        if described["format"] != FORMAT:
            raise ValueError(f"its format is {described['format']!r:.40}, not {FORMAT!r}")
    except OSError:
        raise
    except Exception as error:
        raise _refusal(path, error) from error
    return described  # type: ignore[no-any-return]


def _description(path: Path) -> bytes:
    with opened(path) as file, zipfile.ZipFile(file) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.endswith("/extra/minifast.json")]
        if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED:  # packed, it could unpack to any size
            raise ValueError("it holds no description")
        return archive.read(found[0])


def _check_place(path: Path) -> bool:
    """Whether `path` is that of a program. Raises OSError or ValueError if it cannot be written to."""
    is_program = path.suffix.lower() == ".pt2"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot export to {path}: there is no folder {path.parent}. Make it first.")
    if is_program and path.is_dir():
        raise IsADirectoryError(f"cannot export to {path}: it is a folder, and a program (.pt2) is a file.")
    if not is_program and path.suffix.lower() in (".pt", ".pth", ".pkl", ".onnx", ".json", ".safetensors"):
        raise ValueError(f"cannot export to {path}: pass a name that ends in .pt2 for a program, or that of a folder "
                         f"for weights and their description. Weights alone: learn.save({path.name!r}).")
    if not is_program and path.exists() and not path.is_dir():
        raise FileExistsError(f"cannot export to {path}: it is a file, and weights with their description are a "
                              "folder. Pass another name, or one that ends in .pt2 for a program.")
    return is_program


def _check_labels(labels: Any) -> list[str] | None:
    if labels is not None and not (isinstance(labels, (list, tuple)) and all(isinstance(name, str) for name in labels)):
        raise TypeError(f"labels must be a list of class names, got {labels!r:.80}.")
    return None if labels is None else list(labels)


def _check_metadata(metadata: Any) -> dict[str, Any]:
    if metadata is None:
        return {}
    try:
        if isinstance(metadata, dict) and json.loads(json.dumps(metadata, allow_nan=False)) == metadata:
            return metadata
    except (TypeError, ValueError):
        pass
    raise TypeError("metadata must be a dict with text as keys, of text, finite numbers, True, False, None, lists and "
                    f"such dicts, got {metadata!r:.80}.")


def _first_inputs(learn: "Trainer") -> Any:
    fits = [loader for _, loader in valid_sets(learn.dls.valid)]
    data = fits[0] if fits else learn.dls.train
    if is_one_shot(data):
        raise ValueError(f"the data is an iterator ({type(data).__name__}), and a batch drawn from it would be lost. "
                         "Pass inputs=, a batch as predict takes it.")
    with learn.eval_mode(data):
        batch = first_batch(second_copy(in_order(data)), torch.device("cpu"))
    if batch is None:
        raise ValueError("the data yielded 0 batches. Pass inputs=, a batch as predict takes it.")
    inputs, target = learn.unpack(batch)
    if isinstance(inputs, Mapping):
        inputs = {key: value for key, value in inputs.items() if value is not target}
    return to_device(inputs, "cpu")


def _described(nest: Any, n: int | None = None) -> Any:
    """A nest with each tensor replaced by its dtype and shape, "n" where the first dimension is that."""
    if isinstance(nest, Mapping):
        return {str(key): _described(value, n) for key, value in nest.items()}
    if isinstance(nest, (tuple, list)):
        return [_described(value, n) for value in nest]
    if not isinstance(nest, Tensor):
        return {"type": type(nest).__name__}
    shape: list[Any] = list(nest.shape)
    return {"dtype": str(nest.dtype).removeprefix("torch."), "shape": ["n", *shape[1:]] if shape[:1] == [n] else shape}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


class _Scores(nn.Module):
    """A model that gives the scores of its output only: a class of the output's own would be missing elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return scores(self.model(*args, **kwargs))


def _program(model: nn.Module, inputs: Any, described: dict[str, Any]) -> bytes:
    """The file of a program, which was loaded once to see that it can be. Raises ValueError with torch's words."""
    n = n_samples(None, inputs)
    # torch takes a dimension of 1 for a constant; and each tensor is one of its own, to be told apart from the others
    rows = [0, 0] if n == 1 else slice(None)
    inputs = map_tensors(lambda tensor: tensor[rows].clone() if _has_samples(tensor, n) else tensor, inputs)
    shapes = torch.export.ShapesCollection()
    for tensor in tensors(inputs):
        if _has_samples(tensor, max(n, 2)):
            shapes[tensor] = {0: torch.export.Dim.DYNAMIC}
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else () if isinstance(inputs, Mapping) else (inputs,)
    try:
        twin = copy.deepcopy(model).to("cpu").eval().requires_grad_(False)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*were assigned during export", UserWarning)  # said of each nn.LSTM
            output = call_model(twin, inputs)
            traced = twin if scores(output) is output else _Scores(twin)
            program = torch.export.export(traced, args, kwargs, dynamic_shapes=shapes, strict=False)
        for guard in getattr(program, "_guards_code", ()):
            if not EQUAL_SIZES.fullmatch(guard):
                raise ValueError(f"it holds for some numbers of samples only: {guard!r:.120}")
        program.example_inputs = None  # the traced batch is nobody's business
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # nor are lines of the author's source
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"minifast.json": json.dumps(described)})
        content = buffer.getvalue()
        torch.export.load(io.BytesIO(content))
    except Exception as error:
        raise ValueError(f"torch.export cannot make a program of this {type(model).__name__}: {type(error).__name__}: "
                         f"{str(error).strip():.600}\nExport its weights instead: pass a path that does not end in "
                         ".pt2.") from error
    return content


def _has_samples(tensor: Tensor, n: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == n


def _refusal(path: Path, error: Exception) -> ValueError:
    reason = f": {error}" if type(error) is ValueError else f" ({type(error).__name__})"
    return ValueError(f"{path} is damaged, or not what export wrote{reason:.300}. Nothing was loaded.")
