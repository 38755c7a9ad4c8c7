"""Gates: open they change nothing, hard they are the cut model, soft they are the formulas; each sample has its own."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, sites, with_blocks
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.vector import from_vector, layout, to_vector
from bilevel_fast.pruning.aptp import gates as gates_module
from bilevel_fast.pruning.aptp.gates import gated, split
from mini_folder import TINY
from unets import SDXL_LIKE, inputs, make_unet, relative

SD_LIKE = dataclasses.replace(
    SD21,
    sample_size=16,
    block_out_channels=(32, 64, 64, 64),
    num_heads=(2, 4, 4, 4),
    norm_num_groups=8,
    cross_attention_dim=24,
    layers_per_block=1,
)
CONFIGS = {
    "tiny": TINY,
    "mini": MINI,
    "sd21": SD_LIKE,
    "sd15": dataclasses.replace(SD_LIKE, use_linear_projection=False),
    "no_mid": dataclasses.replace(SD_LIKE, mid_block_type=None, layers_per_block=2),
    "sdxl": SDXL_LIKE,
}


def same(ours, theirs, tolerance):
    assert relative(ours.out, theirs.out) <= tolerance
    for mine, other in zip(ours.blocks, theirs.blocks, strict=True):
        assert relative(mine, other) <= tolerance


def scattered(config, widths=("groups", "attn1", "attn2", "ff"), drop=True):
    """Every second unit of the named width vectors, starting at the second; every other depth site gone."""
    dropped = with_blocks(config, frozenset([s.name for s in sites(config) if s.depth_bit][1::2] if drop else []))
    kept = {
        site.name: {
            w.name: tuple(range(w.units))[1::2] if w.name in widths and w.units > 1 else tuple(range(w.units))
            for w in site.widths
        }
        for site in sites(config)
        if site.name not in dropped
    }
    return Structure(config, kept, dropped)


def test_layout_of_sd21():
    plan = layout(SD21)
    assert (plan.size, plan.widths, len(plan.segments), len(plan.depths)) == (1620, 1606, 70, 14)
    assert all(a.stop == b.start for a, b in itertools.pairwise(plan.segments))
    at = {(s.site.name, s.width.name): (s.start, s.stop) for s in plan.segments}
    assert at["down_blocks.0.attentions.0", "attn2"] == (69, 74)
    assert at["mid_block.attentions.0", "ff"] == (692, 724)
    assert at["up_blocks.3.attentions.2", "ff"] == (1574, 1606)
    assert plan.depths[6].name == "down_blocks.3.resnets.1"
    depth = plan.depth_of_width
    assert depth[:32].eq(14).all()
    assert depth[32:64].eq(0).all()
    assert depth[1564:1606].eq(13).all()


def test_split_agrees_with_from_vector():
    """Bit by bit: the structure that reads the vector keeps exactly the units whose gate is one."""
    vector = to_vector(scattered(MINI))
    gates, structure = split(MINI, vector[None]), from_vector(MINI, vector)
    assert gates.keys() == {site.name for site in sites(MINI)}
    for site in sites(MINI):
        depth = gates[site.name].depth
        assert (depth is not None) == site.depth_bit
        assert (depth is not None and depth.item() == 0) == (site.name in structure.dropped)
        for width in site.widths:
            ones = tuple(gates[site.name].widths[width.name][0].nonzero().flatten().tolist())
            if site.name not in structure.dropped:
                assert ones == structure.kept[site.name][width.name]


@pytest.mark.parametrize("mode", ["exact", "compat"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("name", CONFIGS)
def test_open_gates_are_the_unet(name, dtype, tolerance, mode):
    config = CONFIGS[name]
    unet = make_unet(config, dtype)
    x, t, text = inputs(config, dtype=dtype)
    ours = gated(unet, x, t, text, torch.ones(2, layout(config).size), mode)
    same(ours, unet(x, t, text), tolerance)
    assert all(b.is_contiguous(memory_format=torch.channels_last) for b in ours.blocks)


@pytest.mark.parametrize("name", CONFIGS)
def test_hard_gates_are_the_cut_model(name):
    config = CONFIGS[name]
    unet, structure = make_unet(config), scattered(config)
    x, t, text = inputs(config)
    ours = gated(unet, x, t, text, to_vector(structure).expand(2, -1), "exact")
    same(ours, unet.cut(structure)(x, t, text), 1e-5)
    assert relative(ours.out, unet(x, t, text).out) > 0.05  # the structure matters
    assert all(b.is_contiguous(memory_format=torch.channels_last) for b in ours.blocks)


@pytest.mark.parametrize("width", ["attn1", "attn2", "ff"])
def test_compat_is_exact_outside_resnets(width):
    unet, structure = make_unet(TINY), scattered(TINY, (width,))
    x, t, text = inputs(TINY)
    same(
        gated(unet, x, t, text, to_vector(structure).expand(2, -1), "compat"),
        unet.cut(structure)(x, t, text),
        1e-5,
    )


def test_compat_resnet_is_the_formula():
    """One ResNet with a skip connection, from its modules; and it is not what slicing computes."""
    unet = make_unet(SD_LIKE)
    resnet = unet.up_blocks[1].resnets[0]
    h, skip = torch.randn(2, 64, 4, 4), torch.randn(2, 64, 4, 4)
    time, width, depth = torch.randn(2, SD_LIKE.time_embed_dim), torch.rand(2, 8), torch.rand(2)
    x = torch.cat([h, skip], dim=1)
    inner = resnet.conv1(F.silu(resnet.norm1(x))) + resnet.time_emb_proj(time)[:, :, None, None]
    parts = [inner[:, 8 * j : 8 * j + 8] * width[:, j].reshape(2, 1, 1, 1) for j in range(8)]
    out = resnet.conv_shortcut(x) + resnet.conv2(F.silu(resnet.norm2(torch.cat(parts, dim=1))))
    m = depth.reshape(2, 1, 1, 1)
    compat = gates_module._resnet(resnet, h, skip, time, width, depth, "compat")
    assert relative(compat, (1 - m) * h + m * out) <= 1e-5
    assert relative(compat, gates_module._resnet(resnet, h, skip, time, width, depth, "exact")) > 0.01


def test_compat_is_not_the_cut_model():
    """Behind a gate of zero the norm's bias flows on; a soft gate is divided out again."""
    unet, structure = make_unet(TINY), scattered(TINY, ("groups",), drop=False)
    x, t, text = inputs(TINY)
    cut = unet.cut(structure)(x, t, text).out
    hard = to_vector(structure).expand(2, -1)
    assert relative(gated(unet, x, t, text, hard, "compat").out, cut) > 0.05
    soft = (0.6 + 0.4 * hard).clamp(max=1)
    whole = unet(x, t, text).out
    felt = {mode: relative(gated(unet, x, t, text, soft, mode).out, whole) for mode in ("compat", "exact")}
    assert felt["compat"] < 1e-3 < 0.02 < felt["exact"]


