"""What a pruning method may spend, and what it can buy: units of width vectors, at a price in MACs or in time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, UNetConfig, Width, sites
from bilevel_fast.models.macs import fixed_costs, site_costs
from bilevel_fast.models.structure import Structure

Calibration = Sequence[tuple[Tensor, Tensor]]
"""Batches of scaled latents (B, C, H, W) and text states (B, L, D) that a method may try the teacher on."""


@dataclass(frozen=True)
class SitePrice:
    """What a site takes, in whole units of the budget: `fixed` while it stands, and `widths[w][k]` for k kept units of
    width vector w, (units + 1,) int64. A dropped site takes nothing."""

    fixed: int
    widths: Mapping[str, NDArray[np.int64]]

    @property
    def dense(self) -> int:
        return self.fixed + sum(int(prices[-1]) for prices in self.widths.values())


@dataclass(frozen=True)
class Prices:
    """What everything takes: the sites, and `outside` them what pruning never touches."""

    what: str
    """In the plural, for messages: `MACs`."""
    sites: Mapping[str, SitePrice]
    outside: int

    @property
    def dense(self) -> int:
        return self.outside + sum(site.dense for site in self.sites.values())

    def of(self, structure: Structure) -> int:
        """What a structure takes."""
        return self.outside + sum(self.site(structure, name) for name in structure.kept)

    def site(self, structure: Structure, name: str) -> int:
        """What one site of a structure takes."""
        if name in structure.dropped:
            return 0
        kept, price = structure.kept[name], self.sites[name]
        return price.fixed + sum(int(price.widths[width][len(units)]) for width, units in kept.items())


class Budget(Protocol):
    """At most `ratio` of what the dense UNet takes, and at least `min_keep` of every width vector."""

    @property
    def ratio(self) -> float: ...

    @property
    def min_keep(self) -> float: ...

    def prices(self, config: UNetConfig) -> Prices: ...


@dataclass(frozen=True)
class MacBudget:
    """At most `ratio` of the dense UNet's MACs, counted as `true` by `bilevel_fast.models.macs`.

    `latent` and `text` are the sizes to count at, as in `macs.count`.

    Raises:
        UserError: `ratio` or `min_keep` is outside (0, 1].
    """

    ratio: float
    latent: int
    text: int
    min_keep: float = 0.25
    """Share of each width vector that stays in any case, rounded up to whole units."""

    def __post_init__(self) -> None:
        check_share("budget", self.ratio, "a share of the dense MACs, ")
        check_share("min_keep", self.min_keep)

    def prices(self, config: UNetConfig) -> Prices:
        """MACs of every site: each kept unit adds the same."""
        table = site_costs(config, self.latent, self.text)
        sold = {
            site.name: SitePrice(
                table[site.name].fixed.true,
                {w.name: np.arange(w.units + 1) * table[site.name].units[w.name].true for w in site.widths},
            )
            for site in sites(config)
        }
        return Prices("MACs", sold, sum(cost.true for cost in fixed_costs(config, self.latent).values()))


def check_share(name: str, value: float, meaning: str = "") -> None:
    """Refuse what is outside (0, 1], with a UserError."""
    if not 0.0 < value <= 1.0:
        raise UserError(f"{name} is {value}, wanted {meaning}0 < {name} <= 1")


def least_units(width: Width, keep: float) -> int:
    """The share `keep` of a width vector, rounded up to whole units but for the last digits of a product."""
    return max(1, ceil(keep * width.units - 1e-9))


@dataclass(frozen=True)
class Choice:
    """One width vector to decide on: it keeps k units, `least` to `width.units`, and takes `prices[k]` for them."""

    site: Site
    width: Width
    least: int
    prices: NDArray[np.int64]


def choices(config: UNetConfig, budget: Budget) -> tuple[tuple[Choice, ...], int]:
    """All width vectors in the order of the architecture vector, and what is left when each keeps its least.

    Raises:
        UserError: Even the least exceeds the budget; the smallest possible budget is named.
    """
    prices = budget.prices(config)
    found = tuple(
        Choice(site, width, least_units(width, budget.min_keep), prices.sites[site.name].widths[width.name])
        for site in sites(config)
        for width in site.widths
    )
    least = prices.dense - sum(int(c.prices[-1] - c.prices[c.least]) for c in found)
    spare = int(budget.ratio * prices.dense) - least
    if spare < 0:
        raise UserError(
            f"budget {budget.ratio:g} is too small: keeping {budget.min_keep:.0%} of every width vector "
            f"takes {ceil(1000 * least / prices.dense) / 1000:.3f} of the dense {prices.what}"
        )
    return found, spare


def fill(found: Sequence[Choice], counts: Sequence[int], spare: int, ranks: Sequence[Sequence[float]]) -> list[int]:
    """Buy units one by one, in ascending rank, each if it still fits.

    Args:
        found: The width vectors.
        counts: Units that each keeps already.
        spare: What there is to spend.
        ranks: For each vector, the rank of its k-th unit at [k - 1], ascending. A tie goes to the earlier vector.

    Returns:
        Units that each vector keeps. What is left of `spare` buys no vector its next unit.
    """
    filled = list(counts)
    missing = [(ranks[i][k], i) for i, c in enumerate(found) for k in range(counts[i], c.width.units)]
    bought = True
    while bought:  # by time a unit may cost less than nothing, and what did not fit before it does then
        bought = False
        for _, i in sorted(missing):
            if filled[i] == found[i].width.units:
                continue
            price = int(found[i].prices[filled[i] + 1] - found[i].prices[filled[i]])
            if price <= spare:
                filled[i] += 1
                spare -= price
                bought = True
    return filled


def assemble(config: UNetConfig, found: Sequence[Choice], units: Iterable[Iterable[int]]) -> Structure:
    """The structure that keeps `units[i]`, in any order, of `found[i]`, and drops no site."""
    kept: dict[str, dict[str, tuple[int, ...]]] = {site.name: {} for site in sites(config)}
    for choice, indices in zip(found, units, strict=True):
        kept[choice.site.name][choice.width.name] = tuple(sorted(indices))
    return Structure(config, kept)
