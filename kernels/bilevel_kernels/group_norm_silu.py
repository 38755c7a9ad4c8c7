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
Numerics   variance from centred squares: those of a tile about the tile's mean, tiles joined by Chan's formula;
           sums of tiles are stored and added in a second pass: no atomics, the same bits every run
Traffic    n elements in x. Least: forward 2n, backward 3n, as where a group fits one tile (backward reads that tile
           again, out of the L1 cache). Elsewhere 3n and 5n, less what the L2 cache still holds: the second reading
           walks backwards. dskip is n more; the sums of tiles add 16 to 24 bytes for each 128 elements
Source     arXiv:1803.08494; joining of tiles: Chan, Golub and LeVeque, "Updating formulae", 1979
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bilevel_kernels import group_norm_kernels as kernels

KIND = "norm"
TILE, BLOCK_C = 128, 64  # pixels and channels of a program: rows of 128 B in 16 bit
SMALL = 32768  # most bytes of a tile that holds a whole group
THREAD = 64  # bytes of x in a thread's hands; more cost registers and with them occupancy
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
    tile, block = triton.next_power_of_2(pixels), triton.next_power_of_2(width)
    if padding or tile * block * x.itemsize > SMALL:  # padding is no group's: nobody would write it
        return None
    return {"WIDTH": width, "TILE": tile, "BLOCK_W": block, "num_warps": _warps(tile * block, x)}


def _warps(elements: int, x: Tensor) -> int:
    return max(1, elements * x.itemsize // (32 * THREAD))


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
    K, WIDTH = triton.cdiv(HW, TILE), C // groups
    BLOCK_W = triton.next_power_of_2(WIDTH)
    tiles = (triton.cdiv(ROW, BLOCK_C), K, B)
    sizes = {"C": C, "ROW": ROW, "TILE": TILE, "BLOCK_C": BLOCK_C, "num_warps": _warps(TILE * BLOCK_C, x)}
    tile_mean, tile_m2 = (torch.empty(B, K, C, dtype=torch.float32, device=x.device) for _ in range(2))
    kernels.gn_tile_moments_kernel[tiles](x, time, tile_mean, tile_m2, HW, **sizes)
    kernels.gn_moments_kernel[(groups, B)](
        tile_mean, tile_m2, mean, rstd, HW, eps, C=C, WIDTH=WIDTH, TILE=TILE, BLOCK_W=BLOCK_W, BLOCK_K=BLOCK_K
    )
    kernels.gn_out_kernel[tiles](x, time, weight, bias, mean, rstd, out, HW, WIDTH=WIDTH, SILU=silu, **sizes)
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
        kernels.gn_small_bwd_kernel[(groups, B)](*inputs, dx, dtime, *per_sample, *skip, HW, C=C, SILU=silu, **small)
    else:
        K, WIDTH = triton.cdiv(HW, TILE), C // groups
        BLOCK_W = triton.next_power_of_2(WIDTH)
        tiles = (triton.cdiv(ROW, BLOCK_C), K, B)
        sizes = {"C": C, "ROW": ROW, "WIDTH": WIDTH}
        config = {"SILU": silu, "TILE": TILE, "BLOCK_C": BLOCK_C, "num_warps": _warps(TILE * BLOCK_C, x)}
        sums = [torch.empty(B, K, C, dtype=torch.float32, device=x.device) for _ in range(2 if time is None else 3)]
        sums += [None] * (3 - len(sums))
        c0, c1 = (torch.empty_like(mean) for _ in range(2))
        kernels.gn_tile_sums_kernel[tiles](*inputs, *sums, HW, **sizes, **config)
        kernels.gn_means_kernel[(groups, B)](
            *sums, weight, rstd, c0, c1, dtime, *per_sample, HW, K, **sizes, BLOCK_W=BLOCK_W, BLOCK_K=BLOCK_K
        )
        kernels.gn_dx_kernel[tiles](*inputs, c0, c1, dx, *skip, HW, **sizes, **config)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    grid = (triton.cdiv(C, BLOCK_C),)
    kernels.gn_affine_grads_kernel[grid](*per_sample, dweight, dbias, B, C=C, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K)
    return dx, dweight, dbias, x.new_empty(0) if dtime is None else dtime


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


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, time: Tensor | None, padding: int) -> None:
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (B, C + padding, H, W) and at least one element")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, expected float32, float16 or bfloat16")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: strides {x.stride()} of shape {tuple(x.shape)} are not channels_last")
    C = x.shape[1] - padding
    if not 0 <= padding < x.shape[1]:
        raise ValueError(f"padding: {padding} of {x.shape[1]} channels")
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