def test_soft_gates_of_a_transformer_are_the_formula():
    """Loops over heads and FFN groups, from the definition: g on q, k and v, and on both halves of the GEGLU."""
    unet = make_unet(TINY)
    module = unet.down_blocks[1].attentions[0]
    block = module.transformer_blocks[0]
    x, text, g1, g2, gf = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 64), *torch.rand(2, 16).split([4, 4, 8], dim=1)

    def attend(attn, queries, keys, gate):
        q, k, v = attn.to_q(queries), attn.to_k(keys), attn.to_v(keys)
        heads = []
        for i in range(4):
            g, cut = gate[:, i].reshape(2, 1, 1), slice(8 * i, 8 * i + 8)
            weights = torch.softmax(g * g * q[..., cut] @ k[..., cut].mT / 8**0.5, dim=-1)
            heads.append(weights @ (g * v[..., cut]))
        return attn.to_out[0](torch.cat(heads, dim=-1))

    h = module.proj_in(module.norm(x).permute(0, 2, 3, 1).reshape(2, 16, 32))
    n = block.norm1(h)
    h = h + attend(block.attn1, n, n, g1)
    h = h + attend(block.attn2, block.norm2(h), text, g2)
    both = block.ff.net[0].proj(block.norm3(h))
    parts = []
    for i in range(8):
        g, cut = gf[:, i].reshape(2, 1, 1), slice(16 * i, 16 * i + 16)
        parts.append(g * both[..., :128][..., cut] * F.gelu(g * both[..., 128:][..., cut]))
    h = h + block.ff.net[2](torch.cat(parts, dim=-1))
    wanted = x + module.proj_out(h).reshape(2, 4, 4, 32).permute(0, 3, 1, 2)
    x = x.to(memory_format=torch.channels_last)
    gates = {"attn1": g1, "attn2": g2, "ff": gf}
    ours = module(x, text, lambda _, block, h, text: gates_module._block(block, h, text, gates))
    assert relative(ours, wanted) <= 1e-5


