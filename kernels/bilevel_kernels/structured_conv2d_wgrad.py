"""The weight gradient of `structured_conv2d`: a product over pixels, for kept input and output channels only.

    dweight[n, tap, c] = sum over samples that keep n and c, and over pixels p, of dout[p, n] x[p + tap, c]

Shapes     dout: (B, C_out, H, W); x: (B, C_in, H, W) -> (C_out, C_in, k, k), exactly 0 where n or c is dropped
Dtypes     fp32 | fp16 | bf16; sums in fp32
Layout     channels_last
Numerics   samples with the same two lists are one launch; its splits, and then the launches, are added in fixed order
Traffic    fp32 partial sums of the kept weights, written and read once for each split
Source     own
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.dot import dot, precision
from bilevel_kernels.kept import Kept, decoded, vec

PROGRAMS = 512  # at least, where there are samples to split over: a few on each SM of any card


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _structured_conv2d_wgrad_kernel(
    dout_ptr,  # (B, H, W, C_OUT)
    x_ptr,  # (B, H, W, C_IN)
    partial_ptr,  # (splits, N, SIZE * SIZE, C) fp32
    n_list_ptr,  # (N,) int32: kept channels of dout; or None for all
    c_list_ptr,  # (C,) int32: kept channels of x; or None for all
    samples_ptr,  # (samples,) int32: those with these lists; or None for all
    samples,
    H: tl.constexpr,
    W: tl.constexpr,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    PER_SPLIT: tl.constexpr,
    SIZE: tl.constexpr,
    VEC_N: tl.constexpr,
    VEC_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N)
    n_place = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    c_place = tl.program_id(0) // tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    tap, split = tl.program_id(1), tl.program_id(2).to(tl.int64)
    in_n, in_c = n_place < N, c_place < C
    n, c = n_place, c_place
    if n_list_ptr is not None:
        n = tl.load(n_list_ptr + n_place, mask=in_n, other=0)
        n = tl.max_contiguous(tl.multiple_of(n, [VEC_N]), [VEC_N])
    if c_list_ptr is not None:
        c = tl.load(c_list_ptr + c_place, mask=in_c, other=0)
        c = tl.max_contiguous(tl.multiple_of(c, [VEC_C]), [VEC_C])
    down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2

    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    blocks: tl.constexpr = (H * W + BLOCK_P - 1) // BLOCK_P
    for step in range(PER_SPLIT * blocks):
        place = split * PER_SPLIT + step // blocks
        there = place < samples
        sample = place
        if samples_ptr is not None:
            sample = tl.load(samples_ptr + place, mask=there, other=0).to(tl.int64)
        p = step % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        yy, xx = p // W + down, p % W + right
        real = (p < H * W) & there
        inside = real & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
        dout_offs = sample * (H * W * C_OUT) + (p * C_OUT)[None, :] + n[:, None]
        dout = tl.load(dout_ptr + dout_offs, mask=in_n[:, None] & real[None, :], other=0.0)
        x_offs = sample * (H * W * C_IN) + ((yy * W + xx) * C_IN)[:, None] + c[None, :]
        x = tl.load(x_ptr + x_offs, mask=inside[:, None] & in_c[None, :], other=0.0)
        acc = dot(dout, x, acc, PRECISION)

    offs = ((split * N + n_place[:, None]) * (SIZE * SIZE) + tap) * C + c_place[None, :]
    tl.store(partial_ptr + offs, acc, mask=in_n[:, None] & in_c[None, :])


# --- launchers ------------------------------------------------------------------------------


def config(dtype: torch.dtype) -> dict[str, int]:
    """Tiles of output by input channels, a block of pixels at a time."""
    if dtype == torch.float32:  # ieee fp32 products run on the CUDA cores, in registers
        return {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_P": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_P": 32, "num_warps": 4, "num_stages": 4}


@torch.library.custom_op("bilevel_kernels::structured_conv2d_wgrad", mutates_args=())
def structured_conv2d_wgrad(dout: Tensor, x: Tensor, size: int, kept_in: list[int], kept_out: list[int]) -> Tensor:
    inputs, outputs = decoded(tuple(kept_in)), decoded(tuple(kept_out))
    (batch, c_out), c_in = dout.shape[:2], x.shape[1]
    total: Tensor | None = None
    for (row_in, row_out), samples in _by_lists(inputs, outputs, batch).items():
        n, c = (_list(kept, row, t) for kept, row, t in ((outputs, row_out, dout), (inputs, row_in, x)))
        sums = _wgrad(dout, x, size, n, c, samples, vec(outputs, c_out), vec(inputs, c_in))
        if n is None and c is None and total is None:
            total = sums
            continue
        if total is None:
            total = torch.zeros(c_out, size * size, c_in, dtype=torch.float32, device=x.device)
        rows = torch.arange(c_out, device=x.device) if n is None else n.long()
        columns = torch.arange(c_in, device=x.device) if c is None else c.long()
        taps = torch.arange(size * size, device=x.device)
        place = (rows[:, None, None], taps[None, :, None], columns[None, None, :])
        total[place] = total[place] + sums
    assert total is not None, "a batch has a sample"
    return total.view(c_out, size, size, c_in).permute(0, 3, 1, 2).to(x.dtype, memory_format=torch.channels_last)


def _by_lists(inputs: Kept | None, outputs: Kept | None, batch: int) -> dict[tuple[int, int], list[int]]:
    """(input list, output list) -> the samples that have both, in the order of first appearance."""
    found: dict[tuple[int, int], list[int]] = {}
    rows = (kept.samples(batch) if kept else (0,) * batch for kept in (inputs, outputs))
    for sample, pair in enumerate(zip(*rows, strict=True)):
        found.setdefault(pair, []).append(sample)
    return found


def _list(kept: Kept | None, row: int, x: Tensor) -> Tensor | None:
    """(count,) int32 kept channels of x; None for all."""
    if kept is None or len(kept.lists[row]) == kept.units:
        return None
    index = kept.index(x.shape[1] // kept.units, x.shape[0], x.device)
    return index.channels[row, : len(kept.lists[row]) * (x.shape[1] // kept.units)]


def _wgrad(
    dout: Tensor, x: Tensor, size: int, n: Tensor | None, c: Tensor | None, samples: list[int], vec_n: int, vec_c: int
) -> Tensor:
    """(N, k * k, C) fp32 of the samples, which share these lists."""
    (batch, c_out, height, width), c_in = dout.shape, x.shape[1]
    N, C = c_out if n is None else n.numel(), c_in if c is None else c.numel()
    options = config(x.dtype)
    tiles = triton.cdiv(N, options["BLOCK_N"]) * triton.cdiv(C, options["BLOCK_C"])
    splits = min(len(samples), triton.cdiv(PROGRAMS, tiles * size * size))
    per_split = triton.cdiv(len(samples), splits)
    splits = triton.cdiv(len(samples), per_split)
    partial = torch.empty(splits, N, size * size, C, dtype=torch.float32, device=x.device)
    chosen = None if len(samples) == batch else torch.tensor(samples, dtype=torch.int32, device=x.device)
    _structured_conv2d_wgrad_kernel[(tiles, size * size, splits)](
        *(dout, x, partial, n, c, chosen, len(samples)),
        H=height,
        W=width,
        C_OUT=c_out,
        C_IN=c_in,
        N=N,
        C=C,
        PER_SPLIT=per_split,
        SIZE=size,
        VEC_N=vec_n,
        VEC_C=vec_c,
        PRECISION=precision(),
        **options,
    )
    return partial[0] if splits == 1 else partial.sum(0)


# --- autograd -------------------------------------------------------------------------------


@structured_conv2d_wgrad.register_fake
def _(dout, x, size, kept_in, kept_out):
    shape = (dout.shape[1], x.shape[1], size, size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
