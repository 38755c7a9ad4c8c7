"""Erase concepts from a model folder, dense or pruned, by an edit of its weights.

python -m bilevel_fast.erase uce --erase "in the style of pointillism" --preserve prompts.txt --out runs/erased
python -m bilevel_fast.erase concept-prune --erase "in the style of pointillism" --out runs/erased

uce            keys and values of a text become those of its guide, in closed form (arXiv:2308.14761)
time           the same, and nothing is preserved (arXiv:2303.08084)
separable      each text by an increment that no other text sees, and that can be given back (arXiv:2402.05947)
concept-prune  zeros feed-forward weights that work for the concept (arXiv:2405.19237)
p-esd          zeros weights of cross-attentions by a mask learnt under ESD's loss (arXiv:2405.16534)
"""

import sys
from typing import Any

from bilevel_fast.base import errors, flags
from bilevel_fast.base.alone import alone
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.runs.erase_model import EDITS, erase


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return dict(EDITS)


def main() -> None:
    alone("bilevel_fast.erase")
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(flags.overview(f"{__doc__}\nuce --help, time --help and so on say more"))
        return
    if name not in EDITS:
        raise UserError(f"no edit {name!r}{nearest(name, EDITS)}")
    args = flags.parse(EDITS[name], f"bilevel_fast.erase {name}", EDITS[name].__doc__, args=sys.argv[2:])
    print(erase(args).page)


if __name__ == "__main__":
    sys.exit(errors.run(main))
