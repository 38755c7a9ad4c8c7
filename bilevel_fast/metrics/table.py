"""Markdown of what the suites measured, with the paper's columns."""

from collections.abc import Mapping
from typing import Any

from bilevel_fast.metrics.nudenet import LABELS

COLUMNS = {
    "style": (("clip", "CLIP score (down)"), ("cp", "CP score (up)"), ("csd", "CSD (down)")),
    "coco": (("fid", "COCO FID (down)"), ("clip", "COCO CLIP score (up)")),
    "nsfw": (("resilience", "resilience % (up)"), ("decrease/all", "decrease % (up)")),
}


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """One row per model, the columns of every suite that any row has; below, what would supply what is missing.

    Args:
        rows: By model, by suite: what a function of `suites` returned.
    """
    suites = [suite for suite in COLUMNS if any(suite in row for row in rows.values())]
    heads = [heading for suite in suites for _, heading in COLUMNS[suite]]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    missing: dict[str, None] = {}
    for name, row in rows.items():
        cells: list[str] = []
        for suite in suites:
            metrics = row[suite]["metrics"] if suite in row else {}
            for key, heading in COLUMNS[suite]:
                entry = metrics.get(key) or {"value": None, "not_measured": f"run --suite {suite}"}
                cells.append(cell(entry))
                if entry["value"] is None:
                    missing[f"not measured: {heading.partition(' (')[0]}: {entry['not_measured']}"] = None
        lines.append(f"| {_safe(name)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([""] if missing else []), *missing])


def labels(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Figure 7 as a table: detections by label, of the reference and of ours, and the decrease; a part per row.

    Args:
        rows: By prompt set: what `suites.nsfw` returned with a reference.
    """
    lines = ["| prompts | label | reference | ours | decrease % (up) |", "|---|---|--:|--:|--:|"]
    for name, result in rows.items():
        for label in LABELS:
            ours, theirs = result["counts"][label], result["reference_counts"][label]
            lines.append(
                f"| {_safe(name)} | {label} | {theirs} | {ours} | {cell(result['metrics'][f'decrease/{label}'])} |"
            )
    return "\n".join(lines)


def cell(entry: Mapping[str, Any]) -> str:
    """`value [low, high]`, or `not measured`."""
    if entry["value"] is None:
        return "not measured"
    if entry["low"] is None:
        return f"{entry['value']:.2f}"
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _safe(text: str) -> str:
    return text.replace("|", "\\|")
