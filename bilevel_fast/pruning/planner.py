"""Spend a budget on the units that matter most: any importance, all sites at once, optimal to the last MAC.

    kept share   p_v(k) = sum of the k largest importances of width vector v / sum of all its importances
    lost sum     l_v(k) = sum of all importances of v - sum of its k largest
    "shares"     max  sum over standing sites of sum_v log p_v(k_v)  +  sum over dropped sites of d_s
    "sum"        max  - sum over standing sites of sum_v l_v(k_v)  +  sum over dropped sites of d_s
    such that    the standing sites' costs fit the budget, and each vector keeps `min_keep` of its units

Shares are for importances that compare within a width vector only, as norms of weights do; `magnitude.py` says why
their logarithm. If importances have one unit everywhere, as changes of a loss do, their sum says more
(`benchmarks.quality.planner`): what it takes from a vector depends on how much the network hangs on that vector.

A site that is dropped keeps no share, and log 0 would forbid it; what the network loses without it has to be scored
apart, in `importance[site]["drop"]`: d_s <= 0, with "shares" the logarithm of the share of the signal that remains,
with "sum" minus the importance of the whole site. Without it a site is never dropped. With d_s = 0 a site goes whenever
that buys anything elsewhere, with a very negative one never.

Transformer blocks that are sites are planned one by one. Their Transformer goes where all of them went, if it may; what
that saves is spent on what is left, in another plan.

For `MacBudget` costs are whole MACs, for `LatencyBudget` whole picoseconds, and nothing is rounded on the way: the plan
is the best there is (`native.plan`). A site that may be dropped is one group, as its fixed part goes with all of its
units: of the combinations of its width vectors, those stay that no other beats in cost and value together.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.models.architecture import Site, UNetConfig, Width, sites, with_emptied
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.native import plan
from bilevel_fast.pruning.budget import Budget, MacBudget, Prices, check_share, least_units
from bilevel_fast.pruning.latency import LatencyBudget

__all__ = ["DROP", "Budget", "Importance", "LatencyBudget", "MacBudget", "Objective", "spend"]

Importance = Mapping[str, Mapping[str, Tensor]]
"""Site -> width vector -> (units,) fp64, >= 0 and finite. For shares, only ratios within a vector count, and a vector
of zeros says nothing, as one of ones does. Site -> `DROP` -> () fp64, <= 0."""
Objective = Literal["shares", "sum"]

DROP = "drop"


@dataclass(frozen=True)
class _Vector:
    """A width vector: which units it keeps first, and cost and value of each count it may keep."""

    site: Site
    width: Width
    ranking: tuple[int, ...]
    counts: NDArray[np.int64]  # ascending; the last keeps all
    costs: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class _Group:
    """What is decided together. At row i of `picks`: for each vector, a number into its `counts`, or -1 if the site is
    dropped."""

    vectors: tuple[_Vector, ...]
    costs: NDArray[np.int64]
    values: NDArray[np.float64]
    picks: NDArray[np.int64]  # (options, vectors)


def spend(
    config: UNetConfig,
    budget: Budget,
    importance: Importance,
    *,
    droppable: Collection[str] = (),
    min_keep: float | None = None,
    align: int = 1,
    objective: Objective = "shares",
) -> Structure:
    """The structure within the budget that keeps the most importance, by `objective`. Deterministic.

    Units of no importance are bought, too, while they fit, in ascending kept share: the budget is there to be spent.

    Args:
        config: The dense UNet.
        budget: What may be spent.
        importance: Of every unit of every site.
        droppable: Names of sites that may be dropped, if they have an importance for it.
        min_keep: Instead of the budget's.
        align: ResNets keep only group counts whose inner width is a multiple of this, or all their groups.
        objective: How importances of different width vectors add up; see above.

    Raises:
        UserError: The budget is below what these rules allow (the smallest possible one is named); an importance is
            missing, unknown, of a wrong shape, negative or not finite (the site is named); or a site in `droppable`
            is unknown or changes the number of channels.
    """
    keep = budget.min_keep if min_keep is None else min_keep
    check_share("min_keep", keep)
    if align < 1:
        raise UserError(f"align is {align}, wanted at least 1")
    _check_names(config, importance, droppable)
    given = {site.name: _checked(site, importance.get(site.name, {})) for site in sites(config)}
    prices, members = budget.prices(config), sites(config)
    fixed, groups = dict[str, int](), dict[str, list[_Group]]()
    for site in members:
        found, price = given[site.name], prices.sites[site.name]
        vectors = tuple(
            _vector(site, w, price.widths[w.name], found[w.name], keep, align, objective) for w in site.widths
        )
        if vectors and site.name in droppable and DROP in found:
            groups[site.name] = [_joint(vectors, price.fixed, float(found[DROP]))]
        else:
            fixed[site.name] = price.fixed
            groups[site.name] = [_Group((v,), v.costs, v.values, np.arange(len(v.counts))[:, None]) for v in vectors]
    rule = f"keeping {f'{keep:.0%}' if keep >= 0.01 else 'a unit'} of every width vector"
    emptied = frozenset[str]()
    while True:
        left = [site.name for site in members if not {site.name, site.within} & emptied]
        stands = prices.outside + sum(fixed.get(name, 0) for name in left)
        found = _plan(prices, budget.ratio, rule, align, stands, [group for name in left for group in groups[name]])
        kept = {site.name: {} for site in members if site.name in left and not site.widths} | found
        dropped = frozenset(site.name for site in members) - frozenset(kept)
        more = (with_emptied(config, dropped) - dropped) & frozenset(droppable)
        if not more:
            return Structure(config, kept, dropped)
        emptied |= more


def _plan(
    prices: Prices, ratio: float, rule: str, align: int, fixed: int, groups: Sequence[_Group]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Kept units of the sites of these groups that are not dropped."""
    spare = _spare(prices, ratio, rule, align, fixed, groups)
    choice, _, spent, gap = plan([g.costs for g in groups], [g.values for g in groups], spare)
    if gap:
        warnings.warn(f"spend: the plan is not proven to be the best; its value may be {gap:.2g} too low", stacklevel=3)
    picks = {
        (v.site.name, v.width.name): (v, int(pick))
        for group, option in zip(groups, choice, strict=True)
        for v, pick in zip(group.vectors, group.picks[option], strict=True)
        if pick >= 0
    }
    kept: dict[str, dict[str, tuple[int, ...]]] = {}
    for (site_name, width_name), k in _fill(picks, spare - spent).items():
        ranking = picks[site_name, width_name][0].ranking
        kept.setdefault(site_name, {})[width_name] = tuple(sorted(ranking[:k]))
    return kept