@pytest.mark.parametrize("mode", ["exact", "compat"])
def test_gradient_of_the_gates(mode):
    """Against central differences in fp64, for three gates of every width vector and every depth; both samples."""
    unet = make_unet(TINY, torch.float64)
    x, t, text = inputs(TINY, dtype=torch.float64)
    plan = layout(TINY)
    gates = (0.3 + 0.6 * torch.rand(2, plan.size, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn_like(x)

    def value(g):
        return (gated(unet, x, t, text, g, mode).out * upstream).sum()

    (gradient,) = torch.autograd.grad(value(gates), gates)
    columns = [int(i) for s in plan.segments for i in torch.linspace(s.start, s.stop - 1, 3).round()]
    columns += range(plan.widths, plan.size)
    scale, step = gradient.abs().max(), 1e-5
    with torch.no_grad():
        for n, column in enumerate(columns):
            ahead, behind, row = gates.clone(), gates.clone(), n % 2
            ahead[row, column] += step
            behind[row, column] -= step
            slope = (value(ahead) - value(behind)) / (2 * step)
            torch.testing.assert_close(gradient[row, column], slope, rtol=1e-4, atol=1e-7 * scale.item())


@pytest.mark.parametrize("mode", ["exact", "compat"])
def test_gates_are_per_sample(mode):
    unet = make_unet(TINY)
    x, t, text = inputs(TINY, batch=3)
    gates = torch.rand(3, layout(TINY).size)
    gates[1, layout(TINY).widths :] = 0
    together = gated(unet, x, t, text, gates, mode).out
    alone = [gated(unet, x[i : i + 1], t[i : i + 1], text[i : i + 1], gates[i : i + 1], mode).out for i in range(3)]
    assert relative(together, torch.cat(alone)) <= 1e-5
    assert relative(together[:1], gated(unet, x[:1], t[:1], text[:1], gates[1:2], mode).out) > 0.01


def test_recompute_changes_nothing():
    unet = make_unet(TINY)
    x, t, text = inputs(TINY)
    gates = torch.rand(2, layout(TINY).size, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        unet.recompute = recompute
        gradients += torch.autograd.grad(gated(unet, x, t, text, gates).out.square().sum(), gates)
    assert torch.equal(*gradients)
    assert gradients[0].abs().min() > 0


def test_padded_resnets():
    """A dense UNet stored with padding: the zeros stay zeros."""
    unet = make_unet(TINY)
    padded = UNet(TINY, align=24)
    padded.load_state_dict(unet.state_dict())
    assert padded.down_blocks[0].resnets[0].pad == 8
    x, t, text = inputs(TINY)
    gates = torch.rand(2, layout(TINY).size)
    for mode in ("exact", "compat"):
        assert relative(gated(padded, x, t, text, gates, mode).out, gated(unet, x, t, text, gates, mode).out) <= 1e-5


def test_refuses():
    unet = make_unet(TINY)
    x, t, text = inputs(TINY)
    size = layout(TINY).size
    with pytest.raises(ValueError, match=rf"shape \(2, {size - 1}\), wanted \(B, {size}\)"):
        gated(unet, x, t, text, torch.ones(2, size - 1))
    with pytest.raises(ValueError, match="2 samples came with gates of shape"):
        gated(unet, x, t, text, torch.ones(1, size))
    with pytest.raises(UserError, match="this one is pruned"):
        gated(unet.cut(scattered(TINY)), x, t, text, torch.ones(2, size))
