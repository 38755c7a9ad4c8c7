"""The erasers of the upper level by name, as `train --upper.eraser` takes them: all that a run must know of each."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.data.bank import Shows
from bilevel_fast.erasing import loop_edits, solvers
from bilevel_fast.erasing.amnesia import Remembered, SelectiveAmnesia
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
from bilevel_fast.training.upper import Edit, Eraser


@dataclass(frozen=True)
class EraserParts:
    """What erasers are made of.

    Attributes:
        teacher: The dense one.
        start: The student as the run found it; None where no eraser asks for it.
        flat: The student's parameters.
        null: (1, L, D) states of the null prompt, on the device.
        words: Makes what finds the concept's words in captions.
        salient: Which parameters move, by number of concept batches and share: see `saliency.salient`.
        fisher: Fisher information of the student, by number of images and of timesteps: see `amnesia.fisher`.
    """

    teacher: Teacher
    start: Start | None
    flat: FlatParameters
    null: Tensor
    words: Callable[[], Words]
    salient: Callable[[int, float], Tensor]
    fisher: Callable[[int, int], Tensor]

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


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a run must know of an eraser.

    Attributes:
        reads: Settings of the upper level, and sections of them, that are its own or shared by some; it is refused
            with those of others.
        source: Whose answers its paper takes as target; None where the setting `source` is not read.
        shows: What its paper wants the images of the bank to show.
        watched: Whether it shows a controller how far the student has come, and leaves lambda to it.
        ruled: Whether it weighs the two gradients by a rule of its own.
        masked: Whether it holds a mask over the student's parameters.
        remembers: Whether it holds the weights to what they were, and so two buffers of them.
        whole: Why a batch of it cannot be split into micro-batches; empty where its loss is a mean over images.
        eager: Whether its steps cannot be recorded: `Eraser.eager` says why.
        undivided: Why weights cannot lie in parts on all ranks (`--scale.parameters fsdp`); empty where they can.
    """

    reads: tuple[str, ...] = ()
    source: Source | None = None
    shows: Shows = "prompt"
    watched: bool = False
    ruled: bool = False
    masked: bool = False
    remembers: bool = False
    whole: str = ""
    eager: bool = False
    undivided: str = ""


@dataclass(frozen=True)
class GradientKind(Kind):
    """An eraser with a loss on concept images; reads all settings but those that others have for themselves."""

    make: Callable[[Upper, EraserParts], Eraser]


@dataclass(frozen=True)
class EditKind(Kind):
    """An edit of weights: without a gradient it reads `common` and its own, and nothing else."""

    make: Callable[[Upper, loop_edits.Ground], Edit]
    common: tuple[str, ...] = ("every", "anchor")


_EDITS = "edits whole weights"
_REMEMBERS = "holds whole weights to what they were"

ERASERS: dict[str, GradientKind | EditKind] = {
    "guidance": GradientKind(lambda upper, parts: Guidance(upper.eta), reads=("eta",), watched=True),
    "anchor-kd": GradientKind(lambda upper, parts: Guidance(0.0), watched=True),
    "concept-ablation": GradientKind(
        lambda upper, parts: ConceptAblation(parts.source(upper), upper.ablation.keep),
        reads=("source", "ablation"),
        source="start",
        shows="anchor",
        watched=True,
    ),
    "esd": GradientKind(
        lambda upper, parts: Esd(parts.source(upper), parts.null, upper.eta, **vars(upper.esd)),
        reads=("eta", "source", "esd"),
        source="start",
        watched=True,
        eager=True,
        undivided="asks the student another number of times on each rank",
    ),
    "salun": GradientKind(
        lambda upper, parts: SalUn(
            parts.source(upper), parts.flat, parts.salient(upper.salun.batches, upper.salun.share)
        ),
        reads=("source", "salun"),
        source="self",
        masked=True,
        watched=True,
        undivided="looks for its mask in the whole gradient",
    ),
    "erasediff": GradientKind(
        lambda upper, parts: EraseDiff(parts.source(upper), upper.erasediff.barrier),
        reads=("source", "erasediff"),
        source="self",
        ruled=True,
    ),
    "selective-amnesia": GradientKind(
        lambda upper, parts: SelectiveAmnesia(remembered(upper, parts, upper.amnesia.weight)),
        reads=("amnesia", "fisher"),
        shows="anchor",
        remembers=True,
        undivided=_REMEMBERS,
    ),
    "forget-me-not": GradientKind(
        lambda upper, parts: ForgetMeNot(parts.words()),
        whole="forget-me-not takes one norm over all images of a batch",
        eager=True,
    ),
    "uce": EditKind(loop_edits.uce, reads=("uce",), undivided=_EDITS),
    "time": EditKind(loop_edits.time, reads=("time",), undivided=_EDITS),
    "separable": EditKind(loop_edits.separable, reads=("separable",), undivided=_EDITS, common=("every",)),
    "concept-prune": EditKind(loop_edits.prune, reads=("concept_prune",), undivided=_EDITS),
    "p-esd": EditKind(loop_edits.p_esd_masks, reads=("p_esd",), undivided=_EDITS),
}

_OWN = {name for kind in ERASERS.values() for name in kind.reads}
"""Settings that only some erasers read."""


def source_of(upper: Upper) -> Source | None:
    """The source that the settings mean; None where the eraser has none."""
    paper = ERASERS[upper.eraser].source
    return paper if paper is None or upper.source == "paper" else upper.source


