"""What `learn.check()` has found."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. level: "ok", "note" (worth knowing), "problem"."""

    level: str
    what: str
    says: str


class Report(list[Finding]):
    """What `learn.check()` found; prints one line each, and is true if there is no problem."""

    @property
    def problems(self) -> list[Finding]:
        """The findings that should be dealt with."""
        return [finding for finding in self if finding.level == "problem"]

    @property
    def exit_code(self) -> int:
        """0 if there is no problem, else 1: `sys.exit(learn.check().exit_code)`."""
        return int(bool(self.problems))

    def __bool__(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        width = max((len(finding.what) for finding in self), default=0)
        lines = [f"{finding.level:7}  {finding.what:{width}}  {finding.says}" for finding in self]
        n = len(self.problems)
        return "\n".join([*lines, f"{n} problem{'s' * (n != 1)}" if n else "no problem"])

    __str__ = __repr__
