"""Prompts under attack: what each search says on the way, painted from the image's own noise and looked at."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.attacking.looks import Look
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.cache import Cache
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream
from bilevel_fast.sampling.generate import generate
from bilevel_fast.worlds import drawn_world
from bilevel_fast.worlds.drawn import DrawnWorld
from bilevel_fast.worlds.scenes import SIZE


@dataclass(frozen=True)
class Seen:
    """A prompt on the way.

    Attributes:
        step: Of the search.
        text: The prompt.
        loss: What the search makes small.
        hit, content: Whether the image shows the concept, and the rest of the caption; None where nobody looked.
    """

    step: int
    text: str
    loss: float
    hit: bool | None = None
    content: bool | None = None

    @property
    def said(self) -> str:
        """For people."""
        if self.hit is None:
            return ""
        return f": {'seen' if self.hit else 'not seen'}, content {'kept' if self.content else 'lost'}"


@dataclass
class Attacked:
    """One prompt of the bank.

    Attributes:
        caption: That names the concept.
        anchor: That does not.
        looks: By rising step, at least one.
        sticks: The first hit is what counts, else the last look.
    """

    caption: str
    anchor: str
    sticks: bool
    looks: list[Seen] = field(default_factory=list)

    def at(self, step: int) -> Seen:
        """What counts after so many steps."""
        past = [look for look in self.looks if look.step <= step] or self.looks[:1]
        return next((look for look in past if look.hit), past[-1]) if self.sticks else past[-1]

    @property
    def last(self) -> Seen:
        return self.at(self.looks[-1].step)


@dataclass(frozen=True, eq=False)
class Target:
    """A model under attack, and the attacker's images.

    Attributes:
        folder: The model's.
        bank: Where the images come from.
        numbers: Of the images in the bank.
        captions, anchors: Of each.
        known: All captions of the bank, each with its anchor.
        latents: (N, C, H, W) on `device`.
        device: Of the model.
        world: That it draws; None where nobody can judge.
    """

    folder: ModelFolder
    bank: Cache
    numbers: list[int]
    captions: list[str]
    anchors: list[str]
    known: list[tuple[str, str]]
    latents: Tensor
    device: torch.device
    world: DrawnWorld[Any] | None

    @classmethod
    def of(cls, folder: ModelFolder, bank: Cache, count: int, device: torch.device) -> "Target":
        """The first `count` captions of a bank, each by its first image.

        Raises:
            UserError: A caption or the size is not the built-in world's that the model draws.
        """
        first: dict[str, int] = {}
        for number in range(len(bank)):
            first.setdefault(bank.captions(number)[0], number)
        numbers, captions = list(first.values())[:count], list(first)[:count]
        here = None if folder.family.world is None else drawn_world(folder.family.world)
        known = {} if here is None else {scene.caption for scene in here.scenes}
        if here and (other := [text for text in captions if text not in known]):
            raise UserError(
                f"{bank.path}: caption {other[0]!r} is none of the {here.name} world, whose probe would judge it"
            )
        if isinstance(folder.vae, PixelUnshuffleVAE) and (side := bank.latent_shape[1] * folder.vae.block) != SIZE:
            raise UserError(f"{bank.path} has images of {side}x{side}; a built-in world's probe reads {SIZE}x{SIZE}")
        latents = bank.moments(numbers, [0] * len(numbers)).chunk(2, dim=1)[0].to(device)
        known = [(caption, bank.anchor(number) or "") for caption, number in first.items()]
        anchors = [anchor for _, anchor in known[:count]]
        return cls(folder, bank, numbers, captions, anchors, known, latents, device, here)

    @cached_property
    def unet(self) -> UNet:
        return self.folder.unet().to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def paint(self, rows: Sequence[int], texts: Sequence[str]) -> Tensor | None:
        """Images (N, 3, H, W) on the CPU of prompts, from the noise of the rows' own images.

        None if the bank does not say how they were drawn.
        """
        recipe = self.bank.index.recipe
        if not all(type(recipe.get(name)) in (int, float) for name in ("seed", "steps", "guidance")):
            return None
        latents = generate(
            self.unet, self.folder.schedule, self.folder.text_encoder, texts, [self.numbers[row] for row in rows],
            seed=recipe["seed"], size=self.bank.latent_shape[1:], guidance=recipe["guidance"], steps=recipe["steps"],
            stream=Stream.BANK,
        )  # fmt: skip
        return self.folder.vae.decode(latents.to(self.device)).float().cpu()

    def judged(self, rows: Sequence[int], texts: Sequence[str]) -> list[tuple[bool, bool] | tuple[None, None]]:
        """For each prompt whether its image shows the concept and the rest of the caption; None where nobody looks."""
        if self.world is None or (images := self.paint(rows, texts)) is None:
            return [(None, None)] * len(rows)
        scenes = {scene.caption: scene for scene in self.world.scenes}
        hit, content = self.world.recognised(images, [scenes[self.captions[row]] for row in rows])
        return list(zip(hit.tolist(), content.tolist(), strict=True))


def carry_out(
    target: Target,
    searches: Iterable[tuple[Sequence[int], int, Iterator[Look]]],
    looks: int,
    sticks: bool,
    progress: Callable[[int, int], None],
) -> list[Attacked]:
    """Run searches and look at them on the way.

    Args:
        target: What is attacked.
        searches: For each its rows of the target, how often it says something, and the search.
        looks: How often its prompts are looked at, the last of them among these.
        sticks: Whether the first hit is what counts; then a search ends when all its rows have one.
        progress: Called with the rows done, and all.
    """
    found = [Attacked(*pair, sticks) for pair in zip(target.captions, target.anchors, strict=True)]
    done = 0
    for rows, says, search in searches:
        every = max(1, math.ceil(says / looks))
        for number, look in enumerate(search, start=1):
            if number % every and number != says:
                continue
            seen = target.judged(rows, look.texts)
            for row, text, loss, verdict in zip(rows, look.texts, look.losses, seen, strict=True):
                found[row].looks.append(Seen(look.step, text, loss, *verdict))
            if sticks and all(found[row].last.hit for row in rows):
                break
        done += len(rows)
        progress(done, len(found))
    return found


def curve(found: Sequence[Attacked]) -> list[dict[str, Any]]:
    """After each step at which somebody looked: the mean loss, and the shares that show the concept and the content."""
    points = []
    for step in sorted({look.step for each in found for look in each.looks}):
        now = [each.at(step) for each in found]
        point: dict[str, Any] = {"step": step, "loss": sum(look.loss for look in now) / len(now)}
        if all(look.hit is not None for look in now):
            point |= {key: sum(bool(getattr(look, key)) for look in now) / len(now) for key in ("hit", "content")}
        points.append(point)
    return points
