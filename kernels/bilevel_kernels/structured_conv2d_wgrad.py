"""The weight gradient of `structured_conv2d`: a product over pixels, for kept input and output channels only.

    dweight[n, tap, c] = sum over samples that keep n and c, and over pixels p, of dout[p, n] x[p + tap, c]

Shapes     dout: (B, C_out, H, W); x: (B, C_in, H, W) -> (C_out, C_in, k, k), exactly 0 where n or c is dropped
Dtypes     fp32 | fp16 | bf16; sums in fp32
Layout     channels_last
Numerics   samples with the same two lists are one launch; its splits, and then the launches, are added in fixed order
Traffic    one list and tiles enough: dweight, written once. Else fp32 sums, written and read once for each launch and
           once for each of its splits
Source     own
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.dot import INTERPRETED, dot, precision
from bilevel_kernels.kept import Kept, decoded, vec

PROGRAMS = 512  # at least, where there are samples to split over: a few on each SM of any card
ROWS, COLUMNS = 4, 256  # of the kernel that adds the splits


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def times(n):
    """A variable `n` as `range` takes it: the interpreter cannot count to one, and a `while` is not pipelined."""
    return n.handle.data.item() if INTERPRETED else n


@triton.jit
def kept_channels(
    list_ptr,  # (L,) int32 or None for all
    place,  # (BLOCK,) positions among the kept channels
    count,
    VEC: tl.constexpr,
):
    """The channels at those positions. Runs of VEC start at a multiple of VEC, in the list as in memory."""
    channels = place
    if list_ptr is not None:
        channels = tl.load(list_ptr + place, mask=place < count, other=0)
        channels = tl.max_contiguous(tl.multiple_of(channels, [VEC]), [VEC])
    return channels


@triton.jit
def _structured_conv2d_wgrad_kernel(
    dout_ptr,  # (B, H, W, C_OUT)
    x_ptr,  # (B, H, W, C_IN)
    samples_ptr,  # (samples,) int32: those with these lists; or None for all
    n_list_ptr,  # (n_count,) int32: kept channels of dout; or None for all
    c_list_ptr,  # (c_count,) int32: kept channels of x; or None for all
    sums_ptr,  # (splits, C_OUT, SIZE * SIZE, C_IN)
    n_count,
    c_count,
    samples,
    per_split,
    H: tl.constexpr,  # constants, as W: every step divides by them
    W: tl.constexpr,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    SIZE: tl.constexpr,
    VEC_N: tl.constexpr,
    VEC_C: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tap's tile of one split. ADD: to what is there."""
    tiles = tl.cdiv(n_count, BLOCK_N)
    n_place = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    c_place = tl.program_id(0) // tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    tap, split = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = kept_channels(n_list_ptr, n_place, n_count, VEC_N)
    c = kept_channels(c_list_ptr, c_place, c_count, VEC_C)
    in_n, in_c = tl.max_constancy(n_place < n_count, [VEC_N]), tl.max_constancy(c_place < c_count, [VEC_C])
    down, right = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2

    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    blocks = tl.cdiv(H * W, BLOCK_P)
    first, steps = split * per_split, per_split * blocks
    for step in range(times(steps)):
        place = first + step // blocks
        there = place < samples
        sample = place
        if samples_ptr is not None:
            sample = tl.load(samples_ptr + place, mask=there, other=0).to(tl.int64)
        p = step % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        yy, xx = p // W + down, p % W + right
        real = (p < H * W) & there
        inside = real & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
        dout_at = dout_ptr + sample * (H * W * C_OUT) + (p * C_OUT)[None, :] + n[:, None]
        dout = tl.load(dout_at, mask=in_n[:, None] & real[None, :], other=0.0)
        x_at = x_ptr + sample * (H * W * C_IN) + ((yy * W + xx) * C_IN)[:, None] + c[None, :]
        x = tl.load(x_at, mask=inside[:, None] & in_c[None, :], other=0.0)
        acc = dot(dout, x, acc, PRECISION)

    sums_ptr += split * (C_OUT * SIZE * SIZE * C_IN)
    at = sums_ptr + (n * (SIZE * SIZE) + tap)[:, None] * C_IN + c[None, :]
    mask = in_n[:, None] & in_c[None, :]
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc.to(sums_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_splits_kernel(
    sums_ptr,  # (splits, C_OUT, TAPS, C_IN) fp32; written for kept channels only
    n_list_ptr,  # (n_count,) int32 or None
    c_list_ptr,  # (c_count,) int32 or None
    out_ptr,  # (C_OUT, TAPS, C_IN)
    n_count,
    c_count,
    splits,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    TAPS: tl.constexpr,
    VEC_N: tl.constexpr,
    VEC_C: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n_place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c_place = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    n = kept_channels(n_list_ptr, n_place, n_count, VEC_N)
    c = kept_channels(c_list_ptr, c_place, c_count, VEC_C)
    at = (n * TAPS + tl.program_id(1))[:, None] * C_IN + c[None, :]
    mask = (n_place < n_count)[:, None] & tl.max_constancy(c_place < c_count, [VEC_C])[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(times(splits)):
        acc += tl.load(sums_ptr + at, mask=mask, other=0.0)
        sums_ptr += C_OUT * TAPS * C_IN
    if ADD:
        acc += tl.load(out_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    jobs = _jobs(inputs, outputs, batch, x.device)
    whole = inputs is None and outputs is None  # every weight is written
    # launches are added in fp32; where there is but one, it writes the gradient itself
    dtype = x.dtype if len(jobs) == 1 else torch.float32
    blank = torch.empty if whole else torch.zeros
    total = blank((c_out, size, size, c_in), dtype=dtype, device=x.device)
    for launch, (row_in, row_out, samples, chosen) in enumerate(jobs):
        lists = _list(outputs, row_out, dout), _list(inputs, row_in, x)
        vecs = {"VEC_N": vec(outputs, c_out), "VEC_C": vec(inputs, c_in)}
        _add(dout, x, size, samples, chosen, lists, vecs, launch > 0, total)
    return total.permute(0, 3, 1, 2).to(x.dtype)


@lru_cache(maxsize=1024)
def _jobs(
    inputs: Kept | None, outputs: Kept | None, batch: int, device: torch.device
) -> list[tuple[int, int, int, Tensor | None]]:
    """Each pair of an input and an output list: how many samples have both, and which; None if all do.

    Kept on the device, so the copy is made once.
    """
    found: dict[tuple[int, int], list[int]] = {}
    rows = (kept.samples(batch) if kept else (0,) * batch for kept in (inputs, outputs))
    for sample, pair in enumerate(zip(*rows, strict=True)):
        found.setdefault(pair, []).append(sample)

    def chosen(samples: list[int]) -> Tensor | None:
        return None if len(samples) == batch else torch.tensor(samples, dtype=torch.int32, device=device)

    return [(*pair, len(samples), chosen(samples)) for pair, samples in found.items()]


def _list(kept: Kept | None, row: int, x: Tensor) -> Tensor | None:
    """(count,) int32 kept channels of x; None for all."""
    if kept is None or len(kept.lists[row]) == kept.units:
        return None
    width = x.shape[1] // kept.units
    return kept.index(width, x.shape[0], x.device).channels[row, : len(kept.lists[row]) * width]


def _add(
    dout: Tensor,
    x: Tensor,
    size: int,
    samples: int,
    chosen: Tensor | None,
    lists: tuple[Tensor | None, Tensor | None],
    vecs: dict[str, int],
    add: bool,
    total: Tensor,
) -> None:
    """The gradient of the samples, which share these lists, is written to `total`, or added to it."""
    (_, c_out, height, width), c_in, taps = dout.shape, x.shape[1], size * size
    counts = [c if kept is None else kept.numel() for kept, c in zip(lists, (c_out, c_in), strict=True)]
    options = config(x.dtype)
    tiles = triton.cdiv(counts[0], options["BLOCK_N"]) * triton.cdiv(counts[1], options["BLOCK_C"])
    per_split = triton.cdiv(samples, min(samples, triton.cdiv(PROGRAMS, tiles * taps)))
    splits = triton.cdiv(samples, per_split)
    sums = total
    if splits > 1:
        sums = torch.empty((splits, *total.shape), dtype=torch.float32, device=x.device)
    _structured_conv2d_wgrad_kernel[(tiles, taps, splits)](
        *(dout, x, chosen, *lists, sums, *counts, samples, per_split),
        H=height,
        W=width,
        C_OUT=c_out,
        C_IN=c_in,
        SIZE=size,
        ADD=add and splits == 1,
        PRECISION=precision(x.dtype, convolution=True),
        **vecs,
        **options,
    )
    if splits > 1:
        grid = (triton.cdiv(counts[0], ROWS), taps, triton.cdiv(counts[1], COLUMNS))
        sizes = {"C_OUT": c_out, "C_IN": c_in, "TAPS": taps, "ROWS": ROWS, "COLUMNS": COLUMNS}
        _add_splits_kernel[grid](sums, *lists, total, *counts, splits, ADD=add, **sizes, **vecs)


# --- autograd -------------------------------------------------------------------------------


@structured_conv2d_wgrad.register_fake
def _(dout, x, size, kept_in, kept_out):
    shape = (dout.shape[1], x.shape[1], size, size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
