"""Prune, distil and suppress concepts in one run.

python -m bilevel_fast.train                            the built-in mini world, end to end
python -m bilevel_fast.train --preset paper --teacher DIR --student DIR --data CACHE --concepts BANK
"""

import json
import logging
import sys
from collections.abc import Sequence

from bilevel_fast import api
from bilevel_fast.base import errors, flags
from bilevel_fast.runs.config import TrainConfig, preset


def parse(argv: Sequence[str]) -> TrainConfig:
    """Read the command line; flags change the fields of a preset.

    Without --preset it is `paper` if there is --data, otherwise `mini`.
    """
    name = "paper" if any(arg.partition("=")[0] == "--data" for arg in argv) else "mini"
    for position, arg in enumerate(argv):
        flag, has_value, value = arg.partition("=")
        if flag == "--preset":
            name = value if has_value else argv[position + 1] if position + 1 < len(argv) else name
    config = flags.parse(TrainConfig, "bilevel_fast.train", __doc__, args=argv, default=preset(name))
    config.check()
    from bilevel_fast.erasing import registry as upper  # after the flags are read: --help should not wait for torch

    upper.check(config.upper, preset(config.preset).upper)
    return config


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    config = parse(sys.argv[1:])
    if config.dry_run:
        print(json.dumps(config.to_dict(), indent=2))
        return
    # after parsing: --help and a typo should not wait for torch
    from bilevel_fast.runs.page import end
    from bilevel_fast.training.loop import Interrupted

    try:
        summary = api.train(config)
    except Interrupted as interrupted:
        print(f"{interrupted}; go on with --resume --out {config.out}", file=sys.stderr)
        raise SystemExit(130) from None
    print("\n" + end(summary, config.out))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
