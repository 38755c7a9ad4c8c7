"""A drawn world as `worlds.World`: drawn images, concept banks sampled from the teacher, and the judging."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from bilevel_fast.data.bank import Concept, Shows, anchor_for, make_bank
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.models.unet import UNet
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.scale.team import ALONE, Team
from bilevel_fast.worlds.judge import Samples, judge, paint, relatives
from bilevel_fast.worlds.likeness import Likeness, likeness
from bilevel_fast.worlds.probe import Probe, labels
from bilevel_fast.worlds.scenes import Drawings, S
from bilevel_fast.worlds.settings import Drawn

_IMAGES_FROM = 1 << 42  # sample indices of the drawings that students see, far from the teacher's and the judge's


@dataclass(frozen=True, eq=False)
class DrawnWorld(Drawings[S]):
    """A world of drawings with a teacher and a probe; its concepts are the numbers of its styles."""

    @property
    def TEACHER(self) -> Path:
        """The model folder of the shipped teacher."""
        return self.teacher

    @cached_property
    def probe(self) -> Probe:
        """The shipped probe."""
        return Probe.load(self)

    def drawn_source(self, folder: ModelFolder, erased: Sequence[int], count: int, seed: int) -> MemorySource:
        """Drawn training images of every style that is not erased, as nobody fine-tunes on what must go.

        Args:
            folder: Its VAE makes the latents.
            erased: Styles to leave out.
            count: Images; the scenes take turns.
            seed: Of the drawings.
        """
        scenes = [scene for scene in self.scenes if scene.style not in erased]
        scenes = [scenes[i % len(scenes)] for i in range(count)]
        images = self.render(scenes, seed, range(_IMAGES_FROM, _IMAGES_FROM + count))
        assert isinstance(folder.vae, PixelUnshuffleVAE)
        return MemorySource(folder.vae.moments(images)[:, None], [[scene.caption] for scene in scenes])

    def concept_banks(
        self,
        folder: ModelFolder,
        names: Sequence[str],
        settings: Drawn,
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
            return [self.concept_bank(folder, names[0], settings, seed, out, shows)]
        return [self.concept_bank(folder, style, settings, seed, out / style, shows) for style in names]

    def concept_bank(
        self, folder: ModelFolder, style: str, settings: Drawn, seed: int, out: Path, shows: Shows
    ) -> Cache:
        """Sample the teacher on a style's prompts, without the scenes held out for the judge."""
        prompts, anchors = self.known(*self.numbers([style]))
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

    def known(self, style: int) -> tuple[list[str], list[str]]:
        """Prompts for a style that are not held out for the judge, and what is asked for instead."""
        prompts = [scene.caption for scene in self.of_style(style) if not self.is_held_out(scene)]
        return prompts, [anchor_for(prompt, Concept(self.phrase(style))) for prompt in prompts]

    def subjects(self) -> list[str]:
        """Captions of scenes of style 0 that are not held out for the judge."""
        return [scene.caption for scene in self.of_style(0) if not self.is_held_out(scene)]

    def asked(self, erased: Sequence[int], settings: Drawn) -> list[S]:
        """What a model is judged on: first the erased styles' scenes, then all others'."""
        return self.erased_scenes(erased, settings.judge_erased) + self.kept_scenes(erased, settings.judge_kept)

    def portfolio(
        self,
        unet: UNet,
        folder: ModelFolder,
        erased: Sequence[int],
        settings: Drawn,
        seed: int,
        team: Team = ALONE,
        safe: Safe | None = None,
    ) -> Samples:
        """The samples that a model is judged by, of `asked`; `safe` and `team`: see `judge.paint`."""
        assert isinstance(folder.vae, PixelUnshuffleVAE)
        return paint(
            unet,
            folder.schedule,
            folder.text_encoder,
            folder.vae,
            self.asked(erased, settings),
            seed=seed,
            guidance=settings.guidance,
            steps=settings.judge_steps,
            safe=safe,
            team=team,
        )

    def hits(self, samples: Samples, erased: Sequence[int]) -> dict[str, float]:
        """For each erased style, the share of samples for its prompts in which the probe sees it."""
        shares = self.style_shares(samples)
        return {self.styles[style]: round(shares[self.styles[style]], 4) for style in erased}

    @torch.no_grad()
    def style_shares(self, samples: Samples) -> dict[str, float]:
        """For each style, the share of samples for its prompts in which the probe sees it."""
        seen = self.probe(samples.images).style_logits.argmax(1)
        wanted = torch.tensor([scene.style for scene in samples.scenes])
        return {name: (seen[wanted == style] == style).double().mean().item() for style, name in enumerate(self.styles)}

    @torch.no_grad()
    def recognised(self, images: Tensor, scenes: Sequence[S]) -> tuple[Tensor, Tensor]:
        """Which of N images show their scene's style, and which all the rest of it: (N,) bool each."""
        right = self.probe(images).labels == labels(scenes)
        return right[:, -1], right[:, :-1].all(1)

    def quality(self, samples: Samples, erased: Sequence[int]) -> dict[str, float]:
        """What the judge finds (`worlds.judge`)."""
        return judge(samples, erased, self, self.probe)

    def likeness(self, samples: Samples, reference: Samples, erased: Sequence[int]) -> Likeness:
        """The paper's scores of the erased styles' samples, against another model's."""
        return likeness(samples, reference, erased, self.probe)

    def shares(self, erased: Sequence[int], settings: Drawn) -> dict[str, int]:
        """How many samples each share of `quality` is of."""
        gone, kept = len(erased) * settings.judge_erased, len(self.styles) - len(erased)
        counts = {"concept_hit": gone, "content_kept": gone, "other_style_hit": kept * settings.judge_kept}
        if near := relatives(erased, self):
            counts["relative_hit"] = len(near) * settings.judge_kept
        return counts | dict.fromkeys(list(self.heads)[:-1], kept * settings.judge_kept)

    def shown(self, count: int, erased: Sequence[int], settings: Drawn) -> list[int]:
        """Which of `count` samples stand for all of them in a picture: six of erased styles, then six of others.

        Their strides are prime to how the scenes are laid out, so they show different objects, colours and styles.
        """
        first = len(erased) * settings.judge_erased
        return [(5 * i) % first for i in range(6)] + [first + (29 * i) % (count - first) for i in range(6)]
