"""The largest batch that trains SD 2.1 at 512 px on a card, with and without recomputation. A projection; needs no GPU.

    python -m benchmarks.counts.memory
    python -m benchmarks.counts.memory --batch 16 --json
    python -m benchmarks.counts.fits                        Stable Diffusion XL, alone and on several cards

Counted on the meta device by `profiling.memory`: bf16, two fp32 AdamWs over fp32 masters, no moving average, torch's
own kernels. What CUDA and its libraries take is an assumption there, and fragmentation is not counted: leave some room.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cards import CARDS
from benchmarks.machine import describe
from benchmarks.structures import counted
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.profiling.memory import estimate, largest_batch

# GB that a card is sold with -> bytes that it has for a program
SIZES = {
    24: CARDS["RTX 4090"].bytes,
    48: CARDS["RTX A6000"].bytes,
    80: CARDS["H100 80GB HBM3"].bytes,
    141: CARDS["H200"].bytes,
}
FORMULA = "largest b with weights + gradients + moments + teacher + workspace(b) + activations(b) <= memory of the card"

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the projection."""

    batch: int = 16
    """Batch whose memory is shown part by part."""
    json: bool = False
    """One JSON object per row instead of tables."""


def rows(batch: int) -> Iterator[Row]:
    """For each structure, with recomputation and without: the parts at `batch`, then the largest batch of each card."""
    size, structures = counted("sd21")
    versions = {
        key: value for key, value in describe(torch.device("cpu")).items() if key in ("torch", "commit", "date")
    }
    for name, kept in structures.items():
        for recompute in (False, True):
            memory = estimate(kept, size.latent, size.text, batch, recompute=recompute)
            shared = {
                "suite": "memory", "case": f"{name}{', recompute' * recompute}", "provider": "torch",
                "metric": "projection", "p20": None, "p80": None, "projection": True,
                "config": {"unet": size.name, "structure": name, "recompute": recompute, "latent": size.latent,
                           "text": size.text, "dtype": "bfloat16"},
                **versions,
            }  # fmt: skip
            yield {
                **shared, "device": "any card", "value": memory.total / 2**30, "unit": "GiB", "batch": batch,
                "parts_gib": {part: held / 2**30 for part, held in memory.parts.items()}, "formula": "sum of the parts",
            }  # fmt: skip
            for sold, has in SIZES.items():
                found = largest_batch(kept, size.latent, size.text, has, recompute=recompute)
                yield {**shared, "device": f"{sold} GB card", "value": found, "unit": "images", "formula": FORMULA}


def table(found: list[Row]) -> str:
    """Parts first, then the largest batches."""
    whole, batches = ([row for row in found if row["unit"] == unit] for unit in ("GiB", "images"))
    parts = whole[0]["parts_gib"]
    names = [part.replace("_", " ") for part in parts]
    lines = [f"GiB at batch {whole[0]['batch']}, 512 px (counted projection)"]
    lines.append(f"{'MACs':18}{'total':>7}" + "".join(f"{name:>{len(name) + 2}}" for name in names))
    for row in whole:
        cells = (f"{row['parts_gib'][part]:{len(part) + 2}.2f}" for part in parts)
        lines.append(f"{row['case']:18}{row['value']:7.1f}" + "".join(cells))
    lines += ["", "largest batch at 512 px (counted projection)", f"{'MACs':18}" + "".join(f"{s:>5} GB" for s in SIZES)]
    for case in dict.fromkeys(row["case"] for row in batches):
        lines.append(f"{case:18}" + "".join(f"{row['value'] or '-':>8}" for row in batches if row["case"] == case))
    return "\n".join(lines)


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.counts.memory", __doc__)
    if settings.batch < 1:
        raise UserError(f"--batch {settings.batch}, wanted at least 1")
    found = rows(settings.batch)
    if settings.json:
        for row in found:
            print(json.dumps(row))
    else:
        print(table(list(found)))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
