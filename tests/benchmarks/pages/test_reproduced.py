"""What is kept of a reproduction, and shown."""

import json

import pytest

from benchmarks.pages import reproduced
from bilevel_fast.base.errors import UserError
from bilevel_fast.runs.paper.experiments import EXPERIMENTS

PLACE = {"device": "a CPU", "torch": "2", "cuda": None, "threads": 1}


def results(folder, hit):
    (folder / "table1").mkdir(parents=True, exist_ok=True)
    rows = [
        {"row": row.name, "seed": 0, "step": 8, "numbers": {"concept_hit": hit}, **PLACE}
        for row in EXPERIMENTS["table1"].rows
    ]
    columns = [{"key": "concept_hit", "heading": "concept hit", "better": "down", "digits": 2}]
    (folder / "table1" / "results.json").write_text(json.dumps({"columns": columns, "rows": rows}))
    (folder / "table1" / "plot.png").write_bytes(b"a plot")


def test_kept_and_shown(tmp_path):
    results(tmp_path / "run", 0.25)
    assert reproduced.keep(tmp_path / "run", tmp_path / "kept") == ["table1"]
    assert (tmp_path / "kept" / "table1" / "plot.png").read_bytes() == b"a plot"
    text = reproduced.markdown("table1", tmp_path / "kept")
    assert "| bilevel | 0.25 |" in text
    assert "Measured on a CPU, 1 thread, torch 2; kept at commit " in text
    assert reproduced.markdown("table2", tmp_path / "kept") == "not measured"


def test_the_commit_is_that_of_the_measurement(tmp_path, monkeypatch):
    results(tmp_path / "run", 0.25)
    for commit, hit in (("old", 0.25), ("new", 0.25), ("newer", 0.5)):
        monkeypatch.setattr(reproduced, "describe", lambda device, commit=commit: {"commit": commit, "date": "today"})
        results(tmp_path / "run", hit)
        reproduced.keep(tmp_path / "run", tmp_path / "kept")
        wanted = "newer" if hit == 0.5 else "old"
        assert json.loads((tmp_path / "kept" / "table1" / "results.json").read_text())["commit"] == wanted


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no results; run: python -m"):
        reproduced.keep(tmp_path, tmp_path / "kept")
