"""The cases of the comparison, a small run of it, and what the report makes of rows that are known."""

import json
from dataclasses import replace

import pytest

from benchmarks.quality import controller
from benchmarks.quality.controller import STARTS, SWEPT, Run, cases, run
from benchmarks.quality.tables import by_case, dominating
from benchmarks.quality.tables import controller as table
from bilevel_fast.runs import config


def row(case: str, hit: float, fid: float, seed: int = 0, kept: float = 1.0, other: float = 1.0) -> dict:
    quality = {"concept_hit": hit, "content_kept": kept, "other_style_hit": other, "fid": fid}
    place = {"device": "d", "torch": "t", "date": "x", "commit": "c"}
    return {"case": case, "seed": seed, **quality, "upper_steps": 30, "upper_moves": 20, **place}


def test_cases():
    swept, controlled = (cases(group, config.preset("mini").upper) for group in ("swept", "controlled"))
    assert {(u.penalty, u.every, u.controller.enabled) for u in swept.values()} == {(*pair, False) for pair in SWEPT}
    assert controlled.pop("distilled").every == 0
    assert {(u.penalty, u.every, u.controller.enabled) for u in controlled.values()} == {(*s, True) for s in STARTS}
    assert len(set(swept) | set(controlled)) == len(SWEPT) + len(STARTS)


def test_miss_and_verdict():
    """The sum by hand; a seed without the distilled student, and one that is not whole, do not count."""
    rows = [
        *(row("distilled", 1.0, 4.0), row("distilled", 1.0, 8.0, seed=1), row("distilled", 1.0, 1.0, seed=2)),
        *(row("lambda 1 K 4", 0.0, 4.0), row("lambda 1 K 4", 0.0, 6.0, seed=1), row("lambda 1 K 4", 0.0, 1.0, seed=2)),
        *(row("lambda 10 K 4", 0.5, 3.0, kept=0.9, other=0.8), row("lambda 10 K 4", 0.3, 8.0, seed=1)),
        *(row("controller from lambda 10 K 4", 0.0, 4.4), row("controller from lambda 10 K 4", 0.0, 6.0, seed=1)),
        *(row("controller from lambda 1 K 2", 0.1, 4.4), row("controller from lambda 1 K 2", 0.1, 8.0, seed=1)),
        row("lambda 10 K 4", 0.0, 0.1, seed=3),
    ]
    found = by_case(rows)
    assert found["lambda 10 K 4"][0]["miss"] == pytest.approx(0.5 + 0.1 + 0.2 + 3 / 4)
    assert 3 not in found["lambda 10 K 4"]
    text = table(rows)
    assert "| seeds 0, 1 |" in text
    assert "| lambda 1 K 4 | 0.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 5.00 ± 1.00 | 0.88 ± 0.12 | 30, 20 |" in text
    assert "Best of the sweep: lambda 1 K 4, miss 0.875; worst: 1.425." in text
    first, second = (line for line in text.splitlines() if line.startswith("The controller"))
    assert first.startswith("The controller from lambda 10 K 4: miss 1.057 of the best's, not within 5 %; 1 of 2 swept")
    assert second.startswith("The controller from lambda 1 K 2: miss 1.314 of the best's, not within 5 %")
    better = [r | {"fid": 4.0} if r["case"].startswith("controller") and r["seed"] == 0 else r for r in rows]
    assert "lambda 10 K 4: miss 1.000 of the best's, within 5 %; 0 of 2 swept" in table(better)
    assert table(rows[:7]) == "not measured"
    assert table([]) == "not measured"


def test_dominating():
    point = {0: row("p", 0.1, 4.0)}
    others = {
        "the same": {0: row("a", 0.1, 4.0)},
        "better in one": {0: row("b", 0.1, 3.9)},
        "better and worse": {0: row("c", 0.0, 4.1)},
        "worse": {0: row("d", 0.1, 4.0, kept=0.9)},
    }
    assert dominating(point, others, [0]) == ["better in one"]


def test_a_small_run(small_teacher, tmp_path, monkeypatch):
    """Rows as soon as they are measured, none twice; the controller's course is in its rows."""
    small = config.preset("smoke")
    small = replace(small, teacher=small_teacher, mini=replace(small.mini, judge_erased=1, judge_kept=1, judge_steps=2))
    monkeypatch.setattr(controller, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(controller, "preset", lambda name: small)
    monkeypatch.setattr(controller, "STARTS", ((10.0, 2),))
    monkeypatch.setattr(controller, "SWEPT", ((10.0, 4),))
    said: list[str] = []
    args = Run(cache=tmp_path)
    for group in controller.GROUPS:
        run(args, 0, group, {"commit": "c"}, said.append)
    found = {row["case"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert [(name, row["upper_steps"]) for name, row in found.items()] == [
        ("distilled", 0),
        ("controller from lambda 10 K 2", 4),
        ("lambda 10 K 4", 2),
    ]
    steps, penalties, _, progress, stopped = zip(*found["controller from lambda 10 K 2"]["course"], strict=True)
    assert steps == (2, 4, 6, 8)
    assert penalties[0] == 10.0 > penalties[-1]
    assert set(stopped) == {0.0}
    assert found["controller from lambda 10 K 2"]["upper_moves"] == 4
    assert len(set(progress)) == 4
    assert "course" not in found["lambda 10 K 4"]
    assert found["lambda 10 K 4"]["config"]["upper"]["every"] == 4
    before, count = (tmp_path / "rows.jsonl").read_bytes(), len(said)
    run(args, 0, "swept", {"commit": "c"}, said.append)
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert len(said) == count
