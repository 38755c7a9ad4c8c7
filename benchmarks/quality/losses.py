"""What further terms of the lower loss are worth on the mini world: self-attentions (KOALA), layers (SSD-1B); and, if
asked for by `--terms`, the guided output (SnapFusion) and block outputs by their norm (LAPTOP-Diff).

    python -m benchmarks.quality.losses run --seeds 3 --tune    every weight that was tried, on a seed of its own
    python -m benchmarks.quality.losses run --seeds 0 1 2       the usual loss, and each term at its best weight
    python -m benchmarks.quality.losses report                  the table, from benchmarks/results/losses.jsonl

The students of a seed are one pruned student (magnitude, 0.55 of the MACs), walk through the same batches side by side
for the same number of steps, and differ in one weight; no concept is suppressed. The best weight is that with the least
`output_error` on the seed of `--tune`; see benchmarks.quality.methods for what is measured. Rows are appended as soon
as they are measured; a case that has its row is not run again.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import tyro

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality.lab import CPU, Lab, append, read
from benchmarks.quality.methods import distances, held_out
from benchmarks.rows import Row
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.tables import markdown, seeds_named, spread
from bilevel_fast.pruning import MacBudget, method
from bilevel_fast.runs.config import preset
from bilevel_fast.training.levels import descend
from bilevel_fast.training.losses import LossWeights

ROWS = RESULTS / "losses.jsonl"
USUAL = "usual"
TERMS = {"self_attention": "self-attention", "layer": "layer"}
NAMES = TERMS | {"guided": "guided output", "feature_by_norm": "block outputs by their norm"}
WEIGHTS = (0.1, 1.0)
MEASURED = {"output_error": "output error", "target_error": "target error", "fid": "FID"}
SHOWN = {"style": "style", "object": "object", "color": "color"}


@dataclass(frozen=True)
class Run:
    """Distil and judge all cases."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of everything random; one after the other."""
    tune: bool = False
    """Try every weight of every term, instead of the best of each."""
    terms: tuple[str, ...] = tuple(TERMS)
    """Which of them: self_attention, layer, guided or feature_by_norm."""
    preset: str = "mini"
    """Settings of the lower level."""
    budget: float = 0.55
    """Share of the teacher's MACs."""
    steps: int = 200
    """Distillation steps."""
    batch: int = 4
    """Images per step."""
    judged: int = 6
    """Samples judged per style."""


@dataclass(frozen=True)
class Report:
    """Print the table over all seeds."""


def weighted(name: str) -> LossWeights:
    """`usual`, or `TERM WEIGHT` beside the usual ones."""
    term, _, weight = name.partition(" ")
    if term == "feature_by_norm":  # a choice of how the weight of block outputs is meant
        return replace(LossWeights(), feature=float(weight), feature_by_norm=True)
    return LossWeights() if name == USUAL else replace(LossWeights(), **{term: float(weight)})


def tuned(rows: Sequence[Row], terms: Sequence[str] = tuple(TERMS)) -> list[str]:
    """The case of each term that did best where all weights were tried.

    Raises:
        UserError: They were not.
    """
    found = []
    for term in terms:
        tried = [row for row in rows if row["tuning"] and row["case"].startswith(f"{term} ")]
        if not tried:
            raise UserError(f"{ROWS} has no weight of {term} tried; run with --seeds 3 --tune first")
        found.append(min(tried, key=lambda row: row["output_error"])["case"])
    return found


def run(args: Run, seed: int, place: Row) -> None:
    """All cases of a seed that have no row. `place` is part of every row."""
    if strangers := [term for term in args.terms if term not in NAMES]:
        raise UserError(f"--terms {strangers[0]!r} is none of {', '.join(NAMES)}")
    rows = read(ROWS)
    names = [USUAL] + ([f"{t} {w:g}" for t in args.terms for w in WEIGHTS] if args.tune else tuned(rows, args.terms))
    done = {(row["seed"], row["case"]) for row in rows}
    if not (missing := [name for name in names if (seed, name) not in done]):
        return
    config = preset(args.preset)
    lower = replace(config.lower, steps=args.steps, batch=args.batch)
    config = replace(config, seed=seed, lower=lower, mini=replace(config.mini, judge_kept=args.judged))
    lab = Lab.set_up(config, bank=None)
    latent, text = lab.folder.config.sample_size, lab.folder.text_encoder.length
    kept = method("magnitude")(lab.teacher, MacBudget(args.budget, latent, text), ())
    students = {name: lab.teacher.cut(kept) for name in missing}
    levels = [
        lab.levels(replace(config, lower=replace(lower, weights=weighted(name))), student)[0]
        for name, student in students.items()
    ]
    for step in range(args.steps):
        for level in levels:
            descend(level, step)
    asked = held_out(lab.folder, lab.teacher)
    for name, student in students.items():
        quality = lab.judge(student)
        found: Row = distances(student.eval(), asked) | {"style": quality["other_style_hit"]}
        found |= {key: quality[key] for key in ("object", "color", "fid")}
        settings = {"preset": args.preset, **asdict(replace(lower, weights=weighted(name))), "judged": args.judged}
        row = {"suite": "losses", "case": name, "seed": seed, "tuning": args.tune, **found, "budget": args.budget}
        append(ROWS, {**row, "config": settings, **place})
        print(f"seed {seed} {name}: { {k: round(v, 4) for k, v in found.items()} }", file=sys.stderr, flush=True)


def table(rows: Sequence[Row]) -> str:
    """A line for each case of the compared seeds, then what was tried; the worse ones as well."""
    compared = [row for row in rows if not row["tuning"]]
    seeds, columns = sorted({row["seed"] for row in compared}), MEASURED | SHOWN
    lines = []
    for name in dict.fromkeys(row["case"] for row in compared):
        mine = [row for row in compared if row["case"] == name]
        cells = [spread([row[key] for row in mine], 2 if key == "fid" else 3, len(seeds)) for key in columns]
        lines.append((_said(name), *cells))
    tried = [(_said(row["case"]), *(f"{row[key]:.{2 if key == 'fid' else 3}f}" for key in columns))
             for row in rows if row["tuning"]]  # fmt: skip
    text = markdown((seeds_named(seeds), *columns.values()), lines)
    if tried:
        number = next(row["seed"] for row in rows if row["tuning"])
        text += f"\n\n{markdown((f'all weights tried, seed {number}', *columns.values()), tried)}"
    return text


def _said(name: str) -> str:
    term, _, weight = name.partition(" ")
    return name if name == USUAL else f"{NAMES[term]}, weight {weight}"


def main() -> None:
    args = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "report": Report}, prog="python -m benchmarks.quality.losses"
    )
    if isinstance(args, Run):
        command = f"python -m benchmarks.quality.losses run{' --tune' * args.tune}"
        place = {**describe(CPU), "command": command}  # once: the commit that is imported
        for seed in args.seeds:
            run(args, seed, place)
        return
    if not (measured := read(ROWS)):
        raise UserError(f"{ROWS} has no rows; run: python -m benchmarks.quality.losses run --seeds 3 --tune")
    print(table(measured))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
