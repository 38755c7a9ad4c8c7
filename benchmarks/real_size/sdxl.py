"""Is a UNet of Stable Diffusion XL's family, at its full size, what diffusers makes of it? One forward pass on a CPU.

    python -m benchmarks.real_size.sdxl rows.jsonl                      KOALA-700M at 1024 px, fp32, about 6 GiB
    python -m benchmarks.real_size.sdxl rows.jsonl --model sdxl         about 14 GiB
    python -m benchmarks.real_size.sdxl rows.jsonl --latent 32          a smaller picture

Weights are random and the same for both, who share their memory; batch 1, 77 tokens, pooled state and sizes. Outputs,
and those of all blocks, are compared. Times are those of a first pass: they do not say which is quicker.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.machine import describe
from benchmarks.speed.diffusers_unet import Hooked, diffusers_unet
from benchmarks.speed.unet_providers import distance
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import write_atomic
from bilevel_fast.models.conditioning import pack
from bilevel_fast.models.sdxl import SDXL_FAMILY
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.unet_config import UNetConfig

TEXT = 77
BOUND = 1e-4
"""How far apart, relative to each other, outputs may be in fp32."""


@dataclass(frozen=True)
class Settings:
    """Settings of the check."""

    out: Annotated[Path, tyro.conf.Positional]
    """The row."""
    model: str = "koala-700m"
    """Of Stable Diffusion XL's family."""
    latent: int | None = None
    """Height and width of the latents; by default 128, of a picture of 1024 x 1024."""


def inputs(config: UNetConfig, latent: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (1, 4, H, W), t (1,) and text (1, 77 + R, 2048)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, config.in_channels, latent, latent, generator=generator)
    states = torch.randn(1, TEXT, config.cross_attention_dim, generator=generator)
    pooled, side = torch.randn(1, config.pooled_dim, generator=generator), 8.0 * latent
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]])
    return x, torch.tensor([500]), pack(states, pooled, sizes)


@torch.no_grad()
def measure(name: str, config: UNetConfig, latent: int) -> dict[str, Any]:
    """The row.

    Raises:
        UserError: Both compute something else.
    """
    torch.manual_seed(0)
    unet = UNet(config).eval().requires_grad_(False)
    given = inputs(config, latent)
    ours, seconds = timed(lambda: unet(*given))
    theirs = Hooked(diffusers_unet(unet.structure, unet.state_dict(), shared=True).eval())
    (out, blocks), their_seconds = timed(lambda: theirs(*given))
    apart = {"out": distance(ours.out, out)}
    apart |= {block: distance(a, b) for block, a, b in zip(config.blocks, ours.blocks, blocks, strict=True)}
    worst = max(apart, key=lambda block: apart[block])
    if not apart[worst] <= BOUND:
        raise UserError(f"{name}: {worst} of ours and of diffusers are {apart[worst]:.2g} apart, wanted {BOUND:.0e}")
    return {
        "suite": "sdxl_unet", "case": name, "provider": "ours", "metric": "error", "value": apart[worst],
        "unit": "relative", "p20": None, "p80": None,
        "config": {"latent": latent, "text": TEXT, "batch": 1, "dtype": "float32"},
        "parameters": sum(p.numel() for p in unet.parameters()), "worst": worst, "first_pass_s": seconds,
        "first_pass_s_diffusers": their_seconds, "peak_gib": peak() / 2**30, **describe(torch.device("cpu")),
    }  # fmt: skip


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def peak() -> int:
    """Bytes that this process held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.real_size.sdxl", __doc__)
    if settings.model not in SDXL_FAMILY:
        raise UserError(f"--model {settings.model}: there is no such UNet{nearest(settings.model, SDXL_FAMILY)}")
    config = SDXL_FAMILY[settings.model]
    row = measure(settings.model, config, settings.latent or config.sample_size)
    write_atomic(settings.out, (json.dumps(row) + "\n").encode())
    print(
        f"{row['case']}: {row['parameters']:,} parameters, error {row['value']:.2g} at most ({row['worst']}), "
        f"{row['first_pass_s']:.0f} s, diffusers {row['first_pass_s_diffusers']:.0f} s, {row['peak_gib']:.1f} GiB"
    )


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
