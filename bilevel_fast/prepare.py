"""Make the latent cache that `train --data` reads.

python -m bilevel_fast.prepare coco --root COCO --split train2017 --model sd21/ --out CACHE
python -m bilevel_fast.prepare folder --root IMAGES --model sd21/ --out CACHE       lines of IMAGES/metadata.jsonl
python -m bilevel_fast.prepare webdataset --tars '*.tar' --model sd21/ --out CACHE  images with a .txt or .json
python -m bilevel_fast.prepare check CACHE                                          every byte, every number
python -m bilevel_fast.prepare concepts ...                                         the bank that --concepts reads

Killed, it goes on with the same command. On n machines, --shard 0/n to n-1/n make one cache, and so do the processes
of torchrun. What cannot be used is left out with its captions and named in CACHE/dropped.jsonl.
"""

import sys
from collections.abc import Callable, Sequence

from bilevel_fast.base import errors
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


def main() -> None:
    name = next(iter(sys.argv[1:]), "--help")
    if name in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\npython -m bilevel_fast.prepare NAME --help says more")
        return
    if name not in COMMANDS:
        raise UserError(f"there is nothing to prepare called {name!r}{nearest(name, COMMANDS)}")
    COMMANDS[name](sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
