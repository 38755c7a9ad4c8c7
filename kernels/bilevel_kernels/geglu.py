"""GEGLU: the value half times the exact GELU of the gate half, with the bias of the linear before it and kept groups.

    (v, g) = x + bias                                   halves of 2F channels
    y  = v g Phi(g)                                     Phi: the normal distribution, phi its density
    dv = dy g Phi(g)        dg = dy v (Phi(g) + g phi(g))        dbias = sum over rows of (dv, dg)

Why fused  eager runs three kernels forward and five backward, the last reading dx again for dbias; here one launch each
           way and a small sum. `normal_cdf` takes half the instructions of erf, which on an A100 or H100 are about
           as dear as the memory traffic

Shapes     x: (B, T, 2F) or any (..., 2F), bias: (2F,) -> y: (..., F); groups not kept are zero in y, dx and dbias
Dtypes     fp32 | fp16 | bf16 each; arithmetic in fp32; y and dx in the dtype of x, dbias in that of bias
Layout     contiguous; anything else is refused
Numerics   Phi within 8e-9 and rounding (erf in fp32 is no closer); dbias is summed over row chunks, then over their
           sums: no atomics, the same bits every run. The chunks depend on the shape only
Traffic    with k of F channels kept: forward reads 2k and writes F a row; backward reads 3k and writes 2F
Source     arXiv:2002.05202, eq. 6 (exact GELU, erf); the polynomial is our own minimax fit
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.kept import Kept

KIND = "pointwise"
BLOCK = 256  # channels: a warp reads a row of them in one 16-byte load a lane
ROWS = 8
CHUNKS = (128, 64, 32, 16)  # rows a program goes through; the more, the fewer sums for dbias

# log2(1 - Phi(z)), z >= 0: minimax in the error of Phi on 0..6.5, exact at 0; falls ever faster beyond, as it should.
_C1 = tl.constexpr(-1.1511052)
_C2 = tl.constexpr(-0.4592082)
_C3 = tl.constexpr(-0.0524961798)
_C4 = tl.constexpr(0.00706342227)
_C5 = tl.constexpr(-0.000136938038)
_C6 = tl.constexpr(-0.000186179542)
_C7 = tl.constexpr(3.93775419e-05)
_C8 = tl.constexpr(-2.8349001e-06)


# --- reference ------------------------------------------------------------------------------


def geglu_ref(x: Tensor, bias: Tensor | None = None, kept: Kept | None = None) -> Tensor:
    """The formula, in the dtype of its inputs: the oracle of the tests and the `torch` backend."""
    value, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    y = value * F.gelu(gate)
    if kept is None:
        return y
    mask = kept.mask(y.shape[-1] // kept.units, y.shape[0] if kept.rows else 1, y.device)
    return y.masked_fill(~(mask[:, None] if kept.rows else mask[0]), 0.0)


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def normal_cdf(g):
    """Phi(g): eight multiply-adds and one exp2 instead of the two polynomials and the exp2 of erf."""
    z = tl.abs(g)
    p = _C8 * z + _C7
    p = p * z + _C6
    p = p * z + _C5
    p = p * z + _C4
    p = p * z + _C3
    p = p * z + _C2
    p = p * z + _C1
    upper = tl.exp2(p * z - 1.0)
    return tl.where(g > 0.0, 1.0 - upper, upper)


@triton.jit
def _kept_channels(kept_ptr, b, ch, F: tl.constexpr, UNITS: tl.constexpr, VEC: tl.constexpr):
    """(BLOCK,) bool: which channels are there and kept; the same for VEC neighbours."""
    mask = ch < F
    if kept_ptr is not None:
        kept = tl.load(kept_ptr + b * UNITS + ch // (F // UNITS), mask=mask, other=0)
        mask = tl.max_constancy(kept, [VEC]) != 0
    return mask


@triton.jit
def _load_halves(x_ptr, at, mask, F: tl.constexpr):
    v = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
    return v, g


@triton.jit
def _geglu_fwd_kernel(
    x_ptr,  # (B, T, 2F)
    bias_ptr,  # (2F,) or None
    kept_ptr,  # (1 | B, UNITS) uint8 or None
    y_ptr,  # (B, T, F)
    kept_stride,
    T,
    F: tl.constexpr,
    UNITS: tl.constexpr,
    VEC: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(T, CHUNK)
    b = pid // chunks
    ch = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = _kept_channels(kept_ptr, b * kept_stride, ch, F, UNITS, VEC)
    if bias_ptr is not None:
        bias_v, bias_g = _load_halves(bias_ptr, ch, kept, F)
    for start in range(0, CHUNK, ROWS):
        t = (pid % chunks) * CHUNK + start + tl.arange(0, ROWS)
        row = b * T + t
        v, g = _load_halves(x_ptr, row[:, None] * (2 * F) + ch[None, :], (t < T)[:, None] & kept[None, :], F)
        if bias_ptr is not None:
            v += bias_v[None, :]
            g += bias_g[None, :]
        y = v * (g * normal_cdf(g))  # 0 in channels that are not kept
        mask = (t < T)[:, None] & (ch < F)[None, :]
        tl.store(y_ptr + row[:, None] * F + ch[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _geglu_bwd_kernel(
    dy_ptr,  # (B, T, F)
    x_ptr,  # (B, T, 2F)
    bias_ptr,  # (2F,) or None
    kept_ptr,  # (1 | B, UNITS) uint8 or None
    dx_ptr,  # (B, T, 2F)
    partial_ptr,  # (B * chunks, 2F) fp32, or None where there is no bias
    kept_stride,
    T,
    F: tl.constexpr,
    UNITS: tl.constexpr,
    VEC: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(T, CHUNK)
    b = pid // chunks
    ch = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = _kept_channels(kept_ptr, b * kept_stride, ch, F, UNITS, VEC)
    if bias_ptr is not None:
        bias_v, bias_g = _load_halves(bias_ptr, ch, kept, F)
        sum_v = tl.zeros((ROWS, BLOCK), tl.float32)
        sum_g = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, CHUNK, ROWS):
        t = (pid % chunks) * CHUNK + start + tl.arange(0, ROWS)
        row = b * T + t
        mask = (t < T)[:, None] & kept[None, :]
        at = row[:, None] * (2 * F) + ch[None, :]
        v, g = _load_halves(x_ptr, at, mask, F)
        dy = tl.load(dy_ptr + row[:, None] * F + ch[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            v += bias_v[None, :]
            g += bias_g[None, :]
        cdf = normal_cdf(g)
        pdf = tl.exp2(-0.72134752 * (g * g) - 1.32574806)  # log2(e) / 2 and log2(sqrt(2 pi))
        dv = dy * (g * cdf)
        dg = dy * v * (cdf + g * pdf)
        mask = (t < T)[:, None] & (ch < F)[None, :]
        tl.store(dx_ptr + at, dv.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + at + F, dg.to(dx_ptr.dtype.element_ty), mask=mask)
        if bias_ptr is not None:
            sum_v += dv  # 0 in masked lanes, where dy is 0
            sum_g += dg
    if bias_ptr is not None:
        at = partial_ptr + pid * (2 * F) + ch
        tl.store(at, tl.sum(sum_v, axis=0), mask=ch < F)
        tl.store(at + F, tl.sum(sum_g, axis=0), mask=ch < F)


# --- launchers ------------------------------------------------------------------------------


def _launch(B: int, T: int, width: int, kept: Tensor | None) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and compile-time constants."""
    blocks = triton.cdiv(width, BLOCK)
    # the longest chunks that leave two programs for each slot of a large card
    chunk = next((c for c in CHUNKS if B * triton.cdiv(T, c) * blocks >= 2048), CHUNKS[-1])
    units = 1 if kept is None else kept.shape[1]
    vec = min(8, (width // units) & -(width // units))
    constants = {"F": width, "UNITS": units, "VEC": vec, "CHUNK": chunk, "ROWS": ROWS, "BLOCK": BLOCK}
    return (B * triton.cdiv(T, chunk), blocks), constants


def _sizes(x: Tensor, kept: Tensor | None) -> tuple[int, int, int, int]:
    """B, T, F and the stride of `kept`; where all samples keep the same, they are one long sample."""
    B, T, channels = x.shape
    if kept is None or kept.shape[0] == 1:
        return 1, B * T, channels // 2, 0
    return B, T, channels // 2, 1


@torch.library.custom_op("bilevel_kernels::geglu_fwd", mutates_args=())
def geglu_fwd(x: Tensor, bias: Tensor | None, kept: Tensor | None) -> Tensor:
    B, T, width, kept_stride = _sizes(x, kept)
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    grid, constants = _launch(B, T, width, kept)
    _geglu_fwd_kernel[grid](x, bias, kept, y, kept_stride, T, **constants)
    return y


@torch.library.custom_op("bilevel_kernels::geglu_bwd", mutates_args=())
def geglu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, width, kept_stride = _sizes(x, kept)
    dx = torch.empty_like(x)
    grid, constants = _launch(B, T, width, kept)
    shape = (grid[0], 2 * width)
    partial = None if bias is None else torch.empty(shape, dtype=torch.float32, device=x.device)
    _geglu_bwd_kernel[grid](dy, x, bias, kept, dx, partial, kept_stride, T, **constants)
    return dx, x.new_empty(0) if bias is None or partial is None else partial.sum(0).to(bias.dtype)


# --- autograd -------------------------------------------------------------------------------


@geglu_fwd.register_fake
def _(x, bias, kept):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@geglu_bwd.register_fake
def _(dy, x, bias, kept):
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, bias, kept = ctx.saved_tensors
    dx, dbias = geglu_bwd(dy.contiguous(), x, bias, kept)
    return dx, None if bias is None else dbias, None


geglu_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _table(kept: Kept, batch: int, device: torch.device) -> Tensor:
    return kept.mask(1, batch, device).to(torch.uint8)


def geglu_bytes(rows: int, width: int, kept: int, itemsize: int, backward: bool) -> int:
    """Bytes that have to move for `kept` of `width` channels."""
    return rows * (3 * kept + 2 * width if backward else 2 * kept + width) * itemsize


def geglu(x: Tensor, bias: Tensor | None = None, *, kept: Kept | None = None) -> Tensor:
    """The first half of x + bias times the exact GELU of the second.

    Args:
        x: (..., 2F), what the first linear of a feed-forward returns without its bias; values, then gates.
        bias: (2F,), of any of the dtypes.
        kept: Groups of F / kept.units channels that are there, the same in both halves. With one list for each
            sample, x is (B, T, 2F). The others are not read; they are zero in the result and in the gradients.

    Returns:
        (..., F) in the dtype of x.

    Raises:
        ValueError: A shape, layout, dtype or device that does not fit.
    """
    if x.dim() < 2 or not x.numel() or x.shape[-1] % 2:
        raise ValueError(f"x: shape {tuple(x.shape)} is not (..., 2F) with elements")
    if not x.is_contiguous():
        raise ValueError(f"x: strides {x.stride()} of shape {tuple(x.shape)} are not contiguous")
    width = x.shape[-1] // 2
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name}: {tensor.dtype} is none of float32, float16 and bfloat16")
    if bias is not None:
        if bias.shape != (2 * width,) or not bias.is_contiguous():
            raise ValueError(f"bias: shape {tuple(bias.shape)}, strides {bias.stride()}, expected ({2 * width},), (1,)")
        if bias.device != x.device:
            raise ValueError(f"bias: on {bias.device}, x on {x.device}")
    table = None
    if kept is not None:
        if width % kept.units:
            raise ValueError(f"kept: {kept.units} units do not divide the {width} channels of half of x")
        if kept.rows and x.dim() != 3:
            raise ValueError(f"kept: a list for each sample needs x (B, T, 2F), not {tuple(x.shape)}")
        if not kept.is_everything:
            table = _table(kept, x.shape[0] if kept.rows else 1, x.device)
        kept.samples(x.shape[0])
    return geglu_fwd(x.reshape(-1, *x.shape[-2:]), bias, table).reshape(*x.shape[:-1], width)
