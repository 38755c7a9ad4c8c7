"""One page about speed, from committed rows alone.

    python -m benchmarks.report                       report.html from benchmarks/results/*.jsonl
    python -m benchmarks.report --out docs/speed.html

The page is one file without scripts or links to elsewhere. It says `not measured` where there are no rows, and a
projection, which is a model's number, is hatched and called one. Of rows with one key the last counts, as in
benchmarks.pages.compare; those of baseline.jsonl give way to all others.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cards import CARDS
from benchmarks.pages.compare import Row, config_text, device, direction, is_projection, latest, number, parse
from benchmarks.report_plots import STYLE, Bar, Point, bars, escape, plane, strips, table
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic

RESULTS = Path(__file__).parent / "results"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser, too, sees to it
NOT_MEASURED = "<p class=none>not measured</p>"
COMMANDS = {
    "frontier": "python -m benchmarks.quality.frontier run",
    "compile_matrix": "python -m benchmarks.kernels.compile_matrix --write",
    "macs": "python -m benchmarks.pages.bench_check --only macs",
}
# A provider keeps its colour; the last is everybody else's. Those of one colour never meet.
PALETTE = (("ours", "triton", "native"), ("eager",), ("torch",), ("compile",), ("graphs", "cuda", "xformers"))


@dataclass(frozen=True)
class Settings:
    """Settings of the page."""

    out: Path = Path("report.html")
    """The page."""
    results: Path = RESULTS
    """Folder of rows, *.jsonl."""


RATIO = "ours, times as fast as"


def load(folder: Path) -> list[Row]:
    """All rows, each with the `file` and `line` it comes from; the baseline's first.

    Raises:
        UserError: There is no such folder, or a line is no row; names file and line.
    """
    if not folder.is_dir():
        raise UserError(f"--results {folder} is no folder")
    found = []
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: (path.name != "baseline.jsonl", path.name)):
        for n, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip():
                found.append({**parse(line, f"{path}:{n}"), "file": path.name, "line": n})
    return found


def need(row: Row, name: str) -> Any:
    """A field without which the row cannot be drawn, of the row or of its config.

    Raises:
        UserError: It has none; names file and line.
    """
    value = row.get(name, _config(row).get(name))
    if value is None:
        raise UserError(f"{row['file']}:{row['line']}: a row of suite {row['suite']!r} needs {name!r}")
    return value


def of(rows: Iterable[Row], suite: str) -> list[Row]:
    """The last row of each key of a suite; rows without a metric stay as they are."""
    mine = [row for row in rows if row["suite"] == suite]
    return [*latest(mine).values(), *(row for row in mine if "metric" not in row)]


def places(rows: Sequence[Row], draw: Callable[[list[Row]], str]) -> str:
    """A part for GPUs and one for CPUs, each `not measured` if it has no rows."""
    parts = ""
    for name, is_gpu in (("On a GPU", True), ("On a CPU", False)):
        mine = [row for row in rows if bool(row.get("driver")) == is_gpu]
        parts += f"<h3>{name}</h3>{draw(mine) if mine else NOT_MEASURED}"
    return parts


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def why(row: Row) -> str:
    """The reason that a row without a value gives."""
    return str(row.get("why") or row.get("reason") or "no reason given")


def spread(row: Row) -> str:
    """The 20..80 % interval of a row, or nothing."""
    return "" if row.get("p20") is None else f"{short(row['p20'])} .. {short(row['p80'])}"


def better(row: Row) -> str:
    return {"lower": "shorter is better", "higher": "longer is better"}.get(direction(row) or "", "")


def color(provider: str) -> int:
    """Number of a provider's colour."""
    return next((i for i, names in enumerate(PALETTE) if provider in names), len(PALETTE))


def short(value: float | None) -> str:
    """A value to four digits; whole numbers in full."""
    return number(value) if value is None or isinstance(value, int) else number(float(f"{value:.4g}"))


# --- sections: rows -> HTML ---


