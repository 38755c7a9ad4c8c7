"""Make the latent cache that `train --data` reads.

coco           images and captions of COCO
folder         a folder of images with a metadata.jsonl
webdataset     tars of images, each with a .txt or .json
check          verifies a cache or a bank, every byte and every number
concepts       draws the bank that `train --concepts` reads

python -m bilevel_fast.prepare coco --root COCO --split train2017 --model sd21/ --out CACHE
python -m bilevel_fast.prepare folder --root IMAGES --model sd21/ --out CACHE
python -m bilevel_fast.prepare webdataset --tars '*.tar' --model sd21/ --out CACHE
python -m bilevel_fast.prepare check CACHE

Killed, it goes on with the same command. On n machines, --shard 0/n to n-1/n make one cache, and so do the processes
of torchrun. What cannot be used is left out with its captions and named in CACHE/dropped.jsonl.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, nearest


def _images(name: str) -> Callable[[Sequence[str]], None]:
    def run(argv: Sequence[str]) -> None:
        from bilevel_fast.data import commands

        commands.images(name, argv)

    return run


def _check(argv: Sequence[str]) -> None:
    from bilevel_fast.data import check

    check.main(argv)


def _concepts(argv: Sequence[str]) -> None:
    from bilevel_fast.runs import prepare_concepts as concepts

    concepts.main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "coco": _images("coco"),
    "folder": _images("folder"),
    "webdataset": _images("webdataset"),
    "check": _check,
    "concepts": _concepts,
}


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    from bilevel_fast.data import check, commands
    from bilevel_fast.runs.prepare_concepts import ConceptsArgs

    return {**commands.ARGS, "check": check.Args, "concepts": ConceptsArgs}


def main() -> None:
    name = next(iter(sys.argv[1:]), "--help")
    if name in ("-h", "--help"):
        print(flags.overview(f"{__doc__}\npython -m bilevel_fast.prepare NAME --help says more"))
        return
    if name not in COMMANDS:
        raise UserError(f"there is nothing to prepare called {name!r}{nearest(name, COMMANDS)}")
    COMMANDS[name](sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
