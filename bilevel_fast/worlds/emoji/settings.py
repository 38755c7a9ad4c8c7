"""Settings of the emoji world."""

from dataclasses import dataclass
from typing import ClassVar

from bilevel_fast.worlds.settings import Drawn


@dataclass(frozen=True)
class Emoji(Drawn):
    """The emoji world: its data, its concept bank and how the result is judged."""

    NAME: ClassVar[str] = "emoji"

    judge_erased: int = 96
    """Samples judged per erased style."""
    judge_kept: int = 96
    """Samples judged per style that should stay."""
