from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from bilevel_kernels.geglu import geglu_ref
from bilevel_kernels.linear_geglu import (
    linear_geglu,
    linear_geglu_bytes,
    linear_geglu_flops,
    linear_geglu_fwd,
    linear_geglu_ref,
)
from mutants import mutated
from numerics import assert_no_worse_than_eager

MODULE = import_module("bilevel_kernels.linear_geglu")  # the package's attribute of that name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    ((1, 1), 1),  # one channel of one row
    ((2, 3, 37), 41),  # ragged, more than one step of the sum
    ((589, 24), 40),  # more than a group of blocks of rows in fp32, and two blocks of channels
    ((2, 9, 320), 160),  # SD 2.1's first level, a few tokens and channels of it
]


def run(fn, x, weight, bias, dy):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = fn(*leaves)
    y.backward(dy.to(y.dtype))  # not of ones: catches a backward that ignores it
    return y.detach(), *(t.grad for t in leaves if t is not None)


def tensors(shape, width, dtype, device, bias=True):
    x, dy = torch.randn(shape, device=device), torch.randn(*shape[:-1], width, device=device)
    weight = torch.randn(2 * width, shape[-1], device=device) * 1.7 / shape[-1] ** 0.5
    b = torch.randn(2 * width, device=device) if bias else None
    return tuple(None if t is None else t.to(dtype) for t in (x, weight, b, dy))


def check(fn, inputs):
    gold = run(linear_geglu_ref, *(None if t is None else t.double() for t in inputs))
    eager, kernel = run(linear_geglu_ref, *inputs), run(fn, *inputs)
    for name, k, e, g in zip(("y", "dx", "dweight", "dbias"), kernel, eager, gold, strict=False):
        assert_no_worse_than_eager(name, k, e, g)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
def test_linear_geglu(shape, width, dtype, device):
    check(linear_geglu, tensors(shape, width, dtype, device))


def test_without_a_bias(device):
    check(linear_geglu, tensors((5, 24), 40, torch.float32, device, bias=False))


