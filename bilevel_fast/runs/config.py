"""The settings of a run: one tree of frozen dataclasses, a few named presets, and the checks across fields.

The docstring under a field is its help text. Only `train` knows this module; what trains receives plain values.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from bilevel_fast.base.errors import UserError, check_finite, in_range, nearest
from bilevel_fast.erasing.settings import ControllerSettings, Upper
from bilevel_fast.scale.settings import Scale
from bilevel_fast.training.settings import LossWeights, MicroBatch, check_micro_batch
from bilevel_fast.worlds.emoji.settings import Emoji
from bilevel_fast.worlds.mini.settings import Mini


@dataclass(frozen=True)
class Lower:
    """The lower level recovers quality: diffusion loss + output distillation + block distillation."""

    steps: int = 20_000
    """Lower steps in all."""
    batch: int = 64
    """Images per step."""
    micro_batch: MicroBatch = "auto"
    """Images computed at once; the gradients of a batch's parts are added up in fp32. auto: on a GPU the largest part
    that fits by the memory model, elsewhere the whole batch."""
    lr: float = 1e-6
    """Learning rate of AdamW after the warm-up."""
    warmup: int = 250
    """Steps of linear warm-up; the first step has learning rate 0."""
    weights: LossWeights = field(default_factory=LossWeights)
    snr_gamma: float = 5.0
    """Gamma of the SNR weight."""
    p_uncond: float = 0.0
    """Share of captions replaced by the empty prompt."""

    def check(self) -> None:
        """Refuse values out of range, with a UserError."""
        in_range("--lower.steps", self.steps, ">= 1", self.steps >= 1)
        in_range("--lower.batch", self.batch, ">= 1", self.batch >= 1)
        check_micro_batch("lower", self.micro_batch, self.batch)
        in_range("--lower.lr", self.lr, "> 0", self.lr > 0)
        in_range("--lower.warmup", self.warmup, ">= 0", self.warmup >= 0)
        in_range("--lower.snr-gamma", self.snr_gamma, "> 0", self.snr_gamma > 0)
        in_range("--lower.p-uncond", self.p_uncond, ">= 0 and < 1", 0 <= self.p_uncond < 1)


@dataclass(frozen=True)
class Prune:
    """How the student is made where no --student is given."""

    method: str = "magnitude"
    """As for bilevel_fast.prune, whose --help lists them."""
    budget: float = 0.80
    """MACs of the student as a share of the dense model's."""


