"""Table and plots of `benchmarks.quality.methods`: mean over seeds, spread as (max - min) / 2."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.methods_cases import BUDGETS, DIFFUSION, DISTILLATION, FIGURES, PLAIN, RANDOM
from bilevel_fast.worlds.mini.world import STYLES

Row = dict[str, Any]
Points = dict[int, list[float]]
"""Step -> value of each seed."""

METRICS = {"output_error": "output error", "fid": "FID"}
AXES = {
    "fid": "FID of drawings against the mini world's",
    "output_error": "squared error to the teacher's output\n(of its mean square)",
    "target_error": "squared error to the true v\n(of its mean square)",
}
FIGURE4 = {DIFFUSION: "the diffusion loss alone", DISTILLATION: "distillation alone", PLAIN: "both together"}
FIGURE5 = {RANDOM: "a start from random weights", PLAIN: "a start from pruned weights"}


def curves(rows: list[Row]) -> dict[str, dict[str, Points]]:
    """Case -> metric -> points. Of rows with one case, seed and step the last counts."""
    found: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in {(row["case"], row["seed"], row["step"]): row for row in rows}.values():
        for metric in AXES:
            if metric in row:
                found[row["case"]][metric][row["step"]].append(row[metric])
    return found


def finished(rows: list[Row]) -> list[Row]:
    """Without cases that are still under way: a mean over other seeds at every step would have kinks."""
    ends = {(row["case"], row["seed"]) for row in rows if row["step"] == row["config"]["steps"]}
    ends |= {("teacher", seed) for _, seed in ends}
    return [row for row in rows if (row["case"], row["seed"]) in ends]


def last_step(rows: list[Row]) -> int:
    """The step that the longest run was to end with."""
    return max(row["config"]["steps"] for row in rows)


def members(rows: list[Row]) -> list[str]:
    """The methods of the table, without budget, in the order in which they were measured; not the figures' variants."""
    names = [row["case"].removeprefix(f"{b:.2f} ") for b in BUDGETS for row in rows if row["case"][:5] == f"{b:.2f} "]
    names = dict.fromkeys(name for name in names if name not in (DIFFUSION, DISTILLATION, RANDOM))
    return [*names, RANDOM]


def fixed(rows: list[Row]) -> dict[str, float]:
    """Methods without a budget: share of the MACs that they leave."""
    prefixes = tuple(f"{b:.2f} " for b in BUDGETS)
    return {r["case"]: r["macs_ratio"] for r in rows if r["case"] != "teacher" and not r["case"].startswith(prefixes)}


def digits(value: float) -> int:
    """Decimals to show: a Frechet distance of 72 drawings is not known to a tenth where it is in the hundreds."""
    return 3 if value < 1.5 else 1 if value < 100 else 0


def spread(values: list[float], seeds: int) -> str:
    """Mean and, of several, half the range; says so if a seed is missing."""
    shown, note = digits(mean(values)), "" if len(values) == seeds else f" ({len(values)} of {seeds} seeds)"
    half = f" ± {(max(values) - min(values)) / 2:.{shown}f}" if len(values) > 1 else ""
    return f"{mean(values):.{shown}f}{half}{note}"


