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
class Where:
    """Where a fit keeps its checkpoints, and which ones it may go on from."""

    saver: Checkpoint | None
    run: str  # the absolute path of the run's folder
    number: int  # of the fit in it, from 1
    resume: Resume

    @classmethod
    def of(cls, callbacks: Iterable[Callback], fits_ended: Mapping[str, int], resume: Resume) -> "Where":
        """Of a fit with `callbacks`. fits_ended: how many fits of the Learner have ended in each run's folder."""
        saver = next((cb for cb in callbacks if isinstance(cb, Checkpoint)), None)
        run = "" if saver is None else os.path.abspath(saver.path)  # wherever a callback changes the directory to
        return cls(saver, run, fits_ended.get(os.path.realpath(run), 0) + 1, resume)

    @property
    def real_run(self) -> str:
        """The folder of the run without links: by whatever name it is reached, its fits are counted together."""
        return os.path.realpath(self.run)

    @property
    def folder(self) -> FitFolder | None:
        """Where the fit's own checkpoints are; None if it keeps none."""
        return None if self.saver is None else FitFolder(Path(self.run) / f"fit-{self.number}")

    def candidates(self) -> list[Path]:
        """The checkpoints to go on from, newest first; none to start afresh.

        Raises FileNotFoundError where there has to be one, FileExistsError for a run that would be overwritten.
        """
        folder, resume = self.folder, self.resume
        if folder is None and (resume is True or resume == "auto"):
            raise ValueError(f"resume={resume!r} has to know where the checkpoints are: pass "
                             'callbacks=[Checkpoint("runs/a")], or the path of a checkpoint.')
        own = [] if folder is None else folder.checkpoints()
        if resume is False and own:
            raise FileExistsError(f"{own[0].parent} holds a run already, up to {own[0].name}. To go on with it pass "
                                  'resume="auto"; to start afresh pass another folder, or remove this one.')
        if resume is True and folder is not None and not own:
            raise FileNotFoundError(f"there is no checkpoint in {folder.path}. Pass resume=\"auto\" to start afresh "
                                    "where there is none.")
        if isinstance(resume, bool) or resume == "auto":
            return own
        named = self._named(Path(resume))
        if folder is not None and own and named[0].resolve().parent != folder.path.resolve():
            raise FileExistsError(f"{own[0].parent} holds another run already, up to {own[0].name}, which this one "
                                  "would overwrite. Give Checkpoint another folder.")
        return named

    def _named(self, path: Path) -> list[Path]:
        """The checkpoints that `path` means: a file; or the folder of a fit, or of a run, newest first."""
        if path.is_dir():
            found = FitFolder(path).checkpoints() or FitFolder(path / f"fit-{self.number}").checkpoints()
        else:
            found = [path] if path.exists() else []
        if not found:
            raise FileNotFoundError(f"there is no checkpoint {'in ' * path.is_dir()}{path} to resume.")
        return found
