"""GroupNorm and SiLU on channels_last activations, with the time embedding added before and any number of groups.

    h    = x + time                            time: one value per sample and channel, or none
    xhat = (h - mean) * rstd                   over the pixels and the W = C / G channels of a group
    y    = weight * xhat + bias                out = y * sigmoid(y), or y
    dx   = rstd * (weight * dy - mean(weight * dy) - xhat * mean(weight * dy * xhat)), dtime = sum of dx over pixels
           and then, where x is used again behind the norm: dx + dskip, the gradient of that use

Why fused  eager PyTorch copies channels_last to NCHW and back, and stores h, y and the cropped and padded copies;
           here: nothing the size of x is stored but out, and backward recomputes y from x. A residual connection
           around the norm gives x two gradients, which eager adds in a kernel of its own

Shapes     x, out: (B, C + padding, H, W); time: (B, C + padding); weight, bias: (C,); mean, rstd: (B, G)
Dtypes     x: fp32 | fp16 | bf16; weight, bias, time: that or fp32; arithmetic and mean, rstd in fp32
Layout     x and out channels_last, time contiguous; anything else is refused. dskip: pixels of any distance (it may
           be a part of the gradient of a concatenation); of another layout it is copied
           padding: not looked at in x and dout, zero in out, dx and dtime
           x may come in two tensors: a skip connection need not be copied behind what it is joined to
Numerics   variance from centred squares: those of a tile about the tile's mean, tiles joined by Chan's formula;
           sums of tiles are stored and added in a second pass: no atomics, the same bits every run
Traffic    n elements in x. Least: forward 2n, backward 3n, as where a group fits one tile (backward reads that tile
           again, out of the L1 cache). Elsewhere 3n and 5n, less what the L2 cache still holds: the second reading
           walks backwards. dskip is n more; the sums of tiles add 16 to 24 bytes for each 128 elements
Source     arXiv:1803.08494; joining of tiles: Chan, Golub and LeVeque, "Updating formulae", 1979
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bilevel_kernels import group_norm_kernels as kernels

KIND = "norm"
TILE, BLOCK_C = 128, 64  # pixels and channels of a program: rows of 128 B in 16 bit
SMALL = 32768  # most bytes of a tile that holds a whole group
THREAD = 64  # bytes of x in a thread's hands; more cost registers and with them occupancy
PART = 4096  # elements of such a tile that backward holds at a time
BLOCK_K = 32  # tiles, or samples, that the second passes add at a time


# --- reference ------------------------------------------------------------------------------


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    time: Tensor | None = None,
    padding: int = 0,
    silu: bool = True,
) -> Tensor:
    """The formula, in the dtype of x: the oracle of the tests and the `torch` backend."""
    h = x if time is None else x + time.to(x.dtype)[:, :, None, None]
    h = h[:, : x.shape[1] - padding]
    y = F.group_norm(h, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.pad(F.silu(y) if silu else y, (0, 0, 0, 0, 0, padding))


# --- kernels --------------------------------------------------------------------------------
# In group_norm_kernels.py: tiles of TILE pixels and BLOCK_C channels and what joins them, or all pixels of a group.


# --- launchers ------------------------------------------------------------------------------


def _small_config(x: Tensor, padding: int, groups: int) -> dict[str, int] | None:
    """Of the kernels that hold a whole group of a sample in one tile; None where there is none."""
    pixels, width = x.shape[2] * x.shape[3], (x.shape[1] - padding) // groups
    if padding or not _one_tile(pixels, width, x.itemsize):  # padding is no group's: nobody would write it
        return None
    tile, block = triton.next_power_of_2(pixels), triton.next_power_of_2(width)
    return {"WIDTH": width, "TILE": tile, "BLOCK_W": block, "num_warps": _warps(tile * block, x)}


def _one_tile(pixels: int, width: int, itemsize: int) -> bool:
    """Whether a tile holds a whole group of a sample."""
    return triton.next_power_of_2(pixels) * triton.next_power_of_2(width) * itemsize <= SMALL


def _warps(elements: int, x: Tensor) -> int:
    return max(1, elements * x.itemsize // (32 * THREAD))


def _tiled_fwd(
    inputs: tuple[Tensor, Tensor | None],
    time: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    groups: int,
    eps: float,
    C: int,
    silu: bool,
) -> None:
    """Three launches; the second of `inputs` holds the channels behind those of the first."""
    out, mean, rstd = results
    B, ROW, H, W = out.shape
    HW, K, WIDTH = H * W, triton.cdiv(H * W, TILE), C // groups
    BLOCK_W = triton.next_power_of_2(WIDTH)
    tiles = (triton.cdiv(ROW, BLOCK_C), K, B)
    sizes = {"C": C, "ROW": ROW, "SPLIT": inputs[0].shape[1], "TILE": TILE, "BLOCK_C": BLOCK_C}
    sizes |= {"num_warps": _warps(TILE * BLOCK_C, out)}
    tile_mean, tile_m2 = (torch.empty(B, K, C, dtype=torch.float32, device=out.device) for _ in range(2))
    kernels.gn_tile_moments_kernel[tiles](*inputs, time, tile_mean, tile_m2, HW, **sizes)
    kernels.gn_moments_kernel[(groups, B)](
        tile_mean, tile_m2, mean, rstd, HW, eps, C=C, WIDTH=WIDTH, TILE=TILE, BLOCK_W=BLOCK_W, BLOCK_K=BLOCK_K
    )
    kernels.gn_out_kernel[tiles](*inputs, time, weight, bias, mean, rstd, out, HW, WIDTH=WIDTH, SILU=silu, **sizes)


def _tiled_bwd(
    dout: Tensor,
    inputs: tuple[Tensor, Tensor | None],
    time: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None],
    dtime: Tensor | None,
    per_sample: list[Tensor],
    skip: tuple[Tensor | None, int],
    C: int,
    silu: bool,
) -> None:
    """Three launches; `gradients` are those of `inputs`."""
    mean, rstd = statistics
    (B, ROW, H, W), groups = dout.shape, mean.shape[1]
    HW, K, WIDTH = H * W, triton.cdiv(H * W, TILE), C // groups
    BLOCK_W = triton.next_power_of_2(WIDTH)
    tiles = (triton.cdiv(ROW, BLOCK_C), K, B)
    sizes = {"C": C, "ROW": ROW, "WIDTH": WIDTH}
    config = {"SPLIT": inputs[0].shape[1], "SILU": silu, "TILE": TILE, "BLOCK_C": BLOCK_C}
    config |= {"num_warps": _warps(TILE * BLOCK_C, dout)}
    read = (dout, *inputs, time, weight, bias, mean, rstd)
    sums = [torch.empty(B, K, C, dtype=torch.float32, device=dout.device) for _ in range(2 if time is None else 3)]
    sums += [None] * (3 - len(sums))
    c0, c1 = (torch.empty_like(mean) for _ in range(2))
    kernels.gn_tile_sums_kernel[tiles](*read, *sums, HW, **sizes, **config)
    kernels.gn_means_kernel[(groups, B)](
        *sums, weight, rstd, c0, c1, dtime, *per_sample, HW, K, **sizes, BLOCK_W=BLOCK_W, BLOCK_K=BLOCK_K
    )
    kernels.gn_dx_kernel[tiles](*read, c0, c1, *gradients, *skip, HW, **sizes, **config)


def _affine_grads(per_sample: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    B, C = per_sample[0].shape
    grid = (triton.cdiv(C, BLOCK_C),)
    kernels.gn_affine_grads_kernel[grid](*per_sample, dweight, dbias, B, C=C, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K)
    return dweight, dbias


@torch.library.custom_op("bilevel_kernels::group_norm_silu_fwd", mutates_args=())
def group_norm_silu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, time: Tensor | None, groups: int, eps: float, padding: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, ROW, H, W = x.shape
    HW, C = H * W, ROW - padding
    out = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (torch.empty(B, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    small = _small_config(x, padding, groups)
    if small:
        kernels.gn_small_fwd_kernel[(groups, B)](
            x, time, weight, bias, out, mean, rstd, HW, eps, C=C, SILU=silu, **small
        )
        return out, mean, rstd
    _tiled_fwd((x, None), time, weight, bias, (out, mean, rstd), groups, eps, C, silu)
    return out, mean, rstd


@torch.library.custom_op("bilevel_kernels::group_norm_silu_bwd", mutates_args=())
def group_norm_silu_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    time: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    padding: int,
    silu: bool,
    dskip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dtime), dtime empty where there is no time."""
    B, ROW, H, W = x.shape
    HW, C = H * W, ROW - padding
    inputs = (dout, x, time, weight, bias, mean, rstd)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dtime = None if time is None else torch.zeros_like(time)
    per_sample = [torch.empty(B, C, dtype=torch.float32, device=x.device) for _ in range(2)]
    skip = (dskip, 0 if dskip is None else _pixel_stride(dskip))
    small = _small_config(x, padding, groups)
    if small:
        sizes = {"C": C, "PART": max(1, min(small["TILE"], PART // small["BLOCK_W"])), **small}
        kernels.gn_small_bwd_kernel[(groups, B)](*inputs, dx, dtime, *per_sample, *skip, HW, SILU=silu, **sizes)
    else:
        shared = (time, weight, bias, (mean, rstd), (dx, None), dtime, per_sample, skip)
        _tiled_bwd(dout, (x, None), *shared, C, silu)
    return dx, *_affine_grads(per_sample, weight, bias), x.new_empty(0) if dtime is None else dtime


@torch.library.custom_op("bilevel_kernels::group_norm_silu_two_fwd", mutates_args=())
def group_norm_silu_two_fwd(
    x: Tensor, more: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[1] + more.shape[1]
    out = _whole(x, more)
    mean, rstd = (torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device) for _ in range(2))
    _tiled_fwd((x, more), None, weight, bias, (out, mean, rstd), groups, eps, C, silu)
    return out, mean, rstd


@torch.library.custom_op("bilevel_kernels::group_norm_silu_two_bwd", mutates_args=())
def group_norm_silu_two_bwd(
    dout: Tensor,
    x: Tensor,
    more: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    dskip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dmore, dweight, dbias)."""
    B, C = dout.shape[:2]
    gradients = tuple(torch.empty_like(t, memory_format=torch.channels_last) for t in (x, more))
    per_sample = [torch.empty(B, C, dtype=torch.float32, device=x.device) for _ in range(2)]
    skip = (dskip, 0 if dskip is None else _pixel_stride(dskip))
    shared = (None, weight, bias, (mean, rstd), gradients, None, per_sample, skip)
    _tiled_bwd(dout, (x, more), *shared, C, silu)  # pyright: ignore[reportArgumentType]
    return *gradients, *_affine_grads(per_sample, weight, bias)  # pyright: ignore[reportReturnType]


def _whole(x: Tensor, more: Tensor) -> Tensor:
    """(B, C_x + C_more, H, W) channels_last, uninitialised."""
    shape = (x.shape[0], x.shape[1] + more.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# --- autograd -------------------------------------------------------------------------------


@group_norm_silu_fwd.register_fake
def _(x, weight, bias, time, groups, eps, padding, silu):
    statistics = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), *statistics


@group_norm_silu_bwd.register_fake
def _(dout, x, weight, bias, time, mean, rstd, groups, padding, silu, dskip=None):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dtime = x.new_empty(0) if time is None else torch.empty_like(time)
    return dx, torch.empty_like(weight), torch.empty_like(bias), dtime


@group_norm_silu_two_fwd.register_fake
def _(x, more, weight, bias, groups, eps, silu):
    return _whole(x, more), *(x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))


@group_norm_silu_two_bwd.register_fake
def _(dout, x, more, weight, bias, mean, rstd, silu, dskip):
    gradients = (torch.empty_like(t, memory_format=torch.channels_last) for t in (x, more))
    return *gradients, torch.empty_like(weight), torch.empty_like(bias)


def _setup(ctx, inputs, output):
    x, weight, bias, time, ctx.groups, _, ctx.padding, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, time, mean, rstd)


def _backward(ctx, dout, _dmean, _drstd):
    dout = dout.contiguous(memory_format=torch.channels_last)
    *grads, dtime = group_norm_silu_bwd(dout, *ctx.saved_tensors, ctx.groups, ctx.padding, ctx.silu)
    return *grads, dtime if ctx.needs_input_grad[3] else None, None, None, None, None


group_norm_silu_fwd.register_autograd(_backward, setup_context=_setup)


class _NormAndInput(torch.autograd.Function):
    """out, and x once more: so the gradient of what else is done with x comes to the same backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, time, groups, eps, padding, silu):
        out, mean, rstd = group_norm_silu_fwd(x, weight, bias, time, groups, eps, padding, silu)
        ctx.groups, ctx.padding, ctx.silu = groups, padding, silu
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, time, mean, rstd)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx, dout, dskip):
        x = ctx.saved_tensors[0]
        dout = torch.zeros_like(x) if dout is None else dout.contiguous(memory_format=torch.channels_last)
        if dskip is not None and not _pixel_stride(dskip):
            dskip = dskip.contiguous(memory_format=torch.channels_last)
        *grads, dtime = group_norm_silu_bwd(dout, *ctx.saved_tensors, ctx.groups, ctx.padding, ctx.silu, dskip)
        return *grads, dtime if ctx.needs_input_grad[3] else None, None, None, None, None