def table(rows: list[Row]) -> str:
    """Markdown: a line per method, and below it what the figures show, in words."""
    if not (rows := finished(rows)):
        return "not measured"
    found, seeds, last = curves(rows), sorted({row["seed"] for row in rows}), last_step(rows)

    def cell(case: str, metric: str) -> str:
        points = found[case][metric] if case in found else {}
        if not points.get(last):
            return "not measured"
        return f"{mean(points[0]):.{digits(mean(points[0]))}f} -> {spread(points[last], len(seeds))}"

    heads = [f"{budget:.2f}: {says}" for budget in BUDGETS for says in METRICS.values()]
    lines = [
        f"| seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; before -> after {last} steps | "
        + " | ".join(heads)
        + " |",
        "|---|" + "--:|" * len(heads),
    ]
    for name in members(rows):
        cells = [cell(f"{budget:.2f} {name}", metric) for budget in BUDGETS for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, ratio in fixed(rows).items():
        cells = [cell(name, metric) for metric in METRICS] + ["-"] * len(METRICS) * (len(BUDGETS) - 1)
        lines.append(f"| {name}, which leaves {ratio:.2f} of the MACs | {' | '.join(cells)} |")
    if teachers := found["teacher"]["fid"][0]:
        lines.append(f"| teacher, all of the MACs | 0 | {spread(teachers, len(seeds))} |" + " - |" * len(heads[2:]))
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    machines = "; ".join(sorted({f"{r['device']}, torch {r['torch']}, {r['date']}" for r in rows}))
    config = rows[-1]["config"]
    judged = f"FID of {len(STYLES) * config['judged']} drawings"
    how = f"{last} steps of {config['batch']} images at learning rate {config['lr']:g}; {judged}."
    says = [*findings(found, last), how, f"Measured on {machines}, commits {commits}."]
    return "\n".join([*lines, "", *says])


def findings(found: dict[str, dict[str, Points]], last: int) -> list[str]:
    """When the faster of two is where the slower ends, by the mean over seeds; only what was measured."""
    pairs = ((DISTILLATION, DIFFUSION, FIGURE4), (PLAIN, DIFFUSION, FIGURE4), (PLAIN, RANDOM, FIGURE5))
    lines = []
    for fast, slow, says in pairs:
        told = []
        for metric in ("target_error", "fid"):
            quick, late = (found.get(f"{FIGURES:.2f} {case}", {}).get(metric, {}) for case in (fast, slow))
            if not (quick.get(last) and late.get(last)):
                continue
            step = reached(quick, mean(late[last]))
            when = f"after {step} steps" if step is not None else f"not within {last} steps"
            told.append(f"{'error to the truth' if metric == 'target_error' else 'FID'} {when}")
        if told:
            lines.append(f"At {FIGURES:.2f}, {says[fast]} gets to where {says[slow]} ends: {', '.join(told)}.")
    return lines


def reached(points: Points, value: float) -> int | None:
    """The first measured step at which the mean is no more than `value`."""
    return next((step for step in sorted(points) if mean(points[step]) <= value), None)


def plots(rows: list[Row], out: Path) -> None:
    """methods.png, figure4.png and figure5.png; the rows hold a finished case."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    found, last = curves(rows := finished(rows)), last_step(rows)
    figure, grid = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained", sharex="col")
    for axes, budget in zip(grid, BUDGETS, strict=True):
        shown = {name: f"{budget:.2f} {name}" for name in members(rows)}
        if budget == max(BUDGETS):
            shown |= {f"{name}\n({ratio:.2f} of the MACs)": name for name, ratio in fixed(rows).items()}
        shown = {name: case for name, case in shown.items() if found.get(case, {}).get("fid", {}).get(last)}
        for axis, metric in zip(axes, ("fid", "output_error"), strict=True):
            _before_and_after(axis, [found[case][metric] for case in shown.values()], last)
            if metric == "fid" and (teachers := found["teacher"]["fid"][0]):
                axis.axvline(mean(teachers), color="k", linestyle=":", label="teacher")
            axis.set(xlabel=AXES[metric], yticks=range(len(shown)), yticklabels=shown)
            axis.set_title(f"{budget:.2f} of the MACs")
    grid[0][0].legend(fontsize=9)
    figure.suptitle("mini world, mean and range over seeds; left is better")
    figure.savefig(out / "methods.png", dpi=110)
    plt.close(figure)
    for number, shown in ((4, FIGURE4), (5, FIGURE5)):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
        for axis, metric in zip(axes, AXES, strict=True):
            for name, label in shown.items():
                points = found.get(f"{FIGURES:.2f} {name}", {}).get(metric, {})
                n = len(points.get(last, ()))
                _curve(axis, points, f"{label}, {n} seed{'s' * (n != 1)}")
            axis.set(xlabel="distillation steps", ylabel=AXES[metric], yscale="log")
            axis.grid(alpha=0.3, which="both")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axes[0].legend()
        figure.suptitle(f"mini world, magnitude pruning to {FIGURES:.2f} of the MACs; mean and range over seeds")
        figure.savefig(out / f"figure{number}.png", dpi=110)
        plt.close(figure)


def _before_and_after(axis: Any, lines: list[Points], last: int) -> None:
    """One line per method, from the first: where it starts and where it ends."""
    for y, points in enumerate(lines):
        axis.plot([mean(points[last]), mean(points[0])], [y, y], color="0.8", zorder=0)
        for step, color in ((0, "tab:orange"), (last, "tab:blue")):
            label = None if y else f"after {step} steps" if step else "as pruned"
            axis.hlines(y, min(points[step]), max(points[step]), color=color, linewidth=6, alpha=0.35)
            axis.plot(mean(points[step]), y, "o", color=color, label=label)
    axis.set_xscale("log")
    axis.grid(alpha=0.3, axis="x", which="both")
    axis.invert_yaxis()


def _curve(axis: Any, points: Points, label: str) -> None:
    """Mean over seeds, in a band of their range."""
    steps = sorted(points)
    (line,) = axis.plot(steps, [mean(points[s]) for s in steps], "o-", markersize=4, label=label)
    band = [min(points[s]) for s in steps], [max(points[s]) for s in steps]
    axis.fill_between(steps, *band, color=line.get_color(), alpha=0.2, linewidth=0)
