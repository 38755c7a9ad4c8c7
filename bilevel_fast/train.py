"""Prune, distil and suppress concepts in one run.

The built-in mini world, end to end; a model of yours; and on 8 GPUs, which nobody has tried yet: docs/scale.md says
what is tested, and what is not supported.

python -m bilevel_fast.train
python -m bilevel_fast.train --preset paper --teacher DIR --student DIR --data CACHE --concepts BANK
torchrun --standalone --nproc-per-node 8 -m bilevel_fast.train --scale.leaves 8 ...
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bilevel_fast import api
from bilevel_fast.base import errors, flags
from bilevel_fast.base.alone import together
from bilevel_fast.runs.config import PRESETS, TrainConfig, preset


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": TrainConfig}


def parse(argv: Sequence[str]) -> TrainConfig:
    """Read the command line; flags change the fields of a preset.

    Without --preset it is `paper` if there is --data, otherwise that of --world.
    """
    usual = "paper" if any(arg.partition("=")[0] == "--data" for arg in argv) else flags.value(argv, "--world")
    name = flags.value(argv, "--preset") or (usual if usual in PRESETS else "mini")
    config = flags.parse(TrainConfig, "bilevel_fast.train", __doc__, args=argv, default=preset(name))
    config.check()
    from bilevel_fast.erasing import registry as upper  # after the flags are read: --help should not wait for torch

    upper.check(config.upper, preset(config.preset).upper, config.scale.in_parts)
    return config


def main() -> None:
    together()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    config = parse(sys.argv[1:])
    if config.dry_run:
        print(json.dumps(config.to_dict(), indent=2))
        return
    # after parsing: --help and a typo should not wait for torch
    from bilevel_fast.base.devices import Ranks
    from bilevel_fast.runs.page.ending import end
    from bilevel_fast.runs.ranks import goes_on, started_with
    from bilevel_fast.scale.team import Team
    from bilevel_fast.training.loop import Interrupted

    ranks = Ranks.from_environment()
    if ranks.rank:
        logging.disable()  # the first rank says what there is to say
    if goes_on(ranks, config.out):
        config = replace(config, resume=True)  # the same command, for the second time
    with Team.join(ranks) as team:
        if team.world > 1:
            team.agree(started_with(config))
        ranks.leaves(config.scale.leaves)
        try:
            summary = api.train(replace(config, device=ranks.device(config.device)), team)
        except Interrupted as interrupted:
            if team.rank == 0:
                print(f"{interrupted}; go on with --resume --out {config.out}", file=sys.stderr)
            # torchrun starts all processes again if one of them does not end with 0
            raise SystemExit(0 if team.launched else 130) from None
    if not team.rank:
        print("\n" + end(summary, config.out))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
