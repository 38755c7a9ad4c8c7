"""Settings of the upper level: what every eraser reads, and a section for each that reads more.

The docstring under a field is its help text.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from bilevel_fast.base.errors import in_range
from bilevel_fast.training.settings import MicroBatch, check_micro_batch


class Section(ABC):
    """Settings of one eraser, or of the controller."""

    @abstractmethod
    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: Names the flag and its range.
        """


@dataclass(frozen=True)
class Ablation(Section):
    """Concept Ablation."""

    keep: float = 1.0
    """Weight of the diffusion loss on anchor images and prompts; 0 leaves it out."""

    def check(self) -> None:
        in_range("--upper.ablation.keep", self.keep, ">= 0", self.keep >= 0)


@dataclass(frozen=True)
class EsdSettings(Section):
    """Erased Stable Diffusion."""

    guidance: float = 3.0
    """Classifier-free guidance of the half painted samples."""
    steps: int = 50
    """DDIM steps of a whole sample, at least 3; 1 to steps - 2 of them are painted."""
    compat: bool = False
    """Name the timestep as the released script does: 19 too high at 50 steps."""

    def check(self) -> None:
        in_range("--upper.esd.steps", self.steps, ">= 3", self.steps >= 3)


@dataclass(frozen=True)
class Salun(Section):
    """SalUn."""

    share: float = 0.5
    """Of the parameters, how many move: those with the largest gradients on the concept. The paper's is the median."""
    batches: int = 8
    """Concept batches over which these gradients are added up, before the first step."""

    def check(self) -> None:
        in_range("--upper.salun.share", self.share, "> 0 and <= 1", 0 < self.share <= 1)
        in_range("--upper.salun.batches", self.batches, ">= 1", self.batches >= 1)


@dataclass(frozen=True)
class Erasediff(Section):
    """EraseDiff."""

    barrier: float = 0.5
    """How fast the erasing loss must fall, in squared norms of its gradient. A choice of ours, not the paper's."""

    def check(self) -> None:
        in_range("--upper.erasediff.barrier", self.barrier, ">= 0", self.barrier >= 0)


@dataclass(frozen=True)
class Fisher(Section):
    """What the weights are held to, for selective-amnesia and for --upper.solver ewc."""

    samples: int = 16
    """Images of the lower level over which the Fisher information is taken, before the first step."""
    timesteps: int = 8
    """Of each image, evenly spread; the paper takes all of them."""

    def check(self) -> None:
        in_range("--upper.fisher.samples", self.samples, ">= 1", self.samples >= 1)
        in_range("--upper.fisher.timesteps", self.timesteps, ">= 1", self.timesteps >= 1)


@dataclass(frozen=True)
class Meha(Section):
    """For --upper.solver meha (training/envelope.py)."""

    rate: float = 0.02
    """Of the gradient steps of the second copy of the weights; stable below 2 by the curvature of the lower loss."""
    gamma: float = 10.0
    """How strongly the copy is tied to the weights; rate times gamma is at most 1."""

    def check(self) -> None:
        in_range("--upper.meha.rate", self.rate, "> 0 and finite", 0 < self.rate < math.inf)
        in_range("--upper.meha.gamma", self.gamma, "> 0 and finite", 0 < self.gamma < math.inf)
        product = self.rate * self.gamma
        in_range("--upper.meha.rate times --upper.meha.gamma", product, "<= 1", product <= 1)


@dataclass(frozen=True)
class AmnesiaSettings(Section):
    """Selective Amnesia."""

    weight: float = 50.0
    """Lambda: how strongly the weights are held to what they were, by their Fisher information."""

    def check(self) -> None:
        in_range("--upper.amnesia.weight", self.weight, ">= 0 and finite", 0 <= self.weight < math.inf)


@dataclass(frozen=True)
class UceStep(Section):
    """UCE as an upper step: each projects keys and values of all cross-attentions; see erasing/loop_edits.py."""

    preserve: Path | None = None
    """Prompt file: texts that should keep their keys and values, as the empty one always does. Default: captions of the
    lower level's data."""
    texts: int = 256
    """How many of these, without a file."""
    hold: float = 1.0
    """Weight of all preserved texts together; a concept's texts to erase weigh 1 together, and so do their guides."""
    ridge: float = 0.5
    """How much the weights hold on to what they are where no text says anything."""

    def check(self) -> None:
        in_range("--upper.uce.texts", self.texts, ">= 0", self.texts >= 0)
        in_range("--upper.uce.hold", self.hold, ">= 0 and finite", 0 <= self.hold < math.inf)
        in_range("--upper.uce.ridge", self.ridge, "> 0 and finite", 0 < self.ridge < math.inf)


@dataclass(frozen=True)
class TimeStep(Section):
    """TIME as an upper step: each projects keys and values of all cross-attentions, and preserves no text."""

    ridge: float = 0.1
    """How much the weights hold on to what they are."""

    def check(self) -> None:
        in_range("--upper.time.ridge", self.ridge, "> 0 and finite", 0 < self.ridge < math.inf)


