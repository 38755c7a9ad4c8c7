"""Judge models of the mini world with the shipped probe, as `train` does at its end; or folders of images with the
paper's metrics, on weights of yours.

python -m bilevel_fast.evaluate --models runs/mini/student runs/mini/distilled --erase pointillism

python -m bilevel_fast.evaluate --suite style --images IMAGES --reference DISTILLED --prompts "test_Van Gogh.csv"
    --clip-weights ViT-B-32.pt --csd-weights csd.pth --out eval.json
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilevel_fast.base import errors, flags
from bilevel_fast.base.alone import alone
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.tables import table
from bilevel_fast.metrics.command import Folders, given, measure
from bilevel_fast.models.folder import load_folder
from bilevel_fast.worlds import world
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.settings import Mini


@dataclass(frozen=True)
class EvaluateConfig(Folders):
    """Settings of `evaluate`."""

    models: tuple[Path, ...] = (TEACHER,)
    """mini: model folders of the mini world. Default: the built-in teacher."""
    erase: tuple[str, ...] = ("pointillism",)
    """mini: the styles that should be gone."""
    seed: int = 0
    """Seed of the sampling noise, or of the bootstrap."""
    mini: Mini = field(default_factory=Mini)
    json: bool = False
    """Print one JSON object instead of a table."""


def judge_models(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """What the probe says about each model folder."""
    if extra := given(config):
        raise UserError(f"--suite mini does not read {extra[0]}; choose --suite style, nsfw or coco")
    config.mini.check()
    here = world("mini")
    erased = here.erased_concepts(config.erase)
    folders = [load_folder(path) for path in config.models]
    for folder in folders:
        if folder.family.world != "mini":
            raise UserError(f"{folder.path} is no model of the mini world; the probe cannot judge it")
    return {
        str(folder.path): here.quality(here.portfolio(folder.unet(), folder, erased, config.mini, config.seed), erased)
        for folder in folders
    }


def main() -> None:
    alone("bilevel_fast.evaluate")
    config = flags.parse(EvaluateConfig, "bilevel_fast.evaluate", __doc__)
    if config.suite == "mini":
        rows = judge_models(config)
        print(json.dumps(rows, indent=2) if config.json else table(rows))
        return
    default = EvaluateConfig()
    if (config.models, config.erase, config.mini) != (default.models, default.erase, default.mini):
        raise UserError(f"--suite {config.suite} measures --images; --models, --erase and --mini are for --suite mini")
    result, text = measure(config, config.seed)
    print(json.dumps(result, indent=2, ensure_ascii=False) if config.json else text)


if __name__ == "__main__":
    sys.exit(errors.run(main))
