"""Studios erased one after the other, and both at once with as many steps: what is left of each. The emoji world.

    python -m benchmarks.quality.sequence --seeds 0 1 2      trains and judges what has no row

    FIRST                a run that erases the first
    FIRST, then SECOND   another that goes on from its student (`train --resume-concepts`) and erases the second as well
    both at once         one run of as many steps as these two have together

Rows are appended to benchmarks/results/sequence.jsonl: for each erased style the share of its prompts that get it, what
the judge found beside it, and the steps that the student has seen. `both at once` sees each concept half as often.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality.lab import CPU, append, read
from benchmarks.rows import Row
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.tables import markdown, seeds_named, spread
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.runs.session import run

ROWS = RESULTS / "sequence.jsonl"


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    seeds: tuple[int, ...] = (0,)
    """Of everything random; one after the other."""
    styles: tuple[str, ...] = ("noto", "twemoji")
    """The first and the second."""
    preset: str = "emoji"
    """Of all runs."""
    cache: Path = Path("runs/sequence")
    """Where the runs are kept; those that have ended are not repeated."""


def cases(settings: Settings, start: TrainConfig, seed: int) -> Iterator[tuple[str, int, TrainConfig]]:
    """Name, how many times a run's steps the student has seen, and the run; each may go on from the one before."""
    first, second = settings.styles
    place = settings.cache / f"{first}-{second}-{seed}"
    start = replace(start, seed=seed, twin=False, device="cpu")
    alone = replace(start, erase=(first,), out=place / "first")
    yield first, 1, alone
    yield f"{first}, then {second}", 2, replace(start, erase=(second,), out=place / "then", resume_concepts=alone.out)
    longer = replace(start.lower, steps=2 * start.lower.steps)
    yield "both at once", 2, replace(start, erase=(first, second), out=place / "both", lower=longer)


def measure(settings: Settings, start: TrainConfig, rows: Path) -> None:
    """Train and judge what has no row."""
    known = {(row["case"], row["seed"]) for row in read(rows)}
    for seed in settings.seeds:
        for name, times, config in cases(settings, start, seed):
            if (name, seed) in known:
                continue
            config = replace(config, resume=(config.out / "config.json").exists())
            summary = run(config)
            found = {"hits": summary["hits"]["student"], **summary["quality"]["student"]}
            steps = {
                "lower_steps": times * start.lower.steps,
                "upper_steps": times * start.lower.steps // start.upper.every,
            }
            append(rows, {"suite": "sequence", "case": name, "seed": seed, **found, **steps, **describe(CPU)})
            print(f"seed {seed} {name}: {found}", file=sys.stderr, flush=True)


SHOWN = {"content_kept": "their content", "other_style_hit": "other styles", "relative_hit": "of these their relatives"}


def table(rows: list[Row]) -> str:
    """A line for each case: the mean over seeds, and half their range."""
    styles = list(dict.fromkeys(style for row in rows for style in row["hits"]))
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        some = sorted((row for row in rows if row["case"] == case), key=lambda row: row["seed"])
        hits = [spread([r["hits"][s] for r in some], 2) if s in some[0]["hits"] else "kept" for s in styles]
        shares = [spread([row[key] for row in some], 2) if key in some[0] else "-" for key in SHOWN]
        steps = f"{some[0]['lower_steps']} / {some[0]['upper_steps']}"
        name = f"{case}, {seeds_named([row['seed'] for row in some])}"
        lines.append([name, *hits, *shares, spread([row["fid"] for row in some], 1), steps])
    return markdown(["", *styles, *SHOWN.values(), "FID", "lower / upper steps"], lines)


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.quality.sequence", __doc__)
    if len(settings.styles) != 2:
        raise UserError(f"--styles names {len(settings.styles)} styles, wanted 2")
    measure(settings, preset(settings.preset), ROWS)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
