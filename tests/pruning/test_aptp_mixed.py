"""A batch of several experts: every row is what its expert, cut out and alone, computes; in value and in gradient."""

import dataclasses
import re
from functools import partial

import pytest
import torch

import bilevel_kernels as triton_ops
import unets
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops import providers
from bilevel_fast.pruning.aptp.mixed import Mix, mixed
from mini_folder import TINY
from unets import SDXL_LIKE, make_unet, random_structure, relative

SD_LIKE = dataclasses.replace(
    SD21, sample_size=16, block_out_channels=(16, 32, 32, 32), num_heads=(2, 4, 4, 4), norm_num_groups=8,
    cross_attention_dim=24,
)  # fmt: skip
CONFIGS = {
    "tiny": TINY,
    "mini": MINI,
    "sd21": SD_LIKE,
    "sd15": dataclasses.replace(SD_LIKE, use_linear_projection=False, layers_per_block=1),
    "no_mid": dataclasses.replace(SD_LIKE, mid_block_type=None, layers_per_block=1),
    "sdxl": SDXL_LIKE,
}
SMALLEST = dataclasses.replace(
    TINY, block_out_channels=(8, 16), down_block_types=TINY.down_block_types[1:], num_heads=(2, 2),
    up_block_types=TINY.up_block_types[:-1], norm_num_groups=4, cross_attention_dim=8, mid_block_type=None,
)  # fmt: skip
EXPERT = torch.tensor([2, 0, 3, 1, 0])
inputs = partial(unets.inputs, batch=len(EXPERT), side=8)


def experts(config):
    """Three of any kind, and the dense one."""
    return [*(random_structure(config, seed, 0.4) for seed in range(3)), Structure.dense(config)]


def row(tensors, b):
    return [x[b : b + 1] for x in tensors]


def cut(unet, structure):
    """`UNet.cut`, which returns fp32, in the dtype of the UNet."""
    student = unet.cut(structure).to(unet.conv_in.weight.dtype)
    student.load_state_dict(structure.slice(unet.state_dict()))
    return student


def assert_each_is_alone(unet, structures, expert, given, tolerance):
    with torch.no_grad():
        ours = mixed(unet, *given, structures, expert)
        for b, number in enumerate(expert.tolist()):
            alone = cut(unet, structures[number])(*row(given, b))
            assert relative(ours.out[b : b + 1], alone.out) <= tolerance
            for mine, theirs in zip(ours.blocks, alone.blocks, strict=True):
                assert mine.is_contiguous(memory_format=torch.channels_last)
                assert relative(mine[b : b + 1], theirs) <= tolerance
    return ours


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"), [*((name, torch.float64, 1e-12) for name in CONFIGS), ("mini", torch.float32, 1e-5)]
)
def test_each_row_is_its_expert_alone(name, dtype, tolerance):
    config = CONFIGS[name]
    unet, structures = make_unet(config, dtype), experts(config)
    given = inputs(config, dtype=dtype)
    ours = assert_each_is_alone(unet, structures, EXPERT, given, tolerance)
    other = mixed(unet, *given, structures, EXPERT.flip(0))
    assert relative(other.out[0], ours.out[0]) > 0.01  # whose it is matters


@pytest.mark.parametrize("expert", [[1, 1, 1, 1, 1], [0, 0, 1, 1, 3], [3, 2, 1, 0, 3]])
@pytest.mark.parametrize("seed", range(2))
def test_random_experts(seed, expert):
    structures = [random_structure(TINY, 10 * seed + k, drop) for k, drop in enumerate((0.0, 0.5, 0.9, 1.0))]
    unet, given = make_unet(TINY, torch.float64), inputs(TINY, dtype=torch.float64)
    assert_each_is_alone(unet, structures, torch.tensor(expert), given, 1e-12)


