from importlib import import_module

import pytest
import torch

from bilevel_kernels.linear_norm import (
    linear_norm,
    linear_norm_bytes,
    linear_norm_flops,
    linear_norm_fwd,
    linear_norm_ref,
    tiles,
)
from mutants import mutated
from numerics import assert_no_worse_than_eager

MODULE = import_module("bilevel_kernels.linear_norm")  # the package's attribute of that name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("h", "y", "dx", "dw", "dbias", "dr", "dweight", "dnorm_bias")
SHAPES = [
    ((1, 1), 16),  # one channel of one row, one tile
    ((2, 19, 37), 48),  # ragged, more than one block of rows and step of the sum, two tiles
    ((2, 9, 256), 320),  # SD 2.1's first level at 0.80, a few tokens of it
]


def tensors(shape, width, dtype, device, added=True):
    x, w = torch.randn(shape, device=device), torch.randn(width, shape[-1], device=device) / shape[-1] ** 0.5
    r, dh, dy = torch.randn(3, *shape[:-1], width, device=device)
    bias, weight, norm_bias = torch.randn(3, width, device=device)
    found = (x, w, bias, r + 3.0 if added else None, weight, norm_bias, dh, dy)  # a mean that is not 0
    return [None if t is None else t.to(dtype) for t in found]


def run(fn, *inputs):
    *leaves, dh, dy = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    h, y = fn(*leaves, 1e-5)
    torch.autograd.backward([h, y], [dh, dy])
    return h.detach(), y.detach(), *(None if t is None else t.grad for t in leaves)


def check(fn, inputs):
    gold = run(linear_norm_ref, *(None if t is None else t.double() for t in inputs))
    eager, kernel = run(linear_norm_ref, *inputs), run(fn, *inputs)
    for name, k, e, g in zip(NAMES, kernel, eager, gold, strict=True):
        if g is not None:
            assert_no_worse_than_eager(name, k, e, g)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
def test_linear_norm(shape, width, dtype, device):
    check(linear_norm, tensors(shape, width, dtype, device))


def test_with_nothing_added(device):
    check(linear_norm, tensors((5, 24), 48, torch.float32, device, added=False))


def test_one_of_the_results_may_be_unused(device):
    """A teacher's last norm, or a sum that goes no further."""
    x, w, bias, r, weight, norm_bias, dh, dy = tensors((5, 24), 32, torch.float32, device)
    both = run(linear_norm, x, w, bias, r, weight, norm_bias, dh, dy)
    nothing = torch.zeros_like(dh)
    for place, given in ((0, (dh, nothing)), (1, (nothing, dy))):
        leaf = x.clone().requires_grad_()
        linear_norm(leaf, w, bias, r, weight, norm_bias, 1e-5)[place].backward((dh, dy)[place])
        assert torch.equal(leaf.grad, run(linear_norm, x, w, bias, r, weight, norm_bias, *given)[2])
        assert not torch.equal(leaf.grad, both[2])


def test_only_what_is_asked_for_gets_a_gradient(device):
    *inputs, dh, dy = tensors((5, 24), 32, torch.float32, device)
    full = run(linear_norm, *inputs, dh, dy)
    for place, wanted in enumerate(full[2:]):
        given = [t.clone().requires_grad_(place == number) for number, t in enumerate(inputs)]
        torch.autograd.backward(linear_norm(*given, 1e-5), (dh, dy))
        assert torch.equal(given[place].grad, wanted)


def test_is_a_well_formed_custom_op(device):
    given = tensors((5, 24), 32, torch.float32, device)[:6]
    torch.library.opcheck(linear_norm_fwd, (*given[:3], None, *given[4:], 1e-5))
    torch.library.opcheck(linear_norm_fwd, (*(t.requires_grad_() for t in given), 1e-5))


def test_rows_are_two_powers_of_two():
    assert [tiles(n) for n in (16, 48, 320, 512, 640)] == [(16, 0), (32, 16), (256, 64), (512, 0), (512, 128)]
    assert [tiles(n) for n in (8, 24, 36, 224, 1280)] == [None] * 5


def test_bytes_and_flops():
    assert linear_norm_bytes(rows=10, channels=4, width=8, itemsize=2, r=True) == (40 + 32 + 240) * 2
    assert linear_norm_bytes(rows=10, channels=4, width=8, itemsize=2, r=False) == (40 + 32 + 160) * 2
    assert linear_norm_flops(rows=10, channels=4, width=8) == 2 * 10 * 4 * 8


X, V = torch.zeros(2, 3, 8), torch.zeros(48)
GOOD = {"x": X, "w": torch.zeros(48, 8), "bias": V, "r": torch.zeros(2, 3, 48), "weight": V, "norm_bias": V}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0, 0]}, r"x: shape \(8,\), expected \(..., K\)"),
        ({"x": X.double()}, "x: torch.float64, expected float32"),
        ({"w": torch.zeros(40, 8)}, "w: 40 rows, expected 16 to 640, a power of two or"),
        ({"w": torch.zeros(48, 7)}, r"w: shape \(48, 7\), expected \(48, 8\)"),
        ({"bias": V[:6]}, r"bias: shape \(6,\), expected \(48,\)"),
        ({"r": X}, r"r: shape \(2, 3, 8\), expected \(2, 3, 48\)"),
        ({"weight": V.half()}, "weight: torch.float16, expected torch.float32 or float32"),
        ({"r": torch.zeros(2, 3, 48).half()}, "r: torch.float16, expected torch.float32$"),
        ({"norm_bias": torch.zeros(48, device="meta")}, "norm_bias: on meta, x is on cpu"),
        ({"w": torch.zeros(8, 48).mT}, r"w: strides \(1, 48\) of shape \(48, 8\) are not contiguous"),
    ],
    ids=["one-axis", "dtype", "rows", "w", "bias", "r", "weight-dtype", "r-dtype", "device", "gaps"],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        linear_norm(**(GOOD | change), eps=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("there = start + k < K", "there = k < K"),
        ("acc += tl.load(bias_ptr + channel)", "acc += 2 * tl.load(bias_ptr + channel)"),
        ("two = N1 + tl.arange(0, N2)", "two = tl.arange(0, N2)"),
        ("total += tl.sum(h2, axis=1)", "total += tl.sum(h2, axis=1) * 0"),
        ("squares += tl.sum(h2 * h2, axis=1)", "squares += tl.sum(h2, axis=1)"),
        ("mean = total / N", "mean = total / N1"),
        ("squares / N + eps", "squares / N1 + eps"),
        ("y = d * rstd[:, None] * gain[None, :] + shift", "y = d * rstd[:, None] * gain[None, :] - shift"),
        ("    tl.store(rstd_ptr + row, rstd", "    tl.store(rstd_ptr + row, mean"),
        ("mask = (row < R)[:, None]\n", "mask = (row < R - 1)[:, None]\n"),
        ("dw = d.mT @ x if", "dw = d.mT @ (x * 2) if"),
        ("d if needs_r else", "dh if needs_r else"),
    ],
    ids=["step", "bias", "two", "mean", "squares", "n", "rstd", "shift", "kept", "rows", "dw", "dr"],
)
def test_notices(old, new, tmp_path, device):
    bug = mutated(MODULE.__file__, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(bug.linear_norm, tensors((2, 19, 37), 48, torch.float32, device))
