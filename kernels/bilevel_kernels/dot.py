"""The matrix product of every kernel that has one: tensor cores on a GPU, fp32 arithmetic in Triton's interpreter."""

import torch
import triton
import triton.language as tl

# The interpreter multiplies bf16 matrices as if they held integers, without a word (triton 3.6 and 3.9).
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b for a (M, K), b (K, N) of one dtype and acc (M, N) fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def precision(dtype: torch.dtype = torch.float32, *, convolution: bool = False) -> str:
    """How operands are multiplied: "tf32" for fp32 ones where torch is told that it may, else "ieee". Of convolutions
    it is told by a flag of their own, which is set unless somebody clears it."""
    allowed = torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed and dtype == torch.float32 else "ieee"
