"""README.md says what the committed rows say."""

import json

import pytest

from benchmarks.pages import readme
from bilevel_fast.base.errors import UserError

MARKED = "".join(
    f"<!-- {name}: python -m benchmarks.pages.readme -->\nold\n<!-- /{name} -->\n" for name in readme.TABLES
)
WHO = {"device": "a CPU", "threads": 1, "torch": "2", "commit": "abc", "date": "today"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)

    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("frontier.jsonl", {"case": "teacher", "seed": 0, **dict.fromkeys(readme.tables.QUALITY, 1.0), **WHO})
    return write


def test_readme_is_what_the_rows_say():
    page = readme.ROOT / "README.md"
    assert readme.renew(page.read_text()) == page.read_text(), "run python -m benchmarks.pages.readme"


def test_what_has_no_rows_is_not_measured(results):
    text = readme.renew(MARKED)
    assert text.count("not measured") == 14
    assert text.count("not projected") == 2
    assert "old" not in text


def test_kernels(results):
    def row(case, provider, us):
        return {"suite": "kernels", "op": "geglu", "case": case, "provider": provider, "value": us, **WHO}

    slow, fast = [row("a", "native", 10.0), row("a", "torch", 15.0)], [row("b", "native", 1.0), row("b", "torch", 9.0)]
    results("kernels_cpu.jsonl", *slow, *fast, row("c", "torch", 1.0))
    assert "| geglu | 1.5 (a) | 9.0 (b) |" in readme.renew(MARKED)


def test_the_headline(results):
    values = dict.fromkeys(readme.tables.QUALITY, 0.25)
    quality = {"teacher": values | {"concept_hit": 1.0}, "student": values | {"concept_hit": 0.05}}
    summary = {"macs": {"ratio": 0.7996}, "quality": quality}
    results("train_cpu.jsonl", {"suite": "train", "value": 171.6, "peak_gib": 1.634, "summary": summary, **WHO})
    text = readme.renew(MARKED)
    assert "**0.80 of the MACs, the erased style drawn on 5% of its prompts instead of 100%" in text
    assert "seed 0, 172 s and 1.63 GiB, a CPU" in text
    assert "| student | 0.050 | 0.250 |" in text


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
