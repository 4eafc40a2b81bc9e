"""The shape of the house: wings that import downwards, budgets in lines, a light `import minifast`, public names.

Add a wing, or a file that lies directly in `minifast/`: give it a floor.
"""
import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

import minifast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minifast"
# Wings, and files that lie flat. A file may import what stands on a lower floor, and its own wing. `parallel` is to
# stand on floor 2.
FLOORS = {
    0: {"errors"},
    1: {"base", "show", "machine", "suggest"},
    3: {"data", "optim", "record", "files"},
    4: {"core"},
    5: {"schedules", "finder"},
    6: {"standard"},
    7: {"resume", "loggers"},
    8: {"training"},
    9: {"callbacks", "studies", "inference", "interpret"},
    10: {"learner"},
    11: {"__init__", "demo", "vision"},
    12: {"__main__"},
}  # fmt: skip
FLOOR = {wing: floor for floor, wings in FLOORS.items() for wing in wings}
WINGS = {wing for wing in FLOOR if (PACKAGE / wing).is_dir()}
# The one circle between files: a callback reads and writes the state of its fit, which holds the callbacks. Who imports
# whom only for annotations says so at its top.
CIRCLES = [{"core/callback", "core/state"}]
TOP_LEVEL = {"pyproject.toml", "minifast", "tests", "nbs", "README.md", "Makefile", "LICENSE", "CHANGELOG.md",
             "CONTRIBUTING.md"}
MOST_FLAT, MOST_LINES, MOST_OF_LOOP, MOST_OF_CORE, MOST_OF_ALL = 8, 300, 100, 3_600, 17_000
TO_READ = ("core", "schedules", "standard", "record")


def lines_of(*places):
    """How many lines the Python files of the package have, in wings or files."""
    paths = chain.from_iterable(sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / place] for place in places)
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def imported(path, package=PACKAGE):
    """The absolute dotted names that a file of the package imports, `from a import b` as "a.b".

    Those in functions too (a late import is an import), and those under `if TYPE_CHECKING:` (to know a name for an
    annotation is to know it).
    """
    parents = ["minifast", *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def wing_of(path, package=PACKAGE):
    """The wing, or the file that lies flat, which stands on a floor."""
    return Path(path.relative_to(package).parts[0]).stem


def violations(path, package=PACKAGE):
    own = wing_of(path, package)
    for name in imported(path, package):
        top, *rest = name.split(".")
        if top != "minifast":
            continue
        # `from minifast import Learner` is an import of the package's front door, not of a wing.
        other = rest[0] if rest and rest[0] in FLOOR else "__init__"
        if other != own and FLOOR[other] >= FLOOR[own]:
            yield f"{own} (floor {FLOOR[own]}) imports {other} (floor {FLOOR[other]})"


def circles(package=PACKAGE):
    """Sets of files that import each other, over however many steps."""
    names = {path: str(path.relative_to(package).with_suffix("")) for path in package.rglob("*.py")}
    by_module = {f"minifast.{name.removesuffix('/__init__').replace('/', '.')}": name for name in names.values()}
    arrows = {}
    for path, name in names.items():
        modules = list(imported(path, package))
        found = {by_module.get(module) or by_module.get(module.rpartition(".")[0]) for module in modules}
        arrows[name] = found - {None, name}
    reach = {name: set(others) for name, others in arrows.items()}
    for _ in names:
        grown = {name: others.union(*(reach[other] for other in others)) for name, others in reach.items()}
        if grown == reach:
            break
        reach = grown
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in reach if name in reach[name]}
    return sorted(map(set, found), key=sorted)


def test_every_wing_has_a_floor():
    assert {wing_of(path) for path in PACKAGE.rglob("*.py")} == set(FLOOR)


def test_imports_only_go_down():
    assert [line for path in sorted(PACKAGE.rglob("*.py")) for line in violations(path)] == []


def test_there_is_one_circle_and_both_of_its_files_say_so():
    assert circles() == CIRCLES
    for name in chain.from_iterable(CIRCLES):
        assert "circle" in ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")))


def test_circles_are_found(tmp_path):
    sources = {"a": "from .b import x", "b": "from . import c", "c": "if TYPE_CHECKING:\n    from .a import y",
               "d": "from .a import z"}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    assert circles(tmp_path) == [{"a", "b", "c"}]


def complaint(other):
    """What is said of `core` if it imports `other`."""
    return f"core (floor {FLOOR['core']}) imports {other} (floor {FLOOR[other]})"


