"""bf16 against fp32 on the mini world: the same gradients, and the same result.

    python -m benchmarks.quality.precision gradients            cosine of the two gradients, by class of parameters
    python -m benchmarks.quality.precision table --seeds 0 1    trains 200 lower steps in either precision, and judges
    python -m benchmarks.quality.precision report               the committed rows, and whether they keep the bounds

Gradients are of both levels' losses, for the pruned student that a run starts from and the first batches of its seed.
The bound is a cosine of 0.995 for every class. For the table it is that the two precisions differ by no more than two
seeds do in fp32.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality import lab
from benchmarks.quality.lab import CPU
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.runs.assemble import levels
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.runs.session import run

ROWS = RESULTS / "precision.jsonl"
COSINE = 0.995
STEPS = 200
CLASSES = {  # the first that is in the parameter's name
    "time": ("time_emb",),
    "norm": ("norm",),
    "attention": ("to_q", "to_k", "to_v", "to_out"),
    "feed-forward": (".ff.",),
    "projection": ("proj_in", "proj_out", "conv_shortcut"),
    "convolution": ("conv",),
}
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, Precision] = ("fp32", "bf16")


@dataclass(frozen=True)
class Gradients:
    """Compare gradients."""

    batches: int = 4
    """Batches of either level."""
    out: Path = ROWS
    """Where rows are appended."""


@dataclass(frozen=True)
class Table:
    """Train in both precisions and judge."""

    seeds: tuple[int, ...] = (0, 1)
    """Runs in either precision."""
    preset: str = "mini"
    """Settings of the runs; `smoke` to rehearse."""
    out: Path = ROWS
    """Where rows are appended."""


@dataclass(frozen=True)
class Report:
    """Print the rows and judge them."""

    out: Path = ROWS
    """Where they are."""


def class_of(name: str) -> str:
    """The class of a parameter: weights and biases together."""
    return next(kind for kind, parts in CLASSES.items() if any(part in name for part in parts))


def gradients(config: TrainConfig, batches: int) -> dict[tuple[str, Precision], list[dict[str, Tensor]]]:
    """Per level and precision, the gradient of each batch by class, flat and in fp64."""
    found: dict[tuple[str, Precision], list[dict[str, Tensor]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for precision in PRECISIONS:
            here = lab.Lab.set_up(config, Path(scratch))  # anew: the teacher moves into the precision
            student, settings = here.student(), dataclasses.replace(config, precision=precision)
            lower, upper = levels(settings, student, here.materials, CPU)
            assert upper is not None
            for step in range(batches):
                for level in (lower, upper):
                    level.gradient(level.batches(step))
                    flat = level.optimizer.flat
                    by_class: dict[str, list[Tensor]] = {}
                    for name, gradient in flat.views(flat.gradient).items():
                        by_class.setdefault(class_of(name), []).append(gradient.flatten().double())
                    one = {kind: torch.cat(parts) for kind, parts in by_class.items()}
                    found.setdefault((level.name, precision), []).append(one)
    return found


def cosines(config: TrainConfig, batches: int) -> Iterator[dict[str, Any]]:
    """Rows: the least cosine over the batches, for each level and class."""
    found = gradients(config, batches)
    for level in ("lower", "upper"):
        for kind in CLASSES:
            pairs = zip(*(found[level, precision] for precision in PRECISIONS), strict=True)
            values = [torch.cosine_similarity(a[kind], b[kind], dim=0).item() for a, b in pairs]
            yield {"case": f"gradient {level} {kind}", "metric": "cosine", "value": min(values), "batches": batches}


def judged(config: TrainConfig) -> dict[str, float]:
    """The quality of the student that a whole run makes."""
    with tempfile.TemporaryDirectory() as scratch:
        return run(dataclasses.replace(config, out=Path(scratch) / "run", twin=False))["quality"]["student"]


def append(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        lab.append(path, {"suite": "precision", "provider": "ours", **row, **describe(CPU)})
        print({key: row[key] for key in ("case", "metric", "value") if key in row}, flush=True)


def table(args: Table) -> Iterator[dict[str, Any]]:
    config = preset(args.preset)
    steps = STEPS if args.preset == "mini" else config.lower.steps
    for seed in args.seeds:
        for precision in PRECISIONS:
            lower = dataclasses.replace(config.lower, steps=steps)
            settings = dataclasses.replace(config, seed=seed, precision=precision, lower=lower)
            for metric, value in judged(settings).items():
                yield {"case": f"quality {precision} seed {seed}", "metric": metric, "value": value, "steps": steps}


def report(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Text, and what breaks a bound."""
    lines, broken = [], []
    quality: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["metric"] == "cosine":
            lines.append(f"{row['case']:<32}cosine {row['value']:.5f}")
            broken += [f"{row['case']}: {row['value']:.5f} < {COSINE}"] * (row["value"] < COSINE)
        else:
            _, precision, _, seed = row["case"].split()
            quality.setdefault(row["metric"], {})[precision, seed] = row["value"]
    for metric, values in quality.items():
        seeds = sorted({seed for _, seed in values})
        low, high = ([values[p, seed] for seed in seeds] for p in ("bf16", "fp32"))
        noise = max(high) - min(high)
        apart = max(abs(a - b) for a, b in zip(low, high, strict=True))
        shown = "  ".join(f"seed {s}: {b:.3f} {a:.3f}" for s, a, b in zip(seeds, low, high, strict=True))
        lines.append(f"{metric:<18}fp32 bf16  {shown}   apart {apart:.3f}, seeds in fp32 {noise:.3f}")
        if len(seeds) > 1 and apart > max(noise, 0.02):  # 0.02: three of 144 samples
            broken.append(f"{metric}: precisions are {apart:.3f} apart, seeds {noise:.3f}")
    return "\n".join(lines), broken


def main() -> None:
    commands = {"gradients": Gradients, "table": Table, "report": Report}
    args = tyro.extras.subcommand_cli_from_dict(commands, prog="python -m benchmarks.quality.precision")
    if isinstance(args, Gradients):
        append(args.out, cosines(preset("mini"), args.batches))
    elif isinstance(args, Table):
        append(args.out, table(args))
    else:
        if not args.out.exists():
            raise UserError(f"{args.out} has no rows; run: python -m benchmarks.quality.precision gradients")
        text, broken = report(lab.read(args.out))
        print(text)
        if broken:
            raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
