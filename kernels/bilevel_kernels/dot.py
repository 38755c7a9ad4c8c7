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


def precision() -> str:
    """How fp32 operands are multiplied: "tf32" where torch is told that it may, else "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
