"""Tables of rows: each row runs as a test of its own, and every one that fails is named."""
import pytest

pytest_plugins = ["pytester"]

ROWS = """
import pytest

@pytest.fixture
def fresh():
    return []

@pytest.fixture(scope="module")
def shared():
    print("made")
    return []

@pytest.mark.table
@pytest.mark.parametrize("x", [1, 2, 3])
def test_it(fresh, shared, x):
    fresh.append(x)
    shared.append(x)
    assert fresh == [x]
    assert shared == list(range(1, x + 1))
"""


@pytest.fixture
def run(pytester):
    """Run pytest on a file with `source`; gives the outcome."""
    pytester.makeini("[pytest]\nmarkers =\n    table: rows\n    nightly: long\n")

    def run(source, *options):
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess("-p", "tables", "-p", "no:cacheprovider", *options)

    return run


def test_a_table_is_one_test_and_its_rows_have_fixtures_of_their_own(run):
    run(ROWS).assert_outcomes(passed=1)
    run(ROWS, "--rows").assert_outcomes(passed=3)
    run(ROWS + "\n@pytest.mark.nightly\n" + ROWS[ROWS.index("@pytest.mark.table"):].replace("test_it", "test_that"),
        "-m", "nightly").assert_outcomes(passed=1, deselected=1)


def test_every_row_that_fails_is_named(run):
    outcome = run(ROWS.replace("assert fresh == [x]", "assert x % 2 == 0, f'{x} is odd'"))
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["2 of 3 rows failed:", "  test_it[[]1[]]", "  test_it[[]3[]]", "*1 is odd*",
                                  "*3 is odd*"])  # fmt: skip
    outcome.stdout.no_fnmatch_line("  test_it[[]2[]]")


def test_an_error_in_a_fixture_is_a_failure_of_the_row(run):
    outcome = run(ROWS.replace("return []\n\n@pytest.fixture(scope", "raise KeyError(3)\n\n@pytest.fixture(scope"))
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["3 of 3 rows failed:", "*test_it[[]1[]] (setup)", "*KeyError: 3"])


def test_a_table_with_a_row_that_is_skipped_is_skipped(run):
    outcome = run(ROWS.replace("fresh.append(x)", "if x == 2: pytest.skip('no two')\n    fresh.append(x)")
                  .replace("assert shared", "assert True or shared"), "-rs")  # fmt: skip
    outcome.assert_outcomes(skipped=1)
    outcome.stdout.fnmatch_lines(["*1 of 3 rows: *no two"])


def test_a_row_with_a_mark_of_its_own_would_be_misunderstood(run):
    outcome = run(ROWS.replace("[1, 2, 3]", "[1, pytest.param(2, marks=pytest.mark.nightly), 3]"))
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["*has marks that its table would ignore: *nightly*"])


def test_rows_that_cannot_be_made_are_a_failure(run):
    outcome = run(ROWS.replace('parametrize("x"', 'parametrize("y"'))
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["its rows cannot be made:", "*function uses no argument 'y'*"])
