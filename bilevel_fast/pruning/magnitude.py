"""Keep the units with the largest weights: group L2 magnitude, and one exact knapsack over all width vectors.

    importance   I_u = sum of the squared weights that go when unit u goes (DepGraph, arXiv:2301.12900)
    value        V_v(K) = sum_{u in K} I_u / sum_{all u of v} I_u
    keep         max sum_v V_v(K_v)  subject to the MACs, |K_v| >= min_keep

Squared norms cannot be compared across width vectors: their size follows from fan-in and initialisation. As shares,
every vector counts for one, whatever its size, and within it a unit counts for its part of the energy.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel_fast.native import plan
from bilevel_fast.pruning.budget import Calibration, Choice, MacBudget, assemble, choices, fill
from bilevel_fast.structure import Structure
from bilevel_fast.unet import UNet

STEPS = 50_000
"""Into which the knapsack divides the spare MACs. Prices are rounded up to steps: 0.1 % of the spare MACs at most for
SD 2.1's 70 vectors, and `fill` spends what the rounding left."""


def magnitude(teacher: UNet, budget: MacBudget, calibration: Calibration = ()) -> Structure:
    """The structure within the budget that keeps the most.

    Raises:
        UserError: The budget is below what `min_keep` takes.
    """
    found, spare = choices(teacher.config, budget)
    state = teacher.state_dict()
    step = max(1, spare // STEPS)
    rankings, gains, prices, values = [], [], [], []
    for c in found:
        importance, ranking = unit_importance(c, state).sort(descending=True, stable=True)
        share = importance / importance.sum()
        rankings.append(ranking.tolist())
        gains.append((-share / c.price).tolist())
        values.append(share.cumsum(0)[c.least - 1 :].tolist())
        prices.append([-(-extra * c.price // step) for extra in range(c.width.units - c.least + 1)])
    chosen = plan(prices, values, spare // step).choice
    counts = [c.least + extra for c, extra in zip(found, chosen, strict=True)]
    spent = sum(extra * c.price for c, extra in zip(found, chosen, strict=True))
    counts = fill(found, counts, spare - spent, gains)
    return assemble(teacher.config, found, (r[:k] for r, k in zip(rankings, counts, strict=True)))


def unit_importance(choice: Choice, state: Mapping[str, Tensor]) -> Tensor:
    """Sum of the squared weights that belong to each unit, over all tensors it is cut from: (units,) fp64, CPU.

    Args:
        choice: The width vector.
        state: State dict of the dense UNet.
    """
    total = torch.zeros(choice.width.units, dtype=torch.float64)
    for cut in choice.width.cuts:
        weight = state[f"{choice.site.name}.{cut.tensor}"].double().movedim(cut.axis, 0)
        total += weight.reshape(cut.copies, choice.width.units, -1).square().sum(dim=(0, 2)).cpu()
    return total