class _NormOfTwo(torch.autograd.Function):
    """As `_NormAndInput`, of an input in two parts."""

    @staticmethod
    def forward(ctx, x, more, weight, bias, groups, eps, silu):
        out, mean, rstd = group_norm_silu_two_fwd(x, more, weight, bias, groups, eps, silu)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, more, weight, bias, mean, rstd)
        return out, x.view_as(x), more.view_as(more)

    @staticmethod
    def backward(ctx, dout, *dparts):
        x, more = ctx.saved_tensors[:2]
        dout = torch.zeros_like(_whole(x, more)) if dout is None else dout
        dout = dout.contiguous(memory_format=torch.channels_last)
        grads = group_norm_silu_two_bwd(dout, *ctx.saved_tensors, ctx.silu, _joined(dparts, (x, more)))
        return *grads, None, None, None


def _joined(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
    """What parts along channels are parts of: without a copy where they lie side by side in it."""
    if all(part is None for part in parts):
        return None
    first, second = (torch.zeros_like(x) if part is None else part for part, x in zip(parts, like, strict=True))
    row, channels = _pixel_stride(first), first.shape[1] + second.shape[1]
    of_one = first.untyped_storage()._cdata == second.untyped_storage()._cdata and first.stride() == second.stride()
    if of_one and row >= channels and first.storage_offset() + first.shape[1] == second.storage_offset():
        return first.as_strided((first.shape[0], channels, *first.shape[2:]), first.stride())
    return torch.cat([first, second], dim=1).contiguous(memory_format=torch.channels_last)


def _pixel_stride(x: Tensor) -> int:
    """Elements from one pixel of x (B, C, H, W) to the next, where channels are neighbours; 0 if there is no such."""
    B, C, H, W = x.shape
    row = x.stride(3) if W > 1 else x.stride(2) if H > 1 else x.stride(0) if B > 1 else C
    wanted = (H * W * row, 1, W * row, row)
    fits = all(size == 1 or stride == want for size, stride, want in zip(x.shape, x.stride(), wanted, strict=True))
    return row if fits and row >= C else 0


# --- public ---------------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    time: Tensor | None = None,
    padding: int = 0,
    silu: bool = True,
) -> Tensor:
    """SiLU of GroupNorm of `x + time`; `group_norm_silu_and_input` returns x as well.

    Args:
        x: (B, C + padding, H, W), channels_last.
        weight, bias: (C,), in the dtype of x or fp32.
        groups: How many groups the C channels form; it divides C.
        eps: Added to the variance.
        time: (B, C + padding), added to every pixel; in the dtype of x or fp32.
        padding: Channels at the end that only align the storage: no part of any group, zeros in the result.
        silu: False for plain GroupNorm.

    Returns:
        (B, C + padding, H, W) in the dtype of x, channels_last.

    Raises:
        ValueError: A shape, dtype, device or layout is another one.
    """
    _check(x, weight, bias, groups, time, padding)
    return group_norm_silu_fwd(x, weight, bias, time, groups, eps, padding, silu)[0]


