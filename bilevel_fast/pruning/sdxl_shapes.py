"""Stable Diffusion XL in the shapes of the published models that were cut from it, with its own weights.

    koala-1b, koala-700m    arXiv:2312.04005    a ResNet and a Transformer less in every block, Transformers of 2 and of
                                                6 or 5 blocks; koala-700m has no mid block
    ssd-1b, vega            arXiv:2401.02677    all ResNets but the mid block's last, Transformers of 1 to 10 blocks,
                                                none in the mid block

`models.sdxl` has the shapes. Where a block keeps one ResNet-Transformer pair less, those stay that change the number of
channels, as in BK-SDM: the first pair of a down block, the first and the last of an up block. Of a Transformer the
first blocks stay. That is our choice: the published weights were trained for long after the cut and do not say.
"""

from collections.abc import Callable
from typing import Literal

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, UNetConfig, sites
from bilevel_fast.models.sdxl import KOALA_1B, KOALA_700M, SDXL, SSD_1B, VEGA
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.bk_sdm import within_budget
from bilevel_fast.pruning.budget import Budget, Calibration

_PLACES: tuple[tuple[Literal["down", "mid", "up"], int], ...] = (
    ("down", 1), ("down", 2), ("mid", 0), ("up", 0), ("up", 1),
)  # fmt: skip
"""The blocks that have Transformers."""

SHAPES = {"koala-1b": KOALA_1B, "koala-700m": KOALA_700M, "ssd-1b": SSD_1B, "vega": VEGA}
_SAID = {
    "koala-1b": "KOALA-1B keeps, 45 %",
    "koala-700m": "KOALA-700M keeps, 30 %",
    "ssd-1b": "SSD-1B keeps, 52 %",
    "vega": "Segmind-Vega keeps, 29 %",
}
"""What is published under that name."""


def shape(name: str) -> Callable[[UNet, Budget, Calibration], Structure]:
    """The pruning method of that name, one of `SHAPES`."""

    def cut(teacher: UNet, budget: Budget, calibration: Calibration = ()) -> Structure:
        return within_budget(budget, name, structure(teacher.config, name))

    said = f"{_SAID[name]} of its parameters"
    cut.__doc__ = f"""Keep of Stable Diffusion XL what {said}: the budget is a limit, not a goal.

    Raises:
        UserError: What is left exceeds the budget, or the UNet does not have the layers of Stable Diffusion XL.
    """
    return cut


def structure(config: UNetConfig, name: str) -> Structure:
    """The structure itself, whatever it costs.

    Args:
        config: A UNet with the layers of Stable Diffusion XL, of any width.
        name: One of `SHAPES`.

    Raises:
        UserError: It has other layers; the first difference is named.
    """
    _check(config, name)
    goes = _plan(config, SHAPES[name])
    return Structure.uniform(config, 1.0, [site.name for site in sites(config) if goes(site)])


def _check(config: UNetConfig, name: str) -> None:
    wanted = f"{name} is a shape of Stable Diffusion XL: wanted"
    if config.down_block_types != SDXL.down_block_types or config.up_block_types != SDXL.up_block_types:
        found = ", ".join(config.down_block_types)
        raise UserError(f"{wanted} down blocks {', '.join(SDXL.down_block_types)}, this UNet has {found}")
    for place, index in _PLACES:
        if place == "mid" and config.mid_block_type != SDXL.mid_block_type:
            raise UserError(f"{wanted} a mid block {SDXL.mid_block_type}, this UNet has {config.mid_block_type}")
        layers, found = SDXL.depths(place, index), config.depths(place, index)
        if found != layers:
            raise UserError(f"{wanted} Transformers of {layers} blocks in {place} block {index}, this UNet has {found}")
    if any(config.layers(level) != SDXL.layers(level) for level in range(3)):
        raise UserError(f"{wanted} {SDXL.layers_per_block} layers per block, this UNet has {config.layers_per_block}")


def _plan(config: UNetConfig, shape: UNetConfig) -> Callable[[Site], bool]:
    """Whether a site of `config` goes where `shape` is wanted."""

    def place(name: str) -> tuple[str, int, int]:
        """(down, mid or up; number of the block; number of the ResNet or Transformer)"""
        parts = name.split(".")
        which = parts[0].partition("_")[0]
        return which, 0 if which == "mid" else int(parts[1]), int(parts[2 if which == "mid" else 3])

    def position(which: str, index: int, number: int) -> int | None:
        """Where the pair `number` of a block is among those that stay."""
        if which == "mid":
            left = {None: 0, "UNetMidBlock2D": 1, "UNetMidBlock2DCrossAttn": 2}[shape.mid_block_type]
            return number if number < left else None
        level = index if which == "down" else len(config.block_out_channels) - 1 - index
        spare = config.layers(level) - shape.layers(level)
        end = config.layers(level) if which == "up" else 0  # an up block keeps its last
        if spare and number not in (0, end):
            return None
        return min(number, shape.layers(level)) if which == "up" else number

    def goes(site: Site) -> bool:
        which, index, number = place(site.within or site.name)
        at = position(which, index, number)
        if at is None or site.kind == "resnet":
            return at is None
        if which == "mid" and shape.mid_block_type != "UNetMidBlock2DCrossAttn":
            return True
        depth = shape.depths(which, index)[at]  # pyright: ignore[reportArgumentType]
        return site.kind == "transformer_block" and int(site.name.rpartition(".")[2]) >= depth

    return goes
