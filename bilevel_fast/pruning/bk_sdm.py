"""BK-SDM (arXiv:2305.15798, section 3.1): a Stable Diffusion UNet with whole layers taken out by hand.

    base    one ResNet-Transformer pair per down block, the first, and two per up block, the first and the last
    small   base without the mid block
    tiny    small without the innermost level

Which pairs stay follows from the skip connections: the first pair of a down block and the first and last of an up block
are those that change the number of channels. On SD 1.4 these are BK-SDM, on SD 2.1 its "v2".

Base and small are structures: a dropped layer of a down block hands on what the one before it gave, so every ResNet
that stays reads the very skip connection it reads in BK-SDM's own UNet. Tiny is not: without the innermost level the
resamplers that lead there and back go too, and a structure never drops those.
"""

from math import ceil
from typing import Literal

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, UNetConfig, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.budget import Budget, Calibration

TINY = (
    "bk-sdm-tiny is a UNet of its own: it lacks the innermost level with its resamplers, which a structure cannot "
    "drop; bk-sdm-base and bk-sdm-small are there"
)
"""Why there is no such method."""


def bk_sdm_base(teacher: UNet, budget: Budget, calibration: Calibration = ()) -> Structure:
    """Drop the layers that BK-SDM-Base drops: the budget is a limit, not a goal.

    Raises:
        UserError: What is left exceeds the budget, or there is nothing to drop in this UNet.
    """
    return within_budget(budget, "bk-sdm-base", structure(teacher.config, "base"))


def bk_sdm_small(teacher: UNet, budget: Budget, calibration: Calibration = ()) -> Structure:
    """Drop the layers that BK-SDM-Small drops, the mid block among them: the budget is a limit, not a goal.

    Raises:
        UserError: What is left exceeds the budget, or there is nothing to drop in this UNet.
    """
    return within_budget(budget, "bk-sdm-small", structure(teacher.config, "small"))


def structure(config: UNetConfig, size: Literal["base", "small"]) -> Structure:
    """The structure itself, whatever it costs. Dense if no block has a layer to spare."""
    outer = [site for site in sites(config) if not site.within]
    return Structure.uniform(config, 1.0, [site.name for site in outer if _goes(config, site, size)])


def _goes(config: UNetConfig, site: Site, size: str) -> bool:
    if site.block == "mid_block":
        return size == "small"
    _, number, _, index = site.name.split(".")
    level = len(config.block_out_channels) - 1 - int(number)
    last = config.layers(level) if site.block.startswith("up_blocks") else 0
    return int(index) not in (0, last)


def within_budget(budget: Budget, name: str, found: Structure) -> Structure:
    """A structure that leaves no choice, if it is within the budget.

    Raises:
        UserError: It is not, or it drops nothing; `name` is that of the method.
    """
    if found.is_dense:
        raise UserError(f"{name} drops nothing of this UNet: {found.config.layers_per_block} layer per block, as it is")
    prices = budget.prices(found.config)
    ratio = prices.of(found) / prices.dense
    if ratio > budget.ratio:
        raise UserError(
            f"budget {budget.ratio:g} is too small: {name} takes {ceil(1e4 * ratio) / 1e4:.4f} of the dense "
            f"{prices.what}, no less"
        )
    return found
