"""The operations of the UNet and its losses that have more than one implementation: called by name from here only.

`providers.choose` picks one per call; each op says which providers can take its inputs. The torch branch is the
definition, the others agree with it.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel_kernels as triton_ops
from bilevel_fast.native import GroupNorm
from bilevel_fast.providers import choose

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, padding: int = 0, time: Tensor | None = None) -> Tensor:
    """SiLU(GroupNorm(x + time)) over the real channels of x; `padding` zero channels are passed on as zeros.

    Args:
        x: (B, C + padding, H, W). Statistics are taken over the first C = norm.num_channels channels.
        norm: Groups, affine parameters and epsilon.
        padding: Channels at the end that only align the storage.
        time: (B, C + padding), added to every pixel before the norm.
    """
    return _group_norm(x, norm, padding, time, silu=True)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of x (B, C, H, W); as `group_norm_silu` without the SiLU."""
    return _group_norm(x, norm, padding=0, time=None, silu=False)


def _group_norm(x: Tensor, norm: nn.GroupNorm, padding: int, time: Tensor | None, silu: bool) -> Tensor:
    provider = choose("group_norm_silu", x, *_group_norm_providers(x, norm))
    if provider == "triton":
        return triton_ops.group_norm_silu(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, time=time, padding=padding, silu=silu
        )
    if time is not None:
        x = x + time[:, :, None, None]
    if provider == "native":
        return native_group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, padding, silu)[0]
    y = norm(x[:, : norm.num_channels] if padding else x)
    return F.pad(F.silu(y) if silu else y, (0, 0, 0, 0, 0, padding)) if padding else F.silu(y) if silu else y


def _group_norm_providers(x: Tensor, norm: nn.GroupNorm) -> list[str]:
    if x.dim() != 4 or not x.numel() or not norm.affine or not x.is_contiguous(memory_format=torch.channels_last):
        return []
    able = []
    if x.device.type == "cpu" and all(t.dtype == torch.float32 for t in (x, norm.weight, norm.bias)):
        able.append("native")
    if _triton_runs(x):
        able.append("triton")
    return able


def _triton_runs(x: Tensor) -> bool:
    """On a GPU; on the CPU in Triton's interpreter only, which tests turn on."""
    return x.dtype in _FLOATS and (x.is_cuda or (x.device.type == "cpu" and triton_ops.INTERPRETED))


@torch.library.custom_op("bilevel_fast::native_group_norm", mutates_args=(), device_types="cpu")
def native_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, padding: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`native.GroupNorm.forward` as an operator that tracers and `torch.compile` know: (out, mean, rstd)."""
    return GroupNorm(groups, eps, padding, silu).forward(x, weight, bias)


@torch.library.custom_op("bilevel_fast::native_group_norm_backward", mutates_args=(), device_types="cpu")
def _native_group_norm_backward(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    padding: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dout = dout.contiguous(memory_format=torch.channels_last)
    return GroupNorm(groups, eps, padding, silu).backward(dout, x, mean, rstd, weight, bias)


@native_group_norm.register_fake
def _(x, weight, bias, groups, eps, padding, silu):
    statistics = (x.new_empty(x.shape[0], groups) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), *statistics


@_native_group_norm_backward.register_fake
def _(dout, x, mean, rstd, weight, bias, groups, eps, padding, silu):
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), torch.empty_like(bias)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.settings = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _backward(ctx, dout, _dmean, _drstd):
    return *_native_group_norm_backward(dout, *ctx.saved_tensors, *ctx.settings), None, None, None, None


native_group_norm.register_autograd(_backward, setup_context=_setup)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, head by head.

    Args:
        q: (B, T, heads * head_dim).
        k, v: (B, S, heads * head_dim).

    Returns:
        (B, T, heads * head_dim).
    """
    able = [name for name, can in (("triton", _triton_runs(q)), ("xformers", q.is_cuda and _has_xformers())) if can]
    provider = choose("pruned_attention", q, *able)
    if provider == "triton":
        return triton_ops.pruned_attention(q, k, v, heads)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    if provider == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v).flatten(-2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(-2)


@cache
def _has_xformers() -> bool:
    """Whether its extension was built for this torch: without it the package imports, and every call fails."""
    try:
        from xformers.ops import memory_efficient_attention  # noqa: F401
        from xformers.ops.fmha import cutlass

        return cutlass.FwOp.is_available()
    except (ImportError, OSError, AttributeError):
        return False


def geglu(x: Tensor, proj: nn.Linear) -> Tensor:
    """The first half of proj(x) times the exact GELU of the second: (..., C) -> (..., F) (arXiv:2002.05202)."""
    able = ["triton"] if _triton_runs(x) else []
    if choose("geglu", x, *able) == "triton":
        return triton_ops.geglu(F.linear(x, proj.weight), proj.bias)
    value, gate = proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate)
