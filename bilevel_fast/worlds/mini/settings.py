"""Settings of the mini world."""

from dataclasses import dataclass
from typing import ClassVar

from bilevel_fast.worlds.settings import Drawn


@dataclass(frozen=True)
class Mini(Drawn):
    """The mini world: its data, its concept bank and how the result is judged."""

    NAME: ClassVar[str] = "mini"

    judge_steps: int = 12
    """DDIM steps of the judged samples: on this world as good as 25 of PNDM, at half the time."""
