"""Layers over one input as one product: the values and gradients of each on its own, and when they stay so."""

import copy

import pytest
import torch
from torch import nn

from bilevel_fast.models.architecture import MINI, sites
from bilevel_fast.models.layers import Attention, whole
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops import products as module
from bilevel_fast.ops.products import lay_together, products
from bilevel_fast.profiling.cost import Counter
from bilevel_fast.training.parameters import FlatParameters


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")


def three(*sizes, width=6):
    layers = [nn.Linear(width, size, bias=False) for size in sizes]
    lay_together(*layers)
    return layers


def linears(call):
    with Counter() as counter:
        out = call()
    return out, sum(cost.kind == "linear" for cost in counter.costs)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_values_and_gradients_are_those_of_each_layer(side_by_side):
    layers, x = three(8, 4, 12), torch.randn(2, 5, 6, requires_grad=True)
    upstream = list(torch.randn(2, 5, 24).split([8, 4, 12], -1))
    if not side_by_side:
        upstream = [t.clone() for t in upstream]
    leaves = [x, *(layer.weight for layer in layers)]
    found, launched = linears(lambda: products(x, *layers))
    gradients, launched_back = linears(lambda: torch.autograd.grad(found, leaves, upstream))
    assert (launched, launched_back) == (1, 2)
    expected = [layer(x) for layer in layers]
    for one, other in zip(
        [*found, *gradients], [*expected, *torch.autograd.grad(expected, leaves, upstream)], strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_frozen_weights_and_inputs_get_no_gradient():
    layers, x = three(8, 4), torch.randn(2, 5, 6)
    layers[0].weight.requires_grad_(False)
    sum(y.square().sum() for y in products(x, *layers)).backward()
    assert layers[0].weight.grad is None
    mine, layers[1].weight.grad = layers[1].weight.grad, None
    layers[1](x).square().sum().backward()
    torch.testing.assert_close(mine, layers[1].weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda layers, _: copy.deepcopy(layers),
        lambda layers, _: layers[::-1],
        lambda layers, _: [layers[0], nn.Linear(6, 4)],
        lambda layers, _: [layers[0].register_forward_hook(lambda *_: None) and layers[0], layers[1]],
        lambda layers, patch: [patch.setenv("BILEVEL_FAST_OPS", "torch"), *layers][1:],
        lambda layers, patch: [patch.delenv("BILEVEL_FAST_OPS"), *layers][1:],
    ],
    ids=["apart", "another order", "bias", "hook", "torch is asked for", "CPU"],
)
def test_each_on_its_own_otherwise(change, monkeypatch):
    layers, x = change(three(8, 4), monkeypatch), torch.randn(2, 5, 6)
    found, launched = linears(lambda: products(x, *layers))
    assert launched == 2
    assert all(torch.equal(y, layer(x)) for y, layer in zip(found, layers, strict=True))


def test_laid_together_keeps_values_and_names():
    before = Attention(12, 20, 2, 6).requires_grad_()
    after = copy.deepcopy(before)
    lay_together(after.to_k, after.to_v)
    assert module._adjacent([after.to_k.weight, after.to_v.weight])
    for (name, value), (other, expected) in zip(after.state_dict().items(), before.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, expected)
    pointer = after.to_k.weight.data_ptr()
    lay_together(after.to_k, after.to_v)
    assert after.to_k.weight.data_ptr() == pointer, "weights that lie together were moved"


def test_off_the_cpu_a_network_lies_together_and_on_it_stays():
    on_cpu, off = Attention(64, 32, 1, 64), Attention(64, 32, 1, 64).to("meta")
    assert module._adjacent([off.to_k.weight, off.to_v.weight])
    assert not module._adjacent([on_cpu.to_k.weight, on_cpu.to_v.weight])
    same = Attention(64, 64, 1, 64).to("meta")
    assert module._adjacent([same.to_q.weight, same.to_k.weight, same.to_v.weight])


def test_the_flat_buffer_of_training_has_them_together():
    attention = nn.Sequential(Attention(64, 64, 2, 32))
    x, other = torch.randn(2, 5, 64), copy.deepcopy(attention)
    flat = FlatParameters(attention)
    out, launched = linears(lambda: whole(attention[0](x, x)))
    assert launched == 2, "q, k and v, and the projection out"
    out.square().sum().backward()
    flat.collect()
    whole(other[0](x, x)).square().sum().backward()
    for name, view in flat.views(flat.gradient).items():
        torch.testing.assert_close(view, other.get_parameter(name).grad, rtol=1e-5, atol=1e-4)


def test_the_unet_on_meta_takes_two_products_less_for_self_attention_and_one_for_cross_attention():
    def launched(provider, monkeypatch):
        monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
        with torch.no_grad(), Counter() as counter:
            unet(*inputs)
        ours = (f"bilevel_kernels::linear_{name}_fwd" for name in ("geglu", "add", "norm"))
        products = ("aten::mm", "aten::addmm", *ours)
        return sum(cost.op in products for cost in counter.costs)

    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        unet = UNet(MINI).to(torch.bfloat16)
        inputs = torch.randn(2, 12, 16, 16), torch.zeros(2), torch.randn(2, 5, MINI.cross_attention_dim)
        transformers = sum(site.kind == "transformer" for site in sites(MINI))
        # convolutions on meta lose channels_last, so no shortcut is a product there: test_shortcut.py has those
        assert launched("torch", patch) - launched("triton", patch) == 3 * transformers