def test_sites_that_nobody_there_has():
    """All droppable sites are gone for every row, though one expert of the mixture has them."""
    structures = [random_structure(TINY, 0, 1.0), random_structure(TINY, 1, 1.0), Structure.dense(TINY)]
    assert len(structures[0].dropped) > 5
    unet, given = make_unet(TINY), inputs(TINY)
    assert_each_is_alone(unet, structures, torch.tensor([1, 0, 0, 1, 0]), given, 1e-5)


def test_one_expert_is_the_model_cut():
    """In one batch, too: K = 1, and K = 4 with all rows at one."""
    unet, structures = make_unet(MINI), experts(MINI)
    given = inputs(MINI, side=16)
    zeros, twos = torch.zeros(5, dtype=torch.int64), torch.full((5,), 2)
    with torch.no_grad():
        for some, expert, number in ((structures[2:3], zeros, 2), (structures, twos, 2)):
            assert relative(mixed(unet, *given, some, expert).out, unet.cut(structures[number])(*given).out) <= 1e-5
        assert relative(mixed(unet, *given, [Structure.dense(MINI)], zeros).out, unet(*given).out) <= 1e-5


def test_rows_in_another_order_give_results_in_that_order():
    unet, structures = make_unet(TINY, torch.float64), experts(TINY)
    given = inputs(TINY, dtype=torch.float64)
    ours = mixed(unet, *given, structures, EXPERT)
    for order in ([4, 3, 2, 1, 0], [1, 4, 3, 0, 2]):  # the second is sorted by expert already
        other = mixed(unet, *(x[order] for x in given), structures, EXPERT[order])
        for mine, theirs in zip((other.out, *other.blocks), (ours.out, *ours.blocks), strict=True):
            assert relative(mine, theirs[order]) <= 1e-12


def test_same_bits_twice_and_nothing_is_changed():
    unet, structures = make_unet(TINY), experts(TINY)
    given = inputs(TINY)
    before = {name: p.clone() for name, p in unet.named_parameters()}
    copies = [x.clone() for x in given]
    one, two = (mixed(unet, *given, structures, EXPERT) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((one.out, *one.blocks), (two.out, *two.blocks), strict=True))
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_experts(recompute):
    """Of the input, and of the dense weights: what each expert's weights get, added up where they lie."""
    unet, structures = make_unet(TINY, torch.float64).requires_grad_(), experts(TINY)
    unet.recompute = recompute
    x, *others = inputs(TINY, dtype=torch.float64)
    weight = torch.randn_like(x)
    x.requires_grad_()
    (mixed(unet, x, *others, structures, EXPERT).out * weight).sum().backward()
    assert x.grad is not None
    wanted = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in unet.named_parameters()}
    places = {name: torch.arange(p.numel()).reshape(p.shape) for name, p in wanted.items()}
    for b, number in enumerate(EXPERT.tolist()):
        student, alone = cut(unet, structures[number]), x.detach()[b : b + 1].requires_grad_()
        (student(alone, *row(others, b)).out * weight[b : b + 1]).sum().backward()
        assert alone.grad is not None
        assert relative(x.grad[b : b + 1], alone.grad) <= 1e-11
        where = structures[number].slice(places)
        for name, p in student.named_parameters():
            assert p.grad is not None
            wanted[name].view(-1).index_add_(0, where[name].reshape(-1), p.grad.reshape(-1))
    largest = max(g.abs().max().item() for g in wanted.values())
    for name, p in unet.named_parameters():
        got = torch.zeros_like(p) if p.grad is None else p.grad
        assert (got - wanted[name]).abs().max() <= 1e-11 * largest, name
        assert not got[wanted[name] == 0].any(), f"{name}: what every expert dropped has a gradient"


