"""A linear layer, the sum with what it bypasses and the LayerNorm behind it, in the epilogue of the product.

    h    = r + x W^T + bias                    r: what the layer bypasses, or none
    y    = weight * (h - mean) * rstd + bias   over the N channels of a row, as `layer_norm`
    d    = the gradient that h has of both, as `layer_norm` makes it
    dr = d        dx = d W        dW = d^T x        dbias = sum of d over rows

Why fused  a program computes whole rows, so it has all that a norm asks: apart, h is read again for it. Paid with a
           matrix product of Triton's instead of cuBLAS's

Shapes     x: (..., K), W: (N, K), bias: (N,), r: (..., N) or none, weight, norm_bias: (N,) -> h, y: (..., N). N up to
           640 is a power of two, or the sum of two from 16 on: 320 is 256 + 64, two tiles without waste
Dtypes     x, W and r: fp32 | fp16 | bf16, the same; bias, weight, norm_bias: that or fp32; arithmetic in fp32
Layout     contiguous; anything else is refused
Numerics   the norm is of h as it is stored, its variance from centred squares. One order of sums: the same bits always
Traffic    R rows: forward reads R K, R N of r and the weights, and writes 2 R N; backward is that of `layer_norm` and
           two products
Source     arXiv:1607.06450
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.dot import dot, precision
from bilevel_kernels.layer_norm import layer_norm_bwd, layer_norm_ref

KIND = "linear"
WIDEST = 640


# --- reference ------------------------------------------------------------------------------


def linear_norm_ref(
    x: Tensor, w: Tensor, bias: Tensor, r: Tensor | None, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The formula, in the dtype of x: the oracle of the tests and the `torch` backend."""
    h = F.linear(x, w, bias.to(x.dtype))
    return layer_norm_ref(h if r is None else r + h, weight, norm_bias, eps)


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _stored_sum(acc, bias_ptr, r_ptr, h_ptr, row, channel, mask, N: tl.constexpr):
    """acc + bias + r, written to h, as h holds it."""
    at = row[:, None] * N + channel[None, :]
    acc += tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    if r_ptr is not None:
        acc += tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
    rounded = acc.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + at, rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit
