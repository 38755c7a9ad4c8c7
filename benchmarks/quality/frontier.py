"""What is lost for what is suppressed: the measured frontier on the mini world that chooses the defaults.

    python -m benchmarks.quality.frontier run --seed 0     trains and judges all variants of one seed
    python -m benchmarks.quality.frontier report           table and scatter plot from benchmarks/results/frontier.jsonl

All variants of a seed start from the same pruned student and walk through the same lower batches side by side, so the
teacher answers each batch once. They differ in the upper level only:

    distilled    no upper steps
    two-stage    the distilled student, then as many upper steps as the bilevel runs take, and nothing else
    bilevel      an upper step every K lower steps, with a penalty: lambda times the lower loss on the last lower batch

Rows are appended as soon as they are measured; a variant that has its row is not run again.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality import tables
from benchmarks.quality.lab import CPU, Lab, append, read
from bilevel_fast.base import errors
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.assemble import levels
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.training.levels import bilevel, descend

ROWS = RESULTS / "frontier.jsonl"
ANCHORS: tuple[Literal["phrase", "null"], ...] = ("phrase", "null")
PENALTIES: tuple[tuple[float, Literal["grad", "raw"]], ...] = (
    (0.0, "grad"),
    (0.1, "grad"),
    (1.0, "grad"),
    (10.0, "grad"),
    (100.0, "raw"),
)


@dataclass(frozen=True)
class Run:
    """Train and judge all variants of one seed."""

    seed: int = 0
    """Of everything random."""
    cache: Path = Path("runs/frontier")
    """Where concept banks are kept between runs."""
    preset: str = "mini"
    """Settings that the variants share."""


@dataclass(frozen=True)
class Report:
    """Print the table over all seeds and draw the scatter plot."""

    plot: Path = Path("benchmarks/results/frontier.png")
    """Where the plot goes."""


def variants(config: TrainConfig) -> dict[str, Upper]:
    """Name and upper level of every bilevel variant."""
    return {
        f"bilevel {anchor} {norm} {penalty:g}": replace(config.upper, anchor=anchor, penalty=penalty, penalty_norm=norm)
        for anchor in ANCHORS
        for penalty, norm in PENALTIES
    }


def run(args: Run) -> None:
    config = replace(preset(args.preset), seed=args.seed)
    done = {(row["seed"], row["case"]) for row in read(ROWS)}
    lab = Lab.set_up(config, args.cache / f"seed-{args.seed}")
    students: dict[str, UNet] = {}
    walks: list[Iterator[Any]] = []
    no_upper = {"distilled": replace(config.upper, every=0)}
    for name, upper in (no_upper | variants(config)).items():
        if (args.seed, name) in done and name != "distilled":  # the two-stage runs start from the distilled student
            continue
        students[name] = lab.student()
        lower_level, upper_level = lab.levels(replace(config, upper=upper), students[name])
        walks.append(bilevel(lower_level, upper_level, upper.every, 0, config.lower.steps))
    for step, _ in enumerate(zip(*walks, strict=True), start=1):
        if step % config.log_every == 0:
            print(f"seed {args.seed}: lower step {step} of {config.lower.steps}", file=sys.stderr, flush=True)
    students["teacher"] = lab.teacher
    for anchor in ANCHORS:
        if (args.seed, name := f"two-stage {anchor}") not in done:
            students[name] = two_stage(lab, students["distilled"], anchor)
    for name, student in students.items():
        if (args.seed, name) in done:
            continue
        quality = lab.judge(student)
        row = {"suite": "frontier", "case": name, "seed": args.seed, **quality, "config": config.to_dict()}
        append(ROWS, {**row, **describe(CPU)})
        print(f"seed {args.seed}: {name:<24}{quality}", file=sys.stderr, flush=True)


def two_stage(lab: Lab, distilled: UNet, anchor: Any) -> UNet:
    """Suppress after distillation: the same number of upper steps, with nothing to hold the rest in place."""
    student, config = lab.student(), lab.config
    student.load_state_dict(distilled.state_dict())
    upper = replace(config.upper, anchor=anchor, penalty=0.0)
    _, level = levels(replace(config, upper=upper), student, lab.materials, CPU)  # asks no teacher's answers of others
    assert level is not None
    for step in range(config.lower.steps // config.upper.every):
        descend(level, step)
    return student


def main() -> None:
    args = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "report": Report}, prog="python -m benchmarks.quality.frontier"
    )
    if isinstance(args, Run):
        run(args)
    else:
        measured = read(ROWS)
        if not measured:
            raise errors.UserError(f"{ROWS} has no rows; run: python -m benchmarks.quality.frontier run --seed 0")
        print(tables.frontier(measured))
        tables.frontier_plot(measured, args.plot)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
