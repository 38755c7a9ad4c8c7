"""Convolution over the kept channels of dense storage, one list of them for the batch or one for each sample.

    out = mask_out * (conv(mask_in * x, weight) + bias + time) + residual
    dx = mask_in * conv^T(mask_out * dout)        dweight = mask_out * corr(dout, x) * mask_in

Why fused  a batch may mix the experts of one dense storage in one launch; a masked channel is neither read nor
           multiplied, where eager multiplies by masks and convolves everything; bias, time and residual in the epilogue

Shapes     x: (B, C_in, H, W); weight: (C_out, C_in, k, k), k = 1 or 3, stride 1; time: (B, C_out) -> (B, C_out, H, W)
Dtypes     fp32 | fp16 | bf16, the same of all; sums in fp32
Layout     channels_last of all four-dimensional tensors; anything else is refused
Numerics   implicit GEMM, taps within channels; no atomics, the same bits every run
Traffic    out is filled with zeros (or the residual) first where channels are dropped: C_out a pixel more
Source     own
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.dot import dot, precision
from bilevel_kernels.kept import Index, Kept, counts, decoded, vec
from bilevel_kernels.structured_conv2d_wgrad import kept_channels, structured_conv2d_wgrad, times

KIND = "conv"

# --- reference ------------------------------------------------------------------------------


def structured_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kept_in: Kept | None = None,
    kept_out: Kept | None = None,
    time: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula, in the dtype of its inputs: what gating code runs; the oracle and the `torch` provider."""
    batch, channels = x.shape[:2]
    if kept_in is not None:
        x = x * kept_in.mask(channels // kept_in.units, batch, x.device)[:, :, None, None]
    out = torch.nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    if time is not None:
        out = out + time[:, :, None, None]
    if kept_out is not None:
        out = out * kept_out.mask(out.shape[1] // kept_out.units, batch, x.device)[:, :, None, None]
    return out if residual is None else out + residual


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _structured_conv2d_kernel(
    a_ptr,  # (B, H, W, C_A): x, or dout for dgrad
    w_ptr,  # (C_out, SIZE, SIZE, C_in)
    bias_ptr,  # (C_O,) or None
    time_ptr,  # (B, C_O) or None
    residual_ptr,  # (B, H, W, C_O) or None
    out_ptr,  # (B, H, W, C_O)
    c_list_ptr,  # (E, L_C) int32: kept channels of a; or None for all, as the next two
    c_count_ptr,  # (E,) int32
    c_row_ptr,  # (B,) int32
    n_list_ptr,  # (E, L_N) int32: kept channels of out; or None for all, as the next two
    n_count_ptr,  # (E,) int32
    n_row_ptr,  # (B,) int32
    c_stride,
    n_stride,
    H,
    W,
    C_A: tl.constexpr,
    C_O: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_TAP: tl.constexpr,
    SIZE: tl.constexpr,
    MIRROR: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = SIZE * SIZE
    b = tl.program_id(2).to(tl.int64)
    n_count, c_count = C_O, C_A
    if n_list_ptr is not None:
        row = tl.load(n_row_ptr + b)
        n_list_ptr += row * n_stride
        n_count = tl.multiple_of(tl.load(n_count_ptr + row), VEC_N)
    if tl.program_id(0) * BLOCK_N < n_count:  # past it lie masked channels only
        if c_list_ptr is not None:
            row = tl.load(c_row_ptr + b)
            c_list_ptr += row * c_stride
            c_count = tl.multiple_of(tl.load(c_count_ptr + row), VEC_C)
        a_ptr += b * H * W * C_A
        p = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        # pixels past the last have rows past the last: their taps are outside, or masked by the store
        y, x = p // W, p % W
        place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        n = kept_channels(n_list_ptr, place, n_count, VEC_N)
        in_n = place < n_count

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        c = kept_channels(c_list_ptr, tl.arange(0, BLOCK_K), c_count, VEC_C)
        steps = TAPS * tl.cdiv(c_count, BLOCK_K)
        for step in range(times(steps)):
            tap = step % TAPS
            down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
            if MIRROR:
                down, right = -down, -right
            yy, xx = y + down, x + right
            inside = (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
            in_c = step // TAPS * BLOCK_K + tl.arange(0, BLOCK_K) < c_count
            a_at = a_ptr + ((yy * W + xx) * C_A)[:, None] + c[None, :]
            a = tl.load(a_at, mask=inside[:, None] & in_c[None, :], other=0.0)
            w_at = w_ptr + c[:, None] * STRIDE_C + tap * STRIDE_TAP + n[None, :] * STRIDE_N
            w = tl.load(w_at, mask=in_c[:, None] & in_n[None, :], other=0.0)
            acc = dot(a, w, acc, PRECISION)
            # one step ahead: were it loaded where it is used, the compiler would prefetch a and w less far
            c = kept_channels(c_list_ptr, (step + 1) // TAPS * BLOCK_K + tl.arange(0, BLOCK_K), c_count, VEC_C)

        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if time_ptr is not None:
            acc += tl.load(time_ptr + b * C_O + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        offs = b * H * W * C_O + (p * C_O)[:, None] + n[None, :]
        mask = (p < H * W)[:, None] & in_n[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------


def config(pixels: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of one sample's pixels by result channels by operand channels."""
    if dtype == torch.float32:  # ieee fp32 products run on the CUDA cores, in registers
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    if pixels <= 64:  # 8 x 8: a sample has no more; narrow tiles make more programs
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    # ptxas would stop at 128 registers on sm_120, for two blocks on an SM, and spill
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4, "maxnreg": 168}


def _launch(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    kept_c: Kept | None,
    kept_n: Kept | None,
    mirror: bool,
    epilogue: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> None:
    """out = a * weight, from channels kept_c of a to channels kept_n of out; back through the weights if `mirror`."""
    batch, c_a, height, width = a.shape
    c_o, c_in, size = out.shape[1], weight.shape[1], weight.shape[-1]
    c_index, n_index = _index(kept_c, a), _index(kept_n, out)
    options = config(height * width, a.dtype)
    most = n_index.most if n_index else c_o
    grid = (triton.cdiv(most, options["BLOCK_N"]), triton.cdiv(height * width, options["BLOCK_M"]), batch)
    forward = {"STRIDE_N": size * size * c_in, "STRIDE_C": 1}
    backward = {"STRIDE_N": 1, "STRIDE_C": size * size * c_in}
    _structured_conv2d_kernel[grid](
        *(a, weight, *epilogue, out),
        *(c_index[:3] if c_index else (None, None, None)),
        *(n_index[:3] if n_index else (None, None, None)),
        *(index.channels.stride(0) if index else 0 for index in (c_index, n_index)),
        *(height, width, c_a, c_o),
        **(backward if mirror else forward),
        STRIDE_TAP=c_in,
        SIZE=size,
        MIRROR=mirror,
        VEC_C=vec(kept_c, c_a),
        VEC_N=vec(kept_n, c_o),
        PRECISION=precision(a.dtype, convolution=True),
        **options,
    )


def _index(kept: Kept | None, x: Tensor) -> Index | None:
    """Of the channels of x (B, C, H, W); None for all of them."""
    if kept is None or kept.is_everything:
        return None
    return kept.index(x.shape[1] // kept.units, x.shape[0], x.device)


def _blank(like: Tensor, channels: int, kept: Kept | None, fill: Tensor | None = None) -> Tensor:
    """(B, channels, H, W) to write to; what the kernel leaves out holds `fill`, or zeros."""
    whole = kept is None or kept.is_everything
    if not whole and fill is not None:
        return fill.clone(memory_format=torch.channels_last)
    out = _like(like, channels)
    return out if whole else out.zero_()


def _like(x: Tensor, channels: int) -> Tensor:
    """(B, channels, H, W) uninitialised, for x (B, C, H, W)."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("bilevel_kernels::structured_conv2d_fwd", mutates_args=())
def structured_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    time: Tensor | None,
    residual: Tensor | None,
    kept_in: list[int],
    kept_out: list[int],
) -> Tensor:
    inputs, outputs = decoded(tuple(kept_in)), decoded(tuple(kept_out))
    out = _blank(x, weight.shape[0], outputs, residual)
    _launch(x, weight, out, inputs, outputs, False, (bias, time, residual))
    return out


@torch.library.custom_op("bilevel_kernels::structured_conv2d_dgrad", mutates_args=())
def structured_conv2d_dgrad(dout: Tensor, weight: Tensor, kept_in: list[int], kept_out: list[int]) -> Tensor:
    inputs, outputs = decoded(tuple(kept_in)), decoded(tuple(kept_out))
    dx = _blank(dout, weight.shape[1], inputs)
    _launch(dout, weight, dx, outputs, inputs, True)
    return dx


@torch.library.custom_op("bilevel_kernels::structured_conv2d_sums", mutates_args=())
def structured_conv2d_sums(dout: Tensor, kept_out: list[int]) -> Tensor:
    """(B, C_out) fp32: dout summed over the pixels of a sample, 0 in dropped channels."""
    sums, outputs = dout.sum((2, 3), dtype=torch.float32), decoded(tuple(kept_out))
    return sums if outputs is None else sums.masked_fill_(_dropped(outputs, *dout.shape[:2], dout.device), 0.0)


@lru_cache(maxsize=1024)
def _dropped(kept: Kept, batch: int, channels: int, device: torch.device) -> Tensor:
    """(B, C) bool; kept on the device, so the copy is made once."""
    return ~kept.mask(channels // kept.units, batch, device)


# --- autograd -------------------------------------------------------------------------------


@structured_conv2d_fwd.register_fake
def _(x, weight, bias, time, residual, kept_in, kept_out):
    return _like(x, weight.shape[0])


@structured_conv2d_dgrad.register_fake
def _(dout, weight, kept_in, kept_out):
    return _like(dout, weight.shape[1])


@structured_conv2d_sums.register_fake
def _(dout, kept_out):
    return dout.new_empty(dout.shape[:2], dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, weight, bias, time, residual, ctx.kept_in, ctx.kept_out = inputs
    ctx.save_for_backward(x, weight)
    ctx.optional = (bias is not None, time is not None, residual is not None)


def _backward(ctx, dout):
    x, weight = ctx.saved_tensors
    dout = dout.contiguous(memory_format=torch.channels_last)
    needs = ctx.needs_input_grad
    dx = structured_conv2d_dgrad(dout, weight, ctx.kept_in, ctx.kept_out) if needs[0] else None
    dweight = structured_conv2d_wgrad(dout, x, weight.shape[-1], ctx.kept_in, ctx.kept_out) if needs[1] else None
    dbias = dtime = None
    if needs[2] or needs[3]:
        sums = structured_conv2d_sums(dout, ctx.kept_out)
        dbias = sums.sum(0).to(dout.dtype) if needs[2] else None
        dtime = sums.to(dout.dtype) if needs[3] else None
    return dx, dweight, dbias, dtime, dout if needs[4] else None, None, None


structured_conv2d_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


def structured_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kept_in: Kept | None = None,
    kept_out: Kept | None = None,
    time: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve the kept input channels to the kept output channels, stride 1, padding k // 2.

    Args:
        x: (B, C_in, H, W) channels_last.
        weight: (C_out, C_in, k, k) channels_last, k = 1 or 3. Dropped weights receive a gradient of exactly 0.
        bias: (C_out,).
        kept_in: Units of C_in / units channels that are read; all if None.
        kept_out: Units of C_out / units channels that are computed; all if None. The others come out as the residual,
            or as zeros.
        time: (B, C_out), added to every pixel of the kept channels.
        residual: (B, C_out, H, W) channels_last, added to all channels.

    Returns:
        (B, C_out, H, W) channels_last, in the dtype of x.

    Raises:
        ValueError: A shape, layout, dtype or device that does not fit, or a kept list for other channels or samples.
    """
    _check_map("x", x)
    batch, c_in, height, width = x.shape
    _check_map("weight", weight)
    c_out, w_in, size, size_x = weight.shape
    if w_in != c_in or size != size_x or size not in (1, 3):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected (C_out, {c_in}, k, k) with k = 1 or 3")
    if max(c_in, c_out) * height * width >= 2**31 or weight.numel() >= 2**31:
        raise ValueError(f"x: a sample of {tuple(x.shape)}, or the weight, has 2**31 elements or more")
    expected = {
        "bias": (bias, (c_out,)),
        "time": (time, (batch, c_out)),
        "residual": (residual, (batch, c_out, height, width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
    if residual is not None:
        _check_map("residual", residual)
    for name, tensor in {"weight": weight, "bias": bias, "time": time, "residual": residual}.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
        if tensor is not None and tensor.dim() < 4 and not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()} of shape {tuple(tensor.shape)} are not contiguous")
    for name, kept, channels in (("kept_in", kept_in, c_in), ("kept_out", kept_out, c_out)):
        if kept is not None and channels % kept.units:
            raise ValueError(f"{name}: {kept.units} units do not divide {channels} channels")
        if kept is not None and kept.rows and len(kept.rows) != batch:
            raise ValueError(f"{name}: lists for {len(kept.rows)} samples, the batch has {batch}")
    lists = ([] if kept is None or kept.is_everything else kept.encoded() for kept in (kept_in, kept_out))
    return structured_conv2d_fwd(x, weight, bias, time, residual, *lists)


def _check_map(name: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected four dimensions with elements")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: {x.dtype} is none of float32, float16 and bfloat16")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name}: strides {x.stride()} of shape {tuple(x.shape)} are not channels_last")


def structured_conv2d_flops(pixels: int, c_in: int, c_out: int, size: int) -> int:
    """2 per multiply-add, for the kept channels; dgrad and wgrad have as many each."""
    return 2 * pixels * size * size * c_in * c_out


def structured_conv2d_bytes(pixels: int, c_in: int, c_out: int, size: int, itemsize: int, backward: bool) -> int:
    """Least bytes moved, for the kept channels: x, weight and out; backward dout for each of the two gradients."""
    return (2 if backward else 1) * (pixels * (c_in + c_out) + size * size * c_in * c_out) * itemsize


def operator_flops(name: str, given: dict[str, Any], out: Any) -> int:
    if name.endswith("sums"):
        return 0
    c_out, c_in, size, _ = given.get("weight", out).shape  # wgrad returns what has the shape of the weights
    batch, _, height, width = given.get("x", given.get("dout")).shape
    inputs = counts(decoded(tuple(given["kept_in"])), c_in, batch)
    outputs = counts(decoded(tuple(given["kept_out"])), c_out, batch)
    return sum(structured_conv2d_flops(height * width, i, o, size) for i, o in zip(inputs, outputs, strict=True))
