"""Keep units at random, the same share of every width vector: the floor that a criterion has to beat."""

from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, permutation
from bilevel_fast.pruning.budget import Budget, Calibration, assemble, choices
from bilevel_fast.pruning.calibration import FIRST, CalibrationSet
from bilevel_fast.pruning.uniform import uniform


def random(teacher: UNet, budget: Budget, calibration: Calibration = ()) -> Structure:
    """Keep random units, as many of each width vector as `uniform` keeps.

    The seed is that of the `CalibrationSet`, 0 without one; no batch of it is read. The i-th width vector keeps the
    first units of a random order of its own, so the units kept at a small budget are among those of a larger one.

    Raises:
        UserError: The budget is below what `min_keep` takes.
    """
    seed, counts = CalibrationSet.of(calibration).seed, uniform(teacher, budget)
    found, _ = choices(teacher.config, budget)
    kept = []
    for i, c in enumerate(found):
        order = permutation(seed, Stream.SHUFFLE, FIRST + i, c.width.units).tolist()
        kept.append(order[: counts.count(c.site, c.width)])
    return assemble(teacher.config, found, kept)
