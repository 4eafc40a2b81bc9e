"""What is on the disk, looked at without minifast."""
import re
import zipfile
from pathlib import Path

import torch

FINAL = re.compile(r"step-\d{8,}\.ckpt|best\.ckpt")
MEANT = re.compile(r"\.lock|.*\.superseded")  # besides checkpoints, what may be there


def finals(folder):
    """All files under a final name in the folder of a run, sorted."""
    return sorted(path for path in Path(folder).rglob("*.ckpt") if FINAL.fullmatch(path.name))


def names(folder):
    return [f"{path.parent.name}/{path.name}" for path in finals(folder)]


def orphans(folder):
    """Files that have no name which a run gives on purpose."""
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file()
                  and not FINAL.fullmatch(path.name) and not MEANT.fullmatch(path.name))


def load(path):
    """The content of a checkpoint. Raises an error if any of its check sums is wrong."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the check sum of {damaged} is wrong")
    return torch.load(path, weights_only=True)


def invalid(folder):
    """What is wrong with the files under a final name, a line each."""
    lines = []
    for path in finals(folder):
        try:
            tree = load(path)
            if not {"model", "optimizer", "position", "rng"} <= tree.keys():
                lines.append(f"{path.name}: it is no checkpoint")
        except Exception as error:  # whatever torch or zipfile raise: it cannot be read
            lines.append(f"{path.name}: {type(error).__name__}: {error}"[:200])
    return lines
