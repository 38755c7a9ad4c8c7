"""The pruned diffusers UNet of the benchmarks against ours: outputs, block outputs and every gradient."""

import dataclasses

import pytest
import torch

from bilevel_fast.models.architecture import MINI, SD21, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet

pytest.importorskip("diffusers")

from benchmarks.speed.diffusers_unet import Hooked, diffusers_unet

NARROW = {"sample_size": 8, "block_out_channels": (32, 64, 96, 96), "norm_num_groups": 8, "cross_attention_dim": 24}
SD21_NARROW = dataclasses.replace(SD21, **NARROW, num_heads=(2, 4, 6, 6))
CONFIGS = {
    "sd21": SD21_NARROW,
    "sd15": dataclasses.replace(SD21_NARROW, num_heads=(8, 8, 8, 8), use_linear_projection=False),
    "bk_sdm_small": dataclasses.replace(SD21_NARROW, layers_per_block=1, mid_block_type=None),
    "mini": MINI,
}


def scattered(config):
    """Other units at every site, another number of each kind, and dropped sites of both kinds, down and up."""
    dropped = list({(s.name[0], s.kind): s.name for s in sites(config) if s.depth_bit}.values())
    kept, number = {}, 0
    for site in sites(config):
        if site.name not in dropped:
            kept[site.name] = {}
            for width in site.widths:
                number += 1
                kept[site.name][width.name] = tuple(range(number % 3, width.units, 1 + number % 2)) or (0,)
    return Structure(config, kept, frozenset(dropped))


STRUCTURES = {
    "dense": Structure.dense,
    "uniform": lambda config: Structure.uniform(config, 0.6),
    "scattered": scattered,
}


def make(config, structure, align=1):
    """Our student, away from initial values: a gain of one or a bias of zero would hide a swapped tensor."""
    torch.manual_seed(0)
    ours = UNet(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return ours.cut(structure, align)


def inputs(config, size=16):
    torch.manual_seed(1)
    x = torch.randn(2, config.in_channels, size, size)
    return x, torch.randint(0, 1000, (2,)), torch.randn(2, 7, config.cross_attention_dim)


def relative(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_ours(name, kind):
    config = CONFIGS[name]
    structure = STRUCTURES[kind](config)
    # a padded student saves the real channels only
    ours = make(config, structure, align=16 if kind == "scattered" else 1)
    theirs = Hooked(diffusers_unet(structure, ours.state_dict()))
    assert {k: v.shape for k, v in theirs.unet.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    x, t, text = inputs(config)
    prediction = ours(x, t, text)
    out, blocks = theirs(x, t, text)
    assert relative(out, prediction.out) <= 1e-4
    assert len(blocks) == len(config.blocks)
    for mine, other in zip(prediction.blocks, blocks, strict=True):
        assert relative(other, mine) <= 1e-4

    # every block output has a gradient of its own, as in distillation
    upstream = [torch.randn_like(p) for p in (out, *blocks)]
    torch.autograd.backward((out, *blocks), upstream)
    torch.autograd.backward((prediction.out, *prediction.blocks), upstream)
    gradients = dict(theirs.unet.named_parameters())
    checked = 0
    for key, p in ours.named_parameters():
        mine = p.grad[tuple(slice(0, size) for size in gradients[key].shape)]  # without the padding
        assert relative(gradients[key].grad, mine) <= 1e-4, key
        checked += 1
    assert checked == len(gradients)


def test_the_structures_are_worth_a_test():
    """Every kind of width is cut, at different numbers of units, and sites of both kinds are dropped in both halves."""
    structure = scattered(SD21_NARROW)
    for name in ("groups", "attn1", "attn2", "ff"):
        counts = {structure.count(s, w) / w.units for s in sites(SD21_NARROW) for w in s.widths if w.name == name}
        assert len(counts - {0.0, 1.0}) >= 2, name
    halves = {(name[0], "attentions" in name) for name in structure.dropped}
    assert halves == {("d", False), ("d", True), ("u", False), ("u", True)}


def test_weights_are_copies():
    config, structure = MINI, Structure.uniform(MINI, 0.5)
    state = make(config, structure).state_dict()
    before = {k: v.clone() for k, v in state.items()}
    theirs = diffusers_unet(structure, state)
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in state.items())


def test_weights_of_another_structure_are_refused():
    state = make(MINI, Structure.uniform(MINI, 0.5)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        diffusers_unet(Structure.uniform(MINI, 0.75), state)
    extra = {**state, "conv_in.extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        diffusers_unet(Structure.uniform(MINI, 0.5), extra)


def test_sd21_on_meta():
    """The real size, 0.8 of the units: every key and shape of ours."""
    structure = Structure.uniform(SD21, 0.8, [s.name for s in sites(SD21) if s.depth_bit][3:5])
    with torch.device("meta"):
        ours = UNet(SD21, structure, align=8)
    theirs = diffusers_unet(structure, ours.state_dict())
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert sum(p.numel() for p in theirs.parameters()) < 0.8 * 865_910_724


def test_shared_weights_are_not_copied():
    """So that both ways to run SD 2.1 fit into memory."""
    ours = make(MINI, Structure.uniform(MINI, 0.6))
    theirs = diffusers_unet(ours.structure, ours.state_dict(), shared=True).eval()
    copies = diffusers_unet(ours.structure, ours.state_dict()).eval()
    places = {name: p.data_ptr() for name, p in ours.named_parameters()}
    assert {name: p.data_ptr() for name, p in theirs.named_parameters()} == places
    assert not {p.data_ptr() for p in copies.parameters()} & set(places.values())
    with torch.no_grad():
        assert torch.allclose(theirs(*inputs(MINI)).sample, copies(*inputs(MINI)).sample, atol=1e-5)
