"""The operations of the UNet that have, or will have, more than one implementation: called by name from here only.

`BILEVEL_FAST_OPS=torch` in the environment forces the torch implementation of all of them.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bilevel_fast.errors import UserError
from bilevel_fast.native import GroupNorm


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, padding: int = 0) -> Tensor:
    """SiLU(GroupNorm(x)) over the real channels of x; `padding` zero channels are passed on as zeros.

    Native code on CPU, where x is fp32 and channels_last, and not twice differentiable there; torch elsewhere.

    Args:
        x: (B, C + padding, H, W). Statistics are taken over the first C = norm.num_channels channels.
        norm: Groups, affine parameters and epsilon.
        padding: Channels at the end that only align the storage.
    """
    if _is_native(x, norm):
        native = GroupNorm(norm.num_groups, norm.eps, padding, silu=True)
        return _NativeGroupNorm.apply(x, norm.weight, norm.bias, native)
    if not padding:
        return F.silu(norm(x))
    return F.pad(F.silu(norm(x[:, : norm.num_channels])), (0, 0, 0, 0, 0, padding))


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of x (B, C, H, W); as `group_norm_silu` without the SiLU and without padding."""
    if _is_native(x, norm):
        native = GroupNorm(norm.num_groups, norm.eps, padding=0, silu=False)
        return _NativeGroupNorm.apply(x, norm.weight, norm.bias, native)
    return norm(x)


class _NativeGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, native: GroupNorm) -> Tensor:
        out, mean, rstd = native.forward(x, weight, bias)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.native = native
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dout = dout.contiguous(memory_format=torch.channels_last)
        return *ctx.native.backward(dout, *ctx.saved_tensors), None


def _is_native(x: Tensor, norm: nn.GroupNorm) -> bool:
    """Whether native code can take these: real fp32 memory in the order it reads, not a tracer's stand-in."""
    forced = os.environ.get("BILEVEL_FAST_OPS")
    if forced not in (None, "torch"):
        raise UserError(f"BILEVEL_FAST_OPS={forced} in the environment: the only choice is torch")
    return (
        forced is None
        and not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, nn.Parameter) for t in (x, norm.weight, norm.bias))  # None if not affine
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, norm.weight, norm.bias))
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


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
