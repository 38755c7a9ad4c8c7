"""`python -m bilevel_fast.erase EDIT`: settings of all edits, and the edit of a model folder."""

from dataclasses import dataclass, replace
from pathlib import Path

from bilevel_fast.base.claims import claimed
from bilevel_fast.base.devices import pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.progress import Bar
from bilevel_fast.base.tables import table
from bilevel_fast.erasing.concept_prune import ConceptPrune
from bilevel_fast.erasing.edit import RECORD, Job, Outcome, read_records, to_json, transformers
from bilevel_fast.erasing.p_esd import PEsd
from bilevel_fast.erasing.pairs import check, framed, make_pairs, read_pairs
from bilevel_fast.erasing.separable import FILE as SEPARABLE
from bilevel_fast.erasing.separable import Separable
from bilevel_fast.erasing.time_edit import Time
from bilevel_fast.erasing.uce import Uce
from bilevel_fast.models.folder import load_folder, save_student
from bilevel_fast.models.structure import Structure
from bilevel_fast.runs.subjects import find_frames
from bilevel_fast.sampling.prompts import read_prompts
from bilevel_fast.worlds.mini import TEACHER

_PERCENT = {"weights", "zeroed", "erased moved", "guides moved", "left to guide", "preserved moved", "earlier moved"}


@dataclass(frozen=True)
class _Asked:
    out: Path
    """Folder for the edited model; must be new."""
    model: Path = TEACHER
    """Model folder, dense or pruned, or its id on the hub; `mini` and `emoji` are the
    built-in teachers. Default: mini."""
    erase: tuple[str, ...] = ()
    """What to erase: `in the style of Claude Monet`, `naked`, ..."""
    guide: tuple[str, ...] = ("",)
    """What should stand in its place: one for each, or one for all; by default the empty text."""
    pairs: Path | None = None
    """More of them: CSV with the columns erase and guide, and perhaps weight."""
    subjects: str | None = None
    """Sentences that hold the concept where `{}` stands, or end with it: a prompt file, or `things`, `people`, `mini`
    or `emoji`: that world's captions that are not held out for its judge. uce and time take the texts by themselves
    as well, and need none: many of them, without --preserve, move everything else. concept-prune takes by default the
    model's own world, else `things`."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""


@dataclass(frozen=True)
class UceArgs(Uce, _Asked):
    """Give the texts to erase the keys and values of their guides, in every cross-attention, in closed form."""

    weights: tuple[float, ...] = ()
    """How much each text to erase counts among the others; by default all the same."""
    preserve: Path | None = None
    """Prompt file: texts that should keep their keys and values, as the empty one always does. A .csv
    with a column prompt, a .txt with one per line, or COCO's .json."""


@dataclass(frozen=True)
class ConceptPruneArgs(ConceptPrune, _Asked):
    """Zero the feed-forward weights that work more for prompts with the concept than for prompts with its guide."""


@dataclass(frozen=True)
class TimeArgs(Time, _Asked):
    """Give the texts to erase the keys and values of their guides, in closed form, and preserve nothing."""


@dataclass(frozen=True)
class SeparableArgs(Separable, _Asked):
    """Give each text to erase an increment of keys and values that no preserved text sees, and that can be taken out
    again."""

    preserve: Path | None = None
    """Prompt file: few texts that should keep their keys and values, as the empty one always does."""


@dataclass(frozen=True)
class PEsdArgs(PEsd, _Asked):
    """Zero weights of cross-attentions by a mask that is learnt under ESD's loss."""


Args = UceArgs | TimeArgs | SeparableArgs | ConceptPruneArgs | PEsdArgs
EDITS: dict[str, type[Args]] = {
    "uce": UceArgs,
    "time": TimeArgs,
    "separable": SeparableArgs,
    "concept-prune": ConceptPruneArgs,
    "p-esd": PEsdArgs,
}


@dataclass(frozen=True, eq=False)
class Erased:
    """A model that was edited and written.

    Attributes:
        path: Its model folder.
        outcome: What the edit did, and how far texts moved.
        page: What the command prints.
    """

    path: Path
    outcome: Outcome
    page: str


def erase(args: Args) -> Erased:
    """Edit a copy of the model and write its folder.

    Raises:
        UserError: Bad input of any kind.
    """
    with claimed(args.out):
        return _erase(args)


def _erase(args: Args) -> Erased:
    weights = args.weights if isinstance(args, UceArgs) else ()
    kept = args.preserve if isinstance(args, UceArgs | SeparableArgs) else None
    back = isinstance(args, SeparableArgs) and bool(args.give_back)
    if back and (args.erase or args.pairs or kept or args.subjects):
        raise UserError("--give-back takes increments out: give no --erase, --pairs, --preserve or --subjects with it")
    pairs = make_pairs(args.erase, args.guide, weights) if not back and (args.erase or args.pairs is None) else ()
    pairs += read_pairs(args.pairs) if args.pairs is not None else ()
    if not isinstance(args, UceArgs) and any(pair.weight != 1 for pair in pairs):
        name = next(name for name, kind in EDITS.items() if isinstance(args, kind))
        raise UserError(f"{args.pairs} has weights, and {name} has no use for them; uce has")
    preserve = tuple(read_prompts(kept)) if kept is not None else ()
    device = pick_device(args.device)
    folder = load_folder(args.model, device)
    default = folder.family.world or "things" if isinstance(args, ConceptPruneArgs) else None
    frames = find_frames(args.subjects, folder.family.world, default)
    check(pairs, preserve, folder.text_encoder)
    check(framed(pairs, frames), preserve, folder.text_encoder)
    transformers(folder.structure or Structure.dense(folder.config))  # refuses a model that has none
    earlier = read_records(folder.path)
    unet = folder.unet().to(device).requires_grad_(False)
    with Bar("prompt") as bar:
        outcome = args.edit(unet, Job(folder, pairs, frames, preserve, earlier, progress=bar))
    if not isinstance(args, SeparableArgs) and (folder.path / SEPARABLE).exists():
        lost = ("what `erase separable` has erased before can no longer be given back",)
        outcome = replace(outcome, notes=(*outcome.notes, *lost))
    save_student(args.out, folder, unet, notes={RECORD: to_json([*earlier, outcome.record])}, tensors=outcome.tensors)
    return Erased(args.out, outcome, _page(outcome, args.out))


def _page(outcome: Outcome, out: Path) -> str:
    record = outcome.record
    lines = [
        f"{'erased':<9}{pair.erase!r} -> {pair.guide!r}" + (f", weight {pair.weight:g}" if pair.weight != 1 else "")
        for pair in record.pairs
    ]
    lines += [f"{'in':<9}{len(record.frames)} sentences"] if record.frames else []
    lines += [f"{'skipped':<9}{name}: the model has dropped it" for name in record.skipped]
    lines += [*outcome.notes, "", table(outcome.table, _PERCENT), "", f"{'written':<9}{out}"]
    return "\n".join(lines)
