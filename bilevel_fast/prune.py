"""Prune a dense model to a budget.

python -m bilevel_fast.prune magnitude --budget 0.8 --out runs/pruned
"""

import sys
from typing import Any

from bilevel_fast.base import errors, flags
from bilevel_fast.base.alone import alone
from bilevel_fast.pruning import METHODS, method
from bilevel_fast.runs.prune_aptp import COMMANDS, SETTINGS
from bilevel_fast.runs.prune_method import Args, prune


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return dict.fromkeys(METHODS, Args) | SETTINGS


def main() -> None:
    alone("bilevel_fast.prune")
    first = next(iter(sys.argv[1:]), "")
    if first in COMMANDS:
        COMMANDS[first](sys.argv[2:])
        return
    if first and not first.startswith("-"):
        method(first, COMMANDS)  # mistyped: said before the flags, which may be those of what was meant
    commands = "\n".join(f"  {name:<14} {function.__doc__}" for name, function in COMMANDS.items())
    print(prune(flags.parse(Args, "bilevel_fast.prune", f"{__doc__}\n\nInstead of a method:\n{commands}")).page)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
