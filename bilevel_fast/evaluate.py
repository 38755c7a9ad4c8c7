"""Judge models of a built-in world with the shipped probe, as `train` does at its end; or folders of images with the
paper's metrics, on weights of yours. Under torchrun, ranks share samples and images.

python -m bilevel_fast.evaluate --models runs/mini/student runs/mini/distilled --erase pointillism
python -m bilevel_fast.evaluate --world emoji --models runs/emoji/student --erase noto

python -m bilevel_fast.evaluate --suite style --images IMAGES --reference DISTILLED --prompts "test_Van Gogh.csv"
    --clip-weights ViT-B-32.pt --csd-weights csd.pth --out eval.json
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bilevel_fast import api
from bilevel_fast.base import errors, flags
from bilevel_fast.base.alone import together
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.tables import table
from bilevel_fast.metrics.settings import Folders, given
from bilevel_fast.sampling.strength import Strength
from bilevel_fast.worlds.emoji.settings import Emoji
from bilevel_fast.worlds.mini.settings import Mini

if TYPE_CHECKING:
    from bilevel_fast.scale.team import Team


@dataclass(frozen=True)
class EvaluateConfig(Folders):
    """Settings of `evaluate`."""

    MAIN: ClassVar = (
        *("suite", "world", "models", "erase", "images", "prompts", "reference", "out", "json", "seed", "device"),
        *("clip_weights", "csd_weights", "inception_weights"),
    )
    GROUPS: ClassVar = {
        "what is judged": ("suite", "seed", "json"),
        "--suite mini": ("world", "models", "erase", "safe", "safe_strength"),
        "--suite style, nsfw or coco": (
            *("images", "prompts", "reference", "out", "clip_weights", "clip_model", "csd_weights"),
            *("inception_weights", "statistics_out", "draws", "fid_draws", "batch", "device"),
        ),
    }

    world: Literal["mini", "emoji"] = "mini"
    """mini: the built-in world that they are models of."""
    models: tuple[Path, ...] = ()
    """mini: model folders of --world. Default: its built-in teacher."""
    erase: tuple[str, ...] = ()
    """mini: the styles that should be gone. Default: what `train` on --world erases."""
    seed: int = 0
    """Seed of the sampling noise, or of the bootstrap."""
    safe: str | None = None
    """mini: text of a concept to keep the drawings away from, as `sample --safe` does: a baseline that trains
    nothing."""
    safe_strength: Strength | None = None
    """mini: how hard. Default: medium, whose warm-up of 10 leaves 2 of the judge's 12 steps; max has none."""
    mini: Mini = field(default_factory=Mini)
    emoji: Emoji = field(default_factory=Emoji)
    json: bool = False
    """Print one JSON object instead of a table."""


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": EvaluateConfig}


def main() -> None:
    together()
    config = flags.parse(EvaluateConfig, "bilevel_fast.evaluate", __doc__)
    # after parsing: --help and a typo should not wait for torch
    from bilevel_fast.base.devices import Ranks
    from bilevel_fast.scale.team import Team

    with Team.join(Ranks.from_environment()) as team:
        team.agree({"flags": sys.argv[1:]})
        said = _said(config, team)
        if not team.rank:
            print(said)


def _said(config: EvaluateConfig, team: "Team") -> str:
    if config.suite == "mini":
        if extra := given(config):
            raise UserError(f"--suite mini does not read {extra[0]}; choose --suite style, nsfw or coco")
        models = config.models or (Path(config.world),)
        sampled = {config.world: getattr(config, config.world)}
        away, hard = config.safe, config.safe_strength
        rows = api.evaluate(models, config.erase, config.seed, **sampled, safe=away, safe_strength=hard, team=team)
        return json.dumps(rows, indent=2) if config.json else table(rows)
    default = EvaluateConfig()
    for name in ("world", "models", "erase", "safe", "safe_strength", "mini", "emoji"):
        if getattr(config, name) != getattr(default, name):
            flag = name.replace("_", "-")
            raise UserError(f"--suite {config.suite} measures --images; --{flag} is for --suite mini")
    from bilevel_fast.metrics.command import measure

    config = replace(config, device=team.ranks.device(config.device))
    result, text = measure(config, config.seed, team)
    return json.dumps(result, indent=2, ensure_ascii=False) if config.json else text


if __name__ == "__main__":
    sys.exit(errors.run(main))
