"""Who measures the models of a table, and what the columns say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

Numbers = dict[str, float | None]
"""By column key; None was not measured, for want of weights or prompts."""


@dataclass(frozen=True)
class Column:
    """One number of a row.

    Attributes:
        key: In the JSON.
        heading: In the table.
        better: `up`, `down`, or empty where neither is.
        digits: Decimals shown.
    """

    key: str
    heading: str
    better: str = ""
    digits: int = 2

    @property
    def title(self) -> str:
        arrow = {"up": " (up)", "down": " (down)", "": ""}[self.better]
        return self.heading + arrow


class Judge(Protocol):
    """Measures model folders of one seed. `name` tells them apart; comparing columns compare with `distilled`."""

    def columns(self, measure: str) -> tuple[Column, ...]:
        """What `measure` returns, in order."""
        ...

    def __call__(self, measure: str, name: str, path: Path) -> Numbers:
        """Numbers of a model: `style`, `attacked`, `kept`, `removed` or `labels`."""
        ...

    def pictures(self, name: str, path: Path) -> tuple[Tensor, list[str]]:
        """Some images (N, 3, H, W) in [-1, 1] and their prompts, the same for every row."""
        ...
