"""The mini world as `worlds.World`: drawn images, concept banks sampled from the teacher, and the judging."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.bank import Concept, Shows, anchor_for, make_bank
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.models.unet import UNet
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.worlds.mini import TEACHER as TEACHER
from bilevel_fast.worlds.mini.judge import Samples, erased_scenes, is_held_out, judge, kept_scenes, paint, style_numbers
from bilevel_fast.worlds.mini.probe import Probe
from bilevel_fast.worlds.mini.settings import Mini
from bilevel_fast.worlds.mini.world import SCENES, STYLES, Scene, render

_IMAGES_FROM = 1 << 42  # sample indices of the drawings that students see, far from the teacher's and the judge's


def erased_concepts(names: Sequence[str]) -> list[int]:
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


def drawn_source(folder: ModelFolder, erased: Sequence[int], count: int, seed: int) -> MemorySource:
    """Drawn training images of every style that is not erased, as nobody fine-tunes on what must go.

    Args:
        folder: Its VAE makes the latents.
        erased: Styles to leave out.
        count: Images; the scenes take turns.
        seed: Of the drawings.
    """
    scenes = [scene for scene in SCENES if scene.style not in erased]
    scenes = [scenes[i % len(scenes)] for i in range(count)]
    labels = torch.tensor([(s.object, s.color, s.style) for s in scenes]).T
    images = render(*labels, seed=seed, indices=range(_IMAGES_FROM, _IMAGES_FROM + count))
    assert isinstance(folder.vae, PixelUnshuffleVAE)
    return MemorySource(folder.vae.moments(images)[:, None], [[scene.caption] for scene in scenes])


def concept_banks(
    folder: ModelFolder,
    names: Sequence[str],
    settings: Mini,
    seed: int,
    out: Path,
    *,
    alone: bool = True,
    shows: Shows = "prompt",
) -> list[Cache]:
    """A bank for each style.

    Args:
        folder: The teacher's.
        names: Of the styles.
        settings: How many samples, and how they are drawn.
        seed: Of their noise.
        out: One style's bank lies here if it is alone, else each in a folder of its name.
        alone: Whether no earlier run has banks of its own.
        shows: What the images are drawn by: see `make_bank`.
    """
    if alone and len(names) == 1:
        return [concept_bank(folder, names[0], settings, seed, out, shows)]
    return [concept_bank(folder, style, settings, seed, out / style, shows) for style in names]


def concept_bank(folder: ModelFolder, style: str, settings: Mini, seed: int, out: Path, shows: Shows) -> Cache:
    """Sample the teacher on a style's prompts, without the object-colour pairs held out for the judge."""
    (number,), concept = style_numbers([style]), Concept(f"in the style of {style}")
    prompts = [scene.caption for scene in SCENES if scene.style == number and not is_held_out(scene)]
    anchors = [anchor_for(prompt, concept) for prompt in prompts]
    # an odd stride mixes the prompts, so that a bank smaller than their number is not one colour
    order = [(7 * i) % len(prompts) for i in range(len(prompts))]
    return make_bank(
        folder,
        [prompts[i] for i in order],
        [anchors[i] for i in order],
        settings.bank,
        seed,
        settings.guidance,
        settings.bank_steps,
        min(48, settings.bank),
        out,
        shows=shows,
    )


def subjects() -> list[str]:
    """Captions of plain scenes that are not held out for the judge."""
    return [scene.caption for scene in SCENES if not scene.style and not is_held_out(scene)]


def hits(samples: Samples, erased: Sequence[int]) -> dict[str, float]:
    """For each erased style, the share of samples for its prompts in which the probe sees it."""
    seen = Probe.load()(samples.images).style_logits.argmax(1)
    wanted = torch.tensor([scene.style for scene in samples.scenes])
    return {STYLES[style]: round((seen[wanted == style] == style).double().mean().item(), 4) for style in erased}


def quality(samples: Samples, erased: Sequence[int]) -> dict[str, float]:
    """What the judge finds: `judge.Quality` by field."""
    return asdict(judge(samples, erased, Probe.load()))


def shares(erased: Sequence[int], settings: Mini) -> dict[str, int]:
    """How many samples each share of `quality` is of."""
    gone, kept = len(erased_scenes(erased, settings.judge_erased)), len(kept_scenes(erased, settings.judge_kept))
    counts = {"concept_hit": gone, "content_kept": gone}
    return counts | dict.fromkeys(("other_style_hit", "object", "color"), kept)


def shown(count: int, erased: Sequence[int], settings: Mini) -> list[int]:
    """Which of `count` samples stand for all of them in a picture: six of erased styles, then six of others.

    Their strides are prime to how the scenes are laid out, so they show different objects, colours and styles.
    """
    first = len(erased) * settings.judge_erased
    return [(5 * i) % first for i in range(6)] + [first + (29 * i) % (count - first) for i in range(6)]


def asked(erased: Sequence[int], settings: Mini) -> list[Scene]:
    """What a model is judged on: first the erased styles' scenes, then all others'."""
    return erased_scenes(erased, settings.judge_erased) + kept_scenes(erased, settings.judge_kept)


def portfolio(unet: UNet, folder: ModelFolder, erased: Sequence[int], settings: Mini, seed: int) -> Samples:
    """The samples that a model is judged by, of `asked`."""
    return kept_away(unet, folder, erased, settings, seed, None)


def kept_away(
    unet: UNet, folder: ModelFolder, erased: Sequence[int], settings: Mini, seed: int, safe: Safe | None
) -> Samples:
    """The same, all of them kept away from a concept while they are sampled; as they are where that is None."""
    assert isinstance(folder.vae, PixelUnshuffleVAE)
    return paint(
        unet,
        folder.schedule,
        folder.text_encoder,
        folder.vae,
        asked(erased, settings),
        seed=seed,
        guidance=settings.guidance,
        steps=settings.judge_steps,
        safe=safe,
    )
