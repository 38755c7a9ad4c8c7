"""A world small enough for exact comparisons: two UNets, batches as functions of their number, both levels."""

import dataclasses
from functools import partial

import torch

from bilevel_fast.data.batch import LEVEL_STRIDE, Batch
from bilevel_fast.erasing.targets import Guidance
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.training.levels import Level
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Suppression

TINY = dataclasses.replace(
    MINI, in_channels=4, out_channels=4, block_out_channels=(16, 32), num_heads=(1, 2), norm_num_groups=8,
    cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
"""Every kind of block, once."""
B, SHAPE, SEED, LR_LOWER, LR_UPPER, WARMUP, ETA = 3, (4, 8, 8), 7, 0.02, 0.05, 4, 1.0


class Descent(AdamW):
    """The plain rule: errors stay as small as they are."""

    def step(self, lr, skip, clip):
        gradient = self.flat.gradient if clip is None else self.flat.gradient * clip
        self.flat.master.addcmul_(gradient, -lr * (1 - skip))


def make_batch(level: int, step: int) -> Batch:
    index = torch.arange(step * B, (step + 1) * B) + level * LEVEL_STRIDE
    text = normal(1, Stream.CAPTION, index, (5, 16))
    return Batch(normal(2, Stream.VIEW, index, SHAPE), text, normal(3, Stream.CAPTION, index, (5, 16)), index)


def make_models() -> tuple[UNet, UNet]:
    """A teacher and its pruned student."""
    torch.manual_seed(0)
    teacher, structure = UNet(TINY), Structure.uniform(TINY, 0.6, ["up_blocks.1.attentions.1"])
    student = UNet(TINY, structure)
    student.load_state_dict(structure.slice(teacher.state_dict()))
    return teacher, student


def make_levels(
    teacher: UNet, student: UNet, penalty=1.0, norm="grad", make=AdamW, dtype=torch.float32, device="cpu", decay=None,
    eraser=None, micro=None, **upper,
) -> tuple[Level, Level]:  # fmt: skip
    flat = FlatParameters(student.to(device), dtype, average=decay is not None, summed=micro is not None)
    answers = Answers(Teacher(teacher.to(device, dtype)), Schedule.sd().to(device), SEED)
    fine_tuning = FineTuning(flat, answers, micro=micro)
    suppression = Suppression(fine_tuning, eraser or Guidance(ETA), penalty, norm, micro=micro, **upper)
    make = make if decay is None else partial(make, decay=decay)

    def batches(level: int):
        return lambda step: make_batch(level, step).drawn(SEED, 1000).map(lambda x: x.to(device))

    lower, second = (LevelOptimizer(flat, lr, WARMUP, make=make) for lr in (LR_LOWER, LR_UPPER))
    first = Level("lower", batches(0), fine_tuning, lower)
    return first, Level("upper", batches(1), suppression, second, eraser=suppression.eraser)
