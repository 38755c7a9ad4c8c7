"""The budget planner of `csrc/planner.hpp`: exact multiple-choice knapsack, costs of any number of digits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bilevel_fast.base.errors import UserError
from bilevel_fast.ops.native import _C

LENGTHS = (2**8, 2**12, 2**15, 2**18)
"""States that a list may have, one try after the other. SD 2.1 takes the first two or three."""
MAX_STATES = 2**25
"""In the lists of all groups together, 8 bytes each: with more than 128 groups, the last tries are shorter."""


class Plan(NamedTuple):
    """One option per group, what they are worth and cost together, and by how much the best plan can be better."""

    choice: tuple[int, ...]
    value: float
    cost: int
    gap: float
    """0 if the plan is proven optimal, which only an instance made to be hard prevents."""


def plan(costs: Sequence[ArrayLike], values: Sequence[ArrayLike], budget: int) -> Plan:
    """Choose one option of every group: the highest total value whose total cost fits the budget. Deterministic.

    Optimal to 2e-11 of what the best plan is worth more than the cheapest one. Where value per cost is nearly the same
    everywhere, the longest lists may fail to prove that: then `gap` is positive. Other threads run meanwhile.

    Args:
        costs: Per group, the cost of each option in whole units, any sign; (options,) of any integer dtype. The sum of
            all groups' largest absolute ones stays below 2**62.
        values: Per group, the value of each option, finite; (options,), taken as fp64. Any sign and unit.
        budget: Units that the chosen options may cost together.

    Raises:
        UserError: Even the cheapest plan exceeds the budget, or groups are not as above; the first bad one is named.
    """
    if len(costs) != len(values):
        raise UserError(f"plan: {len(costs)} groups of costs, {len(values)} of values; wanted one of each per group")
    groups = [_group(g, c, v) for g, (c, v) in enumerate(zip(costs, values, strict=True))]
    least, most = sum(int(c.min()) for c, _ in groups), sum(int(c.max()) for c, _ in groups)
    largest = sum(max(abs(int(c.min())), abs(int(c.max()))) for c, _ in groups)
    if largest >= 2**62:
        raise UserError(f"plan: costs sum up to {largest}, wanted less than 2**62")
    if not math.isfinite(2.0 * sum(float(np.abs(v).max()) for _, v in groups)):
        raise UserError("plan: the values are too large to be added up in fp64")
    if least > budget:
        raise UserError(f"budget of {budget} units is too small: the cheapest plan costs {least}")
    longest = MAX_STATES // max(len(groups), 1)
    lengths = sorted({max(min(length, longest), 1) for length in LENGTHS})
    choice, value, cost, gap = _C.plan([c for c, _ in groups], [v for _, v in groups], min(budget, most), lengths)
    return Plan(tuple(choice), value, cost, gap)


def _group(number: int, costs: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    c, v, where = np.asarray(costs), np.asarray(values, dtype=np.float64), f"plan: group {number}"
    if c.ndim != 1 or c.shape != v.shape:
        raise UserError(f"{where} has costs of shape {c.shape} and values of shape {v.shape}, wanted (options,) twice")
    if not c.size:
        raise UserError(f"{where} has no options, wanted at least one")
    if not np.issubdtype(c.dtype, np.integer):
        raise UserError(f"{where} has costs in {c.dtype}, wanted whole units")
    if not np.isfinite(v).all():
        raise UserError(f"{where} has a value that is not finite")
    return c, v
