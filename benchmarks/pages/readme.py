"""The tables of README.md, made from the committed rows: nobody copies a number by hand.

    python -m benchmarks.pages.readme             renews what lies between the markers
    python -m benchmarks.pages.readme --check     exits with 1 if README.md says something else

A table lies between `<!-- NAME: python -m benchmarks.pages.readme -->` and `<!-- /NAME -->`.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.pages import reproduced
from benchmarks.quality import precision, tables
from benchmarks.real_size import table as rehearsal
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError

PEERS = ("released", "released_no_anomaly_mode", "eager", "ours_engine", "ours_recompute")
SAYS = {
    "released": "diffusers, as released: fp32, hooks, anomaly mode",
    "released_no_anomaly_mode": "the same without anomaly mode",
    "eager": "diffusers, as a careful user runs it today",
    "ours_engine": "ours on torch's ops alone",
    "ours_recompute": "ours, recomputing activations",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the page."""

    check: bool = False
    """Write nothing; fail if README.md is not what the rows say."""


def load(name: str) -> list[Row]:
    """The rows of a committed file; none if there is no such file."""
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def headline() -> str:
    """The one number."""
    rows = load("train_cpu.jsonl")
    if not rows:
        return "not measured"
    row = rows[-1]
    quality, ratio = row["summary"]["quality"], row["summary"]["macs"]["ratio"]
    student = quality["student"]
    return (
        f"**{ratio:.2f} of the MACs, the erased style drawn on {student['concept_hit']:.0%} of its prompts instead of "
        f"{quality['teacher']['concept_hit']:.0%}, every other style still on {student['other_style_hit']:.0%}: mini "
        f"world, seed 0, {row['value']:.0f} s and {row['peak_gib']:.2f} GiB, {row['device']}, commit {row['commit']} "
        f"(`python -m benchmarks.speed.train`: the run of `make train`, with a clock).**"
    )


def quality() -> str:
    """What the run came to."""
    rows = load("train_cpu.jsonl")
    if not rows:
        return "not measured"
    found = rows[-1]["summary"]["quality"]
    lines = ["| | " + " | ".join(tables.QUALITY) + " |", "|---|" + "--:|" * len(tables.QUALITY)]
    for name, values in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{values[m]:.3f}" for m in tables.QUALITY) + " |")
    return "\n".join(lines)


def kernels() -> str:
    """Native code against torch, the range over the cases of each op."""
    rows = [row for row in load("kernels_cpu.jsonl") if row["value"] is not None]
    if not rows:
        return "not measured"
    times: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        times.setdefault(row["op"], {}).setdefault(row["case"], {})[row["provider"]] = row["value"]
    lines = ["| native, times as fast as torch | least | most |", "|---|--:|--:|"]
    for op, cases in times.items():
        ratios = {case: by["torch"] / by["native"] for case, by in cases.items() if {"torch", "native"} <= set(by)}
        least, most = min(ratios, key=lambda c: ratios[c]), max(ratios, key=lambda c: ratios[c])
        lines.append(f"| {op} | {ratios[least]:.1f} ({least}) | {ratios[most]:.1f} ({most}) |")
    return "\n".join([*lines, "", machines(rows)])


def methods() -> str:
    """Pruning methods, before and after distillation."""
    rows = load("methods.jsonl")
    return tables.methods(rows) if rows else "not measured"


def aptp() -> str:
    """Mixtures of experts: what they cost, where prompts go, what they are worth untuned."""
    rows = load("aptp.jsonl")
    if not rows:
        return "not measured"
    methods = list(rows[-1]["errors"])
    heads = ("budget", "training", "experts' MACs", "prompts", "style / object / color", *methods)
    lines = ["| " + " | ".join(heads) + " |", "|---|--:|---|---|---|" + "--:|" * len(methods)]
    for row in rows:
        experts, told = (
            row["experts"],
            " / ".join(f"{row['told_by'][name]:.2f}" for name in ("style", "object", "color")),
        )
        macs = ", ".join(f"{expert['macs']:.4f}" for expert in experts)
        prompts = ", ".join(str(expert["prompts"]) for expert in experts)
        cells = [row["case"], f"{row['seconds']:.0f} s", macs, prompts, told]
        lines.append("| " + " | ".join([*cells, *(f"{row['errors'][m]:.3f}" for m in methods)]) + " |")
    return "\n".join([*lines, "", machines(rows)])


