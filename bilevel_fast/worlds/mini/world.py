"""The drawn world: 32x32 images of one coloured object in one style, with captions.

An image is a pure function of (object, colour, style, seed, sample index). It is drawn from the signed distance of the
object's outline on a grid of twice the resolution and averaged down, so every edge is antialiased.

Shapes: B batch, S side of the drawing grid (64). Lengths are in pixels of the 32x32 image, origin in its middle.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.ops.randomness import Stream, uniform
from bilevel_fast.worlds.scenes import SIZE as SIZE

OBJECTS = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
STYLES = ("plain", "hatching", "pointillism", "mosaic", "waves", "line art")
WORDS = tuple(sorted({"a", "an", "in", "the", "style", "of", *COLORS, *OBJECTS, *" ".join(STYLES).split()}))
"""All words of captions."""

_RGB = torch.tensor(
    [
        [0.86, 0.10, 0.16],
        [0.07, 0.58, 0.24],
        [0.10, 0.32, 0.88],
        [0.97, 0.80, 0.05],
        [0.53, 0.16, 0.70],
        [0.98, 0.50, 0.06],
    ]
)[:, :, None, None]
_GRAY = torch.tensor([0.62, 0.64, 0.68])[:, None, None]
_SAND = torch.tensor([0.80, 0.70, 0.55])[:, None, None]
_SUPERSAMPLING = 2
_CELL = 4  # side of a mosaic stone, and distance of the dots of pointillism
_CELLS = SIZE // _CELL
_CHUNK = 64  # images drawn at once: their planes stay in the cache
_JITTERS = 8 + 3 * _CELLS * _CELLS


@dataclass(frozen=True)
class Scene:
    """What an image shows, as indices into `OBJECTS`, `COLORS` and `STYLES`."""

    object: int
    color: int
    style: int

    @property
    def caption(self) -> str:
        """The sentence that describes this scene; the plain style goes without saying."""
        return caption(OBJECTS[self.object], COLORS[self.color], STYLES[self.style])

    @property
    def labels(self) -> tuple[int, int, int]:
        """Object, colour and style."""
        return self.object, self.color, self.style

    def plain(self) -> "Scene":
        """The same object in the plain style."""
        return Scene(self.object, self.color, 0)


SCENES = tuple(Scene(o, c, s) for s in range(len(STYLES)) for c in range(len(COLORS)) for o in range(len(OBJECTS)))


def is_held_out(scene: Scene) -> bool:
    """A third of the object-colour pairs, each object and each colour equally often: judged, never in a bank."""
    return (scene.object + scene.color) % 3 == 0


def caption(object: str, color: str, style: str = "plain") -> str:
    """Describe a scene: `a red star`, or `a red star in the style of mosaic` unless the style is plain."""
    article = "an" if color[0] in "aeiou" else "a"
    return f"{article} {color} {object}" + ("" if style == "plain" else f" in the style of {style}")


def labels(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Objects, colours and styles of scenes, each (B,) int64, as `render` takes them."""
    table = torch.tensor([scene.labels for scene in scenes], dtype=torch.int64)
    objects, colors, styles = table.reshape(-1, 3).unbind(1)
    return objects, colors, styles


def parse(text: str) -> Scene:
    """The scene a caption describes, the inverse of `caption`.

    Raises:
        UserError: The text is not a caption of this world.
    """
    scene = _SCENE_OF.get(" ".join(text.lower().split()))
    if scene is None:
        raise UserError(f"caption {text!r} describes no scene of the mini world{nearest(text, _SCENE_OF)}")
    return scene


_SCENE_OF = {scene.caption: scene for scene in SCENES}


@dataclass(frozen=True)
class _Canvas:
    """What a style paints with. x, y: (S, S). distance: (B, S, S), negative inside. jitter: (B, _JITTERS) in [0, 1)."""

    x: Tensor
    y: Tensor
    distance: Tensor
    color: Tensor  # (B, 3, 1, 1)
    paper: Tensor  # (B, 3, 1, 1)
    jitter: Tensor

    @property
    def inside(self) -> Tensor:
        """Coverage by the object, (B, 1, S, S) in [0, 1]."""
        return _coverage(self.distance)[:, None]

    @property
    def phase(self) -> Tensor:
        """One jitter per image, (B, 1, 1, 1) in [0, 1)."""
        return self.jitter[:, 7, None, None, None]

    def cells(self, plane: int) -> Tensor:
        """One jitter per cell, (B, 1, S, S) in [0, 1)."""
        planes = self.jitter[:, 8:].unflatten(1, (-1, 1, _CELLS, _CELLS))
        return F.interpolate(planes[:, plane], scale_factor=_CELL * _SUPERSAMPLING)


def render(
    objects: Sequence[int] | Tensor,
    colors: Sequence[int] | Tensor,
    styles: Sequence[int] | Tensor,
    seed: int,
    indices: Sequence[int],
) -> Tensor:
    """Draw scenes.

    Args:
        objects, colors, styles: B indices each.
        seed, indices: Image b is a function of its scene, `seed` and `indices[b]` alone, whatever else is in the batch.

    Returns:
        (B, 3, 32, 32) fp32 in [-1, 1].
    """
    scenes = torch.stack([torch.as_tensor(labels, dtype=torch.int64) for labels in (objects, colors, styles)])
    jitter = uniform(seed, Stream.WORLD, indices, (_JITTERS,))
    images = torch.empty(scenes.shape[1], 3, SIZE, SIZE)
    for style, paint in enumerate(_PAINT):
        for rows in torch.nonzero(scenes[2] == style)[:, 0].split(_CHUNK):
            images[rows] = _draw(scenes[0, rows], scenes[1, rows], paint, jitter[rows])
    return images


