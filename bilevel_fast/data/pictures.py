"""Image files before they are decoded: is this a whole picture, how large is it upright, which part of it is a view.

Colours, grey, palettes, alpha and CMYK become RGB as with `convert("RGB")` of PIL, and sixteen bits become eight. Two
things are done otherwise than in the authors' loader: an EXIF orientation is obeyed, because captions describe the
upright picture, and a file that is damaged, or no image of the kind that its name says, is dropped with its captions
instead of moving the rest by one.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np

from bilevel_fast.base.limits import PIXELS
from bilevel_fast.ops.randomness import Stream, uniform

if TYPE_CHECKING:  # imported where it is used: the engine runs without it
    from PIL import Image

MAX_VIEWS = 2**20
"""Views of one image that differ in their random numbers."""
MAX_KEY = 2**40
"""Keys of images are below; key * MAX_VIEWS + view is the sample index of a crop."""

SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe"), "JPEG"),
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}
FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))
"""What pictures are opened as, whatever they are named: other decoders of PIL run programs, as that of EPS does."""
_ORIENTATION = 0x0112  # EXIF; from 5 on, height and width change places


class Unusable(Exception):
    """An image cannot be used; the message says why, in a few words."""


def upright_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of an image file as it is to be seen, from its headers; nothing is decoded.

    Args:
        data: The whole file.
        name: Its name, whose ending must say what it is.

    Raises:
        Unusable: It is empty, cut short, no image, too large, or of another kind than its name says.
    """
    from PIL import Image

    if not data:
        raise Unusable("empty")
    wanted = SUFFIXES.get(PurePosixPath(name).suffix.lower())
    if wanted is None:
        raise Unusable(f"its name does not end in one of {', '.join(SUFFIXES)}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind, (width, height) = image.format, image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Image.UnidentifiedImageError:
        raise Unusable("not an image, or its header is damaged") from None
    except Exception as error:  # a damaged header makes PIL raise anything
        raise Unusable(f"its header is damaged: {' '.join(str(error).split())}") from None
    kind = "JPEG" if kind == "MPO" else kind  # what cameras write: a JPEG with more JPEGs behind it
    if kind != wanted:
        raise Unusable(f"is {kind}, its name says {wanted}")
    if width * height > PIXELS:
        raise Unusable(f"has {width}x{height} pixels, wanted at most {PIXELS} in all")
    if not _is_whole(data, wanted):
        raise Unusable(f"cut short: the end of the {wanted} is missing")
    return (width, height) if turned else (height, width)


def decode_rgb(data: bytes, name: str) -> "Image.Image":
    """An image file as RGB, upright: what `prepare` makes of it, for those who want it whole and not scaled.

    Sixteen bits become eight by division, as DALI has it; PIL would cut grey off at 255. DALI's pixels may differ by
    one where PIL rounds otherwise: CMYK, and colours of sixteen bits.

    Args:
        data: The whole file.
        name: Its name, whose ending must say what it is.

    Raises:
        Unusable: As `upright_size`, or it cannot be decoded.
    """
    from PIL import Image, ImageOps

    upright_size(data, name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format == "PNG":
                image.verify()  # check sums of all chunks, which decoding skips
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                eight = np.round(np.asarray(upright).astype(np.float64) / 257)
                return Image.fromarray(eight.clip(0, 255).astype(np.uint8)).convert("RGB")
            return upright.convert("RGB")
    except Exception as error:  # damaged data makes PIL raise anything
        raise Unusable(" ".join(str(error).split())) from None


def _is_whole(data: bytes, kind: str) -> bool:
    """Whether the file has its end. What this cannot see, the decoder will."""
    match kind:
        case "JPEG":
            return data.rfind(b"\xff\xd9") > _start_of_scan(data)
        case "PNG":
            return data.rfind(b"IEND") > 0
        case "WEBP":
            return len(data) >= 8 + int.from_bytes(data[4:8], "little")
        case _:
            return len(data) >= int.from_bytes(data[2:6], "little")


def _start_of_scan(data: bytes) -> int:
    """Where the pixels of a JPEG begin: behind its headers, which may hold a whole thumbnail."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return at
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return len(data)


@dataclass(frozen=True)
class Framing:
    """How views are cut out of images."""

    resolution: int
    """Height and width of a view, and the length that an image's short side is scaled to."""
    seed: int
    flip: bool = True
    """Half of the views are mirrored."""
    crop: Literal["random", "center"] = "random"

    def cut(self, keys: Sequence[int], views: Sequence[int], sizes: Sequence[tuple[int, int]]) -> "list[Crop]":
        """One view of each image, a pure function of (seed, key, view) and the image's size.

        Args:
            keys: Of the images, in [0, MAX_KEY).
            views: Number of the view of each, in [0, MAX_VIEWS).
            sizes: Upright height and width of each.
        """
        index = [key * MAX_VIEWS + view for key, view in zip(keys, views, strict=True)]
        numbers = uniform(self.seed, Stream.CROP, index, (3,)).double().tolist()
        return [self._cut(size, *u) for size, u in zip(sizes, numbers, strict=True)]

    def _cut(self, size: tuple[int, int], u_top: float, u_left: float, u_flip: float) -> "Crop":
        side, (height, width) = self.resolution, size
        scaled = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
        rest = [length - side for length in scaled]
        if self.crop == "random":
            top, left = (int(u * (length + 1)) for u, length in zip((u_top, u_left), rest, strict=True))
        else:
            top, left = (round(length / 2) for length in rest)
        return Crop(size, scaled, top, left, side, self.flip and u_flip < 0.5)


@dataclass(frozen=True)
class Crop:
    """One view: scale the image, cut out a square, mirror it."""

    size: tuple[int, int]
    """(H, W) of the image."""
    scaled: tuple[int, int]
    """(H, W) that it is scaled to: whole pixels, as torchvision's `Resize` rounds them."""
    top: int
    left: int
    side: int
    mirrored: bool

    @property
    def region(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """First and last corner (y, x) of the view in pixels of the image: only this much must be scaled."""
        y, x = (length / scaled for length, scaled in zip(self.size, self.scaled, strict=True))
        return (self.top * y, self.left * x), ((self.top + self.side) * y, (self.left + self.side) * x)
