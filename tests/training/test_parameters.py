"""Flat buffers: the same network, one buffer for everything, nothing lost on the way in and out."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.parameters import ALIGN, CHUNK, FlatParameters

TINY = dataclasses.replace(
    MINI, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), num_heads=(1, 2, 2), norm_num_groups=8,
    cross_attention_dim=16,
)  # fmt: skip


def unet(align=8):
    """Pruned to widths that are padded."""
    torch.manual_seed(0)
    return UNet(TINY, Structure.uniform(TINY, 0.6), align)


def loss(network, dtype=torch.float32):
    x, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.ones(2, 5, 16)
    out = network(x.to(dtype), torch.tensor([3, 700]), text.to(dtype))
    return out.out.float().square().mean() + sum(b.float().square().mean() for b in out.blocks)


def test_the_network_is_the_same_and_gradients_land_in_the_buffer():
    plain, flat_net = unet(), unet()
    flat = FlatParameters(flat_net)
    loss(plain).backward()
    for view in flat.views(flat.gradient).values():
        view.fill_(7.0)  # whatever was there is replaced
    loss(flat_net).backward()
    flat.collect()
    assert flat.compute is flat.master
    views = flat.views(flat.gradient)
    assert list(views) == [name for name, _ in plain.named_parameters()]
    for name, p in plain.named_parameters():
        assert torch.equal(views[name], p.grad), name
        assert flat_net.get_parameter(name).grad is None, name
        assert flat_net.get_parameter(name).stride() == p.stride(), name
    total = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    torch.testing.assert_close(flat.norm(), total)


def test_parameters_are_aligned_and_do_not_overlap():
    flat = FlatParameters(unet())
    assert len(flat.master) % CHUNK == 0
    marks = torch.zeros_like(flat.master)
    for view in flat.views(marks).values():
        assert view.storage_offset() % ALIGN == 0
        view.add_(1)
    assert marks.max() == 1
    assert marks.sum() == sum(p.numel() for p in flat.module.parameters())
    assert not flat.master[marks == 0].any()


def test_bf16_computes_with_rounded_masters():
    network = unet()
    before = copy.deepcopy(network.state_dict())
    flat = FlatParameters(network, torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert flat.gradient.dtype == torch.bfloat16
    for name, value in flat.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]), name
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name].bfloat16()), name
    loss(network, torch.bfloat16).backward()
    flat.collect()
    assert flat.norm().isfinite()
    assert flat.norm() > 0


def test_the_norm_of_bf16_gradients_is_summed_in_fp32():
    flat = FlatParameters(unet(), torch.bfloat16)
    flat.gradient.fill_(0.01)
    wanted = flat.gradient[0].double() * len(flat.gradient) ** 0.5
    torch.testing.assert_close(flat.norm().double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_a_state_dict_is_views_of_its_buffer(dtype, kind):
    flat = FlatParameters(unet(), dtype)
    buffer = torch.zeros(len(flat.master), dtype=kind)
    state = flat.state_dict(buffer)
    for value in state.values():
        assert value.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        value.fill_(1)
    assert buffer.count_nonzero() == sum(value.numel() for value in state.values())
    assert all(value.any() for value in flat.state_dict(buffer).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_out_and_comes_back(dtype):
    """Padding is cropped on the way out and zero again on the way in, also of buffers that are no parameters."""
    flat, other = FlatParameters(unet(), dtype), FlatParameters(unet(), dtype)
    numbers = torch.arange(len(flat.master), dtype=torch.float32) * 1e-3
    flat.load_state_dict(flat.state_dict(numbers))
    other.load_state_dict(flat.state_dict())
    assert torch.equal(other.master, flat.master)
    assert torch.equal(other.compute, flat.master.to(dtype))
    shapes = {name: value.shape for name, value in UNet(TINY, Structure.uniform(TINY, 0.6)).state_dict().items()}
    assert {name: value.shape for name, value in flat.state_dict().items()} == shapes
    moments = torch.zeros_like(flat.master)
    flat.load_state_dict(flat.state_dict(numbers), moments)
    assert torch.equal(moments, flat.master)


def test_a_state_of_another_network_is_refused():
    flat = FlatParameters(unet())
    before = flat.master.clone()
    with pytest.raises(RuntimeError, match=r"^size mismatch: .* has shape \[.*\], wanted \[.*\]$"):
        flat.load_state_dict(UNet(TINY).state_dict())
    with pytest.raises(RuntimeError, match=r"^extra is not of this network$"):
        flat.load_state_dict(flat.state_dict() | {"extra": before})
    assert torch.equal(flat.master, before)
    assert next(flat.module.parameters()).data_ptr() == flat.compute.data_ptr(), "still a view of its buffer"


@pytest.mark.parametrize("average", [False, True])
def test_release(average):
    network = unet()
    flat = FlatParameters(network, torch.bfloat16, average)
    wanted = flat.master if flat.average is None else flat.average.add_(1)
    expected = copy.deepcopy(flat.state_dict(wanted))
    assert flat.release() is network
    wanted.zero_()
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.weight.requires_grad_(False), "weight: torch.float32, frozen; expected trained fp32"),
        (lambda m: m.half(), "weight: torch.float16; expected trained fp32"),
        (lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(4, 8)[:, ::2])), "weight: strides .* leave gaps"),
    ],
)
def test_refuses(change, message):
    module = nn.Linear(4, 4)
    change(module)
    with pytest.raises(ValueError, match=message):
        FlatParameters(module)


def test_refuses_other_dtypes():
    with pytest.raises(ValueError, match=r"torch.float16: parameters compute in float32 or bfloat16"):
        FlatParameters(nn.Linear(2, 2), torch.float16)
