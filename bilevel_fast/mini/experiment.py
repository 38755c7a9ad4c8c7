"""The mini world as training material: drawn images, a concept bank sampled from the teacher, and the judging."""

from collections.abc import Sequence
from pathlib import Path

import torch

from bilevel_fast.config import TrainConfig
from bilevel_fast.data.bank import Concept, anchor_for, make_bank
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.erasing import upper as erasers
from bilevel_fast.errors import UserError
from bilevel_fast.folder import ModelFolder
from bilevel_fast.mini.judge import Samples, erased_scenes, is_held_out, kept_scenes, paint, style_numbers
from bilevel_fast.mini.vae import PixelUnshuffleVAE
from bilevel_fast.mini.world import SCENES, STYLES, render
from bilevel_fast.unet import UNet

_IMAGES_FROM = 1 << 42  # sample indices of the drawings that students see, far from the teacher's and the judge's


def erased_styles(names: Sequence[str]) -> list[int]:
    """Indices of the styles to erase.

    Raises:
        UserError: A name is not a style, or is the plain one: no phrase of a caption stands for it.
    """
    if "plain" in names:
        raise UserError("style 'plain' cannot be erased: no phrase of a caption stands for it")
    return style_numbers(names)


def drawn_source(vae: PixelUnshuffleVAE, erased: Sequence[int], count: int, seed: int) -> MemorySource:
    """Drawn training images of every style that is not erased, as nobody fine-tunes on what must go.

    Args:
        vae: Makes the latents.
        erased: Styles to leave out.
        count: Images; the scenes take turns.
        seed: Of the drawings.
    """
    scenes = [scene for scene in SCENES if scene.style not in erased]
    scenes = [scenes[i % len(scenes)] for i in range(count)]
    labels = torch.tensor([(s.object, s.color, s.style) for s in scenes]).T
    images = render(*labels, seed=seed, indices=range(_IMAGES_FROM, _IMAGES_FROM + count))
    return MemorySource(vae.moments(images)[:, None], [[scene.caption] for scene in scenes])


def concept_bank(folder: ModelFolder, erased: Sequence[int], config: TrainConfig, out: Path) -> Cache:
    """Sample the teacher on the erased styles' prompts, without the object-colour pairs held out for the judge."""
    prompts, anchors = [], []
    for scene in SCENES:
        if scene.style in erased and not is_held_out(scene):
            prompts.append(scene.caption)
            anchors.append(anchor_for(scene.caption, Concept(f"in the style of {STYLES[scene.style]}")))
    count, mini = config.mini.bank * len(erased), config.mini
    # an odd stride mixes the prompts, so that a bank smaller than their number is not one colour of one style
    order = [(7 * i) % len(prompts) for i in range(len(prompts))]
    return make_bank(
        folder,
        [prompts[i] for i in order],
        [anchors[i] for i in order],
        count,
        config.seed,
        mini.guidance,
        mini.bank_steps,
        min(48, count),
        out,
        shows=erasers.shows(config.upper.eraser),
    )


def portfolio(unet: UNet, folder: ModelFolder, erased: Sequence[int], config: TrainConfig) -> Samples:
    """The samples a model is judged by: first the erased styles' prompts, then all others."""
    assert isinstance(folder.vae, PixelUnshuffleVAE)
    scenes = erased_scenes(erased, config.mini.judge_erased) + kept_scenes(erased, config.mini.judge_kept)
    return paint(
        unet,
        folder.schedule,
        folder.text_encoder,
        folder.vae,
        scenes,
        seed=config.seed,
        guidance=config.mini.guidance,
        steps=config.mini.judge_steps,
    )
