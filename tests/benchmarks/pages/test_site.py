"""The page of benchmarks: it holds what the tables of docs/ hold, and says what nobody has measured."""

import shlex

import pytest

from benchmarks.pages import committed, performance, site
from benchmarks.pages.rendered import Bars, rendered
from documented import ROOT, Command, parse

TABLES = [*site.SPEED, *site.COUNTS, *site.PROJECTIONS, *site.QUALITY]


def test_a_gpu_comes_first_and_is_not_measured():
    text = site.page()
    assert performance.gpu() == committed.NOT_MEASURED
    assert text.index("GPU: not measured.") < text.index('class="tiles"') < text.index("<section")
    assert "Projections, not measurements" in text
    assert len(text) < 2e6


def test_with_rows_of_a_gpu_they_come_first(monkeypatch):
    monkeypatch.setattr(performance, "gpu", lambda: "| card | ms |\n|---|--:|\n| H200 | 57.1 |")
    text = site.page()
    assert "not measured." not in text.partition('class="tiles"')[0]
    assert text.index("<td>57.1</td>") < text.index('<section id="speed">')


def test_nothing_is_made_up_without_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    text = site.page()
    assert "<table" not in text
    assert text.count("not measured") >= 10


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_each_table_says_where_it_was_measured_and_how_again(table):
    text = table.html()
    assert "<table>" in text
    assert "commit" in text
    assert "2026" in text
    if table.command.startswith("make "):
        assert f"{table.command.removeprefix('make ')}:" in (ROOT / "Makefile").read_text()
    else:
        module, *arguments = shlex.split(table.command)[2:]
        parse(Command(table.command, module, tuple(arguments)))


def test_a_table_with_bars():
    lines = [
        "| step | ours | note |",
        "|---|--:|--:|",
        "| `a` | 2.00 (1.50..2.40) | x<y |",
        "| b | not measured | 1..2 |",
    ]
    text = "\n".join([*lines, "", "**Done** on A."])
    found = rendered(text, "steps", Bars(("ours",), mark=1.0))
    assert '<th scope="row"><code>a</code></th>' in found
    assert "axis 0 to 2.5, line at 1" in found
    assert 'style="left:80.00%"' in found, "the dot: 2 of 2.5"
    assert 'style="left:60.00%;width:36.00%"' in found, "its range"
    assert "2.00<small>1.50 to 2.40</small>" in found
    assert "x&lt;y" in found
    assert "1 to 2" in found
    assert found.endswith('<p class="note"><strong>Done</strong> on A.</p>')
    dashed = rendered("| c | ms |\n|---|--:|\n| H200 | 55..68 |", "steps", Bars(("ms",), projection=True))
    assert 'class="planned"' in dashed
    assert 'class="dot"' not in dashed
