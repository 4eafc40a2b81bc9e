"""Looking a Learner over before a long fit: what would go wrong, or is wrong without an error."""
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .checklist import Looks
from .report import Finding, Report

if TYPE_CHECKING:
    from ..training.trainer import Trainer


def check(learn: "Trainer") -> Report:
    """Try out data, model and loss, and undo it; see `Learner.check`."""
    report = Report()
    learn.check_assigned()
    with learn.sandbox(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is worth saying is in the report
        look = Looks(learn, report)
        for step in (look.parts, look.data, look.output, look.loss, look.gradients, look.determinism, look.leaks,
                     look.validation, look.speed, look.capacity):
            with _caught(report, step.__name__):
                step()
            if report.problems and step in (look.parts, look.data, look.output, look.loss, look.validation):
                break  # what comes after would fail of the same
    return report


@contextmanager
def _caught(report: Report, what: str) -> Iterator[None]:
    """An error is a finding."""
    try:
        yield
    except Exception as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        report.append(Finding("problem", what, f"{type(error).__name__}: {error}{notes}"))
