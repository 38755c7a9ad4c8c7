"""The kernels of `group_norm_silu`, in memory order: activations are (B, HW, ROW), ROW = C + padding.

Tiles     A sample is K tiles of TILE pixels. Kernels over tiles have one program for each (block of channels, tile,
          sample); those that join what tiles found have one for each (group, sample).
Small     Where all pixels of a group fit one tile, one kernel does everything, with a program for each (group, sample).
          Backward goes through it PART pixels at a time: whole, a large tile spills on some cards
Order     `gn_out_kernel` and `gn_dx_kernel` read again what the kernel before them read, and walk backwards: what it
          read last is what the L2 cache still holds.
Two       x may lie in two tensors, as a skip connection does beside what it is joined to: channels from SPLIT on are in
          `more`. What is the size of x is read through `_load_input`, out and its gradient are whole
Padding   Read, as 16-byte loads want whole rows, and replaced by zeros. rstd is 0 there too: so are out and dx.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, time_ptr, pixel, channel, pixels, C: tl.constexpr, READ: tl.constexpr, ROW: tl.constexpr):
    """(pixel, channel) in fp32, plus time; 0 past the last pixel and past channel C."""
    there = (pixel < pixels)[:, None]
    # READ >= C is the row's length: a mask that changes at a multiple of 8 leaves 16-byte loads whole
    mask = there & (channel < READ)[None, :]
    tile = tl.load(ptr + pixel[:, None] * ROW + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if time_ptr is not None:
        tile += _load_channels(time_ptr, channel, C)
    return tl.where(there & (channel < C)[None, :], tile, 0.0)


@triton.jit
def _load_input(
    x_ptr, more_ptr, time_ptr, first, pixel, channel, pixels,
    C: tl.constexpr, ROW: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """As `_load`, of x from pixel `first` on; where there is `more`, it holds the channels from SPLIT on."""
    if more_ptr is None:
        tile = _load(x_ptr + first * ROW, time_ptr, pixel, channel, pixels, C, ROW, ROW)
    else:
        there = (pixel < pixels)[:, None]
        x_at = x_ptr + first * SPLIT + pixel[:, None] * SPLIT + channel[None, :]
        x = tl.load(x_at, mask=there & (channel < SPLIT)[None, :], other=0.0)
        more_at = more_ptr + first * (ROW - SPLIT) + pixel[:, None] * (ROW - SPLIT) + (channel - SPLIT)[None, :]
        more = tl.load(more_at, mask=there & ((channel >= SPLIT) & (channel < ROW))[None, :], other=0.0)
        tile = x.to(tl.float32) + more.to(tl.float32)  # one of them is 0
    return tile


@triton.jit
def _load_channels(ptr, channel, C: tl.constexpr):
    return tl.load(ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(ptr, tile, pixel, channel, pixels, WRITE: tl.constexpr, ROW: tl.constexpr):
    mask = (pixel < pixels)[:, None] & (channel < WRITE)[None, :]
    tl.store(ptr + pixel[:, None] * ROW + channel[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_input(
    x_ptr, more_ptr, tile, first, pixel, channel, pixels, ROW: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """What `_load_input` reads, written."""
    if more_ptr is None:
        _store(x_ptr + first * ROW, tile, pixel, channel, pixels, ROW, ROW)
    else:
        _store(x_ptr + first * SPLIT, tile, pixel, channel, pixels, SPLIT, SPLIT)
        mask = (pixel < pixels)[:, None] & ((channel >= SPLIT) & (channel < ROW))[None, :]
        at = more_ptr + first * (ROW - SPLIT) + pixel[:, None] * (ROW - SPLIT) + (channel - SPLIT)[None, :]
        tl.store(at, tile.to(more_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _plus_skip(dx, dskip_ptr, row, pixel, channel, pixels, READ: tl.constexpr):
    """dx and the gradient that came to x another way; `row` elements lie between its pixels."""
    if dskip_ptr is not None:
        mask = (pixel < pixels)[:, None] & (channel < READ)[None, :]
        dx += tl.load(dskip_ptr + pixel[:, None] * row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    return dx


@triton.jit
def _silu(y, SILU: tl.constexpr):
    if SILU:
        y *= tl.sigmoid(y)
    return y


@triton.jit
def _xhat_dy(
    dout_ptr, x, weight_ptr, bias_ptr, mean, rstd, pixel, channel, pixels,
    C: tl.constexpr, READ: tl.constexpr, ROW: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Recomputed from x: xhat, and the gradient dy of weight * xhat + bias; that is 0 where there is no dout."""
    xhat = (x - mean) * rstd
    dy = _load(dout_ptr, None, pixel, channel, pixels, C, READ, ROW)
    if SILU:
        y = xhat * _load_channels(weight_ptr, channel, C) + _load_channels(bias_ptr, channel, C)
        s = tl.sigmoid(y)
        dy *= s * (1.0 + y * (1.0 - s))
    return xhat, dy


