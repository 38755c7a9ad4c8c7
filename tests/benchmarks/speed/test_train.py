"""The clock around a whole run."""

import json
import sys

import pytest

from benchmarks.speed import train
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError


def test_a_run_becomes_a_row(monkeypatch, tmp_path, capfd):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["train", "--preset", "smoke", "--out", str(out)])
    assert errors.run(train.main) == 0
    row = json.loads(out.read_text())
    assert json.loads(capfd.readouterr().out) == row
    assert row["summary"]["preset"] == "smoke"
    assert row["value"] > row["summary"]["seconds"] > 0
    assert 0.2 < row["peak_gib"] < 16
    assert row["device"]


def test_a_run_that_fails_leaves_no_row():
    with pytest.raises(UserError, match="the run ended with exit code 2"):
        train.measure("mina")
