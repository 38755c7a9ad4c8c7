"""A structure as one vector (APTP, arXiv:2406.12042): an entry for every unit of every width vector, then the depths.

    to_vector(structure)            zeros and ones
    from_vector(config, vector)     back, from hard entries or soft ones
    layout(config)                  where the entries of each site lie

SD 2.1: 70 width vectors of 1606 entries in all, and 14 depths. SDXL has a depth for each transformer block as well: 227
width vectors of 5384 entries, and 80 depths. Legend: B samples, V entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, UNetConfig, Width, sites, with_blocks
from bilevel_fast.models.structure import Structure


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
    def parents(self) -> tuple[int, ...]:
        """For each depth the number of the depth that its site stands within, `len(depths)` where there is none."""
        number = {site.name: i for i, site in enumerate(self.depths)}
        return tuple(number.get(site.within, len(self.depths)) for site in self.depths)

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

    def standing(self, depths: Tensor) -> Tensor:
        """Depths (B, len(depths)), each times that of the site which it stands within."""
        if all(parent == len(self.depths) for parent in self.parents):
            return depths
        padded = torch.cat([depths, depths.new_ones(len(depths), 1)], dim=1)
        return depths * padded[:, torch.tensor(self.parents, device=depths.device)]

    def stretch(self, depths: Tensor) -> Tensor:
        """Depths (B, len(depths)) -> (B, widths): each over the width entries of its site, 1 where there is none."""
        padded = torch.cat([self.standing(depths), depths.new_ones(len(depths), 1)], dim=1)
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


def to_vector(structure: Structure) -> Tensor:
    """The architecture vector of a structure, (V,) fp32 zeros and ones. The width entries of a dropped site are one,
    and so are the depths of what is within it.

    Raises:
        UserError: A site without a depth entry is dropped: the vector cannot say so.
    """
    plan = layout(structure.config)
    for site in sites(structure.config):
        if site.name in structure.dropped and not site.depth_bit and site.within not in structure.dropped:
            raise UserError(f"structure: site {site.name} is dropped, but has no depth bit in the vector")
    vector = torch.ones(plan.size)
    for segment in plan.segments:
        if segment.site.name not in structure.dropped:
            kept = structure.kept[segment.site.name][segment.width.name]
            vector[segment.start : segment.stop] = 0.0
            vector[segment.start + torch.tensor(kept)] = 1.0
    for number, site in enumerate(plan.depths):  # what goes with something else has nothing to say itself
        vector[plan.widths + number] = float(site.name not in structure.dropped or site.within in structure.dropped)
    return vector


def from_vector(config: UNetConfig, vector: Tensor | Sequence[float]) -> Structure:
    """The structure of an architecture vector (V,), hard or soft: what has an entry >= 0.5 stays.

    Raises:
        UserError: The length is wrong, an entry is not finite, or a width vector keeps nothing (the site is named).
    """
    values, plan = torch.as_tensor(vector, dtype=torch.float32).flatten(), layout(config)
    if not values.isfinite().all():
        raise UserError(f"architecture vector has {int((~values.isfinite()).sum())} entries that are not finite")
    if len(values) != plan.size:
        raise UserError(
            f"architecture vector has {len(values)} entries, this UNet wants {plan.widths} widths + "
            f"{len(plan.depths)} depths"
        )
    bits = (values >= 0.5).tolist()
    gone = frozenset(site.name for site, bit in zip(plan.depths, bits[plan.widths :], strict=True) if not bit)
    dropped = with_blocks(config, gone)
    kept: dict[str, dict[str, tuple[int, ...]]] = {s.name: {} for s in sites(config) if s.name not in dropped}
    for segment in plan.segments:
        if segment.site.name not in dropped:
            units = tuple(i for i in range(segment.width.units) if bits[segment.start + i])
            kept[segment.site.name][segment.width.name] = units
    return Structure(config, kept, dropped)
