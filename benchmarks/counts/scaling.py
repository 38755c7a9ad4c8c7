"""What several GPUs would make of a lower step of SD 2.1 at 512 px, or of SDXL at 1024: bytes, time, efficiency.

    python -m benchmarks.counts.scaling
    python -m benchmarks.counts.scaling --unet sdxl --batch 4 --structure dense --json

A projection.

Bytes are counted: the parameters of the student, and what `training.sharded` sends of them. Times are these bytes over
published rates, with nothing lost to anything else. A step alone is the floor of `benchmarks.counts.roofline` on an
H100, with our kernels, to twice that. Upper steps send gradients twice and publish once, as their penalty has a
gradient of its own; they are rare and not in the table.

    reduce    tree: every rank sends part r of its gradient to rank r, w N (W - 1) / W bytes, past its own machine
              w N (W - g) / W over a network card of its own. ring: w N (W - 1) / W around, and 1 / g of it past a
              machine by each of its g cards
    publish   the copy that computes, 2 bytes an element, gathered as a ring
    efficiency    step / (step + what backward does not hide of reduce + what the teacher does not hide of publish); the
                  last bucket is never hidden, as backward has ended by then

with N elements, W GPUs, g of them a machine, and w = 2 bytes (bf16; 4 where a rank has several leaves). Of a step the
teacher takes 1 / (1 + 3 r) and backward 2 r / (1 + 3 r), a student of r of its MACs: forward is a third of a network's.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks import RESULTS
from benchmarks.structures import counted
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.models import macs
from bilevel_fast.models.unet import UNet
from bilevel_fast.scale.rows import BUCKET, ROW

NVLINK = 350e9
"""Bytes a second that a GPU sends within its machine: what all-to-all and rings reach on eight H100, about."""
OF_A_CARD = 0.9
"""Share of a network card's rate that carries our bytes."""
A_BUCKET = 40e-6
"""Seconds that a bucket costs beside its bytes."""
PLACES = ((1, 8, None), (8, 1, 400), (8, 1, 100), (8, 8, 400), (8, 8, 100))
"""Machines, GPUs a machine, and Gb/s of the one network card that each GPU has."""
ROOFLINES = {"sd21": RESULTS / "roofline.jsonl", "sdxl": RESULTS / "sdxl.jsonl"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the projection."""

    unet: Literal["sd21", "sdxl"] = "sd21"
    """Whose steps."""
    batch: int = 8
    """Images per GPU and step."""
    structure: str = "0.80"
    """The student: dense or 0.80; of SD 2.1 also 0.55, of SDXL ssd-1b and koala-700m."""
    leaves: int = 1
    """Leaves per GPU: with several, sums in fp32 are sent, twice the bytes."""
    json: bool = False
    """One JSON object per row instead of a table."""


def student(settings: Settings) -> tuple[int, float, float]:
    """Parameters of the student, as the engine pads them on a GPU; its share of the dense model's MACs; and the floor
    of a lower step's image on an H100, in seconds, from the committed projection."""
    size, known = counted(settings.unet)
    if settings.structure not in known:
        raise UserError(f"--structure is {settings.structure!r}, wanted one of {', '.join(known)} for {settings.unet}")
    kept = known[settings.structure]
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(size.config, kept, 8).parameters())
    return count, macs.count(kept, size.latent, size.text).ratio, _image_seconds(settings)


def _image_seconds(settings: Settings) -> float:
    path = ROOFLINES[settings.unet]
    for row in map(json.loads, path.read_text().splitlines()):
        key = (row["suite"], row["case"], row.get("provider"), row["config"].get("structure"))
        if key == ("roofline", "lower", "triton", settings.structure) and "H100" in row["device"]:
            return row["value"] / 1e3 / row["config"]["batch"]
    raise UserError(
        f"{path} has no projection of {settings.structure!r} on an H100; run benchmarks.counts.roofline --json"
    )


