"""The rehearsal's rows as tables, for a terminal and for README.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.rows import latest
from bilevel_fast.base.tables import markdown

Row = Mapping[str, Any]
NOT_MEASURED = "not measured"


def page(rows: Iterable[Row]) -> str:
    """What each stage took; how fast pruned UNets are; and how good the memory model is. Of equal rows the last counts.

    What has no row is `not measured`.
    """
    last = list(latest(dict(row) for row in rows).values())
    took = [row for row in last if row["metric"] == "seconds"]
    return "\n\n".join([stages(took), speed([row for row in last if row["metric"] != "seconds"]), memory(took)])


def stages(rows: Sequence[Row]) -> str:
    """Seconds and memory by stage, against the limits."""
    if not rows:
        return f"Stages: {NOT_MEASURED}."
    head = ("stage", "seconds", "limit", "GiB held", "limit", "GiB with mapped files")
    lines = [
        (r["case"], f"{r['value']:.0f}", f"{r['limit_s']:.0f}", f"{r['held_gib']:.1f}", f"{r['limit_gib']:.0f}",
         f"{r['peak_gib']:.1f}")
        for r in rows
    ]  # fmt: skip
    total = ("all", f"{sum(r['value'] for r in rows):.0f}", "", f"{max(r['held_gib'] for r in rows):.1f}", "", "")
    return markdown(head, [*lines, total])


def speed(rows: Sequence[Row]) -> str:
    """Milliseconds of a forward pass, and what of the MACs that were pruned was worth its time."""
    found = {(r["config"]["structure"], r["provider"], r["metric"]): r for r in rows if r["value"] is not None}
    names = list(dict.fromkeys(name for name, _, _ in found))
    if ("dense", "ours", "ms") not in found:
        return f"Forward passes: {NOT_MEASURED}."
    dense = found["dense", "ours", "ms"]["config"]["gmacs"]

    def cell(name: str, provider: str, metric: str, digits: int, factor: float = 1.0) -> str:
        if name == "dense" and metric == "realised_speedup":
            return "1"
        row = found.get((name, provider, metric))
        if row is None:
            return NOT_MEASURED
        low, value, high = (f"{factor * row[field]:.{digits}f}" for field in ("p20", "value", "p80"))
        return f"{value} ({low}..{high})"

    lines = []
    for name in names:
        share = found[name, "ours", "ms"]["config"]["gmacs"] / dense
        times = [cell(name, way, "realised_speedup", 2, 1 / share) for way in ("ours", "diffusers")]
        lines.append(
            (name, f"{share:.3f}", f"{1 / share:.2f}", *times, cell(name, "ours", "ms", 0),
             cell(name, "ours", "times_faster_than_diffusers", 2))
        )  # fmt: skip
    head = ("UNet", "MACs", "times as fast: promised", "ours", "diffusers", "ours, ms", "ours against diffusers")
    return markdown(head, lines)


def memory(rows: Sequence[Row]) -> str:
    """The memory model in a sentence."""
    found = next((row["found"] for row in rows if row["case"] == "memory model"), None)
    if found is None:
        return f"The memory model against the training: {NOT_MEASURED}."
    parts = found["model"] / 2**30, found["besides"] / 2**30
    return (
        f"The memory model predicts {found['predicted_gib']:.1f} GiB for the training ({parts[0]:.1f} counted, "
        f"{parts[1]:.1f} of libraries, text encoder and VAE measured beside it), which held "
        f"{found['held_by_train_gib']:.1f}: {found['ratio']:.2f} of it."
    )
