"""Built-in worlds: drawn data, a small teacher of it, and the probe that judges models, all through one interface.

A further world is a package beside `mini` and its name in `WORLDS`. Its `materials` module has a `WORLD` with the
functions of `World`, which `DrawnWorld` makes of drawings in styles; or it has these functions itself.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # `--help` reads settings of worlds, and should not wait for torch
    from torch import Tensor

    from bilevel_fast.data.bank import Shows
    from bilevel_fast.data.cache import Cache
    from bilevel_fast.data.sources import LatentSource
    from bilevel_fast.models.folder import ModelFolder
    from bilevel_fast.models.unet import UNet
    from bilevel_fast.scale.team import Team
    from bilevel_fast.worlds.drawn import DrawnWorld

WORLDS = ("mini", "emoji")


class Samples(Protocol):
    """Images of one model, and what each was asked to show."""

    @property
    def images(self) -> "Tensor":
        """(N, 3, H, W) in [-1, 1]."""
        ...

    @property
    def captions(self) -> list[str]:
        """N prompts."""
        ...


class World(Protocol):
    """What `materials` of a world offers. Concepts are numbers; `settings` is the section of `TrainConfig` that bears
    the world's name."""

    @property
    def TEACHER(self) -> Path:
        """The model folder of the shipped teacher."""
        ...

    def erased_concepts(self, names: Sequence[str]) -> list[int]:
        """Numbers of the concepts to erase.

        Raises:
            UserError: A name is not a concept, cannot be erased, or is there twice.
        """
        ...

    def drawn_source(self, folder: "ModelFolder", erased: Sequence[int], count: int, seed: int) -> "LatentSource":
        """So many drawn training images of what is not erased."""
        ...

    def concept_banks(
        self,
        folder: "ModelFolder",
        names: Sequence[str],
        settings: Any,
        seed: int,
        out: Path,
        *,
        alone: bool,
        shows: "Shows",
    ) -> "list[Cache]":
        """A bank for each concept, sampled from the teacher; in `out` itself if it is `alone`."""
        ...

    def subjects(self) -> list[str]:
        """Captions without a concept that are not held out for the judge."""
        ...

    def portfolio(
        self,
        unet: "UNet",
        folder: "ModelFolder",
        erased: Sequence[int],
        settings: Any,
        seed: int,
        team: "Team" = ...,
    ) -> Samples:
        """The samples that a model is judged by: first of the erased concepts, then of all others.

        Ranks of a team share them, and all get all of them.
        """
        ...

    def hits(self, samples: Any, erased: Sequence[int]) -> dict[str, float]:
        """For each erased concept, the share of samples for its prompts in which the probe sees it."""
        ...

    def quality(self, samples: Any, erased: Sequence[int]) -> dict[str, float]:
        """What the probe found, by metric."""
        ...

    def shares(self, erased: Sequence[int], settings: Any) -> dict[str, int]:
        """For each metric of `quality` that is a share of samples: of how many."""
        ...

    def shown(self, count: int, erased: Sequence[int], settings: Any) -> list[int]:
        """Which of `count` samples stand for all of them in a picture."""
        ...


def world(name: str) -> World:
    """The built-in world of a name in `WORLDS`."""
    assert name in WORLDS, name
    module = import_module(f"bilevel_fast.worlds.{name}.materials")
    return getattr(module, "WORLD", module)  # pyright: ignore[reportReturnType]


def drawn_world(name: str) -> "DrawnWorld[Any]":
    """The built-in world of a name in `WORLDS`, a `DrawnWorld`: the paper's tables want more than a run does."""
    return import_module(f"bilevel_fast.worlds.{name}.materials").WORLD
