"""The shape of the house: imports only go down, `import minifast` stays light, the public names and the layout.

Add a module: give it a floor.
"""
import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import minifast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minifast"
FLOORS = {
    0: {"errors"},
    1: {"signals", "suggest", "schedules", "fused", "plots", "tables", "batches", "losses", "scalars", "trees",
        "pickles", "rng", "workers", "waiting", "datasets", "cuda_graph", "tensor_loader", "memory"},
    2: {"groups", "hypers", "data", "snapshot", "window", "record", "plan", "files", "hooks", "verdict", "overlap",
        "samples", "pictures", "confusion"},
    3: {"state", "checks", "meters", "weights", "feed", "advice"},
    4: {"callback", "whole_set", "inference", "graph_forms"},
    5: {"loop", "scheduler", "lr_find", "recorder", "progress", "metrics", "finite", "ownership", "budget",
        "loggers", "outcomes"},
    6: {"lr", "composed", "resume", "graph", "in_memory"},
    7: {"cycles", "dataloaders"},
    8: {"fitting"},
    9: {"callbacks", "studies", "interpret"},
    10: {"learner"},
    11: {"__init__", "demo", "vision"},
    12: {"__main__"},
}  # fmt: skip
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
TOP_LEVEL = {"pyproject.toml", "minifast", "tests", "nbs", "README.md", "Makefile", "LICENSE", "CHANGELOG.md"}


def is_type_checking(test):
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def nodes(tree):
    """Every node, those in functions too (a late import is an import), but for the bodies of `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.orelse:
                yield from [child, *nodes(child)]
        else:
            yield from [node, *nodes(node)]


def imported(path, package=PACKAGE):
    """The absolute dotted names that a file of the package imports, `from a import b` as "a.b"."""
    parents = ["minifast", *path.relative_to(package).parts[:-1]]
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def module_of(path, package=PACKAGE):
    """The module, or the package of several files, that stands on a floor."""
    return Path(path.relative_to(package).parts[0]).stem


def violations(path, package=PACKAGE):
    own = module_of(path, package)
    for name in imported(path, package):
        top, *rest = name.split(".")
        if top != "minifast":
            continue
        # `from minifast import Learner` is an import of the package's front door, not of a module.
        other = rest[0] if rest and rest[0] in FLOOR else "__init__"
        if other != own and FLOOR[other] >= FLOOR[own]:
            yield f"{own} (floor {FLOOR[own]}) imports {other} (floor {FLOOR[other]})"


def test_every_module_has_a_floor():
    assert {module_of(path) for path in PACKAGE.rglob("*.py")} == set(FLOOR)


def test_imports_only_go_down():
    assert [line for path in sorted(PACKAGE.rglob("*.py")) for line in violations(path)] == []


def complaint(other):
    """What is said of `loop` if it imports `other`."""
    return f"loop (floor {FLOOR['loop']}) imports {other} (floor {FLOOR[other]})"


BESIDE = min(FLOORS[FLOOR["loop"]] - {"loop"})  # another module of its own floor: no way to import that either


def test_the_examples_below_are_what_they_say():
    assert max(FLOOR["errors"], FLOOR["signals"], FLOOR["state"]) < FLOOR["loop"]
    assert FLOOR["loop"] == FLOOR[BESIDE] < FLOOR["lr"] < FLOOR["learner"] < FLOOR["__init__"]


@pytest.mark.parametrize(
    ("source", "others"),
    [
        ("from .errors import E", []),
        ("from . import errors, signals", []),
        ("import minifast.errors", []),
        ("import torch, math", []),
        (f"from .{BESIDE} import x", [BESIDE]),
        (f"from minifast import {BESIDE}", [BESIDE]),
        ("from .lr import OneCycle", ["lr"]),
        ("from .learner import Learner", ["learner"]),
        ("from . import state, learner", ["learner"]),
        ("import minifast.learner as l", ["learner"]),
        ("from minifast.learner import Learner", ["learner"]),
        ("from minifast import Learner", ["__init__"]),
        ("from . import *", ["__init__"]),
        ("import minifast", ["__init__"]),
        ("def f():\n    from .learner import Learner", ["learner"]),
        ("if TYPE_CHECKING:\n    from .learner import Learner", []),
        ("if typing.TYPE_CHECKING:\n    import minifast.learner", []),
        ("if TYPE_CHECKING: pass\nelse: from .lr import OneCycle", ["lr"]),
        ("if not TYPE_CHECKING: from .lr import OneCycle", ["lr"]),
    ],
)
def test_the_check_bites(tmp_path, source, others):
    path = tmp_path / "loop.py"
    path.write_text(source)
    assert list(violations(path, tmp_path)) == [complaint(other) for other in others]


def test_the_check_bites_inside_a_package(tmp_path):
    path = tmp_path / "loop" / "part.py"
    path.parent.mkdir()
    path.write_text("from .other import a\nfrom ..state import b\nfrom ..lr import c\nfrom .. import learner\n")
    assert list(violations(path, tmp_path)) == [complaint("lr"), complaint("learner")]


def run_python(*arguments):
    """What a fresh Python prints; it must end well and say nothing on stderr."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.case("E1")
