"""Where a fit keeps its checkpoints, and what `resume=` means."""
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.callback import Callback
from .checkpoint import Checkpoint
from .folder import FitFolder

Resume = bool | str | os.PathLike[str]


@dataclass(frozen=True)
class Place:
    """Where a fit keeps its checkpoints, and which ones it may go on from."""

    saver: Checkpoint | None
    run: str  # the absolute path of the run's folder
    number: int  # of the fit in it, from 1
    resume: Resume

    @property
    def real_run(self) -> str:
        """The folder of the run without links: by whatever name it is reached, its fits are counted together."""
        return os.path.realpath(self.run)

    @property
    def folder(self) -> FitFolder | None:
        """Where the fit's own checkpoints are; None if it keeps none."""
        return None if self.saver is None else FitFolder(Path(self.run) / f"fit-{self.number}")

    def candidates(self) -> list[Path] | None:
        """The checkpoints to go on from, newest first; None to start afresh.

        Raises FileNotFoundError where there has to be one, FileExistsError for a run that would be overwritten.
        """
        return _find(self.folder, self.resume, self.number)


def place(callbacks: Iterable[Callback], fits_ended: Mapping[str, int], resume: Resume) -> Place:
    """The place of a fit with `callbacks`. fits_ended: how many fits of the Learner have ended in each run's folder."""
    saver = next((cb for cb in callbacks if isinstance(cb, Checkpoint)), None)
    run = "" if saver is None else os.path.abspath(saver.path)  # wherever a callback goes to
    return Place(saver, run, fits_ended.get(os.path.realpath(run), 0) + 1, resume)


def _find(folder: FitFolder | None, resume: Resume, number: int) -> list[Path] | None:
    if folder is None:
        if resume is True or resume == "auto":
            raise ValueError(f"resume={resume!r} has to know where the checkpoints are: pass "
                             'callbacks=[Checkpoint("runs/a")], or the path of a checkpoint.')
        return None if resume is False else _named(Path(resume), number)
    own = folder.checkpoints()
    if resume is False:
        if own:
            raise FileExistsError(f"{folder.path} holds a run already, up to {own[0].name}. To go on with it pass "
                                  'resume="auto"; to start afresh pass another folder, or remove this one.')
        return None
    if resume == "auto":
        return own or None
    if resume is True:
        if not own:
            raise FileNotFoundError(f"there is no checkpoint in {folder.path}. Pass resume=\"auto\" to start afresh "
                                    "where there is none.")
        return own
    named = _named(Path(resume), number)
    if own and named[0].resolve().parent != folder.path.resolve():
        raise FileExistsError(f"{folder.path} holds another run already, up to {own[0].name}, which this one would "
                              "overwrite. Give Checkpoint another folder.")
    return named


def _named(path: Path, number: int) -> list[Path]:
    """The checkpoints that `path` means: a file; or the folder of a fit, or of a run, newest first."""
    if path.is_dir():
        found = FitFolder(path).checkpoints() or FitFolder(path / f"fit-{number}").checkpoints()
        if found:
            return found
    elif path.exists():
        return [path]
    raise FileNotFoundError(f"there is no checkpoint {'in ' * path.is_dir()}{path} to resume.")
