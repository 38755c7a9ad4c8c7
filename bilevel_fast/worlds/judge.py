"""How a model of a drawn world is judged: sample it, let the probe look, count.

    concept_hit      share of samples for the erased styles' prompts in which the probe sees that style: should fall
    content_kept     share of the same samples in which all but the style is as asked: should stay
    other_style_hit  share of samples for all other prompts with the style as asked: should stay
    relative_hit     the same, of the styles alone that draw like an erased one; only in a world that has such
    object, color    the same for object and colour, or whatever else the world's images show
    fid              Frechet distance of the probe's features between those samples and drawings of the same scenes

What erased styles are judged on never occurs in the concept bank (`Drawings.is_held_out`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.metrics.frechet import FrechetStatistics, frechet_distance
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.sampling.generate import generate
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.scale.team import ALONE, Team
from bilevel_fast.worlds.probe import Probe, labels
from bilevel_fast.worlds.scenes import Drawings, Scene

_DRAWINGS_PER_SCENE = 10
_DRAWINGS_FROM = 1 << 41  # sample indices of the reference drawings, far from every training's


@dataclass(frozen=True)
class Samples:
    """A model's images (N, 3, 32, 32) in [-1, 1], and what each should show."""

    images: Tensor
    scenes: tuple[Scene, ...]

    @property
    def captions(self) -> list[str]:
        """What each image was asked for by."""
        return [scene.caption for scene in self.scenes]


def paint(
    unet: UNet,
    schedule: Schedule,
    text_encoder: TextEncoder,
    vae: PixelUnshuffleVAE,
    scenes: Sequence[Scene],
    *,
    seed: int,
    guidance: float,
    steps: int,
    safe: Safe | None = None,
    team: Team = ALONE,
) -> Samples:
    """Sample one image per scene with DDIM; image i starts from the same noise for every model.

    `safe` keeps all of them away from a concept. The ranks of `team` share the sampling, and all have all samples.
    """
    size = unet.config.sample_size, unet.config.sample_size
    prompts = [scene.caption for scene in scenes]
    latents = generate(
        unet,
        schedule,
        text_encoder,
        prompts,
        range(len(prompts)),
        seed=seed,
        size=size,
        guidance=guidance,
        steps=steps,
        method="ddim",
        safe=safe,
        team=team,
    )
    return Samples(vae.decode(latents).clamp(-1, 1), tuple(scenes))


@torch.no_grad()
def judge(samples: Samples, erased: Sequence[int], world: Drawings[Any], probe: Probe) -> dict[str, float]:
    """Count what the probe sees in samples of `erased_scenes` and `kept_scenes` together; shares lie in [0, 1]."""
    seen, wanted = probe(samples.images), labels(samples.scenes)
    right = seen.labels == wanted  # (N, heads)
    gone = torch.isin(wanted[:, -1], torch.tensor(list(erased)))
    kept = [scene for scene, out in zip(samples.scenes, gone.tolist(), strict=True) if not out]
    drawn = FrechetStatistics.of(probe(_drawings(kept, world)).features)

    def share(rows: Tensor) -> float:
        return round(rows.double().mean().item(), 4)

    found = {
        "concept_hit": share(right[gone, -1]),
        "content_kept": share(right[gone, :-1].all(1)),
        "other_style_hit": share(right[~gone, -1]),
    }
    if near := relatives(erased, world):
        found["relative_hit"] = share(right[torch.isin(wanted[:, -1], torch.tensor(near)), -1])
    found |= {head: share(right[~gone, i]) for i, head in enumerate(list(world.heads)[:-1])}
    return found | {"fid": round(frechet_distance(FrechetStatistics.of(seen.features[~gone]), drawn), 4)}


def relatives(erased: Sequence[int], world: Drawings[Any]) -> list[int]:
    """Styles that stay and draw like an erased one."""
    near = {name for style in erased for name in world.relatives.get(world.styles[style], ())}
    return [style for style, name in enumerate(world.styles) if name in near and style not in erased]


def _drawings(scenes: Sequence[Scene], world: Drawings[Any]) -> Tensor:
    """Reference images: each distinct scene drawn equally often."""
    asked = set(scenes)
    each = [scene for scene in world.scenes if scene in asked] * _DRAWINGS_PER_SCENE
    return world.render(each, 0, range(_DRAWINGS_FROM, _DRAWINGS_FROM + len(each)))
