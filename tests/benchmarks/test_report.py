"""The page about speed: its numbers are those of the rows, what is missing says so, and nothing leaves the page."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.report import RESULTS, load, page
from bilevel_fast.base.errors import UserError

ROOT = Path(__file__).parents[2]
GPU = {
    "device": "Card X",
    "driver": "580.1",
    "torch": "2.11.0",
    "threads": 8,
    "commit": "abc1234",
    "date": "2026-11-21",
}
CPU = {**GPU, "device": "Chip Y, 2 cores", "driver": None, "threads": 2}
SECTIONS = [
    "A training step",
    "What pruning brings",
    "Kernels against their roofline",
    "Launches per step",
    "Projections",
    "Every row",
]


def step(provider, value, rung=None, **more):
    config = {"batch": 16, "unet": {"nested": 1}} | ({"rung": rung} if rung else {})
    interval = {} if value is None else {"p20": value - 1, "p80": value + 1}
    row = {"suite": "step", "case": "lower", "provider": provider, "metric": "images_per_second", "unit": "img/s"}
    return {**row, "value": value, **interval, "config": config, **GPU, **more}


def unet(structure, provider, gmacs, ms, realised=None, **more):
    config = {"model": "sd21", "structure": structure, "batch": 4, "latent": 64, "gmacs": gmacs, "error": ms}
    row = {"suite": "unet", "case": f"sd21 {structure} b4", "provider": provider, "config": config, "dtype": "bfloat16"}
    times = {**row, **GPU, "metric": "ms", "unit": "ms", "value": ms, **more}
    gain = {**row, **GPU, "metric": "realised_speedup", "unit": "x", "value": realised, "p20": 0.7, "p80": 0.9}
    return [times] if realised is None else [times, gain]


def kernel(op, provider, us, gb, tflop, roofline, **more):
    return {"suite": "kernels", "op": op, "case": "case b2 fwd", "numel": 10, "metric": "us", "unit": "us",
            "provider": provider, "value": us, "gb_per_s": gb, "tflop_per_s": tflop, "roofline": roofline,
            "dtype": "bfloat16", "copy_gb_per_s": 600.0, "matmul_tflop_per_s": 130.0, **GPU, **more}  # fmt: skip


def launch(kind, n):
    where = {**CPU, "device": "meta", "threads": None}
    return {"suite": "launches", "case": "sd21 dense lower", "provider": "torch", "metric": "launches", "value": n,
            "unit": "launches", "config": {"kind": kind}, **where}  # fmt: skip


ROWS = [
    *(step("released", 7.25), step("ours", 24.5, "bf16"), step("ours", 33.75, "kernels")),
    {**step("xformers", None), "why": "not built here"},
    step("released", 130.5, "as released", metric="ms", unit="ms"),
    step("ours", 3.5, metric="times_faster_than_released", unit="x", **CPU),
    *(*unet("dense", "ours", 400.0, 20.0), *unet("0.80", "ours", 320.0, 17.0, 0.941)),
    *unet("0.55", "eager", 220.0, None, reason="cannot hold it"),
    kernel("geglu", "triton", 10.0, 480.0, 1.0, 0.8),
    kernel("geglu", "torch", 20.0, 240.0, 0.5, 0.4),
    kernel("pruned_attention", "triton", 30.0, 60.0, 97.5, 0.75),
    {**kernel("geglu", "apex", None, None, None, None), "why": "not installed"},
    *(launch("all", 4321), launch("conv", 170)),
    {"suite": "roofline", "case": "lower", "provider": "triton", "metric": "projection", "unit": "ms", "value": 633.0,
     "device": "Card Z", "config": {"structure": "0.80", "batch": 16}, "formula": "max(flops < peak, bytes)",
     "images_per_second": 25.28, "mfu": 0.51, "rates": {"gb_per_s": 768.0}, "projection": True},
    {"suite": "roofline_validation", "case": "lower", "provider": "torch", "metric": "ms", "unit": "ms", "value": 300.0,
     "p20": 290.0, "p80": 310.0, "predicted": 240.0, **CPU},
    {"suite": "compile_matrix", "op": "geglu", "sm": 90},
]  # fmt: skip


class Reader(HTMLParser):
    """Cells of all table rows, headings, attributes of all tags, and tags that are left open."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.headings, self.tags, self.open, self._into = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are nested"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def write(folder, rows, name="rows.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def full(tmp_path):
    return page(load(write(tmp_path / "results", ROWS)))


def sections(text):
    """The HTML of each section, by its heading."""
    found = re.findall(r"<section.*?<h2>(.*?)</h2>(.*?)</section>", text, re.S)
    return dict(found)


def cells(text):
    return [row for row in Reader(f"<table>{text}</table>").rows if row]


def test_the_ladder_has_a_bar_per_rung_and_says_what_could_not_run(full):
    rows = cells(sections(full)["A training step"])
    assert ["released", "7.25", "6.25 .. 8.25", ""] in rows
    assert ["ours, bf16", "24.5", "23.5 .. 25.5", ""] in rows
    assert ["ours, kernels", "33.75", "32.75 .. 34.75", ""] in rows
    assert ["xformers", "not measured: not built here"] in rows
    assert ["released", "3.5", "2.5 .. 4.5", ""] in rows, "of the ratio: named after the rival"
    text = sections(full)["A training step"]
    widths = re.findall(r'class="fill c\d" style="width:([\d.]+)%"', text)
    assert widths == ["21.5", "72.6", "100.0", "100.0", "100.0"], "shares of the largest of a table"
    aside = text[text.index("<details>") : text.index("</details>") + len("</details>")]
    assert ["released", "130.5", "129.5 .. 131.5", ""] in cells(aside)
    assert "images per second" not in aside
    assert "lower step; images per second (img/s); batch=16; Card X; longer is better" in text
    assert "lower step; ours, times as fast as; batch=16; Chip Y, 2 cores, 2 threads; longer" in text


def test_the_plane_compares_with_the_dense_unet_of_the_same_provider(full):
    text = sections(full)["What pruning brings"]
    rows = cells(text)
    assert ["dense", "ours, batch 4", "1.000", "20", "1.000", "", ""] in rows
    assert ["0.80", "ours, batch 4", "0.800", "17", "0.850", "0.941", "0.7 .. 0.9"] in rows
    assert ["0.55", "eager, batch 4", "", "not measured: cannot hold it"] in rows, "no dense row of eager is there"
    assert re.findall(r"<title>(.*?)</title>", text) == ["0.80, ours, batch 4: MACs 0.800, time 0.850"]
    assert "every MAC saved is time saved" in text
    before, after = text.split("On a CPU")
    assert "not measured</p>" not in before
    assert "not measured</p>" in after


def test_the_mark_lies_where_its_numbers_say(tmp_path):
    """On the line y = x if time falls as MACs do, above it if not: the line itself is in the picture."""

    def mark(ms):
        rows = [*unet("dense", "ours", 400.0, 20.0), *unet("0.80", "ours", 320.0, ms, 1.0)]
        text = sections(page(load(write(tmp_path / str(ms), rows))))["What pruning brings"]
        x, y = re.search(r'class="mark c0" d="M([\d.]+) ([\d.]+)a4.5 4.5 0 1 0 9.0 0a', text).groups()
        x0, y0, x1, y1 = map(
            float, re.search(r'dasharray="5 4" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', text).groups()
        )
        on_line = y0 + (float(x) + 4.5 - x0) / (x1 - x0) * (y1 - y0)
        return on_line - float(y)  # pixels above the line

    assert abs(mark(16.0)) < 0.2
    assert mark(18.0) > 10, "pixels grow downwards"


def test_kernels_show_the_rate_that_binds_them(full):
    text = sections(full)["Kernels against their roofline"]
    rows = cells(text)
    assert ["case b2 fwd, triton", "10 us", "480.0 GB/s", "80%", ""] in rows
    assert ["case b2 fwd, torch", "20 us", "240.0 GB/s", "40%", ""] in rows
    assert ["case b2 fwd, triton", "30 us", "97.50 TFLOP/s", "75%", ""] in rows
    assert ["case b2 fwd, apex", "not measured: not installed"] in rows
    assert "ceilings measured there: copy 600 GB/s, matmul 130.00 TFLOP/s" in text
    assert re.findall(r'style="width:([\d.]+)%"', text) == ["80.0", "40.0", "75.0"], "a full bar is the roofline"


def test_the_data_sheet_of_a_known_card_is_quoted(tmp_path):
    rows = [kernel("geglu", "triton", 10.0, 480.0, 1.0, 0.8, device="NVIDIA RTX A6000")]
    assert "; data sheet: 768 GB/s, 155 TFLOP/s" in page(load(write(tmp_path / "r", rows)))


def test_launches_and_projections(full):
    found = sections(full)
    assert ["sd21 dense lower", "meta", "4,321", "170"] in cells(found["Launches per step"])
    assert ["lower, 0.80, triton", "633", "25.28", "51%", ""] in cells(found["Projections"])
    assert "projection in ms, gb_per_s 768; structure=0.80 batch=16; shorter is better" in found["Projections"]
    assert ["Chip Y, 2 cores, 2 threads", "lower", "240", "300", "290 .. 310", "-20%"] in cells(found["Projections"])
    assert "max(flops &lt; peak, bytes)" in found["Projections"]
    assert found["Projections"].count("hatched") == 1
    others = "".join(text for name, text in found.items() if name != "Projections")
    assert "hatched" not in others


def test_a_projection_among_measured_suites_moves_to_the_projections(tmp_path):
    found = sections(page(load(write(tmp_path / "r", [step("ours", 99.0, "graphs", projection=True)]))))
    assert found["A training step"].count("not measured</p>") == 2
    assert "hatched" in found["Projections"]


def test_every_row_is_accounted_for(full):
    rows = cells(sections(full)["Every row"])[1:]
    assert sum(int(row[2]) for row in rows) == len(ROWS)
    machine = "Card X, 8 threads, torch 2.11.0, driver 580.1"
    step_row = [
        "step",
        "rows.jsonl",
        "5",
        machine,
        "python -m benchmarks.speed.step --device cuda",
        "abc1234",
        "2026-11-21",
    ]
    assert step_row in rows
    assert any(row[0] == "roofline (projection)" for row in rows)
    assert any(row[0] == "compile_matrix" and row[3] == "none: computed, not timed" for row in rows)


def test_an_empty_folder_says_not_measured_everywhere(tmp_path):
    text = page(load(write(tmp_path / "results", [])))
    found = sections(text)
    assert list(found) == SECTIONS
    for name, body in found.items():
        assert "<p class=none>not measured</p>" in body, name
        assert "<table" not in body
        assert "<svg" not in body


def test_later_rows_and_other_files_replace_the_baseline(tmp_path):
    folder = write(tmp_path / "results", [step("ours", 1.5)], "baseline.jsonl")
    write(folder, [step("ours", 2.5)], "a.jsonl")
    write(folder, [step("released", 3.5), step("released", 4.5)], "b.jsonl")
    rows = cells(sections(page(load(folder)))["A training step"])
    assert [row[:2] for row in rows if row[0] in ("ours", "released")] == [["ours", "2.5"], ["released", "4.5"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"suite": "step", ', "not JSON"),
        ('{"metric": "ms"}', "wanted a JSON object with a suite"),
        (json.dumps({**step("ours", 1.0), "value": "fast"}), "field 'value' is 'fast', wanted a finite number or null"),
        (
            json.dumps({k: v for k, v in kernel("geglu", "triton", 1.0, 1.0, 1.0, 1.0).items() if k != "roofline"}),
            "a row of suite 'kernels' needs 'roofline'",
        ),
        (
            json.dumps(unet("dense", "ours", 1.0, 1.0)[0]).replace('"gmacs"', '"gmac"'),
            "a row of suite 'unet' needs 'gmacs'",
        ),
    ],
)
def test_a_damaged_row_is_named_with_file_and_line(line, message, tmp_path):
    folder = write(tmp_path / "results", ROWS[:2], "good.jsonl")
    (folder / "speed.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        page(load(folder))
    assert "speed.jsonl:2: " in str(error.value)
    assert "\n" not in str(error.value)


def test_names_cannot_break_out_of_the_page(tmp_path):
    evil = '<script src="http://evil.invalid/x.js"></script>"\'&'
    rows = [step(evil, 1.0, evil), *unet("dense", evil, 2.0, 2.0), *unet(evil, evil, 1.0, 1.0, 1.0)]
    text = page(load(write(tmp_path / "r", [*rows, kernel(evil, evil, 1.0, 1.0, 1.0, 0.5)])))
    reader = Reader(text)
    assert not reader.open
    assert {tag for tag, _ in reader.tags} & {"script", "img", "iframe", "a"} == set()
    assert html.escape(evil) in text


def test_the_page_is_self_contained_and_readable(full):
    reader = Reader(full)
    assert not reader.open, "every tag is closed"
    assert reader.headings == SECTIONS
    for tag, attributes in reader.tags:
        assert tag not in ("script", "iframe", "img", "object")
        for name in ("src", "srcset", "xlink:href", "action"):
            assert name not in attributes
        assert attributes.get("href", "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert ("meta", {"name": "viewport", "content": "width=device-width"}) in reader.tags
    assert not re.search(r"url\(|@import|https?://", full)
    assert "max-width: 32rem" in full
    assert "prefers-color-scheme: dark" in full


def test_the_committed_rows_make_a_page(tmp_path):
    out = tmp_path / "report.html"
    command = [sys.executable, "-m", "benchmarks.report", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reader = Reader(out.read_text())
    assert reader.headings == SECTIONS
    listed = sum(int(row[2]) for row in reader.rows if len(row) == 7 and row[1].endswith(".jsonl"))
    assert listed == sum(len(path.read_text().splitlines()) for path in RESULTS.glob("*.jsonl"))
    assert (
        "is no folder" in subprocess.run([*command, "--results", "no"], capture_output=True, text=True, cwd=ROOT).stderr
    )


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def browse(path, tmp_path):
    """The rendered DOM of a file, and what the page asked the network for. No host can be reached."""
    log, profile = tmp_path / "net.json", tmp_path / "profile"
    switches = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "no-proxy-server", "dump-dom"]
    switches += ["disable-background-networking", "disable-component-update", "disable-sync", "disable-extensions"]
    switches += ["host-resolver-rules=MAP * ~NOTFOUND", f"user-data-dir={profile}", f"log-net-log={log}"]
    command = [BROWSER, *(f"--{switch}" for switch in switches), path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    events = json.loads(log.read_text())
    start = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event["params"] for event in events["events"] if event["type"] == start and "params" in event]
    # a browser has errands of its own; those of the page carry its origin
    return done.stdout, [job["url"] for job in jobs if "file://" in job.get("network_isolation_key", "")]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome in the path")
def test_a_browser_shows_all_sections_and_asks_nobody(full, tmp_path):
    good, bad = tmp_path / "good.html", tmp_path / "bad.html"
    good.write_text(full)
    bad.write_text('<!doctype html><title>t</title><img alt="" src="http://tracker.invalid/x.png">')
    dom, asked = browse(good, tmp_path)
    assert [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", dom)] == SECTIONS
    assert "<td>ours, kernels</td>" in dom
    assert dom.count("<svg viewBox") >= 2
    assert asked == []
    assert browse(bad, tmp_path)[1] == ["http://tracker.invalid/x.png"], "the check would see a request"
