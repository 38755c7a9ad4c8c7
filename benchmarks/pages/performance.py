"""The tables of docs/performance.md and docs/quick-start-sd21.md: speed, counts, memory."""

from benchmarks.pages import committed
from benchmarks.pages.committed import NOT_MEASURED, Row, load, machines, within
from benchmarks.real_size import table as rehearsal
from benchmarks.rows import latest
from bilevel_fast.base.tables import markdown

PEERS = {
    "released": "diffusers, as released: fp32, hooks, anomaly mode",
    "released_no_anomaly_mode": "the same without anomaly mode",
    "eager": "diffusers, as a careful user runs it today",
    "ours_engine": "ours on torch's ops alone",
    "ours_recompute": "ours, recomputing activations",
}
"""Of benchmarks/speed/peers.py."""


def ratios() -> dict[tuple[str, str], Row]:
    """Rows of `benchmarks.speed.step` on the CPU, by peer and step: how many times as fast as the peer we are."""
    rows = [row for row in load("step_cpu.jsonl") if row["metric"].startswith("times_faster_than_")]
    return {(row["metric"].removeprefix("times_faster_than_"), row["case"]): row for row in rows}


def step() -> str:
    """Ours against every peer on the CPU."""
    found = ratios()
    if not found:
        return NOT_MEASURED
    lines = []
    for peer, says in PEERS.items():
        cells = [found.get((peer, case)) for case in ("lower", "upper")]
        lines.append((says, *(NOT_MEASURED if row is None else within(row) for row in cells)))
    config = next(iter(found.values()))["config"]
    note = f"{config['structure']} of the MACs, mini world's UNets, fp32, batch {config['batch']}; ranges are 20..80 %."
    head = ("ours, times as fast as", "lower step", "upper step")
    return f"{markdown(head, lines)}\n\n{note}\n{machines(found.values())}"


def counts() -> str:
    """What no clock measures: MACs, parameters, launches."""
    rows = [row for row in load("baseline.jsonl") if row["suite"] in ("macs", "launches")]
    if not rows:
        return "not counted"
    found = {(row["case"], row["metric"]): row["value"] for row in rows if row["config"].get("kind", "all") == "all"}
    lines = []
    for name in ("dense", "0.80", "0.55"):
        model = f"sd21 {name}"
        launches = [found.get((f"{model} {level}", "launches")) for level in ("lower", "upper")]
        lines.append(
            (
                name,
                *(f"{found[model, metric] / 1e9:.3f}" for metric in ("macs", "official_macs")),
                f"{found[model, 'params']:,}",
                *("not counted" if number is None else f"{number:,}" for number in launches),
            )
        )
    head = ("UNet of SD 2.1", "GMAC", "GMAC by the authors' counter", "parameters")
    return markdown((*head, "launches, lower step", "launches, upper step"), lines)


def kernels() -> str:
    """Native code against torch, the range over the cases of each op."""
    rows = [row for row in load("kernels_cpu.jsonl") if row["value"] is not None]
    if not rows:
        return NOT_MEASURED
    times: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        times.setdefault(row["op"], {}).setdefault(row["case"], {})[row["provider"]] = row["value"]
    lines = ["| native, times as fast as torch | least | most |", "|---|--:|--:|"]
    for op, cases in times.items():
        ratios = {case: by["torch"] / by["native"] for case, by in cases.items() if {"torch", "native"} <= set(by)}
        least, most = min(ratios, key=lambda c: ratios[c]), max(ratios, key=lambda c: ratios[c])
        lines.append(f"| {op} | {ratios[least]:.1f} ({least}) | {ratios[most]:.1f} ({most}) |")
    return "\n".join([*lines, "", machines(rows)])


def data() -> str:
    """Images per second into training."""
    rows = [row for row in load("data.jsonl") if row["metric"] in ("img_per_s", "ratio")]
    if not rows:
        return NOT_MEASURED
    lines = ["| images per second | 20 .. 80 % |", "|---|--:|"]
    for row in rows:
        shown = 2 if row["metric"] == "ratio" else 0
        value, low, high = (f"{row[key]:.{shown}f}" for key in ("value", "p20", "p80"))
        lines.append(f"| {row['provider']}, {row['case']} | {value} ({low}..{high}) |")
    return "\n".join([*lines, "", machines(rows)])


def gpu() -> str:
    """The goals of the step on a GPU."""
    rows = [row for path in sorted(committed.RESULTS.glob("*.jsonl")) for row in load(path.name)]
    rows = [r for r in rows if r.get("suite") == "step" and r.get("driver") and r["value"] is not None]
    rows = [r for r in rows if r["config"]["unet"] == "sd21" and r["provider"] == "ours"]
    if not rows:
        return NOT_MEASURED
    lines = ["| " + " | ".join(("card", "step", "metric", "value")) + " |", "|---|---|---|--:|"]
    for r in rows:
        config = f"{r['case']}, {r['config']['structure']}, batch {r['config']['batch']}, {r['config']['rung']}"
        lines.append(f"| {r['device']} | {config} | {r['metric'].replace('_', ' ')} | {r['value']:.4g} {r['unit']} |")
    return "\n".join([*lines, "", machines(rows)])


def traffic() -> str:
    """What a step launches, and what its ops read and write: through torch's own ops, and through Triton's."""
    shown = [(name, case) for name in ("0.80", "dense") for case in ("lower", "upper", "upper without penalty")]
    rows = {(r["config"]["structure"], r["case"], r["provider"]): r for r in load("roofline.jsonl")}
    if not {(*of, provider) for of in shown for provider in ("torch", "triton")} <= rows.keys():
        return "not counted"
    lines = []
    for name, case in shown:
        ours, torchs = rows[name, case, "triton"], rows[name, case, "torch"]
        cells = [f"{row['launches']:,} / {row['gb']:.1f}" for row in (torchs, ours)]
        ratios = [f"{ours[key] / torchs[key]:.2f}" for key in ("launches", "gb")]
        lines.append([f"{case}, {name}", *cells, " / ".join(ratios)])
    return markdown(["a step of SD 2.1, launches / GB", "torch's ops", "Triton's", "ratios"], lines)


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


def real_size() -> str:
    """What every command took at the size of Stable Diffusion 2.1."""
    rows = [row for row in latest(load("real_size.jsonl")).values() if row["metric"] == "seconds"]
    return f"{rehearsal.stages(rows)}\n\n{rehearsal.memory(rows)}\n\n{machines(rows)}" if rows else NOT_MEASURED


def forward() -> str:
    """Forward passes of pruned UNets at the size of Stable Diffusion 2.1."""
    rows = [row for row in latest(load("real_size.jsonl")).values() if row["metric"] != "seconds"]
    return f"{rehearsal.speed(rows)}\n\n{machines(rows)}" if rows else NOT_MEASURED


TABLES = {
    "counts": counts,
    "step": step,
    "forward": forward,
    "kernels": kernels,
    "data": data,
    "gpu": gpu,
    "traffic": traffic,
    "projections": projections,
    "memory": memory,
}