def remembered(upper: Upper, parts: EraserParts, weight: float) -> Remembered:
    """What holds the weights to what they are now."""
    return Remembered(parts.flat, parts.fisher(upper.fisher.samples, upper.fisher.timesteps), weight)


def pull(upper: Upper, parts: EraserParts) -> Remembered | None:
    """What takes the place of the lower loss in an upper step; None where nothing does."""
    return remembered(upper, parts, upper.penalty) if upper.solver == "ewc" else None


def start(upper: Upper, student: UNet, dtype: torch.dtype) -> Start | None:
    """A copy of the student, before its first step, if the eraser wants one. To be made before the parameters move."""
    return Start(student, dtype) if source_of(upper) == "start" else None


def holds(upper: Upper, graphs: bool) -> dict[str, bool]:
    """What the upper level keeps in memory, as `profiling.memory.estimate` takes it; `graphs`: steps are recorded."""
    kind, on = ERASERS[upper.eraser], upper.every > 0
    descends = on and isinstance(kind, GradientKind)
    moves = solvers.schedule_of(upper) != "constant"
    scaled = (upper.penalty_norm == "grad" or moves) and (upper.penalty > 0 or upper.controller.enabled)
    ruled, held = kind.ruled or upper.solver == "bome", upper.solver == "ewc"
    scaled = scaled and not held
    return {
        "upper": descends,
        "second": descends and (ruled or upper.surgery or scaled),
        "start": on and source_of(upper) == "start",
        "mask": on and kind.masked,
        "remembered": on and (kind.remembers or held),
        "envelope": descends and upper.solver == "meha",
        "eager": on and graphs and kind.eager,
    }


def whole(upper: Upper) -> str:
    """Why upper batches cannot be split into micro-batches; empty where they can."""
    if upper.controller.enabled:
        return "the controller sees a batch once"
    return ERASERS[upper.eraser].whole


def holder(flat: FlatParameters, which: str) -> Callable[[], object]:
    """Zeroes the gradient of every parameter outside a subset (`subsets.subset`); does nothing for all of them.

    Raises:
        UserError: The subset holds nothing of this student.
    """
    assert isinstance(flat.module, UNet)
    moved = subset(flat.module, which)
    still = {name for name, _ in flat.module.named_parameters()} - moved
    views = flat.gradients(sorted(still))
    if not views:
        return lambda: None

    def hold() -> None:
        flat.settle()
        torch._foreach_zero_(views)  # pyright: ignore[reportPrivateImportUsage]  # one launch

    return hold


def shows(name: str) -> Shows:
    """What an eraser wants the images of the bank to show."""
    return ERASERS[name].shows


def check(upper: Upper, default: Upper | None = None, in_parts: bool = False) -> None:
    """Refuse an eraser that does not exist, and settings that it would not read.

    Args:
        default: What the settings are where nobody gives them: a preset's; those of `Upper` if None.
        in_parts: Whether weights lie in parts on all ranks.

    Raises:
        UserError: Names the flag.
    """
    if upper.eraser not in ERASERS:
        raise UserError(f"--upper.eraser {upper.eraser!r} does not exist{nearest(upper.eraser, ERASERS)}")
    given, defaults = (flatten(asdict(settings)) for settings in (upper, default or Upper()))
    for name, value in given.items():
        section = name.partition(".")[0]
        held = section == "fisher" and upper.solver == "ewc"
        if value != defaults[name] and section != "eraser" and not held and not _reads(upper.eraser, section):
            readers = ", ".join(other for other in ERASERS if _reads(other, section))
            raise UserError(
                f"--upper.{name.replace('_', '-')} is {value}, but eraser {upper.eraser!r} does not read it; "
                f"those that do: {readers}"
            )
    solvers.check(upper, default or Upper(), ERASERS[upper.eraser].ruled, ERASERS[upper.eraser].remembers)
    if upper.controller.enabled:
        _check_controller(upper)
    if in_parts:
        _check_in_parts(upper)


def _check_in_parts(upper: Upper) -> None:
    """Refuse an eraser that wants whole weights, where they lie in parts on all ranks."""
    why = ERASERS[upper.eraser].undivided
    if upper.solver == "ewc" and upper.every:
        raise UserError(
            f"--scale.parameters fsdp given with --upper.solver ewc, which {_REMEMBERS}; wanted --scale.parameters flat"
        )
    if why and upper.every:
        able = ", ".join(name for name, kind in ERASERS.items() if not kind.undivided)
        raise UserError(
            f"--scale.parameters fsdp given with eraser {upper.eraser!r}, which {why}; wanted --scale.parameters flat, "
            f"or one of {able}"
        )


def _reads(eraser: str, section: str) -> bool:
    """Whether an eraser reads a setting, or a section of settings, of the upper level."""
    kind = ERASERS[eraser]
    common = section not in _OWN and (isinstance(kind, GradientKind) or section in kind.common)
    return common or section in kind.reads


def reach(upper: Upper) -> float:
    """Where the eraser's target lies, in distances from the concept to its anchor."""
    return 1 + upper.eta if "eta" in ERASERS[upper.eraser].reads else 1.0


def _check_controller(upper: Upper) -> None:
    """Refuse a controller that could not see, or would not be heard."""
    kind, given = ERASERS[upper.eraser], "--upper.controller.enabled given"
    if not kind.watched:
        able = ", ".join(name for name, other in ERASERS.items() if other.watched)
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
