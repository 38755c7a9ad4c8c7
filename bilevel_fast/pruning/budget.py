"""What a pruning method may spend, and what it can buy: units of width vectors, each at its price in MACs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from bilevel_fast.architecture import Site, UNetConfig, Width, sites
from bilevel_fast.errors import UserError
from bilevel_fast.macs import dense_true, site_costs
from bilevel_fast.structure import Structure

Calibration = Sequence[tuple[Tensor, Tensor]]
"""Batches of scaled latents (B, C, H, W) and text states (B, L, D) that a method may try the teacher on."""


@dataclass(frozen=True)
class MacBudget:
    """At most `ratio` of the dense UNet's MACs, counted as `true` by `bilevel_fast.macs`.

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
        if not 0.0 < self.ratio <= 1.0:
            raise UserError(f"budget is {self.ratio}, wanted a share of the dense MACs, 0 < budget <= 1")
        if not 0.0 < self.min_keep <= 1.0:
            raise UserError(f"min_keep is {self.min_keep}, wanted 0 < min_keep <= 1")


@dataclass(frozen=True)
class Choice:
    """One width vector to decide on: it keeps `least` to `width.units` units, at `price` MACs each."""

    site: Site
    width: Width
    least: int
    price: int


def choices(config: UNetConfig, budget: MacBudget) -> tuple[tuple[Choice, ...], int]:
    """All width vectors in the order of the architecture vector, and the MACs left when each keeps its least.

    Raises:
        UserError: Even the least exceeds the budget; the smallest possible budget is named.
    """
    table = site_costs(config, budget.latent, budget.text)
    found = tuple(
        Choice(site, width, ceil(budget.min_keep * width.units), table[site.name].units[width.name].true)
        for site in sites(config)
        for width in site.widths
    )
    dense = dense_true(config, budget.latent, budget.text)
    least = dense - sum((c.width.units - c.least) * c.price for c in found)
    spare = int(budget.ratio * dense) - least
    if spare < 0:
        raise UserError(
            f"budget {budget.ratio:g} is too small: keeping {budget.min_keep:.0%} of every width vector "
            f"takes {ceil(1000 * least / dense) / 1000:.3f} of the dense MACs"
        )
    return found, spare


def fill(found: Sequence[Choice], counts: Sequence[int], spare: int, ranks: Sequence[Sequence[float]]) -> list[int]:
    """Buy units one by one, in ascending rank, each if it still fits.

    Args:
        found: The width vectors.
        counts: Units that each keeps already.
        spare: MACs to spend.
        ranks: For each vector, the rank of its k-th unit at [k - 1], ascending. A tie goes to the earlier vector.

    Returns:
        Units that each vector keeps. What is left of `spare` buys none of the units still missing.
    """
    filled = list(counts)
    missing = [(ranks[i][k], i) for i, c in enumerate(found) for k in range(counts[i], c.width.units)]
    for _, i in sorted(missing):
        if found[i].price <= spare:
            filled[i] += 1
            spare -= found[i].price
    return filled


def assemble(config: UNetConfig, found: Sequence[Choice], units: Iterable[Iterable[int]]) -> Structure:
    """The structure that keeps `units[i]`, in any order, of `found[i]`, and drops no site."""
    kept: dict[str, dict[str, tuple[int, ...]]] = {}
    for choice, indices in zip(found, units, strict=True):
        kept.setdefault(choice.site.name, {})[choice.width.name] = tuple(sorted(indices))
    return Structure(config, kept)
