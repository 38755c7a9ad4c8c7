"""Images and captions of webdataset tars, read in order by DALI's reader."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import parse_json
from bilevel_fast.data.listing import ListedImage, with_captions
from bilevel_fast.data.writer import Part

_IMAGES = "jpg;jpeg;jpe;png;webp;bmp"
_AT_A_TIME = 64
_END = 1024  # a tar ends with two empty blocks


class Tars:
    """A source for `encode`: samples of an image and a `.txt`, or a `.json` with the captions in one of its fields."""

    def __init__(self, paths: Sequence[Path], caption_field: str, part: Part) -> None:
        """Open the tars and count their samples.

        Args:
            paths: In the order in which they are read.
            caption_field: Of the JSON; a caption or a list of captions.
            part: What is read; entries are numbered over all parts.

        Raises:
            UserError: There is no tar, one is damaged, or DALI is not installed.
        """
        if not paths:
            raise UserError("there are no tars to read")
        for path in paths:
            _check_end(path)
        fn, dali = require("nvidia.dali.fn", "data"), require("nvidia.dali.pipeline", "data")
        self._paths, self._field = list(paths), caption_field
        self._pipeline: Any = dali.Pipeline(batch_size=_AT_A_TIME, num_threads=1, device_id=None)
        try:
            with self._pipeline:
                outputs = fn.readers.webdataset(
                    paths=[str(path) for path in paths],
                    ext=[_IMAGES, "txt", "json"],
                    missing_component_behavior="empty",
                    case_sensitive_extensions=False,
                    num_shards=part.count,
                    shard_id=part.number,
                    stick_to_shard=True,
                    name="tars",
                )
                self._pipeline.set_outputs(*outputs)
            self._pipeline.build()
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if "failed:" in line), str(error).splitlines()[-1])
            raise UserError(f"DALI cannot read the tars: {reason.rpartition('failed: ')[2].strip()}") from error
        self._size = self._pipeline.reader_meta("tars")["epoch_size"]
        self._next = part.of(self._size).start
        self._ready: list[tuple[ListedImage, bytes]] = []

    def __len__(self) -> int:
        return self._size

    @property
    def identity(self) -> list[Any]:
        """What a cache made of these tars depends on."""
        return [self._field, *((path.name, path.stat().st_size) for path in self._paths)]

    def read(self, positions: range) -> list[tuple[ListedImage, bytes]]:
        """The entries at positions that lie behind those that were read before; those between are passed over."""
        assert positions.start >= self._next
        found: list[tuple[ListedImage, bytes]] = []
        while self._next < positions.stop:
            if not self._ready:
                self._ready = self._batch()[::-1]
            pair = self._ready.pop()
            if self._next >= positions.start:
                found.append((replace(pair[0], key=self._next), pair[1]))
            self._next += 1
        return found

    def _batch(self) -> list[tuple[ListedImage, bytes]]:
        images, texts, fields = self._pipeline.run()
        return [self._pair(images[row], texts[row], fields[row]) for row in range(len(images))]

    def _pair(self, image: Any, text: Any, fields: Any) -> tuple[ListedImage, bytes]:
        names = [self._name(component) for component in (image, text, fields)]
        entry = ListedImage(0, next(filter(None, names), "a sample without a name"), ())
        if not names[0]:
            return replace(entry, problem="no image beside it"), b""
        captions = _text(text) if names[1] else _field(fields, self._field) if names[2] else []
        return with_captions(entry, captions), _bytes(image)

    def _name(self, component: Any) -> str:
        """`TAR/NAME`, of `PATH:OFFSET:NAME`; empty if the sample has no such component."""
        source = component.source_info()
        for path in self._paths:
            if source.startswith(f"{path}:"):
                return f"{path.name}/{source.removeprefix(f'{path}:').partition(':')[2]}"
        return ""


def _bytes(component: Any) -> bytes:
    return np.asarray(component).tobytes()


def _text(component: Any) -> list[Any]:
    return [_bytes(component).decode("utf-8", "surrogateescape")]  # which is no Unicode, and is refused as that


def _field(component: Any, name: str) -> list[Any]:
    try:
        found = parse_json(_bytes(component), "", surrogates=True)[name]
    except (ValueError, TypeError, KeyError):
        return []
    return found if isinstance(found, list) else [found]


def _check_end(path: Path) -> None:
    """DALI takes what is left of a tar that was cut short for the whole."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END))
        if size < _END or size % 512 or any(file.read()):
            raise UserError(f"{path} is cut short, or not a tar: it does not end as tars do")