def step() -> str:
    """Ours against every peer on the CPU."""
    rows = [row for row in load("step_cpu.jsonl") if row["metric"].startswith("times_faster_than_")]
    if not rows:
        return "not measured"
    found = {(row["metric"].removeprefix("times_faster_than_"), row["case"]): row for row in rows}
    lines = ["| ours, times as fast as | lower step | upper step |", "|---|--:|--:|"]
    for peer in PEERS:
        cells = [found.get((peer, case)) for case in ("lower", "upper")]
        shown = ["not measured" if r is None else f"{r['value']:.2f} ({r['p20']:.2f}..{r['p80']:.2f})" for r in cells]
        lines.append(f"| {SAYS[peer]} | {' | '.join(shown)} |")
    config = rows[0]["config"]
    note = (
        f"{config['structure']} of the MACs, mini world's UNets, fp32, batch {config['batch']}; in brackets 20..80 %."
    )
    return "\n".join([*lines, "", note, machines(rows)])


def data() -> str:
    """Images per second into training."""
    rows = [row for row in load("data.jsonl") if row["metric"] in ("img_per_s", "ratio")]
    if not rows:
        return "not measured"
    lines = ["| images per second | 20 .. 80 % |", "|---|--:|"]
    for row in rows:
        shown = 2 if row["metric"] == "ratio" else 0
        value, low, high = (f"{row[key]:.{shown}f}" for key in ("value", "p20", "p80"))
        lines.append(f"| {row['provider']}, {row['case']} | {value} ({low}..{high}) |")
    return "\n".join([*lines, "", machines(rows)])


def gpu() -> str:
    """The goals of the step on a GPU."""
    rows = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in load(path.name)]
    rows = [r for r in rows if r.get("suite") == "step" and r.get("driver") and r["value"] is not None]
    rows = [r for r in rows if r["config"]["unet"] == "sd21" and r["provider"] == "ours"]
    if not rows:
        return "not measured"
    lines = ["| " + " | ".join(("card", "step", "metric", "value")) + " |", "|---|---|---|--:|"]
    for r in rows:
        config = f"{r['case']}, {r['config']['structure']}, batch {r['config']['batch']}, {r['config']['rung']}"
        lines.append(f"| {r['device']} | {config} | {r['metric'].replace('_', ' ')} | {r['value']:.4g} {r['unit']} |")
    return "\n".join([*lines, "", machines(rows)])