@dataclass(frozen=True)
class TrainConfig:
    """Prune a teacher, then distil it and suppress concepts in one run.

    With no arguments the built-in mini world runs end to end. With --teacher, --data and --concepts the same loop runs
    on model folders in the diffusers layout.
    """

    MAIN: ClassVar = (
        *("preset", "out", "seed", "resume", "dry_run", "device"),
        *("world", "teacher", "student", "data", "concepts", "erase", "prune.method", "prune.budget"),
        *("lower.steps", "lower.batch", "lower.lr"),
        *("upper.every", "upper.batch", "upper.lr", "upper.eraser", "upper.anchor", "upper.penalty"),
    )
    GROUPS: ClassVar = {
        "run": (
            "preset",
            "out",
            "seed",
            "resume",
            "dry_run",
            "device",
            "log_every",
            "checkpoint_every",
            "max_bad_steps",
        ),
        "models, images, concepts": (
            *("world", "teacher", "student", "data", "concepts", "erase"),
            *("concept_weights", "resume_concepts", "twin"),
        ),
        "how it computes": ("precision", "fp8_teacher", "recompute", "graphs", "clip_norm", "ema"),
    }

    preset: str = "mini"
    """Where the defaults come from: mini, emoji, smoke, paper or released."""
    out: Path = Path("runs/mini")
    """Run folder; must be new, unless --resume."""
    seed: int = 0
    """Seed of everything random."""
    world: Literal["mini", "emoji"] = "mini"
    """The built-in world that the run is on where there is no --data."""
    teacher: Path | None = None
    """Dense model folder (diffusers layout), or its id on the hub. Default: the built-in teacher of --world."""
    student: Path | None = None
    """Pruned model folder. Default: prune the teacher as --prune says."""
    data: Path | None = None
    """What to fine-tune on: a latent cache, or a list of images, which DALI decodes and the VAE encodes as they are
    wanted; bilevel_fast.prepare makes both. Default: drawings of --world."""
    concepts: tuple[Path, ...] = ()
    """Concept banks to suppress, one or more. Default: sampled from the teacher of --world."""
    erase: tuple[str, ...] = ("pointillism",)
    """Drawing styles of --world to suppress; elsewhere --concepts says what."""
    concept_weights: tuple[float, ...] = ()
    """What share of each upper batch shows each concept, whatever the sizes of the banks; by default all the same."""
    resume_concepts: Path | None = None
    """Finished run to go on from: erases further concepts from its student, and goes on showing those that it erased,
    with the weights that they had there."""
    twin: bool = True
    """On a built-in world, also train the distilled-only twin: same start and lower steps, no upper ones."""
    lower: Lower = field(default_factory=Lower)
    upper: Upper = field(default_factory=Upper)
    prune: Prune = field(default_factory=Prune)
    scale: Scale = field(default_factory=Scale)
    mini: Mini = field(default_factory=Mini)
    emoji: Emoji = field(default_factory=Emoji)
    clip_norm: float | None = None
    """Gradients are scaled down to this norm; None does not clip."""
    ema: float | None = None
    """Decay of a moving average of the student's weights, which is then what is saved and judged; None keeps none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What the networks compute in; master weights, losses and moments are fp32. auto: bf16 on a GPU, else fp32."""
    fp8_teacher: bool = False
    """Compute the teacher's linear layers in fp8, on sm_89 and sm_90; the error that it causes is printed."""
    recompute: bool = False
    """Compute the inside of the student's blocks again in backward instead of keeping it: less memory."""
    graphs: bool = True
    """Run each level's step as one CUDA graph, on a GPU."""
    log_every: int = 20
    """Lower steps per status line."""
    checkpoint_every: int = 100
    """Lower steps per checkpoint."""
    wandb: bool = False
    """Send what TensorBoard gets to Weights & Biases as well, in a project of WANDB_PROJECT's name or `bilevel-fast`;
    with WANDB_MODE=offline it stays in --out until `wandb sync`."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row whose gradient is not finite; each of them is skipped."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    resume: bool = False
    """Go on with the run in --out, from its last checkpoint."""
    dry_run: bool = False
    """Print the resolved settings and stop."""

    def check(self) -> None:
        """Refuse settings that contradict each other or are out of range.

        Raises:
            UserError: Names the flag.
        """
        check_finite(self)
        in_range("--seed", self.seed, ">= 0 and < 2**64", 0 <= self.seed < 2**64)
        needs = {
            "--data": (self.data, "--teacher", self.teacher),
            "--concepts": (self.concepts or None, "--data", self.data),
            "--student": (self.student, "--teacher", self.teacher),
        }
        for flag, (given, wanted, other) in needs.items():
            if given is not None and other is None:
                raise UserError(f"{flag} given without {wanted}")
        if self.preset in ("paper", "released") and self.data is None and not self.dry_run:
            raise UserError(f"preset {self.preset!r} is for folders: it wants --teacher, --data and --concepts")
        if self.resume_concepts is not None and self.student is not None:
            raise UserError("--student given with --resume-concepts, whose student it is that goes on")
        named, flag = (self.erase, "--erase") if self.built_in else (self.concepts, "--concepts")
        if self.concept_weights and len(self.concept_weights) != len(named):
            raise UserError(
                f"{len(self.concept_weights)} --concept-weights for {len(named)} of {flag}; wanted one each"
            )
        if self.data is not None and not self.concepts and self.upper.every:
            raise UserError("--data given without --concepts; --upper.every 0 runs without suppression")
        in_range("--erase", self.erase, "one or more", len(self.erase) >= 1)
        shares = self.concept_weights
        in_range("--concept-weights", shares, "each > 0 and finite", all(0 < share < math.inf for share in shares))
        in_range("--clip-norm", self.clip_norm, "> 0", self.clip_norm is None or self.clip_norm > 0)
        in_range("--ema", self.ema, "> 0 and < 1", self.ema is None or 0 < self.ema < 1)
        in_range("--log-every", self.log_every, ">= 1", self.log_every >= 1)
        in_range("--checkpoint-every", self.checkpoint_every, ">= 1", self.checkpoint_every >= 1)
        in_range("--prune.budget", self.prune.budget, "> 0 and <= 1", 0 < self.prune.budget <= 1)
        in_range("--max-bad-steps", self.max_bad_steps, ">= 1", self.max_bad_steps >= 1)
        self.lower.check()
        self.upper.check()
        self.scale.check(lower=self.lower.batch, **({"upper": self.upper.batch} if self.upper.every else {}))
        if self.scale.in_parts and self.fp8_teacher:
            raise UserError(
                "--fp8-teacher given with --scale.parameters fsdp, whose teacher computes in --precision; wanted flat"
            )
        for name, level in (("lower", self.lower), ("upper", self.upper)):
            leaf = level.batch // self.scale.leaves
            if level.micro_batch != "auto" and leaf % level.micro_batch:
                raise UserError(
                    f"--{name}.micro-batch is {level.micro_batch}: wanted a divisor of a leaf, which has {leaf} of "
                    f"--{name}.batch {level.batch} with --scale.leaves {self.scale.leaves}"
                )
        if self.built_in:
            self.world_settings.check()

    @property
    def built_in(self) -> str | None:
        """The built-in world that the run is on (`bilevel_fast.worlds`); None where there is --data."""
        return self.world if self.data is None else None

    @property
    def world_settings(self) -> Any:
        """The section that bears the world's name."""
        assert self.built_in is not None
        return getattr(self, self.built_in)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, nested like the dataclasses."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            return str(value) if isinstance(value, Path) else value

        return plain(dataclasses.asdict(self))