def _store_norm(d, rstd, weight_ptr, norm_bias_ptr, y_ptr, row, channel, mask, N: tl.constexpr):
    gain, shift = tl.load(weight_ptr + channel).to(tl.float32), tl.load(norm_bias_ptr + channel).to(tl.float32)
    y = d * rstd[:, None] * gain[None, :] + shift[None, :]
    tl.store(y_ptr + row[:, None] * N + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_norm_kernel(
    x_ptr,  # (R, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N,)
    r_ptr,  # (R, N) or None
    weight_ptr,  # (N,)
    norm_bias_ptr,  # (N,)
    h_ptr,  # (R, N)
    y_ptr,  # (R, N)
    mean_ptr,  # (R,) fp32
    rstd_ptr,  # (R,) fp32
    R,
    eps,
    K: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,  # N is N1 + N2
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N: tl.constexpr = N1 + N2
    row, k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    one = tl.arange(0, N1)
    h = tl.zeros([BLOCK_M, N1], tl.float32)
    if N2 > 0:
        two = N1 + tl.arange(0, N2)
        h2 = tl.zeros([BLOCK_M, N2], tl.float32)
    for start in range(0, K, BLOCK_K):
        there = start + k < K
        at = x_ptr + row[:, None] * K + (start + k)[None, :]
        x = tl.load(at, mask=(row < R)[:, None] & there[None, :], other=0.0)
        w_at = w_ptr + (start + k)[:, None]
        h = dot(x, tl.load(w_at + one[None, :] * K, mask=there[:, None], other=0.0), h, PRECISION)
        if N2 > 0:
            h2 = dot(x, tl.load(w_at + two[None, :] * K, mask=there[:, None], other=0.0), h2, PRECISION)
    mask = (row < R)[:, None]
    h = _stored_sum(h, bias_ptr, r_ptr, h_ptr, row, one, mask, N)
    total = tl.sum(h, axis=1)
    if N2 > 0:
        h2 = _stored_sum(h2, bias_ptr, r_ptr, h_ptr, row, two, mask, N)
        total += tl.sum(h2, axis=1)
    mean = total / N
    h -= mean[:, None]
    squares = tl.sum(h * h, axis=1)
    if N2 > 0:
        h2 -= mean[:, None]
        squares += tl.sum(h2 * h2, axis=1)
    rstd = 1.0 / tl.sqrt(squares / N + eps)
    _store_norm(h, rstd, weight_ptr, norm_bias_ptr, y_ptr, row, one, mask, N)
    if N2 > 0:
        _store_norm(h2, rstd, weight_ptr, norm_bias_ptr, y_ptr, row, two, mask, N)
    tl.store(mean_ptr + row, mean, mask=row < R)
    tl.store(rstd_ptr + row, rstd, mask=row < R)


# --- launchers ------------------------------------------------------------------------------


def tiles(channels: int) -> tuple[int, int] | None:
    """The two powers of two that a row is made of, the second 0 where one is enough; None if it is not."""
    first = 1 << (channels.bit_length() - 1)
    rest = channels - first
    if not 16 <= channels <= WIDEST or rest & (rest - 1) or 0 < rest < 16:
        return None
    return first, rest


def config(channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of rows by channels of x. 64 rows would be read half as often from L2; they spill on sm_80 and sm_86. Of
    the widest rows 32 channels at a time spill on sm_100 and sm_120, as triton 3.8 compiles them."""
    if dtype == torch.float32:  # ieee fp32 products run on the CUDA cores, in registers
        return {"BLOCK_M": 16, "BLOCK_K": 16, "num_warps": 16, "num_stages": 1}
    if channels <= 320:
        return {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 32, "BLOCK_K": 16, "num_warps": 16, "num_stages": 3}


@torch.library.custom_op("bilevel_kernels::linear_norm_fwd", mutates_args=())
def linear_norm_fwd(
    x: Tensor, w: Tensor, bias: Tensor, r: Tensor | None, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h, y, mean, rstd) of rows x (R, K)."""
    (R, K), N = x.shape, w.shape[0]
    h, y = (torch.empty(R, N, dtype=x.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty(R, dtype=torch.float32, device=x.device) for _ in range(2))
    options, parts = config(N, x.dtype), tiles(N)
    assert parts is not None
    _linear_norm_kernel[(triton.cdiv(R, options["BLOCK_M"]),)](
        x, w, bias, r, weight, norm_bias, h, y, mean, rstd, R, eps,
        K=K, N1=parts[0], N2=parts[1], PRECISION=precision(x.dtype), **options,
    )  # fmt: skip
    return h, y, mean, rstd


# --- autograd -------------------------------------------------------------------------------


@linear_norm_fwd.register_fake
def _(x, w, bias, r, weight, norm_bias, eps):
    rows = x.new_empty(len(x), dtype=torch.float32)
    return x.new_empty(len(x), len(w)), x.new_empty(len(x), len(w)), rows, torch.empty_like(rows)


def _setup(ctx, inputs, output):
    x, w, bias, _, weight, norm_bias, _ = inputs
    h, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, bias, h, weight, norm_bias, mean, rstd)


def _backward(ctx, dh, dy, _dmean, _drstd):
    x, w, bias, h, weight, norm_bias, mean, rstd = ctx.saved_tensors
    needs_x, needs_w, needs_bias, needs_r, *_ = ctx.needs_input_grad
    dh = None if dh is None else dh.contiguous()
    dy = torch.zeros_like(h) if dy is None else dy.contiguous()
    d, dweight, dnorm_bias, dbias = layer_norm_bwd(
        dy, dh, h, weight, norm_bias, bias if needs_bias else None, mean, rstd
    )
    dx = d @ w if needs_x else None
    dw = d.mT @ x if needs_w else None
    return dx, dw, dbias if needs_bias else None, d if needs_r else None, dweight, dnorm_bias, None


linear_norm_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


def linear_norm(
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    r: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum r + x w^T + bias, and its LayerNorm.

    Args:
        x: (..., K).
        w: (N, K), in the dtype of x.
        bias: (N,), in the dtype of x or fp32.
        r: (..., N), what the layer bypasses, in the dtype of x; nothing is added if None.
        weight, norm_bias: (N,), of the LayerNorm, in the dtype of x or fp32.
        eps: Added to the variance.

    Returns:
        Two of (..., N) in the dtype of x: the sum and its norm, whose gradients backward takes in one pass.

    Raises:
        ValueError: A shape, dtype, device or layout is another one.
    """
    if x.dim() < 2 or not x.numel():
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., K) and at least one element")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, expected float32, float16 or bfloat16")
    K, N = x.shape[-1], len(w)
    if tiles(N) is None:
        raise ValueError(f"w: {N} rows, expected 16 to {WIDEST}, a power of two or the sum of two from 16 on")
    out = (*x.shape[:-1], N)
    given = {"x": (x, x.shape), "w": (w, (N, K)), "bias": (bias, (N,)), "r": (r, out)}
    for name, (t, shape) in (given | {"weight": (weight, (N,)), "norm_bias": (norm_bias, (N,))}).items():
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {tuple(shape)}")
        wide = name in ("bias", "weight", "norm_bias")
        if t.dtype != x.dtype and not (wide and t.dtype == torch.float32):
            raise ValueError(f"{name}: {t.dtype}, expected {x.dtype}{' or float32' if wide else ''}")
        if t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, x is on {x.device}")
        if not t.is_contiguous():
            raise ValueError(f"{name}: strides {t.stride()} of shape {tuple(t.shape)} are not contiguous")
    rows = None if r is None else r.reshape(-1, N)
    h, y = linear_norm_fwd(x.reshape(-1, K), w, bias, rows, weight, norm_bias, eps)[:2]
    return h.reshape(out), y.reshape(out)


def linear_norm_bytes(rows: int, channels: int, width: int, itemsize: int, r: bool) -> int:
    """Least bytes moved forward: x, the weights and r are read, h and y are written."""
    return (rows * channels + width * channels + (3 if r else 2) * rows * width) * itemsize


def linear_norm_flops(rows: int, channels: int, width: int) -> int:
    """2 per multiply-add."""
    return 2 * rows * channels * width


def operator_flops(_: str, given: dict, __: tuple[Tensor, ...]) -> int:
    """Of one call of the operator."""
    return linear_norm_flops(*given["x"].shape, len(given["w"]))
