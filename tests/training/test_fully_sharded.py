"""Weights that lie on all ranks in parts train as they do whole; ranks are threads here."""

import threading

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import Block, UNet
from bilevel_fast.training import units
from bilevel_fast.training.fully_sharded import FullyShardedParameters
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.lower import descend
from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.units import members, most_open
from thread_team import together
from world import TINY

ONE_AT_A_TIME = threading.Lock()


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr(units, "SMALL", 0)


def unet() -> UNet:
    """With padding inside of its parameters, which a state dict leaves out."""
    with ONE_AT_A_TIME:  # threads share torch's random numbers
        torch.manual_seed(0)
        return UNet(TINY, Structure.uniform(TINY, 0.6), 8)


def inputs(part: int):
    generator = torch.Generator().manual_seed(part)
    x = torch.randn(1, TINY.in_channels, 8, 8, generator=generator)
    return x, torch.tensor([100 + part]), torch.randn(1, 5, TINY.cross_attention_dim, generator=generator)


def losses(network: UNet, parts):
    for part in parts:
        x, t, text = inputs(part)
        out = network(x, t, text)
        yield Loss(F.mse_loss(out.out.float(), x) + sum(b.float().square().mean() for b in out.blocks), {})


def train(flat, mine, steps=2):
    """Steps of AdamW; `mine` are the parts of a batch that are computed here."""
    optimizer = LevelOptimizer(flat, 1e-4, 0, clip_norm=1.0, make=lambda flat: AdamW(flat, decay=0.9))
    norms = []
    for _ in range(steps):
        descend(losses(flat.module, mine), len(mine), flat)
        norms.append(optimizer.step())
    return optimizer, torch.stack(norms)


def vector(state) -> torch.Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(state.items())])


def assert_off_by_rounding(state, wanted, by=1e-6) -> None:
    assert state.keys() == wanted.keys()
    assert (vector(state) - vector(wanted)).norm() <= by * vector(wanted).norm()


def test_every_parameter_is_in_one_unit_and_large_blocks_are_apart(monkeypatch):
    network = unet()
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    counts = []
    for small in (0, 20_000, 10**9):
        monkeypatch.setattr(units, "SMALL", small)
        found = members(network, sizes)
        assert sorted(name for member in found for name in member.names) == sorted(sizes)
        assert found[0].module is network
        counts.append(len(found))
    assert counts[0] > counts[1] > counts[2] == 1 + sum(isinstance(module, Block) for module in network.modules())


@pytest.mark.parametrize(
    ("world", "leaves", "micro", "dtype", "recompute", "small"),
    [
        (2, 2, 1, torch.float32, False, 0),
        (2, 4, 2, torch.float32, True, 20_000),
        (3, 3, 1, torch.bfloat16, True, 0),
        (1, 2, 1, torch.float32, False, 20_000),
    ],
)
def test_steps_are_those_of_flat_parameters(monkeypatch, world, leaves, micro, dtype, recompute, small):
    """Norms, masters, average and moments, whatever is whole together; and a released network is whole again."""
    monkeypatch.setattr(units, "SMALL", small)
    parts = range(leaves * micro)
    one = FlatParameters(unet(), dtype, average=True, summed=True)
    one.module.recompute = recompute
    optimizer, norms = train(one, parts)
    buffers = (one.master, one.average, optimizer.rule.second)
    wanted = [{n: v.clone() for n, v in one.state_dict(buffer).items()} for buffer in buffers]

    def work(team):
        flat = FullyShardedParameters(unet(), dtype, average=True, team=team, leaves=leaves)
        flat.module.recompute = recompute
        mine = [leaf * micro + part for leaf in team.ranks.leaves(leaves) for part in range(micro)]
        optimizer, norms = train(flat, mine)
        assert not any(p.untyped_storage().nbytes() for p in flat.module.parameters()), "nothing is left open"
        states = [flat.state_dict(buffer) for buffer in (flat.master, flat.average, optimizer.rule.second)]
        found = product(flat)
        team.events.clear()
        network = flat.release()
        return team.rank, flat, norms, states, found, network

    close = 1e-6 if dtype == torch.float32 else 1e-3
    for rank, flat, its_norms, states, found, network in together(world, work):
        assert its_norms[0] == pytest.approx(float(norms[0]), rel=3 * close), "sums of squares in fp32, over other rows"
        assert its_norms[1] == pytest.approx(float(norms[1]), rel=10 * close), "AdamW makes steps of rounding, too"
        assert flat._units.peak <= most_open(flat.module, flat._cut, recompute) < flat.size
        assert found == pytest.approx(product(one), rel=10 * close)
        if rank:
            assert states == [{}, {}, {}]
            continue
        for state, expected, by in zip(states, wanted, (close, close, 10 * close), strict=True):
            assert_off_by_rounding(state, expected, by)
        assert_off_by_rounding(network.state_dict(), wanted[1], close)
        assert network(*inputs(0)).out.isfinite().all()


