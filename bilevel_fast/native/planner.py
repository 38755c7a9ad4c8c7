"""The planner of `csrc/planner.hpp`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bilevel_fast import _C
from bilevel_fast.errors import UserError

MAX_OPTIONS = 2**16  # back-pointers are 16-bit
MAX_TABLE = 2**31  # bytes of back-pointers


class Plan(NamedTuple):
    """One option per group, with what they are worth and cost together."""

    choice: tuple[int, ...]
    value: float
    cost: int


def plan(costs: Sequence[ArrayLike], values: Sequence[ArrayLike], budget: int) -> Plan:
    """Choose one option of every group: the highest total value whose total cost fits the budget.

    Exact: multiple-choice knapsack by dynamic programming (`csrc/planner.hpp`). Time grows with the number of
    options times the budget above the cheapest plan: scale costs so that the budget is some ten thousand
    units, rounding them up if the budget is a hard limit. Of plans of equal value the cheapest is returned.

    Args:
        costs: Per group, the cost of each option in whole units, >= 0.
        values: Per group, the value of each option, finite; any sign.
        budget: Units that the chosen options may cost together.

    Raises:
        UserError: Even the cheapest plan exceeds the budget.
    """
    assert len(costs) == len(values), f"{len(costs)} groups of costs, {len(values)} of values"
    cost_arrays = [np.asarray(c) for c in costs]
    value_arrays = [np.asarray(v, dtype=np.float64) for v in values]
    for g, (c, v) in enumerate(zip(cost_arrays, value_arrays, strict=True)):
        assert c.ndim == 1, f"group {g}: costs of shape {c.shape}"
        assert c.shape == v.shape, f"group {g}: costs {c.shape}, values {v.shape}"
        assert 1 <= c.size <= MAX_OPTIONS, f"group {g}: {c.size} options"
        assert np.issubdtype(c.dtype, np.integer), f"group {g}: costs are {c.dtype}, not whole units"
        assert c.min() >= 0, f"group {g}: a cost is negative"
        assert np.isfinite(v).all(), f"group {g}: a value is not finite"

    least = sum(int(c.min()) for c in cost_arrays)
    if least > budget:
        raise UserError(f"budget of {budget} units is too small: the cheapest plan costs {least}")
    # More than every group's dearest option buys nothing, and would only widen the table.
    budget = min(budget, sum(int(c.max()) for c in cost_arrays))
    table = 2 * len(cost_arrays) * (budget - least + 1)
    assert table <= MAX_TABLE, f"a table of {table} bytes: scale the costs down"

    choice, value, cost = _C.plan(cost_arrays, value_arrays, budget)
    return Plan(tuple(choice), value, cost)
