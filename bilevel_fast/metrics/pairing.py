"""Images, their prompts and the reference's images, brought together by id and never by order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics.images import Pictures
from bilevel_fast.metrics.prompt_sets import PromptSet


@dataclass(frozen=True)
class Pairs:
    """The images of a prompt set, in its order; and of a reference, in the same order."""

    prompts: PromptSet
    images: list[Path]
    references: list[Path] | None
    notes: list[str]
    """What a reader of the numbers should know."""
    settings: Mapping[str, Any]


def pair(images: Path | str, prompts: PromptSet, reference: Path | str | None = None) -> Pairs:
    """Find the image of every prompt, and of the reference.

    Raises:
        UserError: A folder is broken, an id is missing, an image was drawn from another prompt than the file has under
            its id, or its reference from another seed.
    """
    ours = Pictures.open(images)
    files = ours.of(prompts.ids)
    _same_prompts(ours, prompts)
    notes = [*ours.notes, *_left_over(ours, prompts), *_other_seeds(ours, prompts)]
    if reference is None:
        return Pairs(prompts, files, None, notes, ours.settings)
    theirs = Pictures.open(reference)
    references = theirs.of(prompts.ids)
    _same_prompts(theirs, prompts)
    for name in prompts.ids:
        a, b = ours.entries.get(name), theirs.entries.get(name)
        if a and b and a.seed != b.seed:
            raise UserError(
                f"{ours.path} and {theirs.path}: id {name!r} was drawn with seeds {a.seed} and {b.seed}; a comparison "
                "wants the same"
            )
    notes += [*theirs.notes, *_left_over(theirs, prompts)]
    mine, other = ours.settings.get("recipe") or {}, theirs.settings.get("recipe") or {}
    if mine and other:
        differ = [key for key in dict.fromkeys((*mine, *other)) if mine.get(key) != other.get(key) and key != "model"]
        notes += [f"{key} is {mine.get(key)} and, of the reference, {other.get(key)}" for key in differ]
    return Pairs(prompts, files, references, notes, ours.settings)


def _same_prompts(pictures: Pictures, prompts: PromptSet) -> None:
    for row in prompts.rows:
        entry = pictures.entries.get(row.id)
        if entry is not None and entry.prompt.strip() != row.prompt.strip():
            raise UserError(
                f"{pictures.path}: image {row.id!r} was drawn from {entry.prompt!r}, and {prompts.name} has "
                f"{row.prompt!r} under that id"
            )


def _other_seeds(pictures: Pictures, prompts: PromptSet) -> list[str]:
    drawn = [(row.seed, pictures.entries[row.id].seed) for row in prompts.rows if row.id in pictures.entries]
    other = sum(wanted is not None and wanted != seed for wanted, seed in drawn)
    return (
        [f"{other} images of {pictures.path} were not drawn with the evaluation_seed of their prompt"] if other else []
    )


def _left_over(pictures: Pictures, prompts: PromptSet) -> list[str]:
    extra = len(pictures.files) - len(prompts.rows)
    return [f"{extra} images of {pictures.path} are of no prompt of {prompts.name} and are left out"] if extra else []


def each(
    images: Sequence[Path], prompts: Sequence[Path], references: Sequence[Path] | None
) -> list[tuple[Path, Path, Path | None]]:
    """Folder, prompt file and reference of each set.

    Raises:
        UserError: They are not as many of each.
    """
    if not prompts:
        raise UserError("there is no prompt file: give --prompts FILE, one for each --images FOLDER")
    if len(images) != len(prompts) or (references and len(references) != len(images)):
        raise UserError(
            f"{len(images)} image folders, {len(prompts)} prompt files and {len(references or [])} references came; "
            "wanted as many of each: ids of two files may be the same"
        )
    return list(zip(images, prompts, references or [None] * len(images), strict=True))
