"""A structure said by diffusers' own config, or by the file that narrows its UNet: both compute what ours computes."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel

from bilevel_fast.base.errors import UserError
from bilevel_fast.exporting.folder import pruned
from bilevel_fast.exporting.plain import plain
from bilevel_fast.exporting.pruned_unet import PrunedUNet
from bilevel_fast.models.architecture import MINI, UNetConfig
from bilevel_fast.models.conditioning import unpack
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import bk_sdm, sdxl_shapes
from unets import SDXL_LIKE, inputs, random_structure, randomise

SD = UNetConfig(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32, 32),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    num_heads=(2, 4, 4, 4), cross_attention_dim=24, norm_num_groups=8,
)  # fmt: skip
CONVOLUTIONS = dataclasses.replace(SD, use_linear_projection=False)
XL = dataclasses.replace(
    SDXL_LIKE, layers_per_block=2, num_heads=(2, 4, 4), transformer_layers_per_block=(1, 2, 10),
    reverse_transformer_layers_per_block=None,
)  # fmt: skip


def drop(config: UNetConfig, *names: str) -> Structure:
    return Structure.uniform(config, 1.0, names)


def student_of(structure: Structure) -> UNet:
    unet = UNet(structure.config, structure).requires_grad_(False).eval()
    randomise(unet, 0.05)
    return unet


def assert_same(unet: UNet, theirs: torch.nn.Module, side: int = 16) -> None:
    config = unet.config
    x, t, text = inputs(config, side=side)
    more = {}
    if config.pooled_dim:
        states, extra = unpack(text, config.pooled_dim)
        more["added_cond_kwargs"] = {"text_embeds": extra.pooled, "time_ids": extra.sizes}
    else:
        states = text
    with torch.no_grad():
        ours, other = unet(x, t, text).out, theirs(x, t, states, **more).sample
    assert ours.std() > 0.01
    torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


MID = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
PLAIN = {
    "dense": drop(SD),
    "BK-SDM base": bk_sdm.structure(SD, "base"),
    "BK-SDM small, 1.x": bk_sdm.structure(CONVOLUTIONS, "small"),
    "no attention in a block": drop(SD, "down_blocks.0.attentions.0", "down_blocks.0.attentions.1"),
    "one ResNet in the middle": drop(SD, MID[0], MID[1]),
    "one level": drop(SD, "down_blocks.1.resnets.1", "down_blocks.1.attentions.1", "up_blocks.2.resnets.1",
                      "up_blocks.2.attentions.1"),
    **{name: sdxl_shapes.structure(XL, name) for name in ("ssd-1b", "koala-700m")},
    "blocks": drop(SDXL_LIKE, "up_blocks.0.attentions.0.transformer_blocks.1"),
}  # fmt: skip


@pytest.mark.parametrize("structure", PLAIN.values(), ids=PLAIN.keys())
def test_whole_layers_are_said_by_a_config(structure):
    unet, smaller = student_of(structure), plain(structure)
    fields = smaller.fields(structure.config.to_dict())
    assert UNetConfig.from_dict(fields) == smaller.config
    theirs = UNet2DConditionModel.from_config(fields)
    theirs.load_state_dict(smaller.renamed(unet.state_dict()))
    assert_same(unet, theirs)


def test_the_shapes_are_those_of_the_published_models():
    """The same in other words: only of those that have one number for a level there is one."""
    found = plain(sdxl_shapes.structure(XL, "koala-700m")).config
    assert (found.layers_per_block, found.transformer_layers_per_block, found.mid_block_type) == (1, (1, 2, 5), None)
    found = plain(sdxl_shapes.structure(XL, "ssd-1b")).config
    assert found.reverse_transformer_layers_per_block == ((4, 4, 10), (2, 1, 1), 1)
    assert found.mid_block_type == "UNetMidBlock2D"
    assert plain(sdxl_shapes.structure(XL, "vega")).config.transformer_layers_per_block == (1, 1, 2)


UNSAID = {
    "a width": (Structure.uniform(SD, 0.6), r"^site down_blocks.0.resnets.0 keeps 4 of 8 units of 'groups'$"),
    "an attention": (
        drop(SD, "down_blocks.0.attentions.1"),
        r"^site down_blocks.0.attentions.1 is dropped, and its ResNet is not$",
    ),
    "a ResNet": (drop(SD, "up_blocks.1.resnets.1"), r"^site up_blocks.1.attentions.1 is kept, and its ResNet is dr"),
    "one way": (
        drop(SD, "down_blocks.3.resnets.1"),
        r"^site up_blocks.0.resnets.2 is one of 3 ResNets that are left, and down_blocks.3 has 1: diff",
    ),
    "another skip": (
        drop(SD, "down_blocks.3.resnets.0", "up_blocks.0.resnets.0"),
        r"^site up_blocks.0.resnets.1 would read the skip connection of another layer of down_blocks.3$",
    ),
    "a whole block": (
        drop(SD, "down_blocks.3.resnets.0", "down_blocks.3.resnets.1"), r"^site down_blocks.3.resnets.0 is dropped, and"
    ),
    "the middle": (drop(SD, MID[1]), r"^site mid_block.attentions.0 is dropped, and of the mid block neither all nor"),
    "two depths": (
        drop(XL, "mid_block.attentions.0.transformer_blocks.9"),
        r"^site mid_block.attentions.0 keeps 9 transformer blocks, down_blocks.2.attentions.0 10, and diffusers has",
    ),
}  # fmt: skip


@pytest.mark.situation
@pytest.mark.parametrize(("structure", "message"), UNSAID.values(), ids=UNSAID.keys())
def test_a_structure_that_diffusers_has_no_fields_for(structure, message):
    """A structure that diffusers' config or the original layout cannot say: the site is named."""
    with pytest.raises(UserError, match=message) as refusal:
        plain(structure)
    assert "\n" not in str(refusal.value)


NARROW = {
    "SD": random_structure(SD, 0, 0.4),
    "1.x": random_structure(CONVOLUTIONS, 2, 0.0),
    "mini": random_structure(MINI, 3, 0.5),
    "XL": random_structure(SDXL_LIKE, 0, 0.3),
}


@pytest.mark.parametrize("structure", NARROW.values(), ids=NARROW.keys())
def test_the_file_that_is_shipped_narrows_as_we_do(structure):
    unet = student_of(structure)
    theirs = PrunedUNet.from_config({**structure.config.to_dict(), "pruned": pruned(structure)})
    theirs.load_state_dict(unet.state_dict())
    assert_same(unet, theirs)
    assert_same(unet, theirs, side=15 if len(structure.config.block_out_channels) == 3 else 24)


def test_what_the_file_was_told_is_kept(tmp_path):
    """diffusers saves such a UNet and reads it again, as any of its own."""
    structure = NARROW["XL"]
    theirs = PrunedUNet.from_config({**structure.config.to_dict(), "pruned": pruned(structure)})
    theirs.save_pretrained(tmp_path)
    again = PrunedUNet.from_pretrained(tmp_path)
    assert again.config.pruned == pruned(structure)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))
