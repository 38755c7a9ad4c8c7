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

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks import RESULTS
from benchmarks.machine import describe
from bilevel_fast.base import errors
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.models.folder import ModelFolder, load_folder
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.assemble import Materials, levels
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.training.levels import bilevel, descend
from bilevel_fast.training.lower import SharedAnswers
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini import materials as mini
from bilevel_fast.worlds.mini.judge import judge
from bilevel_fast.worlds.mini.probe import Probe

ROWS = RESULTS / "frontier.jsonl"
ANCHORS: tuple[Literal["phrase", "null"], ...] = ("phrase", "null")
PENALTIES: tuple[tuple[float, Literal["grad", "raw"]], ...] = (
    (0.0, "grad"),
    (0.1, "grad"),
    (1.0, "grad"),
    (10.0, "grad"),
    (100.0, "raw"),
)
CPU = torch.device("cpu")


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
    done = {(row["seed"], row["case"]) for row in rows()}
    folder = load_folder(TEACHER)
    teacher = folder.unet().requires_grad_(False)
    erased = mini.erased_styles(config.erase)
    materials = gather(config, folder, teacher, erased, args.cache / f"seed-{args.seed}")
    answers = SharedAnswers(Teacher(teacher), materials.schedule, config.seed, config.lower.snr_gamma)

    students: dict[str, UNet] = {}
    walks: list[Iterator[Any]] = []
    no_upper = {"distilled": replace(config.upper, every=0)}
    for name, upper in (no_upper | variants(config)).items():
        if (args.seed, name) in done and name != "distilled":  # the two-stage runs start from the distilled student
            continue
        students[name] = initial_student(config, folder, align=1)
        lower_level, upper_level = levels(replace(config, upper=upper), students[name], materials, CPU, answers)
        walks.append(bilevel(lower_level, upper_level, upper.every, 0, config.lower.steps))
    for step, _ in enumerate(zip(*walks, strict=True), start=1):
        if step % config.log_every == 0:
            print(f"seed {args.seed}: lower step {step} of {config.lower.steps}", file=sys.stderr, flush=True)
    students["teacher"] = teacher
    for anchor in ANCHORS:
        if (args.seed, f"two-stage {anchor}") not in done:
            two_stage(config, folder, materials, students, anchor)

    probe = Probe.load()
    for name, student in students.items():
        if (args.seed, name) in done:
            continue
        quality = judge(mini.portfolio(student.eval(), folder, erased, config), erased, probe)
        row = {"suite": "frontier", "case": name, "seed": args.seed, **asdict(quality), "config": config.to_dict()}
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **describe(CPU)}) + "\n")
        print(f"seed {args.seed}: {name:<24}{asdict(quality)}", file=sys.stderr, flush=True)


def two_stage(
    config: TrainConfig, folder: ModelFolder, materials: Materials, students: dict[str, UNet], anchor: Any
) -> None:
    """Suppress after distillation: the same number of upper steps, with nothing to hold the rest in place."""
    student = students[f"two-stage {anchor}"] = initial_student(config, folder, align=1)
    student.load_state_dict(students["distilled"].state_dict())
    upper = replace(config.upper, anchor=anchor, penalty=0.0)
    _, level = levels(replace(config, upper=upper), student, materials, CPU)
    assert level is not None
    for step in range(config.lower.steps // config.upper.every):
        descend(level, step)


def rows() -> list[dict[str, Any]]:
    """All rows measured so far."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    args = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "report": Report}, prog="python -m benchmarks.quality.frontier"
    )
    if isinstance(args, Run):
        run(args)
    else:
        from benchmarks.quality.frontier_report import plot, table

        measured = rows()
        if not measured:
            raise errors.UserError(f"{ROWS} has no rows; run: python -m benchmarks.quality.frontier run --seed 0")
        print(table(measured))
        plot(measured, args.plot)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
