"""Structure: the layout of the architecture vector, round trips, every refusal, and slicing against a masked model."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, UNetConfig, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.vector import from_vector, to_vector

NARROW = dataclasses.replace(
    SD21, block_out_channels=(8, 16, 24, 24), num_heads=(2, 2, 4, 4), norm_num_groups=4, cross_attention_dim=12
)
RESNET, TRANSFORMER = "down_blocks.0.resnets.0", "down_blocks.0.attentions.0"


@st.composite
def structures(draw: st.DrawFn, config: UNetConfig, any_drop: bool = True) -> Structure:
    """Any valid structure; `any_drop` allows drops that the architecture vector cannot express."""
    kept, dropped = {}, set()
    for site in sites(config):
        if (site.droppable if any_drop else site.depth_bit) and draw(st.booleans()):
            dropped.add(site.name)
            continue
        kept[site.name] = {
            w.name: tuple(sorted(draw(st.sets(st.integers(0, w.units - 1), min_size=1)))) for w in site.widths
        }
    return Structure(config, kept, frozenset(dropped))


# --- architecture vector ---

# First bit of each width vector, and the depth bit, of the sites of SD 2.1.
LAYOUT = {
    "down_blocks.0.resnets": [((0,), None), ((32,), 1606)],
    "down_blocks.0.attentions": [((64, 69, 74), None), ((106, 111, 116), 1607)],
    "down_blocks.1.resnets": [((148,), None), ((180,), 1608)],
    "down_blocks.1.attentions": [((212, 222, 232), None), ((264, 274, 284), 1609)],
    "down_blocks.2.resnets": [((316,), None), ((348,), 1610)],
    "down_blocks.2.attentions": [((380, 400, 420), None), ((452, 472, 492), 1611)],
    "down_blocks.3.resnets": [((524,), None), ((556,), 1612)],
    "mid_block.resnets": [((588,), None), ((620,), None)],
    "mid_block.attentions": [((652, 672, 692), None)],
    "up_blocks.0.resnets": [((724,), None), ((756,), None), ((788,), 1613)],
    "up_blocks.1.resnets": [((820,), None), ((852,), None), ((884,), 1614)],
    "up_blocks.1.attentions": [((916, 936, 956), None), ((988, 1008, 1028), None), ((1060, 1080, 1100), 1615)],
    "up_blocks.2.resnets": [((1132,), None), ((1164,), None), ((1196,), 1616)],
    "up_blocks.2.attentions": [((1228, 1238, 1248), None), ((1280, 1290, 1300), None), ((1332, 1342, 1352), 1617)],
    "up_blocks.3.resnets": [((1384,), None), ((1416,), None), ((1448,), 1618)],
    "up_blocks.3.attentions": [((1480, 1485, 1490), None), ((1522, 1527, 1532), None), ((1564, 1569, 1574), 1619)],
}


def test_vector_layout_of_sd21():
    """Clearing one bit of the dense vector removes exactly the unit, or the site, that the published layout says."""
    dense = Structure.dense(SD21)
    assert to_vector(dense).tolist() == [1.0] * 1620
    members = {site.name: site for site in sites(SD21)}
    assert list(members) == [f"{part}.{j}" for part, rows in LAYOUT.items() for j in range(len(rows))]
    for part, rows in LAYOUT.items():
        for j, (starts, depth_bit) in enumerate(rows):
            site = members[f"{part}.{j}"]
            for start, width in zip(starts, site.widths, strict=True):
                for unit in (0, width.units - 1):
                    vector = torch.ones(1620)
                    vector[start + unit] = 0
                    thinned = from_vector(SD21, vector)
                    expected = tuple(u for u in range(width.units) if u != unit)
                    assert thinned.kept[site.name][width.name] == expected
                    assert to_vector(thinned).tolist() == vector.tolist()
            if depth_bit is not None:
                vector = torch.ones(1620)
                vector[depth_bit] = 0
                assert from_vector(SD21, vector) == Structure.uniform(SD21, 1.0, [site.name])
    assert sum(depth is not None for rows in LAYOUT.values() for _, depth in rows) == 14


def test_soft_vector():
    """Entries of 0.5 and more are kept, as in the published checkpoints, which hold sigmoids in a (1, 1620) tensor."""
    vector = torch.full((1, 1620), 0.75)
    vector[0, 1:32], vector[0, 1606] = 0.49, 0.5
    structure = from_vector(SD21, vector)
    assert structure.kept[RESNET] == {"groups": (0,)}
    assert not structure.dropped


@settings(max_examples=25, deadline=None)
@given(structures(MINI, any_drop=False))
def test_vector_round_trip(structure: Structure):
    assert from_vector(MINI, to_vector(structure)) == structure
    assert from_vector(MINI, to_vector(structure).tolist()) == structure


# --- construction and file ---


@pytest.mark.parametrize("config", [SD21, MINI])
def test_uniform(config):
    structure = Structure.uniform(config, 0.55)
    for site in sites(config):
        for width in site.widths:
            units = max(1, int(0.55 * width.units))
            assert structure.kept[site.name][width.name] == tuple(range(units))
            assert structure.count(site, width) == units
    assert Structure.dense(config).is_dense
    assert not structure.is_dense
    assert not Structure.uniform(config, 1.0, [s.name for s in sites(config) if s.depth_bit]).is_dense
    smallest = Structure.uniform(config, 1e-6)
    assert all(units == (0,) for kept in smallest.kept.values() for units in kept.values())


@settings(max_examples=25, deadline=None)
@given(structure=structures(MINI))
def test_file_round_trip(structure: Structure, tmp_path_factory):
    path = tmp_path_factory.mktemp("structure") / "structure.json"
    structure.save(path)
    assert Structure.load(path) == structure
    assert [p.name for p in path.parent.iterdir()] == ["structure.json"]


def dense_kept(**change) -> dict:
    kept = {site.name: {w.name: tuple(range(w.units)) for w in site.widths} for site in sites(NARROW)}
    for site, value in change.items():
        if value is None:
            del kept[site]
        else:
            kept[site] = value
    return kept


HEADS = {"attn1": (0, 1), "attn2": (0, 1)}
REFUSALS = {
    "unknown": (dense_kept(**{"down_blocks.0.resnet.0": {}}), (), "no site 'down_blocks.0.resnet.0'.*did you mean"),
    "unknown_drop": (dense_kept(), ("mid",), "no site 'mid' in this UNet"),
    "twice": (dense_kept(), (RESNET,), f"{RESNET} is both kept and dropped"),
    "undroppable": (
        dense_kept(**{"down_blocks.1.resnets.0": None}),
        ("down_blocks.1.resnets.0",),
        "down_blocks.1.resnets.0 cannot be dropped, it changes the number of channels",
    ),
    "missing": (dense_kept(**{RESNET: None}), (), f"{RESNET} is missing"),
    "vector": (dense_kept(**{RESNET: {"group": (0,)}}), (), f"{RESNET} has no width vector 'group'.*'groups'"),
    "no_vector": (dense_kept(**{TRANSFORMER: HEADS}), (), f"{TRANSFORMER} lacks width vector 'ff'"),
    "nothing": (dense_kept(**{RESNET: {"groups": ()}}), (), f"{RESNET} keeps nothing of 'groups'"),
    "beyond": (dense_kept(**{RESNET: {"groups": (0, 4)}}), (), f"{RESNET}, 'groups': .* integers in 0..3"),
    "negative": (dense_kept(**{RESNET: {"groups": (-1, 0)}}), (), f"{RESNET}, 'groups': .* integers in 0..3"),
    "fraction": (dense_kept(**{RESNET: {"groups": (0.5,)}}), (), f"{RESNET}, 'groups': .* integers in 0..3"),
    "order": (dense_kept(**{RESNET: {"groups": (1, 0)}}), (), f"{RESNET}, 'groups': .* ascending"),
    "repeat": (dense_kept(**{RESNET: {"groups": (1, 1)}}), (), f"{RESNET}, 'groups': .* ascending, without repeats"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name, tmp_path):
    """When built, and when read from a file; the file is named then."""
    kept, dropped, message = REFUSALS[name]
    with pytest.raises(UserError, match=message):
        Structure(NARROW, kept, frozenset(dropped))
    path = tmp_path / "structure.json"
    path.write_text(json.dumps({**Structure.dense(NARROW).to_dict(), "kept": kept, "dropped": dropped}))
    with pytest.raises(UserError, match=f"{path}: structure: .*{message}") as error:
        Structure.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "wanted a JSON object, found list"),
        ({"format": "other"}, "is not a structure file; wanted format 'bilevel_fast.structure'"),
        ({"version": 3}, "has version 3, this release reads 1 and 2"),
        ({"kept": None}, "kept, dropped or config is not what a structure holds"),
        ({"dropped": 3}, "kept, dropped or config is not what a structure holds"),
        ({"kept": {"down_blocks.0.resnets.0": {"groups": [True]}}}, "down_blocks.0.resnets.0, 'groups': units must be"),
        ({"config": {}}, "config: field 'block_out_channels' is missing"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "structure.json"
    if isinstance(content, dict):
        content = json.dumps({**Structure.dense(MINI).to_dict(), **content})
    if isinstance(content, str):
        content = content.encode()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}.*{message}") as error:
        Structure.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["config", "kept", "dropped"])
def test_file_without_a_field(field, tmp_path):
    path = tmp_path / "structure.json"
    path.write_text(json.dumps({k: v for k, v in Structure.dense(MINI).to_dict().items() if k != field}))
    with pytest.raises(UserError, match=f"{path}: field '{field}' is missing"):
        Structure.load(path)


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_uniform_refuses(keep):
    with pytest.raises(UserError, match=f"keep is {keep}, wanted 0 < keep <= 1"):
        Structure.uniform(MINI, keep)


def test_vector_refuses():
    with pytest.raises(UserError, match=r"has 1619 entries, this UNet wants 1606 widths \+ 14 depths"):
        from_vector(SD21, torch.ones(1619))
    vector = torch.ones(1620)
    vector[69:74] = 0
    with pytest.raises(UserError, match=f"{TRANSFORMER} keeps nothing of 'attn2'"):
        from_vector(SD21, vector)
    with pytest.raises(UserError, match=f"{RESNET} is dropped, but has no depth bit"):
        to_vector(Structure.uniform(SD21, 1.0, [RESNET]))


# --- slicing ---


def dense_model(config: UNetConfig = NARROW) -> UNet:
    """fp64, away from the initial values, where biases of zero and gains of one would hide a wrong cut."""
    model = UNet(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def sliced(model: UNet, structure: Structure) -> UNet:
    student = UNet(model.config, structure).double()
    student.load_state_dict(structure.slice(model.state_dict()))
    return student


LAST = {
    "groups": "conv2",
    "attn1": "transformer_blocks.0.attn1.to_out.0",
    "attn2": "transformer_blocks.0.attn2.to_out.0",
    "ff": "transformer_blocks.0.ff.net.2",
}


def masked(model: UNet, structure: Structure) -> UNet:
    """The dense UNet with the same function, written without the table of cuts: the last layer of each width vector
    does not read what was removed, and a dropped site adds nothing to its input."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for site in sites(model.config):
        name = site.name
        if name in structure.dropped:
            last = f"{name}.conv2" if site.kind == "resnet" else f"{name}.proj_out"
            state[f"{last}.weight"].zero_()
            state[f"{last}.bias"].zero_()
            if f"{name}.conv_shortcut.weight" in state:
                state[f"{name}.conv_shortcut.bias"].zero_()
                identity = torch.eye(site.out_channels, site.in_channels, dtype=torch.float64)
                state[f"{name}.conv_shortcut.weight"].copy_(identity[:, :, None, None])
            continue
        for width in site.widths:
            columns = state[f"{name}.{LAST[width.name]}.weight"].unflatten(1, (width.units, width.unit_size))
            for unit in set(range(width.units)) - set(structure.kept[name][width.name]):
                columns[:, unit] = 0
    other = UNet(model.config).double()
    other.load_state_dict(state)
    return other


