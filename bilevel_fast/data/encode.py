"""From images and captions to a latent cache: read, look at, decode, encode, write; in order, and on after a kill.

A batch is what is usable among `batch` entries that follow each other, counted from the start of a file of the cache.
So an image is encoded next to the same others whether the process was killed before or not, and the bits are the same.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.cache import Cache, Index, LeftOut
from bilevel_fast.data.dali import Decoder
from bilevel_fast.data.listing import ListedImage, Listing
from bilevel_fast.data.pictures import Crop, Framing, Unusable, upright_size
from bilevel_fast.data.writer import WHOLE, CacheWriter, Part, at_work, finished, join
from bilevel_fast.models.autoencoder import Autoencoder
from bilevel_fast.models.weights import DIGEST

_AHEAD = 2  # batches that are read and decoded while one is encoded
_T = TypeVar("_T")
_U = TypeVar("_U")


class Source(Protocol):
    """Entries by number. An entry with a problem has no bytes."""

    def __len__(self) -> int: ...

    @property
    def identity(self) -> Any:
        """JSON that differs where another cache would come out."""
        ...

    @property
    def former(self) -> Any:
        """What it was in earlier releases, where that was something else; they have begun caches."""
        ...

    def read(self, positions: range) -> list[tuple[ListedImage, bytes]]:
        """Entries and their files, whole; ranges are asked for in order."""
        ...


class Files:
    """The source that a listing describes."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing

    def __len__(self) -> int:
        return len(self.listing.entries)

    @property
    def identity(self) -> Any:
        return [asdict(entry) for entry in self.listing.entries]

    former = identity

    def read(self, positions: range) -> list[tuple[ListedImage, bytes]]:
        return [self._read(self.listing.entries[position]) for position in positions]

    def _read(self, entry: ListedImage) -> tuple[ListedImage, bytes]:
        try:
            return entry, self.listing.read(entry)
        except Unusable as reason:
            return replace(entry, problem=str(reason)), b""


@dataclass(frozen=True)
class Decoded:
    """One batch: all its entries, and the pixels of those that are usable, in the same order."""

    entries: tuple[ListedImage, ...]
    """With the problem of each that is not usable."""
    views: tuple[Tensor, ...]
    """V times (B, 3, R, R) fp32 pixels in [-1, 1]."""
    crops: tuple[tuple[Crop, ...], ...] = ()
    """Of each usable entry, how its V views were cut out."""


def decode(found: Sequence[tuple[ListedImage, bytes]], views: int, framing: Framing, decoder: Decoder) -> Decoded:
    """Views of every image that is whole."""
    entries, usable, files, crops = [entry for entry, _ in found], [], [], []
    for row, (entry, data) in enumerate(found):
        if entry.problem is not None:
            continue
        try:
            size = upright_size(data, entry.file)
        except Unusable as reason:
            entries[row] = replace(entry, problem=str(reason))
            continue
        usable.append(row)
        files.append(data)
        crops.append(framing.cut([entry.key] * views, range(views), [size] * views))
    if not usable:
        return Decoded(tuple(entries), ())
    pixels, reasons = decoder(files, crops)
    for row, reason in zip(usable, reasons, strict=True):
        entries[row] = replace(entries[row], problem=reason)
    if any(reasons):
        good = [reason is None for reason in reasons]
        pixels = [view[good] for view in pixels]
        crops = [crop for crop, fine in zip(crops, good, strict=True) if fine]
    return Decoded(tuple(entries), tuple(pixels), tuple(map(tuple, crops)))


def moments(vae: Autoencoder, views: Sequence[Tensor]) -> Tensor:
    """V times (B, 3, R, R) pixels to (B, V, 2C, h, w) fp32 on the CPU; view by view, for the memory that they take."""
    return torch.stack([vae.moments(pixels).cpu() for pixels in views], dim=1)


