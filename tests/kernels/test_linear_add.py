from importlib import import_module

import pytest
import torch

from bilevel_kernels.linear_add import (
    linear_add,
    linear_add_bytes,
    linear_add_flops,
    linear_add_fwd,
    linear_add_ref,
)
from mutants import mutated
from numerics import assert_no_worse_than_eager

MODULE = import_module("bilevel_kernels.linear_add")  # the package's attribute of that name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    ((1, 1), 0, 1),  # one channel of one row
    ((2, 3, 37), 19, 41),  # ragged, two tensors, more than one step of either sum
    ((589, 24), 0, 40),  # more than a group of blocks of rows in fp32, and two blocks of channels
    ((2, 9, 256), 0, 320),  # SD 2.1's first level at 0.80, a few tokens of it
]


def tensors(shape, second, width, dtype, device, bias=True):
    channels = shape[-1] + second
    x, x2 = (torch.randn(*shape[:-1], c, device=device) if c else None for c in (shape[-1], second))
    weight = torch.randn(width, channels, device=device) / channels**0.5
    b = torch.randn(width, device=device) if bias else None
    r, dy = torch.randn(2, *shape[:-1], width, device=device)
    return [None if t is None else t.to(dtype) for t in (x, weight, b, r, x2, dy)]


def run(fn, x, weight, bias, r, x2, dy):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, r, x2)]
    y = fn(*leaves[:4], x2=leaves[4])
    y.backward(dy.to(y.dtype))  # not of ones: catches a backward that ignores it
    return y.detach(), *(t.grad for t in leaves if t is not None)


def check(fn, inputs):
    gold = run(linear_add_ref, *(None if t is None else t.double() for t in inputs))
    eager, kernel = run(linear_add_ref, *inputs), run(fn, *inputs)
    for name, k, e, g in zip(("y", "dx", "dweight", "dbias or dr", "dr", "dx2"), kernel, eager, gold, strict=False):
        assert_no_worse_than_eager(name, k, e, g)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "second", "width"), SHAPES, ids=str)
def test_linear_add(shape, second, width, dtype, device):
    check(linear_add, tensors(shape, second, width, dtype, device))


def test_without_a_bias(device):
    check(linear_add, tensors((5, 24), 8, 40, torch.float32, device, bias=False))


def test_only_what_is_asked_for_gets_a_gradient(device):
    x, weight, bias, r, x2, dy = tensors((5, 24), 8, 40, torch.float32, device)
    full = run(linear_add, x, weight, bias, r, x2, dy)
    linear_add(x, weight.requires_grad_(), bias, r, x2=x2).backward(dy)
    assert torch.equal(weight.grad, full[2])
    linear_add(x, weight.detach(), bias, r, x2=x2.requires_grad_()).backward(dy)
    assert torch.equal(x2.grad, full[5])


def test_incoming_gradient_may_have_gaps(device):
    x, weight, bias, r, x2, dy = tensors((2, 5, 24), 8, 16, torch.float32, device)
    wide = torch.stack([dy, dy], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    pairs = zip(*(run(linear_add, x, weight, bias, r, x2, d) for d in (wide, dy)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_is_a_well_formed_custom_op(device):
    x, weight, bias, r, x2, _ = tensors((5, 24), 8, 16, torch.float32, device)
    torch.library.opcheck(linear_add_fwd, tuple(t.requires_grad_() for t in (x, x2, weight, bias, r)))
    torch.library.opcheck(linear_add_fwd, (x.detach(), None, weight.detach()[:, :24].clone(), None, r.detach()))


def test_bytes_and_flops():
    assert linear_add_bytes(rows=10, channels=4, width=8, itemsize=2) == (40 + 32 + 160) * 2
    assert linear_add_flops(rows=10, channels=4, width=8) == 2 * 10 * 4 * 8


X, W, R = torch.zeros(2, 3, 8), torch.zeros(12, 8), torch.zeros(2, 3, 12)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "r", "x2", "message"),
    [
        (X[0, 0], W, None, R, None, r"x: shape \(8,\), expected \(..., C\)"),
        (X.double(), W, None, R, None, "x: torch.float64, expected float32"),
        (X, W[:, :7], None, R, None, r"weight: shape \(12, 7\), expected \(N, 8\)"),
        (X, W, None, R, X, r"weight: shape \(12, 8\), expected \(N, 16\)"),
        (X, W, torch.zeros(6), R, None, r"bias: shape \(6,\), expected \(12,\)"),
        (X, W, None, X, None, r"r: shape \(2, 3, 8\), expected \(2, 3, 12\)"),
        (X, torch.zeros(12, 16), None, R, X[:1], r"x2: shape \(1, 3, 8\), expected \(2, 3, 8\)"),
        (X, W.half(), None, R, None, "weight: torch.float16, expected torch.float32"),
        (X, W, torch.zeros(12, dtype=torch.int32), R, None, "bias: torch.int32, expected"),
        (X, W, torch.zeros(12, device="meta"), R, None, "bias: on meta, x is on cpu"),
        (X, torch.zeros(8, 12).mT, None, R, None, r"weight: strides \(1, 12\) of shape"),
    ],
    ids=["one-axis", "dtype", "channels", "two", "bias", "r", "x2", "weight-dtype", "bias-dtype", "device", "gaps"],
)
def test_refuses(x, weight, bias, r, x2, message):
    with pytest.raises(ValueError, match=message):
        linear_add(x, weight, bias, r, x2=x2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pid // each * GROUP", "pid // each"),
        ("pid % each // height", "pid % each // GROUP"),
        ("there = start + k < C\n", "there = k < C\n"),
        ("there = start + k < C2", "there = k < C2"),
        ("w_at + C + start", "w_at + start"),
        ("channel[None, :] * (C + C2)", "channel[None, :] * C"),
        ("acc = dot(x2, w, acc", "acc = dot(x2, w, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)"),
        ("bias_ptr + channel, mask=channel < N", "bias_ptr + channel, mask=channel < 0"),
        ("acc += tl.load(r_ptr + at, mask=mask", "acc += tl.load(r_ptr + at, mask=mask & (row < R - 1)[:, None]"),
        ("    mask = (row < R)[:, None] & (channel < N)", "    mask = (row < R)[:, None] & (channel < N - 1)"),
        ("torch.mm(dy.mT, t, out=part)", "torch.mm(dy.mT, t * 2, out=part)"),
        ("dy if needs_r else", "2 * dy if needs_r else"),
    ],
    ids=["group", "last-group", "step", "step-2", "half", "row", "first-lost", "bias", "r", "stored", "dweight", "dr"],
)
def test_notices(old, new, tmp_path, device):
    bug = mutated(MODULE.__file__, old, new, tmp_path)
    rows = 589 if "each" in old else 70
    with pytest.raises(AssertionError):
        check(bug.linear_add, tensors((rows, 24), 20, 40, torch.float32, device))
