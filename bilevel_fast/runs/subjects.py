"""Sentences that hold a concept, by the names that `--subjects` knows: sets, built-in worlds and prompt files."""

from pathlib import Path

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.erasing.concept_prune import FRAMES
from bilevel_fast.erasing.pairs import Frame
from bilevel_fast.sampling.prompts import read_prompts
from bilevel_fast.worlds import WORLDS, world


def find_frames(subjects: str | None, own: str | None, by_default: str | None = None) -> tuple[Frame, ...]:
    """The sentences that `--subjects` names; those of `by_default` if it is None.

    Args:
        own: The built-in world that the model draws; None where it draws none.

    Raises:
        UserError: There is neither a set nor a file of that name, or the world is another model's.
    """
    subjects = by_default if subjects is None else subjects
    if subjects is None:
        return ()
    if subjects in FRAMES:
        return FRAMES[subjects]
    if subjects in WORLDS:
        if subjects != own:
            raise UserError(f"--subjects {subjects} is for models of the {subjects} world")
        return tuple(map(Frame.of, world(subjects).subjects()))
    if not Path(subjects).exists():
        raise UserError(f"--subjects {subjects}: no such file, nor a set{nearest(subjects, (*FRAMES, *WORLDS))}")
    return tuple(map(Frame.of, read_prompts(subjects)))


def read_subjects(subjects: str | None, own: str | None) -> list[str]:
    """The same as texts; those of a prompt file as they stand there, and the own world's by default.

    Raises:
        UserError: As `find_frames`, or there is neither a name nor a world of its own.
    """
    subjects = own if subjects is None else subjects
    if subjects is None:
        raise UserError(f"--subjects is missing; wanted a prompt file, or one of {', '.join(FRAMES)}")
    if subjects in (*FRAMES, *WORLDS) or not Path(subjects).exists():
        return [frame.erase for frame in find_frames(subjects, own)]
    return read_prompts(subjects)
