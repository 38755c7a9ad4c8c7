"""Models of a built-in world, judged as `train` judges its own at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.progress import Bar
from bilevel_fast.models.folder import load_folder
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.scale.team import ALONE, Team
from bilevel_fast.worlds import drawn_world
from bilevel_fast.worlds.settings import Drawn


def judged(
    models: Sequence[Path],
    erase: Sequence[str],
    seed: int,
    settings: Drawn,
    safe: Safe | None = None,
    team: Team = ALONE,
) -> dict[str, dict[str, Any]]:
    """What the probe of the settings' world says about each model folder, by its path; `safe` keeps their
    drawings away from a concept. The ranks of `team` share the sampling.

    Raises:
        UserError: A style is none, a folder holds no model of that world, or `safe` begins after the last step.
    """
    settings.check()
    if safe is not None:
        safe.check(settings.judge_steps)
    here = drawn_world(settings.NAME)
    erased = here.erased_concepts(erase)
    folders = [load_folder(path) for path in models]
    for folder in folders:
        if folder.family.world != settings.NAME:
            raise UserError(f"{folder.path} is no model of the {settings.NAME} world; the probe cannot judge it")
    found = {}
    with Bar("model") as bar:
        for number, folder in enumerate(folders):
            bar(number, len(folders))
            samples = here.portfolio(folder.unet(), folder, erased, settings, seed, team, safe)
            found[str(folder.path)] = here.quality(samples, erased)
        bar(len(folders), len(folders))
    return found
