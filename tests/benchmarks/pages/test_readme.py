"""README.md and docs/ say what the committed rows say."""

import json

import pytest

from benchmarks.pages import claims, committed, readme, sdxl
from benchmarks.quality.tables import QUALITY
from bilevel_fast.base.errors import UserError

TABLES = {name: table for tables in readme.PAGES.values() for name, table in tables.items()}
WHO = {"device": "a CPU", "threads": 1, "torch": "2", "commit": "abc", "date": "today"}


def marked(*names: str) -> str:
    return "".join(f"<!-- {name}: python -m benchmarks.pages.readme -->\nold\n<!-- /{name} -->\n" for name in names)


def made(*names: str) -> str:
    """These tables; all of them if none is named."""
    tables = {name: TABLES[name] for name in names or TABLES}
    return readme.renew(marked(*tables), tables, "a page")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)

    def write(name, *rows):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("frontier.jsonl", {"case": "teacher", "seed": 0, **dict.fromkeys(QUALITY, 1.0), **WHO})
    return write


@pytest.mark.parametrize("name", readme.PAGES)
def test_a_page_is_what_the_rows_say(name):
    page = (readme.ROOT / name).read_text()
    assert readme.renew(page, readme.PAGES[name], name) == page, "run python -m benchmarks.pages.readme"


def test_no_table_is_made_twice():
    assert len(TABLES) == sum(map(len, readme.PAGES.values()))


def test_what_has_no_rows_is_not_measured(results):
    without = {name: made(name) for name in TABLES}
    projected = set(sdxl.TABLES) - {"losses"}
    said = {name for name, text in without.items() if "not measured" in text}
    assert set(TABLES) - said == {"projections", "traffic", "memory", "counts", "frontier", *projected}
    assert all("not projected" in without[name] or "not counted" in without[name] for name in projected)
    assert "not projected" in without["projections"]
    assert "not projected" in without["memory"]
    assert "not counted" in without["counts"]
    assert "not counted" in without["traffic"]
    assert without["headline"].count("not measured") == 3
    assert without["claims"].count("not measured") >= len(claims.CLAIMS)
    assert not any("old" in text.split() for text in without.values())


def test_kernels(results):
    def row(case, provider, us):
        return {"suite": "kernels", "op": "geglu", "case": case, "provider": provider, "value": us, **WHO}

    slow, fast = [row("a", "native", 10.0), row("a", "torch", 15.0)], [row("b", "native", 1.0), row("b", "torch", 9.0)]
    results("kernels_cpu.jsonl", *slow, *fast, row("c", "torch", 1.0))
    assert "| geglu | 1.5 (a) | 9.0 (b) |" in made("kernels")


def test_the_run_of_make_train(results):
    values = dict.fromkeys(QUALITY, 0.25)
    quality = {"teacher": values | {"concept_hit": 1.0}, "student": values | {"concept_hit": 0.05}}
    macs = {"dense_g": 0.2376, "student_g": 0.19, "ratio": 0.7996}
    steps = {"lower_steps": 120, "upper_steps": 30, "images_per_second": 40.8, "seconds": 153.9}
    summary = {"macs": macs, **steps, "quality": quality}
    results("train_cpu.jsonl", {"suite": "train", "value": 171.6, "peak_gib": 1.634, "summary": summary, **WHO})
    text = made("headline", "output", "quality", "claims")
    assert "**5%** of the prompts that ask for the erased style get it; the teacher gave it to 100%. Every" in text
    assert "Every other style: 25%. 0.80 of the MACs. Mini world, seed 0, 172 s, 1.63 GiB, a CPU, 1 thread" in text
    assert "| student | 0.050 | 0.250 |" in text
    assert "0.238 -> 0.190 GMAC (0.800), 120 lower and 30 upper steps, 40.8 images/s, 153.9 s\n" in text
    assert "student: runs/mini/student   report: runs/mini/report.html\n" in text
    assert "the student on none. | holds | 1.00, 0.05 | train_cpu.jsonl: `model` teacher; `model` student" in text


