import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import numerics
from bilevel_fast.ops.dispatch import group_norm, group_norm_silu
from bilevel_fast.ops.native import GroupNorm

# (B, C, H, W), groups, padding
CASES = {
    "whole vectors": ((3, 48, 8, 8), 16, 0),
    "groups of 1": ((2, 5, 7, 5), 5, 0),
    "groups of 3, rows of one pixel are no whole vectors": ((3, 24, 6, 5), 8, 0),
    "groups of 10, more pixels than fit whole rows": ((2, 30, 7, 3), 3, 0),
    "as wide as a row of one pixel": ((2, 300, 3, 3), 30, 0),
    "one pixel": ((4, 12, 1, 1), 2, 0),
    "fewer pixels than whole vectors need": ((2, 9, 1, 3), 3, 0),
    "one group": ((2, 7, 4, 4), 1, 0),
    "padding": ((3, 27, 6, 5), 9, 5),
    "one sample": ((1, 18, 9, 9), 6, 6),
}
ALL = pytest.mark.parametrize(("shape", "groups", "padding"), CASES.values(), ids=CASES.keys())
SILU = pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Memory that torch hands out uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def problem(shape, groups, padding):
    """x away from zero by many of its deviations, zeros in the padding, a gradient that is not 1 anywhere."""
    batch, channels, height, width = shape
    x = F.pad(-2.3 + 0.5 * torch.randn(shape), (0, 0, 0, 0, 0, padding))
    norm = nn.GroupNorm(groups, channels, eps=1e-5)
    nn.init.normal_(norm.weight, 0.7, 0.5)
    nn.init.normal_(norm.bias, 0.3, 1.0)
    grad = 1.7 + torch.randn(batch, channels + padding, height, width)
    return x.to(memory_format=torch.channels_last), norm, grad.to(memory_format=torch.channels_last)


def results(op, x, norm, grad):
    """out, dx, dweight, dbias."""
    x = x.detach().requires_grad_()
    out = op(x, norm)
    return [out.detach(), *torch.autograd.grad(out, (x, norm.weight, norm.bias), grad)]


def operation(silu, padding=0):
    return partial(group_norm_silu, padding=padding) if silu else group_norm


@SILU
@ALL
def test_no_worse_than_eager(shape, groups, padding, silu, monkeypatch, instruction_set):
    x, norm, grad = problem(shape, groups, padding if silu else 0)
    op = operation(silu, padding)
    native = results(op, x, norm, grad)
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    eager = results(op, x, norm, grad)
    gold = results(op, x.double(), copy.deepcopy(norm).double(), grad.double())
    for name, *values in zip(("out", "dx", "dweight", "dbias"), native, eager, gold, strict=True):
        numerics.assert_no_worse_than_eager(name, *values)


def test_silu_over_its_whole_range(instruction_set):
    """Of one pixel in groups of one channel nothing is left but the bias."""
    norm = nn.GroupNorm(4001, 4001)
    with torch.no_grad():
        norm.bias.copy_(torch.linspace(-100, 100, 4001))
    x = torch.randn(1, 4001, 1, 1)
    out, _, _, dbias = results(group_norm_silu, x, norm, torch.ones_like(x))
    z = norm.bias.detach().double().requires_grad_()
    gold = F.silu(z)
    (slope,) = torch.autograd.grad(gold.sum(), z)
    # four roundings, the exponential's 1.1 ulp among them; e^-y is held at e^87 below -87
    torch.testing.assert_close(out.flatten().double(), gold.detach(), rtol=4 * 2**-23, atol=1e-35)
    torch.testing.assert_close(dbias.double(), slope, rtol=6 * 2**-23, atol=2**-24)


def test_mean_far_from_zero():
    """A mean of 1000 deviations costs the digits that x itself has lost, and no more."""
    x = (1000 + torch.randn(2, 12, 16, 16)).to(memory_format=torch.channels_last)
    norm = nn.GroupNorm(4, 12)
    gold = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    torch.testing.assert_close(group_norm(x, norm).double(), gold, rtol=0, atol=1000 * 2**-23)


def test_padding_is_not_read_and_comes_out_as_zeros():
    shape, groups, padding = CASES["padding"]
    x, norm, grad = problem(shape, groups, padding)
    op = operation(True, padding)
    clean = results(op, x, norm, grad)
    x[:, -padding:] = grad[:, -padding:] = float("nan")
    for before, after in zip(clean, results(op, x, norm, grad), strict=True):
        assert torch.equal(before, after)
    out, dx, *_ = clean
    for padded in (out, dx):
        assert padded.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(padded[:, -padding:], torch.zeros_like(padded[:, -padding:]))


@SILU
def test_same_bits_twice_and_on_any_number_of_threads(silu, at_threads):
    x, norm, grad = problem((5, 24, 6, 5), 8, 0)
    first, *others = (at_threads(n, lambda: results(operation(silu), x, norm, grad)) for n in (1, 1, 2, 3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_gradient_of_any_layout():
    x, norm, grad = problem((3, 24, 6, 5), 8, 0)
    a, b = (results(group_norm_silu, x, norm, g) for g in (grad, grad.contiguous()))
    assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))
    out, dx, *_ = results(group_norm_silu, x, norm, torch.ones(()).expand_as(grad))
    assert out.isfinite().all()
    assert dx.isfinite().all()


def test_without_grad_nothing_is_saved():
    x, norm, _ = problem((3, 24, 6, 5), 8, 0)
    with torch.no_grad():
        frozen = group_norm_silu(x, norm)
    assert frozen.grad_fn is None
    assert torch.equal(frozen, group_norm_silu(x, norm).detach())


@pytest.mark.parametrize(
    ("native", "channels", "message"),
    [
        (GroupNorm(8, 1e-5, padding=1, silu=True), 24, r"24 channels, expected 24 \+ 1"),
        (GroupNorm(5, 1e-5, padding=0, silu=True), 24, "5 groups of 24 channels"),
        (GroupNorm(8, 1e-5, padding=-8, silu=True), 24, "padding of -8 channels"),
        (GroupNorm(8, 1e-5, padding=0, silu=True), 16, r"24 channels, expected 16 \+ 0"),
    ],
)
def test_refuses_what_it_would_read_out_of_bounds(native, channels, message):
    x, _, _ = problem((3, 24, 6, 5), 8, 0)
    with pytest.raises(AssertionError, match=message):
        native.forward(x, torch.ones(channels), torch.ones(channels))
