"""The paper's tables and figures (arXiv:2412.15341), one command each.

On a built-in world, or on Stable Diffusion 2.1:

python -m bilevel_fast.reproduce table1
python -m bilevel_fast.reproduce table1 --world emoji
python -m bilevel_fast.reproduce table1 --scale full --run.teacher SD21 ...
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel_fast.base import errors
from bilevel_fast.base.alone import alone
from bilevel_fast.runs.paper.arguments import Args, read


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": Args}


def parse(argv: Sequence[str]) -> Args:
    """Read the command line.

    Raises:
        UserError: The settings contradict each other, or the experiment.
    """
    return read(argv, __doc__)


def main() -> None:
    alone("bilevel_fast.reproduce")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    args = parse(sys.argv[1:])
    from bilevel_fast.runs.paper.run import reproduce
    from bilevel_fast.training.loop import Interrupted  # after parsing: --help and a typo should not wait

    full = args.full if args.scale == "full" else None
    out = args.out or Path("runs") / f"reproduce-{args.scale if args.world == 'mini' else args.world}"
    try:
        text, results = reproduce(args.experiment, args.run, args.rows, full, args.seeds, out)
    except Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"\n{text}\n\n{results}: {', '.join(sorted(path.name for path in results.iterdir()))}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
