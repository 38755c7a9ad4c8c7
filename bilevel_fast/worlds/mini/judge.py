"""How a model of the mini world is judged: sample it, let the probe look, count.

    concept_hit      share of samples for the erased styles' prompts in which the probe sees that style: should fall
    content_kept     share of the same samples in which object and colour are both as asked: should stay
    other_style_hit  share of samples for all other prompts with the style as asked: should stay
    object, color    the same for object and colour
    fid              Frechet distance of the probe's features between those samples and drawings of the same scenes

The object-colour pairs that erased styles are judged on never occur in the concept bank (`is_held_out`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.metrics.frechet import FrechetStatistics, frechet_distance
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.sampling.generate import generate
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.worlds.mini.probe import Probe
from bilevel_fast.worlds.mini.world import COLORS, OBJECTS, SCENES, STYLES, Scene, render

_DRAWINGS_PER_SCENE = 10
_DRAWINGS_FROM = 1 << 41  # sample indices of the reference drawings, far from every training's


@dataclass(frozen=True)
class Quality:
    """What the judge found; shares lie in [0, 1]."""

    concept_hit: float
    content_kept: float
    other_style_hit: float
    object: float
    color: float
    fid: float


@dataclass(frozen=True)
class Samples:
    """A model's images (N, 3, 32, 32) in [-1, 1], and what each should show."""

    images: Tensor
    scenes: tuple[Scene, ...]

    @property
    def captions(self) -> list[str]:
        """What each image was asked for by."""
        return [scene.caption for scene in self.scenes]


def style_numbers(names: Sequence[str]) -> list[int]:
    """Indices of styles.

    Raises:
        UserError: A name is not a style, or all styles are named.
    """
    for name in names:
        if name not in STYLES:
            raise UserError(f"style {name!r} does not exist{nearest(name, STYLES)}")
    if len(set(names)) == len(STYLES):
        raise UserError("all styles are named, none is left to keep")
    return sorted({STYLES.index(name) for name in names})


def is_held_out(scene: Scene) -> bool:
    """A third of the object-colour pairs, each object and each colour equally often: judged, never in a bank."""
    return (scene.object + scene.color) % 3 == 0


def erased_scenes(styles: Sequence[int], count: int) -> list[Scene]:
    """`count` held-out scenes per erased style, going round the object-colour pairs."""
    return [scene for style in styles for scene in _round([s for s in _of(style) if is_held_out(s)], count)]


def kept_scenes(styles: Sequence[int], count: int) -> list[Scene]:
    """`count` scenes per style that is not erased."""
    return [scene for style in range(len(STYLES)) if style not in styles for scene in _round(_of(style), count)]


def _of(style: int) -> list[Scene]:
    return [scene for scene in SCENES if scene.style == style]


def _round(scenes: list[Scene], count: int) -> list[Scene]:
    # a stride prime to both tables, so that a short round is a mix and not one colour
    return [scenes[(7 * i) % len(scenes)] for i in range(count)]


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
) -> Samples:
    """Sample one image per scene with DDIM; image i starts from the same noise for every model.

    `safe` keeps all of them away from a concept.
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
    )
    return Samples(vae.decode(latents).clamp(-1, 1), tuple(scenes))


@torch.no_grad()
def judge(samples: Samples, erased: Sequence[int], probe: Probe) -> Quality:
    """Count what the probe sees in samples of `erased_scenes` and `kept_scenes` together."""
    seen = probe(samples.images)
    wanted = torch.tensor([(s.object, s.color, s.style) for s in samples.scenes])
    heads = (seen.object_logits, seen.color_logits, seen.style_logits)
    right = torch.stack([h.argmax(1) for h in heads], dim=1) == wanted  # (N, 3)
    gone = torch.isin(wanted[:, 2], torch.tensor(list(erased)))
    kept = [scene for scene, out in zip(samples.scenes, gone.tolist(), strict=True) if not out]
    drawn = FrechetStatistics.of(probe(_drawings(kept)).features)

    def share(rows: Tensor) -> float:
        return round(rows.double().mean().item(), 4)

    return Quality(
        concept_hit=share(right[gone, 2]),
        content_kept=share(right[gone, 0] & right[gone, 1]),
        other_style_hit=share(right[~gone, 2]),
        object=share(right[~gone, 0]),
        color=share(right[~gone, 1]),
        fid=round(frechet_distance(FrechetStatistics.of(seen.features[~gone]), drawn), 4),
    )


def _drawings(scenes: Sequence[Scene]) -> Tensor:
    """Reference images: each distinct scene drawn equally often."""
    each = sorted(set(scenes), key=lambda s: (s.style, s.color, s.object)) * _DRAWINGS_PER_SCENE
    labels = torch.tensor([(s.object, s.color, s.style) for s in each]).T
    return render(*labels, seed=0, indices=range(_DRAWINGS_FROM, _DRAWINGS_FROM + len(each)))


assert len(OBJECTS) == len(COLORS) == 6, "is_held_out and the round trips assume a 6 x 6 table"
