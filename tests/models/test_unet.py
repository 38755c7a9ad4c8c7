"""Our UNet against diffusers' own, at reduced widths, and the real SD 2.1 without memory."""

import copy
import dataclasses

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, UNetConfig, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from unets import assert_equals_diffusers, inputs, randomise, relative

NARROW = {"sample_size": 8, "block_out_channels": (32, 64, 96, 96), "norm_num_groups": 8, "cross_attention_dim": 24}
SD21_NARROW = dataclasses.replace(SD21, **NARROW, num_heads=(1, 2, 3, 3))
CONFIGS = {
    "sd21": SD21_NARROW,
    "sd15": dataclasses.replace(SD21_NARROW, num_heads=(8, 8, 8, 8), use_linear_projection=False),
    "bk_sdm_base": dataclasses.replace(SD21_NARROW, layers_per_block=1),
    "bk_sdm_small": dataclasses.replace(SD21_NARROW, layers_per_block=1, mid_block_type=None),
    "bk_sdm_tiny": dataclasses.replace(
        SD21_NARROW,
        layers_per_block=1,
        mid_block_type=None,
        block_out_channels=(32, 64, 96),
        num_heads=(1, 2, 3),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    ),
    "mini": MINI,
}


def diffusers_unet(config: UNetConfig):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel.from_config(config.to_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
    config = CONFIGS[name]
    assert_equals_diffusers(UNet(config), diffusers_unet(config))


def test_config_round_trip():
    for config in CONFIGS.values():
        assert UNetConfig.from_dict(config.to_dict()) == config
        assert UNetConfig.from_dict(dict(diffusers_unet(config).config)) == config


def test_sd21_on_meta():
    """The real size: parameter count and every key and shape of diffusers."""
    with torch.device("meta"):
        ours, theirs = UNet(SD21), diffusers_unet(SD21)
    assert sum(p.numel() for p in ours.parameters()) == 865_910_724
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == shapes
    with torch.device("meta"):
        prediction = ours(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 1024))
    assert prediction.out.shape == (1, 4, 64, 64)
    assert [tuple(b.shape[1:]) for b in prediction.blocks] == [
        (320, 32, 32),
        (640, 16, 16),
        (1280, 8, 8),
        (1280, 8, 8),
        (1280, 8, 8),
        (1280, 16, 16),
        (1280, 32, 32),
        (640, 64, 64),
        (320, 64, 64),
    ]


def odd_structure(config: UNetConfig) -> Structure:
    """Scattered units, ragged ResNet widths, and three dropped sites."""
    dropped = [s.name for s in sites(config) if s.depth_bit][1:6:2]
    kept = {
        site.name: {w.name: tuple(range(w.units))[1:-1:2] or (0,) for w in site.widths}
        for site in sites(config)
        if site.name not in dropped
    }
    return Structure(config, kept, frozenset(dropped))


@pytest.mark.parametrize("name", ["sd21", "mini"])
def test_padding_changes_nothing(name):
    config = CONFIGS[name]
    structure = odd_structure(config)
    plain, padded = UNet(config, structure), UNet(config, structure, align=16)
    randomise(plain, 0.05)
    padded.load_state_dict(plain.state_dict())
    assert {k: v.shape for k, v in padded.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    pads = [m for m in padded.modules() if getattr(m, "pad", 0)]
    assert len(pads) > 3, "the structure must leave widths that need padding"

    # SGD: Adam's normalisation would blow the round-off of tiny gradients up to a full step
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, weight_decay=0.1) for m in (plain, padded)]
    for _ in range(3):
        x, t, text = inputs(config)
        for model, optimizer in zip((plain, padded), optimizers, strict=True):
            optimizer.zero_grad()
            prediction = model(x, t, text)
            (prediction.out.square().mean() + sum(b.square().mean() for b in prediction.blocks)).backward()
            optimizer.step()
    for block in pads:
        assert block.conv1.weight[block.inner :].abs().max() == 0
        assert block.conv2.weight[:, block.inner :].abs().max() == 0
    x, t, text = inputs(config)
    assert relative(padded(x, t, text).out, plain(x, t, text).out) <= 1e-5
    for key, value in padded.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_padded_unet_is_independent():
    """The hooks that pad and crop belong to the copy, not to the original."""
    config = CONFIGS["mini"]
    plain = UNet(config, odd_structure(config))
    original = UNet(config, odd_structure(config), align=16)
    copied = copy.deepcopy(original)
    copied.load_state_dict(plain.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in copied.state_dict().items())
    assert any(not torch.equal(v, plain.state_dict()[k]) for k, v in original.state_dict().items())


def test_cut_shares_no_memory_with_the_teacher():
    dense, structure = UNet(MINI), odd_structure(MINI)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    student = dense.cut(structure, align=16)
    assert all(torch.equal(v, structure.slice(before)[k]) for k, v in student.state_dict().items())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_nothing_but_memory(dtype):
    """The same outputs and gradients to the bit, and less kept in between."""
    model, given = UNet(MINI, Structure.uniform(MINI, 0.6), align=8).to(dtype), inputs(MINI, side=16)
    gradients, kept = [], []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()

        def pack(x):
            kept[-1][x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        kept.append({})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(*given).out
        out.float().square().mean().backward()
        gradients.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    plain, recomputed = (sum(size for at, size in found.items() if at not in parameters) for found in kept)
    assert recomputed < 0.5 * plain
    with torch.no_grad():
        assert torch.equal(model(*given).out, gradients[0][0]), "and nothing without gradients"


def test_odd_latent_sizes():
    """Latents that the strides do not divide: the upsampler follows the skip connection, as diffusers' does."""
    theirs, ours = diffusers_unet(SD21_NARROW), UNet(SD21_NARROW)
    ours.load_state_dict(theirs.state_dict())
    x, t, text = inputs(SD21_NARROW, side=13)
    assert relative(ours(x, t, text).out, theirs(x, t, text).sample) <= 1e-4


def test_dropped_sites_pass_their_input_on():
    structure = Structure.uniform(MINI, 1.0, ["up_blocks.2.resnets.1", "up_blocks.2.attentions.1"])
    model = UNet(MINI, structure)
    assert not any(k.startswith(("up_blocks.2.resnets.1.", "up_blocks.2.attentions.1.")) for k in model.state_dict())
    x, t, text = inputs(MINI, side=16)
    assert model(x, t, text).blocks[-1].shape == (2, 48, 16, 16)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("act_fn", "gelu", "act_fn='gelu' is not supported"),
        ("down_block_types", ["AttnDownBlock2D"] * 4, "'AttnDownBlock2D'"),
        ("attention_head_dim", [3, 3, 3, 3], "not divisible"),
        ("norm_num_groups", 7, "not divisible"),
        ("up_block_types", ["UpBlock2D"], "up_block_types has 1 entries, wanted 4"),
    ],
)
def test_config_refusals(field, value, message):
    with pytest.raises(UserError, match=message):
        UNetConfig.from_dict({**SD21.to_dict(), field: value})
    with pytest.raises(UserError, match="in_channels"):
        UNetConfig.from_dict({k: v for k, v in SD21.to_dict().items() if k != "in_channels"})