def ladder(rows: list[Row]) -> str:
    """Bars of a step, one table per machine, case, settings and metric; one bar per provider and rung.

    Ratios to all rivals are one table. They come first: each is of one interleaved run, and times are not.
    """

    def settings(row: Row) -> str:
        return config_text({"config": {k: v for k, v in _config(row).items() if k != "rung"}})

    shown = rest = ""
    groups = grouped(rows, lambda row: (device(row), row["case"], settings(row), _metric(row)))
    for (place, case, config, metric), found in groups.items():
        items = []
        for row in found:
            rung, name, value = _config(row).get("rung"), row["provider"], row["value"]
            label = name if rung in (None, name, f"as {name}") else f"{name}, {rung}"
            if metric == RATIO:
                label = row["metric"].removeprefix("times_faster_than_").replace("_", " ")
            cells = ("not measured: " + why(row),) if value is None else (short(value), spread(row))
            items.append(Bar(label, value, cells, color(name)))
        unit = found[0].get("unit") or ""
        what = metric.replace("_", " ") + f" ({unit})" * (unit not in ("", metric) and metric != RATIO)
        caption = "; ".join(filter(None, (f"{case} step", what, config, place, better(found[0]))))
        text = bars(("", "median", "20 .. 80 %"), items, caption=caption)
        if metric == RATIO or (metric == "images_per_second" and found[0].get("driver")):
            shown += text
        else:
            rest += text
    return shown + (f"<details><summary>other metrics of the same steps</summary>{rest}</details>" if rest else "")


def _metric(row: Row) -> str:
    return RATIO if row["metric"].startswith("times_faster_than_") else row["metric"]


def _config(row: Row) -> dict[str, Any]:
    config = row.get("config")
    return config if isinstance(config, dict) else {}


def pruning(rows: list[Row]) -> str:
    """The plane of MAC ratio against latency ratio, one per machine; rows as benchmarks.speed.unet writes them."""
    parts = ""
    for place, found in grouped(rows, device).items():
        points: list[Point] = []
        lines: list[tuple[str, ...]] = []
        looks: dict[str, tuple[int, int]] = {}
        batches: dict[int, int] = {}
        realised = {_unet(row): row for row in found if row["metric"] == "realised_speedup"}
        times = {_unet(row): row for row in found if row["metric"] == "ms"}
        for name, row in times.items():
            structure, *rest = name
            dense, gain = times.get(("dense", *rest)), realised.get(name)
            series = f"{row['provider']}, batch {need(row, 'batch')}"
            batches.setdefault(need(row, "batch"), len(batches))
            looks[series] = (color(row["provider"]), batches[need(row, "batch")])
            macs = need(row, "gmacs") / need(dense, "gmacs") if dense else None
            share = row["value"] / dense["value"] if dense and dense["value"] and row["value"] else None
            shares = ["" if x is None else f"{x:.3f}" for x in (macs, share)]
            if row["value"] is None:
                lines.append((str(structure), series, shares[0], "not measured: " + why(row)))
            else:
                worth = (short(gain["value"]), spread(gain)) if gain and gain["value"] is not None else ("", "")
                lines.append((str(structure), series, shares[0], short(row["value"]), shares[1], *worth))
            if macs is not None and share is not None and structure != "dense":
                title = f"{structure}, {series}: MACs {macs:.3f}, time {share:.3f}"
                points.append(Point(macs, share, series, title))
        alt = f"Share of the dense time against share of the dense MACs on {place}; the numbers are in the table below."
        parts += f"<p class=soft>{escape(place)}</p>"
        if points:
            seen = {name: look for name, look in looks.items() if any(p.series == name for p in points)}
            parts += plane(
                points, seen, "MACs, share of dense", "time, share of dense", "every MAC saved is time saved", alt
            )
        head = ("structure", "provider", "MACs", "ms", "time", "realised", "20 .. 80 %")
        note = "MACs and time are shares of the dense UNet's; realised: speedup over the speedup that the MACs promise"
        parts += table(head, lines, (2, 3, 4, 5, 6), note)
    return parts


def _unet(row: Row) -> tuple[Any, ...]:
    """Structure, and what a row shares with that of the dense UNet."""
    return (*(need(row, name) for name in ("structure", "model", "batch", "latent")), row["provider"], row.get("dtype"))


