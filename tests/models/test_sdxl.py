"""The UNets of Stable Diffusion XL and of the models cut from it, against diffusers' own."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import SD21, UNetConfig, sites
from bilevel_fast.models.conditioning import with_sizes
from bilevel_fast.models.macs import count
from bilevel_fast.models.sdxl import SDXL, SDXL_FAMILY
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from unets import assert_equals_diffusers, inputs, make_unet, relative

NARROW = {
    "sample_size": 16, "block_out_channels": (16, 32, 48), "num_heads": (1, 2, 3), "norm_num_groups": 8,
    "cross_attention_dim": 24, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8,
}  # fmt: skip
CONFIGS = {name: dataclasses.replace(config, **NARROW) for name, config in SDXL_FAMILY.items()}
CONFIGS["sdxl"] = dataclasses.replace(CONFIGS["sdxl"], transformer_layers_per_block=(1, 2, 3))
CONFIGS["by level"] = dataclasses.replace(  # no published model has it, diffusers does
    CONFIGS["sdxl"],
    layers_per_block=(1, 2, 1),
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    transformer_layers_per_block=((0,), (1, 2), 1),
    reverse_transformer_layers_per_block=((1, 2), 1, 0),
)
PARAMETERS = {
    "sdxl": 2_567_463_684,
    "ssd-1b": 1_331_334_404,
    "vega": 745_225_604,
    "koala-1b": 1_161_184_324,
    "koala-700m": 782_822_724,
}


def diffusers_unet(config: UNetConfig):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel.from_config(config.to_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
    assert_equals_diffusers(UNet(CONFIGS[name]), diffusers_unet(CONFIGS[name]))


@pytest.mark.parametrize("name", SDXL_FAMILY)
def test_real_sizes_on_meta(name):
    """Every key and shape of diffusers, as many parameters as are published, the block outputs' shapes, and products as
    torch's own counter has them."""
    config = SDXL_FAMILY[name]
    with torch.device("meta"):
        ours, theirs = UNet(config), diffusers_unet(config)
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == shapes
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        prediction = ours(torch.empty(1, 4, 128, 128), torch.empty(1), torch.empty(1, 77 + config.extra_rows, 2048))
    macs = count(Structure.dense(config), 128, 77)
    assert (2 * macs.products, macs.params) == (counter.get_total_flops(), PARAMETERS[name])
    assert prediction.out.shape == (1, 4, 128, 128)
    found = [tuple(block.shape[1:]) for block in prediction.blocks]
    innermost = [(1280, 32, 32)] * (2 if config.mid_block_type else 1)
    assert found == [(320, 64, 64), (640, 32, 32), *innermost, (1280, 64, 64), (640, 128, 128), (320, 128, 128)]
    assert (config.pooled_dim, config.extra_rows) == (1280, 1)


def test_config_round_trip():
    for config in (*CONFIGS.values(), *SDXL_FAMILY.values()):
        assert UNetConfig.from_dict(config.to_dict()) == config
        assert not config.is_plain
    for config in CONFIGS.values():
        assert UNetConfig.from_dict(dict(diffusers_unet(config).config)) == config
    assert SD21.is_plain
    same = {"transformer_layers_per_block": [1] * 4, "layers_per_block": [2] * 4, "addition_time_embed_dim": None}
    assert UNetConfig.from_dict(SD21.to_dict() | same) == SD21
    assert not any("transformer_layers" in name or "addition" in name for name in SD21.to_dict())


def test_depths_are_those_of_diffusers():
    """A Transformer of one block is one site; any other is a site, and so is each of its blocks."""
    found = {s.name: s for s in sites(SDXL_FAMILY["ssd-1b"])}
    assert [n for n, s in found.items() if s.block == "up_blocks.1" and s.kind != "resnet"] == [
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.1",
        "up_blocks.1.attentions.1",
        "up_blocks.1.attentions.2",
    ]
    assert [s.transformer_block for s in found.values() if s.block == "up_blocks.1" and s.kind != "resnet"] == [
        None,
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.1",
        "up_blocks.1.attentions.1.transformer_blocks.0",
        "up_blocks.1.attentions.2.transformer_blocks.0",
    ]
    assert sum(s.kind == "transformer_block" for s in sites(SDXL)) == 70
    assert all(s.depth_bit for s in sites(SDXL) if s.kind == "transformer_block")


def test_sizes_and_pooled_state_matter():
    """In fp32 whatever the network computes in: bf16 has no 1000."""
    config = CONFIGS["koala-700m"]
    unet, (x, t, text) = make_unet(config), inputs(config)
    here, there = (with_sizes(text, config.pooled_dim, torch.full((2, 6), size)) for size in (1000.0, 1001.0))
    assert relative(unet(x, t, here).out, unet(x, t, there).out) > 1e-4
    unet.to(torch.bfloat16)
    assert not torch.equal(unet(x, t, here).out, unet(x, t, there).out)
    text[:, -1, -1] = 7.0  # what fills up the last row is not read
    filled = with_sizes(text, config.pooled_dim, torch.full((2, 6), 1000.0))
    assert torch.equal(unet(x, t, filled).out, unet(x, t, here).out)


REFUSED = [
    (
        {"projection_class_embeddings_input_dim": 1280 + 5 * 256, "cross_attention_dim": 1280},
        "the refiner of Stable Dif",
    ),
    ({"in_channels": 9}, "in_channels is 9: an inpainting UNet"),
    ({"in_channels": 8}, "in_channels is 8: a UNet that edits pictures"),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 is not supported .*latent consistency"),
    ({"addition_embed_type": "image"}, "addition_embed_type='image' is not supported, wanted None or 'text_time'"),
    ({"addition_time_embed_dim": "DELETE"}, "field 'addition_time_embed_dim' is missing"),
    ({"addition_time_embed_dim": 512}, "projection_class_embeddings_input_dim is 2816, wanted more than 6 x 512"),
    ({"transformer_layers_per_block": [2, 10]}, "transformer_layers_per_block has 2 entries, wanted 3"),
    ({"transformer_layers_per_block": [2, 2]}, "transformer_layers_per_block has 2 entries, wanted 3"),
    ({"transformer_layers_per_block": [1, [2, 2], 10]}, "wanted reverse_transformer_layers_per_block, too"),
    ({"reverse_transformer_layers_per_block": [[4, 4], 1, 1]}, "has 2 entries for up_blocks.0, wanted 3"),
    ({"transformer_layers_per_block": [1, 2, 10**9]}, "is 1000000000, wanted a whole number from 0 to 32"),
    ({"transformer_layers_per_block": [1, 2, "10"]}, "is '10', wanted a whole number"),
    ({"transformer_layers_per_block": [1, 2, []]}, r"has \[\], wanted 1 to 33 numbers"),
    ({"layers_per_block": [2, 2]}, "layers_per_block has 2 entries, wanted 3"),
    ({"layers_per_block": [2, 0, 2]}, "layers_per_block is 0, wanted a whole number from 1"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type has 'UNetMidBlock2DSimpleCrossAttn'"),
]


@pytest.mark.situation
@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(next(iter(c.items())))[:50] for c, _ in REFUSED])
def test_a_unet_of_another_kind(changes, message):
    """A UNet of SDXL's refiner, for inpainting, of a consistency model, or of depths that cannot be: says so."""
    fields = {k: v for k, v in (SDXL.to_dict() | changes).items() if v != "DELETE"}
    with pytest.raises(UserError, match=f"^here: .*{message}") as refusal:
        UNetConfig.from_dict(fields, "here")
    assert "\n" not in str(refusal.value)
