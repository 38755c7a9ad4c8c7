"""One page: what a run of benchmarks/gpu.sh measured, against the goals. What was not measured says so.

    python -m benchmarks.pages.verdict --folder results      the folder that gpu.sh wrote; prints Markdown

Of rows that were measured twice the last one counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.kernels.goals import reached
from benchmarks.rows import Row, number, read
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError

Value = Callable[[list[Row]], float | None]


@dataclass(frozen=True)
class Settings:
    """What to judge."""

    folder: Path
    """Where gpu.sh left its results."""


@dataclass(frozen=True)
class Goal:
    """A number that a whole step should reach."""

    text: str
    limit: float
    value: Value
    better: Literal["more", "less"] = "more"

    def line(self, rows: list[Row]) -> str:
        value = self.value(rows)
        wanted = f"{'>=' if self.better == 'more' else '<='} {self.limit:g}"
        if value is None:
            return f"| {self.text} | {wanted} | - | not measured |"
        met = value >= self.limit if self.better == "more" else value <= self.limit
        return f"| {self.text} | {wanted} | {number(value)} | {'met' if met else 'not met'} |"


def step(
    case: str, metric: str, provider: str = "ours", structure: str = "0.80", batch: int = 16, rung: str = "graphs"
) -> Value:
    """The last row of benchmarks.speed.step of that kind; the top of our ladder if nothing else is said."""
    wanted = "step", case, provider, metric, structure, batch, rung

    def value(rows: list[Row]) -> float | None:
        found = None
        for row in rows:
            if row["suite"] == "step" and row["value"] is not None:
                config = row["config"]
                names = (row["suite"], row["case"], row["provider"], row["metric"])
                if (*names, config["structure"], config["batch"], config["rung"]) == wanted:
                    found = row["value"]
        return found

    return value


def over(one: Value, other: Value) -> Value:
    """one / other."""

    def value(rows: list[Row]) -> float | None:
        found, below = one(rows), other(rows)
        return found / below if found is not None and below else None

    return value


def realised(rows: list[Row]) -> float | None:
    """What a student at 0.80 of the MACs keeps of the speed that they promise; of the UNet alone."""
    found = [
        row["value"]
        for row in rows
        if (row["suite"], row.get("provider"), row.get("metric")) == ("unet", "ours", "realised_speedup")
        and (row["config"]["structure"], row["config"]["batch"]) == ("0.80", 16)
        and row["value"] is not None
    ]
    return found[-1] if found else None


def projection(rows: list[Row]) -> float | None:
    """How far the roofline is from what was measured, as a share, without sign."""
    found = [row["error"] for row in rows if row["suite"] == "roofline_validation"]
    return abs(found[-1]) if found else None


GOALS = (
    Goal("lower step, img/s (of one H200)", 150, step("lower", "images_per_second")),
    Goal("lower step, share of the measured matmul rate", 0.5, step("lower", "mfu")),
    Goal("lower step, times faster than released", 6, step("lower", "times_faster_than_released")),
    Goal("lower step, times faster than compile", 1.25, step("lower", "times_faster_than_compile")),
    Goal("upper step over lower step, time", 1.5, over(step("upper", "ms"), step("lower", "ms")), "less"),
    Goal(
        "lower step, peak memory over eager's",
        0.5,
        over(step("lower", "peak_gib"), step("lower", "peak_gib", "eager", rung="eager")),
        "less",
    ),
    Goal("lower step, waits for the GPU", 0, step("lower", "host_syncs"), "less"),
    Goal("upper step, waits for the GPU", 0, step("upper", "host_syncs"), "less"),
    Goal("UNet at 0.80, share of the promised speed-up", 0.9, realised),
    Goal("projected time of a step, relative error", 0.25, projection, "less"),
)


def page(kernels: list[Row], rows: list[Row], phases: list[str]) -> str:
    """Markdown, from rows of benchmarks.kernels.sweep, those of whole steps, and how the phases ended."""
    machines = sorted({f"{row['device']}, torch {row.get('torch')}" for row in [*kernels, *rows] if "device" in row})
    lines = [
        "# Verdict",
        "",
        f"Measured on {'; '.join(machines)}." if machines else "Nothing was measured.",
        *("", "## Steps", "", "| | goal | measured | |", "|---|--:|--:|---|"),
        *(goal.line(rows) for goal in GOALS),
        *("", "## Kernels", "", "| op | goal | measured: median, worst case | |", "|---|---|---|---|"),
    ]
    for found in reached(kernels):
        start = f"| {found.goal.op} | {found.goal.least:.2f} {found.goal.text} |"
        if not found.values:
            lines.append(f"{start} - | not measured |")
            continue
        worst, middle = found.values[found.worst], median(found.values.values())
        met = "met" if found.count == len(found.values) else f"not met in {len(found.values) - found.count} cases"
        lines.append(f"{start} {middle:.2f}, {worst:.2f} in {found.worst} (of {len(found.values)}) | {met} |")
    failed = sorted({f"{row['op']} {row['provider']}: {row['why']}" for row in kernels if row["value"] is None})
    if failed:
        lines += ["", "## Could not run", "", *(f"* {line}" for line in failed)]
    return "\n".join([*lines, "", "## Phases", "", *(f"* {line}" for line in phases)]) + "\n"


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.verdict", __doc__)
    if not settings.folder.is_dir():
        raise UserError(f"--folder {settings.folder}: no such folder; OUT={settings.folder} bash benchmarks/gpu.sh")
    kernels, rows = (
        read(path) if (path := settings.folder / name).exists() else [] for name in ("kernels.jsonl", "rows.jsonl")
    )
    phases = settings.folder / "phases.txt"
    print(page(kernels, rows, phases.read_text().splitlines() if phases.exists() else []), end="")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
