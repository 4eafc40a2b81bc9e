"""The failure catalogue: what can go wrong, by id, and what of it no test covers, and why.

A test covers an id by the mark `@pytest.mark.case("K1")`. `python tests/reliability/catalogue.py` prints what is
missing. The cases of training on several processes (D1, D2, ...) are not counted: they come with it.
"""
import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

CASES = {
    # arguments
    "A1": "number of epochs out of range",
    "A2": "learning rate out of range, or no number",
    "A3": "more or fewer learning rates than layer groups",
    "A4": "a slice of learning rates that does not rise, or is empty",
    "A5": "settings of OneCycle out of range",
    "A6": "settings of the circular schedules out of range",
    "A7": "what is no callback, and the same one twice",
    "A8": "a callback with a misspelt event",
    "A9": "a monitor of a column that is not there",
    "A10": "settings of monitors and checkpoints out of range",
    "A11": "a loss that is no scalar with a gradient",
    "A12": "nothing to train, or an optimizer of another model",
    "A13": "settings of clipping and accumulation out of range",
    "A14": "a folder for the run that cannot be one",
    "A15": "a seed out of range",
    # data
    "B1": "no batch to train on",
    "B2": "a last batch of one sample for BatchNorm",
    "B3": "a data set that raises, with and without workers",
    "B4": "labels out of range, of another type or shape",
    "B5": "inputs with NaN or infinity",
    "B6": "a batch that is no pair",
    "B7": "a length that is not true, or changes",
    "B8": "data without a length, or without an end",
    "B9": "augmentation by numpy in worker processes",
    "B10": "a worker process that is killed",
    "B11": "a worker process that hangs",
    "B12": "a sampler of the user's own",
    "B13": "worker processes that persist over epochs",
    # numbers
    "N1": "a loss that is not finite",
    "N2": "a gradient that is not finite, with a finite loss",
    "N3": "a loss that is not finite on one of several processes",
    "N4": "an overflow of fp16",
    "N5": "a metric that is NaN",
    "N6": "a validation loss that is NaN",
    "N7": "a batch without a valid target",
    "N8": "metrics over batches of different sizes",
    "N9": "a NaN in what is smoothed",
    "N10": "weights that are not finite, with a finite loss",
    # control flow and interrupts
    "I1": "Ctrl-C at any moment",
    "I2": "a second Ctrl-C",
    "I3": "SIGTERM in training, validation, the finder and while saving",
    "I4": "a fit in another thread than the main one",
    "I5": "signal handlers of the host program",
    "I6": "an error in a callback, in each event",
    "I7": "an error in a cleanup after an error",
    "I8": "an error of a fit that saves itself",
    "I9": "a cancel from each event",
    "I10": "an error inside an accumulation window",
    "I11": "a fit inside a fit, and from two threads",
    "I12": "modes, hooks and contexts after an error",
    "I13": "an output that cannot be written",
    "I14": "memory that runs out",
    "I15": "early stopping and a checkpoint in one epoch",
    # the finder
    "L1": "training after the finder is training without it",
    "L2": "an error or Ctrl-C in the finder",
    "L3": "a kill in the finder",
    "L4": "the finder in a folder that cannot be written",
    "L5": "a finder's run without an answer",
    "L6": "settings of the finder out of range",
    "L7": "fewer batches than the finder tries rates",
    "L8": "callbacks of the fit in the finder",
    "L9": "layer groups in the finder",
    "L10": "weights that become infinite in the finder",
    # schedules and resume
    "S1": "resume at every step of a schedule",
    "S2": "resume with another length",
    "S3": "resume of a fit that had ended",
    "S4": "resume at the end of an epoch",
    "S5": "resume with another model",
    "S6": "resume with other optimizer state, or in another order",
    "S7": "resume with other layer groups or frozen ones",
    "S8": "resume with another optimizer",
    "S9": "resume with other data",
    "S10": "resume on another machine",
    "S11": "accumulation that does not divide the batches",
    "S12": "averaged weights while a checkpoint is written",
    "S13": "all that callbacks count, after a resume",
    "S14": "a callback more or less at a resume",
    "S15": "a state of a callback that could not be read back",
    # checkpoint files
    "K1": "a kill at each step of a save",
    "K2": "a full disk",
    "K3": "a full disk where one checkpoint is kept",
    "K4": "a file that a power cut has damaged",
    "K5": "a flipped bit",
    "K6": "a file without check sums",
    "K7": "each call of a save that fails",
    "K8": "two runs in one folder",
    "K9": "temporary files of dead processes",
    "K10": "a kill between the best epoch and its file",
    "K11": "which epoch is the best one: NaN, infinity, ties, both directions",
    "K12": "a best checkpoint of an earlier run",
    "K13": "a file that is written over while it is in use",
    "K14": "checkpoints that are removed while a fit runs",
    "K15": "names of metrics that are no names of files",
    "K16": "permissions of the files",
    "K17": "clocks that go backwards",
    "K18": "a checkpoint of a newer version",
    "K19": "tied weights, views, tensors without values",
    # security
    "X1": "files that ask to run code",
    "X2": "the same, where torch is told by its environment to trust files",
    "X3": "text in a file that names code",
    "X4": "files that would unpack to any size",
    "X5": "each file of a run, poisoned",
    "X6": "pickled learners",
    "X7": "paths in a file, and links in the way",
    "X8": "a torch with known holes",
    "X9": "pickles between processes",
    "X10": "secrets in a checkpoint",
    "X11": "damaged files crash nothing",
    # resources
    "R1": "memory over many steps",
    "R2": "worker processes after a kill",
    "R3": "processes, files and threads after errors",
    "R4": "hooks after errors",
    "R5": "figures after many plots",
    "R6": "no matplotlib, no display",
    "R7": "memory over many learners",
    "R8": "open files over many checkpoints",
    "R9": "batches and outputs after a fit",
    "R10": "the record of a long run",
    "R11": "the progress bar where there is no terminal, nested, after an error",
    # environment
    "E1": "a torchvision that does not fit torch",
    "E2": "another number of threads",
    "E3": "worker processes that are started afresh",
    "E4": "HOME and TMPDIR that cannot be written",
    "E5": "a file system without links, locks and fsync of folders",
    "E6": "Python without asserts",
    "E7": "warnings as errors, other hash seeds, another locale",
    "E8": "processes forked from a program with threads",
    "E9": "little memory while saving and loading",
}

