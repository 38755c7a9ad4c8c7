"""Does the controller find what a sweep over lambda and K finds? The mini world.

    python -m benchmarks.quality.controller run --seeds 0      trains and judges all cases of a seed
    python -m benchmarks.quality.controller report             the comparison, from benchmarks/results/controller.jsonl

All cases of a group start from the same pruned student and walk through the same lower batches side by side, so the
teacher answers each batch once. They differ in the upper level only:

    distilled                     no upper steps
    lambda L K k                  swept: both stay as they are set
    controller from lambda L K k  the controller (bilevel_fast/erasing/controller.py) begins there

A row holds what the judge found (bilevel_fast/worlds/judge.py), how many upper steps ran and how many of them
moved
something, the CPU seconds of the training, and the course of the controller. Rows are appended as soon as they are
measured; a case that has its row is not run again.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality import tables
from benchmarks.quality.lab import CPU, Lab, append, read
from benchmarks.rows import Row
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.training.levels import bilevel
from bilevel_fast.training.upper import Terms

ROWS = RESULTS / "controller.jsonl"
SWEPT = (*((penalty, every) for every in (2, 4, 8) for penalty in (0.0, 1.0, 10.0)), (0.1, 4))
STARTS = ((1.0, 4), (10.0, 4), (1.0, 2), (10.0, 8))
GROUPS = ("controlled", "swept")
COURSE = ("lambda", "gap", "progress", "stopped")


@dataclass(frozen=True)
class Run:
    """Train and judge all cases, seed by seed."""

    seeds: tuple[int, ...] = (0,)
    """Of everything random; one after the other."""
    groups: tuple[str, ...] = GROUPS
    """`controlled` (with the distilled student) and `swept`, one after the other: each has its rows when it is done."""
    only: tuple[str, ...] = ()
    """Cases to run; by default all. Those of a group run side by side: fewer of them are sooner done."""
    cache: Path = Path("runs/frontier")
    """Where concept banks are kept between runs."""
    preset: str = "mini"
    """Settings that the cases share."""


@dataclass(frozen=True)
class Report:
    """Print the comparison."""


def cases(group: str, upper: Upper) -> dict[str, Upper]:
    """Name and upper level of every case of a group."""
    if group == "swept":
        return {
            f"lambda {penalty:g} K {every}": replace(upper, penalty=penalty, every=every) for penalty, every in SWEPT
        }
    on = replace(upper.controller, enabled=True)
    return {"distilled": replace(upper, every=0)} | {
        f"controller from lambda {penalty:g} K {every}": replace(upper, penalty=penalty, every=every, controller=on)
        for penalty, every in STARTS
    }


class Walk:
    """One student on its way.

    Attributes:
        student: As it is now.
        found: What its row will say about the way: upper steps, those that moved something, CPU seconds, the course.
    """

    def __init__(self, config: TrainConfig, lab: Lab):
        self.student, self.upper_steps, self.seconds = lab.student(), 0, 0.0
        self.lower, self.upper = lab.levels(config, self.student)
        self.course: list[list[float]] = []
        self._steps = bilevel(self.lower, self.upper, config.upper.every, 0, config.lower.steps)

    def step(self, number: int) -> None:
        """Lower step `number`, from 1, and the upper step after it if there is one."""
        start = time.process_time()
        terms: Terms = next(self._steps)
        self.seconds += time.process_time() - start
        self.upper_steps += "upper/loss" in terms
        if "upper/lambda" in terms:
            self.course.append([number, *(round(float(terms[f"upper/{name}"]), 4) for name in COURSE)])

    @property
    def found(self) -> Row:
        done = 0 if self.upper is None else int(self.upper.optimizer.rule.done)  # pyright: ignore[reportAttributeAccessIssue]  # no edits here
        found = {"upper_steps": self.upper_steps, "upper_moves": done, "train_seconds": round(self.seconds, 1)}
        return found | ({"course": self.course} if self.course else {})


def run(args: Run, seed: int, group: str, place: Row, say: Callable[[str], None]) -> None:
    """Train and judge all cases of a group that have no row. `place` is part of every row."""
    config = replace(preset(args.preset), seed=seed)
    done = {(row["seed"], row["case"]) for row in read(ROWS)}
    wanted = {name: upper for name, upper in cases(group, config.upper).items() if name in (args.only or [name])}
    missing = {name: upper for name, upper in wanted.items() if (seed, name) not in done}
    if not missing:
        return
    lab = Lab.set_up(config, args.cache / f"seed-{seed}")
    walks = {name: Walk(replace(config, upper=upper), lab) for name, upper in missing.items()}
    for step in range(1, config.lower.steps + 1):
        for walk in walks.values():
            walk.step(step)
        if step % config.log_every == 0:
            say(f"seed {seed} {group}: lower step {step} of {config.lower.steps}")
    for name, walk in walks.items():
        quality = lab.judge(walk.student)
        settings = replace(config, upper=missing[name]).to_dict()
        row = {"suite": "controller", "case": name, "seed": seed, **quality, **walk.found}
        append(ROWS, {**row, "config": settings, **place})
        say(f"seed {seed} {name}: {quality} {walk.found['upper_moves']} upper moves")


def main() -> None:
    args = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "report": Report}, prog="python -m benchmarks.quality.controller"
    )
    if isinstance(args, Run):
        if wrong := [name for name in args.groups if name not in GROUPS]:
            raise UserError(f"--groups {wrong[0]!r}{errors.nearest(wrong[0], GROUPS)}")
        place = {
            **describe(CPU),
            "command": "python -m benchmarks.quality.controller run",
        }  # once: the commit that is imported
        for seed in args.seeds:
            for group in args.groups:
                run(args, seed, group, place, lambda text: print(text, file=sys.stderr, flush=True))
        return
    if not (measured := read(ROWS)):
        raise UserError(f"{ROWS} has no rows; run: python -m benchmarks.quality.controller run")
    print(tables.controller(measured))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