def _check_names(config: UNetConfig, importance: Importance, droppable: Collection[str]) -> None:
    known = {site.name: site for site in sites(config)}
    for what, names in (("importance", importance), ("droppable", droppable)):
        for name in names:
            if name not in known:
                raise UserError(f"{what}: no site {name!r} in this UNet{nearest(name, known)}")
    for name in droppable:
        if not known[name].droppable:
            raise UserError(f"droppable: site {name} cannot be dropped, it changes the number of channels")
    for name, site in known.items():
        if name not in importance:
            if site.widths:
                raise UserError(f"importance: site {name} is missing")
            continue
        allowed = [*(w.name for w in site.widths), *([DROP] if site.droppable else [])]
        for given in importance[name]:
            if given not in allowed:
                raise UserError(f"importance: site {name} has no {given!r}{nearest(given, allowed)}")


def _checked(site: Site, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The importances of a site, fp64 on the CPU."""
    found = {name: values.detach().to("cpu", torch.float64) for name, values in given.items()}
    for width in site.widths:
        where = f"importance: site {site.name}, {width.name!r}"
        if width.name not in found:
            raise UserError(f"{where} is missing")
        values = found[width.name]
        if values.shape != (width.units,):
            raise UserError(f"{where} has shape {tuple(values.shape)}, wanted ({width.units},)")
        if not values.isfinite().all():
            raise UserError(f"{where} holds numbers that are not finite")
        if (values < 0).any():
            raise UserError(f"{where} holds negative numbers")
    if DROP in found:
        where, drop = f"importance: site {site.name}, {DROP!r}", found[DROP]
        if drop.shape != ():
            raise UserError(f"{where} has shape {tuple(drop.shape)}, wanted ()")
        if not -np.inf < float(drop) <= 0.0:
            raise UserError(f"{where} is {float(drop)}, wanted a finite number <= 0")
    return found


def _vector(
    site: Site,
    width: Width,
    price: NDArray[np.int64],
    importance: Tensor,
    keep: float,
    align: int,
    objective: Objective,
) -> _Vector:
    largest, ranking = importance.sort(descending=True, stable=True)
    if objective == "sum":
        values = -(largest.sum() - largest.cumsum(0)).clamp(min=0.0).numpy()
    else:
        # scaled first, so that no sum overflows; a vector of zeros is one of ones
        scaled = largest / largest[0] if largest[0] > 0 else torch.ones_like(largest)
        values = (scaled.cumsum(0) / scaled.sum()).log().numpy()
    values[-1] = 0.0
    wide = align if width.name == "groups" else 1
    allowed = range(least_units(width, keep), width.units + 1)
    counts = np.array([k for k in allowed if k * width.unit_size % wide == 0 or k == width.units])
    return _Vector(site, width, tuple(ranking.tolist()), counts, price[counts], values[counts - 1])


def _joint(vectors: tuple[_Vector, ...], fixed: int, drop: float) -> _Group:
    """The site whole, or not at all: combinations of its vectors, merged one vector after the other."""
    costs, values, picks = np.array([fixed]), np.zeros(1), np.zeros((1, 0), np.int64)
    for vector in vectors:
        options = np.arange(len(vector.counts))
        costs = (costs[:, None] + vector.costs).ravel()
        values = (values[:, None] + vector.values).ravel()
        picks = np.column_stack([picks.repeat(len(options), axis=0), np.tile(options, len(picks))])
        best = _frontier(costs, values)
        costs, values, picks = costs[best], values[best], picks[best]
    gone = np.full((1, len(vectors)), -1)
    return _Group(vectors, np.append(costs, 0), np.append(values, drop), np.concatenate([picks, gone]))


def _frontier(costs: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers of the options that no other is as cheap and as good as; by cost, of equals the first."""
    order = np.lexsort((-values, costs))
    ordered = values[order]
    before = np.concatenate(([-np.inf], np.maximum.accumulate(ordered)[:-1]))
    return order[ordered > before]


def _spare(prices: Prices, ratio: float, rule: str, align: int, fixed: int, groups: Collection[_Group]) -> int:
    """What the budget leaves for the groups."""
    least = fixed + sum(int(group.costs.min()) for group in groups)
    limit = int(ratio * prices.dense)
    if limit < least:
        rule += f" at alignment {align}" * (align > 1)
        rule += " with every droppable site dropped" * any((g.picks < 0).any() for g in groups)
        raise UserError(
            f"budget {ratio:g} is too small: {rule} takes {ceil(1000 * least / prices.dense) / 1000:.3f} "
            f"of the dense {prices.what}"
        )
    return limit - fixed


def _fill(picks: Mapping[tuple[str, str], tuple[_Vector, int]], spare: int) -> dict[tuple[str, str], int]:
    """Kept count of each vector after whatever still fits was bought: units of no importance, the others are chosen."""
    chosen = {name: pick for name, (_, pick) in picks.items()}
    while True:
        offers = []
        for i, (name, (v, _)) in enumerate(picks.items()):
            if (k := chosen[name]) + 1 < len(v.counts) and (price := int(v.costs[k + 1] - v.costs[k])) <= spare:
                offers.append((v.counts[k] / v.width.units, i, name, price))
        if not offers:
            return {name: int(v.counts[chosen[name]]) for name, (v, _) in picks.items()}
        _, _, name, price = min(offers)
        chosen[name] += 1
        spare -= price
