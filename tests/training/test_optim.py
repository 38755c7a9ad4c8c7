"""The optimizer of a level: torch's AdamW to the last digits, through whatever provider."""

import copy

import pytest
import torch
from torch import nn

from bilevel_fast.ops import native
from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters

LR, DECAY = 1e-2, 0.9


def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.LazyLinear(7))
    layers(torch.zeros(1, 3, 6, 6))
    return layers.to(memory_format=torch.channels_last)


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model().parameters()]


def train(optimizer, steps):
    for step in steps:
        for p, g in zip(optimizer.flat.module.parameters(), gradients(step), strict=True):
            p.grad = g.to(p.dtype, memory_format=torch.preserve_format)
        optimizer.flat.collect()
        optimizer.step()


def reference(steps, clip_norm=None, bf16=False):
    """torch.optim.AdamW over the parameters one by one; (parameters, their average)."""
    layers = model()
    average = [p.detach().clone() for p in layers.parameters()]
    optimizer = torch.optim.AdamW(layers.parameters(), lr=LR, weight_decay=0.0)
    for step in steps:
        for p, g in zip(layers.parameters(), gradients(step), strict=True):
            p.grad = g.bfloat16().float() if bf16 else g
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(layers.parameters(), clip_norm)
        optimizer.step()
        for a, p in zip(average, layers.parameters(), strict=True):
            a.lerp_(p.detach(), 1 - DECAY)
    return [p.detach() for p in layers.parameters()], average


@pytest.mark.parametrize("provider", ["torch", "native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_is_torchs(monkeypatch, device, provider, dtype, clip_norm):
    if provider == "native":
        device = "cpu"
        if dtype == torch.bfloat16:
            pytest.skip("native code takes fp32 gradients; bf16 goes to torch, which is tested")
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    called = []
    step = getattr(AdamW, f"_{provider}")
    monkeypatch.setattr(AdamW, f"_{provider}", lambda *args: called.append(1) or step(*args))
    flat = FlatParameters(model().to(device), dtype, average=True)
    optimizer = LevelOptimizer(flat, LR, 0, clip_norm, make=lambda flat: AdamW(flat, DECAY))
    train(optimizer, range(12))
    assert len(called) == 12
    parameters, averages = reference(range(12), clip_norm, bf16=dtype == torch.bfloat16)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-4, "atol": 1e-4}
    for wanted, buffer in ((parameters, flat.master), (averages, flat.average)):
        for mine, theirs in zip(flat.views(buffer).values(), wanted, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, **tolerance)
    # what computes is the rounded master; Triton's interpreter cuts digits off instead
    last = 2**-7 if provider == "triton" and device == "cpu" and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(flat.compute, flat.master.to(dtype), rtol=last, atol=0)


def test_warm_up_counts_its_own_steps():
    flat = FlatParameters(model())
    optimizer = LevelOptimizer(flat, lr=0.5, warmup=4)
    rates = []
    for step in range(6):
        rates.append(optimizer.next_lr.item())
        train(optimizer, [step])
    assert rates == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]


@pytest.mark.parametrize("provider", ["torch", "native", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(monkeypatch, device, provider, bad):
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    flat = FlatParameters(model().to(device), average=True)
    optimizer = LevelOptimizer(flat, LR, 0, make=lambda flat: AdamW(flat, DECAY))
    train(optimizer, range(3))
    before = copy.deepcopy((flat.master, flat.average, optimizer.rule.state_dict()))
    flat.gradient[5] = bad
    assert not optimizer.step().isfinite()
    torch.testing.assert_close((flat.master, flat.average, optimizer.rule.state_dict()), before, rtol=0, atol=0)
    assert (optimizer.bad_in_a_row, optimizer.steps) == (1, 4)
    train(optimizer, [3])
    assert optimizer.bad_in_a_row == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_on_elsewhere(dtype):
    """6 steps, then 6 from the saved state by another optimizer: the bits of 12."""
    whole, first, second = (LevelOptimizer(FlatParameters(model(), dtype), LR, 3) for _ in range(3))
    train(whole, range(12))
    train(first, range(6))
    second.flat.load_state_dict(first.flat.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, range(6, 12))
    assert torch.equal(second.flat.master, whole.flat.master)
    assert torch.equal(second.flat.compute, whole.flat.compute)


def test_native_buffers_are_checked_once(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    made = []
    monkeypatch.setattr("bilevel_fast.ops.native.adamw_ema.check_dense", lambda *_: made.append(1))
    train(LevelOptimizer(FlatParameters(model()), LR, 0), range(5))
    assert made == [1]
    assert native.AdamW is not AdamW
