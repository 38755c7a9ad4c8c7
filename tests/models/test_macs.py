"""The closed-form counter against published totals, an independent counter of real modules, and their parameters."""

from fractions import Fraction

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, UNetConfig, sites
from bilevel_fast.models.macs import count, dense_true, fixed_costs, site_costs
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from unets import flops_and_params, random_structure

G = 1e9
HALF_DIGIT = 0.0005 + 1e-9  # the tables print three decimals
DEPTH = [site.name for site in sites(SD21) if site.depth_bit]


# --- published numbers ---


@pytest.mark.parametrize(
    ("latent", "text", "true", "official", "modules"),
    [
        (96, 1, None, 1387.505, 1384.186),  # "SD 2.1 = 1384.2 G": 768 px and a one-token text
        (96, 77, 1077.374, 1389.447, None),
        (64, 77, 402.784, 464.327, 462.852),
        (32, 77, 90.620, 94.433, 94.063),
    ],
)
def test_dense_sd21(latent, text, true, official, modules):
    macs = count(Structure.dense(SD21), latent, text)
    for ours, published in ((macs.true, true), (macs.official, official), (macs.official_modules, modules)):
        assert published is None or abs(ours / G - published) <= HALF_DIGIT
    assert macs.params == 865_910_724
    assert macs.ratio == 1.0
    assert macs.true == dense_true(SD21, latent, text) == sum(row.true for row in macs.rows)
    assert macs.official == sum(row.official for row in macs.rows)


def test_silu_is_counted_once_per_parent():
    """22 ResNets, the time embedding and the output share one module of 0.067 GMAC: 24 x, and 22 x less by module."""
    macs = count(Structure.dense(SD21), 64, 77)
    silu = macs.rows[-1].official
    assert macs.rows[-1].name == "conv_act"
    assert abs(silu / G - 1.61) < 0.005
    assert abs(silu / 24 / G - 0.067) < HALF_DIGIT
    assert (macs.official - macs.official_modules) * 24 == silu * 22


# Prunable and fixed GMAC of every site of SD 2.1 at 64x64 latents and 77 tokens. ResNet: groups, fixed.
# Transformer: attn1, attn2, ff, fixed, and attn2 as the official counter has it.
T64 = (12.499, 1.093, 5.033, 0.845, 11.711)
T32 = (3.030, 1.042, 5.033, 0.842, 2.292)
T16 = (1.847, 1.092, 5.033, 0.841, 1.210)
T8 = (0.430, 0.424, 1.258, 0.210, 0.422)
PER_SITE = {
    "down_blocks.0": [(7.555, 0.003), (7.555, 0.003), T64, T64],
    "down_blocks.1": [(5.666, 0.211), (7.553, 0.001), T32, T32],
    "down_blocks.2": [(5.665, 0.210), (7.553, 0.001), T16, T16],
    "down_blocks.3": [(1.889, 0.000), (1.889, 0.000)],
    "mid_block": [(1.889, 0.000), (1.889, 0.000), T8],
    "up_blocks.0": [(2.833, 0.210)] * 3,
    "up_blocks.1": [(11.328, 0.840), (11.328, 0.840), (9.440, 0.630), T16, T16, T16],
    "up_blocks.2": [(15.103, 1.263), (11.328, 0.842), (9.441, 0.632), T32, T32, T32],
    "up_blocks.3": [(15.105, 1.267), (11.330, 0.845), (11.330, 0.845), T64, T64, T64],
}


