"""A folder in the shape of COCO, made here: good pictures of many kinds, and everything that is wrong in the wild."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from bilevel_fast.data.pictures import Crop

SPLIT = "train2017"
SIDE = 64


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth areas, edges and some noise: what a photo asks of a resize."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
    base = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    base[height // 3 : height // 2, : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray((base + rng.integers(-12, 13, base.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def by_torchvision(data: bytes, crop: Crop) -> torch.Tensor:
    """(3, R, R) pixels, 0 to 255: the whole image scaled by torchvision, then the same crop."""
    from torchvision.transforms.v2 import functional as tv

    pixels = torch.from_numpy(np.array(upright(data))).permute(2, 0, 1)
    pixels = tv.resize(pixels, [SIDE], antialias=True)
    assert pixels.shape[1:] == crop.scaled
    pixels = tv.crop(pixels, crop.top, crop.left, SIDE, SIDE)
    return (tv.horizontal_flip(pixels) if crop.mirrored else pixels).float()


@dataclass
class CocoFolder:
    """What was written, and what should become of it."""

    root: Path
    good: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """File name to captions, in the order in which they belong in a cache."""
    bad: dict[str, str] = field(default_factory=dict)
    """File name to a part of the reason for which the pair is dropped."""
    captions: list[tuple[str, str]] = field(default_factory=list)
    """(File name, reason) of single captions that are left out."""


def make_coco(root: Path, *, split: str = SPLIT, prefix: str = "", plain: int = 6) -> CocoFolder:
    """Write `annotations/captions_SPLIT.json` and `SPLIT/`; the annotations are in no order.

    Args:
        prefix: Of file names: the sets of 2014 have `COCO_train2014_`.
        plain: How many ordinary pictures there are, between the others.
    """
    made = CocoFolder(root)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir()

    def add(key: Any, name: Any, data: bytes | None, *captions: Any, bad: str | None = None) -> str:
        images.append({"id": key, "file_name": name, "height": 1, "width": 1})
        for caption in captions:
            annotations.append({"image_id": key, "id": 1000 + len(annotations), "caption": caption})
        if data is not None:
            (root / split / name).write_bytes(data)
        if bad is None:
            made.good[name] = captions
        else:
            made.bad[str(name)] = bad
        return name

    def name(key: int, suffix: str = ".jpg") -> str:
        return f"{prefix}{key:012d}{suffix}"

    for key in range(plain):
        size = (40 + 37 * key % 300, 40 + 97 * key % 200)
        file = name(10 * key + 1)
        add(10 * key + 1, file, encoded(picture(key, *size)), f"a red star {key}", f"a photo of a house {key}")
    add(3, name(3), encoded(picture(3, 91, 67).convert("L")), "a grey one")
    add(5, name(5), encoded(picture(5, 80, 131).convert("CMYK")), "printed")
    add(7, name(7), encoded(picture(7, 120, 70), exif=turned(6)), "turned by its EXIF")
    add(8, name(8), encoded(picture(8, 333, 64), progressive=True), "wide and progressive")
    add(9, name(9, ".png"), encoded(picture(9, 70, 70).convert("P"), "PNG"), "a palette")
    add(12, name(12), encoded(picture(12, 64, 300), quality=30), "一颗红星 🌟", "  zwei\u2028Zeilen é ")
    made.good[name(12)] = ("一颗红星 🌟", "zwei\u2028Zeilen é")
    add(13, name(13), encoded(picture(13, 99, 98)), "twice", "twice", "", None, "\ud83d")
    made.good[name(13)] = ("twice",)
    made.captions = [(name(13), reason) for reason in ("duplicate", "empty", "not a text", "not valid Unicode")]

    whole = encoded(picture(2, 120, 110))
    broken = bytearray(whole)
    broken[broken.index(b"\xff\xc4") + 4 : broken.index(b"\xff\xda")] = b"\xff" * (
        broken.index(b"\xff\xda") - broken.index(b"\xff\xc4") - 4
    )
    add(2, name(2), whole[: len(whole) // 2], "half", bad="cut short")
    add(4, name(4), b"", "nothing", "at all", bad="empty")
    add(6, name(6), encoded(picture(6, 70, 70), "PNG"), "a PNG in disguise", bad="is PNG, its name says JPEG")
    add(14, name(14), b"<html>404 not found</html>", "no picture", bad="not an image")
    add(15, name(15), None, "gone", "with the wind", bad="missing")
    add(16, "../annotations/captions_" + split + ".json", None, "up", bad="leads out")
    add(17, "/etc/passwd", None, "away", bad="leads out")
    add(18, name(18), whole, bad="no caption")
    add(19, name(19, ".gif"), encoded(picture(19, 70, 70).convert("P"), "GIF"), "moving", bad="does not end in one of")
    add(20, name(20), bytes(broken), "no tables", bad="decoder cannot read")
    add(1, name(22), whole, bad="stands for")
    add("x", name(23), whole, "no number", bad="its id is 'x'")
    annotations.append({"image_id": 4711, "id": 1, "caption": "about nothing"})
    made.bad |= dict.fromkeys(("image 4711", "image None"), "not listed")
    order = np.random.default_rng(0)
    images = [images[i] for i in order.permutation(len(images) - 2)] + images[-2:]
    annotations = [annotations[i] for i in order.permutation(len(annotations))]
    fields = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(fields))
    keys = {row["file_name"]: row["id"] for row in images}
    made.good = dict(sorted(made.good.items(), key=lambda pair: keys[pair[0]]))
    return made