MISSING = {
    "R10": "the Recorder keeps every step, 40 bytes each, and so does a checkpoint: 10 million steps are 400 MB",
    "N3": "needs several processes that train together: comes with distributed training",
}


def covered(files: Iterable[Path] | None = None) -> dict[str, list[str]]:
    """id -> where its tests are, "test_x.py::test_y", by the source of the test files.

    Raises ValueError for a mark that is not on a test, or whose ids are not written out.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")) if files is None else files:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        calls = {id(node): node for node in ast.walk(tree) if _is_case(node)}
        for name, node in _marks(tree):
            del calls[id(node)]
            if not node.args or node.keywords or not all(_is_text(arg) for arg in node.args):
                raise ValueError(f"{file.name}, line {node.lineno}: the ids of a case must be written out as text")
            for arg in node.args:
                found.setdefault(arg.value, []).append(f"{file.name}::{name}")
        if calls:
            raise ValueError(f"{file.name}, line {min(node.lineno for node in calls.values())}: this mark is on no "
                             "test: write it as a decorator, in pytestmark, or as marks= of a parameter")
    return found


def problems(found: Iterable[str], missing: Iterable[str], cases: Iterable[str] = tuple(CASES)) -> list[str]:
    """What is wrong with the count, a line each."""
    found, missing, cases = map(set, (found, missing, cases))
    return [f"{what}: {' '.join(in_order(ids))}" for what, ids in (
        ("no such case", (found | missing) - cases),
        ("both covered and missing", found & missing),
        ("neither covered nor missing", cases - found - missing),
    ) if ids]


def report(found: Iterable[str]) -> list[str]:
    """How many cases are covered, and what is missing and why, in lines."""
    found = set(found) & set(CASES)
    return [f"{len(found)} of {len(CASES)} cases of the failure catalogue have a test ({len(found) / len(CASES):.1%})",
            *(f"  {name:4} {CASES[name]}: {reason}" for name, reason in MISSING.items())]


def in_order(ids: Iterable[str]) -> list[str]:
    """Ids as in the catalogue; unknown ones at the end."""
    places = {name: i for i, name in enumerate(CASES)}
    return sorted(ids, key=lambda name: (places.get(name, len(places)), name))


def _marks(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(test, mark) of decorators, of `marks=` in them, and of the module's pytestmark."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "pytestmark" for target in node.targets):
            yield from (("*", inner) for inner in ast.walk(node.value) if _is_case(inner))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.lower().startswith("test"):
            for decorator in node.decorator_list:
                inside = [keyword.value for part in ast.walk(decorator) if isinstance(part, ast.Call)
                          for keyword in part.keywords if keyword.arg == "marks"]
                for place in [decorator] if _is_case(decorator) else inside:
                    yield from ((node.name, inner) for inner in ast.walk(place) if _is_case(inner))


def _is_case(node: ast.AST) -> bool:
    return (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "case"
            and ast.unparse(node.func) == "pytest.mark.case")  # fmt: skip


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


if __name__ == "__main__":
    sys.stdout.write("\n".join(report(covered())) + "\n")
