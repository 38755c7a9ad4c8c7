"""Making a latent cache (`cache.py` has the format): shard by shard, and on from where a killed run stopped."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from bilevel_fast.base.claims import locked, made
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import parse_json, read_file, sweep, write_atomic, write_json
from bilevel_fast.data.cache import DROPPED, DTYPES, INDEX, PARTIAL, Cache, Index, LeftOut, Shard

_SHOWN = 3  # reasons in a message


@dataclass(frozen=True)
class Part:
    """One of several equal parts of a cache, each made by a process of its own."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.number < self.count:
            raise UserError(f"part {self.number}/{self.count}: the first of n is 0/n, the last is n-1/n")

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read `i/n`.

        Raises:
            UserError: It is not two numbers, or i is not below n.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            raise UserError(f"part {text!r}: wanted i/n, such as 0/4 for the first of four")
        return cls(int(number), int(count))

    def of(self, entries: int) -> range:
        """The entries of this part: those of all parts, one after another, are all."""
        return range(entries * self.number // self.count, entries * (self.number + 1) // self.count)

    @property
    def prefix(self) -> str:
        """Of file names; none where one process makes the whole cache."""
        return "" if self.count == 1 else f"part-{self.number:05d}-of-{self.count:05d}-"


WHOLE = Part()


class CacheWriter:
    """Takes what becomes of each entry of a source, in order: a sample, or dropped. Every full shard is safe on disk.

    In a folder where an earlier writer with the same settings was interrupted it goes on after the last full shard:
    `entries` says how many entries are done with, and the caller goes on with those that follow.
    """

    def __init__(self, path: Path | str, index: Index, shard_samples: int = 1024, part: Part = WHOLE) -> None:
        """Start or go on.

        Args:
            path: The folder; made if missing.
            index: Kind, shapes and recipe of the cache, with no shards.
            shard_samples: Entries per shard: dropped ones count.
            part: Which part of the cache this writer makes.

        Raises:
            UserError: The folder holds a finished cache, or an unfinished one that is not a beginning of this one.
        """
        assert not index.shards
        assert shard_samples > 0
        self.path, self.index, self.shard_samples, self.part = Path(path), index, shard_samples, part
        self._moments: list[Tensor] = []
        self._lines: list[str] = []
        self._report: list[str] = []
        self._reported = LeftOut()
        self.path.mkdir(parents=True, exist_ok=True)
        sweep(self.path)
        for name in (INDEX, part.prefix + INDEX):
            if (self.path / name).exists():
                what = "cache" if name == INDEX else f"{part.prefix.removesuffix('-')} of a cache"
                raise UserError(f"{self.path} already holds a finished {what}; delete it or choose another folder")
        if (self.path / (part.prefix + PARTIAL)).exists():
            self.index = self._resume()

    @property
    def samples(self) -> int:
        """Samples added so far, those of an earlier writer included."""
        return self.index.samples + len(self._lines)

    @property
    def entries(self) -> int:
        """Entries done with so far, those of an earlier writer included."""
        return self.samples + self._reported.pairs

    @property
    def dropped(self) -> LeftOut:
        """What was left out so far."""
        return self._reported

    def add(
        self,
        moments: Tensor,
        captions: Sequence[str],
        anchor: str | None = None,
        file: str | None = None,
        sizes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Add one sample.

        Args:
            moments: (V, 2C, H, W) mean and log-variance of the scaled latents.
            captions: One or more; exactly one for a concept.
            anchor: The caption without the concept, for a concept only.
            file: Where an image came from.
            sizes: For each view its size numbers; written if the index says so.

        Raises:
            UserError: The moments are not finite in the cache's dtype.
        """
        channels, height, width = self.index.latent_shape
        assert moments.shape == (self.index.views, 2 * channels, height, width), tuple(moments.shape)
        assert captions
        assert (anchor is not None) == (self.index.kind == "concepts")
        assert sizes is None or len(sizes) == self.index.views
        assert sizes is not None or not self.index.sizes
        stored = moments.detach().to("cpu", DTYPES[self.index.dtype], copy=True)
        if not stored.isfinite().all():
            raise UserError(f"sample {self.samples} ({captions[0]!r}): latents are not finite in {self.index.dtype}")
        line = {"captions": list(captions)} if anchor is None else {"caption": captions[0], "anchor": anchor}
        more: dict[str, Any] = {} if file is None else {"file": file}
        if self.index.sizes and sizes is not None:
            more["sizes"] = [list(view) for view in sizes]
        self._moments.append(stored)
        self._lines.append(json.dumps(line | more, ensure_ascii=False))
        self._write_if_full()

    def drop(self, file: str, captions: int, reason: str) -> None:
        """Leave out an image with all its captions."""
        self._say({"file": file, "captions": captions, "reason": reason})
        self._reported = replace(self._reported, pairs=self._reported.pairs + 1)
        self._write_if_full()

    def drop_caption(self, file: str, caption: str, reason: str) -> None:
        """Leave out one caption of the image that is added or dropped next."""
        self._say({"file": file, "caption": caption, "reason": reason})
        self._reported = replace(self._reported, captions=self._reported.captions + 1)

    def finish(self) -> Cache:
        """Write what is left and the index; return the cache.

        Raises:
            UserError: No sample was added.
        """
        cache = self.finish_part()
        assert cache is not None, "a part of a cache ends with finish_part"
        return cache

    def finish_part(self) -> Cache | None:
        """As `finish`, for one of several parts; the last one writes the index of the whole.

        Returns:
            None if other parts are not finished.

        Raises:
            UserError: There is no sample, or the parts were not made alike.
        """
        if self.entries > self.index.entries:
            self._write()
        if self.part.count == 1 and not self.samples:
            raise _nothing(self.path, self._report)
        write_json(self.path / (self.part.prefix + INDEX), self.index.to_dict())
        (self.path / (self.part.prefix + PARTIAL)).unlink(missing_ok=True)
        return join(self.path, self.part.count, self.index)

    def _say(self, record: dict[str, object]) -> None:
        self._report.append(json.dumps(record, ensure_ascii=False))

    def _write_if_full(self) -> None:
        if self.entries - self.index.entries == self.shard_samples:
            self._write()

    def _write(self) -> None:
        """The files first, then the list that names them."""
        index, prefix = self.index, self.part.prefix
        if self._lines:
            name = f"{prefix}shard-{len(index.shards):05d}"
            moments = save({"moments": torch.stack(self._moments)})
            captions = _text(self._lines)
            write_atomic(self.path / f"{name}.safetensors", moments)
            write_atomic(self.path / f"{name}.jsonl", captions)
            shard = Shard(f"{name}.safetensors", len(self._lines), _sha256(moments), _sha256(captions))
            index = replace(index, shards=(*index.shards, shard))
        if self._reported.lines > index.dropped.lines:
            report = _text(self._report)
            write_atomic(self.path / (prefix + DROPPED), report)
            self._reported = replace(self._reported, sha256=_sha256(report))
        self.index = replace(index, dropped=self._reported)
        self._moments, self._lines = [], []
        write_json(self.path / (prefix + PARTIAL), self.index.to_dict())

    def _resume(self) -> Index:
        begun = Index.load(self.path / (self.part.prefix + PARTIAL))
        self.index.check_same_making(begun, self.path)
        Cache(self.path, begun).verify()
        self._reported = begun.dropped
        if begun.dropped.lines:
            path = self.path / (self.part.prefix + DROPPED)
            # it may be further than the list: then the process died between the two
            self._report = read_report(path)[: begun.dropped.lines]
            if _sha256(_text(self._report)) != begun.dropped.sha256:
                raise UserError(f"{path} was changed after it was written: its checksum is wrong")
        return begun


def read_report(path: Path) -> list[str]:
    """The lines of a `dropped.jsonl`.

    Raises:
        UserError: It is missing, too large, or not UTF-8.
    """
    try:
        return read_file(path).decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error


def reasons(report: Sequence[str]) -> "Counter[str]":
    """How often each reason is given in the lines of a `dropped.jsonl`.

    Raises:
        UserError: A line is none of such a file.
    """
    records = map(_record, report)
    return Counter(("caption: " if "caption" in record else "") + str(record.get("reason")) for record in records)


def _record(line: str) -> dict[str, Any]:
    record = parse_json(line, f"a line of {DROPPED}")
    if not isinstance(record, dict):
        raise UserError(f"a line of {DROPPED}: wanted a JSON object, found {type(record).__name__}")
    return record


def _nothing(path: Path, report: Sequence[str]) -> UserError:
    """That nothing is left, and why: what was left out, its first one by name, and the most frequent reasons."""
    if not report:
        return UserError(f"{path}: there are no samples to write: the source is empty")
    found = reasons(report).most_common(_SHOWN)
    why = "; ".join(f"{count} x {reason}" for reason, count in found)
    first = _record(report[0]).get("file")
    return UserError(f"{path}: there are no samples to write; all were left out, the first is {first}: {why}")


@contextmanager
def at_work(path: Path, part: Part = WHOLE) -> Iterator[None]:
    """Hold the folder of a cache, or the place of one part in it; it is made if missing, and goes if it stays empty.

    Raises:
        UserError: Another process makes the same.
        OSError: It cannot be written to.
    """
    with made(path), locked(path / f".{part.prefix}lock", str(path)):
        yield


def whole(path: Path, index: Index) -> Cache | None:
    """A cache that an earlier process has finished, if nothing lies beside it that one of them has still to clear away.

    It is read without a claim to the folder, and so by many processes at a time, as the ranks of a training are.

    Raises:
        UserError: It was made otherwise; what differs is named.
    """
    if not (path / INDEX).exists() or any(path.glob(".*")) or any(path.glob(f"*{PARTIAL}")):
        return None
    index.check_same_making(Index.load(path / INDEX), path)
    return Cache.open(path)


def finished(path: Path, index: Index, part: Part) -> bool:
    """Whether a part was finished by an earlier process; what that one had no time to clear away goes.

    Raises:
        UserError: The folder holds something that was made otherwise; what differs is named.
    """
    sweep(path)
    for name in (part.prefix + INDEX, INDEX):
        if (path / name).exists():
            index.check_same_making(Index.load(path / name), path)
            (path / (part.prefix + PARTIAL)).unlink(missing_ok=True)
            return True
    return False


def join(path: Path, parts: int, made: Index) -> Cache | None:
    """Make one cache of its parts, if all are there. Several processes may do so at the same time: all write the same.

    Args:
        path: The folder.
        parts: How many parts there are to be.
        made: One of them, which the others must be like.

    Raises:
        UserError: A part was made otherwise; what differs is named. Or there is no sample in any.
    """
    if parts > 1:
        prefixes = [Part(number, parts).prefix for number in range(parts)]
        if not all((path / (prefix + INDEX)).is_file() for prefix in prefixes):
            return None
        found = [Index.load(path / (prefix + INDEX)) for prefix in prefixes]
        for index in found:
            made.check_same_making(index, path)
        report = [
            line
            for prefix, index in zip(prefixes, found, strict=True)
            if index.dropped.lines
            for line in read_report(path / (prefix + DROPPED))
        ]
        if not any(index.samples for index in found):
            raise _nothing(path, report)
        dropped = LeftOut(
            sum(index.dropped.pairs for index in found),
            sum(index.dropped.captions for index in found),
            _sha256(_text(report)) if report else "",
        )
        if report:
            write_atomic(path / DROPPED, _text(report))
        shards = tuple(shard for index in found for shard in index.shards)
        write_json(path / INDEX, replace(made, shards=shards, dropped=dropped).to_dict())
    return Cache.open(path)


def _text(lines: Sequence[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
