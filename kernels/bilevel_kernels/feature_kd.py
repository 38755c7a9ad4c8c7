"""Feature distillation: mean squared errors of up to 16 pairs of tensors, and the gradient, in one launch.

    term_k = mean((s_k - t_k) ** 2)                     over the n_k elements of pair k of K
    total  = weight / K * sum_k term_k
    ds_k   = 2 weight / (K n_k) * (s_k - t_k) * dtotal

Why fused  eager PyTorch stores fp32 copies of both tensors and their difference, in some eight launches a pair;
           here: two launches in all, no temporary larger than one element per BLOCK, and the gradient is written while
           s and t are in registers: backward reads neither

Shapes     s_k, t_k: any shape, of one pair the same -> total: (); terms: (K,), without gradient
Dtypes     fp32 | fp16 | bf16 each; arithmetic, total and terms in fp32; ds_k in the dtype of s_k
Layout     of one pair both contiguous or both channels_last; anything else is refused
Numerics   block sums are stored and added in a second pass: no atomics, the same bits every run
           ds is stored for dtotal = 1, and scaled in place in backward, which therefore works once per forward;
           if an s_k is fp16, ds is stored times a power of two, or 2 / (K n_k) would fall below what fp16 holds
Traffic    forward reads 2n elements and writes n if s needs its gradient, n = sum of n_k; backward: 0 if dtotal is 1
           and no s_k is fp16, else reads and writes n
Source     the released trainer of arXiv:2412.15341, which averages over blocks
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.scale_unless_one import scale_unless_one_

KIND = "pointwise"
PAIRS = 16  # most in one launch: each is a copy of the loop body
BLOCK = 4096  # two 16-byte loads a thread and tensor at 16 bits; 24.7 k programs for SD 2.1's nine blocks at batch 16
PARTIALS = 4096  # block sums that the second pass adds at a time

FORMATS = (torch.contiguous_format, torch.channels_last)


# --- reference ------------------------------------------------------------------------------


def feature_kd_ref(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """The formula, in fp32 or, for fp64 inputs, in fp64: the oracle of the tests and the `torch` backend."""
    wide = [torch.promote_types(s.dtype, torch.float32) for s in student]
    errors = [F.mse_loss(s.to(w), t.to(w)) for s, t, w in zip(student, teacher, wide, strict=True)]
    terms = torch.stack(errors)
    return weight * terms.mean(), terms.detach()


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _feature_kd_fwd_kernel(
    s_ptrs,  # K of (n_k,)
    t_ptrs,  # K of (n_k,)
    ds_ptrs,  # K of (n_k,), or None
    partial_ptr,  # (ends[K - 1],) fp32
    scales,  # K of ds_k / (s_k - t_k)
    sizes,  # K of n_k
    firsts,  # K of the first program of pair k
    ends,  # K of the first program after those
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    for k in tl.static_range(len(s_ptrs)):
        if (pid >= firsts[k]) & (pid < ends[k]):
            offs = (pid - firsts[k]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < sizes[k]
            s = tl.load(s_ptrs[k] + offs, mask=mask, other=0.0).to(tl.float32)
            t = tl.load(t_ptrs[k] + offs, mask=mask, other=0.0).to(tl.float32)
            r = s - t  # 0 in masked lanes
            tl.store(partial_ptr + pid, tl.sum(r * r, axis=0) / sizes[k])
            if ds_ptrs is not None:
                tl.store(ds_ptrs[k] + offs, (r * scales[k]).to(ds_ptrs[k].dtype.element_ty), mask=mask)


@triton.jit
def _feature_kd_sum_kernel(
    partial_ptr,  # (ends[K - 1],) fp32
    total_ptr,  # () fp32
    terms_ptr,  # (K,) fp32
    scale,  # weight / K
    firsts,  # K + 1 of the first partial to add
    ends,  # K + 1 of the first partial after those
    PARTIALS: tl.constexpr,
):
    pid = tl.program_id(0)  # one for each term, and the last adds up everything
    start, end = 0, 0
    for k in tl.static_range(len(ends)):
        start += tl.where(pid == k, firsts[k], 0)
        end += tl.where(pid == k, ends[k], 0)
    acc = tl.zeros([PARTIALS], tl.float32)
    while start < end:
        offs = start + tl.arange(0, PARTIALS)
        acc += tl.load(partial_ptr + offs, mask=offs < end, other=0.0)
        start += PARTIALS
    if pid < len(ends) - 1:
        tl.store(terms_ptr + pid, tl.sum(acc, axis=0))
    else:
        tl.store(total_ptr, tl.sum(acc, axis=0) * scale)


# --- launchers ------------------------------------------------------------------------------


def _power(student: Sequence[Tensor], weight: float) -> int:
    """ds is stored times 2 ** this: 0, or what brings the largest 2 weight / (K n_k) into 1/4 .. 1/2 for fp16."""
    if all(s.dtype != torch.float16 for s in student):
        return 0
    return -1 - math.frexp(2 * weight / (len(student) * min(s.numel() for s in student)))[1]


@torch.library.custom_op("bilevel_kernels::feature_kd_fwd", mutates_args=())
def feature_kd_fwd(
    student: list[Tensor], teacher: list[Tensor], weight: float, grad: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(total, terms, ds); ds is empty unless `grad`."""
    K, device = len(student), student[0].device
    sizes = tuple(s.numel() for s in student)
    ends = tuple(accumulate(triton.cdiv(n, BLOCK) for n in sizes))
    firsts = (0, *ends[:-1])
    scales = tuple(math.ldexp(2 * weight / (K * n), _power(student, weight)) for n in sizes)
    total, terms, partial = (torch.empty(x, dtype=torch.float32, device=device) for x in ((), K, ends[-1]))
    ds = [torch.empty_like(s) for s in student] if grad else []
    _feature_kd_fwd_kernel[(ends[-1],)](
        tuple(student), tuple(teacher), tuple(ds) if grad else None, partial, scales, sizes, firsts, ends,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    _feature_kd_sum_kernel[(K + 1,)](
        partial, total, terms, weight / K, (*firsts, 0), (*ends, ends[-1]), PARTIALS=PARTIALS, num_warps=16
    )
    return total, terms, ds


# --- autograd -------------------------------------------------------------------------------


@feature_kd_fwd.register_fake
def _(student, teacher, weight, grad):
    total = student[0].new_empty((), dtype=torch.float32)
    return total, total.new_empty(len(student)), [torch.empty_like(s) for s in student] if grad else []


def _setup(ctx, inputs, output):
    student, _, weight, _ = inputs
    _, terms, ds = output
    ctx.mark_non_differentiable(terms, *ds)
    ctx.set_materialize_grads(False)  # or backward would be handed zeros the size of ds
    ctx.save_for_backward(*ds)
    ctx.by = math.ldexp(1.0, -_power(student, weight))


def _backward(ctx, dtotal, _dterms, _dds):
    ds = list(ctx.saved_tensors)
    scale_unless_one_(ds, dtotal, ctx.by)
    return ds, [None] * len(ds), None, None


feature_kd_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


def feature_kd(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weighted mean of the mean squared errors of several pairs of tensors.

    Args:
        student: 1 to 16 tensors; receive the gradient, once: a second backward through the same graph is refused.
        teacher: Constants of the same shapes and layouts; dtypes may differ.
        weight: Factor of the total.

    Returns:
        The total, a scalar in fp32, and the (K,) unweighted terms in fp32, which carry no gradient.

    Raises:
        ValueError: The numbers of tensors, or the shapes, layouts, dtypes or devices of a pair.
    """
    if len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} tensors, teacher {len(teacher)}")
    if not 1 <= len(student) <= PAIRS:
        raise ValueError(f"student: {len(student)} tensors, expected 1 to {PAIRS}")
    for k, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape:
            raise ValueError(f"student[{k}]: shape {tuple(s.shape)}, teacher[{k}] has {tuple(t.shape)}")
        if not s.numel():
            raise ValueError(f"student[{k}]: shape {tuple(s.shape)} has no elements")
        for name, x in ((f"student[{k}]", s), (f"teacher[{k}]", t)):
            if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(f"{name}: {x.dtype}, expected float32, float16 or bfloat16")
            if x.device != student[0].device:
                raise ValueError(f"{name}: on {x.device}, student[0] is on {student[0].device}")
        if not any(s.is_contiguous(memory_format=f) and t.is_contiguous(memory_format=f) for f in FORMATS):
            raise ValueError(
                f"student[{k}]: strides {s.stride()}, teacher[{k}] has {t.stride()}, of shape {tuple(s.shape)}: "
                "neither both contiguous nor both channels_last"
            )
    grad = torch.is_grad_enabled() and any(s.requires_grad for s in student)
    total, terms, _ = feature_kd_fwd(list(student), list(teacher), weight, grad)
    return total, terms


def feature_kd_bytes(student: Sequence[Tensor], teacher: Sequence[Tensor], grad: bool) -> int:
    """Least bytes moved: both read once, and the gradient written."""
    return sum(
        (1 + grad) * s.numel() * s.itemsize + t.numel() * t.itemsize for s, t in zip(student, teacher, strict=True)
    )
