"""The optimizer of a level: torch's AdamW to the last digits, through whatever provider."""

import copy

import pytest
import torch
from torch import nn

from bilevel_fast import native
from bilevel_fast.optim import AdamW, LevelOptimizer


def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.LazyLinear(7))
    layers(torch.zeros(1, 3, 6, 6))
    return layers.to(memory_format=torch.channels_last)


def train(layers, optimizer, steps):
    for step in steps:
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layers(x).square().mean().backward()
        optimizer.step()


def assert_close(one, other, rtol=1e-5):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    made = []
    step = native.AdamW.step
    monkeypatch.setattr(native.AdamW, "step", lambda *args, **kwargs: made.append(1) or step(*args, **kwargs))
    return made


def test_is_torchs(calls):
    ours, theirs = model(), model()
    train(ours, LevelOptimizer(ours.parameters(), lr=1e-2, warmup=0), range(12))
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    train(theirs, reference, range(12))
    assert_close(ours, theirs)
    assert len(calls) == 11, "the first step is torch's: it creates the state"


def test_state_goes_to_torch_and_back(calls):
    """6 native steps, 3 of torch on the same state, 3 native ones: as 12 of torch."""
    ours, theirs = model(), model()
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=True), range(12))
    optimizer = LevelOptimizer(ours.parameters(), lr=1e-2, warmup=0)
    train(ours, optimizer, range(6))
    state = copy.deepcopy(optimizer.state_dict())
    other = LevelOptimizer(ours.parameters(), lr=1e-2, warmup=0, make=lambda p: torch.optim.AdamW(p, fused=True))
    other.load_state_dict(state)
    train(ours, other, range(6, 9))
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(ours, optimizer, range(9, 12))
    assert_close(ours, theirs)
    assert len(calls) == 5 + 3


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad):
    layers = model()
    optimizer = LevelOptimizer(layers.parameters(), lr=1e-2, warmup=0)
    train(layers, optimizer, range(3))
    before = copy.deepcopy((layers.state_dict(), optimizer.inner.state_dict()["state"]))
    for p in layers.parameters():
        p.grad = torch.full_like(p, bad)
    optimizer.step()
    after = (layers.state_dict(), optimizer.inner.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.bad_in_a_row == 1


def test_parameters_at_different_steps_go_to_torch(calls):
    layers = model()
    optimizer = AdamW(layers.parameters())
    layers[0].requires_grad_(False)
    train(layers, optimizer, range(1))
    layers[0].requires_grad_(True)
    train(layers, optimizer, range(1, 3))
    assert not calls


def test_one_list_is_checked_once(calls, monkeypatch):
    made = []
    monkeypatch.setattr("bilevel_fast.native.adamw_ema.check_dense", lambda *_: made.append(1))
    layers = model()
    train(layers, LevelOptimizer(layers.parameters(), lr=1e-2, warmup=0), range(5))
    assert len(calls) == 4
    assert len(made) == 1