def test_nothing_is_kept_where_nobody_asks_for_gradients(device):
    x, weight, bias, _ = tensors((5, 24), 40, torch.bfloat16, device)
    y, h = linear_geglu_fwd(x, weight, bias, False)
    again, kept = linear_geglu_fwd(x, weight, bias, True)
    assert h.numel() == 0
    assert torch.equal(y, again)
    torch.testing.assert_close(kept, torch.nn.functional.linear(x, weight), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        assert torch.equal(linear_geglu(x, weight.requires_grad_(), bias), y)


def test_bias_may_have_another_dtype(device):
    """dbias is in fp32 and has the error of h alone; fp16, as the interpreter cuts bf16 off where a card rounds it."""
    x, weight, _, dy = tensors((2, 5, 24), 16, torch.float16, device)
    bias = torch.randn(32, device=device)
    found = run(linear_geglu, x, weight, bias, dy)
    assert [t.dtype for t in found] == [torch.float16] * 3 + [torch.float32]
    eager = run(lambda x, w, b: geglu_ref(F.linear(x, w), b), x, weight, bias, dy)
    gold = run(linear_geglu_ref, *(t.double() for t in (x, weight, bias, dy)))
    for name, k, e, g in zip(("y", "dx", "dweight", "dbias"), found, eager, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, g)


def test_only_what_is_asked_for_gets_a_gradient(device):
    x, weight, bias, dy = tensors((5, 24), 40, torch.float32, device)
    full = run(linear_geglu, x, weight, bias, dy)
    linear_geglu(x, weight.requires_grad_(), bias).backward(dy)
    assert torch.equal(weight.grad, full[2])


def test_incoming_gradient_may_have_gaps(device):
    x, weight, bias, dy = tensors((2, 5, 24), 16, torch.float32, device)
    wide = torch.stack([dy, dy], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    pairs = zip(run(linear_geglu, x, weight, bias, wide), run(linear_geglu, x, weight, bias, dy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_is_a_well_formed_custom_op(device):
    x, weight, bias, _ = tensors((5, 24), 16, torch.float32, device)
    leaves = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(linear_geglu_fwd, (*leaves, True))
    torch.library.opcheck(linear_geglu_fwd, (x.detach(), weight.detach(), None, False))


def test_bytes_and_flops():
    assert linear_geglu_bytes(rows=10, channels=4, width=8, itemsize=2, keep=False) == (40 + 64 + 80) * 2
    assert linear_geglu_bytes(rows=10, channels=4, width=8, itemsize=2, keep=True) == (40 + 64 + 240) * 2
    assert linear_geglu_flops(rows=10, channels=4, width=8) == 2 * 10 * 4 * 16


X, W = torch.zeros(2, 3, 8), torch.zeros(12, 8)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (X[0, 0], W, None, r"x: shape \(8,\), expected \(..., C\)"),
        (X[:0], W, None, r"x: shape \(0, 3, 8\), expected"),
        (X.double(), W, None, "x: torch.float64, expected float32"),
        (X, W[:, :7], None, r"weight: shape \(12, 7\), expected \(2F, 8\)"),
        (X, W[:7], None, r"weight: shape \(7, 8\), expected"),
        (X, W.half(), None, "weight: torch.float16, expected torch.float32"),
        (X, W, torch.zeros(6), r"bias: shape \(6,\), expected \(12,\)"),
        (X, W, torch.zeros(12, dtype=torch.int32), "bias: torch.int32, expected"),
        (X, W, torch.zeros(12, device="meta"), "bias: on meta, x is on cpu"),
        (X.mT.contiguous().mT, W, None, r"x: strides \(24, 1, 3\) of shape \(2, 3, 8\) are not contiguous"),
        (X, torch.zeros(8, 12).mT, None, r"weight: strides \(1, 12\) of shape"),
    ],
    ids=["one-axis", "empty", "dtype", "channels", "odd", "weight-dtype", "bias", "bias-dtype", "device", "gaps", "W"],
)
def test_refuses(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        linear_geglu(x, weight, bias)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("w_at + F * C + start", "w_at + start"),
        ("pid // each * GROUP", "pid // each"),
        ("pid % each // height * BLOCK_N", "pid % each // GROUP * BLOCK_N"),
        ("there = start + k < C", "there = k < C"),
        ("tl.store(at + F, gate.to", "tl.store(at, gate.to"),
        ("gate += tl.load(bias_ptr + F + channel", "gate += tl.load(bias_ptr + channel"),
        (
            "value += tl.load(bias_ptr + channel, mask=channel < F",
            "value += tl.load(bias_ptr + channel, mask=channel < 0",
        ),
        ("y = value * (gate * normal_cdf(gate))", "y = gate * (value * normal_cdf(value))"),
        ("y = value * (gate", "y = (gate"),
        ("w_mask = there[:, None] & (channel < F)", "w_mask = there[:, None] & (channel < F - 1)"),
        ("x = tl.load(x_at + start, mask=(row < R)", "x = tl.load(x_at + start, mask=(row < R - 1)"),
        ("\n    mask = (row < R)[:, None] & (channel < F)", "\n    mask = (row < R)[:, None] & (channel < F - 1)"),
        ("dweight = dh[0].mT @ x", "dweight = dh[0].mT @ (x * 2)"),
    ],
    ids=[
        "half",
        "group",
        "last-group",
        "last-step",
        "h",
        "bias",
        "no-bias",
        "swapped",
        "value",
        "last-channel",
        "last-row",
        "stored",
        "dweight",
    ],
)
def test_notices(old, new, tmp_path, device):
    bug = mutated(MODULE.__file__, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(bug.linear_geglu, tensors((589, 24), 40, torch.float32, device))
