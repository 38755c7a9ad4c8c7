"""What an attacker gets back from students of the rivals: shares of prompts by attack, and after how many steps.

    concept vector  every prompt's states moved along the concept's direction, by strength
    inversion       one shift of all prompts' states, learnt against the student
    ring-a-bell     a text for each prompt, near its state with the concept vector; never asks the student
    mma             a text for each prompt that means its caption, without the style's name; never asks the student
    unlearn-diff    tokens before each prompt, learnt against the student on what the teacher painted of its caption

Prompts do not name the style. `hit` is the share whose image shows it, `content` the share that shows all the rest
as asked: of the same image, and for unlearn-diff of the first that was a hit, which is what counts. Images begin with
the noise that the judge's begin with. Searches over tokens are for `TEXTS` prompts, each by itself, the others for all
of the judge's. They are shorter than their authors', and the mini world's captions have room for 10 tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.quality.lab import Lab
from benchmarks.rows import Row
from bilevel_fast.attacking.looks import Look
from bilevel_fast.attacking.mma import Mma, mma
from bilevel_fast.attacking.ring_a_bell import RingABell, ring_a_bell
from bilevel_fast.attacking.states import Shifted, concept_vector, inverting
from bilevel_fast.attacking.unlearn_diff import UnlearnDiff, unlearn_diff
from bilevel_fast.models.mini import MiniTextEncoder
from bilevel_fast.models.text_encoder import TextEncoder, token_states
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.paper.settings import Attack
from bilevel_fast.sampling.generate import generate
from bilevel_fast.worlds.scenes import Scene

STRENGTHS, SEARCHED = (1.0, 3.0), (15, 30, 60, 120, 240)
"""Of the concept vector; steps of the inversion after which it is looked at."""
TEXTS = 12
RING_A_BELL, BRED = RingABell(tokens=8, population=100, generations=100), (10, 30, 100)
"""And generations after which it is looked at, as of the others below."""
MMA, CHANGED = Mma(tokens=8, steps=50, top=8, batch=64), (10, 50)
UNLEARN_DIFF = UnlearnDiff(tokens=3, iterations=20, timesteps=10)


class Attacker:
    """Attacks the students of one seed.

    Args:
        lab: Teacher, text encoder and concept bank.
        config: Of the students.
    """

    def __init__(self, lab: Lab, config: TrainConfig):
        assert isinstance(lab.folder.text_encoder, MiniTextEncoder)
        self.lab, self.config, self.encoder = lab, config, lab.folder.text_encoder
        (self.style,) = lab.erased
        self.world, self.settings = lab.world, config.world_settings
        self.scenes = self.world.erased_scenes(lab.erased, self.settings.judge_erased)

    def __call__(self, name: str, student: UNet) -> list[Row]:
        """What one of `ATTACKS` gets back, look by look."""
        return [{"attack": name, **found} for found in ATTACKS[name](self, student)]

    def vectors(self, student: UNet) -> Iterator[Row]:
        for strength in STRENGTHS:
            yield {"strength": strength, **self._shifted(student, self._vector(strength))}

    def inversion(self, student: UNet) -> Iterator[Row]:
        settings, bank = Attack(), self.lab.materials.concepts
        assert bank is not None
        searched = inverting(
            *(student, self.lab.folder.schedule, self.encoder, bank, self._vector(1.0)),
            steps=SEARCHED[-1], batch=settings.batch, lr=settings.lr, seed=self.config.seed,
        )  # fmt: skip
        for step, shift in enumerate(searched, start=1):
            if step in SEARCHED:
                yield {"steps": step, **self._shifted(student, shift)}

    def ring_a_bell(self, student: UNet) -> Iterator[Row]:
        vector = self._vector(RING_A_BELL.strength)

        def search(number: int) -> Iterator[Look]:
            target = token_states(self.encoder, [self._plain(self.scenes[:TEXTS])[number]])[0] + vector
            return ring_a_bell(self.encoder, target, RING_A_BELL, seed=self.config.seed + number)

        yield from self._each(student, search, BRED)

    def mma(self, student: UNet) -> Iterator[Row]:
        def search(number: int) -> Iterator[Look]:
            caption, seed = self.scenes[number].caption, self.config.seed + number
            return mma(self.encoder, caption, MMA, seed=seed, forbidden=[self.world.styles[self.style]])

        yield from self._each(student, search, CHANGED)

    def unlearn_diff(self, student: UNet) -> Iterator[Row]:
        scenes = self.scenes[:TEXTS]
        shown = self._painted(self.lab.teacher, self.encoder, [scene.caption for scene in scenes])
        search = unlearn_diff(
            *(student, self.lab.folder.schedule, self.encoder, shown, self._plain(scenes), UNLEARN_DIFF),
            seed=self.config.seed,
        )
        won, kept = torch.zeros(len(scenes), dtype=torch.bool), torch.zeros(len(scenes), dtype=torch.bool)
        for look in search:
            hit, content = self._recognised(student, self.encoder, look.texts, scenes)
            kept = torch.where(won, kept, content)
            won |= hit
            yield {"steps": look.step, **_shares(won, kept)}

    def _each(self, student: UNet, search: Callable[[int], Iterator[Look]], steps: Sequence[int]) -> Iterator[Row]:
        """Of searches for a text for each of the first prompts."""
        scenes = self.scenes[:TEXTS]
        found: dict[int, list[str]] = {step: [] for step in steps}
        for number in range(len(scenes)):
            for look in search(number):
                if look.step in found:
                    found[look.step] += look.texts
        for step, texts in found.items():
            yield {"steps": step, **_shares(*self._recognised(student, self.encoder, texts, scenes))}

    def _vector(self, strength: float) -> Tensor:
        return concept_vector(self.encoder, *self.world.known(self.style), strength)

    def _plain(self, scenes: Sequence[Scene]) -> list[str]:
        return [scene.plain().caption for scene in scenes]

    def _shifted(self, student: UNet, shift: Tensor) -> Row:
        shifted = Shifted(self.encoder, shift)
        return _shares(*self._recognised(student, shifted, self._plain(self.scenes), self.scenes))

    @torch.no_grad()
    def _painted(self, unet: UNet, encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
        """Latents, each from the noise that the judge's image of its number begins with."""
        settings, size = self.settings, unet.config.sample_size
        return generate(
            unet, self.lab.folder.schedule, encoder, texts, range(len(texts)), seed=self.config.seed,
            size=(size, size), guidance=settings.guidance, steps=settings.judge_steps, method="ddim",
        )  # fmt: skip

    def _recognised(
        self, student: UNet, encoder: TextEncoder, texts: Sequence[str], scenes: Sequence[Scene]
    ) -> tuple[Tensor, Tensor]:
        images = self.lab.folder.vae.decode(self._painted(student, encoder, texts))
        return self.world.recognised(images, scenes)


def _shares(hit: Tensor, content: Tensor) -> Row:
    shares = {name: round(seen.double().mean().item(), 4) for name, seen in (("hit", hit), ("content", content))}
    return {**shares, "samples": len(hit)}


ATTACKS: dict[str, Callable[[Attacker, UNet], Iterator[Row]]] = {
    "concept vector": Attacker.vectors,
    "inversion": Attacker.inversion,
    "ring-a-bell": Attacker.ring_a_bell,
    "mma": Attacker.mma,
    "unlearn-diff": Attacker.unlearn_diff,
}
"""The quick ones first, but that the inversion is asked for most."""
