"""A shortcut added where the branch lies: values and gradients of the modules, and when it stays with them."""

import copy

import pytest
import torch
from torch import nn

from bilevel_fast.ops.shortcut import widened
from bilevel_fast.profiling.cost import Counter


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")


def layers(cin=7, inner=5, cout=6, dtype=torch.float32):
    both = nn.ModuleList([nn.Conv2d(inner, cout, 3, padding=1), nn.Conv2d(cin, cout, 1)])
    return both.to(dtype, memory_format=torch.channels_last)


def maps(*channels, dtype=torch.float32):
    shapes = [torch.randn(2, c, 3, 4, dtype=dtype) for c in channels]
    return [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in shapes]


def by_modules(h, conv, sources, widen):
    return conv(h) + widen(torch.cat(sources, dim=1))


def gradients(call, both, h, sources, upstream):
    out = call(h, both[0], tuple(sources), both[1])
    return [out, *torch.autograd.grad(out, [h, *sources, *both.parameters()], upstream)]


@pytest.mark.parametrize("channels", [(7,), (3, 4)], ids=["one source", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_gradients_are_no_further_from_fp64_than_those_of_the_modules(channels, dtype):
    both, (h, *sources) = layers(dtype=dtype), maps(5, *channels, dtype=dtype)
    upstream = torch.randn(2, 6, 3, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    found = gradients(widened, both, h, sources, upstream)
    eager = gradients(by_modules, both, h, sources, upstream)
    wide = [t.detach().double().requires_grad_() for t in (h, *sources)]
    gold = gradients(by_modules, copy.deepcopy(both).double(), wide[0], wide[1:], upstream.double())
    for mine, theirs, exact in zip(found, eager, gold, strict=True):
        assert mine.shape == theirs.shape
        error, allowed = ((t.double() - exact).abs().max() for t in (mine, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[-2].stride()[:2] == both[1].weight.stride()[:2], "of one pixel"


def test_frozen_layers_and_inputs_get_no_gradient():
    both, (h, x) = layers().requires_grad_(False), maps(5, 7)
    with torch.no_grad():
        out = widened(h, both[0], (x,), both[1])
    assert not out.requires_grad
    both[1].weight.requires_grad_()
    widened(h.detach(), both[0], (x.detach(),), both[1]).sum().backward()
    torch.testing.assert_close(both[1].weight.grad[0, :, 0, 0], x.detach().sum((0, 2, 3)))


def test_nothing_of_the_size_of_the_result_moves_besides_the_two_products():
    """On meta, bytes: the branch is read once for both sources. The gradient of both biases is one sum."""
    both = layers(704, 512, 640, torch.bfloat16).to("meta")
    h, *sources = (x.detach().to("meta") for x in maps(512, 320, 384, dtype=torch.bfloat16))
    with Counter() as counter:
        out = widened(h, both[0], tuple(sources), both[1])
    assert out is not None
    ops = ["aten::add", "aten::convolution", "bilevel_kernels::linear_add_fwd"]
    assert [cost.op for cost in counter.costs] == ops
    assert counter.costs[2].bytes == 2 * out.numel() * 2 + 2 * (704 * 24 + 704 * 640)


@pytest.mark.parametrize(
    "change",
    [
        lambda both, h, patch: patch.setenv("BILEVEL_FAST_OPS", "torch"),
        lambda both, h, patch: patch.delenv("BILEVEL_FAST_OPS"),
        lambda both, h, patch: both[0].register_forward_hook(lambda *_: None),
        lambda both, h, patch: both[1].register_forward_pre_hook(lambda *_: None),
        lambda both, h, patch: setattr(h, "data", h.data.contiguous()),
        lambda both, h, patch: setattr(both[1], "bias", None),
    ],
    ids=["torch is asked for", "CPU", "hook", "hook of the shortcut", "NCHW", "no bias"],
)
def test_the_modules_do_it_otherwise(change, monkeypatch):
    both, (h, x) = layers(), maps(5, 7)
    assert widened(h, both[0], (x,), both[1]) is not None
    change(both, h, monkeypatch)
    assert widened(h, both[0], (x,), both[1]) is None
