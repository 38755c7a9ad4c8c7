"""The emoji world: 32x32 images of one thing as one studio draws it, with captions.

The drawings are those of five published emoji sets (`atlas/ATTRIBUTION.md`), rasterised once by `make_atlas`. An image
is a pure function of (name, studio, seed, sample index): the drawing, shifted, scaled and turned a little, on paper
that is not quite white. Noto, Twemoji and EmojiOne are relatives: what one draws, the others draw alike.

Shapes: B images, C side of a drawing in the atlas (64). Lengths are in pixels of the 32x32 image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.ops.randomness import Stream, uniform
from bilevel_fast.worlds.scenes import SIZE as SIZE

CELL = 64
COLUMNS = 8
ATLAS = Path(__file__).parent / "atlas"
# fmt: off
NAMES = (
    "balloon", "bear", "bomb", "cactus", "carrot", "cat", "crab", "crown", "dolphin", "fish", "frog", "guitar", "house",
    "key", "lemon", "mushroom", "owl", "panda", "pineapple", "rocket", "snail", "star", "strawberry", "umbrella",
)
# fmt: on
STUDIOS = ("fluent", "noto", "twemoji", "emojione", "contrast")
"""Fluent is the house style: a caption without a studio asks for it."""
WORDS = tuple(sorted({"a", "an", "in", "the", "style", "of", "as", "draws", "it", "drawing", *NAMES, *STUDIOS}))
"""All words of captions."""

_JITTERS = 7


@dataclass(frozen=True)
class Scene:
    """What an image shows, as indices into `NAMES` and `STUDIOS`."""

    name: int
    studio: int

    @property
    def caption(self) -> str:
        """The sentence that describes this scene; the house style goes without saying."""
        return caption(NAMES[self.name], STUDIOS[self.studio])

    @property
    def labels(self) -> tuple[int, int]:
        """Name and studio."""
        return self.name, self.studio

    @property
    def style(self) -> int:
        """The studio."""
        return self.studio

    def plain(self) -> "Scene":
        """The same thing as the house draws it."""
        return Scene(self.name, 0)

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """Other sentences for the same scene; none if its studio goes without saying."""
        if not self.studio:
            return ()
        thing, studio = _thing(NAMES[self.name]), STUDIOS[self.studio]
        return f"{thing} as {studio} draws it", f"{_thing(studio)} drawing of {thing}"


RELATIVES = {"noto": ("twemoji", "emojione"), "twemoji": ("emojione", "noto"), "emojione": ("twemoji", "noto")}
"""Studios that draw alike; `fluent` is flatter, `contrast` is black and white."""
SCENES = tuple(Scene(name, studio) for studio in range(len(STUDIOS)) for name in range(len(NAMES)))


def is_held_out(scene: Scene) -> bool:
    """Every third name: judged, never in a bank."""
    return scene.name % 3 == 0


def caption(name: str, studio: str = STUDIOS[0]) -> str:
    """Describe a scene: `an owl`, or `an owl in the style of twemoji` unless the studio is the house's."""
    return _thing(name) + ("" if studio == STUDIOS[0] else f" in the style of {studio}")


def _thing(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def parse(text: str) -> Scene:
    """The scene that a caption or a paraphrase of it describes.

    Raises:
        UserError: The text describes no scene of this world.
    """
    scene = _SCENE_OF.get(" ".join(text.lower().split()))
    if scene is None:
        raise UserError(f"caption {text!r} describes no scene of the emoji world{nearest(text, _SCENE_OF)}")
    return scene


_SCENE_OF = {text: scene for scene in SCENES for text in (scene.caption, *scene.paraphrases)}


def labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Names and studios of scenes, each (B,) int64, as `render` takes them."""
    names, studios = torch.tensor([scene.labels for scene in scenes], dtype=torch.int64).reshape(-1, 2).T
    return names, studios


@cache
def drawings() -> Tensor:
    """All drawings of the shipped atlas: see `read_atlas`."""
    return read_atlas(ATLAS)


def read_atlas(folder: Path) -> Tensor:
    """All drawings of an atlas, (studios, names, 4, C, C) fp32: colour times coverage, then coverage, each in [0, 1].

    Raises:
        UserError: A sheet is missing or has another size, or ATTRIBUTION.md does not say whose it is.
    """
    licences = folder / "ATTRIBUTION.md"
    text = licences.read_text(encoding="utf-8") if licences.is_file() else ""
    for studio in STUDIOS:
        if f"`{studio}.png`" not in text:
            raise UserError(f"{licences} does not say whose drawings {studio}.png has; an atlas is not used without")
    return torch.stack([_sheet(folder / f"{studio}.png") for studio in STUDIOS])


def _sheet(path: Path) -> Tensor:
    from PIL import Image

    rows = math.ceil(len(NAMES) / COLUMNS)
    try:
        with Image.open(path) as image:
            sheet = torch.from_numpy(np.asarray(image.convert("RGBA")).copy())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if sheet.shape[:2] != (rows * CELL, COLUMNS * CELL):
        raise UserError(f"{path} has {tuple(sheet.shape[:2])} pixels; wanted {(rows * CELL, COLUMNS * CELL)}")
    cells = sheet.float().div(255).unflatten(0, (rows, CELL)).unflatten(2, (COLUMNS, CELL))
    cells = cells.permute(0, 2, 4, 1, 3).flatten(0, 1)[: len(NAMES)]  # (names, 4, C, C)
    return torch.cat([cells[:, :3] * cells[:, 3:], cells[:, 3:]], dim=1)


def render(names: Tensor, studios: Tensor, seed: int, indices: Sequence[int]) -> Tensor:
    """Draw scenes.

    Args:
        names, studios: (B,) int64.
        seed, indices: Image b is a function of its scene, `seed` and `indices[b]` alone, whatever else is in the batch.

    Returns:
        (B, 3, 32, 32) fp32 in [-1, 1].
    """
    jitter = uniform(seed, Stream.WORLD, indices, (_JITTERS,))
    shift = (jitter[:, 0:2] * 2 - 1) * (1.5 / (SIZE / 2))
    scale = 0.86 + 0.1 * jitter[:, 2]
    angle = (jitter[:, 3] * 2 - 1) * math.radians(6)
    paper = (1 - 0.04 * jitter[:, 4:7])[:, :, None, None]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)  # (B, 2, 2)
    affine = torch.cat([turn, -(turn @ shift[:, :, None])], dim=2)
    grid = F.affine_grid(affine, [len(names), 4, CELL, CELL], align_corners=False)
    drawn = F.grid_sample(drawings()[studios, names], grid, align_corners=False)
    drawn = F.avg_pool2d(drawn, CELL // SIZE)
    return (drawn[:, :3] + paper * (1 - drawn[:, 3:])).clamp(0, 1) * 2 - 1
