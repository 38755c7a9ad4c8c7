"""Mean squared error against an anchor prediction pushed away from a concept.

    target = a - eta * (c - a)
    loss   = mean((s - target) ** 2)                    over all M elements
    ds     = 2 / M * (s - target) * dloss

Why fused  eager PyTorch runs six kernels and stores four temporaries the size of s;
           here: two launches forward, one backward, no temporary larger than M / BLOCK

Shapes     s, a, c: any shape, M elements in all -> loss: ()
Dtypes     fp32 | fp16 | bf16 in; arithmetic and loss in fp32; ds in the dtype of s
Layout     s, a and c contiguous, or all channels_last; anything else is refused
Numerics   block sums are stored and added in a second pass: no atomics, the same bits every run
Traffic    forward reads 3M elements; backward reads 3M and writes M
Source     negative guidance of ESD, arXiv:2303.07345, eq. 7, with an anchor prompt for the empty one
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


# --- reference ------------------------------------------------------------------------------


def steered_mse_ref(s: Tensor, a: Tensor, c: Tensor, eta: float = 1.0) -> Tensor:
    """The formula, in the dtype of its inputs: the oracle of the tests and the `torch` backend."""
    return (s - (a - eta * (c - a))).square().mean()


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _residual(s_ptr, a_ptr, c_ptr, eta, offs, mask):
    s = tl.load(s_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return s - (a - eta * (c - a))  # 0 in masked lanes


@triton.jit
def _steered_mse_fwd_kernel(
    s_ptr,  # (M,)
    a_ptr,  # (M,)
    c_ptr,  # (M,)
    partial_ptr,  # (num_blocks,) fp32
    eta,
    M,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    r = _residual(s_ptr, a_ptr, c_ptr, eta, offs, offs < M)
    tl.store(partial_ptr + pid, tl.sum(r * r, axis=0) / M)


@triton.jit
def _steered_mse_bwd_kernel(
    dloss_ptr,  # ()
    s_ptr,  # (M,)
    a_ptr,  # (M,)
    c_ptr,  # (M,)
    ds_ptr,  # (M,)
    eta,
    M,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < M
    r = _residual(s_ptr, a_ptr, c_ptr, eta, offs, mask)
    # dloss is read here and not on the host, where it would stall the stream
    ds = 2.0 / M * r * tl.load(dloss_ptr).to(tl.float32)
    tl.store(ds_ptr + offs, ds.to(ds_ptr.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------


@torch.library.custom_op("bilevel_kernels::steered_mse_fwd", mutates_args=())
def steered_mse_fwd(s: Tensor, a: Tensor, c: Tensor, eta: float) -> Tensor:
    M = s.numel()
    num_blocks = triton.cdiv(M, BLOCK)
    partial = torch.empty(num_blocks, dtype=torch.float32, device=s.device)
    _steered_mse_fwd_kernel[(num_blocks,)](s, a, c, partial, eta, M, BLOCK=BLOCK)
    return partial.sum()


@torch.library.custom_op("bilevel_kernels::steered_mse_bwd", mutates_args=())
def steered_mse_bwd(dloss: Tensor, s: Tensor, a: Tensor, c: Tensor, eta: float) -> Tensor:
    M = s.numel()
    ds = torch.empty_like(s)
    grid = (triton.cdiv(M, BLOCK),)
    _steered_mse_bwd_kernel[grid](dloss, s, a, c, ds, eta, M, BLOCK=BLOCK)
    return ds


# --- autograd -------------------------------------------------------------------------------


@steered_mse_fwd.register_fake
def _(s, a, c, eta):
    return s.new_empty((), dtype=torch.float32)


@steered_mse_bwd.register_fake
def _(dloss, s, a, c, eta):
    return torch.empty_like(s)


def _setup(ctx, inputs, output):
    *tensors, ctx.eta = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dloss):
    return steered_mse_bwd(dloss, *ctx.saved_tensors, ctx.eta), None, None, None


steered_mse_fwd.register_autograd(_backward, setup_context=_setup)


# --- public ---------------------------------------------------------------------------------


def steered_mse(s: Tensor, a: Tensor, c: Tensor, eta: float = 1.0) -> Tensor:
    """Mean squared error between `s` and `a - eta * (c - a)`.

    Args:
        s: Student prediction; receives the gradient.
        a: Teacher prediction for the anchor prompt; a constant.
        c: Teacher prediction for the concept prompt; a constant.
        eta: How far the target is pushed from the concept; 0 gives `a`.

    Returns:
        The loss, a scalar in fp32.

    Raises:
        ValueError: Shapes or layouts differ, or the layout has gaps.
    """
    if not s.shape == a.shape == c.shape:
        raise ValueError(f"shapes differ: s {tuple(s.shape)}, a {tuple(a.shape)}, c {tuple(c.shape)}")
    if not s.stride() == a.stride() == c.stride():
        raise ValueError(f"layouts differ: s {s.stride()}, a {a.stride()}, c {c.stride()}")
    if not (s.is_contiguous() or s.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(f"strides {s.stride()} of shape {tuple(s.shape)} are neither contiguous nor channels_last")
    return steered_mse_fwd(s, a, c, eta)
