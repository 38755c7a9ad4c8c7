"""Where the entries of an architecture vector lie: those of `Structure.to_vector`, width vectors first, then depths.

SD 2.1: 70 width vectors of 1606 entries in all, and 14 depths. Legend: B samples, V entries.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bilevel_fast.models.architecture import Site, UNetConfig, Width, sites


@dataclass(frozen=True)
class Segment:
    """One width vector: entries [start, stop)."""

    site: Site
    width: Width
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Layout:
    """The vector of one UNet."""

    segments: tuple[Segment, ...]
    """All width vectors, in order; without gaps."""
    depths: tuple[Site, ...]
    """The sites with a depth entry, in order. That of `depths[i]` lies at `widths + i`."""

    @property
    def widths(self) -> int:
        """Number of width entries."""
        return self.segments[-1].stop

    @property
    def size(self) -> int:
        """V."""
        return self.widths + len(self.depths)

    @property
    def depth_of_width(self) -> Tensor:
        """For each width entry the number of its site's depth, `len(depths)` where there is none: (widths,) int64."""
        number = {site.name: i for i, site in enumerate(self.depths)}
        numbers = [number.get(s.site.name, len(self.depths)) for s in self.segments for _ in range(s.width.units)]
        return torch.tensor(numbers, device="cpu")

    @property
    def units(self) -> Tensor:
        """For each entry the units of its width vector, 1 for depths: (V,) int64."""
        counts = [s.width.units for s in self.segments for _ in range(s.width.units)]
        return torch.tensor(counts + [1] * len(self.depths), device="cpu")

    def stretch(self, depths: Tensor) -> Tensor:
        """Depths (B, len(depths)) -> (B, widths): each over the width entries of its site, 1 where there is none."""
        padded = torch.cat([depths, depths.new_ones(len(depths), 1)], dim=1)
        return padded[:, self.depth_of_width.to(depths.device)]

    def split(self, vectors: Tensor) -> tuple[list[Tensor], Tensor]:
        """Vectors (B, V) as one (B, units) per width vector, and the depths (B, len(depths)); views.

        Raises:
            ValueError: The shape is another.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise ValueError(f"architecture vectors have shape {tuple(vectors.shape)}, wanted (B, {self.size})")
        *widths, depths = vectors.split([*(s.width.units for s in self.segments), len(self.depths)], dim=1)
        return widths, depths


@lru_cache
def layout(config: UNetConfig) -> Layout:
    """The layout of a UNet's architecture vectors."""
    segments: list[Segment] = []
    start = 0
    for site in sites(config):
        for width in site.widths:
            segments.append(Segment(site, width, start, start + width.units))
            start += width.units
    return Layout(tuple(segments), tuple(site for site in sites(config) if site.depth_bit))
