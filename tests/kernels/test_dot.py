"""The one place with a matrix product, and a canary for the reason that there is one."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize("matmul", [True, False])
@pytest.mark.parametrize("convolution", [True, False])
def test_each_kernel_reads_the_flag_of_what_it_stands_for(monkeypatch, device, matmul, convolution):
    """torch's convolutions obey a flag of their own; a product that is slower than torch's for it is no bargain."""
    monkeypatch.setattr(torch, "backends", SimpleNamespace(**vars(torch.backends)))
    monkeypatch.setattr(torch.backends, "cuda", SimpleNamespace(matmul=SimpleNamespace(allow_tf32=matmul)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolution)
    seen = {}

    class Seen:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*args, **constants):
                seen[self.name] = constants["PRECISION"]
                return self.kernel[grid](*args, **constants)

            return launch

    for module in ("structured_conv2d", "structured_conv2d_wgrad", "pruned_attention"):
        module = importlib.import_module(f"bilevel_kernels.{module}")
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and "PRECISION" in getattr(kernel, "arg_names", ()):
                monkeypatch.setattr(module, name, Seen(name, kernel))
    x, weight = torch.randn(1, 8, 2, 2, device=device), torch.randn(8, 8, 3, 3, device=device)
    x, weight = (t.to(memory_format=torch.channels_last).requires_grad_() for t in (x, weight))
    bilevel_kernels.structured_conv2d(x, weight).sum().backward()
    q, k, v = (torch.randn(1, 4, 16, device=device) for _ in range(3))
    bilevel_kernels.pruned_attention(q, k, v, 1)
    wanted = {"conv2d": convolution, "attention": matmul}
    assert len(seen) == 3
    for name, found in seen.items():
        allowed = next(flag for part, flag in wanted.items() if part in name)
        assert found == ("tf32" if allowed else "ieee"), name


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_nobody_else_calls_it(path):
    """A bf16 product would pass no test in the interpreter, or worse, pass one."""
    assert path.name == "dot.py" or not re.search(r"\btl\.dot\b", path.read_text())
