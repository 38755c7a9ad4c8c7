"""Diffusion loss and output distillation of the lower level: both terms and the gradient in one pass.

    diffusion = mean_b weight_b mean_chw (s - target)^2              output = mean (s - teacher)^2
    total     = w_d diffusion + w_o output
    ds        = 2 / M (w_d weight_b (s - target) + w_o (s - teacher)) dtotal         M elements in all

Why fused  eager runs some twenty kernels with fp32 temporaries; here one launch for all that reads data, a small one
           for the sums, and one in the backward pass that finds dtotal = 1 and returns

Shapes     s, target, teacher: (B, ...), weight: (B,) -> total: (), terms: (2,) = (diffusion, output)
Dtypes     fp32 | fp16 | bf16 each; arithmetic and results in fp32; ds in the dtype of s
Layout     s, target and teacher contiguous, or all channels_last; weight contiguous; anything else is refused
Numerics   block sums are stored and added in a second pass: no atomics, the same bits every run. An fp16 gradient is
           stored times a power of two near M, so that a loss scale still finds its bits
Traffic    reads 3M elements, and writes M if a gradient will be asked for; where dtotal is not 1 (or s is fp16) the
           backward pass reads M and writes M
Source     arXiv:2412.15341 and the trainer released with it; gradient in the forward pass as in Liger's losses

The stored gradient is scaled in place, so the graph can be walked backward once: a second time raises autograd's error
about a saved tensor that was modified.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bilevel_kernels.scale_unless_one import scale_unless_one

KIND = "pointwise"
BLOCK = 1024  # elements of one sample; one 16-byte load a thread and tensor at 16 bits
BLOCK_SUM = 1024  # block sums added at a time

# --- reference ------------------------------------------------------------------------------


def denoise_loss_ref(
    student: Tensor,
    target: Tensor | None,
    teacher: Tensor | None,
    weight: Tensor | None,
    w_diffusion: float = 1.0,
    w_output: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """The formula, in the dtype of its inputs but at least fp32: the oracle of the tests and the `torch` backend."""
    wide = torch.promote_types(student.dtype, torch.float32)
    s = student.to(wide)
    diffusion = output = s.new_zeros(())
    if w_diffusion and target is not None and weight is not None:
        diffusion = (weight * (s - target.to(wide)).square().flatten(1).mean(1)).mean()
    if w_output and teacher is not None:
        output = (s - teacher.to(wide)).square().mean()
    return w_diffusion * diffusion + w_output * output, torch.stack([diffusion, output]).detach()


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _denoise_loss_kernel(
    s_ptr,  # (B, N)
    target_ptr,  # (B, N) or None
    teacher_ptr,  # (B, N) or None
    weight_ptr,  # (B,) or None
    ds_ptr,  # (B, N) or None
    partial_ptr,  # (2, B * blocks) fp32
    w_diffusion,
    w_output,
    by,  # what ds is multiplied by in storage
    M,
    N,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK)
    b = pid // blocks
    n = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    offs = b * N + n
    mask = n < N
    s = tl.load(s_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    ds = tl.zeros((BLOCK,), tl.float32)
    diffusion = 0.0
    output = 0.0
    if target_ptr is not None:
        r = s - tl.load(target_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # 0 in masked lanes
        weight = tl.load(weight_ptr + b).to(tl.float32)
        diffusion = tl.sum(r * r, axis=0) * (weight / M)
        ds += (w_diffusion * weight) * r
    if teacher_ptr is not None:
        r = s - tl.load(teacher_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        output = tl.sum(r * r, axis=0) / M
        ds += w_output * r
    if ds_ptr is not None:
        tl.store(ds_ptr + offs, (ds * (2.0 * by / M)).to(ds_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + pid, diffusion)
    tl.store(partial_ptr + tl.num_programs(0) + pid, output)


@triton.jit
def _sum_kernel(
    partial_ptr,  # (2, blocks) fp32
    total_ptr,  # ()
    terms_ptr,  # (2,)
    w_diffusion,
    w_output,
    blocks,
    BLOCK: tl.constexpr,
):
    diffusion = tl.zeros((BLOCK,), tl.float32)
    output = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < blocks:  # not `range`: the interpreter cannot count to a runtime number
        offs = start + tl.arange(0, BLOCK)
        diffusion += tl.load(partial_ptr + offs, mask=offs < blocks, other=0.0)
        output += tl.load(partial_ptr + blocks + offs, mask=offs < blocks, other=0.0)
        start += BLOCK
    sum_diffusion = tl.sum(diffusion, axis=0)
    sum_output = tl.sum(output, axis=0)
    tl.store(total_ptr, w_diffusion * sum_diffusion + w_output * sum_output)
    tl.store(terms_ptr, sum_diffusion)
    tl.store(terms_ptr + 1, sum_output)


# --- launchers ------------------------------------------------------------------------------


def _stored_times(s: Tensor) -> float:
    """2 / M times a difference is below the smallest fp16 in any real batch; bf16 reaches as low as fp32."""
    return float(1 << (s.numel().bit_length() - 1)) if s.dtype == torch.float16 else 1.0


@torch.library.custom_op("bilevel_kernels::denoise_loss_fwd", mutates_args=())
def denoise_loss_fwd(
    s: Tensor,
    target: Tensor | None,
    teacher: Tensor | None,
    weight: Tensor | None,
    w_diffusion: float,
    w_output: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, M = s.shape[0], s.numel()
    programs = B * triton.cdiv(M // B, BLOCK)
    ds = torch.empty_like(s) if gradient else None
    partial = torch.empty((2, programs), dtype=torch.float32, device=s.device)
    total = torch.empty((), dtype=torch.float32, device=s.device)
    terms = torch.empty(2, dtype=torch.float32, device=s.device)
    scalars = (w_diffusion, w_output, _stored_times(s))
    _denoise_loss_kernel[(programs,)](s, target, teacher, weight, ds, partial, *scalars, M, M // B, BLOCK=BLOCK)
    _sum_kernel[(1,)](partial, total, terms, w_diffusion, w_output, programs, BLOCK=BLOCK_SUM)
    return total, terms, s.new_empty(0) if ds is None else ds


# --- autograd -------------------------------------------------------------------------------


@denoise_loss_fwd.register_fake
def _(s, target, teacher, weight, w_diffusion, w_output, gradient):
    ds = torch.empty_like(s) if gradient else s.new_empty(0)
    return s.new_empty((), dtype=torch.float32), s.new_empty(2, dtype=torch.float32), ds


def _setup(ctx, inputs, output):
    _, terms, ds = output
    ctx.mark_non_differentiable(terms, ds)
    ctx.save_for_backward(ds)


def _backward(ctx, dtotal, _dterms, _dds):
    (ds,) = ctx.saved_tensors
    scale_unless_one([ds], dtotal, 1.0 / _stored_times(ds))
    return ds, *(None,) * 6


denoise_loss_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


def denoise_loss(
    student: Tensor,
    target: Tensor | None,
    teacher: Tensor | None,
    weight: Tensor | None,
    w_diffusion: float = 1.0,
    w_output: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the diffusion loss and of the distance to the teacher's output.

    Args:
        student: (B, ...) prediction; receives the gradient.
        target: What is to be predicted; a constant. May be None where w_diffusion is 0, as may weight.
        teacher: The teacher's prediction; a constant. May be None where w_output is 0.
        weight: (B,) of each sample in the diffusion loss.
        w_diffusion: Weight of the diffusion loss. A term of weight 0 is not computed, and reported as 0.
        w_output: Weight of the distance to the teacher.

    Returns:
        total: () fp32; it can be differentiated once.
        terms: (2,) fp32, diffusion loss and distance before weighting; without gradient.

    Raises:
        ValueError: A missing tensor; a shape, layout, dtype or device that does not fit; both weights are 0.
    """
    if not (w_diffusion or w_output):
        raise ValueError("w_diffusion, w_output: both are 0")
    if not student.numel() or not student.dim():
        raise ValueError(f"student: shape {tuple(student.shape)} is not (B, ...) with elements")
    maps: dict[str, Tensor | None] = {"student": student}
    if w_diffusion:
        maps["target"] = target
        _check("weight", weight, student)
        if weight is not None and (weight.shape != student.shape[:1] or not weight.is_contiguous()):
            raise ValueError(f"weight: shape {tuple(weight.shape)}, strides {weight.stride()}, "
                             f"expected ({student.shape[0]},), (1,)")  # fmt: skip
    if w_output:
        maps["teacher"] = teacher
    for name, x in maps.items():
        _check(name, x, student)
        if x is not None and x.shape != student.shape:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, student has {tuple(student.shape)}")
    present = [x for x in maps.values() if x is not None]
    formats = [torch.contiguous_format] + [torch.channels_last] * (student.dim() == 4)
    if not any(all(x.is_contiguous(memory_format=f) for x in present) for f in formats):
        strides = ", ".join(f"{name} {x.stride()}" for name, x in maps.items() if x is not None)
        raise ValueError(f"strides of shape {tuple(student.shape)} are neither all contiguous nor all channels_last: "
                         f"{strides}")  # fmt: skip
    if not w_diffusion:
        target = weight = None
    if not w_output:
        teacher = None
    gradient = torch.is_grad_enabled() and student.requires_grad
    return denoise_loss_fwd(student, target, teacher, weight, w_diffusion, w_output, gradient)[:2]


def _check(name: str, x: Tensor | None, student: Tensor) -> None:
    if x is None:
        raise ValueError(f"{name}: missing, and its term has a weight")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: {x.dtype} is none of float32, float16 and bfloat16")
    if x.device != student.device:
        raise ValueError(f"{name}: on {x.device}, student on {student.device}")


def denoise_loss_bytes(elements: int, itemsize: int) -> int:
    """Least bytes moved forward and backward: student and teacher read, the gradient written, and an fp32 target."""
    return elements * (3 * itemsize + 4)