@dataclass(frozen=True)
class SeparableStep(Section):
    """SepME as an upper step: each projects keys and values of all cross-attentions so that no preserved text sees
    it. What is erased are the concepts' phrases by themselves."""

    texts: int = 2
    """How many captions of the lower level's data are preserved, and the empty text. The fewer, the more directions
    are left to a concept."""
    threshold: float = 1e-4
    """Singular values of the preserved texts below this share of the largest one count as nothing."""

    def check(self) -> None:
        in_range("--upper.separable.texts", self.texts, ">= 0", self.texts >= 0)
        in_range("--upper.separable.threshold", self.threshold, "> 0 and < 1", 0 < self.threshold < 1)


@dataclass(frozen=True)
class ConceptPruneStep(Section):
    """ConceptPrune as an upper step: each zeros what masks name, and the lower level may move it again."""

    every: int = 0
    """Upper steps between two searches for masks; 0 searches once, before the first upper step."""
    ratio: float = 0.01
    """Share of each row's weights that may go, for each timestep sampled."""
    select: float = 0.0
    """A weight goes if it was chosen at more than this share of the timesteps."""
    prompts: int = 20
    """Captions sampled per concept, and as many anchors."""
    steps: int = 50
    """DDIM steps of each sample."""
    guidance: float | None = None
    """Classifier-free guidance scale. Default: 7.5, 5 for Stable Diffusion XL, on the mini world --mini.guidance."""
    batch: int = 8
    """Prompts sampled together."""

    def check(self) -> None:
        in_range("--upper.concept-prune.every", self.every, ">= 0", self.every >= 0)
        in_range("--upper.concept-prune.ratio", self.ratio, "> 0 and <= 1", 0 < self.ratio <= 1)
        in_range("--upper.concept-prune.select", self.select, ">= 0 and < 1", 0 <= self.select < 1)
        in_range("--upper.concept-prune.prompts", self.prompts, ">= 1", self.prompts >= 1)
        in_range("--upper.concept-prune.steps", self.steps, ">= 1", self.steps >= 1)
        in_range("--upper.concept-prune.batch", self.batch, ">= 1", self.batch >= 1)


@dataclass(frozen=True)
class PEsdStep(Section):
    """P-ESD as an upper step: each zeros what learnt masks name, and the lower level may move it again."""

    every: int = 0
    """Upper steps between two searches for masks; 0 searches once, before the first upper step."""
    ratio: float = 0.05
    """Share of the cross-attentions' weights that may go, at most."""
    updates: int = 100
    """Of the masks, by Adam, in each search."""
    lr: float = 0.05
    """Learning rate of the masks' scores, which begin at 1 and zero a weight below 0."""
    eta: float = 1.0
    """How far the target lies beyond the anchor, away from the concept."""
    steps: int = 50
    """DDIM steps of a whole sample, at least 3; 1 to steps - 2 of them are painted."""
    guidance: float = 3.0
    """Classifier-free guidance of the half painted samples."""
    batch: int = 4
    """Samples for each update."""

    def check(self) -> None:
        in_range("--upper.p-esd.every", self.every, ">= 0", self.every >= 0)
        in_range("--upper.p-esd.ratio", self.ratio, "> 0 and <= 1", 0 < self.ratio <= 1)
        in_range("--upper.p-esd.updates", self.updates, ">= 1", self.updates >= 1)
        in_range("--upper.p-esd.lr", self.lr, "> 0 and finite", 0 < self.lr < math.inf)
        in_range("--upper.p-esd.steps", self.steps, ">= 3", self.steps >= 3)
        in_range("--upper.p-esd.batch", self.batch, ">= 1", self.batch >= 1)


@dataclass(frozen=True)
class ControllerSettings(Section):
    """Chooses lambda and how often upper steps come, and ends them when the concept is gone (bilevel_fast.erasing)."""

    enabled: bool = False
    """Off: lambda and K stay as they are set. On, a run begins with them."""
    gone: float | None = None
    """The concept is gone where the student's answer to it has come so far from the teacher's, with the teacher's
    answer to the anchor at 1. Upper steps then move nothing until it comes back. By default at 1.2, or where the
    eraser's target is not much further than that, at 0.9 of the way to it."""
    by: float = 0.5
    """Share of the lower steps after which it should be gone; lambda falls, and then K, where that would be missed."""
    gap: float = 0.05
    """How far the smoothed lower loss may rise above its least value, as a share of that, before lambda rises."""
    horizon: int = 200
    """Lower steps that the smoothing looks back on, and between two changes of K."""

    def check(self) -> None:
        in_range("--upper.controller.gone", self.gone, "> 0", self.gone is None or self.gone > 0)
        in_range("--upper.controller.by", self.by, "> 0 and <= 1", 0 < self.by <= 1)
        in_range("--upper.controller.gap", self.gap, ">= 0", self.gap >= 0)
        in_range("--upper.controller.horizon", self.horizon, ">= 1", self.horizon >= 1)


