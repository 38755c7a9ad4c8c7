"""Images as pixels, contact sheets and PNG files."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # imported where it is used: the engine alone needs torch, triton, numpy and safetensors only
    from PIL import Image, ImageFont

_ZOOM, _GAP, _LABEL = 3, 6, 92  # pixels


_INK, _PAPER = (40, 40, 46), (255, 255, 255)


def to_pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def picture(rows: Mapping[str, Tensor], captions: Sequence[str], zoom: int = _ZOOM) -> "Image.Image":
    """A contact sheet: one row per model, one column per caption.

    Args:
        rows: Images (N, 3, H, W) in [-1, 1] per row label.
        captions: N column headings, wrapped.
        zoom: Nearest-neighbour enlargement; pixels of a 32 x 32 image should stay visible as such.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(rows.values()))
    count, height, width = len(first), first.shape[2] * zoom, first.shape[3] * zoom
    font = ImageFont.load_default(size=12)
    wrapped = [_wrap(caption, width, font) for caption in captions]
    head = _GAP + 15 * max(text.count("\n") + 1 for text in wrapped)
    sheet = Image.new("RGB", (_LABEL + count * (width + _GAP), head + len(rows) * (height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(wrapped):
        draw.multiline_text((_LABEL + column * (width + _GAP), 2), text, fill=_INK, font=font, spacing=2)
    for row, (label, images) in enumerate(rows.items()):
        top = head + row * (height + _GAP)
        draw.text((6, top + height // 2 - 8), label, fill=_INK, font=font)
        for column, pixels in enumerate(to_pixels(images)):
            tile = Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (_LABEL + column * (width + _GAP), top))
    return sheet


def tile(image: Tensor) -> "Image.Image":
    """One image (3, H, W) in [-1, 1], pixel by pixel."""
    from PIL import Image

    return Image.fromarray(to_pixels(image[None])[0].numpy())


def _wrap(text: str, width: int, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def png(image: "Image.Image") -> bytes:
    """The bytes of a PNG file of it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
