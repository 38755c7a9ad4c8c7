"""All pruning methods on the mini world, before and after distillation, and what distillation and old weights are for.

    python -m benchmarks.quality.methods run --budget 0.8  prunes, distils and judges all cases of a budget
    python -m benchmarks.quality.methods report            table and plots from benchmarks/results/methods.jsonl

The students of a run walk through the same lower batches side by side, so the teacher answers each batch once; no
concept is suppressed. Besides every method there are, in the magnitude method's shape,

    random weights       what a network of that shape begins with (arXiv:2412.15341, figure 5)
    diffusion only       trained on the data alone, and
    distillation only    on the teacher's output and blocks alone (figure 4); both at 0.55

A method that leaves no choice (BK-SDM) runs once, with the smallest budget that it fits, or else the largest.

On the way each student's output on held-out noised drawings is held against the teacher's (`output_error`, the mean
squared difference over the mean square of what the teacher says) and against the truth (`target_error`). First and
last, and for the figures in between, it draws and is judged (`bilevel_fast/worlds/judge.py`, where no style is
erased).

Rows are appended as soon as they are measured; a case that was measured to its last step is not run again.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality import tables
from benchmarks.quality.lab import CPU, Lab, append, read
from benchmarks.quality.methods_cases import BUDGETS, Case, cases
from benchmarks.rows import Row
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batches import Batches
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.config import preset
from bilevel_fast.training.levels import descend
from bilevel_fast.training.lower import Answered, Answers
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.worlds.mini.materials import WORLD as mini

ROWS = RESULTS / "methods.jsonl"
STEPS = (0, 50, 100, 200, 300, 400, 500)  # the errors are measured here, and after the last step
HELD_OUT = 1 << 20  # a seed that no run has


@dataclass(frozen=True)
class Run:
    """Prune, distil and judge all cases of a budget."""

    budget: float = 0.80
    """Share of the teacher's MACs: 0.8 or 0.55."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of everything random; one after the other."""
    only: tuple[str, ...] = ()
    """Cases to run; by default all."""
    extra: tuple[str, ...] = ()
    """NAME=FOLDER: students to distil as well, such as an expert of APTP; {seed} in FOLDER is the seed."""
    preset: str = "mini"
    """Settings of the lower level."""
    steps: int = 600
    """Distillation steps."""
    batch: int = 4
    """Images per step; a quarter of the preset's, for what two busy cores can do in an hour."""
    judged: int = 12
    """Samples judged per style; a third of the preset's, for the same reason."""


@dataclass(frozen=True)
class Report:
    """Print the table over all seeds and draw the plots."""

    out: Path = RESULTS
    """Folder for methods.png, figure4.png and figure5.png."""


def held_out(folder: ModelFolder, teacher: UNet, batches: int = 4) -> list[Answered]:
    """Noised drawings that no run trains on, 32 a batch, with the teacher's answers; the same for every seed."""
    source = mini.drawn_source(folder, [], 216, HELD_OUT)
    drawn = Batches(source, folder.text_encoder, 32, HELD_OUT)
    answers = Answers(Teacher(teacher), folder.schedule, HELD_OUT)
    return [answers.ask(drawn(n)) for n in range(batches)]


@torch.no_grad()
def distances(student: UNet, asked: Sequence[Answered]) -> dict[str, float]:
    """How far a student's output is from the teacher's and from the truth, each over the mean square of that."""
    sums = torch.zeros(4, dtype=torch.float64)
    for answered in asked:
        out = student(answered.noised.x, answered.noised.t, answered.text).out.double()
        told, true = answered.teacher.out.double(), answered.noised.target.double()
        sums += torch.stack([x.square().sum() for x in (out - told, told, out - true, true)])
    off, told, missed, true = sums.tolist()
    return {"output_error": off / told, "target_error": missed / true}


def run(args: Run, seed: int, place: Row) -> None:
    """All cases of a seed. `place` is part of every row."""
    config = preset(args.preset)
    lower = replace(config.lower, steps=args.steps, batch=args.batch)
    config = replace(config, seed=seed, lower=lower, mini=replace(config.mini, judge_kept=args.judged))
    lab = Lab.set_up(config, bank=None)
    folder, teacher = lab.folder, lab.teacher
    asked, done = held_out(folder, teacher), {(r["seed"], r["case"], r["step"]) for r in read(ROWS)}

    def measure(case: Case, student: UNet, step: int) -> None:
        if (seed, case.name, step) in done:
            return
        found: Row = distances(student.eval(), asked)
        if step in (0, args.steps, *case.judged):
            quality = lab.judge(student)
            found |= {"style": quality["other_style_hit"], **{k: quality[k] for k in ("object", "color", "fid")}}
        ratio = count(student.structure, folder.config.sample_size, folder.text_encoder.length).ratio
        settings = {"preset": args.preset, **asdict(replace(lower, weights=case.weights)), "judged": args.judged}
        row = {"suite": "methods", "case": case.name, "seed": seed, "step": step, **found, "macs_ratio": ratio}
        append(ROWS, {**row, "config": settings, **place})
        say(f"seed {seed} {case.name}, step {step}: { {k: round(v, 4) for k, v in found.items()} }")

    measure(Case("teacher", lambda: teacher, lower.weights), teacher, 0)
    walks = []
    for case in cases(args.budget, args.extra, config, folder, teacher):
        if (seed, case.name, args.steps) in done or (args.only and case.name not in args.only):
            continue
        student, own = case.make(), replace(config, lower=replace(lower, weights=case.weights))
        walks.append((case, student, lab.levels(own, student)[0]))
    for step in range(args.steps + 1):
        for case, student, level in walks:
            if step in STEPS or step == args.steps:
                measure(case, student, step)
            if step < args.steps:
                descend(level, step)


def say(what: object) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    args = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "report": Report}, prog="python -m benchmarks.quality.methods"
    )
    if isinstance(args, Run):
        if args.budget not in BUDGETS:
            raise UserError(f"--budget {args.budget:g}, wanted one of {', '.join(map(str, BUDGETS))}")
        command = f"python -m benchmarks.quality.methods run --budget {args.budget:g}"
        place = {**describe(CPU), "command": command}  # once: the commit that is imported, whatever others commit later
        for seed in args.seeds:
            run(args, seed, place)
        return
    if not tables.finished(measured := read(ROWS)):
        raise UserError(f"{ROWS} has no finished case; run: python -m benchmarks.quality.methods run --budget 0.8")
    print(tables.methods(measured))
    tables.methods_plots(measured, args.out)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
