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
Traffic    p, m, v and ema read and written, g read, copy written: 36 B an element with ema, bf16 g and bf16 copy
Source     arXiv:1711.05101, algorithm 2, with the step size of torch.optim.AdamW
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = "optimizer"
ONLY_WRITTEN = ("copy",)  # of what the operator changes; it reads the others first
BLOCK, WARPS = 1024, 8  # 4 elements a thread: 16 bytes of p, m, v and ema; 8 took 72 registers instead of 48


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
):
    if skip_ptr is not None:  # noqa: SIM102  # one is a choice of the compiler, the other of the device
        if tl.load(skip_ptr) != 0.0:
            return
    offs = (tl.program_id(0) + first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = None if WHOLE else offs < n
    other = None if WHOLE else 0.0
    p = tl.load(p_ptr + offs, mask=mask, other=other)
    g = tl.load(g_ptr + offs, mask=mask, other=other).to(tl.float32)
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
    n = p.numel()
    arguments = (
        p, g, m, v, ema, copy, lr, step, clip, skip,
        _log(beta1), 1 - beta1, _log(beta2), beta2, 1 - beta2, eps, weight_decay, 1 - ema_decay,
    )  # fmt: skip
    whole = n // BLOCK
    if whole:
        _adamw_ema_kernel[(whole,)](*arguments, 0, n, WHOLE=True, BLOCK=BLOCK, num_warps=WARPS)
    if n % BLOCK:
        _adamw_ema_kernel[(1,)](*arguments, whole, n, WHOLE=False, BLOCK=BLOCK, num_warps=WARPS)


# --- autograd -------------------------------------------------------------------------------


@adamw_ema.register_fake
def _(p, g, m, v, ema, copy, lr, step, clip, skip, beta1, beta2, eps, weight_decay, ema_decay):
    return None


# --- public ---------------------------------------------------------------------------------


def adamw_ema_(
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
    """Move `p` by one step of AdamW, and what follows it.

    Args:
        p: (n,) parameters.
        g: (n,) gradient; not written.
        m, v: (n,) moments, zero before the first step.
        lr: Step size, () on the device, as are step, clip and skip.
        step: Number of this step, 1 at first.
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
    adamw_ema(p, g, m, v, ema, copy, lr, step, clip, skip, beta1, beta2, eps, weight_decay, ema_decay)


def adamw_ema_bytes(n: int, grad: torch.dtype, ema: bool, copy: torch.dtype | None) -> int:
    """Least bytes moved: p, m, v and ema read and written, g read, copy written."""
    return n * (24 + grad.itemsize + 8 * ema + (copy.itemsize if copy else 0))
