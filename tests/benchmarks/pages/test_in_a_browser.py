"""The report of a run and the page of benchmarks in a real browser: what it says, asks for, and how it lays them out.

One browser serves all tests of this file.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.pages import site
from benchmarks.pages.browser import INSTALL, Browser, Tab, find
from bilevel_fast.runs.page.training import report
from finished_run import HOSTILE, finished_run

pytestmark = pytest.mark.skipif(find() is None, reason=f"no browser on the path; run: {INSTALL}")

PHONE = 390  # pixels wide
WIDER = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className)"""
UNTOLD = """[...document.images].filter(i => !i.alt.trim() || !i.naturalWidth).length"""
UNREACHED = """[...document.querySelectorAll("body *")].filter(e => e.tabIndex < 0 && e.clientWidth
    && e.scrollWidth > e.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(e).overflowX)).length"""
CLIPPED = """[...document.querySelectorAll("svg text")].filter(t => {
    const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect()
    return a.width && (a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1)
    }).map(t => t.textContent)"""


def problems(tab: Tab) -> list[str]:
    """What is wrong with a page at its present width."""
    tab.take()
    found = [f"says: {said}" for said in tab.said] + [f"asks for {address}" for address in tab.asked]
    if tab.read("document.documentElement.scrollWidth") > tab.width:
        found.append(f"wider than {tab.width}: {tab.read(WIDER.replace('innerWidth', str(tab.width)))[:3]}")
    if count := tab.read(UNTOLD):
        found.append(f"{count} images without a text, or broken")
    if count := tab.read(UNREACHED):
        found.append(f"{count} parts scroll, and no key leads there")
    if clipped := tab.read(CLIPPED):
        found.append(f"labels are clipped: {clipped}")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser.start() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Both pages, the report with hostile prompts."""
    place = tmp_path_factory.mktemp("pages")
    run = finished_run(place / "run", prompts=[f"{HOSTILE} in the style of pointillism", "a red star", "a" * 80])
    (run / "report.html").write_text(report(run, 12))
    (place / "benchmarks.html").write_text(site.page())
    return {"report": run / "report.html", "benchmarks": place / "benchmarks.html"}


@pytest.mark.parametrize("name", ["report", "benchmarks"])
def test_a_page_in_a_browser(name, browser, pages):
    with browser.tab(pages[name], PHONE) as tab:
        assert tab.read("document.title").startswith("bilevel_fast: mini" if name == "report" else "Benchmarks")
        assert problems(tab) == []
        light = tab.read("getComputedStyle(document.body).backgroundColor")
        tab.read("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert problems(tab) == [], "with all that is folded"
        tab.look(PHONE, dark=True)
        dark = tab.read("getComputedStyle(document.body).backgroundColor")
        assert light != dark
        assert sum(map(int, light[4:-1].split(","))) > 600 > 200 > sum(map(int, dark[4:-1].split(",")))
        tab.look(1280)
        assert problems(tab) == []


def test_a_report_is_used_with_keys_and_a_pointer(browser, pages):
    with browser.tab(pages["report"], 1280) as tab:
        tab.press("Tab")
        assert tab.read("document.activeElement.textContent") == "Before and after"
        assert tab.read("getComputedStyle(document.activeElement).outlineStyle") == "solid", "it is seen where one is"
        tab.read("document.querySelector('.chart summary').focus()")
        seen = "document.querySelector('.chart table').checkVisibility()"
        assert not tab.read(seen)
        tab.press("Enter")
        tab.wait_for(seen)
        shown = "document.querySelector('.chart .at title').textContent"
        assert tab.read(shown).startswith("48: bilevel student 2, distilled only 2")
        reached = "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
        assert tab.read(reached)


BAD = """<!doctype html><html lang="en"><title>x</title><body style="margin:0"><script>console.error("mine")</script>
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="><img alt="gone" src="nowhere.png">
<div style="width:500px">wide</div><div style="overflow-x:auto;width:90px"><p style="width:200px">hidden</p></div>
<svg viewBox="0 0 50 10" style="width:50px"><text x="30">beyond its edge</text></svg></html>"""


def test_what_is_wrong_is_seen(browser, tmp_path):
    (tmp_path / "bad.html").write_text(BAD)
    with browser.tab(tmp_path / "bad.html", PHONE) as tab:
        found = "\n".join(problems(tab))
    for said in (
        "says: mine",
        "nowhere.png",
        "wider than",
        "2 images without a text, or broken",
        "1 parts scroll",
        "labels are clipped: ['beyond its edge']",
    ):
        assert said in found, said
