"""`python -m bilevel_fast.prepare check CACHE`: is every byte what was written, every number finite, every line there.

Exit code 0: sound. 1: damaged, each damage on a line of its own. 2: not a cache, or not a finished one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bilevel_fast.base import flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import open_safetensors
from bilevel_fast.data.cache import DROPPED, Cache, LeftOut, Shard, check_sum
from bilevel_fast.data.stream import ImageStream, is_list
from bilevel_fast.data.writer import read_report


@dataclass(frozen=True)
class Args:
    """Verify a latent cache, a concept bank or a list of images."""

    cache: Annotated[Path, tyro.conf.Positional]
    """Its folder."""


def damages(cache: Cache) -> Iterator[str]:
    """What is wrong with a cache, beyond what opening it finds; one line each."""
    for shard in cache.index.shards:
        yield from _attempt(cache, shard)
    yield from _of_report(cache.path, cache.index.dropped)


def _of_report(path: Path, dropped: LeftOut) -> Iterator[str]:
    if dropped.lines:
        try:
            check_sum(path / DROPPED, dropped.sha256)
            if (lines := len(read_report(path / DROPPED))) != dropped.lines:
                yield f"{path / DROPPED} has {lines} lines, {dropped.lines} were left out"
        except UserError as error:
            yield str(error)


def _say(damages: Iterable[str]) -> None:
    """Print them as they are found; ends the command if there are any."""
    found = False
    for line in damages:
        print(line, flush=True)
        found = True
    if found:
        raise SystemExit(1)


def _attempt(cache: Cache, shard: Shard) -> Iterator[str]:
    for name, wanted in ((shard.file, shard.sha256), (shard.captions, shard.captions_sha256)):
        try:
            check_sum(cache.path / name, wanted)
        except UserError as error:
            yield str(error)
            return
    # a file may be as it was written and still be wrong: what wrote it may have been
    first = sum(other.samples for other in cache.index.shards[: cache.index.shards.index(shard)])
    try:
        for sample in range(first, first + shard.samples):
            cache.captions(sample)
    except UserError as error:
        yield str(error)
    values = open_safetensors(cache.path / shard.file).get_tensor("moments")
    bad = (~values.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        yield f"{cache.path / shard.file}: samples {', '.join(map(str, bad[:5]))} are not finite"


def main(argv: Sequence[str]) -> None:
    args = flags.parse(Args, "bilevel_fast.prepare check", __doc__, args=argv)
    if is_list(args.cache):
        images = ImageStream(args.cache)
        _say([*images.damages(), *_of_report(args.cache, images.index.dropped)])
        print(f"{args.cache} is sound: a list of {len(images)} images in {images.index.root}")
        return
    cache = Cache.open(args.cache)
    _say(damages(cache))
    index = cache.index
    size = "x".join(map(str, index.latent_shape))
    print(
        f"{args.cache} is sound: {len(cache)} {index.kind}, {cache.views} views of {size} in {index.dtype}, "
        f"{len(index.shards)} files, {index.dropped.pairs} images and {index.dropped.captions} captions left out"
    )