def test_every_site_of_sd21():
    table = site_costs(SD21, 64, 77)
    published = [row for rows in PER_SITE.values() for row in rows]
    assert [s.block for s in sites(SD21)] == [block for block, rows in PER_SITE.items() for _ in rows]
    for site, row in zip(sites(SD21), published, strict=True):
        cost = table[site.name]
        prunable = {w.name: cost.units[w.name] * w.units for w in site.widths}
        if site.kind == "resnet":
            # the published table has the bias of conv2 among the prunable part, though no group takes it along
            bias = site.out_channels * (64 // site.stride) ** 2
            ours = (prunable["groups"].true + bias, cost.fixed.true - bias)
        else:
            ours = (*(prunable[w].true for w in ("attn1", "attn2", "ff")), cost.fixed.true)
            ours = (*ours, prunable["attn2"].true + prunable["attn2"].excess)
        assert [round(abs(o / G - p), 6) <= HALF_DIGIT for o, p in zip(ours, row, strict=True)] == [True] * len(row), (
            site.name,
            ours,
            row,
        )


def test_modules_outside_the_sites():
    costs = {name: cost.true / G for name, cost in fixed_costs(SD21, 64).items()}
    groups = {"upsamplers": 33.978, "downsamplers": 2.832, "conv_in": 0.048, "conv_out": 0.047, "time_embedding": 0.002}
    for part, published in {**groups, "conv_norm_out": 0.003}.items():
        assert abs(sum(c for name, c in costs.items() if part in name) - published) <= HALF_DIGIT, part


@pytest.mark.parametrize("latent", [32, 64, 96])
def test_by_module_a_structure_is_what_its_gates_leave_of_the_dense_sum(latent):
    """Of a site what its width vectors keep of the modules that they narrow, with their biases, and the rest while it
    stands; SiLU and what lies outside the sites as in the dense UNet."""
    structure, config = random_structure(SD21, 3, 0.3), SD21
    dense = Structure.dense(config)
    rows = {row.name: row.official for row in count(dense, latent, 77).rows}
    left = count(dense, latent, 77).official_modules - sum(rows[site.name] for site in sites(config))
    costs = site_costs(config, latent, 77)
    for site in sites(config):
        if site.name in structure.dropped:
            continue
        pixels = (latent // site.stride) ** 2
        bias = site.out_channels * (pixels if site.kind == "resnet" else 1)
        parts = {w.name: (costs[site.name].units[w.name], w.units) for w in site.widths}
        whole = {name: n * (unit.true + unit.excess) + bias for name, (unit, n) in parts.items()}
        kept = {name: Fraction(len(structure.kept[site.name][name]), n) for name, (_, n) in parts.items()}
        left += rows[site.name] - sum(whole.values()) + sum(kept[name] * macs for name, macs in whole.items())
    assert count(structure, latent, 77).official_modules == left
    assert structure.dropped


def test_published_ratios():
    half, shallow, dense = Structure.uniform(SD21, 0.5), Structure.uniform(SD21, 1.0, DEPTH), Structure.dense(SD21)

    def official(structure: Structure, latent: int, text: int) -> float:
        return count(structure, latent, text).official_modules / count(dense, latent, text).official_modules

    assert len(DEPTH) == 14
    assert round(official(half, 96, 1), 4) == 0.5063
    assert round(official(half, 64, 77), 4) == 0.5375
    assert round(count(half, 64, 77).ratio, 4) == 0.5562
    assert round(official(shallow, 96, 1), 3) == 0.640
    assert round(count(shallow, 64, 77).ratio, 3) == 0.661


# --- an independent counter ---


@pytest.mark.parametrize(
    "structure",
    [
        pytest.param(Structure.dense(SD21), id="dense"),
        pytest.param(random_structure(SD21, 0, 0.2), id="random"),
        pytest.param(Structure.uniform(SD21, 0.3, DEPTH), id="shallow"),
    ],
)
def test_products_and_parameters_of_sd21(structure):
    macs = count(structure, 64, 77)
    assert (2 * macs.products, macs.params) == flops_and_params(structure, 64, 77)
    assert sum(row.products for row in macs.rows) == macs.products
    assert sum(row.params for row in macs.rows) == macs.params


# 13 is divided by no stride: downsampling rounds up, upsampling follows. One token, and more tokens than pixels.
@pytest.mark.parametrize(("latent", "text"), [(16, 12), (13, 1), (2, 40)])
@pytest.mark.parametrize("seed", [0, 1])
def test_products_and_parameters_of_mini(latent, text, seed):
    structure = random_structure(MINI, seed, 0.2)
    macs = count(structure, latent, text)
    assert (2 * macs.products, macs.params) == flops_and_params(structure, latent, text)


def test_padding_is_not_counted():
    structure = Structure.uniform(MINI, 0.8)
    padded = flops_and_params(structure, 16, 12, align=32)
    macs = count(structure, 16, 12)
    assert padded[0] > 2 * macs.products
    assert padded[1] > macs.params == flops_and_params(structure, 16, 12)[1]


def test_sd15_projects_with_convolutions():
    """The same products; as convolutions the projections' biases count per pixel."""
    linear, conv = ({**SD21.to_dict(), "use_linear_projection": value} for value in (True, False))
    linear, conv = (count(Structure.dense(UNetConfig.from_dict(c)), 64, 77) for c in (linear, conv))
    assert linear.params == conv.params
    assert linear.products == conv.products
    biases = sum(2 * s.out_channels * ((64 // s.stride) ** 2 - 1) for s in sites(SD21) if s.kind == "transformer")
    assert conv.true - linear.true == biases


# --- rows and refusals ---


def test_rows_are_modules_of_the_state_dict():
    """Each row's parameters are exactly those below its name; a dropped site has a row of zeros."""
    structure = Structure.uniform(SD21, 0.5, ["up_blocks.3.attentions.2"])
    with torch.device("meta"):
        state = UNet(SD21, structure).state_dict()
    rows = {row.name: row for row in count(structure, 64, 77).rows}
    for name, row in rows.items():
        assert row.params == sum(v.numel() for k, v in state.items() if k.startswith(name + ".")), name
    assert {k for k in state if not any(k.startswith(name + ".") for name in rows)} == set()
    gone = rows["up_blocks.3.attentions.2"]
    assert (gone.true, gone.official, gone.products, gone.params) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("latent", "text", "message"), [(0, 77, "latent size is 0, wanted"), (64, 0, "text length is 0, wanted")]
)
def test_refusals(latent, text, message):
    with pytest.raises(UserError, match=message):
        count(Structure.dense(MINI), latent, text)
