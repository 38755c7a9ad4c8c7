"""The mini world as training material: drawn images, a concept bank sampled from the teacher, and the judging."""

from collections.abc import Sequence
from pathlib import Path

import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.bank import Concept, anchor_for, make_bank
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.worlds.mini.judge import Samples, erased_scenes, is_held_out, kept_scenes, paint, style_numbers
from bilevel_fast.worlds.mini.probe import Probe
from bilevel_fast.worlds.mini.world import SCENES, STYLES, Scene, render

_IMAGES_FROM = 1 << 42  # sample indices of the drawings that students see, far from the teacher's and the judge's


def erased_styles(names: Sequence[str]) -> list[int]:
    """Indices of the styles to erase.

    Raises:
        UserError: A name is not a style, or is the plain one: no phrase of a caption stands for it; or is there twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"style {name!r} is to be erased twice; wanted each once")
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


def concept_banks(folder: ModelFolder, config: TrainConfig, out: Path, alone: bool) -> list[Cache]:
    """A bank for each style of `config.erase`.

    Args:
        out: One style's bank lies here if it is alone, else each in a folder of its name.
        alone: Whether no earlier run has banks of its own.
    """
    if alone and len(config.erase) == 1:
        return [concept_bank(folder, config.erase[0], config, out)]
    return [concept_bank(folder, style, config, out / style) for style in config.erase]


def concept_bank(folder: ModelFolder, style: str, config: TrainConfig, out: Path) -> Cache:
    """Sample the teacher on a style's prompts, without the object-colour pairs held out for the judge."""
    (number,), concept, mini = style_numbers([style]), Concept(f"in the style of {style}"), config.mini
    prompts = [scene.caption for scene in SCENES if scene.style == number and not is_held_out(scene)]
    anchors = [anchor_for(prompt, concept) for prompt in prompts]
    # an odd stride mixes the prompts, so that a bank smaller than their number is not one colour
    order = [(7 * i) % len(prompts) for i in range(len(prompts))]
    return make_bank(
        folder,
        [prompts[i] for i in order],
        [anchors[i] for i in order],
        mini.bank,
        config.seed,
        mini.guidance,
        mini.bank_steps,
        min(48, mini.bank),
        out,
        shows=erasers.shows(config.upper.eraser),
    )


def hits(samples: Samples, erased: Sequence[int], probe: Probe) -> dict[str, float]:
    """For each erased style, the share of samples for its prompts in which the probe sees it."""
    seen = probe(samples.images).style_logits.argmax(1)
    wanted = torch.tensor([scene.style for scene in samples.scenes])
    return {STYLES[style]: round((seen[wanted == style] == style).double().mean().item(), 4) for style in erased}


def asked(erased: Sequence[int], config: TrainConfig) -> list[Scene]:
    """What a model is judged on: first the erased styles' scenes, then all others'."""
    return erased_scenes(erased, config.mini.judge_erased) + kept_scenes(erased, config.mini.judge_kept)


def portfolio(unet: UNet, folder: ModelFolder, erased: Sequence[int], config: TrainConfig) -> Samples:
    """The samples that a model is judged by, of `asked`."""
    assert isinstance(folder.vae, PixelUnshuffleVAE)
    return paint(
        unet,
        folder.schedule,
        folder.text_encoder,
        folder.vae,
        asked(erased, config),
        seed=config.seed,
        guidance=config.mini.guidance,
        steps=config.mini.judge_steps,
    )
