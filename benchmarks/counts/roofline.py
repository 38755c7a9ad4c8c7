"""What the steps of SD 2.1 take at least on a card: every op at its ceiling, one after the other. A projection.

    python -m benchmarks.counts.roofline                          all cards of benchmarks.cards; needs no GPU
    python -m benchmarks.counts.roofline --card H200 --json
    python -m benchmarks.counts.roofline --unet sdxl              Stable Diffusion XL at 1024 px
    python -m benchmarks.counts.roofline --validate --device cpu  a step of the mini world, projected and measured

A lower step, and an upper step with and without penalty, run on the meta device in bf16, pruned widths padded to 8 as
the engine does on a GPU: the engine's own levels, of `profiling.meta_steps`. `profiling.cost` counts each op. An op
takes the longer of its FLOPs at the best measured matmul rate R and its bytes at the bandwidth W.

    torch      sum over all ops, with torch's own kernels, as eager PyTorch dispatches them; layouts as cuDNN has them
    triton     the same with this repository's Triton kernels, every one of them
    products   sum over convolutions, matrix products and attention alone: nothing else to do

The optimizer moves 28 bytes a parameter in one op of Triton's, 40 in torch's three: cast, fused AdamW, copy. Not in it:
launches (`host` is what eager PyTorch takes to dispatch them, at 5 us an op; the larger of the two counts), the loader,
copies that cuDNN makes on its own, shapes that do not fill the card. MFU is the FLOPs of the step over what R would do
in the projected time; backward of attention has five products.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.cards import CARDS, Card, Ceilings, this_machine
from benchmarks.machine import describe
from benchmarks.measure import interleaved
from benchmarks.structures import Model, counted, model
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.erasing.targets import Guidance
from bilevel_fast.models import macs
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.providers import ops
from bilevel_fast.profiling.cost import KINDS, PRODUCTS, Cost
from bilevel_fast.profiling.meta_steps import Steps
from bilevel_fast.training.levels import move

CASES = ("lower", "upper", "upper without penalty")
PROVIDERS = ("torch", "triton", "products")
FORMULA = {
    "torch": "sum over all ops of max(FLOPs / R, bytes / W)",
    "triton": "sum over all ops of max(FLOPs / R, bytes / W)",
    "products": "sum over convolutions, matrix products and attention of max(FLOPs / R, bytes / W)",
}

ERASER = Guidance(1.0)  # the default of --upper.eraser

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the projection."""

    card: str | None = None
    """Only this one; its name or a part of it."""
    unet: Literal["sd21", "sdxl"] = "sd21"
    """Whose steps."""
    batch: int = 16
    """Images per step."""
    json: bool = False
    """One JSON object per row instead of tables."""
    validate: bool = False
    """Project a lower step for the machine that is there, from ceilings measured on it, and measure the step."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to validate: the mini world in fp32 on a CPU, SD 2.1 in bf16 on a GPU."""
    rounds: int = 10
    """Steps that count when validating."""


def count(size: Model, kept: Structure, batch: int, provider: str) -> dict[str, list[Cost]]:
    """The ops of each of `CASES`, in bf16."""
    with ops(provider):
        steps = Steps(kept, size.latent, size.text, batch, torch.device("meta"), torch.bfloat16)
        levels = {"lower": steps.lower, "upper": steps.upper(ERASER), "upper without penalty": steps.upper(ERASER, 0.0)}
        return {case: steps.count(level) for case, level in levels.items()}


def seconds(cost: Cost, matmul: float, bandwidth: float) -> float:
    """What an op takes at its ceiling."""
    return max(cost.flops / matmul, cost.bytes / bandwidth)


def project(costs: Iterable[Cost], card: Card) -> dict[str, Any]:
    """Milliseconds in total and by kind, and what follows from them."""
    costs = list(costs)
    parts = dict.fromkeys(KINDS, 0.0)
    for cost in costs:
        parts[cost.kind] += 1e3 * seconds(cost, card.matmul, card.bytes_per_s)
    total = sum(parts.values())
    flops = sum(cost.flops for cost in costs)
    return {
        "value": total,
        "parts_ms": {kind: ms for kind, ms in parts.items() if ms},
        "tflop": flops / 1e12,
        "gb": sum(cost.bytes for cost in costs) / 1e9,
        "mfu": flops / (total / 1e3) / card.matmul,
        "launches": len(costs),
        "host_ms": 1e3 * len(costs) * card.launch_s,
    }


