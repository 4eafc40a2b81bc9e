"""The README is run: its ```python blocks in order, in one namespace (a later block uses names of earlier ones), in an
empty folder; and the files that it links to exist.
"""
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=[\"']([^\"']+)", re.MULTILINE)


def python_blocks(text):
    """(line of the first statement, code) of each block."""
    return [
        (text.count("\n", 0, block.start(2)) + 1, block[2]) for block in FENCE.finditer(text) if block[1] == "python"
    ]


def run_blocks(path):
    namespace = {"__name__": "__main__"}
    for line, code in python_blocks(path.read_text(encoding="utf-8")):
        try:
            # The empty lines make tracebacks show the line in the README.
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
        except BaseException as error:
            error.add_note(f"in the block that starts at {path.name} line {line}")
            raise


def missing_targets(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    targets = [target for match in LINK.finditer(text) for target in match.groups() if target]
    files = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    return [name for name in files if name and not (path.parent / name).exists()]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Pretrained weights in torchvision's cache, made here: nothing is downloaded."""
    from torchvision import models  # here: importing it takes seconds of every collection

    cache = tmp_path / "cache" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), cache / Path(models.ResNet18_Weights.DEFAULT.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.usefixtures("weights")
# Under Agg there is no window that plt.show() could open; in a reader's notebook there is.
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_every_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(README)
    import matplotlib.pyplot as plt  # here, because it takes a second that `make fast` need not spend

    plt.close("all")  # a reader's figures may stay open


def test_there_is_something_to_run():
    text = README.read_text(encoding="utf-8")
    assert python_blocks(text)
    unrun = [name for name in re.findall(r"^[ \t]*(?:```|~~~)[ \t]*(\w+)", text, re.MULTILINE) if name.startswith("py")]
    assert unrun == ["python"] * len(python_blocks(text)), "write every Python block as ```python at the left margin"


def test_every_relative_link_and_image_exists():
    assert missing_targets(README) == []


def test_a_block_that_fails_is_named_with_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# T\n\n```python\nx = 1\n```\n\n```sh\nexit 1\n```\n\n```python\ny = x\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks(page)
    assert caught.value.__notes__ == ["in the block that starts at page.md line 12"]
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 13)


def test_a_missing_link_is_found(tmp_path):
    (tmp_path / "there.md").touch()
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#part) [b](gone.md) ![c](gone.png 'title') <img src=\"gone.svg\">\n"
        "[d](https://example.org) [e](#part)\n[f]: gone.txt\n```python\nx = [1](2)\n```\n"
    )
    assert missing_targets(page) == ["gone.md", "gone.png", "gone.svg", "gone.txt"]
