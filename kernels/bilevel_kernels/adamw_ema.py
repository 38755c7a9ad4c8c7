"""One step of AdamW over flat buffers, with the moving average and the compute copy of the parameters, in one pass.

    g    <- clip * g                                    p, m, v, ema, copy in place; nothing is written where skip
    p    <- p - lr * weight_decay * p
    m    <- m + (1 - beta1) * (g - m)                   v <- beta2 * v + (1 - beta2) * g ** 2
    p    <- p - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)      c = 1 - beta ** step, step from 1
    ema  <- ema + (1 - ema_decay) * (p - ema)
    copy <- p, rounded

Why fused  torch's fused AdamW, a lerp and a copy read p three times; here: once, and g may be 16 bits wide.
           lr, step, clip and skip lie on the device: a captured CUDA graph follows warm-up, clipping and bad gradients

Shapes     p, g, m, v, ema, copy: (n,); lr, step, clip, skip: ()
Dtypes     p, m, v, ema and scalars fp32; g fp32 | fp16 | bf16; copy fp16 | bf16; arithmetic in fp32
Layout     contiguous, at any address; loads are 16 bytes wide where addresses are multiples of 16, whatever n is
Numerics   no element depends on another; roots are rounded correctly, quotients to 2 ulp; c is good to a relative
           3e-7 from the first step on, without fp64
Traffic    p, m, v and ema read and written, g read, copy written: 36 B an element with ema, bf16 g and bf16 copy.
           Of gradients that lie apart (`Places`), 0.1 B more: one place for each 64 elements
Source     arXiv:1711.05101, algorithm 2, with the step size of torch.optim.AdamW
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = "optimizer"
ONLY_WRITTEN = ("copy",)  # of what the operator changes; it reads the others first
UNTOUCHED = ("between",)  # read where no gradient lies apart: next to nothing
BLOCK, WARPS = 1024, 8  # 4 elements a thread: 16 bytes of p, m, v and ema; 8 took 72 registers instead of 48
GROUP = 64  # elements, all of one gradient: what starts in a flat buffer starts at a multiple of it
AT_ONCE = 32  # addresses that a launch takes as arguments; a table on the host would have to be copied in each step
EVEN = 8  # elements: what lies apart has a multiple of them, so that 16 bytes are loaded whole


# --- reference ------------------------------------------------------------------------------


def adamw_ema_ref(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: Tensor | None = None,
    ema: Tensor | None = None,
    ema_decay: float = 0.9999,
    copy: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """The formula, in the dtype of p, in place: the oracle of the tests and the `torch` backend."""
    grad = g.to(p.dtype) if clip is None else g.to(p.dtype) * clip
    c1, c2 = (-torch.expm1(step * _log(beta)) for beta in (beta1, beta2))  # 1 - beta ** step cancels in fp32
    new = {"m": m.lerp(grad, 1 - beta1), "v": beta2 * v + (1 - beta2) * grad.square()}
    new["p"] = p - lr * weight_decay * p - lr / c1 * new["m"] / (new["v"].sqrt() / c2.sqrt() + eps)
    new["ema"] = None if ema is None else ema.lerp(new["p"], 1 - ema_decay)
    for old, value in ((p, new["p"]), (m, new["m"]), (v, new["v"]), (ema, new["ema"]), (copy, new["p"])):
        if old is not None:
            old.copy_(value if skip is None else torch.where(skip != 0, old, value))


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0. Near 0 the difference would cancel: there, the series."""
    near = tl.maximum(x, -0.5)
    series = 1.0 + near * (1.0 / 9)  # at -0.5, a relative 1e-8 short of all terms
    for i in tl.static_range(8, 1, -1):
        series = 1.0 + near * (1.0 / i) * series
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit
def _shifts_kernel(
    between_ptr,  # (n,)
    g_ptrs,  # AT_ONCE gradients
    start_ptr,  # (AT_ONCE,) int64: where each starts in (n,)
    shift_ptr,  # (AT_ONCE,) int64: from a place in (n,), by so many elements, to that of its gradient
    ITEMSIZE: tl.constexpr,
):
    base = between_ptr.to(tl.int64)
    for i in tl.static_range(len(g_ptrs)):
        tl.store(shift_ptr + i, (g_ptrs[i].to(tl.int64) - base) // ITEMSIZE - tl.load(start_ptr + i))


@triton.jit
def _adamw_ema_kernel(
    p_ptr,  # (n,) fp32
    g_ptr,  # (n,)
    m_ptr,  # (n,) fp32
    v_ptr,  # (n,) fp32
    ema_ptr,  # (n,) fp32, or None
    copy_ptr,  # (n,), or None
    lr_ptr,  # ()
    step_ptr,  # ()
    clip_ptr,  # (), or None
    skip_ptr,  # (), or None
    owner_ptr,  # (n / GROUP,) int32: which gradient that lies apart; None where g is all of them
    shift_ptr,  # (K,) int64, from a place in (n,) to that of its gradient
    end_ptr,  # (K,) int64, where in (n,) it ends
    log_beta1,
    one_minus_beta1,
    log_beta2,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    one_minus_ema_decay,
    first,  # block of the first program
    n,
    WHOLE: tl.constexpr,  # every block is: no masks
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    if skip_ptr is not None:  # noqa: SIM102  # one is a choice of the compiler, the other of the device
        if tl.load(skip_ptr) != 0.0:
            return
    offs = (tl.program_id(0) + first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = None if WHOLE else offs < n
    other = None if WHOLE else 0.0
    p = tl.load(p_ptr + offs, mask=mask, other=other)
    if owner_ptr is None:
        g = tl.load(g_ptr + offs, mask=mask, other=other).to(tl.float32)
    else:
        owner = tl.max_constancy(tl.load(owner_ptr + offs // GROUP, mask=mask, other=other), [GROUP])
        shift = tl.max_constancy(tl.multiple_of(tl.load(shift_ptr + owner), [EVEN]), [GROUP])
        end = tl.max_constancy(tl.multiple_of(tl.load(end_ptr + owner), [EVEN]), [GROUP])
        there = offs < end if WHOLE else (offs < end) & (offs < n)
        g = tl.load(g_ptr + (offs + shift), mask=there, other=0.0).to(tl.float32)  # 0 behind its end
    m = tl.load(m_ptr + offs, mask=mask, other=other)
    v = tl.load(v_ptr + offs, mask=mask, other=other)
    if ema_ptr is not None:
        ema = tl.load(ema_ptr + offs, mask=mask, other=other)
    lr = tl.load(lr_ptr)
    step = tl.load(step_ptr)
    if clip_ptr is not None:
        g *= tl.load(clip_ptr)
    p -= lr * weight_decay * p
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    root_c2 = tl.sqrt_rn(_one_minus_exp(step * log_beta2))
    p -= lr / _one_minus_exp(step * log_beta1) * m / (tl.sqrt_rn(v) / root_c2 + eps)
    tl.store(p_ptr + offs, p, mask=mask)
    tl.store(m_ptr + offs, m, mask=mask)
    tl.store(v_ptr + offs, v, mask=mask)
    if ema_ptr is not None:
        tl.store(ema_ptr + offs, ema + one_minus_ema_decay * (p - ema), mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs, p.to(copy_ptr.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------


@torch.library.custom_op("bilevel_kernels::adamw_ema", mutates_args=("p", "m", "v", "ema", "copy"))
def adamw_ema(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    ema: Tensor | None,
    copy: Tensor | None,
    lr: Tensor,
    step: Tensor,
    clip: Tensor | None,
    skip: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
) -> None:
    settings = (beta1, beta2, eps, weight_decay, ema_decay)
    _launch((p, g, m, v, ema, copy, lr, step, clip, skip), (None, None, None), settings)


@torch.library.custom_op("bilevel_kernels::adamw_ema_apart", mutates_args=("p", "m", "v", "ema", "copy"))
def adamw_ema_apart(
    p: Tensor,
    between: Tensor,
    apart: list[Tensor],
    m: Tensor,
    v: Tensor,
    ema: Tensor | None,
    copy: Tensor | None,
    lr: Tensor,
    step: Tensor,
    clip: Tensor | None,
    skip: Tensor | None,
    owner: Tensor,
    starts: Tensor,
    ends: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
) -> None:
    shifts = torch.empty_like(starts)
    sources = [between, *apart]
    for first in range(0, len(starts), AT_ONCE):
        group = sources[first : first + AT_ONCE]
        group += [between] * (AT_ONCE - len(group))
        part = slice(first, first + AT_ONCE)
        _shifts_kernel[(1,)](between, tuple(group), starts[part], shifts[part], ITEMSIZE=between.itemsize, num_warps=1)
    tensors, settings = (
        (p, between, m, v, ema, copy, lr, step, clip, skip),
        (beta1, beta2, eps, weight_decay, ema_decay),
    )
    _launch(tensors, (owner, shifts, ends), settings)


def _launch(tensors: tuple, places: tuple, settings: tuple[float, ...]) -> None:
    n, (beta1, beta2, eps, weight_decay, ema_decay) = tensors[0].numel(), settings
    numbers = (_log(beta1), 1 - beta1, _log(beta2), beta2, 1 - beta2, eps, weight_decay, 1 - ema_decay)
    constants = {"BLOCK": BLOCK, "GROUP": GROUP, "EVEN": 16 // tensors[1].itemsize, "num_warps": WARPS}
    whole = n // BLOCK
    if whole:
        _adamw_ema_kernel[(whole,)](*tensors, *places, *numbers, 0, n, WHOLE=True, **constants)
    if n % BLOCK:
        _adamw_ema_kernel[(1,)](*tensors, *places, *numbers, whole, n, WHOLE=False, **constants)


# --- autograd -------------------------------------------------------------------------------


@adamw_ema.register_fake
def _(p, g, m, v, ema, copy, lr, step, clip, skip, beta1, beta2, eps, weight_decay, ema_decay):
    return None


@adamw_ema_apart.register_fake
def _(p, between, apart, m, v, ema, copy, lr, step, clip, skip, owner, starts, ends, *settings):
    return None


# --- public ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where in flat buffers (n,) the parameters lie whose gradients do not lie in g, but apart.

    Attributes:
        owner: (n / GROUP,) int32, of each group of elements the number of its gradient, from 1; 0 where it lies in g.
        starts, ends: (K,) int64 of each gradient, K a multiple of AT_ONCE. The first is g itself.
        sizes: Elements of each that lies apart.
    """

    owner: Tensor
    starts: Tensor
    ends: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, n: int, starts: Sequence[int], sizes: Sequence[int], device: torch.device) -> "Places":
        """Of parameters that start there and have so many elements, in the order of their places.

        Raises:
            ValueError: One starts between groups, overlaps the next or has no multiple of EVEN elements.
        """
        owner = torch.zeros(-(-n // GROUP), dtype=torch.int32)
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True), 1):
            if start % GROUP or size % EVEN or not 0 < size <= n - start:
                raise ValueError(f"{size} elements at {start} of {n}: expected a multiple of {EVEN} at one of {GROUP}")
            owner[start // GROUP : -(-(start + size) // GROUP)] = number
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        for (_, end), (start, _) in pairwise(zip(starts, ends, strict=True)):
            if start < end:
                raise ValueError(f"parameters overlap: one ends at {end}, the next starts at {start}")
        padding = -(len(ends) + 1) % AT_ONCE
        table = torch.tensor([[0, *starts, *[0] * padding], [n, *ends, *[0] * padding]])
        return cls(owner.to(device), *table.to(device), tuple(sizes))


def adamw_ema_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    apart: Sequence[Tensor] = (),
    places: Places | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: Tensor | None = None,
    ema: Tensor | None = None,
    ema_decay: float = 0.9999,
    copy: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Move `p` by one step of AdamW, and what follows it.

    Args:
        p: (n,) parameters.
        g: (n,) gradient; not written. With `places`, read only where none of `apart` lies.
        m, v: (n,) moments, zero before the first step.
        lr: Step size, () on the device, as are step, clip and skip.
        step: Number of this step, 1 at first.
        apart: Gradients in the dtype of g, dense, in any shape: in the order of their memory they are what g would
            hold. At multiples of 16 bytes.
        places: Where in (n,) those belong. Buffers are then `GROUP` elements aligned, and what lies between
            parameters gets no gradient.
        beta1, beta2: Decays of the moments, at least 0 and below 1.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: times lr, of p as it was.
        clip: Factor of the gradient; 1 if None.
        ema: (n,) moving average of p.
        ema_decay: Its decay, 0 to 1.
        copy: (n,) of 16 bits, becomes p rounded to nearest.
        skip: Where this is not 0, no bit of any buffer changes.

    Raises:
        ValueError: A shape, layout, dtype, device or number is another one.
    """
    if p.dim() != 1 or not p.numel():
        raise ValueError(f"p: shape {tuple(p.shape)}, expected (n,) and at least one element")
    wide, narrow = (torch.float32,), (torch.float16, torch.bfloat16)
    buffers = {"p": (p, wide), "g": (g, wide + narrow), "m": (m, wide), "v": (v, wide)}
    buffers |= {"ema": (ema, wide), "copy": (copy, narrow)}
    scalars = {"lr": (lr, wide), "step": (step, wide), "clip": (clip, wide), "skip": (skip, wide)}
    for name, (x, dtypes) in (buffers | scalars).items():
        if x is None:
            continue
        if name in scalars and x.numel() != 1:
            raise ValueError(f"{name}: shape {tuple(x.shape)} is not that of a scalar")
        if name in buffers and x.shape != p.shape:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, p has {tuple(p.shape)}")
        if x.dtype not in dtypes:
            raise ValueError(
                f"{name}: {x.dtype}, expected {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}"
            )
        if x.device != p.device:
            raise ValueError(f"{name}: on {x.device}, p is on {p.device}")
        if not x.is_contiguous():
            raise ValueError(f"{name}: strides {x.stride()} of shape {tuple(x.shape)} are not contiguous")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: {beta}, expected at least 0 and below 1")
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay: {ema_decay}, expected 0 to 1")
    settings = (beta1, beta2, eps, weight_decay, ema_decay)
    if places is None:
        adamw_ema(p, g, m, v, ema, copy, lr, step, clip, skip, *settings)
        return
    if tuple(t.numel() for t in apart) != places.sizes:
        raise ValueError(f"apart: {len(apart)} gradients do not fit the {len(places.sizes)} places that there are")
    for t in apart:
        if t.dtype != g.dtype or t.device != g.device or t.storage_offset() * t.itemsize % 16:
            raise ValueError(f"apart: {t.dtype} on {t.device} at {t.storage_offset()}, g is {g.dtype} on {g.device}")
    tables = (places.owner, places.starts, places.ends)
    adamw_ema_apart(p, g, list(apart), m, v, ema, copy, lr, step, clip, skip, *tables, *settings)


def adamw_ema_bytes(n: int, grad: torch.dtype, ema: bool, copy: torch.dtype | None) -> int:
    """Least bytes moved: p, m, v and ema read and written, g read, copy written."""
    return n * (24 + grad.itemsize + 8 * ema + (copy.itemsize if copy else 0))
