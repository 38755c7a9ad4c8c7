"""The one place with a matrix product, and a canary for the reason that there is one."""

import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import bilevel_kernels
from bilevel_kernels.dot import dot, precision

KERNELS = sorted(Path(bilevel_kernels.__file__).parent.glob("*.py"))


@triton.jit
def _multiply(a_ptr, b_ptr, out_ptr, OURS: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + i * 16 + j), tl.load(b_ptr + i * 16 + j)
    if OURS:
        out = dot(a, b, tl.full([16, 16], 1.0, tl.float32), PRECISION)
    else:
        out = tl.dot(a, b, tl.full([16, 16], 1.0, tl.float32))
    tl.store(out_ptr + i * 16 + j, out)


def product(dtype, device, ours):
    """(what the kernel says, what it should say), of 1 + a b."""
    a, b = (torch.randn(16, 16, device=device).to(dtype) for _ in range(2))
    out = torch.full((16, 16), float("nan"), device=device)
    _multiply[(1,)](a, b, out, OURS=ours, PRECISION=precision())
    return out.double(), 1 + a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot(dtype, device):
    torch.testing.assert_close(*product(dtype, device, ours=True), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about Triton's interpreter")
def test_the_interpreter_still_multiplies_bf16_wrongly():
    """The day this fails, `dot` may call tl.dot everywhere."""
    found, expected = product(torch.bfloat16, "cpu", ours=False)
    assert (found - expected).abs().max() > 1e3


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_nobody_else_calls_it(path):
    """A bf16 product would pass no test in the interpreter, or worse, pass one."""
    assert path.name == "dot.py" or not re.search(r"\btl\.dot\b", path.read_text())