def latent_shape(vae: Autoencoder, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images, found by encoding one.

    Raises:
        UserError: The autoencoder cannot encode this size.
    """
    try:
        doubled, height, width = vae.moments(torch.zeros(1, 3, resolution, resolution)).shape[1:]
    except RuntimeError as error:
        raise UserError(f"the VAE cannot encode images of {resolution} pixels: {str(error).splitlines()[0]}") from error
    return doubled // 2, height, width


def encode(
    source: Source,
    out: Path,
    index: Index,
    framing: Framing,
    decoder: Decoder,
    vae: Autoencoder,
    *,
    batch: int,
    per_file: int,
    part: Part = WHOLE,
    progress: Callable[[int, int, LeftOut], None] | None = None,
) -> Cache | None:
    """Make a cache of a source, or one part of it, or go on with what an earlier process left.

    Args:
        source: Images and captions.
        out: The folder of the cache.
        index: Shapes and recipe; what else decides the result is added to the recipe here.
        framing: How views are cut out.
        decoder: Of the index's number of views and at least `batch` images.
        vae: The autoencoder.
        batch: Images decoded and encoded together.
        per_file: Entries per file of the cache, a multiple of `batch`: what a killed process does again.
        part: Which part of the source.
        progress: Called with the entries done and to do, and what was dropped.

    Returns:
        None if other parts are to be made.

    Raises:
        UserError: The folder holds another cache; nothing is usable.
        OSError: A file cannot be written; what was saved is whole, and the same call goes on.
    """
    if batch < 1 or per_file < 1 or per_file % batch:
        raise UserError(f"{per_file} images per file are no multiple of the batch of {batch}")
    digest, former = _digest(source.identity), _digest(source.former)
    if former != digest and any(Index.load(path).recipe.get("source") == former for path in out.glob("*index*.json")):
        digest = former
    recipe = index.recipe | asdict(framing) | {"source": digest, "batch": batch, "per_file": per_file}
    index = replace(index, recipe=recipe)
    with at_work(out, part):
        return _encode(source, out, index, framing, decoder, vae, batch, per_file, part, progress)


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:DIGEST]


def _encode(
    source: Source,
    out: Path,
    index: Index,
    framing: Framing,
    decoder: Decoder,
    vae: Autoencoder,
    batch: int,
    per_file: int,
    part: Part,
    progress: Callable[[int, int, LeftOut], None] | None,
) -> Cache | None:
    if finished(out, index, part):
        return join(out, part.count, index)
    every = part.of(len(source))
    writer = CacheWriter(out, index, per_file, part)
    try:
        starts = range(every.start + writer.entries, every.stop, batch)
        positions = (range(start, min(start + batch, every.stop)) for start in starts)
        make = lambda rows: decode(source.read(rows), index.views, framing, decoder)  # noqa: E731
        for decoded in ahead(make, positions):
            _write(writer, decoded, vae)
            if progress:
                progress(writer.entries, len(every), writer.dropped)
        return writer.finish_part()
    except OSError as error:
        done = f"{writer.index.entries} of {len(every)} images are done with; the same command goes on there"
        raise OSError(error.errno, f"{error.strerror}; {done}", str(error.filename or out)) from error


def _write(writer: CacheWriter, decoded: Decoded, vae: Autoencoder) -> None:
    usable = any(entry.problem is None for entry in decoded.entries)
    encoded = iter(zip(moments(vae, decoded.views), decoded.crops, strict=True) if usable else ())
    for entry in decoded.entries:
        for caption, reason in entry.refused:
            writer.drop_caption(entry.file, caption, reason)
        if entry.problem is None:
            latents, crops = next(encoded)
            writer.add(latents, entry.captions, file=entry.file, sizes=[crop.sizes for crop in crops])
        else:
            writer.drop(entry.file, len(entry.captions), entry.problem)


def ahead(function: Callable[[_T], _U], items: Iterable[_T]) -> Iterator[_U]:
    """`map`, a few items ahead, in one other thread."""
    with ThreadPoolExecutor(1, "decode") as thread:
        queue: deque[Future[_U]] = deque()
        try:
            for item in items:
                queue.append(thread.submit(function, item))
                if len(queue) > _AHEAD:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()
