"""What the tests of pruning methods share: a small teacher, something to try it on, and budgets for it."""

import dataclasses

import torch

from bilevel_fast.models.architecture import SD21
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.pruning import CalibrationSet, MacBudget
from mini_folder import TINY

LATENT, TEXT = 8, 12
DENSE = count(Structure.dense(TINY), LATENT, TEXT).true
TWO = dataclasses.replace(TINY, layers_per_block=2)
"""Two layers per block, as Stable Diffusion has: here BK-SDM finds something to drop."""


def make_teacher(seed: int = 0, config=TINY) -> UNet:
    torch.manual_seed(seed)
    return UNet(config)


def make_calibration(schedule: Schedule | None = None, seed: int = 0) -> CalibrationSet:
    """Two batches, of 3 and 2 samples."""
    batches = [
        (normal(5, Stream.VIEW, rows, (12, LATENT, LATENT)), normal(5, Stream.CAPTION, rows, (TEXT, 64)))
        for rows in ([0, 1, 2], [3, 4])
    ]
    return CalibrationSet(batches, schedule or Schedule.sd(), seed)


def budget(share: float, config=TINY) -> MacBudget:
    return MacBudget(share, *((LATENT, TEXT) if config != SD21 else (64, 77)))


def budget_without(*dropped: str, units: int = 0) -> MacBudget:
    """Exactly what is left when these sites go; `units` MACs less."""
    return budget((count(Structure.uniform(TINY, 1.0, dropped), LATENT, TEXT).true - units + 0.5) / DENSE)
