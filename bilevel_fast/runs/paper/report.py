"""What an experiment shows: markdown, JSON, a plot."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bilevel_fast.base.files import replacing
from bilevel_fast.base.tables import markdown, seeds_named, spread
from bilevel_fast.runs.paper.experiments import Experiment, TableRow
from bilevel_fast.runs.paper.judges import Column

_ACROSS = 4  # panels in a line of a plot

Found = dict[str, dict[str, dict[int, list[float]]]]
"""Row -> column -> step -> value of each seed."""


def gather(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Found:
    """Measured values by row, column and step; of concepts erased apart, a seed's mean if it has all."""
    seeds: dict[tuple[str, str, int], dict[int, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for column in columns:
            seeds[row["row"], column.key, row["step"]][row["seed"]].append(row["numbers"].get(column.key))
    found: Found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (name, key, step), by_seed in seeds.items():
        for values in by_seed.values():
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                found[name][key][step].append(mean(known))
    return found


def table(experiment: Experiment, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per model after its last step."""
    seeds, found = sorted({row["seed"] for row in rows}), gather(rows, columns)
    lines = []
    for row in experiment.rows:
        values = [last(found[row.name][column.key]) for column in columns]
        cells = [spread(some, column.digits, len(seeds)) for some, column in zip(values, columns, strict=True)]
        if experiment.against not in ("", row.name):
            before = [last(found[experiment.against][column.key]) for column in columns]
            cells = [cell + change(*pair) for cell, *pair in zip(cells, before, values, strict=True)]
        lines.append([row.label, *cells])
    return markdown([seeds_named(seeds), *(column.title for column in columns)], lines)


def change(before: Sequence[float], after: Sequence[float]) -> str:
    """By how much a mean has changed, in percent; nothing where there is no percent."""
    if not (before and after and mean(before)):
        return ""
    return f" ({100 * (mean(after) / mean(before) - 1):+.0f} %)"


def last(points: Mapping[int, list[float]]) -> list[float]:
    """Values after the last step that was measured."""
    return points[max(points)] if points else []


def plot(experiment: Experiment, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel per measured column: over steps for a curve, else a point per model, with the range over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = gather(rows, columns)
    shown = [c for c in columns if any(found[row.name][c.key] for row in experiment.rows)]
    if not shown:
        return
    across = min(_ACROSS, len(shown))
    lines = -(-len(shown) // across)
    figure, axes = plt.subplots(
        lines, across, figsize=(3.2 * across + 2, 3.2 * lines), layout="constrained", squeeze=False,
        sharey=not experiment.is_curve,
    )  # fmt: skip
    for empty in axes.flat[len(shown) :]:
        empty.set_axis_off()
    for axis, column in zip(axes.flat, shown, strict=False):
        drawn = [(row, found[row.name][column.key]) for row in experiment.rows if found[row.name][column.key]]
        (_curves if experiment.is_curve else _points)(axis, drawn)
        axis.set_title(column.title)
        axis.grid(alpha=0.3)
    if experiment.is_curve:
        axes[0][0].legend()
        if columns[0].key == "fid":
            axes[0][0].set_yscale("log")
    figure.suptitle(f"{experiment.title}; mean and range over seeds")
    with replacing(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)


def _curves(axis: Any, drawn: Sequence[tuple[TableRow, Mapping[int, list[float]]]]) -> None:
    for row, points in drawn:
        steps = sorted(points)
        (line,) = axis.plot(steps, [mean(points[s]) for s in steps], "o-", markersize=4, label=row.label)
        band = [min(points[s]) for s in steps], [max(points[s]) for s in steps]
        axis.fill_between(steps, *band, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set_xlabel("lower steps")


def _points(axis: Any, drawn: Sequence[tuple[TableRow, Mapping[int, list[float]]]]) -> None:
    for y, (_, points) in enumerate(drawn):
        values = last(points)
        axis.hlines(y, min(values), max(values), linewidth=5, alpha=0.35)
        axis.plot(mean(values), y, "o")
    axis.set_yticks(range(len(drawn)), [row.label for row, _ in drawn])
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