def kernels(rows: list[Row]) -> str:
    """Share of the roofline per op and provider, then every case against its ceiling."""
    parts = ""
    for (place, dtype), found in grouped(rows, lambda row: (device(row), row.get("dtype"))).items():
        copy, product = need(found[0], "copy_gb_per_s"), need(found[0], "matmul_tflop_per_s")
        timed = [row for row in found if row["value"] is not None]
        names = sorted({row["provider"] for row in timed}, key=lambda p: (color(p), p))
        series = {name: (color(name), i) for i, name in enumerate(names)}
        lines = [
            (
                op,
                [
                    Point(need(r, "roofline"), 0.0, r["provider"], f"{r['case']}: {need(r, 'roofline'):.0%}")
                    for r in mine
                ],
            )
            for op, mine in grouped(timed, lambda row: need(row, "op")).items()
        ]
        alt = (
            f"Share of the measured roofline for each op and provider on {place}; the numbers are in the tables below."
        )
        ceilings = f"{place}, {dtype}; ceilings measured there: copy {copy:,.0f} GB/s, matmul {product:,.2f} TFLOP/s"
        parts += f"<p class=soft>{escape(ceilings + _datasheet(place))}</p>"
        if lines:
            parts += strips(lines, series, "of the roofline; each mark is a case", alt)
        for op, mine in grouped(found, lambda row: need(row, "op")).items():
            parts += (
                f"<details><summary>{escape(op)}: {len(mine)} rows</summary>{_cases(mine, copy, product)}</details>"
            )
    return parts


def _cases(rows: list[Row], copy: float, product: float) -> str:
    items = []
    for row in rows:
        label = f"{row['case']}, {row['provider']}"
        if row["value"] is None:
            items.append(Bar(label, None, ("not measured: " + why(row),)))
            continue
        flops, rate = need(row, "tflop_per_s"), need(row, "gb_per_s")
        bound = flops / product > rate / copy
        cell = f"{flops:,.2f} TFLOP/s" if bound else f"{rate:,.1f} GB/s"
        items.append(
            Bar(label, need(row, "roofline"), (f"{short(row['value'])} {row['unit']}", cell, f"{row['roofline']:.0%}"),
                color(row["provider"]))
        )  # fmt: skip
    return bars(("case", "median", "rate", "of the roofline"), items, limit=1.0)


def _datasheet(place: str) -> str:
    """What the data sheet of a known card says."""
    card = next((card for name, card in CARDS.items() if name in place), None)
    return "" if card is None else f"; data sheet: {card.bytes_per_s / 1e9:,.0f} GB/s, {card.flops / 1e12:,.0f} TFLOP/s"


def launches(rows: list[Row]) -> str:
    """Launches per step, one line per case, one column per kind."""
    kinds = list(dict.fromkeys(str(need(row, "kind")) for row in rows))
    lines = [
        (case, place, *(short(values.get(kind, 0)) for kind in kinds))
        for (case, place), mine in grouped(rows, lambda row: (row["case"], row["device"])).items()
        for values in [{need(row, "kind"): row["value"] for row in mine}]
    ]
    caption = "Ops that reach a device in one step, before CUDA graphs and torch.compile (python -m benchmarks.counts.launches)"
    return table(("step", "counted on", *kinds), lines, range(2, len(kinds) + 2), caption)


def projections(rows: list[Row]) -> str:
    """Hatched bars, one table per device and metric, the first one open."""
    parts = ""
    for (place, metric), found in grouped(rows, lambda row: (row["device"], row["metric"])).items():
        first = found[0]
        common = {k: v for k, v in _config(first).items() if all(_config(row).get(k) == v for row in found)}
        items = []
        for row in found:
            label = ", ".join(filter(None, (row["case"], _config(row).get("structure"), row["provider"])))
            more = (row.get("images_per_second"), row.get("mfu"))
            cells = (short(row["value"]), short(more[0]) if more[0] else "", f"{more[1]:.0%}" if more[1] else "")
            items.append(Bar(label, row["value"], cells, color(row["provider"]), hatched=True))
        unit = first.get("unit") or metric
        rates = "".join(f", {name} {short(rate)}" for name, rate in (first.get("rates") or {}).items())
        caption = "; ".join(
            filter(None, (f"projection in {unit}{rates}", config_text({"config": common}), better(first)))
        )
        parts += f"<details{' open' * (not parts)}><summary>{escape(place)}: {len(found)} projections</summary>"
        parts += bars(("", unit, "img/s", "MFU"), items, caption=caption) + "</details>"
    formulas = sorted({row["formula"] for row in rows if row.get("formula")})
    return parts + "".join(f"<p class=soft>formula: <code>{escape(formula)}</code></p>" for formula in formulas)


