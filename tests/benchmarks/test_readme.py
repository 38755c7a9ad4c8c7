"""README.md says what the committed rows say."""

import json

import pytest

from benchmarks import readme
from bilevel_fast.errors import UserError

MARKED = "".join(f"<!-- {name}: python -m benchmarks.readme -->\nold\n<!-- /{name} -->\n" for name in readme.TABLES)
WHO = {"device": "a CPU", "threads": 1, "torch": "2", "commit": "abc", "date": "today"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)

    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("frontier.jsonl", {"case": "teacher", "seed": 0, **dict.fromkeys(readme.frontier_report.METRICS, 1.0), **WHO})
    return write


def test_readme_is_what_the_rows_say():
    page = readme.ROOT / "README.md"
    assert readme.renew(page.read_text()) == page.read_text(), "run python -m benchmarks.readme"


def test_what_has_no_rows_is_not_measured(results):
    text = readme.renew(MARKED)
    assert text.count("not measured") == 3
    assert text.count("not projected") == 2
    assert "old" not in text


def test_steps_and_bf16(results):
    config = {"structure": "0.80", "batch": 16, "unet": "mini", "rung": "kernels"}
    ratio = {"metric": "times_faster_than_released", "value": 2.345, "p20": 2.1, "p80": 2.5, "config": config, **WHO}
    results("step_cpu.jsonl", {"suite": "step", "case": "lower", "provider": "ours", **ratio})
    results(
        "precision.jsonl",
        {"suite": "precision", "case": "gradient upper norm", "metric": "cosine", "value": 0.99871, **WHO},
        {"suite": "precision", "case": "gradient lower norm", "metric": "cosine", "value": 0.99999, **WHO},
    )
    text = readme.renew(MARKED)
    assert "| diffusers, as released: fp32, hooks, anomaly mode | 2.35 (2.10..2.50) | not measured |" in text
    assert "is 0.99871 (`upper norm`; wanted 0.995)" in text
    assert "What 200 steps lead to: not measured." in text


def test_a_gpu_row_fills_its_table(results):
    config = {"structure": "0.80", "batch": 16, "unet": "sd21", "rung": "graphs"}
    row = {"suite": "step", "case": "lower", "provider": "ours", "metric": "images_per_second", "value": 151.25}
    results("h200.jsonl", {**row, "unit": "img/s", "config": config, "driver": "580", **WHO, "device": "NVIDIA H200"})
    wanted = "| NVIDIA H200 | lower, 0.80, batch 16, graphs | images per second | 151.2 img/s |"
    assert wanted in readme.renew(MARKED)


def test_a_missing_marker_is_named(results):
    with pytest.raises(UserError, match="0 places for the table 'step'"):
        readme.renew(MARKED.replace("<!-- /step -->", ""))
