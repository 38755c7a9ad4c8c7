"""Residual connections around linear layers and feed-forwards: the same through one kernel as through modules."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.layers import FeedForward
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.dispatch import Branch, add, add_norm, linear
from bilevel_fast.ops.providers import table
from bilevel_fast.profiling.cost import Counter

TINY = replace(
    MINI, in_channels=4, out_channels=4, block_out_channels=(32, 48), num_heads=(2, 2), norm_num_groups=8,
    cross_attention_dim=16, down_block_types=MINI.down_block_types[:2], up_block_types=MINI.up_block_types[-2:],
)  # fmt: skip


def gradients(out, leaves):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return torch.autograd.grad(out, leaves, upstream)


def compare(found, wanted):
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def launched(call):
    with Counter() as counter:
        call()
    return [cost.op.removeprefix("bilevel_kernels::") for cost in counter.costs if "bilevel" in cost.op]


def test_a_linear_layer_is_added_by_its_product(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    layer = nn.Linear(7, 12)
    x, r = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 12, requires_grad=True)
    leaves = [x, r, *layer.parameters()]
    found = add(r, linear(x, layer))
    assert launched(lambda: add(r, linear(x, layer))) == ["linear_add_fwd"]
    compare([found, *gradients(found, leaves)], [r + layer(x), *gradients(r + layer(x), leaves)])
    assert torch.equal(add(r, layer(x)), r + layer(x)), "what is whole already"


@pytest.mark.parametrize("trained", [True, False])
def test_a_feed_forward_is_one_backward(trained, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    ff = FeedForward(16, 24).requires_grad_(trained)
    x, r = torch.randn(2, 2, 5, 16, requires_grad=trained)
    leaves = [x, r, *ff.parameters()] if trained else []
    both = [lambda: add(r, ff(x)), lambda: r + ff.net(x)]
    assert launched(both[0]) == ["linear_geglu_fwd", "linear_add_fwd"]
    found, wanted = ([out := call(), *(gradients(out, leaves) if trained else [])] for call in both)
    compare(found, wanted)
    if trained:
        out = both[0]()
        assert launched(lambda: out.backward(torch.ones_like(out))) == ["feed_forward_bwd"]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("width", [48, 12])
def test_a_norm_behind_a_branch(width, alone, monkeypatch):
    """In one kernel where a row is two tiles, else in two; the bias has its gradient from the backward of the norm."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    layer, norm = nn.Linear(7, width), nn.LayerNorm(width)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    inner = torch.randn(2, 5, 7, requires_grad=True)
    x = None if alone else torch.randn(2, 5, width, requires_grad=True)
    leaves = [inner, *layer.parameters(), *norm.parameters(), *([] if alone else [x])]

    def both(branch):
        h, y = add_norm(x, branch, norm)
        return [h, y, *gradients(torch.stack([h, y]), leaves)]

    found = both(linear(inner, layer))
    expected = ["linear_norm_fwd"] if width == 48 else [*["linear_add_fwd"] * (not alone), "layer_norm_fwd"]
    assert launched(lambda: add_norm(x, linear(inner, layer), norm)) == expected
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    compare(found, both(layer(inner)))


def watched(ff):
    ff.net[2].register_forward_hook(lambda *_: None)


def other_kind(ff):
    ff.net[0].proj = nn.utils.parametrizations.weight_norm(ff.net[0].proj)


def without_bias(ff):
    ff.net[2] = nn.Linear(24, 16, bias=False)


@pytest.mark.parametrize("change", [watched, other_kind, without_bias])
def test_a_feed_forward_that_is_no_plain_one_runs_its_modules(change, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    ff, x = FeedForward(16, 24), torch.randn(2, 5, 16)
    assert isinstance(ff(x), Branch)
    change(ff)
    assert isinstance(ff(x), torch.Tensor)
    assert torch.equal(ff(x), ff.net(x))


def test_dtypes_that_differ_are_left_to_torch(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    ff, x = FeedForward(16, 24), torch.randn(2, 5, 16)
    assert launched(lambda: add(x.double(), ff(x))) == ["linear_geglu_fwd"]


def test_the_unet_is_the_same_with_and_without(monkeypatch):
    """Values and gradients of a UNet with linear projections, all branches in it."""
    config = replace(TINY, use_linear_projection=True)
    torch.manual_seed(0)
    unet = UNet(config)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 16)
    results = {}
    for provider in ("torch", "triton"):
        monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
        network = deepcopy(unet)
        with Counter() as counter:
            out = network(*inputs).out
        out.backward(torch.ones_like(out))
        results[provider] = [out, *(p.grad for p in network.parameters())]
        ops = {cost.op.removeprefix("bilevel_kernels::") for cost in counter.costs}
        assert ({"linear_norm_fwd", "linear_add_fwd", "linear_geglu_fwd"} <= ops) == (provider == "triton")
    for mine, theirs in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max()))


def test_they_are_projected_where_products_are_slow():
    """An H100 multiplies too fast to trade cuBLAS's products for fewer bytes, until it is measured."""
    ops = {"linear_add", "linear_norm", "feed_forward", "linear_geglu"}
    assert ops <= set(table("sm_86"))
    assert not ops & set(table("sm_90"))
