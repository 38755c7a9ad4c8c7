"""Search prompts that bring back what was erased from a model, and see how soon they do.

python -m bilevel_fast.attack unlearn-diff --model erased/ --concepts bank/ --out runs/attacked
python -m bilevel_fast.attack ring-a-bell --model erased/ --concepts bank/ --tokens 10 --out runs/attacked

unlearn-diff  tokens before a prompt, by descent on the model's own loss (arXiv:2310.11868)
ring-a-bell   texts near the concept's states, by a genetic search (arXiv:2310.10012)
mma           texts that mean the prompt without its words (arXiv:2311.17516)
"""

import sys
from typing import Any

from bilevel_fast.base import errors, flags
from bilevel_fast.base.alone import alone
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.runs.attack_model import METHODS, attack


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return dict(METHODS)


def main() -> None:
    alone("bilevel_fast.attack")
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(flags.overview(f"{__doc__}\nunlearn-diff --help, ring-a-bell --help and mma --help say more"))
        return
    if name not in METHODS:
        raise UserError(f"no attack {name!r}{nearest(name, METHODS)}")
    args = flags.parse(METHODS[name], f"bilevel_fast.attack {name}", METHODS[name].__doc__, args=sys.argv[2:])
    print(attack(name, args))


if __name__ == "__main__":
    sys.exit(errors.run(main))
