"""The tables of README.md and docs/, made from the committed rows: nobody copies a number by hand.

    python -m benchmarks.pages.readme             renews what lies between the markers
    python -m benchmarks.pages.readme --check     exits with 1 if a page says something else

A table lies between `<!-- NAME: python -m benchmarks.pages.readme -->` and `<!-- /NAME -->`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from textwrap import indent
from typing import Any

from benchmarks import ROOT
from benchmarks.pages import committed, performance, results, sdxl
from benchmarks.pages.committed import NOT_MEASURED, Row, load, machines, within
from benchmarks.rows import latest
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic
from bilevel_fast.base.tables import markdown, seeds_named, spread
from bilevel_fast.runs.config import preset
from bilevel_fast.runs.page.ending import end

QUALITY = {
    "concept_hit": "erased style",
    "content_kept": "its content",
    "other_style_hit": "other styles",
    "fid": "FID",
}
"""Columns of table 1 that README.md shows."""

Tables = Mapping[str, Callable[[], str]]


@dataclass(frozen=True)
class Settings:
    """Settings of the pages."""

    check: bool = False
    """Write nothing; fail if a page is not what the rows say."""


def headline() -> str:
    """Three numbers, each with its machine."""
    return "\n".join(f"* {line}" for line in (_erased(), _faster(), _realised()))


def _erased() -> str:
    rows = load("train_cpu.jsonl")
    if not rows:
        return f"The run of `make train`: {NOT_MEASURED}."
    row = rows[-1]
    quality, ratio = row["summary"]["quality"], row["summary"]["macs"]["ratio"]
    student, teacher = quality["student"], quality["teacher"]
    return (
        f"**{student['concept_hit']:.0%}** of the prompts that ask for the erased style get it; the teacher gave it to "
        f"{teacher['concept_hit']:.0%}. Every other style: {student['other_style_hit']:.0%}. {ratio:.2f} of the MACs. "
        f"Mini world, seed 0, {row['value']:.0f} s, {row['peak_gib']:.2f} GiB, {_machine(row)} (`make train`)."
    )


def _faster() -> str:
    found = performance.ratios()
    if ("released", "lower") not in found or ("eager", "lower") not in found:
        return f"The training step against diffusers: {NOT_MEASURED}."
    released, careful = found["released", "lower"], found["eager", "lower"]
    return (
        f"**{released['value']:.2f} times** as fast as the released way of training, {careful['value']:.2f} times as "
        f"fast as a careful loop around diffusers: one lower step, mini world's UNets, fp32, {_machine(released)}."
    )


def _realised() -> str:
    found = forward_rows()
    if ("0.80", "realised_speedup") not in found or ("dense", "ms") not in found:
        return f"The UNet of Stable Diffusion 2.1, pruned: {NOT_MEASURED}."
    row, promised = found["0.80", "realised_speedup"], promise(found, "0.80")
    return (
        f"**{row['value'] * promised:.2f} times** as fast as the dense UNet of Stable Diffusion 2.1 is the one with "
        f"{1 / promised:.2f} of its MACs, which promise {promised:.2f}: one forward pass, random weights, fp32, "
        f"{_machine(row)}."
    )


def promise(found: dict[tuple[str, str], Row], name: str) -> float:
    """How many times as fast a UNet would be if time went by MACs."""
    return found["dense", "ms"]["config"]["gmacs"] / found[name, "ms"]["config"]["gmacs"]


def _machine(row: Row) -> str:
    return f"{row['device']}, {row['threads']} thread{'s' * (row['threads'] != 1)}, commit {row['commit']}"


def forward_rows() -> dict[tuple[str, str], Row]:
    """Our forward passes of `make real-size`, by structure and metric."""
    rows = latest(load("real_size.jsonl")).values()
    return {
        (row["config"]["structure"], row["metric"]): row
        for row in rows
        if row["metric"] != "seconds" and row["provider"] == "ours" and row["value"] is not None
    }


def output() -> str:
    """How `make train` ended, as it was printed."""
    rows = load("train_cpu.jsonl")
    if not rows:
        return NOT_MEASURED
    return indent(end(rows[-1]["summary"], preset("mini").out), "    ")


def speed() -> str:
    """What a clock says, in one table; its first line says what no GPU has measured."""
    gpu, steps = performance.gpu(), performance.ratios()
    head = "A GPU: not measured." if gpu == NOT_MEASURED else f"On a GPU:\n\n{gpu}"
    forward, lines, rows = forward_rows(), [], list(steps.values())
    for case in ("lower", "upper") if steps else ():
        cells = [within(steps[peer, case]) if (peer, case) in steps else NOT_MEASURED for peer in ("released", "eager")]
        lines.append((f"{case} step, mini world", *cells, "-"))
    for name in ("dense", "0.80", "0.55") if ("dense", "ms") in forward else ():
        own, theirs = forward.get((name, "realised_speedup")), forward.get((name, "times_faster_than_diffusers"))
        cells = [within(theirs) if theirs else NOT_MEASURED, "1"]
        if name != "dense":
            promised = promise(forward, name)
            cells[1] = f"{within(own, factor=promised)}, promised {promised:.2f}" if own else NOT_MEASURED
        lines.append((f"UNet of SD 2.1, forward, {name}", "-", *cells))
        rows += [row for row in (own, theirs) if row]
    if not rows:
        return f"{head}\n\nA CPU: {NOT_MEASURED}."
    columns = ("diffusers, as released", "diffusers, used with care", "the same, dense")
    return f"{head}\n\n{markdown(('CPU, fp32: times as fast as', *columns), lines)}\n\n{machines(rows)}"


def compared() -> str:
    """Table 1 in short: the bilevel student beside two-stage ones."""
    path = committed.RESULTS / "reproduce" / "table1" / "results.json"
    if not path.exists():
        return NOT_MEASURED
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = found["rows"]
    seeds, labels = sorted({row["seed"] for row in rows}), dict.fromkeys(row["label"] for row in rows)
    lines = []
    for label in labels:
        values = [[r["numbers"][key] for r in rows if r["label"] == label] for key in QUALITY]
        lines.append((label, *(spread(some, 2, len(seeds)) for some in values)))
    where = sorted({f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] != 1)}" for r in rows})
    table = markdown((f"mini world, {seeds_named(seeds)}", *QUALITY.values()), lines)
    return f"{table}\n\nMeasured on {'; '.join(where)}, commit {found['commit']}, {found['date']}."


PAGES: dict[str, Tables] = {
    "README.md": {"headline": headline, "output": output, "speed": speed, "compared": compared},
    "docs/results.md": results.TABLES,
    "docs/emoji.md": results.EMOJI,
    "docs/performance.md": performance.TABLES,
    "docs/sdxl.md": sdxl.TABLES,
    "docs/quick-start-sd21.md": {"real_size": performance.real_size},
}
"""By page, its tables."""


def renew(text: str, tables: Tables, page: str) -> str:
    """A page with its tables made anew.

    Raises:
        UserError: A marker is missing, or names no table of the page.
    """
    for name in re.findall(r"<!-- (\w+): [^>]*benchmarks.pages.readme", text):
        if name not in tables:
            raise UserError(f"{page}: there is no table {name!r}; this page has {', '.join(tables)}")
    for name, table in tables.items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        body = table().replace("\\", r"\\")
        text, count = re.subn(pattern, rf"\g<1>{body}\n\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise UserError(f"{page}: {count} places for the table {name!r}, wanted one, between <!-- {name}: ... -->")
    return text


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.readme", __doc__)
    for name, tables in PAGES.items():
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = renew(old, tables, name)
        if settings.check and new != old:
            raise SystemExit(f"{name} is not what the committed rows say: run python -m benchmarks.pages.readme")
        if not settings.check:
            write_atomic(page, new.encode())


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
