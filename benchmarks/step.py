"""One lower step: ours against the same step through diffusers' UNet with hooks.

    python -m benchmarks.step --device cpu
    python -m benchmarks.step --device cpu --check       fails if ours is slower than the released way

`released` transcribes how the authors' trainer computes a lower step: two diffusers UNets in NCHW, forward hooks that
collect the block outputs, one `mse_loss` per block, foreach AdamW, and the loss read by the host. Both providers get
the same weights, batch, noise and timesteps, and a dense student, since diffusers cannot hold a pruned one; the losses
are compared before anything is timed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.measure import interleaved
from bilevel_fast import errors, flags
from bilevel_fast.architecture import MINI, UNetConfig
from bilevel_fast.bilevel import Answers, FineTuning, Level, descend
from bilevel_fast.data.batches import Batch
from bilevel_fast.diffusion import Noised, Schedule
from bilevel_fast.errors import UserError, require
from bilevel_fast.optim import LevelOptimizer
from bilevel_fast.parameters import FlatParameters
from bilevel_fast.randomness import Stream, normal
from bilevel_fast.teacher import Teacher
from bilevel_fast.unet import UNet

LR = 1e-6
SAME = 1e-4  # relative difference of the losses above which the providers do not compute the same step


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    batch: int = 16
    """Images per step."""
    rounds: int = 20
    """Rounds that count."""
    json: bool = False
    """One JSON object per row instead of text."""
    check: bool = False
    """Exit with 1 if ours is slower than `released`."""


def ours(weights: dict[str, Tensor], config: UNetConfig, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """A lower step through the engine."""
    teacher, student = UNet(config), UNet(config)
    for unet in (teacher, student):
        unet.load_state_dict(weights)
        unet.to(device)
    answers = Answers(Teacher(teacher), Schedule.sd().to(device), seed=0)
    optimizer = LevelOptimizer(FlatParameters(student), LR, warmup=0)
    level = Level("lower", lambda step: batch, FineTuning(student, answers), optimizer)
    return lambda: descend(level, 0)["lower/loss"]


def released(
    weights: dict[str, Tensor], config: UNetConfig, batch: Batch, noised: Noised, device: torch.device
) -> Callable[[], Tensor]:
    """The same step, as the released trainer computes it."""
    diffusers = require("diffusers", "sd")
    blocks: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    unets = {}
    for role in blocks:
        unet = diffusers.UNet2DConditionModel.from_config(config.to_dict()).to(device)
        unet.load_state_dict(weights)
        for module in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            module.register_forward_hook(partial(_collect, blocks[role]))
        unets[role] = unet
    unets["teacher"].requires_grad_(False)
    optimizer = torch.optim.AdamW(unets["student"].parameters(), lr=LR, weight_decay=0.0, foreach=True)
    text = batch.text.to(device)

    def step() -> Tensor:
        for found in blocks.values():
            found.clear()
        with torch.no_grad():
            teacher = unets["teacher"](noised.x, noised.t, text).sample
        student = unets["student"](noised.x, noised.t, text).sample
        diffusion = (F.mse_loss(student, noised.target, reduction="none").mean((1, 2, 3)) * noised.weight).mean()
        pairs = list(zip(blocks["student"], blocks["teacher"], strict=True))
        feature = torch.stack([F.mse_loss(a, b) for a, b in pairs]).mean()
        loss = diffusion + 2.0 * F.mse_loss(student, teacher) + 0.1 * feature
        loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _collect(into: list[Tensor], module: object, args: object, out: Any) -> None:
    into.append(out[0] if isinstance(out, tuple) else out)


def measure(settings: Settings, config: UNetConfig = MINI, text_tokens: int = 12) -> list[dict[str, Any]]:
    """Time both providers, interleaved; rows of milliseconds, and of ours against `released`.

    Raises:
        UserError: There is no such device, or the providers disagree on the loss.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    device = torch.device(settings.device)
    torch.manual_seed(0)
    weights = UNet(config).state_dict()
    index = torch.arange(settings.batch)
    size = config.sample_size
    latents = normal(0, Stream.WORLD, index, (config.in_channels, size, size)).to(device)
    text = normal(0, Stream.CAPTION, index, (text_tokens, config.cross_attention_dim)).to(device)
    batch = Batch(latents, text, None, index)
    noised = Answers(Teacher(UNet(config)), Schedule.sd().to(device), seed=0).noise(batch)
    providers = {
        "ours": ours(weights, config, batch, device),
        "released": released(weights, config, batch, noised, device),
    }
    losses = {name: step().item() for name, step in providers.items()}
    if abs(losses["ours"] - losses["released"]) > SAME * abs(losses["released"]):
        raise UserError(f"the providers disagree on the loss, no time is worth measuring: {losses}")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    timings = interleaved(providers, settings.rounds, synchronize=synchronize)
    shared = {"suite": "step", "case": "lower", "config": {"batch": settings.batch, "unet": config.to_dict()}}
    speedup = timings["ours"].times_faster_than(timings["released"])
    rows = [
        {**shared, "provider": name, "metric": "ms", "value": t.p50 * 1e3, "unit": "ms", "p20": t.p20 * 1e3,
         "p80": t.p80 * 1e3}
        for name, t in timings.items()
    ]  # fmt: skip
    rows.append({**shared, "provider": "ours", "metric": "times_faster_than_released", "value": speedup.p50,
                 "unit": "x", "p20": speedup.p20, "p80": speedup.p80})  # fmt: skip
    return [{**row, **describe(device)} for row in rows]


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.step", __doc__)
    rows = measure(settings)
    for row in rows:
        if settings.json:
            print(json.dumps(row))
        else:
            name = f"{row['case']} {row['provider']} {row['metric']}"
            print(f"{name:<45}{row['value']:>9.3f} {row['unit']:<3} ({row['p20']:.3f} .. {row['p80']:.3f})")
    if settings.check and rows[-1]["value"] < 1.0:
        raise SystemExit(f"ours is slower than `released`: {rows[-1]['value']:.3f}x")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
