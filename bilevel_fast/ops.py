"""The operations of the UNet that have, or will have, more than one implementation: called by name from here only."""

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, padding: int = 0) -> Tensor:
    """SiLU(GroupNorm(x)) over the real channels of x; `padding` zero channels are passed on as zeros.

    Args:
        x: (B, C + padding, H, W). Statistics are taken over the first C = norm.num_channels channels.
        norm: Groups, affine parameters and epsilon.
        padding: Channels at the end that only align the storage.
    """
    if not padding:
        return F.silu(norm(x))
    return F.pad(F.silu(norm(x[:, : norm.num_channels])), (0, 0, 0, 0, 0, padding))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q: (B, N, T, head_dim).
        k, v: (B, N, S, head_dim).
    """
    return F.scaled_dot_product_attention(q, k, v)


def geglu(x: Tensor) -> Tensor:
    """(..., 2F) -> (..., F): the first half times the exact GELU of the second (arXiv:2002.05202)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