def rows(cards: dict[str, Card], batch: int, unet: Literal["sd21", "sdxl"] = "sd21") -> Iterator[Row]:
    """One row for each card, structure, case and provider."""
    size, structures = counted(unet)
    versions = {
        key: value for key, value in describe(torch.device("cpu")).items() if key in ("torch", "commit", "date")
    }
    for name, kept in structures.items():
        config = {"unet": size.name, "structure": name, "batch": batch, "latent": size.latent, "text": size.text}
        config |= {"mac_ratio": macs.count(kept, size.latent, size.text).ratio, "dtype": "bfloat16"}
        of = {provider: count(size, kept, batch, provider) for provider in ("torch", "triton")}
        for case in CASES:
            products = [cost for cost in of["torch"][case] if cost.kind in PRODUCTS]
            costs = {"torch": of["torch"][case], "triton": of["triton"][case], "products": products}
            for place, card in cards.items():
                rates = {"matmul_tflop_per_s": card.matmul / 1e12, "gb_per_s": card.bytes_per_s / 1e9}
                for provider in PROVIDERS:
                    found = project(costs[provider], card)
                    yield {
                        "suite": "roofline", "case": case, "provider": provider, "metric": "projection", "unit": "ms",
                        **found, "p20": None, "p80": None, "images_per_second": batch / found["value"] * 1e3,
                        "projection": True, "formula": FORMULA[provider], "rates": rates, "config": config,
                        "device": place, **versions,
                    }  # fmt: skip


def validate(device: torch.device, batch: int, rounds: int) -> Row:
    """A lower step of a dense student: what it should take at the ceilings of this machine, and what it takes."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    size = model(tiny=not cuda)
    ceilings: Ceilings = this_machine(device, dtype)
    with ops("torch"):
        kept, align = Structure.dense(size.config), 8 if cuda else 1
        steps = Steps(kept, size.latent, size.text, batch, device, dtype, align)
        predicted = 1e3 * sum(seconds(cost, ceilings.matmul, ceilings.copy) for cost in steps.count(steps.lower))
        call, wait = lambda: move(steps.lower, steps.batch), torch.cuda.synchronize if cuda else lambda: None
        timing = interleaved({"step": call}, rounds, synchronize=wait)["step"]
    return {
        "suite": "roofline_validation", "case": "lower", "provider": "torch", "metric": "ms", "unit": "ms",
        "value": 1e3 * timing.p50, "p20": 1e3 * timing.p20, "p80": 1e3 * timing.p80,
        "predicted": predicted, "error": predicted / (1e3 * timing.p50) - 1, "formula": FORMULA["torch"],
        "rates": {"matmul_tflop_per_s": ceilings.matmul / 1e12, "gb_per_s": ceilings.copy / 1e9},
        "config": {"unet": size.name, "structure": "dense", "batch": batch, "latent": size.latent, "text": size.text,
                   "dtype": str(dtype).removeprefix("torch.")},
        **describe(device),
    }  # fmt: skip


def table(found: list[Row]) -> str:
    """One card: a line for each structure, case and provider."""
    first = found[0]
    rates = first["rates"]
    lines = [
        f"{first['device']}: R = {rates['matmul_tflop_per_s']:.1f} TFLOP/s (measured by others), "
        f"W = {rates['gb_per_s']:.0f} GB/s (data sheet); projections, batch {first['config']['batch']}",
        f"{'MACs':11}{'case':24}{'ops':10}{'ms':>8}{'img/s':>8}{'MFU':>6}{'ops':>7}{'host ms':>9}   share of the time",
    ]
    for row in found:
        shares = sorted(((ms / row["value"], kind) for kind, ms in row["parts_ms"].items()), reverse=True)
        share = "  ".join(f"{kind} {part:.0%}" for part, kind in shares if part >= 0.005)
        lines.append(
            f"{row['config']['structure']:11}{row['case']:24}{row['provider']:10}{row['value']:8.1f}"
            f"{row['images_per_second']:8.1f}{row['mfu']:6.0%}{row['launches']:7}{row['host_ms']:9.1f}   {share}"
        )
    return "\n".join(lines)


def chosen(card: str | None) -> dict[str, Card]:
    """The cards of that name, or all.

    Raises:
        UserError: There is none, or more than one.
    """
    if card is None:
        return CARDS
    found = {name: known for name, known in CARDS.items() if card.lower() in name.lower()}
    if len(found) != 1:
        raise UserError(f"--card {card}: {len(found)} cards of that name{nearest(card, CARDS)}")
    return found


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.counts.roofline", __doc__)
    if settings.batch < 1:
        raise UserError(f"--batch {settings.batch}, wanted at least 1")
    if settings.validate:
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no GPU")
        row = validate(torch.device(settings.device), settings.batch, max(settings.rounds, 2))
        if settings.json:
            print(json.dumps(row))
        else:
            rates = row["rates"]
            print(
                f"{row['device']}: {rates['matmul_tflop_per_s']:.3f} TFLOP/s, "
                f"copy {rates['gb_per_s']:.1f} GB/s, measured"
            )
            print(
                f"lower step, {row['config']['unet']}, batch {settings.batch}: projected {row['predicted']:.1f} ms, "
                f"measured {row['value']:.1f} ms ({row['p20']:.1f} .. {row['p80']:.1f}), error {row['error']:+.0%}"
            )
        return
    found = list(rows(chosen(settings.card), settings.batch, settings.unet))
    if settings.json:
        for row in found:
            print(json.dumps(row))
        return
    for place in dict.fromkeys(row["device"] for row in found):
        print(table([row for row in found if row["device"] == place]), end="\n\n")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
