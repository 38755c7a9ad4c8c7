"""`benchmarks.quality.planner`: both cuts cost the same and keep the best units, and errors are those of the cuts."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.quality import planner
from benchmarks.quality.planner import Settings, distances, even, magnitude_importance, trials
from bilevel_fast.base import errors
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning import method
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.worlds.mini import TEACHER

SMALL = Settings(batches=2, batch=4)


@pytest.fixture(scope="module")
def folder():
    return load_folder(TEACHER)


@pytest.fixture(scope="module")
def teacher(folder):
    return folder.unet().eval()


def test_cuts_cost_the_same_and_keep_the_best_units(teacher):
    budget, score = MacBudget(0.8, 16, 12), magnitude_importance(teacher)
    flat, counts = even(teacher, budget, score), method("uniform")(teacher, budget, ())
    assert count(flat, 16, 12).true == count(counts, 16, 12).true
    for site, widths in flat.kept.items():
        for width, kept in widths.items():
            gone = sorted(set(range(len(score[site][width]))) - set(kept))
            assert len(kept) == len(counts.kept[site][width])
            assert not gone or score[site][width][gone].max() <= score[site][width][list(kept)].min()
    assert flat != counts


def test_batches_depend_on_their_number_alone(folder):
    first, second = trials(folder, SMALL)
    again = next(trials(folder, Settings(batches=1, batch=8)))
    torch.testing.assert_close(torch.cat([first.x, second.x]), again.x)
    assert torch.cat([first.t, second.t]).equal(again.t)
    torch.testing.assert_close(torch.cat([first.text, second.text]), again.text)
    assert not first.x.equal(second.x)


def test_errors(folder, teacher):
    """0 for the teacher itself, 1 for a network that says nothing, and larger the more is cut."""
    asked = list(trials(folder, SMALL))
    assert distances(teacher, teacher.cut(Structure.dense(teacher.config)), asked) == pytest.approx(
        [0.0, 0.0], abs=1e-10
    )
    silent = teacher.cut(Structure.dense(teacher.config))
    with torch.no_grad():
        silent.conv_out.weight.zero_()
        silent.conv_out.bias.zero_()
    assert distances(teacher, silent, asked) == pytest.approx([1.0, 1.0])
    score = magnitude_importance(teacher)
    cuts = [teacher.cut(even(teacher, MacBudget(ratio, 16, 12), score)) for ratio in (0.9, 0.7)]
    less, more = (distances(teacher, cut, asked).mean() for cut in cuts)
    assert 0.0 < less < more


def test_rows(monkeypatch, tmp_path, capsys):
    """Five rows for each score and budget; a ratio is one of errors of the same batch."""
    monkeypatch.setattr(planner, "ROWS", tmp_path / "planner.jsonl")
    monkeypatch.setattr(planner, "taylor_importance", partial(planner.taylor_importance, levels=2))
    monkeypatch.setattr("sys.argv", ["planner", "--batches", "1", "--batch", "4", "--images", "2"])
    assert errors.run(planner.main) == 0
    rows = [json.loads(line) for line in (tmp_path / "planner.jsonl").read_text().splitlines()]
    assert len(capsys.readouterr().out.splitlines()) == len(rows) == 20
    for case in ("mini 0.80 magnitude", "mini 0.55 magnitude", "mini 0.80 taylor", "mini 0.55 taylor"):
        found = {(row["provider"], row["metric"]): row for row in rows if row["case"] == case}
        flat = found["even", "output_error"]["value"]
        for provider in ("planned shares", "planned sum"):
            less = found[provider, "times_less_error_than_even"]["value"]
            assert less == pytest.approx(flat / found[provider, "output_error"]["value"])
        for row in found.values():
            budget = float(case.split()[1])
            assert budget - 0.002 <= row["macs_ratio"] <= budget
            assert {"device", "torch", "threads", "commit", "date", "unit", "p20", "p80"} <= set(row)
    assert np.unique([row["value"] for row in rows]).size == 20


def test_no_write(monkeypatch, tmp_path):
    monkeypatch.setattr(planner, "ROWS", tmp_path / "planner.jsonl")
    row = {"case": "c", "provider": "p", "metric": "m", "value": 1.0, "p20": 1.0, "p80": 1.0, "macs_ratio": 0.8}
    monkeypatch.setattr(planner, "measure", lambda settings: iter([row]))
    for flags, written in ((["--no-write"], False), ([], True)):
        monkeypatch.setattr("sys.argv", ["planner", *flags])
        assert errors.run(planner.main) == 0
        assert (tmp_path / "planner.jsonl").exists() == written


def test_refuses(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["planner", "--batches", "0"])
    assert errors.run(planner.main) == 2
    assert capsys.readouterr().err == "error: --batches 0, wanted at least 1\n"