def seconds(size: int, nodes: int, each: int, gbits: int | None, exchanged: bool) -> float:
    """Until all ranks have sent a buffer of `size` bytes to each other, part by part, or around a ring."""
    ranks = nodes * each
    if ranks == 1:
        return 0.0
    outside = (ranks - each) if exchanged else (ranks - 1) / each
    inside = (each - 1) if exchanged else (ranks - 1) * (each > 1)
    card = (gbits or 0) * 1e9 / 8 * OF_A_CARD
    past = size * outside / ranks / card if nodes > 1 else 0.0
    buckets = -(-size // (2 * BUCKET * ROW))
    return max(past, size * inside / ranks / NVLINK) + A_BUCKET * buckets


def rows(settings: Settings) -> Iterator[Row]:
    """For each place and each way of adding up."""
    count, ratio, image = student(settings)
    width = 2 if settings.leaves == 1 else 4
    teacher, backward = (part / (1 + 3 * ratio) for part in (1, 2 * ratio))
    for nodes, each, gbits in PLACES:
        ranks = nodes * each
        publish = seconds(2 * count, nodes, each, gbits, exchanged=False)
        for reduction in ("tree", "ring"):
            reduce = seconds(width * count, nodes, each, gbits, exchanged=reduction == "tree")
            found = list[float]()
            for step in (settings.batch * image, 2 * settings.batch * image):
                left = max(reduce / -(-count // (BUCKET * ROW)), reduce - backward * step)
                found.append(step / (step + left + max(0.0, publish - teacher * step)))
            yield {
                "suite": "scaling", "metric": "projection", "projection": True,
                "unet": settings.unet, "structure": settings.structure,
                "batch_per_gpu": settings.batch, "gpus": ranks, "machines": nodes, "gbit_per_s": gbits,
                "reduction": reduction, "elements": count,
                "sent_mb": round((width + 2) * count * (ranks - 1) / ranks / 1e6),
                "state_gb": round((2 + width + (24 + 4) / ranks) * count / 1e9, 2),
                "reduce_ms": round(1e3 * reduce, 2), "publish_ms": round(1e3 * publish, 2),
                "step_ms": [round(1e3 * settings.batch * image * by, 1) for by in (1, 2)],
                "efficiency": [round(e, 3) for e in found],
            }  # fmt: skip


def table(found: list[Row]) -> str:
    """One line per row."""
    first = found[0]
    model = {"sd21": "SD 2.1", "sdxl": "SDXL"}[first["unet"]]
    lines = [
        f"projection: {model} {first['structure']}, {first['elements'] / 1e6:.1f} M parameters, "
        f"{first['batch_per_gpu']} images a GPU, {first['step_ms'][0]} to {first['step_ms'][1]} ms a step alone",
        f"{'GPUs':26}{'sums':6}{'sent MB':>8}{'state GB':>9}{'reduce ms':>10}{'publish ms':>11}{'efficiency':>14}",
    ]
    for row in found:
        net = "NVLink" if row["gbit_per_s"] is None else f"{row['gbit_per_s']} Gb/s a GPU"
        where = f"{row['gpus']}, {row['machines']} x {row['gpus'] // row['machines']}, {net}"
        share = "..".join(f"{100 * e:.0f}" for e in row["efficiency"]) + " %"
        lines.append(
            f"{where:26}{row['reduction']:6}{row['sent_mb']:>8}{row['state_gb']:>9}{row['reduce_ms']:>10}"
            f"{row['publish_ms']:>11}{share:>14}"
        )
    return "\n".join(lines)


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.counts.scaling", __doc__)
    for flag, value in (("--batch", settings.batch), ("--leaves", settings.leaves)):
        if value < 1:
            raise UserError(f"{flag} is {value}, wanted at least 1")
    found = list(rows(settings))
    if settings.json:
        for row in found:
            print(json.dumps(row))
    else:
        print(table(found))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
