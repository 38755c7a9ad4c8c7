"""The tables of docs/sdxl.md: what is counted and projected of Stable Diffusion XL at 1024 px, and its two losses."""

from benchmarks.counts import fits
from benchmarks.pages.committed import NOT_MEASURED, Row, load, machines
from benchmarks.quality import losses
from bilevel_fast.base.tables import markdown

FILE = "sdxl.jsonl"
STUDENTS = {"dense": "dense SDXL", "0.80": "0.80 of the MACs, evenly", "ssd-1b": "ssd-1b", "koala-700m": "koala-700m"}
"""By the name that rows have."""


def _rows(suite: str) -> list[Row]:
    return [row for row in load(FILE) if row["suite"] == suite]


def launches() -> str:
    """Ops of a step that launch a kernel, through torch's own and with ours."""
    found = {row["case"]: row["value"] for row in _rows("launches") if row["config"]["kind"] == "all"}
    if not found:
        return "not counted"
    rows = _rows("roofline")
    counts = {(r["provider"], f"sdxl {r['config']['structure']} {r['case']}"): r["launches"] for r in rows}
    counts |= {("torch", case): number for case, number in found.items()}
    lines = []
    for name, says in STUDENTS.items():
        cells = [(p, f"sdxl {name} {level}") for level in ("lower", "upper") for p in ("torch", "triton")]
        lines.append((says, *(f"{counts[cell]:,}" if cell in counts else "not counted" for cell in cells)))
    head = ("launches of a step", "lower, torch's ops", "with ours", "upper, torch's ops", "with ours")
    return markdown(head, lines)


def projections() -> str:
    """What a step takes at least, by card: from matrix products alone to all ops with our kernels."""
    rows = _rows("roofline")
    if not rows:
        return "not projected"
    ms = {(r["device"], r["config"]["structure"], r["case"], r["provider"]): r["value"] for r in rows}
    columns = [(name, case) for case in ("lower", "upper") for name in STUDENTS]
    lines = []
    for card in dict.fromkeys(row["device"] for row in rows):
        cells = ["..".join(f"{ms[card, *column, p] / 1e3:.2f}" for p in ("products", "triton")) for column in columns]
        lines.append((card, *cells))
    return markdown(("projection, s", *(f"{case}, {name}" for name, case in columns)), lines)


def memory() -> str:
    """Images that are computed at once, by student and card."""
    rows = _rows("fits")
    if not rows:
        return "not projected"
    cards = dict.fromkeys(row["device"] for row in rows if row["unit"] == "images")
    return markdown(("projection, images at once", "GiB for one", *cards), fits.table(rows))


def ablation() -> str:
    """The further terms of the lower loss, on the mini world."""
    rows = load("losses.jsonl")
    return f"{losses.table(rows)}\n\n{machines(rows)}" if rows else NOT_MEASURED


TABLES = {"losses": ablation, "sdxl_launches": launches, "sdxl_projections": projections, "sdxl_memory": memory}
