"""Structures of UNets whose Transformers have many blocks: files, vectors, weights, and what they cost."""

import json

import pytest
import torch

from benchmarks.speed.diffusers_unet import Hooked, diffusers_unet
from benchmarks.structures import PLANNED
from benchmarks.structures import structure as measured
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.macs import count
from bilevel_fast.models.sdxl import SDXL, SDXL_FAMILY
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import Prediction, UNet
from bilevel_fast.models.vector import from_vector, layout, to_vector
from unets import SDXL_LIKE, flops_and_params, inputs, make_unet, random_structure, relative

OUTER = "down_blocks.2.attentions.0"
BLOCK = f"{OUTER}.transformer_blocks.1"


# --- files and vectors ---


def test_a_file_of_version_2(tmp_path):
    """Transformers, their blocks, or both are dropped; and a structure of Stable Diffusion still is of version 1."""
    for seed in range(3):
        structure = random_structure(SDXL_LIKE, seed, 0.4)
        structure.save(tmp_path / "structure.json")
        assert Structure.load(tmp_path / "structure.json") == structure
        assert read_json(tmp_path / "structure.json")["version"] == 2
    found = [random_structure(SDXL_LIKE, seed, 0.4).dropped for seed in range(3)]
    shells = {site.name for site in sites(SDXL_LIKE) if not site.widths}
    assert any(shells & dropped for dropped in found)
    assert any(".transformer_blocks." in name for dropped in found for name in dropped)


@pytest.mark.parametrize("name", PLANNED)
def test_files_of_version_1_are_written_as_they_were(name):
    """Byte for byte what an earlier release wrote, but for who wrote it."""
    from benchmarks.structures import FOLDER

    text = (FOLDER / f"{name}.json").read_text()
    provenance = json.loads(text)["provenance"]
    assert json.dumps({"provenance": provenance, **measured(name).to_dict()}) == text


def test_the_vector_says_what_a_structure_keeps():
    depths = {site.name: i for i, site in enumerate(layout(SDXL_LIKE).depths)}
    assert BLOCK in depths
    assert OUTER in depths
    for drop in ([], [BLOCK], [OUTER], [s.name for s in sites(SDXL_LIKE) if s.depth_bit][1::3]):
        structure = Structure.uniform(SDXL_LIKE, 0.6, drop)
        vector = to_vector(structure)
        assert from_vector(SDXL_LIKE, vector) == structure
    vector = torch.ones(layout(SDXL_LIKE).size)
    vector[layout(SDXL_LIKE).widths + depths[OUTER]] = 0
    assert from_vector(SDXL_LIKE, vector) == Structure.uniform(SDXL_LIKE, 1.0, [OUTER])
    assert BLOCK in from_vector(SDXL_LIKE, vector).dropped


def test_standing_depths_are_products_along_the_nesting():
    plan = layout(SDXL_LIKE)
    depths = torch.rand(3, len(plan.depths))
    number = {site.name: i for i, site in enumerate(plan.depths)}
    for i, site in enumerate(plan.depths):
        outer = depths[:, number[site.within]] if site.within in number else 1.0
        assert torch.equal(plan.standing(depths)[:, i], depths[:, i] * outer)
    assert BLOCK in number
    assert (plan.size, plan.widths, len(plan.segments)) == (314, 292, 53)
    plan = layout(SDXL)
    assert (plan.size, plan.widths, len(plan.segments), len(plan.depths)) == (5464, 5384, 227, 80)


DENSE = Structure.dense(SDXL_LIKE).kept


@pytest.mark.situation
@pytest.mark.parametrize(
    ("changes", "dropped", "message"),
    [
        ({}, {OUTER}, f"{BLOCK[:-1]}0 is kept, and {OUTER}, which it is a part of, is dropped"),
        ({OUTER: {"attn1": (0,)}}, set(), f"site {OUTER} has no width vector 'attn1'"),
        ({BLOCK: {}}, set(), f"site {BLOCK} lacks width vector 'attn1'"),
        ({f"{OUTER}.transformer_blocks.7": {}}, set(), "no site .*transformer_blocks.7' in this UNet; did you mean"),
    ],
)
def test_a_structure_of_parts_that_do_not_fit(changes, dropped, message):
    """A structure keeps a transformer block of a Transformer that it drops, or names one that is not there: refused."""
    kept = {name: units for name, units in {**DENSE, **changes}.items() if name not in dropped}
    with pytest.raises(UserError, match=f"structure: .*{message}"):
        Structure(SDXL_LIKE, kept, frozenset(dropped))


# --- weights ---


@pytest.mark.parametrize("seed", range(2))
def test_a_cut_unet_equals_diffusers_cut_alike(seed):
    """Blocks, Transformers and ResNets dropped, widths of all kinds narrowed: outputs and block outputs."""
    structure = random_structure(SDXL_LIKE, seed, 0.3)
    assert any(".transformer_blocks." in name for name in structure.dropped)
    pytest.importorskip("diffusers")
    student, given = make_unet(SDXL_LIKE).cut(structure, align=16), inputs(SDXL_LIKE)
    out, blocks = Hooked(diffusers_unet(structure, student.state_dict()))(*given)
    ours = student(*given)
    assert relative(ours.out, out) <= 1e-5
    assert all(relative(mine, other) <= 1e-5 for mine, other in zip(ours.blocks, blocks, strict=True))


def test_a_transformer_without_blocks_still_projects():
    """Allowed, if not useful: what is left of it is its norm and its projections."""
    unet, names = make_unet(SDXL_LIKE), [f"{OUTER}.transformer_blocks.{i}" for i in range(2)]
    structure = Structure.uniform(SDXL_LIKE, 1.0, names)
    student, given = unet.cut(structure), inputs(SDXL_LIKE)
    assert {k.removeprefix(f"{OUTER}.").split(".")[0] for k in student.state_dict() if k.startswith(f"{OUTER}.")} == {
        "norm", "proj_in", "proj_out",
    }  # fmt: skip
    shell = student(*given).out
    assert relative(shell, unet(*given).out) > 1e-3
    assert relative(shell, unet.cut(Structure.uniform(SDXL_LIKE, 1.0, [OUTER]))(*given).out) > 1e-3


def test_recomputing_changes_no_gradient():
    unet, given = UNet(SDXL_LIKE, random_structure(SDXL_LIKE, 1, 0.2)), inputs(SDXL_LIKE)
    found: list[list[torch.Tensor]] = []
    for recompute in (False, True):
        unet.recompute = recompute
        unet.zero_grad()
        prediction: Prediction = unet(*given)
        prediction.out.square().mean().backward()
        found.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- MACs ---


@pytest.mark.parametrize("seed", range(3))
def test_products_and_parameters(seed):
    structure = random_structure(SDXL_LIKE, seed, 0.3)
    macs = count(structure, 13, 5)
    assert (2 * macs.products, macs.params) == flops_and_params(structure, 13, 5)


@pytest.mark.parametrize(
    ("name", "true", "official"),
    [
        ("sdxl", 3384.457, 3752.277),
        ("ssd-1b", 2106.450, 2346.367),
        ("vega", 1412.830, 1549.009),
        ("koala-1b", 1717.930, 1907.850),
        ("koala-700m", 1352.517, 1519.442),
    ],
)
def test_real_sizes(name, true, official):
    """At 1024 px, totals as they are documented; `test_sdxl.py` has torch's own counter."""
    macs = count(Structure.dense(SDXL_FAMILY[name]), 128, 77)
    assert (round(macs.true / 1e9, 3), round(macs.official / 1e9, 3)) == (true, official)
    assert sum(row.params for row in macs.rows) == macs.params
