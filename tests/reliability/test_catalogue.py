"""Every case of the failure catalogue has a test, or a reason why it has none."""
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from catalogue import CASES, MISSING, covered, in_order, problems, report

ENOUGH = 0.9  # of the cases have a test


def test_the_list_is_whole():
    assert Counter(name[0] for name in CASES) == {
        "A": 15, "B": 13, "N": 10, "I": 15, "L": 10, "S": 15, "K": 19, "X": 11, "R": 11, "E": 9}  # fmt: skip
    assert in_order(CASES) == list(CASES)
    assert all(CASES.values())


@pytest.fixture(scope="module")
def found():
    """What the tests of this project cover."""
    return covered()


def test_every_case_has_a_test_or_a_reason(found, capsys):
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(report(found)) + "\n")
    assert problems(found, MISSING) == []
    assert all(MISSING.values())
    assert len(set(found) & set(CASES)) >= ENOUGH * len(CASES)


def test_it_is_printed_by_itself(found):
    program = Path(__file__).with_name("catalogue.py")
    printed = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == report(found)
    assert all(f"  {name:4} {CASES[name]}: {reason}\n" in printed for name, reason in MISSING.items())


# ---- the count bites

SOURCE = '''
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.case("K1")]

@pytest.mark.case("A1", "A2")
@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.case("A3")),
                               pytest.param(3, marks=[pytest.mark.slow, pytest.mark.case("A4")])])
def test_it(x): ...

class TestMore:
    @pytest.mark.case("A1")
    def test_that(self): ...
'''


def in_file(tmp_path, source):
    file = tmp_path / "test_mine.py"
    file.write_text(source, encoding="utf-8")
    return [file]


def test_marks_are_found_wherever_they_may_be(tmp_path):
    assert covered(in_file(tmp_path, SOURCE)) == {
        "K1": ["test_mine.py::*"], "A1": ["test_mine.py::test_it", "test_mine.py::test_that"],
        "A2": ["test_mine.py::test_it"], "A3": ["test_mine.py::test_it"], "A4": ["test_mine.py::test_it"],
    }  # fmt: skip


@pytest.mark.parametrize("source", ["", 'words = "pytest.mark.case(\'A1\')"', '# @pytest.mark.case("A1")',
                                    '@pytest.mark.slow("A1")\ndef test_it(): ...'])  # fmt: skip
def test_what_is_no_mark_does_not_count(tmp_path, source):
    assert covered(in_file(tmp_path, source)) == {}


@pytest.mark.parametrize(("source", "message"), [
    ('case = pytest.mark.case("A1")', "test_mine.py, line 1: this mark is on no test"),
    ('@pytest.mark.case("A1")\ndef helper(): ...', "line 1: this mark is on no test"),
    ("@pytest.mark.case(NAME)\ndef test_it(): ...", "line 1: the ids of a case must be written out"),
    ("@pytest.mark.case(*NAMES)\ndef test_it(): ...", "line 1: the ids of a case must be written out"),
    ("@pytest.mark.case()\ndef test_it(): ...", "line 1: the ids of a case must be written out"),
    ("@pytest.mark.case(1)\ndef test_it(): ...", "line 1: the ids of a case must be written out"),
    ('@pytest.mark.case(name="A1")\ndef test_it(): ...', "line 1: the ids of a case must be written out"),
])  # fmt: skip
def test_a_mark_that_would_not_count_is_an_error(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        covered(in_file(tmp_path, source))


@pytest.mark.parametrize(("found", "missing", "expected"), [
    ({"A1", "A3"}, {"A2"}, []),
    ({"A1"}, {"A2"}, ["neither covered nor missing: A3"]),
    ({"A1", "A2", "A3"}, {"A2"}, ["both covered and missing: A2"]),
    ({"A1", "A2", "A3", "A99"}, set(), ["no such case: A99"]),
    ({"A1", "A3"}, {"A2", "Z1"}, ["no such case: Z1"]),
])  # fmt: skip
def test_what_the_count_finds(found, missing, expected):
    assert problems(found, missing, ["A1", "A2", "A3"]) == expected


@pytest.mark.parametrize("lost", ["A5", "K1", "E9"])
def test_a_case_that_loses_its_tests_is_noticed(lost):
    found = set(CASES) - set(MISSING) - {lost}
    assert problems(found, MISSING) == [f"neither covered nor missing: {lost}"]
