"""The page of situations is made of the tests that hold them."""

import pytest

import fuzzing
from benchmarks.pages import situations as module
from benchmarks.pages.situations import AREAS, PAGE, page, situations
from benchmarks.rows import append_rows, read
from bilevel_fast.base.errors import UserError

MARK = "import pytest\n\n\n@pytest.mark.situation\n"


def test_the_committed_page_is_what_the_tests_say():
    found = list(situations())
    assert PAGE.read_text() == page(found)
    assert {one.area for one in found} <= set(AREAS)
    assert all(f"`{one.name}`" in PAGE.read_text() for one in found)


def test_marked_tests_and_no_others(tmp_path):
    (tmp_path / "tests" / "data").mkdir(parents=True)
    (tmp_path / "tests" / "data" / "test_a.py").write_text(
        f'{MARK}def test_one():\n    """A tar | two: read."""\n\n\ndef test_other():\n    """A tar: not marked."""\n'
    )
    (tmp_path / "tests" / "test_b.py").write_text(
        'import pytest\n\npytestmark = [pytest.mark.situation]\n\n\ndef test_two():\n    """B: is."""\n'
    )
    found = list(situations(tmp_path / "tests"))
    assert [(one.what, one.happens, one.area) for one in found] == [("A tar | two", "read", "data"), ("B", "is", "")]
    assert "| A tar \\| two | read | [`test_one`](../tests/data/test_a.py) |" in page(found)


@pytest.mark.parametrize("docstring", ["No colon.", "Two: lines\n    of it."])
def test_a_docstring_that_is_no_row_is_refused(tmp_path, docstring):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(f'{MARK}def test_one():\n    """{docstring}"""\n')
    with pytest.raises(UserError, match=r"tests/test_a.py: the docstring of test_one is not `situation"):
        list(situations(tmp_path / "tests"))


def test_what_was_fuzzed_is_told(tmp_path, monkeypatch):
    """Of each reader what was tried last, with the commits of that."""
    file = tmp_path / "fuzz.jsonl"
    monkeypatch.setattr(module, "FUZZ", file)
    fuzzing.append(file, 10_000, 9)
    (row,) = read(file)
    later = {"case": "one", "commit": "later", "value": 3000, "refused": 2000}
    append_rows(file, [row | later | {"commit": "earlier", "refused": 1}, row | later])
    append_rows(file, [row | {"case": "two", "commit": "earlier", "value": 4000, "refused": 100}])
    told = " ".join(page([]).split())
    assert "3 readers was given 3,000 damaged or hostile files or more, 17,000 in all. 2,109 were refused" in told
    assert f"commit {row['commit']}, later, earlier, " in told
