"""The feed-forward of a Transformer block with its residual connection: two linear layers, GEGLU and the sum.

    (v, g) = x W1^T + b1                                halves of 2F channels
    y  = r + (v g Phi(g)) W2^T + b2                     Phi: the normal distribution, phi its density
    da = dy W2      dv = da g Phi(g)      dg = da v (Phi(g) + g phi(g))      dx = (dv, dg) W1      dr = dy

Why fused  forward is `linear_geglu` and `linear_add`. Apart, the product that makes da writes F channels a row which
           the GEGLU's backward reads; here they stay in registers. That launch sums up both biases' gradients as well

Shapes     x: (..., C), w1: (2F, C), b1: (2F,), w2: (C, F), b2: (C,), r: (..., C) -> y: (..., C)
Dtypes     x, r and weights: fp32 | fp16 | bf16, the same; biases: any of them; arithmetic in fp32
Layout     contiguous; anything else is refused
Numerics   da is not rounded, dv and dg are; the biases' gradients are sums of blocks of rows, then over the blocks: no
           atomics, the same bits every run
Traffic    R rows: backward reads R C and 2 R F and writes 2 R F, and three products
Source     arXiv:2002.05202, eq. 6
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.dot import dot, precision
from bilevel_kernels.geglu import normal_cdf
from bilevel_kernels.linear_add import GROUP, linear_add_fwd, linear_add_ref, tile
from bilevel_kernels.linear_geglu import linear_geglu_fwd, linear_geglu_ref

KIND = "linear"


# --- reference ------------------------------------------------------------------------------


def feed_forward_ref(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, r: Tensor) -> Tensor:
    """The formula, in the dtype of its inputs: the oracle of the tests and the `torch` backend."""
    return linear_add_ref(linear_geglu_ref(x, w1, b1), w2, b2, r)


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _feed_forward_bwd_kernel(
    dy_ptr,  # (R, C)
    w2_ptr,  # (C, F)
    h_ptr,  # (R, 2F): x w1^T
    b1_ptr,  # (2F,)
    dh_ptr,  # (R, 2F)
    db1_ptr,  # (blocks of rows, 2F) fp32: sums of dh
    db2_ptr,  # (blocks of rows, C) fp32: sums of dy
    R,
    C: tl.constexpr,
    F: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    m, n = tile(R, F, BLOCK_M, BLOCK_N, GROUP)
    row = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel, k = n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        there = start + k < C
        at = dy_ptr + row[:, None] * C + (start + k)[None, :]
        dy = tl.load(at, mask=(row < R)[:, None] & there[None, :], other=0.0)
        w = tl.load(
            w2_ptr + (start + k)[:, None] * F + channel[None, :],
            mask=there[:, None] & (channel < F)[None, :],
            other=0.0,
        )
        da = dot(dy, w, da, PRECISION)
        if n == 0:  # of the programs that read these rows, one
            tl.store(db2_ptr + m * C + start + k, tl.sum(dy.to(tl.float32), axis=0), mask=there)
    mask = (row < R)[:, None] & (channel < F)[None, :]
    at = row[:, None] * (2 * F) + channel[None, :]
    v = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(h_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
    v += tl.load(b1_ptr + channel, mask=channel < F, other=0.0).to(tl.float32)[None, :]
    g += tl.load(b1_ptr + F + channel, mask=channel < F, other=0.0).to(tl.float32)[None, :]
    cdf = normal_cdf(g)
    pdf = tl.exp2(-0.72134752 * (g * g) - 1.32574806)  # log2(e) / 2 and log2(sqrt(2 pi))
    dv = da * (g * cdf)  # 0 past the last row, where da is
    dg = da * v * (cdf + g * pdf)
    tl.store(dh_ptr + at, dv.to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptr + at + F, dg.to(dh_ptr.dtype.element_ty), mask=mask)
    at = db1_ptr + m * (2 * F) + channel
    tl.store(at, tl.sum(dv, axis=0), mask=channel < F)
    tl.store(at + F, tl.sum(dg, axis=0), mask=channel < F)


# --- launchers ------------------------------------------------------------------------------


def config(dtype: torch.dtype) -> dict[str, int]:
    """Tiles of rows by channels of one half by channels of dy."""
    if dtype == torch.float32:  # ieee fp32 products run on the CUDA cores, in registers
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4}


@torch.library.custom_op("bilevel_kernels::feed_forward_bwd", mutates_args=())
def feed_forward_bwd(dy: Tensor, w2: Tensor, h: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, db1, db2) of dy (R, C). Of b2 only the dtype is asked."""
    (R, C), width = dy.shape, w2.shape[1]
    options = config(dy.dtype)
    blocks = triton.cdiv(R, options["BLOCK_M"])
    dh = torch.empty_like(h)
    db1, db2 = (torch.empty(blocks, n, dtype=torch.float32, device=dy.device) for n in (2 * width, C))
    grid = (blocks * triton.cdiv(width, options["BLOCK_N"]),)
    sizes = {"C": C, "F": width, "PRECISION": precision(dy.dtype), "GROUP": GROUP}
    _feed_forward_bwd_kernel[grid](dy, w2, h, b1, dh, db1, db2, R, **sizes, **options)
    return dh, db1.sum(0).to(b1.dtype), db2.sum(0).to(b2.dtype)