@pytest.mark.slow
def test_importing_minifast_loads_nothing_heavy_and_prints_nothing():
    code = """
import sys, torch
before = set(sys.modules)
import minifast
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - sys.stdlib_module_names - {"minifast", "numpy"}))
"""
    assert run_python("-W", "error", "-c", code) == []


@pytest.mark.slow
def test_importing_minifast_loads_none_of_the_toolbox():
    """So `import minifast` and `python -m minifast` take no longer for it."""
    toolbox = "('callbacks', 'studies', 'loggers', 'whole_set', 'hooks', 'resume', 'interpret', 'outcomes', 'pictures')"
    code = f"""
import sys, minifast
print(*(name for name in sys.modules if name.split(".")[1:2] and name.split(".")[1] in {toolbox}
        and name.startswith("minifast.")))
assert "EMA" in dir(minifast) and "EMA" not in vars(minifast)
assert minifast.EMA is minifast.EMA
"""
    assert run_python("-W", "error", "-c", code) == []


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"module 'minifast' has no attribute 'EMAA'"):
        _ = minifast.EMAA


def test_schedules_are_plain_python():
    allowed = {"math", "typing", "collections.abc", "__future__"}
    names = set(imported(PACKAGE / "schedules.py"))
    assert {name for name in names if name not in allowed and name.rpartition(".")[0] not in allowed} == set()
    # -I -S: without site-packages there is no torch that could be imported.
    assert run_python("-I", "-S", "-c", "import runpy; runpy.run_path('minifast/schedules.py')") == []


def test_all_is_exactly_what_is_public():
    names = minifast.__all__
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(minifast, name)] == []
    public = {name for name, value in vars(minifast).items() if not isinstance(value, ModuleType) and name[0] != "_"}
    modules = {name for name in names if isinstance(getattr(minifast, name), ModuleType)}
    assert set(names) - modules - {"__version__"} == public


def own_docstring(thing):
    """Its docstring, but not the signature that dataclasses and named tuples put there by themselves."""
    text = thing.__doc__ or ""
    return "" if text.startswith(f"{thing.__name__}(") else text.strip()


def test_every_public_class_and_function_has_a_docstring():
    things = [getattr(minifast, name) for name in minifast.__all__]
    things = [thing for thing in things if inspect.isclass(thing) or inspect.isroutine(thing)]
    assert [thing.__name__ for thing in things if not own_docstring(thing)] == []


def test_the_top_level_holds_nothing_else():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files here: {error}")
    top = {name.partition("/")[0] for name in listed.split("\0") if name}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_the_two_lists_of_development_packages_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["optional-dependencies"]["dev"] == project["dependency-groups"]["dev"]
