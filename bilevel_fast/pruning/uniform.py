"""Keep the same share of every width vector."""

from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.budget import Budget, Calibration, assemble, choices, fill


def uniform(teacher: UNet, budget: Budget, calibration: Calibration = ()) -> Structure:
    """The largest uniform structure within the budget, filled up. The first units of each vector are kept.

    Units are bought in the order of k / w, for the k-th of the w units of a vector, and at equal k / w in the
    order of the architecture vector. Every `Structure.uniform` above `min_keep` is a beginning of that sequence,
    so with MACs the result contains the largest one that fits; what is left then buys the units that follow, while they
    fit.

    Raises:
        UserError: The budget is below what `min_keep` takes.
    """
    found, spare = choices(teacher.config, budget)
    shares = [[k / c.width.units for k in range(1, c.width.units + 1)] for c in found]
    counts = fill(found, [c.least for c in found], spare, shares)
    return assemble(teacher.config, found, map(range, counts))
