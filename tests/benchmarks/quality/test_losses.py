"""`benchmarks.quality.losses` in small: every case has its row, and the best weight is that of the seed that tunes."""

import json

import pytest

from benchmarks.quality import losses
from bilevel_fast.base.errors import UserError
from bilevel_fast.training.losses import LossWeights


def row(case, error, seed=3, tuning=True):
    values = dict.fromkeys(("target_error", "style", "object", "color", "fid"), 0.5)
    return {"case": case, "seed": seed, "tuning": tuning, "output_error": error, **values}


def test_the_best_weight_is_that_of_the_seed_that_tunes():
    rows = [row("self_attention 0.1", 0.3), row("self_attention 1", 0.2), row("layer 0.1", 0.1), row("layer 1", 0.4)]
    rows.append(row("layer 1", 0.01, seed=0, tuning=False))
    assert losses.tuned(rows) == ["self_attention 1", "layer 0.1"]
    with pytest.raises(UserError, match=r"no weight of layer tried; run with --seeds 3 --tune first"):
        losses.tuned(rows[:2])
    assert losses.weighted("layer 0.1") == LossWeights(layer=0.1)
    assert losses.weighted("usual") == LossWeights()
    assert losses.weighted("feature_by_norm 1") == LossWeights(feature=1.0, feature_by_norm=True)
    assert losses.tuned([row("guided 1", 0.2), row("guided 0.1", 0.3)], ["guided"]) == ["guided 1"]


def test_the_table_shows_what_is_worse_as_well():
    rows = [
        row("usual", 0.2, 0, False),
        row("usual", 0.4, 1, False),
        row("layer 1", 0.5, 0, False),
        row("layer 1", 0.5),
    ]
    lines = losses.table(rows).splitlines()
    assert lines[0].startswith("| seeds 0, 1 | output error | target error | FID |")
    assert lines[2].startswith("| usual | 0.300 ± 0.100 | 0.500 ± 0.000 | 0.50 ± 0.00 |")
    assert lines[3].startswith("| layer, weight 1 | 0.500 (1 of 2 seeds) |")
    assert lines[5].startswith("| all weights tried, seed 3 |")
    assert lines[7].startswith("| layer, weight 1 | 0.500 |")


def test_rows_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses, "ROWS", tmp_path / "losses.jsonl")
    monkeypatch.setattr(losses, "WEIGHTS", (1.0,))
    small = losses.Run(seeds=(3,), tune=True, terms=("layer",), preset="smoke", steps=2, judged=1)
    losses.run(small, 3, {"device": "a CPU"})
    losses.run(small, 3, {"device": "a CPU"})
    found = [json.loads(line) for line in losses.ROWS.read_text().splitlines()]
    assert [r["case"] for r in found] == ["usual", "layer 1"], "and none twice"
    assert len({r["output_error"] for r in found}) == 2, "each term trains another student"
    assert all(r["fid"] > 0 and r["tuning"] for r in found)
    assert [r["config"]["weights"]["layer"] for r in found] == [0.0, 1.0]
