"""Noised latents and the v that is to be predicted, with noise that is a pure function of (seed, stream, sample index).

    eps   = the normals of Philox4x32-10 with key (seed low, seed high), counter (j / 4, stream, index low, index high)
    noisy = alpha_b x_0 + sigma_b eps               target = alpha_b eps - sigma_b x_0

Why fused  the noise of a sample is the same whatever batch, rank or card it is on, without a copy from the host;
           eager runs five kernels on noise that is already there: here one, and the noise is nowhere stored

Shapes     latents: (B, C, H, W) or (B, ...), alpha, sigma, index: (B,) -> noisy, target: as latents
Dtypes     latents fp32 | fp16 | bf16; alpha, sigma fp32; index int64; arithmetic in fp32; out any of the three
Layout     latents contiguous or channels_last; the rest contiguous; anything else is refused. Element j of a sample is
           counted in the order (C, H, W) in either layout, so both get the same noise
Numerics   the same 32-bit words as csrc/philox.hpp; normals within 4e-7 of its, relative, element by element. sin and
           cos are reduced exactly, in integers: tl.sin would take fp64 and local memory for that
Traffic    reads M elements and writes 2M
Source     Philox: Salmon et al., SC'11; Box-Muller; v: arXiv:2202.00512, appendix D; polynomials: our own minimax fits
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # Philox blocks of four normals: one for each thread

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

# sin(2 pi x) / x and cos(2 pi x) in x^2, |x| <= 1/8: minimax relative errors of 4e-9 and 7e-11
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in (6.28318529, -41.34166145, 81.59235355, -75.39356283))
_K1, _K2, _K3, _K4 = (tl.constexpr(c) for c in (-19.73920868, 64.93932185, -85.4432363, 59.22924426))


# --- reference ------------------------------------------------------------------------------


def noise_v_ref(
    latents: Tensor, alpha: Tensor, sigma: Tensor, seed: int, index: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """The formula, in the dtype of its inputs but at least fp32; the normals are made in fp64."""
    wide = torch.promote_types(latents.dtype, torch.float32)
    x = latents.to(wide)
    eps = normal_ref(seed, index, stream, tuple(latents.shape[1:])).to(wide)
    a, s = (t.to(wide).view(-1, *(1,) * (x.dim() - 1)) for t in (alpha, sigma))
    return a * x + s * eps, a * eps - s * x


def normal_ref(seed: int, index: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normals (B, *shape) fp64 from the same words, in int64 arithmetic."""
    blocks = torch.arange(-(-math.prod(shape) // 4), device=index.device).expand(len(index), -1)
    c = [blocks, torch.full_like(blocks, stream), *((index >> k & _MASK)[:, None].expand_as(blocks) for k in (0, 32))]
    key = [seed & _MASK, seed >> 32]
    for _ in range(10):
        (high0, low0), (high1, low1) = (_product(m, word) for m, word in zip(_MULTIPLIERS, (c[0], c[2]), strict=True))
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    normals = []
    for radial, angular in ((c[0], c[1]), (c[2], c[3])):
        u = radial.float() * 2.0**-32 + 2.0**-33
        radius, angle = (-2.0 * u.double().log()).sqrt(), (angular >> 8).double() * (2.0**-23 * math.pi)
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, dim=-1).flatten(1)[:, : math.prod(shape)].reshape(-1, *shape)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32-bit words, which int64 cannot hold."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _box_muller(radial, angular):
    """Two normals of two words."""
    u = radial.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32 and 2^-33: in (0, 1]
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    turn = (angular >> 8).to(tl.int32)  # 2^-24 of a full one
    quadrant = (turn + (1 << 21)) >> 22  # the nearest
    x = (turn - (quadrant << 22)).to(tl.float32) * 5.9604644775390625e-08  # exact, at most 1/8
    y = x * x
    sin = x * (_S0 + y * (_S1 + y * (_S2 + y * _S3)))
    cos = 1.0 + y * (_K1 + y * (_K2 + y * (_K3 + y * _K4)))
    swap = (quadrant & 1) != 0
    a = tl.where(swap, sin, cos)
    b = tl.where(swap, cos, sin)
    a = tl.where(((quadrant + 1) & 2) != 0, -a, a)
    b = tl.where((quadrant & 2) != 0, -b, b)
    return radius * a, radius * b


@triton.jit(do_not_specialize=["seed", "stream"])
def _noise_v_kernel(
    x_ptr,  # (B, N) in memory
    alpha_ptr,  # (B,)
    sigma_ptr,  # (B,)
    index_ptr,  # (B,) int64
    noisy_ptr,  # (B, N)
    target_ptr,  # (B, N)
    seed,  # 64 bits, as a signed integer
    stream,
    N,
    HW,
    CHANNELS: tl.constexpr,  # where they are last in memory, else 0
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.cdiv(N, 4 * BLOCK)
    b = pid // programs
    first = (pid % programs) * BLOCK
    index = tl.load(index_ptr + b)
    words = tl.philox(
        seed,
        (first + tl.arange(0, BLOCK)).to(tl.uint32),
        stream.to(tl.uint32),
        index.to(tl.uint32),
        (index >> 32).to(tl.uint32),
    )
    z0, z1 = _box_muller(words[0], words[1])
    z2, z3 = _box_muller(words[2], words[3])
    eps = tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(4 * BLOCK)  # z0 z1 z2 z3 of each block
    n = first * 4 + tl.arange(0, 4 * BLOCK)
    mask = n < N
    offs = b * N + (n if CHANNELS == 0 else (n % HW) * CHANNELS + n // HW)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_ptr + b)
    sigma = tl.load(sigma_ptr + b)
    tl.store(noisy_ptr + offs, (alpha * x + sigma * eps).to(noisy_ptr.dtype.element_ty), mask=mask)
    tl.store(target_ptr + offs, (alpha * eps - sigma * x).to(target_ptr.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------


@torch.library.custom_op("bilevel_kernels::noise_v_fwd", mutates_args=())
def noise_v_fwd(
    latents: Tensor, alpha: Tensor, sigma: Tensor, seed: int, index: Tensor, stream: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    B, N = latents.shape[0], latents.numel() // latents.shape[0]
    noisy, target = (torch.empty_like(latents, dtype=dtype) for _ in range(2))
    channels = 0 if latents.is_contiguous() else latents.shape[1]
    grid = (B * triton.cdiv(N, 4 * BLOCK),)
    sizes = (N, N // (channels or 1))
    args = (latents, alpha, sigma, index, noisy, target, seed, stream, *sizes)
    _noise_v_kernel[grid](*args, CHANNELS=channels, BLOCK=BLOCK)
    return noisy, target


# --- autograd -------------------------------------------------------------------------------


@noise_v_fwd.register_fake
def _(latents, alpha, sigma, seed, index, stream, dtype):
    return torch.empty_like(latents, dtype=dtype), torch.empty_like(latents, dtype=dtype)


# no gradient: latents are data


# --- public ---------------------------------------------------------------------------------


def noise_v(
    latents: Tensor,
    t_alpha: Tensor,
    t_sigma: Tensor,
    seed: int,
    index: Tensor,
    stream: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Noise latents and give the v to be predicted; has no gradient.

    Args:
        latents: (B, ...) x_0, scaled.
        t_alpha: (B,) fp32 alpha of each sample's timestep.
        t_sigma: (B,) fp32 sigma.
        seed: In [0, 2**64).
        index: (B,) int64 global index of each sample, not negative, which is not checked: it would stall the stream.
        stream: What the noise is for, in [0, 2**32); a value of bilevel_fast.ops.randomness.Stream.
        dtype: Of both results.

    Returns:
        noisy: x_t, laid out as latents.
        target: v, laid out as latents.

    Raises:
        ValueError: A shape, layout, dtype, device, seed or stream that does not fit.
    """
    if not latents.numel() or not latents.dim():
        raise ValueError(f"latents: shape {tuple(latents.shape)} is not (B, ...) with elements")
    if latents.numel() // latents.shape[0] > 2**34:
        raise ValueError(f"latents: shape {tuple(latents.shape)} has more than 2**34 elements a sample")
    if not (latents.is_contiguous() or latents.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"latents: strides {latents.stride()} of shape {tuple(latents.shape)} are neither "
                         "contiguous nor channels_last")  # fmt: skip
    for name, value in (("latents", latents.dtype), ("dtype", dtype)):
        if value not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name}: {value} is none of float32, float16 and bfloat16")
    wanted = (("t_alpha", t_alpha, torch.float32), ("t_sigma", t_sigma, torch.float32), ("index", index, torch.int64))
    for name, x, kind in wanted:
        if x.shape != latents.shape[:1] or not x.is_contiguous():
            raise ValueError(f"{name}: shape {tuple(x.shape)}, strides {x.stride()}, expected "
                             f"({latents.shape[0]},), (1,)")  # fmt: skip
        if x.dtype != kind:
            raise ValueError(f"{name}: {x.dtype}, expected {kind}")
        if x.device != latents.device:
            raise ValueError(f"{name}: on {x.device}, latents on {latents.device}")
    for name, number, bits in (("seed", seed, 64), ("stream", stream, 32)):
        if not 0 <= number < 2**bits:
            raise ValueError(f"{name}: {number} is not in [0, 2**{bits})")
    signed = seed - 2**64 if seed >= 2**63 else seed  # an operator's integers are signed
    return noise_v_fwd(latents, t_alpha, t_sigma, signed, index, int(stream), dtype)
