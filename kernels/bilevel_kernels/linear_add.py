"""A linear layer added to what it bypasses: the sum in the epilogue of the product.

    y  = r + x W^T + bias                               x: one tensor, or two one behind the other
    dr = dy        dx = dy W        dW = dy^T x         dbias = sum of dy over rows

Why fused  apart, the product writes y and the sum reads it, reads r and writes y again: of 4N that move a row beside x,
           here 2N. Two tensors x are not joined before, nor is r read and written for each. torch.addmm with r as
           its input copies r first. Paid with a matrix product of Triton's instead of cuBLAS's

Shapes     x: (..., C), x2: (..., C2) or none, weight: (N, C + C2), bias: (N,) or none, r: (..., N) -> y: (..., N)
Dtypes     x, x2, weight and r: fp32 | fp16 | bf16, the same; bias: any of them; arithmetic in fp32
Layout     contiguous; anything else is refused
Numerics   one rounding, of the whole sum. One order of sums: the same bits every run
Traffic    R rows: forward reads R (C + C2), R N and the weights, and writes R N; backward is two products
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.dot import dot, precision

KIND = "linear"
GROUP = 8  # blocks of rows that go through the weights side by side: both stay in the L2 cache


# --- reference ------------------------------------------------------------------------------


def linear_add_ref(x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, *, x2: Tensor | None = None) -> Tensor:
    """The formula, in the dtype of its inputs: the oracle of the tests and the `torch` backend."""
    x = x if x2 is None else torch.cat([x, x2], dim=-1)
    return r + F.linear(x, weight, None if bias is None else bias.to(x.dtype))


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def tile(R, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Block of rows and of channels of this program: GROUP blocks of rows and all of channels, then the next rows."""
    pid = tl.program_id(0)
    each = GROUP * tl.cdiv(N, BLOCK_N)
    first = pid // each * GROUP
    height = tl.minimum(tl.cdiv(R, BLOCK_M) - first, GROUP)
    return first + pid % each % height, pid % each // height