def forward(model: UNet) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.config.in_channels, 8, 8, generator=g, dtype=torch.float64)
    text = torch.randn(2, 5, model.config.cross_attention_dim, generator=g, dtype=torch.float64)
    prediction = model(x, torch.tensor([3, 700]), text)
    return (prediction.out, *prediction.blocks)


def thin(*names: str) -> Structure:
    """Every second unit, from the second on, of the named width vectors; all of the others."""
    kept = {
        site.name: {w.name: tuple(range(w.units)[1::2] if w.name in names else range(w.units)) for w in site.widths}
        for site in sites(NARROW)
    }
    return Structure(NARROW, kept)


EVERYWHERE = [s.name for s in sites(NARROW) if s.droppable]
ALL = thin("attn1", "attn2", "ff", "groups")
CUTS = {
    "dense": Structure.dense(NARROW),
    "heads": thin("attn1", "attn2"),
    "ff": thin("ff"),
    "groups": thin("groups"),
    "depth": Structure.uniform(NARROW, 1.0, EVERYWHERE),
    "all": Structure(
        NARROW,
        {name: kept for name, kept in ALL.kept.items() if name not in EVERYWHERE[::3]},
        frozenset(EVERYWHERE[::3]),
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_slice_equals_mask(cut):
    """Predictions, block outputs and the gradients of all weights that are left: equal up to fp64 round-off."""
    structure, model = CUTS[cut], dense_model()
    small, large = sliced(model, structure), masked(model, structure)
    if cut != "dense":
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        assert (forward(small)[0] - forward(model)[0]).abs().max() > 1e-3, "the cut must matter"
    ours, oracle = forward(small), forward(large)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())

    sum(t.square().mean() for t in ours).backward()
    sum(t.square().mean() for t in oracle).backward()
    wanted = structure.slice({name: p.grad for name, p in large.named_parameters()})
    gradients = {name: p.grad for name, p in small.named_parameters()}
    assert gradients.keys() == wanted.keys()
    scale = max(g.abs().max().item() for g in wanted.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12 * scale, msg=name)


def test_resnet_mask_before_the_norm_differs():
    """APTP's gates zero the inner channels before GroupNorm, which lets SiLU(beta) flow on: not what slicing gives."""
    structure, model = thin("groups"), dense_model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for site in sites(NARROW):
        if site.kind == "resnet":
            for row in ("conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias"):
                state[f"{site.name}.{row}"].unflatten(0, (4, -1))[::2] = 0
    gated = UNet(NARROW).double()
    gated.load_state_dict(state)
    assert (forward(gated)[0] - forward(sliced(model, structure))[0]).abs().max() > 1e-3


def test_slice_leaves_the_rest_alone():
    model = dense_model()
    state = model.state_dict()
    small = Structure.uniform(NARROW, 1.0, [EVERYWHERE[0]]).slice(state)
    assert all(small[k] is state[k] for k in small)
    assert set(state) - set(small) == {k for k in state if k.startswith(EVERYWHERE[0] + ".")}


def test_slice_refuses():
    structure = thin("ff")
    state = dense_model().state_dict()
    key = f"{TRANSFORMER}.transformer_blocks.0.ff.net.0.proj.weight"
    with pytest.raises(UserError, match=f"weights: {key} has size 32 on axis 0, the dense UNet 64"):
        structure.slice(structure.slice(state))
    with pytest.raises(UserError, match=f"weights: {key} is missing, wanted the dense UNet"):
        structure.slice({k: v for k, v in state.items() if k != key})


def test_a_vector_with_nan_prunes_nothing_silently():
    vector = to_vector(Structure.dense(MINI))
    vector[3] = float("nan")
    with pytest.raises(UserError, match="1 entries that are not finite"):
        from_vector(MINI, vector)
