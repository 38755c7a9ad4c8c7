"""What a finished run shows: a table, a picture, a page."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # imported where it is used: the engine alone needs torch, triton, numpy and safetensors only
    from PIL import Image, ImageFont

_ZOOM, _GAP, _LABEL = 3, 6, 92  # pixels
_INK, _PAPER = (40, 40, 46), (255, 255, 255)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Aligned text: one row per model, one column per metric."""
    columns = list(next(iter(rows.values())))
    label = max(10, *(len(name) + 2 for name in rows))
    lines = [f"{'':<{label}}" + "".join(f"{name:>17}" for name in columns)]
    for name, values in rows.items():
        lines.append(f"{name:<{label}}" + "".join(f"{values[column]:>17.3f}" for column in columns))
    return "\n".join(lines)


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
    """Encode."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def curves(stats: Mapping[str, Path]) -> bytes:
    """Losses over images seen, one line per term and training, as PNG.

    Args:
        stats: `stats.jsonl` per training.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    terms = ("lower/diffusion", "lower/output", "lower/feature", "upper/suppression")
    figure, axes = plt.subplots(1, len(terms), figsize=(13, 2.8), layout="constrained")
    for axis, term in zip(axes, terms, strict=True):
        for label, path in stats.items():
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            points = [(r["images"], r[term]) for r in records if r.get(term) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
        axis.set(title=term, xlabel="images seen", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def page(title: str, summary: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """One self-contained HTML page: the quality table, the pictures, the whole summary."""
    quality: Mapping[str, Mapping[str, float]] = summary.get("quality") or {}
    cells = ""
    if quality:
        columns = list(next(iter(quality.values())))
        cells = "<tr><th></th>" + "".join(f"<th>{html.escape(c)}</th>" for c in columns) + "</tr>"
        for name, row in quality.items():
            cells += f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{row[c]:.3f}</td>" for c in columns) + "</tr>"
        cells = f"<h2>Quality</h2><table>{cells}</table>"
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, data in pictures.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#28282e}"
        "table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
        "th:first-child{text-align:left}figure{margin:1.5rem 0}img{max-width:100%;height:auto}"
        "figcaption{color:#666}pre{background:#f5f5f7;padding:1rem;overflow:auto}</style>"
        f"<h1>{html.escape(title)}</h1>{cells}{figures}"
        f"<h2>Summary</h2><pre>{html.escape(json.dumps(summary, indent=2))}</pre></html>\n"
    )