@triton.jit
def _linear_add_kernel(
    x_ptr,  # (R, C)
    x2_ptr,  # (R, C2) or None
    weight_ptr,  # (N, C + C2)
    bias_ptr,  # (N,) or None
    r_ptr,  # (R, N)
    y_ptr,  # (R, N)
    R,
    C: tl.constexpr,
    C2: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    m, n = tile(R, N, BLOCK_M, BLOCK_N, GROUP)
    row = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel, k = n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w_at = weight_ptr + channel[None, :] * (C + C2) + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        there = start + k < C
        x = tl.load(
            x_ptr + row[:, None] * C + (start + k)[None, :], mask=(row < R)[:, None] & there[None, :], other=0.0
        )
        w = tl.load(w_at + start, mask=there[:, None] & (channel < N)[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    if x2_ptr is not None:
        for start in range(0, C2, BLOCK_K):
            there = start + k < C2
            at = x2_ptr + row[:, None] * C2 + (start + k)[None, :]
            x2 = tl.load(at, mask=(row < R)[:, None] & there[None, :], other=0.0)
            w = tl.load(w_at + C + start, mask=there[:, None] & (channel < N)[None, :], other=0.0)
            acc = dot(x2, w, acc, PRECISION)
    mask = (row < R)[:, None] & (channel < N)[None, :]
    at = row[:, None] * N + channel[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=channel < N, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------


def config(channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of rows by channels of y by channels of x; none of 128 half empty, as the third of 320 would be."""
    if dtype == torch.float32:  # ieee fp32 products run on the CUDA cores, in registers
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    width = 64 if channels % 128 else 128
    return {"BLOCK_M": 128, "BLOCK_N": width, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4}


@torch.library.custom_op("bilevel_kernels::linear_add_fwd", mutates_args=())
def linear_add_fwd(x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None, r: Tensor) -> Tensor:
    """y (R, N) of x (R, C) and x2 (R, C2)."""
    (R, C), N = x.shape, weight.shape[0]
    y = torch.empty_like(r)
    options = config(N, x.dtype)
    grid = (triton.cdiv(R, options["BLOCK_M"]) * triton.cdiv(N, options["BLOCK_N"]),)
    sizes = {"C": C, "C2": weight.shape[1] - C, "N": N, "PRECISION": precision(x.dtype), "GROUP": GROUP}
    _linear_add_kernel[grid](x, x2, weight, bias, r, y, R, **sizes, **options)
    return y


# --- autograd -------------------------------------------------------------------------------


@linear_add_fwd.register_fake
def _(x, x2, weight, bias, r):
    return torch.empty_like(r)


def _setup(ctx, inputs, output):
    x, x2, weight, bias, _ = inputs
    ctx.save_for_backward(x, x2, weight)
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, x2, weight = ctx.saved_tensors
    needs_x, needs_x2, needs_weight, needs_bias, needs_r = ctx.needs_input_grad
    dy = dy.contiguous()
    widths = [t.shape[1] for t in (x, x2) if t is not None]
    dx = (dy @ weight).split(widths, dim=1) if needs_x or needs_x2 else (None, None)
    dweight = None
    if needs_weight:
        dweight = torch.empty_like(weight)
        for part, t in zip(dweight.split(widths, dim=1), (x, x2), strict=False):
            torch.mm(dy.mT, t, out=part)
    dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias) if needs_bias else None
    return (
        dx[0] if needs_x else None,
        dx[1] if needs_x2 else None,
        dweight,
        dbias,
        dy if needs_r else None,
    )


linear_add_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, *, x2: Tensor | None = None) -> Tensor:
    """r + x weight^T + bias.

    Args:
        x: (..., C).
        weight: (N, C), or (N, C + C2) with x2, in the dtype of x.
        bias: (N,), of any of the dtypes.
        r: (..., N), what the layer bypasses, in the dtype of x.
        x2: (..., C2), what follows the channels of x.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ValueError: A shape, layout, dtype or device that does not fit.
    """
    if x.dim() < 2 or not x.numel():
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., C) and at least one element")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, expected float32, float16 or bfloat16")
    before, C = x.shape[:-1], x.shape[-1] + (0 if x2 is None else x2.shape[-1])
    if weight.dim() != 2 or weight.shape[1] != C or not weight.shape[0]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (N, {C})")
    N = weight.shape[0]
    if weight.numel() >= 2**31:
        raise ValueError(f"weight: shape {tuple(weight.shape)} has 2**31 elements or more")
    for name, t, shape in (("x2", x2, (*before, C - x.shape[-1])), ("bias", bias, (N,)), ("r", r, (*before, N))):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {tuple(shape)}")
    for name, t in (("x", x), ("x2", x2), ("weight", weight), ("bias", bias), ("r", r)):
        if t is None:
            continue
        allowed = (torch.float32, torch.float16, torch.bfloat16) if name == "bias" else (x.dtype,)
        if t.dtype not in allowed:
            raise ValueError(f"{name}: {t.dtype}, expected {' or '.join(map(str, allowed))}")
        if t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, x is on {x.device}")
        if not t.is_contiguous():
            raise ValueError(f"{name}: strides {t.stride()} of shape {tuple(t.shape)} are not contiguous")
    rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, x2, r)]
    return linear_add_fwd(rows[0], rows[1], weight, bias, rows[2]).reshape(r.shape)


def linear_add_bytes(rows: int, channels: int, width: int, itemsize: int) -> int:
    """Least bytes moved forward: x, the weights and r are read, y is written."""
    return (rows * channels + width * channels + 2 * rows * width) * itemsize


def linear_add_flops(rows: int, channels: int, width: int) -> int:
    """2 per multiply-add."""
    return 2 * rows * channels * width


def operator_flops(_: str, given: dict, out: Tensor) -> int:
    """Of one call of the operator."""
    return linear_add_flops(len(out), given["weight"].shape[1], out.shape[1])
