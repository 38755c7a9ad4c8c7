"""What a claim's rows say of it."""

import json

import pytest

from benchmarks.pages import committed
from benchmarks.pages.claims import FAILS, HOLDS, UNSEEN, Claim, above, at_least, less, near, no_more, rivals


@pytest.mark.parametrize(
    ("values", "below", "costs_nothing"),
    [
        ([[8.0, 7.0, 9.0], [4.0, 5.0, 4.0]], HOLDS, HOLDS),
        ([[4.0, 5.0, 4.0], [8.0, 7.0, 9.0]], FAILS, FAILS),
        ([[4.0, 5.0, 4.0], [4.5, 5.5, 4.4]], UNSEEN, HOLDS),  # always above, by less than FIDs tell
        ([[4.0, 9.0, 4.0], [8.0, 5.0, 9.0]], UNSEEN, HOLDS),  # not the same way on every seed
        ([[8.0], [4.0]], UNSEEN, UNSEEN),  # one seed
    ],
)
def test_fids_are_compared_seed_by_seed(values, below, costs_nothing):
    assert (less(values), no_more(values)) == (below, costs_nothing)


def test_shares():
    assert [near(0.0)([[1.0], [x]]) for x in (0.05, 0.06)] == [HOLDS, FAILS]
    assert [above([[0.5, 0.5], last]) for last in ([0.6, 0.7], [0.4, 0.3], [0.6, 0.5])] == [HOLDS, FAILS, UNSEEN]
    assert [at_least(0.95)([[x]]) for x in (0.95, 0.9)] == [HOLDS, FAILS]


def test_numbers_are_of_the_seeds_that_all_have(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    rows = [("a", 2, 9.0), ("b", 0, 1.0), ("a", 0, 5.0), ("a", 1, 100.0), ("b", 2, 3.0)]
    lines = [json.dumps({"plan": "main", "case": case, "seed": seed, "fid": fid}) for case, seed, fid in rows]
    (tmp_path / "rivals.jsonl").write_text("\n".join(lines))
    shown = (("case", "a", "fid", 1), ("case", "b", "fid", 1))
    claim = Claim("b is below a.", less, rivals("main"), "rivals.jsonl", "do it", shown)
    assert claim.line()[:3] == ("b is below a.", "holds", "7.0, 2.0")
    assert Claim("?", less, rivals("other"), "rivals.jsonl", "do it", shown).line()[1] == "not measured"
