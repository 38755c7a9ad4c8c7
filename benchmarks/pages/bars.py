"""Charts of the benchmark page: what a table says in numbers, as bars and dots on a common axis."""

import json
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from benchmarks.pages import committed, performance, readme
from benchmarks.pages.committed import NOT_MEASURED, load
from bilevel_fast.runs.page.charts import interval, number, planned, ticks
from bilevel_fast.runs.page.document import Html, join, legend, note, table, unit
from bilevel_fast.runs.page.quality import percent


def tiles() -> Iterable[tuple[str, str, object]]:
    """The numbers that a reader wants first; only those that were measured."""
    steps, forward = performance.ratios(), readme.forward_rows()
    if row := steps.get(("released", "lower")):
        yield "Lower step", unit(f"{row['value']:.2f}", "times"), "as fast as diffusers as released; CPU, mini world"
    if row := steps.get(("eager", "lower")):
        yield "Lower step", unit(f"{row['value']:.2f}", "times"), "as fast as diffusers used with care; CPU, mini world"
    if row := forward.get(("0.80", "realised_speedup")):
        promised = readme.promise(forward, "0.80")
        about = f"as fast as the dense UNet of SD 2.1; its MACs promise {promised:.2f}"
        yield "UNet of 0.80 MACs", unit(f"{row['value'] * promised:.2f}", "times"), about
    if rows := load("train_cpu.jsonl"):
        quality = rows[-1]["summary"]["quality"]
        about = f"teacher {percent(quality['teacher']['concept_hit'])}; mini world, seed 0, 36 images"
        yield "Erased style drawn", percent(quality["student"]["concept_hit"]), about


def steps() -> Html:
    """How many times as fast as each peer a lower step is; the line is at 1."""
    found = performance.ratios()
    rows = [(says, found[peer, "lower"]) for peer, says in performance.PEERS.items() if (peer, "lower") in found]
    return _dots("ours, times as fast as: lower step", [(says, _three(row)) for says, row in rows], mark=1.0)


def forward() -> Html:
    """Times as fast as the dense UNet: ours, and what the MACs promise."""
    found = readme.forward_rows()
    rows = []
    for name in ("0.80", "0.55", "bk-sdm-small"):
        if (row := found.get((name, "realised_speedup"))) is not None:
            promised = readme.promise(found, name)
            low, value, high = (promised * part for part in _three(row))
            rows.append((f"{name}, promised {promised:.2f}", (low, value, high)))
    return _dots("ours, times as fast as the dense UNet", rows, mark=1.0)


def projected() -> Html:
    """The range of a lower step of 0.80 by card, dashed: a projection."""
    rows = [r for r in load("roofline.jsonl") if (r["config"]["structure"], r["case"]) == ("0.80", "lower")]
    found = {(r["device"], r["provider"]): r["value"] for r in rows}
    cards = [d for d in dict.fromkeys(r["device"] for r in rows) if {(d, "products"), (d, "triton")} <= found.keys()]
    if not cards:
        return note(NOT_MEASURED)
    marks = _axis(max(found[card, "triton"] for card in cards))
    lines = [
        [
            card,
            planned(found[card, "products"], found[card, "triton"], marks[-1]),
            f"{found[card, 'products']:.0f} to {found[card, 'triton']:.0f}",
        ]
        for card in cards
    ]
    head = ["lower step of 0.80", _scale(marks), "projected ms"]
    return join((legend([("projection", "planned")]), table(head, lines, label="Projected steps", bars=[1])))


def suppressed() -> Html:
    """FID of each model of table 1, with its range over seeds."""
    path = committed.RESULTS / "reproduce" / "table1" / "results.json"
    if not path.exists():
        return note(NOT_MEASURED)
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        numbers = [row["numbers"] for row in rows if row["label"] == label]
        fid = [each["fid"] for each in numbers]
        hit = percent(mean(each["concept_hit"] for each in numbers))
        lines.append((f"{label}: style on {hit}", (min(fid), mean(fid), max(fid))))
    return _dots("FID, mean and range over seeds; lower is better", lines)


Three = tuple[float, float, float]
"""Low, value, high."""


def _three(row: committed.Row) -> Three:
    return row["p20"], row["value"], row["p80"]


def _axis(most: float) -> list[float]:
    marks = ticks(0.0, most, 4)
    step = marks[1] - marks[0]
    return marks if marks[-1] >= most else [*marks, round(marks[-1] + step, 12)]


def _scale(marks: Sequence[float]) -> str:
    return f"0 to {number(marks[-1])}"


def _dots(title: str, rows: Sequence[tuple[str, Three]], mark: float | None = None) -> Html:
    """A line for each row: a dot, the interval about it, and the numbers."""
    if not rows:
        return note(NOT_MEASURED)
    marks = _axis(max(high for _, (_, _, high) in rows))
    lines = [
        [name, interval(value, low, high, marks[-1], mark=mark), f"{value:.2f}", f"{low:.2f} to {high:.2f}"]
        for name, (low, value, high) in rows
    ]
    line = f"{_scale(marks)}; the line is at {number(mark)}" if mark is not None else _scale(marks)
    return table([title, line, "value", "range"], lines, label=title, bars=[1])
