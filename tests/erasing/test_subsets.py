"""Which parameters a subset holds, on Stable Diffusion 2.1's UNet and on a pruned one."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.subsets import modules, subset
from bilevel_fast.models.architecture import SD21, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from mini_folder import TINY


@pytest.fixture(scope="module")
def sd21():
    with torch.device("meta"):
        return UNet(SD21)


# Modules, from the layout: 4 layers in each of 16 attentions. ESD-u: 22 ResNets with 3 layers and 14 of them with a
# shortcut, 16 Transformers with 2 projections, 4 self-attention and 2 feed-forward layers, 6 resamplers, 2 layers of
# time embedding, the first and the last convolution. Parameters of attn2, by level of C channels: 2 C^2 + 2048 C + C.
# Of norms: 2 for each channel that goes into or out of a ResNet, or through a norm of the 4 of a Transformer.
ATTN2 = sum(count * (2 * c * c + 2 * 1024 * c + c) for c, count in ((320, 5), (640, 5), (1280, 6)))
ATTN1 = sum(count * (4 * c * c + c) for c, count in ((320, 5), (640, 5), (1280, 6)))

INTO = (320, 320, 320, 640, 640, *[1280] * 5, *[2560] * 5, 1920, 1920, 1280, 960, 960, 640, 640)
OUT_OF = (320, 320, 640, 640, *[1280] * 12, 640, 640, 640, 320, 320, 320)
NORMS = 2 * (sum(INTO) + sum(OUT_OF) + 4 * (5 * 320 + 5 * 640 + 6 * 1280) + 320)


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        ("esd-x", 64, ATTN2),
        ("selfattn", 64, ATTN1),
        ("esd-u", 22 * 3 + 14 + 16 * (2 + 4 + 2) + 6 + 2 + 2, 865_910_724 - ATTN2 - NORMS),
    ],
)
def test_presets_on_stable_diffusion_21(name, layers, parameters, sd21):
    assert len(modules(sd21, name)) == layers
    assert sum(sd21.get_parameter(n).numel() for n in subset(sd21, name)) == parameters


def test_esd_x_and_u_part_what_is_no_norm(sd21):
    sizes = {name: p.numel() for name, p in sd21.named_parameters()}
    x, u, full = (subset(sd21, name) for name in ("esd-x", "esd-u", "full"))
    assert full == sizes.keys()
    assert sum(sizes.values()) == 865_910_724
    assert not x & u
    assert x | u == {name for name in sizes if "norm" not in name}
    assert {"conv_in.weight", "conv_out.bias", "time_embedding.linear_1.bias"} <= u
    assert subset(sd21, "selfattn") < u


def test_patterns(sd21):
    values = subset(sd21, "*.attn2.to_k.weight, *.attn2.to_v.weight")
    assert len(values) == 32
    assert values < subset(sd21, "esd-x")
    assert subset(sd21, "conv_in.*,selfattn") == {"conv_in.weight", "conv_in.bias"} | subset(sd21, "selfattn")


def test_a_pruned_unet_has_what_is_left():
    gone = "up_blocks.2.attentions.1"
    unet, dense = UNet(TINY, Structure.uniform(TINY, 0.5, [gone])), UNet(TINY)
    for name in ("esd-x", "esd-u", "selfattn", "full"):
        assert subset(unet, name) == {n for n in subset(dense, name) if not n.startswith(gone + ".")}


def test_what_holds_nothing_is_refused(sd21):
    with pytest.raises(UserError, match="'esd-y' holds nothing of this UNet; did you mean"):
        subset(sd21, "esd-y")
    with pytest.raises(UserError, match="holds nothing"):
        subset(sd21, "esd-x,")
    every = [site.name for site in sites(TINY) if site.kind == "transformer"]
    bare = UNet(TINY, Structure.uniform(TINY, 1.0, every))
    with pytest.raises(UserError, match="'esd-x' holds nothing of this UNet; its sites were dropped"):
        subset(bare, "esd-x")
