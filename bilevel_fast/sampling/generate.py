"""Prompts to latents: batched sampling, one seed index per prompt, so an image does not depend on its batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import Prediction, UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.sampling.samplers import Method, guided, sample
from bilevel_fast.scale.shares import joined
from bilevel_fast.scale.team import ALONE, Team

Model = Callable[[Tensor, Tensor, Tensor], Prediction]
"""model(x (B, C, H, W), t (B,), text (B, L, D)), such as a UNet"""


def generate(
    unet: UNet,
    schedule: Schedule,
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    indices: Sequence[int],
    *,
    seed: int,
    size: tuple[int, int],
    guidance: float,
    steps: int,
    method: Method = "pndm",
    stream: Stream = Stream.INITIAL,
    batch: int = 36,
    model: Callable[[slice], Model] | None = None,
    safe: Safe | None = None,
    progress: Callable[[int], None] | None = None,
    team: Team = ALONE,
) -> Tensor:
    """Sample latents with classifier-free guidance.

    Args:
        prompts: N prompts.
        indices: N sample indices; noise is a pure function of (seed, stream, index).
        size: Latent height and width.
        batch: Prompts per call of the UNet, which sees twice as many rows.
        model: What to call in place of `unet` for some of the prompts, given which. It may be called with all of their
            rows, or with twice as many: without the prompts, then with them; thrice with `safe`.
        safe: What to keep away from (Safe Latent Diffusion); it wants a third row for each prompt.
        progress: Called after each batch with the number of prompts done.
        team: Ranks that share the batches; each has a `unet` of its own.

    Returns:
        (N, C, H, W) fp32 latents on the CPU, on every rank.
    """
    device = next(unet.parameters()).device
    shape = (unet.config.in_channels, *size)
    null = text_encoder.encode([""]).to(device)
    starts = range(0, len(prompts), batch)

    def drawn(start: int) -> Tensor:
        rows = slice(start, start + batch)
        text = text_encoder.encode(prompts[rows]).to(device)
        x_T = normal(seed, stream, list(indices[rows]), shape).to(device)
        call = unet if model is None else model(rows)
        if safe is None:
            predict = guided(call, text, null, guidance)
        else:
            predict = safe.predictor(call, text, null, text_encoder, guidance, schedule)
        return sample(predict, x_T, schedule, steps, method)

    sizes, done = [len(prompts[start : start + batch]) for start in starts], list[Tensor]()
    for latents in joined(team, sizes, map(drawn, team.ranks.share(starts))):
        done.append(latents)
        if progress:
            progress(sum(map(len, done)))
    return torch.cat(done)