def validation(rows: list[Row]) -> str:
    """How far projections were from what was measured on the same machine."""
    lines = [
        (device(row), row["case"], short(need(row, "predicted")), short(row["value"]), spread(row),
         f"{need(row, 'predicted') / row['value'] - 1:+.0%}")
        for row in rows if row["value"]
    ]  # fmt: skip
    head = ("machine", "step", "projected, ms", "measured, ms", "20 .. 80 %", "error")
    return "<h3>How good is the model?</h3>" + (table(head, lines, (2, 3, 4, 5)) if lines else NOT_MEASURED)


def suites(rows: list[Row]) -> str:
    """Where every row comes from."""
    lines = []
    for (suite, file, place, threads, torch, commit, date), mine in grouped(
        rows,
        lambda row: tuple(row.get(name) for name in ("suite", "file", "device", "threads", "torch", "commit", "date")),
    ).items():
        driver = mine[0].get("driver")
        versions = [f"torch {torch}"] * bool(torch) + [f"driver {driver}"] * bool(driver)
        machine = ", ".join([place or "none: computed, not timed", *[f"{threads} threads"] * bool(threads), *versions])
        command = mine[0].get("command") or COMMANDS.get(suite, f"python -m benchmarks.{suite}")
        command += " --device cuda" * (bool(driver) and suite not in COMMANDS)
        kind = "projection" if is_projection(mine[0]) else ""
        lines.append(
            (suite + f" ({kind})" * bool(kind), file, str(len(mine)), machine, command, commit or "-", date or "-")
        )
    head = ("suite", "file", "rows", "machine", "command", "commit", "date")
    return table(head, sorted(lines), (2,)) if lines else NOT_MEASURED


def code(text: str) -> str:
    """Text whose `names` are set as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def page(rows: list[Row]) -> str:
    """The whole page, HTML.

    Raises:
        UserError: A row lacks what its section draws; names file and line.
    """
    step, unet, ops, steps, model = (of(rows, name) for name in ("step", "unet", "kernels", "launches", "roofline"))
    measured = [[row for row in found if not is_projection(row)] for found in (step, unet, ops)]
    model += [row for found in (step, unet, ops) for row in found if is_projection(row)]
    sections = {
        "A training step": (
            "One lower or upper step, technique by technique: `released` is the step as the authors' trainer computes "
            "it, `ours` this engine's. The released upper step takes no penalty and so does half of the work.",
            places(measured[0], ladder),
        ),
        "What pruning brings": (
            "Time against MACs, both as shares of the dense UNet. On the dashed line every MAC saved is time saved.",
            places(measured[1], pruning),
        ),
        "Kernels against their roofline": (
            "The roofline of a case is the larger of its bytes over the copy rate and its FLOPs over the matmul rate "
            "of the same machine. More than 100 % comes from data that is in a cache.",
            places(measured[2], kernels),
        ),
        "Launches per step": ("", launches(steps) if steps else NOT_MEASURED),
        "Projections": (
            "Numbers of a model, none of them measured. Hatched, so that nobody takes them for measurements.",
            (projections(model) if model else NOT_MEASURED) + validation(of(rows, "roofline_validation")),
        ),
        "Every row": ("Machine, command, commit and date of all rows on this page and beside it.", suites(rows)),
    }
    body = "".join(
        f'<section id="s{i}"><h2>{escape(title)}</h2>{f"<p>{code(intro)}</p>" if intro else ""}{content}</section>'
        for i, (title, (intro, content)) in enumerate(sections.items())
    )
    return (
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
        f'<link rel=icon href="data:,"><title>bilevel_fast: speed</title><style>{STYLE}</style></head><body>'
        "<h1>bilevel_fast: speed</h1>"
        f"<p class=soft>{len(rows):,} committed rows, drawn by <code>python -m benchmarks.report</code>.</p>"
        f"<main>{body}</main></body></html>\n"
    )


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.report", __doc__)
    write_atomic(settings.out, page(load(settings.results)).encode())
    print(settings.out)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