@dataclass(frozen=True)
class Upper:
    """The upper level suppresses the concept: an eraser's loss on concept images, and a penalty that keeps the rest."""

    every: int = 20
    """K: lower steps per upper step; 0 runs no upper steps."""
    batch: int = 64
    """Concept images per step."""
    micro_batch: MicroBatch = "auto"
    """Concept images computed at once, as for --lower.micro-batch."""
    lr: float = 5e-6
    """Learning rate of the second AdamW after its warm-up."""
    warmup: int = 250
    """Upper steps of linear warm-up; the first has learning rate 0."""
    eraser: str = "guidance"
    """What the student is taught on the concept: guidance, anchor-kd, concept-ablation, esd, salun, erasediff,
    selective-amnesia or forget-me-not. Or an edit of its weights, made again at every upper step: uce, time, separable,
    concept-prune or p-esd; these have no gradient, and of this section read every, anchor and what bears their name."""
    source: Literal["paper", "teacher", "start", "self"] = "paper"
    """Whose answers the target is made of, for erasers that leave the choice: the dense teacher, a frozen copy of the
    student as the run starts, or the student itself; `paper` is the choice of the eraser's authors."""
    subset: str = "full"
    """Parameters that upper steps move, by preset (esd-x, esd-u, selfattn, full) or pattern, separated by commas."""
    surgery: bool = False
    """First take out of the suppression gradient what runs against the lower loss's gradient (PCGrad)."""
    eta: float = 1.0
    """How far the target is pushed beyond the anchor, away from the concept; 0 imitates it. For guidance, esd."""
    anchor: Literal["phrase", "null"] = "phrase"
    """What the teacher is asked instead: the caption without the concept phrase, or the empty prompt."""
    penalty: float = 1.0
    """Lambda: weight of the lower loss on the last lower batch, added to the upper loss
    (benchmarks.quality.frontier). erasediff weighs by a rule of its own and does not read it."""
    penalty_norm: Literal["grad", "raw"] = "grad"
    """`grad` first scales the penalty's gradient to the norm of the suppression gradient; `raw` is the paper's."""
    penalty_schedule: Literal["constant", "rising", "linear", "falling"] = "constant"
    """How lambda goes on from --upper.penalty over upper steps k = 0, 1, ...: rising times (k + 1)^(1/4), linear times
    min(10, (k + 1) / 10), falling times 1 + (k + 1)^(-1/7) / 10."""
    solver: Literal["penalty", "bome", "ewc", "meha"] = "penalty"
    """What makes one direction of the two gradients: `penalty` adds lambda times the lower loss's; `bome` has no
    lambda, and adds as much of it as the lower loss needs to fall (bilevel_fast.erasing.solvers). `ewc` asks for no
    lower loss: it adds lambda times a pull to the weights as they were, by their Fisher information. `meha` takes the
    lower loss's Moreau envelope off the penalty, whose lambda rises: a second copy of the weights, and a pass more."""
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    ablation: Ablation = field(default_factory=Ablation)
    esd: EsdSettings = field(default_factory=EsdSettings)
    salun: Salun = field(default_factory=Salun)
    erasediff: Erasediff = field(default_factory=Erasediff)
    amnesia: AmnesiaSettings = field(default_factory=AmnesiaSettings)
    fisher: Fisher = field(default_factory=Fisher)
    meha: Meha = field(default_factory=Meha)
    uce: UceStep = field(default_factory=UceStep)
    time: TimeStep = field(default_factory=TimeStep)
    separable: SeparableStep = field(default_factory=SeparableStep)
    concept_prune: ConceptPruneStep = field(default_factory=ConceptPruneStep)
    p_esd: PEsdStep = field(default_factory=PEsdStep)

    def walks(self) -> dict[str, tuple[int, Literal["ddim"]]]:
        """What the eraser samples while it trains, by flag: steps and method."""
        sections = {"esd": self.esd.steps, "concept-prune": self.concept_prune.steps, "p-esd": self.p_esd.steps}
        return {
            f"--upper.{n}.steps": (steps, "ddim") for n, steps in sections.items() if n == self.eraser and self.every
        }

    def check(self) -> None:
        """Refuse values out of range, here and in all sections.

        Raises:
            UserError: Names the flag and its range.
        """
        in_range("--upper.every", self.every, ">= 0", self.every >= 0)
        in_range("--upper.batch", self.batch, ">= 1", self.batch >= 1)
        check_micro_batch("upper", self.micro_batch, self.batch)
        in_range("--upper.lr", self.lr, "> 0", self.lr > 0)
        in_range("--upper.warmup", self.warmup, ">= 0", self.warmup >= 0)
        in_range("--upper.eta", self.eta, "finite", math.isfinite(self.eta))
        in_range("--upper.penalty", self.penalty, ">= 0", self.penalty >= 0)
        for section in (getattr(self, each.name) for each in fields(self)):
            if isinstance(section, Section):
                section.check()
