"""Tables and plots of frontier, controller and methods: mean over seeds, spread as (max - min) / 2.

The controller is held against the best of the sweep. A frontier point is told by four numbers, so what is compared is
their sum, the `miss`:

    miss = concept_hit + (1 - content_kept) + (1 - other_style_hit) + fid / fid of the distilled student, same seed

shares of samples that are not as asked, and the FID in units of what distillation alone reaches. 1 is a student that
suppresses all, spoils nothing and looks as good as the distilled one. The best of the sweep is the case with the least
miss, averaged over seeds: chosen after the fact from all of them, which flatters the sweep where cases differ by noise.
"""

from collections import defaultdict
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.methods_cases import BUDGETS, DIFFUSION, DISTILLATION, FIGURES, PLAIN, RANDOM
from benchmarks.rows import Row
from bilevel_fast.base.tables import markdown, seeds_named, spread
from bilevel_fast.worlds.mini.world import STYLES

QUALITY = ("concept_hit", "content_kept", "other_style_hit", "object", "color", "fid")
MISSED = ("concept_hit", "content_kept", "other_style_hit", "fid")
CONTROLLED = "controller from "
WITHIN = 1.05

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


# --- frontier ---------------------------------------------------------------------------------------


def variants(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each variant, in the order in which they were measured; the baselines first."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for name in ("teacher", "distilled"):
        cases[name] = []
    for row in rows:
        cases[row["case"]].append(row)
    return {name: found for name, found in cases.items() if found}


def frontier(rows: list[Row]) -> str:
    """Markdown: a line per variant."""
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for name, found in variants(rows).items():
        note = "" if len(found) == len(seeds) else f" ({len(found)} of {len(seeds)} seeds)"
        lines.append([name + note, *(spread([row[metric] for row in found], 2) for metric in QUALITY)])
    machines = {f"{row['device']}, torch {row['torch']}, {row['date']}" for row in rows}
    head = markdown([seeds_named(seeds), *QUALITY], lines)
    return f"{head}\n\nMeasured on {'; '.join(sorted(machines))}"


def frontier_plot(rows: list[Row], path: Path) -> None:
    """Suppression against what it costs: content of the erased prompts, and FID of all others."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for axis, metric in zip(axes, ("content_kept", "fid"), strict=True):
        labels: dict[tuple[int, int], list[str]] = {}
        places: dict[tuple[int, int], tuple[float, float]] = {}
        for name, found in variants(rows).items():
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


# --- controller -------------------------------------------------------------------------------------


def miss(row: Row, distilled: Row) -> float:
    """See above; `distilled` is the distilled student's row of the same seed."""
    wrong = row["concept_hit"] + (1 - row["content_kept"]) + (1 - row["other_style_hit"])
    return wrong + row["fid"] / distilled["fid"]


def by_case(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Rows by case and seed, only those of seeds whose distilled student was measured; with their `miss`."""
    distilled = {row["seed"]: row for row in rows if row["case"] == "distilled"}
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["seed"] in distilled:
            found[row["case"]][row["seed"]] = {**row, "miss": miss(row, distilled[row["seed"]])}
    return dict(found)


def common(cases: dict[str, dict[int, Row]]) -> list[int]:
    """Seeds that all cases have."""
    return sorted(set.intersection(*(set(found) for found in cases.values())))


def dominating(point: dict[int, Row], others: dict[str, dict[int, Row]], seeds: list[int]) -> list[str]:
    """Cases that are at least as good in every metric's mean, and better in one."""

    def costs(found: dict[int, Row]) -> list[float]:
        means = {name: mean(found[seed][name] for seed in seeds) for name in MISSED}
        return [means["concept_hit"], -means["content_kept"], -means["other_style_hit"], means["fid"]]

    mine = costs(point)
    found = {name: costs(other) for name, other in others.items()}
    return [name for name, theirs in found.items() if theirs != mine and all(map(float.__le__, theirs, mine))]


def controller(rows: list[Row]) -> str:
    """Markdown: all cases by their miss, and the comparison in words; or that nothing was measured."""
    cases = by_case(rows)
    swept = {name: found for name, found in cases.items() if name.startswith("lambda ")}
    controlled = {name: found for name, found in cases.items() if name.startswith(CONTROLLED)}
    if not swept or not controlled or not (seeds := common({**swept, **controlled})):
        return "not measured"
    table = []
    averages = {name: mean(found[seed]["miss"] for seed in seeds) for name, found in cases.items()}
    for name in sorted(averages, key=averages.__getitem__):
        found = [cases[name][seed] for seed in seeds]
        cells = [spread([row[metric] for row in found], 2) for metric in (*MISSED, "miss")]
        counts = ", ".join(f"{mean(row[key] for row in found):.0f}" for key in ("upper_steps", "upper_moves"))
        table.append([name, *cells, counts])
    best = min(swept, key=averages.__getitem__)
    lines = [
        markdown([seeds_named(seeds), *MISSED, "miss", "upper steps: ran, moved"], table),
        "",
        f"Best of the sweep: {best}, miss {averages[best]:.3f}; worst: {max(averages[n] for n in swept):.3f}.",
    ]
    for name in controlled:
        ratio = averages[name] / averages[best]
        above = dominating(controlled[name], swept, seeds)
        verdict = "within 5 %" if ratio <= WITHIN else "not within 5 %"
        lines.append(
            f"The {name}: miss {ratio:.3f} of the best's, {verdict}; "
            f"{len(above)} of {len(swept)} swept cases are at least as good in every column and better in one."
        )
    places = {f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}" for row in rows}
    return "\n".join([*lines, "", "Measured on " + "; ".join(sorted(places)) + "."])


# --- methods ----------------------------------------------------------------------------------------


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


def methods(rows: list[Row]) -> str:
    """Markdown: a line per method, and below it what the figures show, in words."""
    if not (rows := finished(rows)):
        return "not measured"
    found, seeds, last = curves(rows), sorted({row["seed"] for row in rows}), last_step(rows)

    def cell(case: str, metric: str) -> str:
        points = found[case][metric] if case in found else {}
        if not points.get(last):
            return "not measured"
        before, after = mean(points[0]), points[last]
        return f"{before:.{digits(before)}f} -> {spread(after, digits(mean(after)), len(seeds))}"

    heads = [f"{budget:.2f}: {says}" for budget in BUDGETS for says in METRICS.values()]
    lines = []
    for name in members(rows):
        cells = [cell(f"{budget:.2f} {name}", metric) for budget in BUDGETS for metric in METRICS]
        lines.append([name, *cells])
    for name, ratio in fixed(rows).items():
        cells = [cell(name, metric) for metric in METRICS] + ["-"] * len(METRICS) * (len(BUDGETS) - 1)
        lines.append([f"{name}, which leaves {ratio:.2f} of the MACs", *cells])
    if teachers := found["teacher"]["fid"][0]:
        shown = spread(teachers, digits(mean(teachers)), len(seeds))
        lines.append(["teacher, all of the MACs", "0", shown, *["-"] * len(heads[2:])])
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    machines = "; ".join(sorted({f"{r['device']}, torch {r['torch']}, {r['date']}" for r in rows}))
    config = rows[-1]["config"]
    judged = f"FID of {len(STYLES) * config['judged']} drawings"
    how = f"{last} steps of {config['batch']} images at learning rate {config['lr']:g}; {judged}."
    says = [*findings(found, last), how, f"Measured on {machines}, commits {commits}."]
    first = f"{seeds_named(seeds)}; before -> after {last} steps"
    return "\n".join([markdown([first, *heads], lines), "", *says])


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


def methods_plots(rows: list[Row], out: Path) -> None:
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
