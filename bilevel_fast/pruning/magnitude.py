"""Keep the units with the largest weights: group L2 magnitude, and one exact knapsack over all width vectors.

    importance   I_u = sum of the squared weights that unit u is cut from            (DepGraph, arXiv:2301.12900)
    kept share   p_v = sum of I_u over the kept units of width vector v / sum of I_u over all its units
    objective    max  sum_v log p_v  within the budget, each vector keeping `min_keep`

Norms cannot be compared across width vectors, they follow from fan-in and initialisation; shares can. Their product is
what survives of a signal that passes through all vectors in turn. The plain sum of shares would be at its best where
a few expensive vectors are stripped to `min_keep` and all others stay whole: the first units of a vector must count for
more than the last. Taking one unit at a time, the log ranks them as LAMP does weights (arXiv:2010.07611).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.budget import Budget, Calibration, Choice, choices
from bilevel_fast.pruning.planner import spend


def magnitude(teacher: UNet, budget: Budget, calibration: Calibration = ()) -> Structure:
    """The structure within the budget with the largest product of kept shares; no site is dropped.

    Raises:
        UserError: The budget is below what `min_keep` takes, or a weight of the teacher is not finite.
    """
    state, importance = teacher.state_dict(), dict[str, dict[str, Tensor]]()
    for c in choices(teacher.config, budget)[0]:
        importance.setdefault(c.site.name, {})[c.width.name] = unit_importance(c, state)
    return spend(teacher.config, budget, importance)


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
        weight = state[name].unflatten(cut.axis, (cut.copies, choice.width.units, choice.width.unit_size))
        # unit by unit: a whole tensor in fp64, and its squares, would be four times what it is
        total += torch.stack([unit.double().square().sum() for unit in weight.unbind(cut.axis + 1)]).cpu()
        if not total.isfinite().all():
            raise UserError(f"teacher: {name} holds numbers that are not finite")
    return total
