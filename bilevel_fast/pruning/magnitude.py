"""Keep the units with the largest weights: group L2 magnitude, and one exact knapsack over all width vectors.

    importance   I_u = sum of the squared weights that unit u is cut from            (DepGraph, arXiv:2301.12900)
    kept share   p_v = sum of I_u over the kept units of width vector v / sum of I_u over all its units
    objective    max  sum_v log p_v  within the MACs, each vector keeping `min_keep`

Norms cannot be compared across width vectors, they follow from fan-in and initialisation; shares can. Their product is
what survives of a signal that passes through all vectors in turn. The plain sum of shares would be at its best where
a few expensive vectors are stripped to `min_keep` and all others stay whole: the first units of a vector must count for
more than the last. Taking one unit at a time, the log ranks them as LAMP does weights (arXiv:2010.07611).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel_fast.errors import UserError
from bilevel_fast.native import plan
from bilevel_fast.pruning.budget import Calibration, Choice, MacBudget, assemble, choices, fill
from bilevel_fast.structure import Structure
from bilevel_fast.unet import UNet

STEPS = 50_000
"""Into which the knapsack divides the spare MACs. Prices are rounded up to whole steps, which for the 70 vectors of
SD 2.1 can waste 0.14 % of the spare MACs; `fill` spends them."""


def magnitude(teacher: UNet, budget: MacBudget, calibration: Calibration = ()) -> Structure:
    """The structure within the budget with the largest product of kept shares.

    Raises:
        UserError: The budget is below what `min_keep` takes, or a weight of the teacher is not finite.
    """
    found, spare = choices(teacher.config, budget)
    state = teacher.state_dict()
    step = max(1, spare // STEPS)
    rankings, values, prices, ranks = [], [], [], []
    for c in found:
        importance, ranking = unit_importance(c, state).sort(descending=True, stable=True)
        log_share = (importance.cumsum(0) / importance.sum()).log()
        gain = log_share.diff(prepend=log_share.new_full((1,), -torch.inf))
        rankings.append(ranking.tolist())
        values.append(log_share[c.least - 1 :].tolist())
        prices.append([-(-extra * c.price // step) for extra in range(c.width.units - c.least + 1)])
        ranks.append((-gain / c.price).tolist())
    chosen = plan(prices, values, spare // step).choice
    counts = [c.least + extra for c, extra in zip(found, chosen, strict=True)]
    spent = sum(extra * c.price for c, extra in zip(found, chosen, strict=True))
    counts = fill(found, counts, spare - spent, ranks)
    return assemble(teacher.config, found, (r[:k] for r, k in zip(rankings, counts, strict=True)))


def unit_importance(choice: Choice, state: Mapping[str, Tensor]) -> Tensor:
    """Sum of the squared weights that each unit is cut from, over all tensors: (units,) fp64 on the CPU, positive.

    Args:
        choice: The width vector.
        state: State dict of the dense UNet.

    Raises:
        UserError: A weight is not finite.
    """
    total = torch.full((choice.width.units,), torch.finfo(torch.float64).tiny, dtype=torch.float64)
    for cut in choice.width.cuts:
        name = f"{choice.site.name}.{cut.tensor}"
        weight = state[name].double().movedim(cut.axis, 0)
        total += weight.reshape(cut.copies, choice.width.units, -1).square().sum(dim=(0, 2)).cpu()
        if not total.isfinite().all():
            raise UserError(f"teacher: {name} holds numbers that are not finite")
    return total