def test_steps_and_bf16(results):
    config = {"structure": "0.80", "batch": 16, "unet": "mini", "rung": "kernels"}
    ratio = {"value": 2.345, "p20": 2.1, "p80": 2.5, "config": config, **WHO}
    row = {"suite": "step", "case": "lower", "provider": "ours", **ratio}
    peers = {"released": 2.345, "eager": 1.25}
    results("step_cpu.jsonl", *({**row, "metric": f"times_faster_than_{n}", "value": v} for n, v in peers.items()))
    results(
        "precision.jsonl",
        {"suite": "precision", "case": "gradient upper norm", "metric": "cosine", "value": 0.99871, **WHO},
        {"suite": "precision", "case": "gradient lower norm", "metric": "cosine", "value": 0.99999, **WHO},
    )
    assert "| diffusers, as released: fp32, hooks, anomaly mode | 2.35 (2.10..2.50) | not measured |" in made("step")
    assert "**2.35 times** as fast as the released way of training, 1.25 times as fast as a careful" in made("headline")
    text = made("speed")
    assert "A GPU: not measured.\n\n| CPU" in text
    assert "| lower step, mini world | 2.35 (2.10..2.50) | 1.25 (2.10..2.50) | - |" in text
    assert "| upper step, mini world | not measured | not measured | - |" in text
    text = made("bf16")
    assert "is 0.99871 (`upper norm`; wanted 0.995)" in text
    assert "What 200 steps lead to: not measured." in text


def test_forward_passes(results):
    """What pruning is worth in time is what it keeps of the promise, times the promise."""

    def row(name, gmacs, metric, value):
        config = {"structure": name, "gmacs": gmacs, "model": "sd21"}
        found = {"case": f"sd21 {name}", "provider": "ours", "config": config, "metric": metric, "value": value}
        return {"suite": "real_size", **found, "p20": value, "p80": value, **WHO}

    times = [row(name, macs, "ms", 15 * macs) for name, macs in (("dense", 400.0), ("0.80", 320.0), ("0.55", 220.0))]
    results("real_size.jsonl", *times, row("0.80", 320.0, "realised_speedup", 0.96))
    assert "**1.20 times** as fast as the dense UNet" in made("headline")
    assert "with 0.80 of its MACs, which promise 1.25" in made("headline")
    text = made("speed")
    assert "| UNet of SD 2.1, forward, dense | - | not measured | 1 |" in text
    assert "| UNet of SD 2.1, forward, 0.80 | - | not measured | 1.20 (1.20..1.20), promised 1.25 |" in text
    assert "| UNet of SD 2.1, forward, 0.55 | - | not measured | not measured |" in text
    assert "| 0.80 | 0.800 | 1.25 | 1.20 (1.20..1.20) |" in made("forward")


def test_counts(results):
    def row(suite, case, metric, value, **config):
        return {"suite": suite, "case": case, "metric": metric, "value": value, "config": config, **WHO}

    names = ("dense", "0.80", "0.55")
    metrics = {"macs": 402_784_000_000, "official_macs": 464_000_000_000, "params": 865_910_724}
    macs = [row("macs", f"sd21 {name}", metric, value) for name in names for metric, value in metrics.items()]
    launches = [row("launches", "sd21 dense lower", "launches", 2659, kind="all")]
    part = row("launches", "sd21 dense lower", "launches", 198, kind="conv")
    results("baseline.jsonl", *macs, *launches, part)
    assert "| dense | 402.784 | 464.000 | 865,910,724 | 2,659 | not counted |" in made("counts")


def test_a_gpu_row_fills_its_table(results):
    config = {"structure": "0.80", "batch": 16, "unet": "sd21", "rung": "graphs"}
    row = {"suite": "step", "case": "lower", "provider": "ours", "metric": "images_per_second", "value": 151.25}
    results("h200.jsonl", {**row, "unit": "img/s", "config": config, "driver": "580", **WHO, "device": "NVIDIA H200"})
    wanted = "| NVIDIA H200 | lower, 0.80, batch 16, graphs | images per second | 151.2 img/s |"
    assert wanted in made("gpu")
    assert wanted in made("speed")
    assert "A GPU: not measured" not in made("speed")


def test_markers_that_are_wrong_are_named(results):
    tables = {"step": TABLES["step"]}
    with pytest.raises(UserError, match="a page: 0 places for the table 'step'"):
        readme.renew(marked("step").replace("<!-- /step -->", ""), tables, "a page")
    with pytest.raises(UserError, match="a page: there is no table 'stepp'; this page has step"):
        readme.renew(marked("stepp"), tables, "a page")
