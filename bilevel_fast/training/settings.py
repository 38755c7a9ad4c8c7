"""Settings of the losses; a module of its own, as a command line reads settings without torch."""

import math
from dataclasses import dataclass
from typing import Literal

from bilevel_fast.base.errors import UserError, in_range

MicroBatch = int | Literal["auto"]
"""Images of a batch that are computed at once; auto leaves it to the memory model (`runs.fitting`)."""


def check_micro_batch(level: str, micro: MicroBatch, batch: int) -> None:
    """Refuse a micro-batch of which a batch is no multiple.

    Raises:
        UserError: Names the flag, and the sizes that would do.
    """
    if micro == "auto":
        return
    flag = f"--{level}.micro-batch"
    in_range(flag, micro, ">= 1 or auto", micro >= 1)
    if batch % micro:
        sizes = ", ".join(str(size) for size in range(1, batch + 1) if batch % size == 0)
        raise UserError(f"{flag} is {micro}: wanted a divisor of --{level}.batch {batch} ({sizes})")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the fine-tuning loss. A term of weight 0 is not computed."""

    diffusion: float = 1.0
    """Against the true v, weighted by SNR."""
    output: float = 2.0
    """Against the teacher's output."""
    feature: float = 0.1
    """Against the teacher's block outputs."""
    self_attention: float = 0.0
    """Against the outputs of the teacher's self-attentions, of those that the student has kept (KOALA)."""
    layer: float = 0.0
    """Against the outputs of the teacher's ResNets and Transformers, of those that the student has kept (SSD-1B)."""

    guided: float = 0.0
    """Against the teacher's output under classifier-free guidance, of scales between 2 and 14 (SnapFusion); costs each
    network a second pass, without the prompt."""
    feature_by_norm: bool = False
    """Divide each block's part of `feature` by the root mean square of the teacher's block output (LAPTOP-Diff), so
    that no block outweighs the others."""

    def __post_init__(self) -> None:
        weights = (self.diffusion, self.output, self.feature, self.self_attention, self.layer, self.guided)
        if self.feature_by_norm and not self.feature:
            raise UserError("--lower.weights.feature-by-norm is given with --lower.weights.feature 0, which it divides")
        if not (all(0 <= w < math.inf for w in weights) and any(weights)):
            raise UserError(f"loss weights {weights} must not be negative or infinite, nor all zero")
