"""Gradients that stay where backward has left them until somebody wants them in the buffer."""

import copy

import pytest
import torch
from torch import nn

from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 80, 1), nn.Flatten(), nn.Linear(80 * 16, 7))
    layers.append(nn.Linear(7, 7))  # which never gets a gradient
    return layers.to(memory_format=torch.channels_last)


def backward(flat, step):
    """A gradient at every parameter but those of the last layer."""
    for number, p in enumerate(list(flat.module.parameters())[:-2]):
        torch.manual_seed(100 * step + number)
        p.grad = torch.randn_like(p)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def flat(request):
    flat = FlatParameters(network(), request.param, average=True)
    flat.place()
    return flat


def test_who_asks_for_the_buffer_gets_all_of_it(flat):
    other = copy.deepcopy(flat)
    for which, take in ((flat, lambda: flat.take(0, 1, add=False)), (other, other.collect)):
        which.gradient.fill_(7.0)
        backward(which, 0)
        take()
        assert all(p.grad is None for p in which.module.parameters())
    assert torch.equal(flat.gradient, other.gradient)
    assert flat.apart() is None, "it is in the buffer"


def test_without_places_it_is_moved(flat):
    other = FlatParameters(network(), flat.dtype)
    backward(other, 0)
    other.take(0, 1, add=False)
    assert other.apart() is None
    assert other.gradient.any()


def test_what_is_added_is_added_to_what_was_left(flat):
    other = copy.deepcopy(flat)
    for which in (flat, other):
        backward(which, 0)
        which.take(0, 1, add=False) if which is flat else which.collect()
        backward(which, 1)
        which.take(0, 1, add=True) if which is flat else which.collect(add=True)
    assert torch.equal(flat.gradient, other.gradient)


def test_large_gradients_stay_and_their_norm_is_that_of_all(flat):
    backward(flat, 0)
    given = [p.grad for p in flat.module.parameters()]
    flat.take(0, 1, add=False)
    apart = flat.apart()
    assert apart is not None
    assert [t.data_ptr() for t in apart.large] == [given[2].data_ptr(), given[4].data_ptr()], "5,120 and 8,960 elements"
    wanted = torch.cat([g.flatten() for g in given if g is not None]).double().norm()
    torch.testing.assert_close(apart.norm().double(), wanted, rtol=1e-5, atol=0)
    with pytest.raises(AssertionError, match="where backward had left it"):
        _ = flat.gradient
    backward(flat, 1)
    flat.take(0, 1, add=False)
    assert flat.gradient.any()


def test_one_that_lies_otherwise_is_moved(flat):
    """As a contiguous gradient of a channels_last weight, and one that starts between two multiples of 16 bytes."""
    backward(flat, 0)
    parameters = list(flat.module.parameters())
    parameters[2].grad = torch.randn(80, 64, 1, 1).to(flat.dtype)  # of one pixel: the order is the same
    shifted = torch.randn(80 * 16 * 7 + 1).to(flat.dtype)[1:].view(7, -1)
    parameters[4].grad = shifted
    flat.take(0, 1, add=False)
    apart = flat.apart()
    assert apart is not None
    assert apart.large[0].data_ptr() != flat.views(apart.buffer)["1.weight"].data_ptr()
    assert apart.large[1].data_ptr() == flat.views(apart.buffer)["3.weight"].data_ptr()
    assert torch.equal(apart.large[1], shifted)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_from_the_buffer(dtype, clip_norm, monkeypatch):
    """Bit for bit where nothing is clipped; the norm is summed in another order."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    ways = []
    for lie_apart in (True, False):
        flat = FlatParameters(network(), dtype, average=True)
        optimizer = LevelOptimizer(flat, 1e-2, 0, clip_norm, make=lambda flat: AdamW(flat, 0.9))
        for step in range(3):
            backward(flat, step)
            if lie_apart:
                flat.take(0, 1, add=False)
            else:
                flat.collect()
            optimizer.step()
        ways.append(flat)
    rtol = 0.0 if clip_norm is None else 1e-5
    for name in ("master", "average", "compute"):
        mine, theirs = (getattr(flat, name) for flat in ways)
        torch.testing.assert_close(mine, theirs, rtol=max(rtol, 2**-7 * (name == "compute") * (rtol > 0)), atol=rtol)


def test_a_gradient_that_is_not_finite_moves_nothing(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    flat = FlatParameters(network())
    optimizer, before = LevelOptimizer(flat, 1e-2, 0), flat.master.clone()
    backward(flat, 0)
    list(flat.module.parameters())[4].grad[3, 5] = float("nan")
    flat.take(0, 1, add=False)
    assert not optimizer.step().isfinite()
    assert torch.equal(flat.master, before)
    assert optimizer.bad_in_a_row == 1