VOLATILE = (
    *("out", "recompute", "graphs", "log_every", "checkpoint_every", "device", "resume", "dry_run"),
    "wandb",
    *("lower.micro_batch", "upper.micro_batch", "scale"),
)
"""Fields that a resumed run may change: none changes a result, but micro-batches and leaves the rounding of sums."""

_MINI = TrainConfig(
    lower=Lower(steps=120, batch=16, lr=3e-4, warmup=10, p_uncond=0.1),
    upper=Upper(every=4, batch=16, lr=1.5e-4, warmup=4, controller=ControllerSettings(horizon=10)),
    checkpoint_every=40,
)
PRESETS: dict[str, TrainConfig] = {
    "mini": _MINI,
    "smoke": dataclasses.replace(
        _MINI,
        preset="smoke",
        out=Path("runs/smoke"),
        lower=dataclasses.replace(_MINI.lower, steps=8, batch=4),
        upper=dataclasses.replace(_MINI.upper, batch=4),
        mini=Mini(images=64, bank=4, judge_erased=4, judge_kept=4, bank_steps=3, judge_steps=3),
        log_every=4,
        checkpoint_every=2,
    ),
    "emoji": dataclasses.replace(
        _MINI,
        preset="emoji",
        out=Path("runs/emoji"),
        world="emoji",
        erase=("noto",),
        upper=dataclasses.replace(_MINI.upper, lr=6e-4),  # of five rates the best: benchmarks.quality.rivals, seed 3
    ),
    "paper": TrainConfig(
        preset="paper",
        out=Path("runs/paper"),
        upper=Upper(anchor="null", penalty=100.0, penalty_norm="raw"),
        checkpoint_every=1000,
    ),
    "released": TrainConfig(
        preset="released",
        out=Path("runs/released"),
        lower=Lower(steps=50_000),
        upper=Upper(every=10, anchor="null", penalty=0.0),
        checkpoint_every=1000,
    ),
}


def preset(name: str) -> TrainConfig:
    """A named preset.

    Raises:
        UserError: There is none of that name; the nearest are named.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} does not exist{nearest(name, PRESETS)}")
    return PRESETS[name]
