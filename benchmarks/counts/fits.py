"""Which card trains Stable Diffusion XL at 1024 px with a preset, in parts of how many images. A projection; no GPU.

    python -m benchmarks.counts.fits
    python -m benchmarks.counts.fits --preset released --json

What `train` decides by itself before its first step (`runs.fitting`, from bytes counted by `profiling.memory`), alone
and on several ranks of that card, which share masters, moments and summed gradients: `benchmarks.counts.memory` says
how it is counted. Both text encoders are on the card as well. SDXL is the teacher, in bf16; students are those of
`benchmarks.structures.counted`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.counts.memory import SIZES
from benchmarks.machine import describe
from benchmarks.structures import counted
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.runs.fitting import Fitting

RANKS = (1, 2, 4, 8)
ENCODERS = 2 * 817_720_320
"""Bytes of both text encoders in bf16, which are on the card as well and which the memory model does not count."""
FORMULA = "largest divisor m of a leaf with which the memory model says no more than the card has beside the encoders"

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the projection."""

    preset: str = "paper"
    """Whose batches, losses and upper level."""
    json: bool = False
    """One JSON object per row instead of a table."""


def micro_batch(plan: Fitting, card: int) -> int:
    """Images of the lower level that are computed at once; 0 if not even one fits."""
    try:
        return plan.micro_batches(card)[0]
    except UserError:
        return 0


def rows(name: str) -> Iterator[Row]:
    """For each student, with recomputation and without: the parts at one image, then each card and number of ranks."""
    size, structures = counted("sdxl")
    where = describe(torch.device("cpu"))
    versions = {key: where[key] for key in ("torch", "commit", "date")}
    for label, kept in structures.items():
        for recompute in (False, True):
            config: TrainConfig = replace(preset(name), recompute=recompute)
            plan = Fitting(config, kept, size.latent, size.text, torch.bfloat16, config.graphs)
            memory = plan.wanted(config.lower.batch, 1)
            shared = {
                "suite": "fits", "case": f"{label}{', recompute' * recompute}", "provider": "torch",
                "metric": "projection", "p20": None, "p80": None, "projection": True,
                "config": {"unet": size.name, "structure": label, "preset": name, "recompute": recompute,
                           "batch": config.lower.batch, "latent": size.latent, "text": size.text, "dtype": "bfloat16"},
                **versions,
            }  # fmt: skip
            yield {
                **shared, "device": "any card", "value": memory.total / 2**30, "unit": "GiB", "micro": 1,
                "parts_gib": {part: held / 2**30 for part, held in memory.parts.items()}, "formula": "sum of the parts",
            }  # fmt: skip
            for ranks in RANKS:
                leaves = replace(config, scale=replace(config.scale, leaves=ranks))
                several = replace(plan, config=leaves, ranks=ranks, graphs=plan.graphs and ranks == 1)
                for sold, has in SIZES.items():
                    found = micro_batch(several, has - ENCODERS)
                    yield {**shared, "device": f"{sold} GB card", "ranks": ranks, "value": found, "unit": "images",
                           "formula": FORMULA}  # fmt: skip


def cell(found: dict[int, int]) -> str:
    """Of one card: images at once by ranks -> those of the fewest ranks that can."""
    for ranks, images in sorted(found.items()):
        if images:
            return str(images) if ranks == 1 else f"{ranks} cards: {images}"
    return "-"


def table(found: list[Row]) -> list[tuple[str, ...]]:
    """A line for each student: what one image takes, and the cell of each card."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in found):
        (whole,) = (row["value"] for row in found if row["case"] == case and row["unit"] == "GiB")
        cards: dict[str, dict[int, int]] = {}
        for row in found:
            if row["case"] == case and row["unit"] == "images":
                cards.setdefault(row["device"], {})[row["ranks"]] = row["value"]
        lines.append((case, f"{whole:.1f}", *(cell(by) for by in cards.values())))
    return lines


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.counts.fits", __doc__)
    found = list(rows(settings.preset))
    if settings.json:
        print("\n".join(map(json.dumps, found)))
        return
    lines = [("student", "GiB, one at once", *(f"{sold} GB" for sold in SIZES)), *table(found)]
    print(f"images at once of SDXL at 1024 px, preset {settings.preset} (counted projection)")
    print("\n".join("".join(f"{text:>18}" if n else f"{text:22}" for n, text in enumerate(line)) for line in lines))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