@pytest.mark.table
@pytest.mark.parametrize(
    ("source", "others"),
    [
        ("from ..errors import E", []),
        ("from .. import errors, base", []),
        ("from .state import State", []),
        ("from . import state, learner", []),
        ("import minifast.base.nest", []),
        ("import torch, math", []),
        ("from ..schedules.lr import OneCycle", ["schedules"]),
        ("from minifast.schedules import lr", ["schedules"]),
        ("from ..learner import Learner", ["learner"]),
        ("from .. import base, learner", ["learner"]),
        ("import minifast.learner as l", ["learner"]),
        ("from minifast.learner import Learner", ["learner"]),
        ("from minifast import Learner", ["__init__"]),
        ("from .. import *", ["__init__"]),
        ("import minifast", ["__init__"]),
        ("def f():\n    from ..learner import Learner", ["learner"]),
        ("if TYPE_CHECKING:\n    from ..learner import Learner", ["learner"]),
        ("if typing.TYPE_CHECKING:\n    import minifast.standard.finite", ["standard"]),
    ],
)
def test_the_check_bites(tmp_path, source, others):
    path = tmp_path / "core" / "loop.py"
    path.parent.mkdir()
    path.write_text(source)
    assert list(violations(path, tmp_path)) == [complaint(other) for other in others]


def test_the_check_bites_between_wings_of_one_floor(tmp_path):
    path = tmp_path / "finder" / "finder.py"
    path.parent.mkdir()
    path.write_text("from ..schedules.lr import OneCycle\nfrom ..core.state import State\nfrom .result import LRFind")
    assert list(violations(path, tmp_path)) == ["finder (floor 5) imports schedules (floor 5)"]


def test_every_wing_says_what_it_is_for_and_what_it_may_know():
    docs = {wing: ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8"))) or ""
            for wing in WINGS}
    assert {wing: doc for wing, doc in docs.items() if not re.search(r"\b([Kk]nows?)\b", doc)} == {}
    assert {wing: doc for wing, doc in docs.items() if len(doc.split()) > 60} == {}


def test_budgets():
    files = {str(path.relative_to(PACKAGE)): lines_of(path) for path in PACKAGE.rglob("*.py")}
    assert {name: n for name, n in files.items() if n > MOST_LINES} == {}
    assert files["core/loop.py"] <= MOST_OF_LOOP
    assert lines_of(*TO_READ) <= MOST_OF_CORE
    assert sum(files.values()) <= MOST_OF_ALL
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= MOST_FLAT


def test_the_readme_says_how_much_there_is_to_read():
    """To the next hundred: `python tests/test_architecture.py` prints the numbers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) lines\b", text)]
    for n in (lines_of(*TO_READ), lines_of(".")):
        assert any(n <= number < n + 100 for number in said), f"the README says {said}, it is {n}"


def test_public_names_stay():
    """Those of 0.1.0 before its files were moved into wings."""
    before = json.loads((ROOT / "tests" / "public_names.json").read_text(encoding="utf-8"))
    for module, names in before.items():
        found = import_module(module)
        assert [name for name in names if not hasattr(found, name)] == [], module
    assert set(before["minifast"]) <= set(minifast.__all__)


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
    toolbox = ("callbacks", "studies", "loggers", "standard.whole_set", "base.hooks", "resume", "interpret", "files",
               "inference", "show.pictures", "vision")
    code = f"""
import sys, minifast
print(*(name for name in sys.modules if (name + ".").startswith({tuple(f"minifast.{name}." for name in toolbox)})))
assert "EMA" in dir(minifast) and "EMA" not in vars(minifast)
assert minifast.EMA is minifast.EMA
"""
    assert run_python("-W", "error", "-c", code) == []


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"module 'minifast' has no attribute 'EMAA'"):
        _ = minifast.EMAA


def test_schedules_are_plain_python():
    allowed = {"math", "typing", "collections.abc", "__future__"}
    names = set(imported(PACKAGE / "schedules" / "shapes.py"))
    assert {name for name in names if name not in allowed and name.rpartition(".")[0] not in allowed} == set()
    # -I -S: without site-packages there is no torch that could be imported.
    assert run_python("-I", "-S", "-c", "import runpy; runpy.run_path('minifast/schedules/shapes.py')") == []


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


if __name__ == "__main__":  # the numbers that the README gives
    print(f"{' + '.join(TO_READ)}: {lines_of(*TO_READ):,} lines; the loop: {lines_of('core/loop.py')}; "
          f"the package: {lines_of('.'):,}")