def test_the_kernels_agree(monkeypatch, device):
    """Values and gradients through Triton: its interpreter where there is no GPU; on one it is the default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if device == "cpu":
        monkeypatch.setitem(providers.TABLE, "cpu", {"mixture": dict.fromkeys(providers.SIZES, "triton")})
    called = set()
    for name in ("structured_conv2d", "pruned_attention", "geglu"):
        real = getattr(triton_ops, name)

        def spy(*args, _real=real, _name=name, **kwargs):
            called.add(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(triton_ops, name, spy)
    structures = [random_structure(SMALLEST, 0, 0.0), random_structure(SMALLEST, 3, 0.7)]
    assert structures[1].dropped
    unet, expert = make_unet(SMALLEST).to(device).requires_grad_(), torch.tensor([1, 0])
    given = [value.to(device) for value in inputs(SMALLEST, batch=2, side=2)]
    ours = mixed(unet, *given, structures, expert).out
    got = torch.autograd.grad(ours.square().sum(), list(unet.parameters()))
    assert called == {"structured_conv2d", "pruned_attention", "geglu"}
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    called.clear()
    wanted = mixed(unet, *given, structures, expert).out
    assert not called
    assert relative(ours, wanted) <= 1e-5
    gold = torch.autograd.grad(wanted.square().sum(), list(unet.parameters()))
    largest = max(g.abs().max().item() for g in gold)
    for (name, _), mine, theirs in zip(unet.named_parameters(), got, gold, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * largest, name


def test_a_known_assignment_makes_no_tables(monkeypatch):
    unet, mix = make_unet(TINY), Mix(tuple(experts(TINY)), torch.device("cpu"))
    given = inputs(TINY)
    first = mixed(unet, *given, mix, EXPERT).out

    def refuse(*_args, **_kwargs):
        raise AssertionError("a table was made")

    monkeypatch.setattr(torch, "tensor", refuse)
    assert torch.equal(mixed(unet, *given, mix, EXPERT.clone()).out, first)
    with pytest.raises(AssertionError, match="a table was made"):
        mixed(unet, *given, mix, EXPERT.flip(0))


def test_bound_rows_come_once_or_twice():
    """As `samplers.guided` calls: all rows without the prompt, then all with it."""
    unet, mix = make_unet(TINY), Mix(tuple(experts(TINY)), torch.device("cpu"))
    x, t, text = inputs(TINY, batch=2)
    call = mix.bind(unet, torch.tensor([2, 0]))
    twice = call(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, text.flip(0)])).out
    assert relative(twice[:2], call(x, t, text).out) <= 1e-5
    assert relative(twice[2:], call(x, t, text.flip(0)).out) <= 1e-5


def test_refusals():
    unet, structures = make_unet(TINY), experts(TINY)
    given = inputs(TINY)
    for expert, message in (
        (torch.tensor([0, 1, 4, 0, 0]), "row 2 wants expert 4, there are 4, counted from 0"),
        (torch.tensor([0, 1, 2, 3, -1]), "row 4 wants expert -1, there are 4, counted from 0"),
        (torch.tensor([0, 1]), "expert: torch.int64 of shape (2,), wanted torch.int64, one for each of 5 rows"),
        (torch.zeros(5), "expert: torch.float32 of shape (5,), wanted torch.int64, one for each of 5 rows"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            mixed(unet, *given, structures, expert)
    with pytest.raises(UserError, match="expert 1 is cut from another UNet than expert 0"):
        mixed(unet, *given, [structures[0], Structure.dense(MINI)], EXPERT)
    with pytest.raises(UserError, match="the experts are cut from another UNet than the one they are to share"):
        mixed(unet, *given, [Structure.dense(MINI)] * 4, EXPERT)
    with pytest.raises(UserError, match="at least one expert"):
        mixed(unet, *given, [], EXPERT)
    with pytest.raises(UserError, match="wanted the dense UNet; this one is pruned"):
        mixed(unet.cut(structures[0]), *given, structures, EXPERT)
    padded = UNet(TINY, align=24)
    assert padded.down_blocks[0].resnets[0].pad
    with pytest.raises(UserError, match="without padding"):
        mixed(padded, *given, structures, EXPERT)
