"""What the rows of an experiment are made with, besides the bilevel run itself."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.concept_prune import ConceptPrune
from bilevel_fast.erasing.settings import EsdSettings, Upper
from bilevel_fast.erasing.uce import Uce
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.sampling.strength import Strength


@dataclass(frozen=True)
class EsdRow:
    """Erased Stable Diffusion, on the distilled student."""

    lr: float | None = None
    """Learning rate. Default: that of the bilevel run's upper level."""
    subset: str = "esd-x"
    """Parameters that move: esd-x for styles, esd-u for nudity."""
    sample: EsdSettings = field(default_factory=EsdSettings)

    def upper(self, shared: Upper) -> Upper:
        """The upper level of the bilevel run with this eraser in it, and no penalty."""
        lr = shared.lr if self.lr is None else self.lr
        return replace(
            shared, eraser="esd", subset=self.subset, esd=self.sample, lr=lr, penalty=0.0, surgery=False, source="paper"
        )


@dataclass(frozen=True)
class SldRow:
    """Safe Latent Diffusion: the distilled student, kept away from the concepts while sampling."""

    strength: Strength = "medium"
    """weak, medium, strong or max."""

    def of(self, phrases: Sequence[str]) -> Safe:
        """Away from all the phrases."""
        return Safe(", ".join(phrases), self.strength)


@dataclass(frozen=True)
class Attack:
    """How hard the attacks of table2 try."""

    strength: float = 1.0
    """Of the concept vector."""
    steps: int = 60
    """Of the inversion, which begins at the concept vector."""
    batch: int = 16
    """Images per step."""
    lr: float = 0.02
    """Learning rate of Adam."""

    def __post_init__(self) -> None:
        checks = {"steps": self.steps >= 1, "batch": self.batch >= 1, "lr": 0 < self.lr < math.inf}
        for name, good in {**checks, "strength": math.isfinite(self.strength)}.items():
            if not good:
                raise UserError(f"--attack.{name} is {getattr(self, name)}; wanted a positive number")


@dataclass(frozen=True)
class Rows:
    """Settings of the two-stage rows and of the attacks."""

    esd: EsdRow = field(default_factory=EsdRow)
    uce: Uce = field(default_factory=Uce)
    concept_prune: ConceptPrune = field(default_factory=ConceptPrune)
    sld: SldRow = field(default_factory=SldRow)
    attack: Attack = field(default_factory=Attack)


MINI = Rows(esd=EsdRow(sample=EsdSettings(steps=20)), concept_prune=ConceptPrune(steps=12), sld=SldRow("max"))
"""On a built-in world: fewer steps to a sample, as for its judge; SLD without a warm-up, which would take most."""


UNREAD = {
    "world": "--world says it",
    "out": "--out is the folder of all experiments",
    "seed": "--seeds has them all",
    "resume": "the same command goes on by itself",
    "dry_run": "python -m bilevel_fast.train --dry-run shows the settings",
    "resume_concepts": "every row starts from the pruned student",
}
"""Settings of a bilevel run that a reproduction does not read, and what to do instead."""


@dataclass(frozen=True)
class Full:
    """Prompts, images and weights of --scale full. What is not given is not measured."""

    phrase: tuple[str, ...] = ()
    """The concepts as they stand in the bank's captions: `by Claude Monet`, `naked`. ConceptPrune takes them as they
    are, UCE the name alone: `Claude Monet`."""
    subjects: Literal["things", "people"] = "things"
    """Sentences for ConceptPrune, and what UCE takes a concept for: things and `art` for styles, people and `person`
    for nudity."""
    preserve: Path | None = None
    """Prompt file: texts that UCE keeps, such as other artists."""
    styles: tuple[Path, ...] = ()
    """Prompt files in the erased styles, which the bank must not hold: CSV with a column prompt. As many as phrases:
    the n-th is for the n-th, and a model is judged by those of what it lacks."""
    coco: Path | None = None
    """Prompts of everything else: captions_val2017.json, or CSV."""
    coco_images: Path | None = None
    """What FID compares with: a folder of images, or statistics (.npz, .safetensors)."""
    mma: Path | None = None
    """MMA-Diffusion's prompts: CSV with a column adv_prompt."""
    ring_a_bell: Path | None = None
    """Ring-A-Bell's prompts: .txt, one per line."""
    i2p: Path | None = None
    """I2P's prompts: CSV with a column prompt."""
    clip_weights: Path | None = None
    """CLIP ViT-B/32 in OpenAI's format."""
    csd_weights: Path | None = None
    """CSD's checkpoint."""
    inception_weights: Path | None = None
    """Inception as FID wants it."""
    steps: int = 25
    """PNDM steps of every sample."""
    guidance: float = 7.5
    """Classifier-free guidance of every sample."""
    batch: int = 16
    """Images sampled together."""

    def __post_init__(self) -> None:
        for name, good in {"steps": self.steps >= 1, "batch": self.batch >= 1}.items():
            if not good:
                raise UserError(f"--full.{name} is {getattr(self, name)}; wanted 1 or more")

    def paths(self) -> Iterator[tuple[str, Path]]:
        """Every path that was given, with its flag: better looked for before the training than after."""
        for name, value in vars(self).items():
            for path in value if isinstance(value, tuple) else (value,):
                if isinstance(path, Path):
                    yield f"--full.{name.replace('_', '-')}", path
