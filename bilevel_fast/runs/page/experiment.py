"""The report of an experiment over several seeds, `report.html` beside its `table.md`."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from bilevel_fast.base.tables import seeds_named
from bilevel_fast.runs.page import document
from bilevel_fast.runs.page.charts import SERIES, curves
from bilevel_fast.runs.page.document import Html, code, image, join, legend, note, scrolling, section, table, tag
from bilevel_fast.runs.paper.experiments import Experiment
from bilevel_fast.runs.paper.judges import Column
from bilevel_fast.runs.paper.report import Found, gather, last

_ARROWS = {"up": "↑", "down": "↓", "": ""}


def report(
    experiment: Experiment,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    grid: bytes | None,
    prompts: Sequence[str],
    command: str,
) -> str:
    """The page: means and their spread over seeds, curves where there are any, samples, machines, command.

    Args:
        experiment: What was compared.
        columns: What was measured.
        rows: A row for each model, seed and step.
        grid: Samples of the first seed as a PNG, a line for each model; None without any.
        prompts: Of its columns.
        command: Carries the experiment out again.
    """
    seeds, found = sorted({row["seed"] for row in rows}), gather(rows, columns)
    count = len(seeds)
    spread = "± is half the range over the seeds." if count > 1 else "One seed: what another would change is not known."
    lines = [[row.label, *(_cell(last(found[row.name][c.key]), c, count) for c in columns)] for row in experiment.rows]
    head = [join((c.heading, tag("small", _ARROWS[c.better]) if c.better else "")) for c in columns]
    parts = [section("Results", table([seeds_named(seeds), *head], lines, label=experiment.title), note(spread))]
    if experiment.is_curve:
        parts.append(section("On the way", *_curves(experiment, columns, found)))
    if grid is not None:
        labels = ", ".join(row.label for row in experiment.rows)
        says = f"Samples: a line for each of {labels}; a column for each prompt: {'; '.join(prompts)}"
        parts.append(section("Samples", note(f"Seed {seeds[0]}."), scrolling("Samples", image(grid, says))))
    where = sorted({f"{row['device']}, {row['threads']} threads, torch {row['torch']}" for row in rows})
    parts.append(section("Environment", tag("ul", *(tag("li", each) for each in where))))
    parts.append(section("Run it again", code(command), note("--out names a new folder.")))
    erased = ", ".join(dict.fromkeys(name for row in rows for name in row.get("concepts", ())))
    return document.page(experiment.title, *parts, lead=f"{len(lines)} models, {seeds_named(seeds)}; erased: {erased}.")


def _cell(values: Sequence[float], column: Column, seeds: int) -> Html:
    if not values:
        return join(("not measured",))
    half = (max(values) - min(values)) / 2
    about = f"± {half:.{column.digits}f}" if len(values) > 1 else ""
    if len(values) < seeds:
        about += f" {len(values)} of {seeds} seeds"
    return join((f"{mean(values):.{column.digits}f}", tag("small", about.strip()) if about else ""))


def _curves(experiment: Experiment, columns: Sequence[Column], found: Found) -> Sequence[Html]:
    """A chart for each column, of means over seeds."""

    def chart(column: Column) -> Html:
        series = {
            row.label: [(step, mean(values)) for step, values in sorted(found[row.name][column.key].items())]
            for row in experiment.rows
        }
        about = "mean over seeds" + (f"; {_ARROWS[column.better]} is better" if column.better else "")
        return curves(column.heading, about, series, x="lower steps")

    names = legend((row.label, kind) for row, kind in zip(experiment.rows, SERIES, strict=False))
    return names, tag("div", *map(chart, columns), class_="charts")
