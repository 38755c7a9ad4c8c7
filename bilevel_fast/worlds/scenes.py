"""What the images of a drawn world show: scenes, and which of them a bank, a judge and a training take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest

SIZE = 32
"""Pixels of a side of every image."""


class Scene(Protocol):
    """What one image shows: something, in a style. Scenes can be compared and hashed."""

    @property
    def style(self) -> int:
        """A number of `Drawings.styles`."""
        ...

    @property
    def caption(self) -> str:
        """The sentence that asks for it; style 0 goes without saying."""
        ...

    @property
    def labels(self) -> tuple[int, ...]:
        """What it shows, a number for each of `Drawings.heads`; the style is the last one."""
        ...

    def plain(self) -> Self:
        """The same thing in style 0."""
        ...


S = TypeVar("S", bound=Scene)


@dataclass(frozen=True, eq=False)
class Drawings(Generic[S]):
    """A world of drawings: its scenes, and how one is drawn.

    Attributes:
        name: Of the world.
        styles: By number; number 0 goes without saying, and cannot be erased.
        scenes: All of them, style by style.
        heads: How many labels there are of each kind, by its name; `style` is the last one.
        render: Scenes, a seed and B sample indices to images (B, 3, 32, 32) fp32 in [-1, 1]. An image is a function of
            its scene, the seed and its index alone.
        is_held_out: Which scenes erased styles are judged on; they never occur in a concept bank.
        teacher: The model folder of the shipped teacher.
        probe_file: The weights of the shipped probe.
        captions: All sentences for a scene, the caption first.
        relatives: For a style, by name, those that draw alike.
    """

    name: str
    styles: tuple[str, ...]
    scenes: tuple[S, ...]
    heads: Mapping[str, int]
    render: Callable[[Sequence[S], int, Sequence[int]], Tensor]
    is_held_out: Callable[[S], bool]
    teacher: Path
    probe_file: Path
    captions: Callable[[S], tuple[str, ...]] = lambda scene: (scene.caption,)
    relatives: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def numbers(self, names: Sequence[str]) -> list[int]:
        """Numbers of styles, in order.

        Raises:
            UserError: A name is not a style, or all styles are named.
        """
        for name in names:
            if name not in self.styles:
                raise UserError(f"style {name!r} does not exist{nearest(name, self.styles)}")
        if len(set(names)) == len(self.styles):
            raise UserError("all styles are named, none is left to keep")
        return sorted({self.styles.index(name) for name in names})

    def erased_concepts(self, names: Sequence[str]) -> list[int]:
        """Numbers of the styles to erase.

        Raises:
            UserError: A name is not a style, or is the first one: no phrase of a caption stands for it; or is there
                twice.
        """
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"style {name!r} is to be erased twice; wanted each once")
        if self.styles[0] in names:
            raise UserError(f"style {self.styles[0]!r} cannot be erased: no phrase of a caption stands for it")
        return self.numbers(names)

    def phrase(self, style: int) -> str:
        """The words of a caption that ask for a style."""
        return f"in the style of {self.styles[style]}"

    def of_style(self, style: int) -> list[S]:
        """All scenes of a style."""
        return [scene for scene in self.scenes if scene.style == style]

    def erased_scenes(self, styles: Sequence[int], count: int) -> list[S]:
        """`count` held-out scenes per erased style, going round."""
        return [s for style in styles for s in _round([s for s in self.of_style(style) if self.is_held_out(s)], count)]

    def kept_scenes(self, styles: Sequence[int], count: int) -> list[S]:
        """`count` scenes per style that is not erased."""
        kept = (style for style in range(len(self.styles)) if style not in styles)
        return [scene for style in kept for scene in _round(self.of_style(style), count)]


def _round(scenes: list[S], count: int) -> list[S]:
    # a stride prime to their number, so that a short round is a mix and not one colour
    return [scenes[(7 * i) % len(scenes)] for i in range(count)]
