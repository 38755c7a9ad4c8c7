"""Tensors times a scalar that lies on the device, in place, and for free where that scalar is one.

    x <- x * (factor * by)                              for each x of a list; nothing where factor * by is 1

Why fused  a loss that stores its gradient in the forward pass has to multiply it by the upstream gradient, which is 1
           in nearly every step: eager reads and writes all of it to find out, asking on the host stalls the stream

Shapes     x: any shape, n elements; factor: ()
Dtypes     fp32 | fp16 | bf16 each; arithmetic in fp32
Layout     contiguous or channels_last each; anything else is refused
Numerics   one rounding to the dtype of x; no bit changes where the product is 1
Traffic    4 bytes per program, or reads n and writes n
Source     own

A tensor saved for backward and scaled in there has another version afterwards. So autograd refuses a second backward
through the same graph, as it should: the gradient it would need is no longer there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KIND = "pointwise"
UNTOUCHED = ("tensors",)  # where the product is 1, as in nearly every step: what the cost is counted for
BLOCK = 2048  # two 16-byte loads a thread at 16 bits
PROGRAMS = 1024  # 4 warps each: enough loads in flight to saturate any card, cheap to start in vain


# --- reference ------------------------------------------------------------------------------


def scale_unless_one_ref(tensors: list[Tensor], factor: Tensor, by: float = 1.0) -> list[Tensor]:
    """The formula, in the dtype of its inputs and out of place: the oracle of the tests."""
    return [x * (factor * by).to(x.dtype) for x in tensors]


# --- kernels --------------------------------------------------------------------------------


@triton.jit
def _scale_unless_one_kernel(
    factor_ptr,  # ()
    x_ptrs,  # tuple of (n,)
    sizes,  # tuple of n
    by,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32) * by
    if factor != 1.0:
        for i in tl.static_range(len(x_ptrs)):
            start = tl.program_id(0).to(tl.int64) * BLOCK
            while start < sizes[i]:  # not `range`: the interpreter cannot count to a runtime number
                offs = start + tl.arange(0, BLOCK)
                mask = offs < sizes[i]
                x = tl.load(x_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
                tl.store(x_ptrs[i] + offs, (x * factor).to(x_ptrs[i].dtype.element_ty), mask=mask)
                start += tl.num_programs(0) * BLOCK


# --- launchers ------------------------------------------------------------------------------


@torch.library.custom_op("bilevel_kernels::scale_unless_one", mutates_args=("tensors",))
def scale_unless_one(tensors: list[Tensor], factor: Tensor, by: float) -> None:
    sizes = tuple(x.numel() for x in tensors)
    grid = (min(triton.cdiv(max(sizes), BLOCK), PROGRAMS),)
    _scale_unless_one_kernel[grid](factor, tuple(tensors), sizes, by, BLOCK=BLOCK)


@scale_unless_one.register_fake
def _(tensors, factor, by):
    return None


# --- public ---------------------------------------------------------------------------------


def scale_unless_one_(tensors: list[Tensor], factor: Tensor, by: float = 1.0) -> None:
    """Multiply every tensor by `factor * by` in place; leave memory alone where that is exactly 1.

    Args:
        tensors: At least one; all on the device of `factor`. Their version counters go up in either case.
        factor: A scalar on the device. It is not read on the host.
        by: A known second factor.

    Raises:
        ValueError: No tensor, an empty one, one with gaps or of another dtype or device, or factor is not a scalar.
    """
    if not tensors:
        raise ValueError("tensors: none")
    if factor.numel() != 1:
        raise ValueError(f"factor: shape {tuple(factor.shape)} is not that of a scalar")
    for i, x in enumerate(tensors):
        name = f"tensors[{i}]"
        if not x.numel():
            raise ValueError(f"{name}: shape {tuple(x.shape)} has no elements")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name}: {x.dtype} is none of float32, float16 and bfloat16")
        if x.device != factor.device:
            raise ValueError(f"{name}: on {x.device}, factor on {factor.device}")
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            raise ValueError(f"{name}: strides {x.stride()} of shape {tuple(x.shape)} have gaps or are permuted")
    scale_unless_one(tensors, factor, by)