def projections() -> str:
    """What a step takes at least, by card."""
    rows = [r for r in load("roofline.jsonl") if r["config"]["structure"] in ("0.80", "0.55")]
    if not rows:
        return "not projected"
    cases = [("0.80", "lower"), ("0.80", "upper"), ("0.80", "upper without penalty"), ("0.55", "lower")]
    found = {(r["device"], r["config"]["structure"], r["case"], r["provider"]): r["value"] for r in rows}
    heads = [f"{case}, {name}" for name, case in cases]
    lines = ["| projection, ms | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(cases)]
    for device in dict.fromkeys(r["device"] for r in rows):
        cells = [[found[device, name, case, p] for p in ("products", "triton")] for name, case in cases]
        lines.append(f"| {device} | " + " | ".join(f"{low:.0f}..{high:.0f}" for low, high in cells) + " |")
    return "\n".join(lines)


def memory() -> str:
    """The largest batch by card."""
    rows = [r for r in load("memory.jsonl") if r["unit"] == "images"]
    if not rows:
        return "not projected"
    sizes = list(dict.fromkeys(r["device"] for r in rows))
    found = {(r["case"], r["device"]): r["value"] for r in rows}
    lines = ["| projection, images | " + " | ".join(sizes) + " |", "|---|" + "--:|" * len(sizes)]
    cases = dict.fromkeys(r["case"] for r in rows)
    shown = [f"| {case} | " + " | ".join(f"{found[case, size] or '-'}" for size in sizes) + " |" for case in cases]
    return "\n".join([*lines, *shown])


def controller() -> str:
    """The controller against a sweep: the cases that were run on every seed; `controller report` shows the rest."""
    rows = load("controller.jsonl")
    seeds = {row["seed"] for row in rows}
    cases = {row["case"]: {other["seed"] for other in rows if other["case"] == row["case"]} for row in rows}
    return tables.controller([row for row in rows if cases[row["case"]] == seeds])


def bf16() -> str:
    """bf16 against fp32, in a sentence or two."""
    rows = load("precision.jsonl")
    cosines = [row for row in rows if row["metric"] == "cosine"]
    if not cosines:
        return "not measured"
    least = min(cosines, key=lambda row: row["value"])
    text = (
        f"The least cosine between a gradient in bf16 and in fp32, over both levels and all classes of parameters, is "
        f"{least['value']:.5f} (`{least['case'].removeprefix('gradient ')}`; wanted {precision.COSINE})."
    )
    judged = [row for row in rows if row["case"].startswith("quality")]
    if not judged:
        return f"{text} What {precision.STEPS} steps lead to: not measured.\n{machines(cosines)}"
    seeds = sorted({row["case"].split()[-1] for row in judged})
    lines = [text, "", f"| {judged[0]['steps']} lower steps | seed | " + " | ".join(tables.QUALITY) + " |"]
    lines.append("|---|--:|" + "--:|" * len(tables.QUALITY))
    found = {(row["case"], row["metric"]): row["value"] for row in judged}
    for seed in seeds:
        for name in precision.PRECISIONS:
            cells = [f"{found[f'quality {name} seed {seed}', metric]:.3f}" for metric in tables.QUALITY]
            lines.append(f"| {name} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", machines(rows)])


def real_size() -> str:
    """Every command at the size of Stable Diffusion 2.1."""
    rows = load("real_size.jsonl")
    return f"{rehearsal.page(rows)}\n\n{machines(rows)}" if rows else "not measured"


def machines(rows: Iterable[Row]) -> str:
    found = {
        f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] != 1)}, torch {r['torch']}, commit {r['commit']}, "
        f"{r['date']}"
        for r in rows
    }
    return f"Measured on {'; '.join(sorted(found))}."


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "quality": quality,
    "frontier": lambda: tables.frontier(load("frontier.jsonl")),
    "methods": methods,
    "aptp": aptp,
    "step": step,
    "kernels": kernels,
    "data": data,
    "gpu": gpu,
    "projections": projections,
    "memory": memory,
    "bf16": bf16,
    "controller": controller,
    "table1": lambda: reproduced.markdown("table1", RESULTS / "reproduce"),
    "table2": lambda: reproduced.markdown("table2", RESULTS / "reproduce"),
    "real_size": real_size,
    "fig6": lambda: reproduced.markdown("fig6", RESULTS / "reproduce"),
}


def renew(text: str) -> str:
    """README.md with its tables made anew.

    Raises:
        UserError: A marker is missing, or names no table.
    """
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        body = table().replace("\\", r"\\")
        text, count = re.subn(pattern, rf"\g<1>{body}\n\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise UserError(
                f"README.md: {count} places for the table {name!r}, wanted one, between <!-- {name}: ... -->"
            )
    return text


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.readme", __doc__)
    page = ROOT / "README.md"
    old = page.read_text(encoding="utf-8")
    new = renew(old)
    if settings.check and new != old:
        raise SystemExit("README.md is not what the committed rows say: run python -m benchmarks.pages.readme")
    if not settings.check:
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
