"""Sentences that hold a concept, by the names that `--subjects` knows."""

from pathlib import Path

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.erasing.concept_prune import FRAMES
from bilevel_fast.erasing.pairs import Frame
from bilevel_fast.sampling.prompts import read_prompts
from bilevel_fast.worlds.mini.judge import is_held_out
from bilevel_fast.worlds.mini.world import SCENES


def find_frames(subjects: str | None, is_mini: bool, by_default: str | None = None) -> tuple[Frame, ...]:
    """The sentences that `--subjects` names.

    Raises:
        UserError: There is neither a set nor a file of that name.
    """
    subjects = by_default if subjects is None else subjects
    if subjects is None:
        return ()
    if subjects in FRAMES:
        return FRAMES[subjects]
    if subjects == "mini":
        if not is_mini:
            raise UserError("--subjects mini is for models of the mini world")
        return tuple(Frame.of(scene.caption) for scene in SCENES if not scene.style and not is_held_out(scene))
    if not Path(subjects).exists():
        raise UserError(f"--subjects {subjects}: no such file, nor a set{nearest(subjects, (*FRAMES, 'mini'))}")
    return tuple(Frame.of(line) for line in read_prompts(subjects))
