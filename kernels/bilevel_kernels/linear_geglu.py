"""The linear layer of a GEGLU and the GEGLU in its epilogue: y is written, and x W^T only where backward will read it.

    h  = x W^T                                          (v, g) = h + bias, halves of 2F channels
    y  = v g Phi(g)                                     Phi: the normal distribution
    dh, dbias: those of `geglu`                         dx = dh W        dW = dh^T x

Why fused  apart, the product writes 2F channels a row and GEGLU reads them to write F: of 5F that move, here F without
           gradients and 3F with them. That is paid with a matrix product of Triton's instead of cuBLAS's

Shapes     x: (..., C), weight: (2F, C), bias: (2F,) or none -> y: (..., F)
Dtypes     x and weight: fp32 | fp16 | bf16, the same; bias: any of them; arithmetic in fp32; gradients as their inputs
Layout     contiguous; anything else is refused
Numerics   y of unrounded h; backward of h as it is stored. One order of sums: the same bits every run
Traffic    R rows: forward reads R C and 2F C and writes R F, with gradients 3 R F; backward as `geglu` and two products
Source     arXiv:2002.05202, eq. 6
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.dot import dot, precision
from bilevel_kernels.geglu import geglu_bwd, geglu_ref, normal_cdf

KIND = "linear"
GROUP = 8  # blocks of rows that go through the weights side by side: both stay in the L2 cache


# --- reference ------------------------------------------------------------------------------


def linear_geglu_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula, in the dtype of its inputs: the oracle of the tests and the `torch` backend."""
    return geglu_ref(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _linear_geglu_kernel(
    x_ptr,  # (R, C)
    weight_ptr,  # (2F, C)
    bias_ptr,  # (2F,) or None
    y_ptr,  # (R, F)
    h_ptr,  # (R, 2F), or None where nobody will read it
    R,
    C: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP blocks of rows and all blocks of channels, then the next rows
    pid = tl.program_id(0)
    each = GROUP * tl.cdiv(F, BLOCK_N)
    first = pid // each * GROUP
    height = tl.minimum(tl.cdiv(R, BLOCK_M) - first, GROUP)
    row = (first + pid % each % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel, k = pid % each // height * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x_at = x_ptr + row[:, None] * C + k[None, :]
    w_at = weight_ptr + channel[None, :] * C + k[:, None]
    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        there = start + k < C
        w_mask = there[:, None] & (channel < F)[None, :]
        x = tl.load(x_at + start, mask=(row < R)[:, None] & there[None, :], other=0.0)
        value = dot(x, tl.load(w_at + start, mask=w_mask, other=0.0), value, PRECISION)
        gate = dot(x, tl.load(w_at + F * C + start, mask=w_mask, other=0.0), gate, PRECISION)
    mask = (row < R)[:, None] & (channel < F)[None, :]
    if h_ptr is not None:
        at = h_ptr + row[:, None] * (2 * F) + channel[None, :]
        tl.store(at, value.to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(at + F, gate.to(h_ptr.dtype.element_ty), mask=mask)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + channel, mask=channel < F, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + F + channel, mask=channel < F, other=0.0).to(tl.float32)[None, :]
    y = value * (gate * normal_cdf(gate))
    tl.store(y_ptr + row[:, None] * F + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------


def config(dtype: torch.dtype) -> dict[str, int]:
    """Tiles of rows by channels of one half by channels of x."""
    if dtype == torch.float32:  # ieee fp32 products run on the CUDA cores, in registers
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4}


@torch.library.custom_op("bilevel_kernels::linear_geglu_fwd", mutates_args=())
def linear_geglu_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """(y, h) of x (R, C), h empty unless it is to be kept for backward."""
    (R, C), width = x.shape, weight.shape[0] // 2
    y = torch.empty(R, width, dtype=x.dtype, device=x.device)
    h = torch.empty(R, 2 * width, dtype=x.dtype, device=x.device) if keep else None
    options = config(x.dtype)
    grid = (triton.cdiv(R, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"]),)
    sizes = {"C": C, "F": width, "PRECISION": precision(x.dtype), "GROUP": GROUP}
    _linear_geglu_kernel[grid](x, weight, bias, y, h, R, **sizes, **options)
    return y, x.new_empty(0) if h is None else h


# --- autograd -------------------------------------------------------------------------------


@linear_geglu_fwd.register_fake
def _(x, weight, bias, keep):
    R, width = x.shape[0], weight.shape[0]
    return x.new_empty(R, width // 2), x.new_empty(R, width) if keep else x.new_empty(0)


def _setup(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or backward would be handed zeros the size of h
    ctx.save_for_backward(x, weight, bias, output[1])


def _backward(ctx, dy, _dh):
    x, weight, bias, h = ctx.saved_tensors
    dh, dbias = geglu_bwd(dy.contiguous()[None], h[None], bias, None)
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    dx = dh[0] @ weight if needs_x else None
    dweight = dh[0].mT @ x if needs_weight else None
    return dx, dweight, dbias if needs_bias else None, None


linear_geglu_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The first half of x weight^T + bias times the exact GELU of the second.

    Args:
        x: (..., C).
        weight: (2F, C), in the dtype of x; rows of values, then of gates.
        bias: (2F,), of any of the dtypes.

    Returns:
        (..., F) in the dtype of x.

    Raises:
        ValueError: A shape, layout, dtype or device that does not fit.
    """
    if x.dim() < 2 or not x.numel():
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., C) and at least one element")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, expected float32, float16 or bfloat16")
    C = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != C or not weight.shape[0] or weight.shape[0] % 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (2F, {C})")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: {weight.dtype}, expected {x.dtype}")
    if weight.numel() >= 2**31:
        raise ValueError(f"weight: shape {tuple(weight.shape)} has 2**31 elements or more")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}, expected ({len(weight)},)")
    if bias is not None and bias.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"bias: {bias.dtype}, expected float32, float16 or bfloat16")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, x is on {x.device}")
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name}: strides {t.stride()} of shape {tuple(t.shape)} are not contiguous")
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return linear_geglu_fwd(x.reshape(-1, C), weight, bias, keep)[0].reshape(*x.shape[:-1], len(weight) // 2)


def linear_geglu_bytes(rows: int, channels: int, width: int, itemsize: int, keep: bool) -> int:
    """Least bytes moved forward: x and the weights are read; y is written, and h where it is kept."""
    return (rows * channels + 2 * width * channels + rows * width * (3 if keep else 1)) * itemsize


def linear_geglu_flops(rows: int, channels: int, width: int) -> int:
    """2 per multiply-add."""
    return 2 * rows * channels * 2 * width


def operator_flops(_: str, given: dict, out: tuple[Tensor, Tensor]) -> int:
    """Of one call of the operator."""
    return linear_geglu_flops(*given["x"].shape, out[0].shape[1])
