"""Judge models of the mini world with the shipped probe, as `train` does at its end.

python -m bilevel_fast.evaluate --models runs/mini/student runs/mini/distilled --erase pointillism
"""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bilevel_fast import errors, flags, report
from bilevel_fast.config import Mini, preset
from bilevel_fast.errors import UserError
from bilevel_fast.folder import load_folder
from bilevel_fast.mini import TEACHER
from bilevel_fast.mini import experiment as mini
from bilevel_fast.mini.judge import judge
from bilevel_fast.mini.probe import Probe


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `evaluate`."""

    models: tuple[Path, ...] = (TEACHER,)
    """Model folders of the mini world. Default: the built-in teacher."""
    erase: tuple[str, ...] = ("pointillism",)
    """The styles that should be gone."""
    seed: int = 0
    """Seed of the sampling noise."""
    mini: Mini = field(default_factory=Mini)
    json: bool = False
    """Print one JSON object instead of a table."""


def main() -> None:
    config = flags.parse(EvaluateConfig, "bilevel_fast.evaluate", __doc__)
    erased, probe = mini.erased_styles(config.erase), Probe.load()
    settings = replace(preset("mini"), seed=config.seed, mini=config.mini)
    folders = [load_folder(path) for path in config.models]
    for folder in folders:
        if not folder.is_mini:
            raise UserError(f"{folder.path} is no model of the mini world; the probe cannot judge it")
    rows = {
        str(folder.path): asdict(judge(mini.portfolio(folder.unet(), folder, erased, settings), erased, probe))
        for folder in folders
    }
    print(json.dumps(rows, indent=2) if config.json else report.table(rows))


if __name__ == "__main__":
    sys.exit(errors.run(main))