@triton.jit
def _place(HW, TILE: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARDS: tl.constexpr):
    """Of this program: sample, tile, first pixel of all, pixels from there on, pixels and channels."""
    k, b = tl.program_id(1), tl.program_id(2)
    if BACKWARDS:
        k, b = tl.num_programs(1) - 1 - k, tl.num_programs(2) - 1 - b
    k, b = k.to(tl.int64), b.to(tl.int64)
    pixel, channel = tl.arange(0, TILE), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return b, k, b * HW + k * TILE, (HW - k * TILE).to(tl.int32), pixel, channel


@triton.jit
def _load_groups(ptr, channel, C: tl.constexpr, WIDTH: tl.constexpr):
    """What a sample has for the group of each channel; 0 in the padding."""
    return tl.load(ptr + channel // WIDTH, mask=channel < C, other=0.0)[None, :]


@triton.jit
def _sum_rows(ptr, rows, columns, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_N,) sums over rows of C elements, always in the same order."""
    channel = tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    start = 0
    while start < rows:  # not `range`: the interpreter cannot count to a runtime number
        k = start + tl.arange(0, BLOCK_K)[:, None]
        total += tl.load(ptr + k * C + channel, mask=(k < rows) & (channel < columns), other=0.0)
        start += BLOCK_K
    return tl.sum(total, axis=0)


# --- forward --------------------------------------------------------------------------------


@triton.jit
def gn_small_fwd_kernel(
    x_ptr,  # (B, HW, C)
    time_ptr,  # (B, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    out_ptr,  # (B, HW, C)
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    HW,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixel, channel = tl.arange(0, TILE), tl.arange(0, BLOCK_W)
    first = b * HW * C + g * WIDTH
    if time_ptr is not None:
        time_ptr += b * C + g * WIDTH
    h = _load(x_ptr + first, time_ptr, pixel, channel, HW, WIDTH, WIDTH, C)
    mean = tl.sum(h) / (HW * WIDTH)
    d = tl.where((pixel < HW)[:, None] & (channel < WIDTH)[None, :], h - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d) / (HW * WIDTH) + eps)
    w = _load_channels(weight_ptr + g * WIDTH, channel, WIDTH)
    y = d * rstd * w + _load_channels(bias_ptr + g * WIDTH, channel, WIDTH)
    _store(out_ptr + first, _silu(y, SILU), pixel, channel, HW, WIDTH, C)
    at = b * (C // WIDTH) + g
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, rstd)


@triton.jit
def gn_tile_moments_kernel(
    x_ptr,  # (B, HW, SPLIT)
    more_ptr,  # (B, HW, ROW - SPLIT), or None: x has all of ROW
    time_ptr,  # (B, ROW) or None
    tile_mean_ptr,  # (B, K, C) fp32
    tile_m2_ptr,  # (B, K, C) fp32, sums of squares about tile_mean
    HW,
    C: tl.constexpr,
    ROW: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, k, first, pixels, pixel, channel = _place(HW, TILE, BLOCK_C, False)
    if time_ptr is not None:
        time_ptr += b * ROW
    h = _load_input(x_ptr, more_ptr, time_ptr, first, pixel, channel, pixels, C, ROW, SPLIT)
    mean = tl.sum(h, axis=0) / tl.minimum(pixels, TILE)
    d = tl.where((pixel < pixels)[:, None], h - mean[None, :], 0.0)
    at = (b * tl.num_programs(1) + k) * C + channel
    tl.store(tile_mean_ptr + at, mean, mask=channel < C)
    tl.store(tile_m2_ptr + at, tl.sum(d * d, axis=0), mask=channel < C)


@triton.jit
def gn_moments_kernel(
    tile_mean_ptr,  # (B, K, C) fp32
    tile_m2_ptr,  # (B, K, C) fp32
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    HW,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    K = tl.cdiv(HW, TILE)
    channel = tl.arange(0, BLOCK_W)[None, :]
    first = b * K * C + g * WIDTH
    total = tl.zeros((BLOCK_K, BLOCK_W), tl.float32)
    start = 0
    while start < K:
        k = start + tl.arange(0, BLOCK_K)[:, None]
        tile_mean = tl.load(tile_mean_ptr + first + k * C + channel, mask=(k < K) & (channel < WIDTH), other=0.0)
        total += tl.minimum(HW - k * TILE, TILE) * tile_mean
        start += BLOCK_K
    mean = tl.sum(total) / (HW * WIDTH)
    total = tl.zeros((BLOCK_K, BLOCK_W), tl.float32)
    start = 0
    while start < K:
        k = start + tl.arange(0, BLOCK_K)[:, None]
        mask = (k < K) & (channel < WIDTH)
        d = tl.load(tile_mean_ptr + first + k * C + channel, mask=mask, other=0.0) - mean
        m2 = tl.load(tile_m2_ptr + first + k * C + channel, mask=mask, other=0.0)
        total += tl.where(mask, m2 + tl.minimum(HW - k * TILE, TILE) * d * d, 0.0)
        start += BLOCK_K
    at = b * (C // WIDTH) + g
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, 1.0 / tl.sqrt(tl.sum(total) / (HW * WIDTH) + eps))


@triton.jit
def gn_out_kernel(
    x_ptr,  # (B, HW, SPLIT)
    more_ptr,  # (B, HW, ROW - SPLIT), or None: x has all of ROW
    time_ptr,  # (B, ROW) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    out_ptr,  # (B, HW, ROW)
    HW,
    C: tl.constexpr,
    ROW: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, _, first, pixels, pixel, channel = _place(HW, TILE, BLOCK_C, True)
    if time_ptr is not None:
        time_ptr += b * ROW
    mean = _load_groups(mean_ptr + b * (C // WIDTH), channel, C, WIDTH)
    rstd = _load_groups(rstd_ptr + b * (C // WIDTH), channel, C, WIDTH)
    h = _load_input(x_ptr, more_ptr, time_ptr, first, pixel, channel, pixels, C, ROW, SPLIT)
    xhat = (h - mean) * rstd
    y = xhat * _load_channels(weight_ptr, channel, C) + _load_channels(bias_ptr, channel, C)
    _store(out_ptr + first * ROW, _silu(y, SILU), pixel, channel, pixels, ROW, ROW)


# --- backward -------------------------------------------------------------------------------


@triton.jit
def gn_small_bwd_kernel(
    dout_ptr,  # (B, HW, C)
    x_ptr,  # (B, HW, C)
    time_ptr,  # (B, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    dx_ptr,  # (B, HW, C)
    dtime_ptr,  # (B, C) or None
    dweight_ptr,  # (B, C) fp32, of each sample
    dbias_ptr,  # (B, C) fp32, of each sample
    dskip_ptr,  # (B, HW, C) or None, of any distance between pixels
    skip_row,
    HW,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_W)
    first, row = b * HW * C + g * WIDTH, b * C + g * WIDTH
    dout_ptr, x_ptr, weight_ptr, bias_ptr = (
        dout_ptr + first,
        x_ptr + first,
        weight_ptr + g * WIDTH,
        bias_ptr + g * WIDTH,
    )
    if time_ptr is not None:
        time_ptr += row
    if dskip_ptr is not None:
        dskip_ptr += b * HW * skip_row + g * WIDTH
    mean, rstd = tl.load(mean_ptr + b * (C // WIDTH) + g), tl.load(rstd_ptr + b * (C // WIDTH) + g)
    w = _load_channels(weight_ptr, channel, WIDTH)
    dweight, dbias = tl.zeros((BLOCK_W,), tl.float32), tl.zeros((BLOCK_W,), tl.float32)
    for start in range(0, TILE, PART):
        pixel = start + tl.arange(0, PART)
        x = _load(x_ptr, time_ptr, pixel, channel, HW, WIDTH, WIDTH, C)
        xhat, dy = _xhat_dy(dout_ptr, x, weight_ptr, bias_ptr, mean, rstd, pixel, channel, HW, WIDTH, WIDTH, C, SILU)
        dweight += tl.sum(dy * xhat, axis=0)
        dbias += tl.sum(dy, axis=0)
    tl.store(dweight_ptr + row + channel, dweight, mask=channel < WIDTH)
    tl.store(dbias_ptr + row + channel, dbias, mask=channel < WIDTH)
    c0, c1 = tl.sum(dbias[None, :] * w) / (HW * WIDTH), tl.sum(dweight[None, :] * w) / (HW * WIDTH)
    dtime = tl.zeros((BLOCK_W,), tl.float32)
    for start in range(0, TILE, PART):
        # again, out of the L1 cache: kept in registers, the two tiles spill
        pixel = start + tl.arange(0, PART)
        x = _load(x_ptr, time_ptr, pixel, channel, HW, WIDTH, WIDTH, C)
        xhat, dy = _xhat_dy(dout_ptr, x, weight_ptr, bias_ptr, mean, rstd, pixel, channel, HW, WIDTH, WIDTH, C, SILU)
        dx = (dy * w - c0 - xhat * c1) * rstd
        if dtime_ptr is not None:
            dtime += tl.sum(tl.where((pixel < HW)[:, None], dx, 0.0), axis=0)
        dx = _plus_skip(dx, dskip_ptr, skip_row, pixel, channel, HW, WIDTH)
        _store(dx_ptr + first, dx, pixel, channel, HW, WIDTH, C)
    if dtime_ptr is not None:
        tl.store(dtime_ptr + row + channel, dtime.to(dtime_ptr.dtype.element_ty), mask=channel < WIDTH)


@triton.jit
def gn_tile_sums_kernel(
    dout_ptr,  # (B, HW, ROW)
    x_ptr,  # (B, HW, SPLIT)
    more_ptr,  # (B, HW, ROW - SPLIT), or None: x has all of ROW
    time_ptr,  # (B, ROW) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    dy_ptr,  # (B, K, C) fp32, sums of dy
    dy_xhat_ptr,  # (B, K, C) fp32, sums of dy * xhat
    xhat_ptr,  # (B, K, C) fp32, sums of xhat, or None if there is no time
    HW,
    C: tl.constexpr,
    ROW: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, k, first, pixels, pixel, channel = _place(HW, TILE, BLOCK_C, False)
    if time_ptr is not None:
        time_ptr += b * ROW
    mean = _load_groups(mean_ptr + b * (C // WIDTH), channel, C, WIDTH)
    rstd = _load_groups(rstd_ptr + b * (C // WIDTH), channel, C, WIDTH)
    x = _load_input(x_ptr, more_ptr, time_ptr, first, pixel, channel, pixels, C, ROW, SPLIT)
    dout_ptr += first * ROW
    xhat, dy = _xhat_dy(dout_ptr, x, weight_ptr, bias_ptr, mean, rstd, pixel, channel, pixels, C, ROW, ROW, SILU)
    at = (b * tl.num_programs(1) + k) * C + channel
    tl.store(dy_ptr + at, tl.sum(dy, axis=0), mask=channel < C)
    tl.store(dy_xhat_ptr + at, tl.sum(dy * xhat, axis=0), mask=channel < C)
    if xhat_ptr is not None:
        xhat = tl.where((pixel < pixels)[:, None], xhat, 0.0)
        tl.store(xhat_ptr + at, tl.sum(xhat, axis=0), mask=channel < C)


@triton.jit
def gn_means_kernel(
    dy_ptr,  # (B, K, C) fp32
    dy_xhat_ptr,  # (B, K, C) fp32
    xhat_ptr,  # (B, K, C) fp32 or None
    weight_ptr,  # (C,)
    rstd_ptr,  # (B, G) fp32
    c0_ptr,  # (B, G) fp32, mean of weight * dy
    c1_ptr,  # (B, G) fp32, mean of weight * dy * xhat
    dtime_ptr,  # (B, ROW) or None
    dweight_ptr,  # (B, C) fp32, of each sample
    dbias_ptr,  # (B, C) fp32, of each sample
    HW,
    K,
    C: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_W)
    first, row = b * K * C + g * WIDTH, b * C + g * WIDTH
    dbias = _sum_rows(dy_ptr + first, K, WIDTH, C, BLOCK_W, BLOCK_K)
    dweight = _sum_rows(dy_xhat_ptr + first, K, WIDTH, C, BLOCK_W, BLOCK_K)
    w = tl.load(weight_ptr + g * WIDTH + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    tl.store(dweight_ptr + row + channel, dweight, mask=channel < WIDTH)
    tl.store(dbias_ptr + row + channel, dbias, mask=channel < WIDTH)
    c0, c1 = tl.sum(dbias * w) / (HW * WIDTH), tl.sum(dweight * w) / (HW * WIDTH)
    at = b * (C // WIDTH) + g
    tl.store(c0_ptr + at, c0)
    tl.store(c1_ptr + at, c1)
    if dtime_ptr is not None:
        # the sum of dx over the pixels, before there is dx
        xhat = _sum_rows(xhat_ptr + first, K, WIDTH, C, BLOCK_W, BLOCK_K)
        dtime = (dbias * w - HW * c0 - xhat * c1) * tl.load(rstd_ptr + at)
        at = b * ROW + g * WIDTH + channel
        tl.store(dtime_ptr + at, dtime.to(dtime_ptr.dtype.element_ty), mask=channel < WIDTH)


@triton.jit
def gn_dx_kernel(
    dout_ptr,  # (B, HW, ROW)
    x_ptr,  # (B, HW, SPLIT)
    more_ptr,  # (B, HW, ROW - SPLIT), or None: x has all of ROW
    time_ptr,  # (B, ROW) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    c0_ptr,  # (B, G) fp32
    c1_ptr,  # (B, G) fp32
    dx_ptr,  # (B, HW, SPLIT)
    dmore_ptr,  # (B, HW, ROW - SPLIT) or None
    dskip_ptr,  # (B, HW, ROW) or None, of any distance between pixels
    skip_row,
    HW,
    C: tl.constexpr,
    ROW: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, _, first, pixels, pixel, channel = _place(HW, TILE, BLOCK_C, True)
    if time_ptr is not None:
        time_ptr += b * ROW
    groups = b * (C // WIDTH)
    mean = _load_groups(mean_ptr + groups, channel, C, WIDTH)
    rstd = _load_groups(rstd_ptr + groups, channel, C, WIDTH)
    c0 = _load_groups(c0_ptr + groups, channel, C, WIDTH)
    c1 = _load_groups(c1_ptr + groups, channel, C, WIDTH)
    x = _load_input(x_ptr, more_ptr, time_ptr, first, pixel, channel, pixels, C, ROW, SPLIT)
    dout_ptr += first * ROW
    xhat, dy = _xhat_dy(dout_ptr, x, weight_ptr, bias_ptr, mean, rstd, pixel, channel, pixels, C, ROW, ROW, SILU)
    dx = (dy * _load_channels(weight_ptr, channel, C) - c0 - xhat * c1) * rstd
    if dskip_ptr is not None:
        dskip_ptr += first * skip_row
    dx = _plus_skip(dx, dskip_ptr, skip_row, pixel, channel, pixels, ROW)
    _store_input(dx_ptr, dmore_ptr, dx, first, pixel, channel, pixels, ROW, SPLIT)


@triton.jit
def gn_affine_grads_kernel(
    sample_dweight_ptr,  # (B, C) fp32
    sample_dbias_ptr,  # (B, C) fp32
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    B,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_C
    channel = first + tl.arange(0, BLOCK_C)
    dweight = _sum_rows(sample_dweight_ptr + first, B, C - first, C, BLOCK_C, BLOCK_K)
    dbias = _sum_rows(sample_dbias_ptr + first, B, C - first, C, BLOCK_C, BLOCK_K)
    tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=channel < C)
    tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=channel < C)
