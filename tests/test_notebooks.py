"""Every notebook in nbs/ runs from a clean kernel, silently; what is stored has outputs and no path of a machine.

No skip list: a notebook that cannot be run here does not belong there. After a change run `make nbs`.
"""
import re
from pathlib import Path

import nbformat
import pytest
from helpers import tiers
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(NBS.rglob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(?:home|root|Users|tmp|work|private|opt|usr)/|\b[A-Z]:\\|site-packages|\.venv")


def complaints(notebook):
    """What went wrong while it ran, a line for each error and each message on stderr: Python's warnings come there."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                yield f"{output.ename}: {output.evalue}"
            elif output.output_type == "stream" and output.name == "stderr":
                yield f"stderr: {output.text}"


def flaws(notebook):
    """Why a notebook should not be stored as it is."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "its cells were not run once, from the first to the last"
    outputs = [output for cell in code for output in cell.outputs]
    if not any("image/png" in output.get("data", {}) for output in outputs):
        yield "it has no picture"
    for text in (*(cell.source for cell in notebook.cells), *map(words, outputs)):
        for path in MACHINE_PATH.findall(text):
            yield f"it has the path of a machine: {path}"
    yield from complaints(notebook)


def words(output):
    """The text of an output, but not its pictures."""
    texts = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), *output.get("traceback", ()), *texts])


def run(notebook, folder):
    """A copy of `notebook`, without its outputs, run in `folder`; a cell that fails does not stop it."""
    nbclient = pytest.importorskip("nbclient")
    fresh = nbformat.from_dict(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        fresh, timeout=600, startup_timeout=300, kernel_name="python3", allow_errors=True, skip_cells_with_tag="",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return fresh


@pytest.fixture
def readers_kernel(monkeypatch):
    """Kernels draw into the notebook, as they do for readers, and not into nothing, as the other tests want it."""
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on a busy machine, threads of small models wait for each other
    import matplotlib.font_manager  # noqa: F401 (on a new machine its first import says that it takes a while)


def test_there_is_something_to_run():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of nbclient and zmq, in this process; the notebook's are in its outputs
@pytest.mark.parametrize("path", tiers(NOTEBOOKS, quick=NOTEBOOKS[:1]), ids=lambda path: path.stem)
def test_it_runs_silently_and_leaves_no_file(path, readers_kernel):
    files = set(NBS.rglob("*"))
    done = run(nbformat.read(path, 4), NBS)
    assert list(complaints(done)) == []
    assert set(NBS.rglob("*")) == files
    assert list(flaws(done)) == []


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_not_silent_is_noticed(tmp_path, readers_kernel):
    cells = ["1 / 0", "import warnings; warnings.warn('careful')", "import sys; print('oops', file=sys.stderr)"]
    done = run(new_notebook(cells=[new_code_cell(cell) for cell in cells]), tmp_path)
    error, warning, message = complaints(done)
    assert error == "ZeroDivisionError: division by zero"
    assert "UserWarning: careful" in warning
    assert message == "stderr: oops\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_it_ran(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert list(flaws(notebook)) == []


PICTURE = new_output("display_data", {"image/png": "iVBOR"})
TEXT = new_output("display_data", {"text/plain": "D:\\x"})
ERROR = new_output("error", ename="KeyError", evalue="'x'", traceback=[])


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        ([new_code_cell("x", execution_count=1, outputs=[PICTURE])], []),
        ([new_code_cell("x", outputs=[PICTURE])], ["its cells were not run once, from the first to the last"]),
        ([new_code_cell("x", execution_count=2, outputs=[PICTURE])],
         ["its cells were not run once, from the first to the last"]),
        ([new_code_cell("x", execution_count=1)], ["it has no picture"]),
        ([new_code_cell("x", execution_count=1, outputs=[PICTURE, ERROR])], ["KeyError: 'x'"]),
        ([new_code_cell("x", execution_count=1, outputs=[PICTURE, new_output("stream", name="stderr", text="!")])],
         ["stderr: !"]),
        ([new_code_cell("x", execution_count=1, outputs=[PICTURE, new_output("stream", text="in /home/me/x.py")])],
         ["it has the path of a machine: /home/"]),
        ([new_code_cell("x", execution_count=1, outputs=[PICTURE, TEXT])], ["it has the path of a machine: D:\\"]),
        ([new_markdown_cell("open /Users/me"), new_code_cell("x", execution_count=1, outputs=[PICTURE])],
         ["it has the path of a machine: /Users/"]),
    ],
)
def test_what_is_wrong_with_it_is_found(cells, found):
    assert list(flaws(new_notebook(cells=cells))) == found
