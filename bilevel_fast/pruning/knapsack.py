"""Multiple-choice knapsack with costs of any size, exactly: one option of every group, the highest value in a budget.

`native.plan` fills a table as wide as the budget, so it wants small whole costs; MACs are eleven digits long, and
rounding them costs optimality. Here a list of states, (cost, value) of the groups decided so far, is carried from
group to group. A state stays if no other is as cheap and as good, and if its upper bound beats the best plan known:

    bound    value so far + linear relaxation of the groups to come, within the budget that is left

The relaxation is concave and piecewise linear in that budget: it buys steps of the groups' concave hulls, best value
per cost first. First the lists are cut to a few states of the highest bounds, for a good plan; then they are let grow
until nothing was cut that could have beaten it, which proves it. (Dyer, Kayal and Walker, "A branch and bound algorithm
for solving the multiple-choice knapsack problem", 1984; Pisinger, "A minimal algorithm for the multiple-choice
knapsack problem", 1995.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LENGTHS = (2**8, 2**12, 2**15, 2**18)
"""States that a list may have, one try after the other. SD 2.1 takes the first two or three."""
EPSILON = 1e-11
"""Relative: plans whose values differ by less are equally good."""


class Solution(NamedTuple):
    """One option per group, what they are worth and cost together, and by how much the best plan can be better."""

    choice: tuple[int, ...]
    value: float
    cost: int
    gap: float
    """0 if the plan is proven optimal, which only an instance made to be hard prevents."""


@dataclass(frozen=True)
class _Group:
    number: int  # in the order of the caller
    options: Ints  # the caller's numbers of the options below
    costs: Ints  # ascending
    values: Floats  # ascending
    hull: Ints  # numbers of the options on the concave hull, the first and the last among them

    @property
    def coarseness(self) -> int:
        return int(np.diff(self.costs[self.hull]).max(initial=0))


class _Relaxation(NamedTuple):
    """Upper bound for some groups together: `bought` is worth `worth`, linear in between."""

    bought: Floats
    worth: Floats

    def __call__(self, budget: Floats) -> Floats:
        return np.interp(budget, self.bought, self.worth, left=-np.inf)


def frontier(costs: Ints, values: Floats) -> Ints:
    """Numbers of the options that no other is as cheap and as good as; by cost, of equals the first."""
    order = np.lexsort((-values, costs))
    ordered = values[order]
    before = np.concatenate(([-np.inf], np.maximum.accumulate(ordered)[:-1]))
    return order[ordered > before]


def solve(costs: Sequence[Ints], values: Sequence[Floats], budget: int) -> Solution:
    """Choose one option of every group: the highest total value whose total cost fits the budget.

    Args:
        costs: Per group, the cost of each option, int64; the sum of all groups' dearest stays below 2**53.
        values: Per group, the value of each option, fp64, finite.
        budget: At least the sum of the cheapest options.
    """
    groups = sorted((_group(g, c, v) for g, (c, v) in enumerate(zip(costs, values, strict=True))), key=_rank)
    assert sum(int(g.costs[0]) for g in groups) <= budget, "the cheapest plan exceeds the budget"
    assert sum(int(g.costs[-1]) for g in groups) < 2**53, "costs are not exact in fp64"
    relaxations = _relaxations(groups)
    best, gap = _greedy(groups, budget), np.inf
    for length in LENGTHS:
        best, missed = _search(groups, relaxations, budget, best, length)
        gap = missed - _total(groups, best)[1]
        if gap <= _epsilon(groups, best):
            gap = 0.0
            break
    cost, value = _total(groups, best)
    choice = [0] * len(groups)
    for group, option in zip(groups, best, strict=True):
        choice[group.number] = int(group.options[option])
    return Solution(tuple(choice), value, cost, gap)


def _group(number: int, costs: Ints, values: Floats) -> _Group:
    assert np.isfinite(values).all(), f"group {number}: a value is not finite"
    options = frontier(costs, values)
    costs, values = costs[options], values[options]
    hull: list[int] = []
    for i in range(len(costs)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (values[b] - values[a]) * (costs[i] - costs[a]) > (values[i] - values[a]) * (costs[b] - costs[a]):
                break
            hull.pop()  # b is on or below the line from a to i
        hull.append(i)
    return _Group(number, options, costs, values, np.array(hull))


def _rank(group: _Group) -> tuple[int, int]:
    """Groups of large steps come first: the relaxation of the others, left to come, is then nearly their optimum."""
    return -group.coarseness, group.number


def _relaxations(groups: Sequence[_Group]) -> list[_Relaxation]:
    """At [i], that of groups i and later; at the end, of none."""
    steps = [
        (i, dc, dv)
        for i, g in enumerate(groups)
        for dc, dv in zip(np.diff(g.costs[g.hull]), np.diff(g.values[g.hull]), strict=True)
    ]
    steps.sort(key=lambda step: -step[2] / step[1])
    owner = np.array([i for i, _, _ in steps], dtype=np.int64)
    bought, worth = np.array([dc for _, dc, _ in steps], float), np.array([dv for _, _, dv in steps], float)
    found = []
    for i in range(len(groups) + 1):
        mine = owner >= i
        least = sum(int(g.costs[0]) for g in groups[i:]), sum(float(g.values[0]) for g in groups[i:])
        found.append(_Relaxation(*(np.cumsum([m, *s[mine]]) for m, s in zip(least, (bought, worth), strict=True))))
    return found


def _greedy(groups: Sequence[_Group], budget: int) -> list[int]:
    """Buy steps of the hulls, best value per cost first, until one does not fit its group's turn."""
    choice = [0] * len(groups)
    spare = budget - sum(int(g.costs[0]) for g in groups)
    steps = [
        (-(g.values[b] - g.values[a]) / (g.costs[b] - g.costs[a]), i, a, b)
        for i, g in enumerate(groups)
        for a, b in zip(g.hull[:-1], g.hull[1:], strict=True)
    ]
    for _, i, a, b in sorted(steps):
        price = int(groups[i].costs[b] - groups[i].costs[a])
        if choice[i] == a and price <= spare:
            choice[i] = int(b)
            spare -= price
    return choice