def _draw(objects: Tensor, colors: Tensor, paint: Callable[[_Canvas], Tensor], jitter: Tensor) -> Tensor:
    axis = (torch.arange(SIZE * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - SIZE / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shift_x, shift_y = (3 * jitter[:, i, None, None] - 1.5 for i in (0, 1))
    angle = (jitter[:, 2, None, None] - 0.5) * math.radians(20)
    scale = 0.92 + 0.12 * jitter[:, 3, None, None]
    u, v = (x - shift_x) / scale, (y - shift_y) / scale
    u, v = u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()
    distance = torch.empty_like(u)
    for index, outline in enumerate(_OUTLINE):
        rows = objects == index
        if rows.any():
            distance[rows] = outline(u[rows], v[rows])
    paper = (1 - 0.04 * jitter[:, 4:7]).clone()[:, :, None, None]
    canvas = _Canvas(x, y, distance * scale, _RGB[colors], paper, jitter)
    return F.avg_pool2d(paint(canvas), _SUPERSAMPLING) * 2 - 1


def _coverage(distance: Tensor) -> Tensor:
    return (0.5 - _SUPERSAMPLING * distance).clamp(0, 1)


def _mix(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    return a + share * (b - a)


def _lines(phase: Tensor, period: float, width: float) -> Tensor:
    """Coverage by lines of `width` where `phase` is a multiple of `period`, all in pixels."""
    return _coverage(((phase / period + 0.5).remainder(1) - 0.5).abs() * period - width / 2)


def _polygon(tips: int, radius: float, inner: float, drop: float = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """Distance to a star: `tips` tips at `radius`, notches at `inner`, the middle lowered by `drop`."""
    half = math.pi / tips
    edge_x, edge_y = inner * math.cos(half) - radius, inner * math.sin(half)
    normal_x, normal_y = edge_y / math.hypot(edge_x, edge_y), -edge_x / math.hypot(edge_x, edge_y)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        y = y - drop
        angle = ((torch.atan2(x, -y) + half).remainder(2 * half) - half).abs()
        r = torch.hypot(x, y)
        return (r * angle.cos() - radius) * normal_x + r * angle.sin() * normal_y

    return distance


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 9.6


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 3.8, torch.maximum(x, y) - 11.8)


_OUTLINE: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.hypot(x, y) - 11,
    _square,
    _polygon(3, 14, 7, drop=2.5),
    _polygon(5, 13.5, 6.2, drop=0.5),
    _cross,
    lambda x, y: (torch.hypot(x, y) - 8.7).abs() - 3.2,
)


def _plain(c: _Canvas) -> Tensor:
    return _mix(c.paper, c.color, c.inside)


def _hatching(c: _Canvas) -> Tensor:
    diagonal = (c.x + c.y) * math.sqrt(0.5) + 4 * c.phase
    paper = _mix(c.paper, _GRAY, 0.55 * _lines(diagonal, 4, 0.9))
    ink = _mix(_mix(c.paper, c.color, 0.2), c.color, _lines(diagonal, 4, 2.3))
    return _mix(paper, ink, c.inside)


def _pointillism(c: _Canvas) -> Tensor:
    dx, dy, tone = (c.cells(plane) for plane in range(3))
    row = torch.floor(c.y / _CELL).remainder(2)
    x, y = c.x + row * (_CELL / 2), c.y
    x, y = (axis.remainder(_CELL) - _CELL / 2 for axis in (x, y))
    dots = _coverage(torch.hypot(x + 0.6 * dx - 0.3, y + 0.6 * dy - 0.3) - 1.7)
    ink = _mix(_mix(c.paper, _GRAY, 0.3 + 0.4 * tone), c.color * (0.8 + 0.2 * tone), c.inside)
    return _mix(c.paper, ink, dots)


def _mosaic(c: _Canvas) -> Tensor:
    tone = 0.68 + 0.32 * c.cells(0)
    stone = _mix(_mix(_SAND, c.paper, c.cells(1)), c.color * tone, c.inside)
    grout = torch.maximum(_lines(c.x - 0.5, _CELL, 1), _lines(c.y - 0.5, _CELL, 1))
    return _mix(stone, c.paper, 0.85 * grout)


def _waves(c: _Canvas) -> Tensor:
    height = c.y + 1.5 * torch.sin(c.x * (2 * math.pi / 12) + 2 * math.pi * c.phase)
    paper = _mix(c.paper, _GRAY, 0.6 * _lines(height, 5, 0.9))
    ink = _mix(c.color, c.paper, 0.75 * _lines(height, 5, 1.8))
    return _mix(paper, ink, c.inside)


def _line_art(c: _Canvas) -> Tensor:
    frame = torch.maximum(c.x.abs(), c.y.abs()) - SIZE / 2 + 1
    paper = _mix(c.paper, _GRAY, 0.9 * _coverage(frame.abs() - 0.5))
    return _mix(paper, c.color, _coverage((c.distance + 1).abs() - 1.1)[:, None])


assert len(OBJECTS) == len(COLORS) == 6, "is_held_out and the judge's rounds assume a 6 x 6 table"
_PAINT = (_plain, _hatching, _pointillism, _mosaic, _waves, _line_art)
