"""Table and scatter plot of the frontier: mean over seeds, spread as (max - min) / 2."""

from collections import defaultdict
from math import log
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

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for axis, metric in zip(axes, ("content_kept", "fid"), strict=True):
        labels: dict[tuple[int, int], list[str]] = {}
        places: dict[tuple[int, int], tuple[float, float]] = {}
        for name, found in by_case(rows).items():
            color, marker = _look(name)
            x, y = [r["concept_hit"] for r in found], [r[metric] for r in found]
            axis.scatter(x, y, color=color, marker=marker, alpha=0.3, s=28, linewidths=0)
            axis.scatter(mean(x), mean(y), color=color, marker=marker, s=70)
            # variants that lie on top of each other share one label
            near = round(mean(x) * 8), round(mean(y) * 12 if metric == "content_kept" else 0.8 * log(mean(y)))
            labels.setdefault(near, []).append(name.removeprefix("bilevel "))
            places.setdefault(near, (mean(x), mean(y)))
        for near, names in labels.items():
            left = places[near][0] > 0.5
            axis.annotate(
                "\n".join(names),
                places[near],
                xytext=(-10 if left else 10, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=8,
            )
    axes[0].set(title="better: upper left", ylabel="content kept on the erased prompts", ylim=(0.55, 1.1))
    axes[1].set(title="better: lower left", ylabel="FID on all other prompts", yscale="log", ylim=(1.2, 500))
    for axis in axes:
        axis.set(xlabel="concept hit on the erased prompts", xlim=(-0.08, 1.08))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _look(name: str) -> tuple[str, str]:
    """Color and marker of a variant."""
    known = {"teacher": ("k", "*"), "distilled": ("0.4", "s"), "two-stage": ("tab:red", "X")}
    return known.get(name.split()[0], ("tab:blue" if " phrase " in name else "tab:orange", "o"))
