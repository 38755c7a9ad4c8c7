"""The erasers of the upper level by name, as `train --upper.eraser` takes them. Edits are in `loop_edits`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.data.bank import Shows
from bilevel_fast.erasing.attention import ForgetMeNot, Words
from bilevel_fast.erasing.esd import Esd
from bilevel_fast.erasing.references import Itself, Source, Start
from bilevel_fast.erasing.saliency import EraseDiff, SalUn
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.erasing.subsets import subset
from bilevel_fast.erasing.targets import ConceptAblation, Guidance
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.run_folder import flatten
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Eraser


@dataclass(frozen=True)
class Scene:
    """What erasers are made of.

    Attributes:
        teacher: The dense one.
        start: The student as the run found it; None where no eraser asks for it.
        flat: The student's parameters.
        null: (1, L, D) states of the null prompt, on the device.
        words: Makes what finds the concept's words in captions.
        salient: Which parameters move, by number of concept batches and share: see `saliency.salient`.
    """

    teacher: Teacher
    start: Start | None
    flat: FlatParameters
    null: Tensor
    words: Callable[[], Words]
    salient: Callable[[int, float], Tensor]

    @property
    def student(self) -> UNet:
        """What is trained."""
        assert isinstance(self.flat.module, UNet)
        return self.flat.module

    def source(self, upper: Upper) -> Teacher:
        """Who the target comes from."""
        name = source_of(upper)
        if name == "start":
            assert self.start is not None
            return self.start
        return self.teacher if name == "teacher" else Itself(self.student)


@dataclass(frozen=True)
class Kind:
    """How an eraser is made.

    Attributes:
        make: From the settings and the scene.
        reads: The settings in `OWN` that it reads; it is refused with others.
        source: Whose answers its paper takes as target; None where the setting `source` is not read.
        shows: What its paper wants the images of the bank to show.
        watched: Whether it shows a controller how far the student has come, and leaves lambda to it.
    """

    make: Callable[[Upper, Scene], Eraser]
    reads: tuple[str, ...] = ()
    source: Source | None = None
    shows: Shows = "prompt"
    watched: bool = False


OWN = ("eta", "source", "ablation", "esd", "salun", "erasediff", "uce", "concept_prune")
"""Settings that only some erasers read."""

EDITS = {"uce": ("every", "anchor", "uce"), "concept-prune": ("every", "anchor", "concept_prune")}
"""Erasers that are edits of weights, and all settings that they read: without a gradient there is little to set."""

UPPER: dict[str, Kind] = {
    "guidance": Kind(lambda upper, scene: Guidance(upper.eta), reads=("eta",), watched=True),
    "anchor-kd": Kind(lambda upper, scene: Guidance(0.0), watched=True),
    "concept-ablation": Kind(
        lambda upper, scene: ConceptAblation(scene.source(upper), upper.ablation.keep),
        reads=("source", "ablation"),
        source="start",
        shows="anchor",
        watched=True,
    ),
    "esd": Kind(
        lambda upper, scene: Esd(scene.source(upper), scene.null, upper.eta, **vars(upper.esd)),
        reads=("eta", "source", "esd"),
        source="start",
        watched=True,
    ),
    "salun": Kind(
        lambda upper, scene: SalUn(
            scene.source(upper), scene.flat, scene.salient(upper.salun.batches, upper.salun.share)
        ),
        reads=("source", "salun"),
        source="self",
        watched=True,
    ),
    "erasediff": Kind(
        lambda upper, scene: EraseDiff(scene.source(upper), upper.erasediff.barrier),
        reads=("source", "erasediff"),
        source="self",
    ),
    "forget-me-not": Kind(lambda upper, scene: ForgetMeNot(scene.words())),
}


def source_of(upper: Upper) -> Source | None:
    """The source that the settings mean; None where the eraser has none."""
    if upper.eraser in EDITS:
        return None
    return UPPER[upper.eraser].source if upper.source == "paper" else upper.source


def start(upper: Upper, student: UNet, dtype: torch.dtype) -> Start | None:
    """A copy of the student, before its first step, if the eraser wants one. To be made before the parameters move."""
    return Start(student, dtype) if source_of(upper) == "start" else None


def make(upper: Upper, scene: Scene) -> Eraser:
    """The eraser that the settings name; `check` has passed them."""
    return UPPER[upper.eraser].make(upper, scene)


def holder(flat: FlatParameters, which: str) -> Callable[[], object]:
    """Zeroes the gradient of every parameter outside a subset (`subsets.subset`); does nothing for all of them.

    Raises:
        UserError: The subset holds nothing of this student.
    """
    assert isinstance(flat.module, UNet)
    moved = subset(flat.module, which)
    views = [view for name, view in flat.views(flat.gradient).items() if name not in moved]
    if not views:
        return lambda: None
    return partial(torch._foreach_zero_, views)  # pyright: ignore[reportPrivateImportUsage]  # one launch


def shows(name: str) -> Shows:
    """What an eraser wants the images of the bank to show."""
    return UPPER[name].shows if name in UPPER else "prompt"


def check(upper: Upper, default: Upper | None = None) -> None:
    """Refuse an eraser that does not exist, and settings that it would not read.

    Args:
        default: What the settings are where nobody gives them: a preset's; those of `Upper` if None.

    Raises:
        UserError: Names the flag.
    """
    if upper.eraser not in UPPER and upper.eraser not in EDITS:
        raise UserError(f"--upper.eraser {upper.eraser!r} does not exist{nearest(upper.eraser, [*UPPER, *EDITS])}")
    given, defaults = (flatten(asdict(settings)) for settings in (upper, default or Upper()))
    for name, value in given.items():
        section = name.partition(".")[0]
        if value != defaults[name] and section != "eraser" and not _reads(upper.eraser, section):
            readers = ", ".join(other for other in (*UPPER, *EDITS) if _reads(other, section))
            raise UserError(
                f"--upper.{name.replace('_', '-')} is {value}, but eraser {upper.eraser!r} does not read it; "
                f"those that do: {readers}"
            )
    if upper.eraser == "erasediff" and upper.surgery:
        raise UserError("--upper.surgery given with eraser 'erasediff', which weighs the two gradients by its own rule")
    if upper.controller.enabled:
        _check_controller(upper)
    good = {
        "ablation.keep": upper.ablation.keep >= 0,
        "esd.steps": upper.esd.steps >= 3,
        "salun.share": 0 < upper.salun.share <= 1,
        "salun.batches": upper.salun.batches >= 1,
        "erasediff.barrier": upper.erasediff.barrier >= 0,
        "uce.texts": upper.uce.texts >= 0,
        "uce.hold": 0 <= upper.uce.hold < float("inf"),
        "uce.ridge": 0 < upper.uce.ridge < float("inf"),
        "concept_prune.every": upper.concept_prune.every >= 0,
        "concept_prune.ratio": 0 < upper.concept_prune.ratio <= 1,
        "concept_prune.select": 0 <= upper.concept_prune.select < 1,
        "concept_prune.prompts": upper.concept_prune.prompts >= 1,
        "concept_prune.steps": upper.concept_prune.steps >= 1,
        "concept_prune.batch": upper.concept_prune.batch >= 1,
    }
    for name in (name for name, fine in good.items() if not fine):
        raise UserError(
            f"--upper.{name.replace('_', '-')} is {given[name]}, outside its range; --help says what it means"
        )


def _reads(eraser: str, section: str) -> bool:
    """Whether an eraser reads a setting, or a section of settings, of the upper level."""
    if eraser in EDITS:
        return section in EDITS[eraser]
    return section not in OWN or section in UPPER[eraser].reads


def reach(upper: Upper) -> float:
    """Where the eraser's target lies, in distances from the concept to its anchor."""
    return 1 + upper.eta if "eta" in UPPER[upper.eraser].reads else 1.0


def _check_controller(upper: Upper) -> None:
    """Refuse a controller that could not see, or would not be heard."""
    kind, given = UPPER[upper.eraser], "--upper.controller.enabled given"
    if not kind.watched:
        able = ", ".join(name for name, other in UPPER.items() if other.watched)
        raise UserError(f"{given} with eraser {upper.eraser!r}, whose progress it cannot measure or steer; use {able}")
    if upper.penalty_norm != "grad":
        raise UserError(f"{given} with --upper.penalty-norm {upper.penalty_norm}; its lambda is one of `grad`")
    if not upper.every:
        raise UserError(f"{given} with --upper.every 0, which runs no upper steps")
    if upper.controller.gone is not None and upper.controller.gone >= reach(upper):
        raise UserError(
            f"--upper.controller.gone is {upper.controller.gone}, but the target of eraser {upper.eraser!r} lies at "
            f"{reach(upper):g}: the concept would never be gone"
        )
