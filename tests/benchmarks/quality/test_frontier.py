"""The frontier's report, and the protocol of the timings."""

import time

import pytest

from benchmarks.machine import describe
from benchmarks.measure import Timing, interleaved
from benchmarks.quality.frontier import variants
from benchmarks.quality.tables import frontier, frontier_plot
from bilevel_fast.runs.config import preset


def row(case: str, seed: int, hit: float) -> dict:
    quality = {"content_kept": 0.5, "other_style_hit": 1.0, "object": 1.0, "color": 1.0, "fid": 2.0}
    return {"case": case, "seed": seed, "concept_hit": hit, **quality, "device": "d", "torch": "t", "date": "x"}


def test_table_gives_mean_and_spread_and_says_what_is_missing(tmp_path):
    rows = [row("bilevel phrase grad 0", 0, 0.1), row("distilled", 0, 1.0), row("bilevel phrase grad 0", 1, 0.3)]
    lines = frontier(rows).splitlines()
    assert lines[2].startswith("| distilled (1 of 2 seeds) | 1.00 | 0.50 |")
    assert lines[3].startswith("| bilevel phrase grad 0 | 0.20 ± 0.10 | 0.50 ± 0.00")
    frontier_plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_variants_cover_the_grid():
    found = variants(preset("mini"))
    assert len(found) == 10
    assert {u.anchor for u in found.values()} == {"phrase", "null"}
    assert found["bilevel null raw 100"].penalty_norm == "raw"


def test_interleaving_takes_turns_and_compares_within_a_round():
    calls: list[str] = []

    def provider(name: str, seconds: float):
        def call() -> None:
            calls.append(name)
            time.sleep(seconds)

        return call

    timings = interleaved({"a": provider("a", 0.02), "b": provider("b", 0.08)}, rounds=4, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert len(timings["a"].seconds) == 4
    assert 1.5 < timings["a"].times_faster_than(timings["b"]).p50 < 5.0
    assert Timing((1.0, 2.0, 3.0)).times_faster_than(Timing((2.0, 2.0, 2.0))).p50 == pytest.approx(1.0)


def test_machine_names_what_a_row_needs():
    import torch

    fields = describe(torch.device("cpu"))
    assert {"device", "driver", "torch", "triton", "cudnn", "commit", "date"} <= set(fields)
    assert fields["torch"] == torch.__version__
