"""The page that ends a run on a GPU: what is met, what is not, and what was not measured."""

import json

import pytest

from benchmarks.pages.verdict import GOALS, main, page
from commands import run_command

CONFIG = {"structure": "0.80", "batch": 16, "rung": "graphs"}


def row(metric, value, provider="ours", case="lower", **config):
    return {
        "suite": "step", "case": case, "provider": provider, "metric": metric, "value": value, "device": "H200",
        "torch": "2.11", "config": {**CONFIG, **config},
    }  # fmt: skip


def line(text, rows):
    (found,) = [line for line in page([], rows, []).splitlines() if text in line]
    return found


def test_met_not_met_and_not_measured():
    assert line("img/s", [row("images_per_second", 151.0)]).endswith("| >= 150 | 151 | met |")
    assert line("img/s", [row("images_per_second", 149.0)]).endswith("| >= 150 | 149 | not met |")
    assert line("img/s", []).endswith("| >= 150 | - | not measured |")
    assert page([], [], []).count("not measured") >= len(GOALS)
    assert "Nothing was measured." in page([], [], [])


@pytest.mark.parametrize(
    "other",
    [{"rung": "kernels"}, {"batch": 2}, {"structure": "0.55"}, {"provider": "eager"}, {"case": "upper"}],
)
def test_only_the_top_of_our_ladder_counts(other):
    """The rungs are measured after the top; so are other batches and students."""
    rows = [row("images_per_second", 151.0), row("images_per_second", 3.0, **other)]
    assert line("img/s", rows).endswith("| 151 | met |")
    assert line("img/s", rows[1:]).endswith("not measured |")


def test_the_last_of_two_measurements_counts():
    assert " 2 |" in line("img/s", [row("images_per_second", 1.0), row("images_per_second", 2.0)])
    failed = row("images_per_second", None)
    assert " 2 |" in line("img/s", [row("images_per_second", 2.0), failed])


def test_ratios():
    rows = [row("ms", 100.0), row("ms", 140.0, case="upper")]
    assert line("upper step over", rows).endswith("| <= 1.5 | 1.4 | met |")
    rows = [row("peak_gib", 30.0), row("peak_gib", 40.0, provider="eager", rung="eager")]
    assert line("peak memory", rows).endswith("| <= 0.5 | 0.75 | not met |")


def test_kernels_and_phases():
    one = {"suite": "kernels", "op": "feature_kd", "case": "a", "provider": "triton", "value": 1.0, "dtype": "bfloat16"}
    kernels = [{**one, "roofline": 0.9}, {**one, "case": "b", "roofline": 0.5}, {**one, "value": None, "why": "broke"}]
    text = page(kernels, [], ["12:00:00 step: killed after 170 s"])
    assert "| feature_kd | 0.85 share of copy bandwidth | 0.70, 0.50 in b (of 2) | not met in 1 cases |" in text
    assert "* feature_kd triton: broke" in text
    assert text.endswith("* 12:00:00 step: killed after 170 s\n")


def test_command_line(tmp_path):
    def run(folder):
        return run_command(main, "--folder", folder)

    (tmp_path / "rows.jsonl").write_text(json.dumps(row("images_per_second", 151.0)) + "\n")
    assert "| 151 | met |" in run(tmp_path).stdout
    assert run(tmp_path / "no").stderr.startswith(f"error: --folder {tmp_path / 'no'}: no such folder")
