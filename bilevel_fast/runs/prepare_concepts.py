"""`python -m bilevel_fast.prepare concepts`: the bank that `train --concepts` reads, drawn by the dense teacher."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bilevel_fast.base import flags
from bilevel_fast.base.devices import Ranks, pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.progress import Bar
from bilevel_fast.data.bank import Concept, Shows, anchor_for, make_part, prompts_for, without
from bilevel_fast.data.cache import INDEX
from bilevel_fast.data.writer import Part
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs.subjects import read_subjects
from bilevel_fast.sampling.prompts import read_prompts
from bilevel_fast.sampling.to_folder import Precision, Recipe

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConceptsArgs:
    """Draw concept banks: images of what is to be suppressed, with their prompts, and the prompts without it."""

    MAIN: ClassVar = (
        *("out", "model", "phrase", "replacement", "subjects", "held_out"),
        *("count", "seed", "steps", "shows", "shard", "device"),
    )

    out: Path
    """Folder of the bank; of several phrases, a folder for each in it. If it holds a part of this bank, the command
    goes on with it."""
    model: Path
    """Model folder of the dense teacher, which draws, or its id on the hub; or `mini` or `emoji`, the built-in ones."""
    phrase: tuple[str, ...]
    """The concept as it stands in prompts: "by Claude Monet", "naked"; each of several gets a bank of its own."""
    replacement: tuple[str, ...] = ("",)
    """What stands in its place in the prompt without it: one for each phrase, or one for all; by default nothing."""
    subjects: str | None = None
    """What to show with the concept: a prompt file (a line is followed by the phrase, unless it holds it or has `{}`
    where it belongs), or `things`, `people`, `mini` or `emoji`: that world's captions that are not held out for its
    judge. Default: the model's own world."""
    held_out: tuple[Path, ...] = ()
    """Prompt files of the evaluation: none of their prompts is drawn. A .csv with a column prompt or adv_prompt, a .txt
    with a prompt per line, or COCO's captions, .json."""
    count: int = 500
    """Images of each concept; prompts take turns."""
    seed: int = 0
    """Of the noise."""
    steps: int = 25
    """Of PNDM."""
    guidance: float | None = None
    """Classifier-free guidance scale. Default: 3 for a built-in world, 5 for Stable Diffusion XL, else 7.5."""
    size: int | None = None
    """Height and width of the latents. Default: what the model was made for, 64 (512 pixels) at most but for XL."""
    shows: Shows = "prompt"
    """Draw by the prompts, or by the prompts without the concept, as the eraser concept-ablation wants them."""
    batch: int = 16
    """Images drawn together."""
    shard: str | None = None
    """i/n: draw the i-th, from 0, of n parts. Whoever is last joins them. Default: what torchrun says, else all."""
    precision: Precision = "auto"
    """What the UNet computes in: by default bf16 on a GPU that has it (sm_80 and later), else fp32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""


def main(argv: Sequence[str]) -> None:
    """Carry out the command."""
    args = flags.parse(ConceptsArgs, "bilevel_fast.prepare concepts", ConceptsArgs.__doc__, args=argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    concepts = pair(args.phrase, args.replacement)
    held_out = [prompt for path in args.held_out for prompt in read_prompts(path)]
    ranks = Ranks.from_environment()
    part = Part(ranks.rank, ranks.world) if args.shard is None else Part.parse(args.shard)
    device = pick_device(ranks.device(args.device))
    folder = load_folder(args.model, device)
    if folder.structure is not None:
        _log.warning("%s is pruned; what is to be suppressed is what the dense teacher draws", args.model)
    recipe = Recipe(args.steps, args.guidance, "pndm", args.seed, args.size, args.precision).of(folder, device)
    assert recipe.guidance is not None
    assert recipe.precision != "auto"
    subjects = read_subjects(args.subjects, folder.family.world)
    drawn = {path: bank_prompts(subjects, concept, held_out) for path, concept in places(args.out, concepts).items()}
    for path, (prompts, anchors) in drawn.items():
        left_out = len(subjects) - len(prompts)
        if args.count < len(prompts):
            _log.warning("%s: --count %d draws the first so many of %d prompts", path, args.count, len(prompts))
        with Bar("img") as bar:
            bank = make_part(
                folder, prompts, anchors, args.count, recipe.seed, recipe.guidance, recipe.steps, args.batch, path,
                part, size=recipe.size, device=device, progress=bar, shows=args.shows, precision=recipe.precision,
            )  # fmt: skip
        if bank is None:
            print(f"{path}: part {part.number}/{part.count} is finished, others are not")
            continue
        shown = f"{prompts[0]!r} against {anchors[0]!r}"
        print(f"{path}: {len(bank)} images of {len(prompts)} prompts, {left_out} held out; {shown}")


def pair(phrases: Sequence[str], replacements: Sequence[str]) -> list[Concept]:
    """The concepts; one replacement serves all.

    Raises:
        UserError: The lists do not fit each other, or a phrase is empty or there twice, or there is none.
    """
    if not phrases:
        raise UserError("--phrase wants at least one value")
    if len(replacements) not in (1, len(phrases)):
        raise UserError(
            f"{len(replacements)} of --replacement came for {len(phrases)} of --phrase; wanted one each, or one for all"
        )
    forms = [" ".join(phrase.casefold().split()) for phrase in phrases]
    for phrase, form in zip(phrases, forms, strict=True):
        if forms.count(form) > 1:
            raise UserError(f"--phrase {phrase!r} is there twice; wanted each once")
    each = list(replacements) * len(phrases) if len(replacements) == 1 else replacements
    return [Concept(phrase, replacement) for phrase, replacement in zip(phrases, each, strict=True)]


def places(out: Path, concepts: Sequence[Concept]) -> dict[Path, Concept]:
    """Where each bank lies: `out` itself, or folders in it that are named after the phrases.

    Raises:
        UserError: There are several, and `out` is the bank of one.
    """
    if len(concepts) == 1:
        return {out: concepts[0]}
    if (out / INDEX).exists():
        raise UserError(f"{out} is a bank itself; several phrases want a folder that holds a bank for each")
    found: dict[Path, Concept] = {}
    for concept in concepts:
        name = re.sub(r"\W+", "-", concept.phrase.lower()).strip("-") or "concept"
        twins = sum(path.name == name or path.name.startswith(f"{name}--") for path in found)
        found[out / (f"{name}--{twins + 1}" if twins else name)] = concept
    return found


def bank_prompts(subjects: Sequence[str], concept: Concept, held_out: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts that show the concept and are not held out, and each without the concept.

    A subject that holds the phrase already is a prompt as it stands.

    Raises:
        UserError: None is left.
    """
    prompts: list[str] = []
    for subject in subjects:
        try:
            anchor_for(subject, concept)
            prompts.append(subject)
        except UserError:
            prompts += prompts_for([subject], concept)
    prompts = without(prompts, held_out)
    return prompts, [anchor_for(prompt, concept) for prompt in prompts]
