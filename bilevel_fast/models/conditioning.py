"""What a UNet of Stable Diffusion XL is told beside the states of a prompt, carried in the same tensor.

Such a UNet also reads the pooled state of the prompt and six numbers about the picture (SDXL, arXiv:2307.01952, 2.2).
They lie in further rows behind the L rows of states, filled up with zeros: whatever keeps, mixes, caches or sends a
text tensor needs no second one. Masks of tokens are false there. A model without them has no such rows.

Shape legend: B prompts, L text tokens, D width of the states, P width of the pooled state, R = ceil((P + 6) / D) rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = 6
"""Numbers about a picture, in pixels: original height and width, top and left of the crop, target height and width."""


@dataclass(frozen=True)
class Extra:
    """What `unpack` finds behind the states."""

    pooled: Tensor
    """(B, P), dtype of the text tensor."""
    sizes: Tensor
    """(B, 6), dtype of the text tensor."""


def extra_rows(width: int, pooled: int) -> int:
    """R for states of a width D and a pooled state of a width P; 0 if P is 0: the model reads no such thing."""
    return -(-(pooled + SIZES) // width) if pooled else 0


def pack(states: Tensor, pooled: Tensor, sizes: Tensor) -> Tensor:
    """(B, L + R, D) of states (B, L, D), pooled (B, P) and sizes (B, 6), in the dtype of the states."""
    batch, _, width = states.shape
    extra = torch.cat([pooled.to(states), sizes.to(states)], dim=1)
    rows = extra_rows(width, pooled.shape[1])
    extra = F.pad(extra, (0, rows * width - extra.shape[1]))
    return torch.cat([states, extra.reshape(batch, rows, width)], dim=1)


def unpack(text: Tensor, pooled: int) -> tuple[Tensor, Extra]:
    """States (B, L, D) and what lies behind them, as views of text (B, L + R, D); `pooled` is P > 0."""
    batch, length, width = text.shape
    rows = extra_rows(width, pooled)
    extra = text[:, length - rows :].reshape(batch, rows * width)
    return text[:, : length - rows], Extra(extra[:, :pooled], extra[:, pooled : pooled + SIZES])


def with_sizes(text: Tensor, pooled: int, sizes: Tensor) -> Tensor:
    """A copy of text (B, L + R, D) whose size numbers are `sizes` (B, 6)."""
    states, extra = unpack(text, pooled)
    return pack(states, extra.pooled, sizes)
