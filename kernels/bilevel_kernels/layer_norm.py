"""A residual connection and the LayerNorm behind it: the sum, its norm, and both of their gradients in one pass.

    h    = x + r + rbias                       r, rbias: a branch and the bias of its last layer, or none
    xhat = (h - mean) * rstd                   over the C channels of a row
    y    = weight * xhat + bias
    dx   = dh + rstd * (weight * dy - mean(weight * dy) - xhat * mean(weight * dy * xhat)) = dr
    dweight = sum of dy * xhat over rows, dbias = sum of dy, drbias = sum of dx

Why fused  h is used twice, by the norm and by the next sum: eager adds, reads h again to normalise it, and backward is
           a norm, an add of the two gradients and a sum for the bias over the same rows

Shapes     x, r, h, y: (..., C), C up to 4,096; rbias, weight, bias: (C,); mean, rstd: (R,), R rows
Dtypes     x, r: fp32 | fp16 | bf16, the same; weight, bias, rbias: that or fp32; arithmetic and mean, rstd in fp32
Layout     contiguous; anything else is refused
Numerics   variance from centred squares of h as it is stored; sums over rows are those of chunks, then over the chunks:
           no atomics, the same bits every run. The chunks depend on the shape only
Traffic    n elements in x: forward 2n, with a new h 3n, with r 4n; backward 4n. The sums of chunks add 5 %
Source     arXiv:1607.06450
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

KIND = "norm"
WIDEST = 4096
TILE = 2048  # elements of a tile of rows: 16 in each of 128 threads
CHUNKS = (128, 64, 32, 16)  # rows that a program of backward goes through; the more, the fewer sums
BLOCK_C, BLOCK_K = 32, 128  # channels and chunks that the second pass adds at a time


# --- reference ------------------------------------------------------------------------------


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, r: Tensor | None = None, rbias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula, in the dtype of x: the oracle of the tests and the `torch` backend."""
    for more in (r, rbias):
        x = x if more is None else x + more.to(x.dtype)
    return x, F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _channels(ptr, channel, C: tl.constexpr):
    return tl.load(ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (R, C)
    r_ptr,  # (R, C) or None
    rbias_ptr,  # (C,) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    h_ptr,  # (R, C), or None where h is x
    y_ptr,  # (R, C)
    mean_ptr,  # (R,) fp32
    rstd_ptr,  # (R,) fp32
    R,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    mask = (row < R)[:, None] & (channel < C)[None, :]
    h = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if r_ptr is not None:
        h += tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if rbias_ptr is not None:
        h += _channels(rbias_ptr, channel, C)
    if h_ptr is not None:
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, rounded, mask=mask)
        h = rounded.to(tl.float32)  # what backward will read
    mean = tl.sum(h, axis=1) / C
    d = tl.where((channel < C)[None, :], h - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / C + eps)
    y = d * rstd[:, None] * _channels(weight_ptr, channel, C) + _channels(bias_ptr, channel, C)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=row < R)
    tl.store(rstd_ptr + row, rstd, mask=row < R)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # (R, C)
    dh_ptr,  # (R, C) or None
    h_ptr,  # (R, C)
    weight_ptr,  # (C,)
    mean_ptr,  # (R,) fp32
    rstd_ptr,  # (R,) fp32
    dx_ptr,  # (R, C)
    partial_ptr,  # (2 | 3, programs, C) fp32: sums of dy * xhat, of dy and, with RBIAS, of dx
    R,
    C: tl.constexpr,
    RBIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    w = _channels(weight_ptr, channel, C)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    drbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = pid * CHUNK + start + tl.arange(0, ROWS)
        at = row[:, None] * C + channel[None, :]
        mask = (row < R)[:, None] & (channel < C)[None, :]
        mean = tl.load(mean_ptr + row, mask=row < R, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < R, other=0.0)[:, None]
        xhat = tl.where(mask, (tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd, 0.0)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dweight += dy * xhat
        dbias += dy
        wdy = dy * w
        c0, c1 = tl.sum(wdy, axis=1) / C, tl.sum(wdy * xhat, axis=1) / C
        dx = (wdy - c0[:, None] - xhat * c1[:, None]) * rstd
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if RBIAS:
            drbias += dx  # past the last row rstd is 0, and so is dx; past the last channel nothing is stored
    at = partial_ptr + pid * C + channel
    step = tl.num_programs(0) * C
    tl.store(at, tl.sum(dweight, axis=0), mask=channel < C)
    tl.store(at + step, tl.sum(dbias, axis=0), mask=channel < C)
    if RBIAS:
        tl.store(at + 2 * step, tl.sum(drbias, axis=0), mask=channel < C)


@triton.jit
def _layer_norm_sums_kernel(
    partial_ptr,  # (2 | 3, K, C) fp32
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    drbias_ptr,  # (C,) or None
    K,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    partial_ptr += which * K * C
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    start = 0
    while start < K:  # not `range`: the interpreter cannot count to a runtime number
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < K)[:, None] & (channel < C)[None, :]
        total += tl.load(partial_ptr + k[:, None] * C + channel[None, :], mask=mask, other=0.0)
        start += BLOCK_K
    found = tl.sum(total, axis=0)
    if which == 0:
        tl.store(dweight_ptr + channel, found.to(dweight_ptr.dtype.element_ty), mask=channel < C)
    elif which == 1:
        tl.store(dbias_ptr + channel, found.to(dbias_ptr.dtype.element_ty), mask=channel < C)
    elif drbias_ptr is not None:
        tl.store(drbias_ptr + channel, found.to(drbias_ptr.dtype.element_ty), mask=channel < C)


# --- launchers ------------------------------------------------------------------------------


def _config(channels: int) -> dict[str, int]:
    """Tiles of whole rows."""
    block = max(16, triton.next_power_of_2(channels))
    rows = max(1, TILE // block)
    return {"ROWS": min(rows, 16), "BLOCK": block, "num_warps": 4 * max(1, block // TILE)}


def _chunk(rows: int) -> int:
    """The longest chunks that leave four programs for each multiprocessor of a large card."""
    return next((c for c in CHUNKS if triton.cdiv(rows, c) >= 512), CHUNKS[-1])


@torch.library.custom_op("bilevel_kernels::layer_norm_fwd", mutates_args=())
def layer_norm_fwd(
    x: Tensor, r: Tensor | None, rbias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h, y, mean, rstd), h empty where it is x."""
    C = x.shape[-1]
    R = x.numel() // C
    h = None if r is None and rbias is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(R, dtype=torch.float32, device=x.device) for _ in range(2))
    config = _config(C)
    grid = (triton.cdiv(R, config["ROWS"]),)
    _layer_norm_fwd_kernel[grid](x, r, rbias, weight, bias, h, y, mean, rstd, R, eps, C=C, **config)
    return x.new_empty(0) if h is None else h, y, mean, rstd


@torch.library.custom_op("bilevel_kernels::layer_norm_bwd", mutates_args=())
def layer_norm_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, rbias: Tensor | None,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias, drbias), drbias empty where there is none. Of the biases only the dtypes are asked."""
    C, R = h.shape[-1], mean.numel()
    chunk, config = _chunk(R), _config(C)
    programs, sums = triton.cdiv(R, chunk), 2 if rbias is None else 3
    dx, dweight, dbias = (torch.empty_like(t) for t in (h, weight, bias))
    drbias = None if rbias is None else torch.empty_like(rbias)
    partial = torch.empty(sums, programs, C, dtype=torch.float32, device=h.device)
    _layer_norm_bwd_kernel[(programs,)](
        dy, dh, h, weight, mean, rstd, dx, partial, R, C=C, RBIAS=rbias is not None, CHUNK=chunk, **config
    )
    _layer_norm_sums_kernel[(triton.cdiv(C, BLOCK_C), sums)](
        partial, dweight, dbias, drbias, programs, C=C, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K
    )
    return dx, dweight, dbias, h.new_empty(0) if drbias is None else drbias


# --- autograd -------------------------------------------------------------------------------


@layer_norm_fwd.register_fake
def _(x, r, rbias, weight, bias, eps):
    h = x.new_empty(0) if r is None and rbias is None else torch.empty_like(x)
    return h, torch.empty_like(x), *(x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))


@layer_norm_bwd.register_fake
def _(dy, dh, h, weight, bias, rbias, mean, rstd):
    grads = (torch.empty_like(t) for t in (h, weight, bias))
    return *grads, h.new_empty(0) if rbias is None else torch.empty_like(rbias)


def _setup(ctx, inputs, output):
    x, r, rbias, weight, bias, _ = inputs
    h, _, mean, rstd = output
    ctx.added, alone = r is not None, r is None and rbias is None
    ctx.mark_non_differentiable(mean, rstd, *[h] * alone)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if alone else h, weight, bias, rbias, mean, rstd)


def _backward(ctx, dh, dy, _dmean, _drstd):
    h, weight, bias, rbias, mean, rstd = ctx.saved_tensors
    dh = None if dh is None else dh.contiguous()
    dy = torch.zeros_like(h) if dy is None else dy.contiguous()
    dx, dweight, dbias, drbias = layer_norm_bwd(dy, dh, h, weight, bias, rbias, mean, rstd)
    return dx, dx if ctx.added else None, None if rbias is None else drbias, dweight, dbias, None


layer_norm_fwd.register_autograd(_backward, setup_context=_setup)


class _InputAndNorm(torch.autograd.Function):
    """x once more, which no custom operator may return, and y: both gradients come to one backward here, too.

    `rbias` is in x already: it gets the gradient that it would have.
    """

    @staticmethod
    def forward(ctx, x, rbias, weight, bias, eps):
        _, y, mean, rstd = layer_norm_fwd(x, None, None, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, rbias, weight, bias, mean, rstd)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx, dh, dy):
        x, rbias, weight, bias, mean, rstd = ctx.saved_tensors
        dh = None if dh is None else dh.contiguous()
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dx, dweight, dbias, drbias = layer_norm_bwd(dy, dh, x, weight, bias, rbias, mean, rstd)
        return dx, None if rbias is None else drbias, dweight, dbias, None


# --- public ---------------------------------------------------------------------------------


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    r: Tensor | None = None,
    rbias: Tensor | None = None,
    held: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum x + r + rbias, and its LayerNorm.

    Args:
        x: (..., C) contiguous, C up to 4,096.
        weight, bias: (C,), in the dtype of x or fp32.
        eps: Added to the variance.
        r: What a branch adds to x; of its shape and dtype.
        rbias: (C,), the bias of the branch's last layer, in the dtype of x or fp32.
        held: Whether x has rbias in it, as a constant. It is not added then, and its gradient comes from here all the
            same, for next to nothing.

    Returns:
        Two of (..., C) in the dtype of x: the sum and its norm, whose gradients backward takes in one pass. Where
        nothing is added, the sum shares the memory of x, and must not be written to.

    Raises:
        ValueError: A shape, dtype, device or layout is another one.
    """
    if x.dim() < 2 or not x.numel():
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., C) and at least one element")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, expected float32, float16 or bfloat16")
    if x.shape[-1] > WIDEST:
        raise ValueError(f"x: {x.shape[-1]} channels, {WIDEST} at most")
    if x.numel() // x.shape[-1] >= 2**31:
        raise ValueError(f"x: shape {tuple(x.shape)} has 2**31 rows or more")
    row = x.shape[-1:]
    for name, t, shape in (
        ("x", x, x.shape),
        ("r", r, x.shape),
        ("weight", weight, row),
        ("bias", bias, row),
        ("rbias", rbias, row),
    ):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {tuple(shape)}")
        if t.dtype != x.dtype and (name == "r" or t.dtype != torch.float32):
            raise ValueError(f"{name}: {t.dtype}, expected {x.dtype}{'' if name == 'r' else ' or float32'}")
        if t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, x is on {x.device}")
        if not t.is_contiguous():
            raise ValueError(f"{name}: strides {t.stride()} of shape {tuple(t.shape)} are not contiguous")
    if held and r is not None:
        raise ValueError("held: x has rbias in it only where nothing is added to x")
    if r is None and (held or rbias is None):
        h, y = _InputAndNorm.apply(x, rbias, weight, bias, eps)  # pyright: ignore[reportGeneralTypeIssues]
        return h, y
    return layer_norm_fwd(x, r, rbias, weight, bias, eps)[:2]


def layer_norm_bytes(elements: int, itemsize: int, r: bool, rbias: bool, backward: bool) -> int:
    """Least bytes moved: forward reads x and r, writes y and a new sum; backward reads three tensors and writes dx."""
    return elements * itemsize * (4 if backward else 2 + r + (r or rbias))
