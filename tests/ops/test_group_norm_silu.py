"""GroupNorm with SiLU of csrc/ with each instruction set: the contract, and what only this code has.

The contract runs for Triton in tests/kernels. torch itself does not keep to it: on the CPU it takes the variance of
channels_last from E[x^2] - E[x]^2.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel_fast.ops import dispatch
from bilevel_fast.ops.native import GroupNorm
from group_norm_contract import GroupNormContract, Norm, make, run, same


def dispatched(x, weight, bias, groups, eps, *, time=None, padding=0, silu=True):
    norm = nn.GroupNorm(groups, len(weight), eps)
    del norm.weight, norm.bias  # which would take parameters only
    norm.weight, norm.bias = weight, bias
    return dispatch._group_norm(x, norm, padding, time, silu)[0]


NORM = Norm(dispatched)


@pytest.fixture
def gn(instruction_set, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    return NORM


class TestContract(GroupNormContract):
    pass


def test_silu_over_its_whole_range(gn):
    """Of one pixel in groups of one channel nothing is left but the bias."""
    shape, bias = (1, 4001, 1, 1, 1, 0), torch.linspace(-100, 100, 4001)
    x, weight, _, _ = make(gn, shape)
    out, _, _, dbias = run(lambda *args, **_: gn.fn(*args), shape, (x, weight, bias, None))
    z = bias.double().requires_grad_()
    gold = F.silu(z)
    gold.backward(torch.randn(1, 4001, 1, 1, generator=torch.Generator().manual_seed(1)).flatten())
    # four roundings, the exponential's 1.1 ulp among them; e^-y is held at e^87 below -87
    torch.testing.assert_close(out.flatten().double(), gold.detach(), rtol=4 * 2**-23, atol=1e-35)
    torch.testing.assert_close(dbias.double(), z.grad, rtol=6 * 2**-23, atol=2**-22)


@pytest.mark.parametrize("silu", [False, True])
def test_any_number_of_threads(silu, at_threads, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    shape = (5, 8, 3, 6, 5, 0)
    tensors = make(NORM, shape)
    first, *others = (at_threads(n, lambda: run(dispatched, shape, tensors, silu)) for n in (1, 2, 3))
    assert all(same(first, other) for other in others)


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
    x = torch.randn(3, 24, 6, 5).to(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match=message):
        native.forward(x, torch.ones(channels), torch.ones(channels))
