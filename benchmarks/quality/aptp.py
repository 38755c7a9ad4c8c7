"""APTP on the mini world: what the router takes, whom it sends where, and what its experts are worth before any tuning.

    python -m benchmarks.quality.aptp --budget 0.8   trains with the settings of `bilevel_fast.prune aptp`, and measures
    python -m benchmarks.quality.aptp --mixture runs/aptp    measures a mixture that is there

One row per mixture is appended to benchmarks/results/aptp.jsonl:

    seconds      in the training's steps, as its own stats.jsonl has them
    experts      of each the share of the teacher's MACs, and how many of the 216 prompts go to it
    told_by      mutual information of route and style, object, color, in bits; log2 K is all that a route can say
    errors       mean squared difference of prediction to the teacher's, over its mean square, on a noised drawing of
                 every prompt: behind the route (`routed`), behind the other experts (`astray`), and of the one network
                 that each method of `METHODS` cuts to the same budget from the default calibration set
"""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality import lab
from benchmarks.rows import Row
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import ModelFolder, load_folder
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import calibration_set, method
from bilevel_fast.pruning.aptp.mixture_folder import Mixture
from bilevel_fast.runs.router import AptpConfig, run
from bilevel_fast.runs.sources import image_source
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import SCENES

ROWS = RESULTS / "aptp.jsonl"
IMAGES = 64  # that methods may try the teacher on
METHODS = ("uniform", "magnitude", "diff-pruning", "gates")
_FROM = 1 << 46  # sample indices that nobody trains on, calibrates on or judges by


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    budget: float = 0.8
    """MACs of each expert as a share of the teacher's."""
    seed: int = 0
    """Of the training."""
    steps: int | None = None
    """Of the training; by default as many as `bilevel_fast.prune aptp` takes."""
    mixture: Path | None = None
    """Measure this one instead of training one."""
    rounds: int = 4
    """Noised drawings of each prompt."""
    write: bool = True
    """Append the row to benchmarks/results/aptp.jsonl."""


@torch.no_grad()
def distances(teacher: UNet, students: dict[str, UNet], folder: ModelFolder, rounds: int) -> dict[str, Tensor]:
    """Of each student the error on every scene (216,) fp64, over the teacher's mean square on all of them."""
    lost = {name: torch.zeros(len(SCENES), dtype=torch.float64) for name in students}
    whole = torch.zeros((), dtype=torch.float64)
    count = len(everything := range(len(SCENES)))
    for number in range(rounds):
        noised, text = lab.noised(folder, everything, range(_FROM + number * count, _FROM + (number + 1) * count))
        told = teacher(noised.x, noised.t, text).out.double()
        whole += told.square().flatten(1).sum(1).mean()
        for name, student in students.items():
            lost[name] += (student(noised.x, noised.t, text).out - told).square().flatten(1).sum(1)
    return {name: value / whole for name, value in lost.items()}


def information(routes: Sequence[int], values: Sequence[int]) -> float:
    """Mutual information of two columns, in bits."""
    pairs, count = list(zip(routes, values, strict=True)), len(routes)

    def share(column: Sequence[Any], value: Any) -> float:
        return column.count(value) / count

    return sum(
        share(pairs, (r, v)) * math.log2(share(pairs, (r, v)) / share(routes, r) / share(values, v))
        for r, v in set(pairs)
    )


def measure(path: Path, settings: Settings) -> Row:
    """The row of a mixture of the mini world."""
    mixture, folder = Mixture.load(path), load_folder(TEACHER)
    mixture.check_teacher(folder)
    teacher, budget = folder.unet().eval(), mixture.budget
    routes = mixture.route([scene.caption for scene in SCENES])
    cuts = {str(k): structure for k, structure in enumerate(mixture.structures)}
    source = image_source(folder, None, IMAGES, settings.seed)
    tried = calibration_set(folder, source, images=IMAGES, seed=settings.seed)
    cuts |= {name: method(name)(teacher, budget, tried) for name in METHODS}
    students = {name: teacher.cut(structure).eval() for name, structure in cuts.items()}
    found = distances(teacher, students, folder, settings.rounds)
    table = torch.stack([found[str(k)] for k in range(len(mixture.structures))])  # (K, 216)
    routed = table.gather(0, routes[None])[0]
    others = (table.sum(0) - routed) / max(len(table) - 1, 1)
    counts = routes.bincount(minlength=len(table)).tolist()
    records = (path / "stats.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "suite": "aptp",
        "case": f"{budget.ratio:.2f}",
        "seed": mixture.settings["seed"],
        "seconds": round(json.loads(records[-1])["seconds"], 1),
        "experts": [
            {"macs": round(count(s, budget.latent, budget.text).ratio, 4), "prompts": n, "dropped": len(s.dropped)}
            for s, n in zip(mixture.structures, counts, strict=True)
        ],
        "told_by": {
            name: round(information(routes.tolist(), [getattr(scene, name) for scene in SCENES]), 3)
            for name in ("style", "object", "color")
        },
        "errors": {
            "routed": routed.mean().item(),
            "astray": others.mean().item(),
            **{name: found[name].mean().item() for name in METHODS},
        },
        "config": {"model": "mini", **mixture.settings, "rounds": settings.rounds, "images": IMAGES},
        **describe(torch.device("cpu")),
    }


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.quality.aptp", __doc__)
    if settings.rounds < 1:
        raise UserError(f"--rounds is {settings.rounds}, wanted at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        path = settings.mixture
        if path is None:
            path = Path(scratch) / "mixture"
            config = AptpConfig(out=path, budget=settings.budget, seed=settings.seed, device="cpu")
            run(config if settings.steps is None else replace(config, steps=settings.steps))
        row = measure(path, settings)
    shown = ("case", "seed", "seconds", "experts", "told_by", "errors")
    print(json.dumps({name: row[name] for name in shown}, indent=2))
    if settings.write:
        lab.append(ROWS, row)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
