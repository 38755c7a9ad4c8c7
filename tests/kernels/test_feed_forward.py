from importlib import import_module

import pytest
import torch

from bilevel_kernels.feed_forward import (
    feed_forward,
    feed_forward_bwd,
    feed_forward_bytes,
    feed_forward_flops,
    feed_forward_ref,
)
from mutants import mutated
from numerics import assert_no_worse_than_eager

MODULE = import_module("bilevel_kernels.feed_forward")  # the package's attribute of that name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2", "dr")
SHAPES = [
    ((1, 1), 1),  # one channel of one row
    ((2, 3, 37), 41),  # ragged, more than one step of the sum
    ((70, 24), 40),  # two blocks of rows and of channels in fp32; groups of blocks are those of `linear_add`
    ((2, 9, 320), 200),  # SD 2.1's first level, a few tokens and channels of it
]


def tensors(shape, width, dtype, device):
    C = shape[-1]
    x, r, dy = torch.randn(3, *shape, device=device)
    w1, w2 = torch.randn(2 * width, C, device=device) * 1.7 / C**0.5, torch.randn(C, width, device=device) / width**0.5
    found = (x, w1, torch.randn(2 * width, device=device), w2, torch.randn(C, device=device), r, dy)
    return [t.to(dtype) for t in found]


def run(fn, *inputs):
    *leaves, dy = inputs
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = fn(*leaves)
    y.backward(dy)  # not of ones: catches a backward that ignores it
    return y.detach(), *(t.grad for t in leaves)


def check(fn, inputs):
    gold = run(feed_forward_ref, *(t.double() for t in inputs))
    eager, kernel = run(feed_forward_ref, *inputs), run(fn, *inputs)
    for name, k, e, g in zip(NAMES, kernel, eager, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, g)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
def test_feed_forward(shape, width, dtype, device):
    check(feed_forward, tensors(shape, width, dtype, device))


def test_without_gradients_it_is_the_same(device):
    *inputs, _ = tensors((5, 24), 40, torch.bfloat16, device)
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.equal(feed_forward(*inputs), feed_forward(*leaves).detach())


def test_only_what_is_asked_for_gets_a_gradient(device):
    *inputs, dy = tensors((5, 24), 40, torch.float32, device)
    full = run(feed_forward, *inputs, dy)
    for place, wanted in enumerate(full[1:]):
        given = [t.clone().requires_grad_(place == number) for number, t in enumerate(inputs)]
        feed_forward(*given).backward(dy)
        assert torch.equal(given[place].grad, wanted)


def test_incoming_gradient_may_have_gaps(device):
    *inputs, dy = tensors((2, 5, 24), 16, torch.float32, device)
    wide = torch.stack([dy, dy], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    pairs = zip(run(feed_forward, *inputs, wide), run(feed_forward, *inputs, dy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_is_a_well_formed_custom_op(device):
    _, _, b1, w2, b2, _, dy = tensors((5, 24), 16, torch.float32, device)
    torch.library.opcheck(feed_forward_bwd, (dy, w2, torch.randn(5, 32, device=device), b1, b2))


def test_bytes_and_flops():
    assert feed_forward_bytes(rows=10, channels=4, width=8, itemsize=2) == (40 + 32 + 320) * 2
    assert feed_forward_flops(rows=10, channels=4, width=8) == 2 * 10 * 4 * 8


X = torch.zeros(2, 3, 8)
GOOD = {"x": X, "w1": torch.zeros(12, 8), "b1": torch.zeros(12), "w2": torch.zeros(8, 6), "b2": torch.zeros(8), "r": X}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0, 0]}, r"x: shape \(8,\), expected \(..., C\)"),
        ({"x": X.double()}, "x: torch.float64, expected float32"),
        ({"w2": torch.zeros(7, 6)}, r"w2: shape \(7, 6\), expected \(8, F\)"),
        ({"w1": torch.zeros(10, 8)}, r"w1: shape \(10, 8\), expected \(12, 8\)"),
        ({"b1": torch.zeros(6)}, r"b1: shape \(6,\), expected \(12,\)"),
        ({"r": X[:1]}, r"r: shape \(1, 3, 8\), expected \(2, 3, 8\)"),
        ({"w2": torch.zeros(8, 6).half()}, "w2: torch.float16, expected torch.float32"),
        ({"b2": torch.zeros(8, dtype=torch.int32)}, "b2: torch.int32, expected torch.float32 or"),
        ({"b2": torch.zeros(8, device="meta")}, "b2: on meta, x is on cpu"),
        ({"w2": torch.zeros(6, 8).mT}, r"w2: strides \(1, 8\) of shape \(8, 6\) are not contiguous"),
    ],
    ids=["one-axis", "dtype", "w2", "w1", "b1", "r", "w2-dtype", "b2-dtype", "device", "gaps"],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        feed_forward(**(GOOD | change))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("there = start + k < C", "there = start + k < C - 1"),
        ("if n == 0:", "if n == 2:"),
        ("tl.store(db2_ptr + m * C + start + k", "tl.store(db2_ptr + m * C + k"),
        ("v += tl.load(b1_ptr + channel, mask=channel < F", "v += tl.load(b1_ptr + channel, mask=channel < 0"),
        ("g += tl.load(b1_ptr + F + channel", "g += tl.load(b1_ptr + channel"),
        ("dv = da * (g * cdf)", "dv = da * cdf"),
        ("dg = da * v * (cdf + g * pdf)", "dg = da * v * cdf"),
        ("tl.store(at, tl.sum(dv, axis=0)", "tl.store(at, tl.sum(dg, axis=0)"),
        ("tl.store(dh_ptr + at + F, dg", "tl.store(dh_ptr + at + F, dv"),
        ("    mask = (row < R)[:, None] & (channel < F)", "    mask = (row < R)[:, None] & (channel < F - 1)"),
        ("dy.mT @ y if", "dy.mT @ (y * 2) if"),
        ("dy if needs_r", "2 * dy if needs_r"),
    ],
    ids=["step", "no-db2", "db2", "no-bias", "bias", "dv", "dg", "db1", "dh", "stored", "dw2", "dr"],
)
def test_notices(old, new, tmp_path, device):
    bug = mutated(MODULE.__file__, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(bug.feed_forward, tensors((70, 24), 40, torch.float32, device))