def product(flat) -> float:
    """A product over all ranks."""
    return float(flat.dot(flat.average, flat.master))


def test_what_is_saved_in_parts_is_read_by_any_number_of_ranks_and_whole():
    """Bit for bit, of masters and of any other buffer."""
    whole = FlatParameters(unet())
    numbers = torch.arange(len(whole.master), dtype=torch.float32) * 1e-3
    saved = {name: value.clone() for name, value in whole.state_dict(numbers).items()}

    def work(team):
        flat = FullyShardedParameters(unet(), team=team, leaves=6)
        flat.load_state_dict(saved)
        flat.load_state_dict(saved, flat.gradient)
        with pytest.raises(RuntimeError, match=r"^extra is not of this network$"):
            flat.load_state_dict(saved | {"extra": flat.master})
        with pytest.raises(RuntimeError, match=r"^size mismatch: conv_in.weight has shape"):
            flat.load_state_dict(saved | {"conv_in.weight": flat.master})
        return flat.state_dict(), flat.state_dict(flat.gradient)

    for world in (1, 2, 3):
        masters, gradients = together(world, work)[0]
        for state in (masters, gradients):
            assert all(torch.equal(value, saved[name]) for name, value in state.items())
        whole.load_state_dict(masters)
        assert all(torch.equal(value, saved[name]) for name, value in whole.state_dict().items())


def test_a_loss_of_what_is_inside_reaches_no_further_than_it_should():
    """Later units have no gradient and are not opened in backward; the order is the same on all ranks."""

    def loss(network):
        heard = []
        inner = network.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
        handle = inner.register_forward_hook(lambda _, __, out: heard.append(out))
        network(*inputs(0))
        handle.remove()
        return Loss(heard[0].square().mean(), {})

    one = FlatParameters(unet())
    descend([loss(one.module)], 1, one)
    wanted = {name: view.clone() for name, view in one.views(one.gradient).items()}

    def work(team):
        flat = FullyShardedParameters(unet(), team=team, leaves=2)
        for _ in range(2):  # what comes next is known the second time
            team.events.clear()
            descend([loss(flat.module)], 1, flat)
        return flat.views(flat.gathered(flat.gradient)), team.events

    (found, events), (_, others) = together(2, work)
    assert events == others
    for name, value in found.items():
        assert_off_by_rounding({"": value}, {"": wanted[name]})
    assert wanted["conv_in.weight"].any()
    assert not wanted["conv_out.weight"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_in_parts_answers_as_it_does_whole(dtype):
    device = torch.device("cpu")
    teacher = unet()
    whole = Teacher.of(unet(), device, dtype)
    wanted = whole._ask(*inputs(3))

    def work(team):
        parts = Teacher.in_parts(teacher, device, dtype, team)
        answers = [parts._ask(*inputs(3)) for _ in range(2)]
        assert not any(p.untyped_storage().nbytes() for p in parts.unet.parameters())
        return answers, parts

    for answers, parts in together(2, work):
        for answer in answers:
            assert torch.equal(answer.out, wanted.out)
            assert all(torch.equal(a, b) for a, b in zip(answer.blocks, wanted.blocks, strict=True))
        assert int(parts.images) == 2
        assert parts.unet.conv_in.weight.dtype == dtype
    assert all(p.numel() and p.dtype == torch.float32 for p in teacher.parameters()), "the one it came from stays"