def group_norm_silu_and_input(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    time: Tensor | None = None,
    padding: int = 0,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `group_norm_silu`, and x itself for the residual connection around it.

    Whoever goes on with the second result instead of x spares autograd an add: backward takes the gradients of both in
    one pass. It shares the memory of x and must not be written to.
    """
    _check(x, weight, bias, groups, time, padding)
    out, again = _NormAndInput.apply(x, weight, bias, time, groups, eps, padding, silu)  # pyright: ignore[reportGeneralTypeIssues]
    return out, again


def group_norm_silu_of_two(
    x: Tensor, more: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = True
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """SiLU of GroupNorm of x and `more` one behind the other, which are not joined for it; and what to go on with.

    Args:
        x, more: (B, C_i, H, W) of one dtype, channels_last.
        weight, bias: (C_x + C_more,), in the dtype of x or fp32.
        groups: How many groups these channels form; it divides their number. One may lie in both tensors.
        eps: Added to the variance.
        silu: False for plain GroupNorm.

    Returns:
        The result, and x and `more` for the connection around the norm, as `group_norm_silu_and_input` returns x.
        Where groups are so small that a tile holds one, they are joined all the same, and that is one tensor.

    Raises:
        ValueError: A shape, dtype, device or layout is another one.
    """
    if x.dim() != 4 or more.dim() != 4 or (more.shape[0], *more.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise ValueError(f"more: shape {tuple(more.shape)}, expected that of x, {tuple(x.shape)}, but for channels")
    if (more.dtype, more.device) != (x.dtype, x.device):
        raise ValueError(f"more: {more.dtype} on {more.device}, x is {x.dtype} on {x.device}")
    C = x.shape[1] + more.shape[1]
    for name, t in (("x", x), ("more", more)):
        _check_map(name, t)
    _check_channels(x, C, groups, weight, bias)
    if _one_tile(x.shape[2] * x.shape[3], C // groups, x.itemsize):
        out, again = group_norm_silu_and_input(torch.cat([x, more], 1), weight, bias, groups, eps, silu=silu)
        return out, (again,)
    out, *again = _NormOfTwo.apply(x, more, weight, bias, groups, eps, silu)  # pyright: ignore[reportGeneralTypeIssues]
    return out, tuple(again)


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, time: Tensor | None, padding: int) -> None:
    _check_map("x", x)
    if not 0 <= padding < x.shape[1]:
        raise ValueError(f"padding: {padding} of {x.shape[1]} channels")
    _check_channels(x, x.shape[1] - padding, groups, weight, bias, time)


def _check_map(name: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected (B, C + padding, H, W) and at least one element")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: {x.dtype}, expected float32, float16 or bfloat16")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name}: strides {x.stride()} of shape {tuple(x.shape)} are not channels_last")


def _check_channels(x: Tensor, C: int, groups: int, weight: Tensor, bias: Tensor, time: Tensor | None = None) -> None:
    if groups < 1 or C % groups:
        raise ValueError(f"groups: {groups} do not divide {C} channels")
    for name, t, shape in (("weight", weight, (C,)), ("bias", bias, (C,)), ("time", time, x.shape[:2])):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {tuple(shape)}")
        if t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}: {t.dtype}, expected {x.dtype} or float32")
        if t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, x is on {x.device}")
        if not t.is_contiguous():
            raise ValueError(f"{name}: strides {t.stride()} of shape {tuple(t.shape)} are not contiguous")


def group_norm_silu_bytes(elements: int, itemsize: int, backward: bool) -> int:
    """Least bytes moved: forward reads x and writes out; backward reads dout and x and writes dx."""
    return (3 if backward else 2) * elements * itemsize
