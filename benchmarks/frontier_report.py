"""Table and scatter plot of the frontier: mean over seeds, spread as (max - min) / 2."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

METRICS = ("concept_hit", "content_kept", "other_style_hit", "object", "color", "fid")


def by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each variant, in the order in which they were measured; the baselines first."""
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name in ("teacher", "distilled"):
        cases[name] = []
    for row in rows:
        cases[row["case"]].append(row)
    return {name: found for name, found in cases.items() if found}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"| seeds {', '.join(map(str, seeds))} | " + " | ".join(METRICS) + " |",
        "|---|" + "--:|" * len(METRICS),
    ]
    for name, found in by_case(rows).items():
        cells = []
        for metric in METRICS:
            values = [row[metric] for row in found]
            digits = 2
            cells.append(f"{mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}")
        note = "" if len(found) == len(seeds) else f" ({len(found)} of {len(seeds)} seeds)"
        lines.append(f"| {name}{note} | " + " | ".join(cells) + " |")
    machines = {f"{row['device']}, torch {row['torch']}, {row['date']}" for row in rows}
    return "\n".join([*lines, "", "Measured on " + "; ".join(sorted(machines))])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Suppression against what it costs: content of the erased prompts, and FID of all others."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    styles = {"teacher": ("k", "*"), "distilled": ("0.4", "s"), "two-stage": ("tab:red", "X")}
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for name, found in by_case(rows).items():
        kind = name.split()[0]
        color, marker = styles.get(kind, ("tab:blue" if " phrase " in name else "tab:orange", "o"))
        for axis, metric in zip(axes, ("content_kept", "fid"), strict=True):
            x, y = [r["concept_hit"] for r in found], [r[metric] for r in found]
            axis.scatter(x, y, color=color, marker=marker, alpha=0.3, s=28, linewidths=0)
            axis.scatter(mean(x), mean(y), color=color, marker=marker, s=70)
            axis.annotate(name.removeprefix("bilevel "), (mean(x), mean(y)), xytext=(6, 4), fontsize=8,
                          textcoords="offset points")  # fmt: skip
    axes[0].set(title="better: upper left", ylabel="content kept on the erased prompts")
    axes[1].set(title="better: lower left", ylabel="FID on all other prompts", yscale="log")
    for axis in axes:
        axis.set(xlabel="concept hit on the erased prompts", xlim=(-0.05, 1.15))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
