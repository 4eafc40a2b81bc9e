"""Tables: a parametrised test with many rows is collected as one test, which names every row that fails.

`@pytest.mark.table` makes a table of a parametrised test. Each row runs as it would alone, with fixtures of its own.
`pytest --rows "tests/test_arguments.py::test_counts[...]"` collects the rows singly, to run one of them.
"""
import traceback

import pytest
from _pytest.mark.structures import get_unpacked_marks
from _pytest.runner import runtestprotocol


def pytest_addoption(parser):
    parser.addoption("--rows", action="store_true", help="collect the rows of tables as single tests")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj):
    if collector.config.getoption("rows") or not collector.istestfunction(obj, name):
        return None
    marks = list(get_unpacked_marks(obj))
    if not any(mark.name == "table" for mark in marks):
        return None
    return Table.from_parent(collector, name=name, obj=obj, marks=marks)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Run the rows one after the other, and report them as one test."""
    if not isinstance(item, Table):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    item.ihook.pytest_runtest_logreport(report=item.report(nextitem))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


class Table(pytest.Item):
    """The rows of one test function."""

    def __init__(self, *, obj, marks, **options):
        super().__init__(**options)
        self.obj = obj
        self.own_markers += marks
        self.keywords.update((mark.name, mark) for mark in marks)

    def reportinfo(self):
        return self.path, self.obj.__code__.co_firstlineno - 1, self.name

    def runtest(self):
        raise NotImplementedError("its rows are run")  # by `pytest_runtest_protocol`

    def report(self, nextitem):
        """One report of all rows: failed if a row failed, else skipped if a row was skipped."""
        try:
            rows = list(self.parent._genfunctions(self.name, self.obj))
        except (Exception, pytest.fail.Exception):
            return self._report("failed", f"its rows cannot be made:\n{traceback.format_exc()}")
        for row in rows:
            own = {mark.name for mark in row.callspec.marks} - {"case"}
            if own:
                return self._report("failed", f"{row.name} has marks that its table would ignore: {sorted(own)}")
        reports = [(row, report) for row, after in zip(rows, [*rows[1:], nextitem], strict=True)
                   for report in runtestprotocol(row, log=False, nextitem=after)]
        seconds = sum(report.duration for _, report in reports)
        failed = [(row, report) for row, report in reports if report.failed]
        skipped = [report for _, report in reports if report.skipped]
        if failed:
            return self._report("failed", self._told(failed, len(rows)), seconds)
        if skipped:
            reasons = "; ".join(sorted({report.longrepr[2] for report in skipped}))
            why = str(self.path), self.location[1], f"{len(skipped)} of {len(rows)} rows: {reasons}"
            return self._report("skipped", why, seconds)
        return self._report("passed", None, seconds)

    def _report(self, outcome, why, seconds=0.0):
        return pytest.TestReport(self.nodeid, self.location, dict.fromkeys(self.keywords, 1), outcome, why, "call",
                                 duration=seconds)  # fmt: skip

    def _told(self, failed, n_rows):
        names = list(dict.fromkeys(row.name for row, _ in failed))
        lines = [f"{len(names)} of {n_rows} rows failed:", *(f"  {name}" for name in names)]
        for row, report in failed:
            lines += ["", f"---- {row.name} ({report.when})", report.longreprtext]
            lines += [f"{title}\n{text}" for title, text in report.sections]
        return "\n".join(lines)