# --- autograd -------------------------------------------------------------------------------


@feed_forward_bwd.register_fake
def _(dy, w2, h, b1, b2):
    return torch.empty_like(h), torch.empty_like(b1), torch.empty_like(b2)


class _FeedForward(torch.autograd.Function):
    """Rows (R, C) all through: one backward for what are two operators forward."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, r):
        y, h = linear_geglu_fwd(x, w1, b1, True)
        ctx.save_for_backward(x, w1, b1, w2, b2, y, h)
        return linear_add_fwd(y, None, w2, b2, r)

    @staticmethod
    def backward(ctx, *upstream):
        x, w1, b1, w2, b2, y, h = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2, needs_r = ctx.needs_input_grad
        dy = upstream[0].contiguous()
        dh, db1, db2 = feed_forward_bwd(dy, w2, h, b1, b2)
        return (
            dh @ w1 if needs_x else None,
            dh.mT @ x if needs_w1 else None,
            db1 if needs_b1 else None,
            dy.mT @ y if needs_w2 else None,
            db2 if needs_b2 else None,
            dy if needs_r else None,
        )


# --- public ---------------------------------------------------------------------------------


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, r: Tensor) -> Tensor:
    """r + GEGLU(x w1^T + b1) w2^T + b2.

    Args:
        x: (..., C).
        w1: (2F, C), in the dtype of x; rows of values, then of gates.
        b1: (2F,), of any of the dtypes.
        w2: (C, F), in the dtype of x.
        b2: (C,), of any of the dtypes.
        r: (..., C), in the dtype of x.

    Returns:
        (..., C) in the dtype of x.

    Raises:
        ValueError: A shape, layout, dtype or device that does not fit.
    """
    if x.dim() < 2 or not x.numel():
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., C) and at least one element")
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if x.dtype not in floats:
        raise ValueError(f"x: {x.dtype}, expected float32, float16 or bfloat16")
    C = x.shape[-1]
    if w2.dim() != 2 or w2.shape[0] != C or not w2.shape[1]:
        raise ValueError(f"w2: shape {tuple(w2.shape)}, expected ({C}, F)")
    width = w2.shape[1]
    if 2 * width * C >= 2**31:
        raise ValueError(f"w1: shape {tuple(w1.shape)} has 2**31 elements or more")
    given = {"x": (x, x.shape), "w1": (w1, (2 * width, C)), "b1": (b1, (2 * width,)), "w2": (w2, (C, width))}
    for name, (t, shape) in (given | {"b2": (b2, (C,)), "r": (r, x.shape)}).items():
        if t.shape != shape:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {tuple(shape)}")
        allowed = floats if name in ("b1", "b2") else (x.dtype,)
        if t.dtype not in allowed:
            raise ValueError(f"{name}: {t.dtype}, expected {' or '.join(map(str, allowed))}")
        if t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, x is on {x.device}")
        if not t.is_contiguous():
            raise ValueError(f"{name}: strides {t.stride()} of shape {tuple(t.shape)} are not contiguous")
    rows, bypassed = x.reshape(-1, C), r.reshape(-1, C)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2, b2, r)):
        out = _FeedForward.apply(rows, w1, b1, w2, b2, bypassed)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        out = linear_add_fwd(linear_geglu_fwd(rows, w1, b1, False)[0], None, w2, b2, bypassed)
    return out.reshape(x.shape)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def feed_forward_bytes(rows: int, channels: int, width: int, itemsize: int) -> int:
    """Least bytes moved by the operator of backward: dy, w2 and h are read, dh is written."""
    return (rows * channels + channels * width + 4 * rows * width) * itemsize


def feed_forward_flops(rows: int, channels: int, width: int) -> int:
    """2 per multiply-add, of the operator of backward: one product."""
    return 2 * rows * channels * width


def operator_flops(_: str, given: dict, out: tuple[Tensor, Tensor, Tensor]) -> int:
    """Of one call of the operator."""
    return feed_forward_flops(*given["dy"].shape, given["w2"].shape[1])
