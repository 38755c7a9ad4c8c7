"""What each site of SD 2.1 takes at least on a card, whatever is kept of it: rows for a budget of time. A projection.

    python -m benchmarks.counts.roofline_sites --card A6000 --out sites.jsonl
    python -m bilevel_fast.prune magnitude --teacher TEACHER --latency sites.jsonl --budget 0.8 --out runs/pruned

A forward pass of every distinct site alone, in bf16, by the model of benchmarks.counts.roofline: each op of torch at
its
ceiling, one after the other, no launches. Inner widths of ResNets are padded to 8 as the engine pads them on a GPU. The
rows have the fields of `benchmarks.speed.unet --sites`, which measures the same where there is a card.

In this model the time of a Transformer is a sum over its width vectors. So rows along one path hold all of it: attn1
widens from one unit to all, then attn2, then ff. Counts between two others that time is linear in are left out, as who
reads the rows interpolates.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cards import Card
from benchmarks.counts.roofline import FORMULA, chosen, seconds
from benchmarks.machine import describe
from benchmarks.speed.unet_sites import call_of, shapes
from benchmarks.structures import Model, model
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic
from bilevel_fast.models.architecture import Site
from bilevel_fast.models.layers import ResNet, Transformer
from bilevel_fast.models.structure import Structure
from bilevel_fast.profiling.cost import Cost, Counter

ALIGN = 8
LIKE = torch.empty(0, device="meta", dtype=torch.bfloat16)
LINEAR = 1e-9
"""Relative: a time that is closer than this to the line between its neighbours' is on it."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the projection."""

    card: str
    """A card of `benchmarks.cards`; its name or a part of it."""
    batch: int = 2
    """Images per evaluation; guidance makes two of one."""
    tiny: bool = False
    """The mini world's UNet instead of SD 2.1's."""
    out: Path | None = None
    """Write the rows to this file instead of printing them."""


def costs(site: Site, kept: Mapping[str, int], size: Model, batch: int) -> list[Cost]:
    """The ops of one site with so many units of each width vector."""
    dense = Structure.dense(size.config)
    found = replace(dense, kept={**dense.kept, site.name: {name: tuple(range(n)) for name, n in kept.items()}})
    with torch.device("meta"):
        module: nn.Module = (
            ResNet(site, kept["groups"], size.config, ALIGN) if site.kind == "resnet" else Transformer(site, (), found)
        )
    module.to(LIKE.dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    call = call_of(module, site, size, batch, LIKE)  # on torch, as on all hardware that the table does not know
    with Counter() as counter:
        call()
    return counter.costs


def path(site: Site) -> Iterator[list[dict[str, int]]]:
    """Counts of all width vectors, in legs: one vector widens, those before it have all units, those after it one."""
    for i, width in enumerate(site.widths):
        others = {w.name: w.units if j < i else 1 for j, w in enumerate(site.widths)}
        yield [{**others, width.name: k} for k in range(1, width.units + 1)]


def times(site: Site, size: Model, batch: int, card: Card) -> list[tuple[dict[str, int], float]]:
    """Kept counts and milliseconds at the corners of the path, each once."""
    found: list[tuple[dict[str, int], float]] = []
    for leg in path(site):
        ms = [
            1e3 * sum(seconds(cost, card.matmul, card.bytes_per_s) for cost in costs(site, kept, size, batch))
            for kept in leg
        ]
        last = len(leg) - 1
        bends = [i for i in range(1, last) if abs(ms[i - 1] - 2 * ms[i] + ms[i + 1]) > LINEAR * ms[last]]
        found += [
            (leg[i], ms[i]) for i in dict.fromkeys((0, *bends, last)) if leg[i] not in (kept for kept, _ in found)
        ]
    return found


def rows(size: Model, name: str, card: Card, batch: int) -> Iterator[Row]:
    """The rows of all distinct sites, those of one after those of the other."""
    versions = {k: v for k, v in describe(torch.device("cpu")).items() if k in ("torch", "commit", "date")}
    rates = {"matmul_tflop_per_s": card.matmul / 1e12, "gb_per_s": card.bytes_per_s / 1e9}
    command = (
        f"python -m benchmarks.counts.roofline_sites --card '{name}' --batch {batch}{' --tiny' * (size.name == 'mini')}"
    )
    for same in shapes(size.config):
        site = same[0]
        pixels = -(-size.latent // site.stride)
        what = f"{size.name} {site.kind} {site.in_channels}->{site.out_channels} {pixels}x{pixels} b{batch}"
        for kept, ms in times(site, size, batch, card):
            config = {
                "model": size.name, "sites": [s.name for s in same], "batch": batch, "latent": size.latent,
                "text": size.text, "kept": kept, "align": ALIGN, "dtype": "bfloat16",
            }  # fmt: skip
            yield {
                "suite": "unet_sites", "case": f"{what} {'-'.join(map(str, kept.values()))}", "provider": "torch",
                "metric": "projection", "unit": "ms", "value": ms, "p20": None, "p80": None, "projection": True,
                "formula": FORMULA["torch"], "rates": rates, "config": config, "device": name, "command": command,
                **versions,
            }  # fmt: skip


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.counts.roofline_sites", __doc__)
    if settings.batch < 1:
        raise UserError(f"--batch {settings.batch}, wanted at least 1")
    ((name, card),) = chosen(settings.card).items()
    lines = [json.dumps(row) for row in rows(model(settings.tiny), name, card, settings.batch)]
    if settings.out is None:
        print("\n".join(lines))
    else:
        write_atomic(settings.out, "".join(f"{line}\n" for line in lines).encode())


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
