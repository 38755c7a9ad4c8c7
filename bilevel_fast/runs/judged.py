"""Models of the mini world, judged as `train` judges its own at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.progress import Bar
from bilevel_fast.models.folder import load_folder
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.worlds.mini import materials
from bilevel_fast.worlds.mini.settings import Mini


def judged(
    models: Sequence[Path], erase: Sequence[str], seed: int, settings: Mini, safe: Safe | None = None
) -> dict[str, dict[str, Any]]:
    """What the probe says about each model folder, by its path; `safe` keeps their drawings away from a concept.

    Raises:
        UserError: A style is none, or a folder holds no model of the mini world.
    """
    settings.check()
    erased = materials.erased_concepts(erase)
    folders = [load_folder(path) for path in models]
    for folder in folders:
        if folder.family.world != "mini":
            raise UserError(f"{folder.path} is no model of the mini world; the probe cannot judge it")
    found = {}
    with Bar("model") as bar:
        for number, folder in enumerate(folders):
            bar(number, len(folders))
            samples = materials.kept_away(folder.unet(), folder, erased, settings, seed, safe)
            found[str(folder.path)] = materials.quality(samples, erased)
        bar(len(folders), len(folders))
    return found