def _search(
    groups: Sequence[_Group], relaxations: Sequence[_Relaxation], budget: int, best: list[int], length: int
) -> tuple[list[int], float]:
    """The best plan that lists of `length` states find, `best` if none is better, and the highest bound cut off."""
    value = _total(groups, best)[1]
    enough, missed = value + _epsilon(groups, best), -np.inf
    cost_list, value_list, back = np.zeros(1, np.int64), np.zeros(1), []
    for i, group in enumerate(groups):
        after = relaxations[i + 1]
        costs = (cost_list[:, None] + group.costs).ravel()
        values = (value_list[:, None] + group.values).ravel()
        bounds = values + after((budget - costs).astype(float))
        kept = np.flatnonzero(bounds > enough)
        kept = kept[frontier(costs[kept], values[kept])]
        if len(kept) > length:
            order = np.argpartition(-bounds[kept], length)
            missed = max(missed, float(bounds[kept[order[length:]]].max()))
            kept = kept[np.sort(order[:length])]
        if not len(kept):
            return best, missed
        cost_list, value_list = costs[kept], values[kept]
        back.append((kept // len(group.costs), kept % len(group.costs)))
    state, found = len(value_list) - 1, []  # the dearest state of a frontier is the best
    for parents, options in reversed(back):
        found.append(int(options[state]))
        state = parents[state]
    return found[::-1], missed


def _total(groups: Sequence[_Group], choice: Sequence[int]) -> tuple[int, float]:
    taken = list(zip(groups, choice, strict=True))
    return sum(int(g.costs[o]) for g, o in taken), sum(float(g.values[o]) for g, o in taken)


def _epsilon(groups: Sequence[_Group], choice: Sequence[int]) -> float:
    return EPSILON * max(1.0, abs(_total(groups, choice)[1]))
